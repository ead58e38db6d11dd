"""Checkpoints come back bit for bit, broken ones are passed over; so with the cache."""

import errno
import os
import shutil
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxalign.core import checkpoint, mesh
from jaxalign.core.checkpoint import Checkpoints, cached
from jaxalign.core.types import UserError


class State(NamedTuple):
    """All kinds of leaves that a training state may hold."""

    step: Any
    params: Any
    opt_state: Any
    slow: Any
    extra: Any


def make_state(seed: int = 0, width: int = 6) -> State:
    key = jax.random.key(seed)
    params = {
        "dense": {"kernel": jax.random.normal(key, (8, width)), "bias": jnp.zeros(width)},
        "half": jax.random.normal(key, (3,), jnp.bfloat16),
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    extra = {
        "keys": jax.random.split(key, 3),
        "history": jnp.arange(5),
        "empty": jnp.zeros((0, 4)),
        "flag": jnp.array(True),
    }
    return State(jnp.int32(seed), params, optimizer.init(params), None, extra)


def assert_same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def restore(checkpoints: Checkpoints, target: Any) -> tuple[Any, jax.Array, int]:
    found = checkpoints.restore(target)
    assert found is not None
    return found


@pytest.fixture
def saved(tmp_path):
    """A directory with checkpoints 1 and 2, their states made from those seeds."""
    checkpoints = Checkpoints(tmp_path / "ckpt")
    for step in (1, 2):
        checkpoints.save(step, make_state(step), jax.random.key(step))
    checkpoints.close()
    return tmp_path / "ckpt"


def files(checkpoint_directory):
    return [path for path in sorted(checkpoint_directory.rglob("*")) if path.is_file()]


def test_round_trip_of_values_types_and_key(saved):
    checkpoints = Checkpoints(saved)
    for target in (make_state(9), jax.eval_shape(make_state)):
        state, key, step = restore(checkpoints, target)
        assert step == 2
        assert_same(state, make_state(2))
        assert_same(key, jax.random.key(2))
        assert isinstance(state.opt_state[1][0], optax.ScaleByAdamState)
        assert not state.params["dense"]["kernel"].committed  # free, as the target is
    checkpoints.close()


def test_nothing_to_restore(tmp_path):
    checkpoints = Checkpoints(tmp_path / "none")
    assert checkpoints.restore(make_state()) is None
    assert checkpoints.steps() == []
    checkpoints.close()


def test_keeps_the_newest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoints = Checkpoints("relative", keep=2)
    for step in (3, 5, 8):
        checkpoints.save(step, make_state(step), jax.random.key(0))
    checkpoints.wait()
    assert checkpoints.steps() == [5, 8]
    checkpoints.save(8, make_state(1), jax.random.key(0))  # the same step again
    checkpoints.close()
    assert sorted(path.name for path in (tmp_path / "relative").iterdir()) == ["5", "8"]
    again = Checkpoints(tmp_path / "relative")
    state, _, step = restore(again, make_state())
    assert step == 8
    assert_same(state, make_state(1))
    again.close()


def test_a_donated_state_is_saved_as_it_was(tmp_path):
    # The save goes on in the background while the state's memory is used again.
    bump = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = {f"w{i}": jnp.full((500, 500), float(i)) for i in range(4)}
    checkpoints = Checkpoints(tmp_path / "ckpt")
    checkpoints.save(1, state, jax.random.key(0))
    for _ in range(5):
        state = bump(state)
    restored, _, _ = restore(checkpoints, state)
    assert [float(x.min()) for x in restored.values()] == [0.0, 1.0, 2.0, 3.0]
    assert [float(x.max()) for x in restored.values()] == [0.0, 1.0, 2.0, 3.0]
    checkpoints.close()


def test_sharded_state_keeps_its_places_and_moves_to_others(tmp_path):
    state = {"step": jnp.int32(1), "w": jnp.arange(64.0).reshape(8, 8), "keys": jax.random.key(3)}
    wide = mesh.make_mesh({"data": 4, "fsdp": 2})
    rules = [("^w$", PartitionSpec("data", "fsdp"))]
    placed = jax.device_put(state, mesh.shardings(state, wide, rules))
    checkpoints = Checkpoints(tmp_path / "ckpt")
    checkpoints.save(1, placed, jax.random.key(0))
    restored, _, _ = restore(checkpoints, placed)
    assert_same(restored, state)
    assert {x.data.shape for x in restored["w"].addressable_shards} == {(2, 4)}
    assert restored["keys"].sharding.is_equivalent_to(mesh.replicated(wide), 0)

    narrow = mesh.make_mesh({"data": 2}, jax.devices()[:2])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape,
            x.dtype,
            sharding=NamedSharding(narrow, PartitionSpec("data") if x.ndim else PartitionSpec()),
        ),
        jax.eval_shape(lambda: state),
    )
    restored, _, _ = restore(checkpoints, abstract)
    assert_same(restored, state)
    assert {x.data.shape for x in restored["w"].addressable_shards} == {(4, 8)}
    checkpoints.close()


def break_one(directory, how):
    """Cuts the checkpoint short in one of the ways that a crash or a full disk can."""
    largest = max(files(directory), key=lambda path: path.stat().st_size)
    manifest = next(path for path in files(directory) if path.name == "manifest.ocdbt")
    {
        "half the data": lambda: os.truncate(largest, largest.stat().st_size // 2),
        "no data": lambda: largest.unlink(),
        "empty manifest": lambda: os.truncate(manifest, 0),
        "no items": lambda: [shutil.rmtree(x) for x in directory.iterdir() if x.is_dir()],
        "nothing": lambda: [shutil.rmtree(directory), directory.mkdir()],
        "torn sizes": lambda: os.truncate(directory / checkpoint.SIZES, 10),
    }[how]()


@pytest.mark.parametrize(
    "how", ["half the data", "no data", "empty manifest", "no items", "nothing", "torn sizes"]
)
def test_a_broken_checkpoint_is_passed_over(saved, how):
    break_one(saved / "2", how)
    checkpoints = Checkpoints(saved)
    with pytest.warns(UserWarning, match=rf"checkpoint {saved / '2'} is broken"):
        state, key, step = restore(checkpoints, make_state())
    assert step == 1
    assert_same(state, make_state(1))
    assert_same(key, jax.random.key(1))
    checkpoints.save(2, make_state(7), jax.random.key(7))
    checkpoints.wait()
    assert_same(restore(checkpoints, make_state())[0], make_state(7))
    checkpoints.close()


def test_a_checkpoint_without_its_list_of_sizes(saved):
    """A run killed right after the save leaves none: then Orbax alone must notice."""
    (saved / "2" / checkpoint.SIZES).unlink()
    whole = saved.parent / "whole"
    shutil.copytree(saved / "2", whole)
    largest = max(files(whole), key=lambda path: path.stat().st_size).relative_to(whole)
    os.truncate(saved / "2" / largest, 5)
    checkpoints = Checkpoints(saved)
    with pytest.warns(UserWarning, match="is broken"):
        assert restore(checkpoints, make_state())[2] == 1
    checkpoints.close()
    shutil.copytree(whole, saved / "2")
    checkpoints = Checkpoints(saved)
    assert restore(checkpoints, make_state())[2] == 2
    checkpoints.close()


def test_all_broken_is_as_none(saved):
    for step in ("1", "2"):
        break_one(saved / step, "no data")
    checkpoints = Checkpoints(saved)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert checkpoints.restore(make_state()) is None
    assert len([w for w in caught if "is broken" in str(w.message)]) == 2
    checkpoints.close()


def test_another_configuration_is_an_error_and_deletes_nothing(saved):
    checkpoints = Checkpoints(saved)
    with pytest.raises(UserError, match=r"another configuration: .*bias is float32\[6\] there"):
        checkpoints.restore(make_state(width=7))
    with pytest.raises(UserError, match=r"state/slow is absent there and float32\[\] in this run"):
        checkpoints.restore(make_state()._replace(slow=jnp.float32(0)))
    half = make_state()
    half.params["half"] = half.params["half"].astype(jnp.float32)
    with pytest.raises(UserError, match="half is bfloat16"):
        checkpoints.restore(half)
    assert checkpoints.steps() == [1, 2]
    checkpoints.close()


def test_failed_saves_fail_the_run(saved, monkeypatch):
    checkpoints = Checkpoints(saved)

    def full(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: Failed to write 12 bytes: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints._manager, "wait_until_finished", full)
        with pytest.raises(UserError, match="disk is full"):
            checkpoints.wait()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints._manager, "save", full)
        with pytest.raises(UserError, match="disk is full"):
            checkpoints.save(3, make_state(), jax.random.key(0))
    # For real: the directory cannot be written to any more.
    shutil.rmtree(saved)
    saved.write_text("a file, not a directory")
    with pytest.raises(NotADirectoryError):
        checkpoints.save(4, make_state(), jax.random.key(0))


# --- cache ---------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXALIGN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make_tree():
    key = jax.random.key(0)
    return {
        "a": {"w": jax.random.normal(key, (3, 4)), "h": jnp.ones((2, 2), jnp.bfloat16) / 3},
        "n": jnp.int32(3),
        "empty": jnp.zeros((0, 2)),
        "bytes": jnp.arange(7, dtype=jnp.uint8),
        "flags": jnp.array([True, False]),
    }


def test_cached_makes_once_and_returns_the_same_bits(cache):
    calls = []

    def make():
        calls.append(1)
        return make_tree()

    config = {"seed": 0, "b": [1, 2]}
    first = cached("base", config, make)
    second = cached("base", {"b": [1, 2], "seed": 0}, make)  # the order of fields is nothing
    assert len(calls) == 1
    assert_same(first, make_tree())
    assert_same(second, make_tree())
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(second))
    cached("base", {**config, "seed": 1}, make)
    cached("other", config, make)
    assert len(calls) == 3
    assert len(list(cache.iterdir())) == 3 and all(x.suffix == ".npz" for x in cache.iterdir())


@pytest.mark.parametrize("keep", [0, 10, 500])
def test_a_broken_cache_file_is_made_again(cache, keep):
    cached("base", {}, make_tree)
    (file,) = cache.iterdir()
    os.truncate(file, keep)
    with pytest.warns(UserWarning, match="is broken, and made again"):
        assert_same(cached("base", {}, make_tree), make_tree())
    assert_same(cached("base", {}, lambda: pytest.fail("made twice")), make_tree())


def test_like_gives_the_structure_and_is_checked(cache):
    def make():
        return State(jnp.int32(1), {"w": jnp.ones(3)}, (), None, ())

    like = jax.eval_shape(make)
    cached("state", {}, make, like)
    assert_same(cached("state", {}, lambda: pytest.fail("made twice"), like), make())
    other = like._replace(params={"w": jax.ShapeDtypeStruct((4,), jnp.float32)})
    with pytest.warns(UserWarning, match="not those wanted"):
        cached("state", {}, make, other)


def test_cache_directories(monkeypatch, tmp_path):
    monkeypatch.delenv("JAXALIGN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert checkpoint.cache_directory() == tmp_path / "jaxalign"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert checkpoint.cache_directory() == tmp_path / ".cache" / "jaxalign"


def test_cached_goes_to_its_places(cache):
    where = mesh.batch_sharding(mesh.make_mesh())
    like = {"w": jax.ShapeDtypeStruct((8, 3), jnp.bfloat16, sharding=where)}
    made = {"w": jnp.arange(24, dtype=jnp.bfloat16).reshape(8, 3)}
    cached("placed", {}, lambda: made)
    read = cached("placed", {}, lambda: pytest.fail("made twice"), like)
    assert_same(read, made)
    assert read["w"].sharding == where


def test_cache_on_a_full_disk(cache, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(UserError, match="disk is full"):
        cached("base", {}, make_tree)
    assert list(cache.iterdir()) == []
