"""Checkpoints of a run, and a cache of things that are costly to make.

Checkpoints are Orbax's, through its classic manager: written in the background, moved into place in
one piece, and readable on another number of devices. What is stored is flat, `{"state/params/w":
array, ...}`, so the types of the state (NamedTuples, optax states, typed keys) come from the target
of the restore and not from the disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import absl.logging
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from jaxalign.core import distributed, places
from jaxalign.core.metrics import replacing, writing
from jaxalign.core.types import Array, PyTree, UserError

# Orbax tells of every save and restore, and prints the traceback of what it then raises as well.
absl.logging.set_verbosity(absl.logging.FATAL)

SIZES = "sizes.json"  # beside the files of a checkpoint: the length of each


class Checkpoints:
    """The newest `keep` checkpoints of a run, in one directory.

    directory: local, or in a bucket (`gs://...`). With several processes each writes what lies on
        its devices, so the directory must be the same one for all.
    Raises (in `save`, `wait` and `close`): UserError on a full disk; what else went wrong in the
    background comes out there too.
    """

    def __init__(self, directory: str | os.PathLike, keep: int = 2) -> None:
        self.directory = places.shared(directory)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            cleanup_tmp_directories=True,
            # Otherwise a directory that cannot be made leaves threads that end minutes later.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        with writing(self.directory):
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        if not distributed.all_agree(self.directory.is_dir()):
            raise UserError(
                f"{self.directory} is not the same directory for all processes of the run; choose "
                "a --workdir on a file system that they share, or gs://BUCKET/RUN"
            )
        self._unsealed: set[int] = set()

    def save(self, step: int, state: PyTree, key: Array) -> None:
        """Stores state and key as checkpoint `step`; returns once they may be donated."""
        self.wait()
        places.keep()  # so that a bucket has the numbers up to every checkpoint
        if step in self.steps():
            self._manager.delete(step)
        leaves = _flatten({"state": state, "key": key})
        items = ocp.args.Composite(
            tree=ocp.args.JsonSave({name: _describe(leaf) for name, leaf in leaves.items()}),
            arrays=ocp.args.StandardSave(
                {name: _raw(leaf) for name, leaf in leaves.items() if np.size(leaf)}
            ),
        )
        with writing(self.directory):
            self._manager.save(step, args=items, force=True)
        self._unsealed.add(step)

    def restore(self, target: PyTree) -> tuple[PyTree, Array, int] | None:
        """The newest checkpoint that is whole, as (state, key, step); None where there is none.

        A checkpoint that was cut short is deleted with a warning, and the one before is tried.

        target: a state, or the `ShapeDtypeStruct`s of one. Where a leaf has a sharding the stored
            array takes it, on whatever devices it was before; else it is free to go anywhere.
        Raises: UserError when the checkpoint is whole but its arrays are not the target's.
        """
        wanted = {"state": target, "key": jax.eval_shape(lambda: jax.random.key(0))}
        leaves = _flatten(wanted)
        for step in reversed(self.steps()):
            try:
                arrays = self._read_together(step, leaves)
            except (UserError, PermissionError, MemoryError, jax.errors.JaxRuntimeError):
                raise  # the fault of the caller or of the machine, not of the checkpoint
            except Exception as error:
                self._discard(step, error)
            else:
                filled = [_like(arrays.get(name), leaf) for name, leaf in leaves.items()]
                tree = jax.tree.unflatten(jax.tree.structure(wanted), filled)
                return tree["state"], tree["key"], step
        return None

    def steps(self) -> list[int]:
        """The steps of the checkpoints that are complete, rising."""
        return sorted(self._manager.all_steps())

    def wait(self) -> None:
        """Returns when all that was saved is on the disk."""
        with writing(self.directory):
            self._manager.wait_until_finished()
            for step in self._unsealed.intersection(self.steps()):
                self._seal(self.directory / str(step))
            self._unsealed.clear()

    def close(self) -> None:
        """Waits, and lets go of the directory."""
        self.wait()
        self._manager.close()

    def _seal(self, checkpoint: epath.Path) -> None:
        """Notes the length of each file, by which one cut short later is known."""
        if distributed.is_main():
            places.write_text(checkpoint / SIZES, json.dumps(_sizes(checkpoint), indent=2))

    def _read_together(self, step: int, leaves: Mapping[str, Any]) -> dict[str, Any]:
        """As `_read`; what one process cannot read is broken for all, that they stay in step."""
        error, arrays = None, {}
        try:
            arrays = self._read(step, leaves)
        except Exception as found:
            error = found
        everywhere = distributed.all_agree(error is None)
        if error is not None:
            raise error
        if not everywhere:
            raise ValueError("another process cannot read it")
        return arrays

    def _read(self, step: int, leaves: Mapping[str, Any]) -> dict[str, Any]:
        """The stored arrays by name. Raises whatever Orbax finds wrong with them."""
        checkpoint = self.directory / str(step)
        # A run killed right after a save leaves it unsealed: then Orbax alone is the judge.
        if (checkpoint / SIZES).exists():
            _check_whole(checkpoint, json.loads((checkpoint / SIZES).read_text()))
        stored = self._manager.restore(step, args=ocp.args.Composite(tree=ocp.args.JsonRestore()))
        _check_same(checkpoint, stored["tree"], leaves)
        targets = {name: _target(leaf) for name, leaf in leaves.items() if np.size(leaf)}
        items = ocp.args.Composite(arrays=ocp.args.StandardRestore(targets))
        return self._manager.restore(step, args=items)["arrays"]

    def _discard(self, step: int, error: Exception) -> None:
        broken = self.directory / str(step)
        if distributed.is_main():
            broken.rmtree()
        distributed.barrier(f"the deletion of {broken}")
        self._manager.reload()
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        warnings.warn(
            f"checkpoint {broken} is broken ({reason}); deleted, going back to the one before",
            stacklevel=3,
        )


def _flatten(tree: PyTree) -> dict[str, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_impl(leaf: Any) -> Any:
    """As `jax.random.key_impl`, which wants a value, for a `ShapeDtypeStruct` also."""
    found = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), leaf)
    return found[0]


def _raw(leaf: Any) -> Any:
    """What is stored of a leaf; the same for the target of a restore."""
    if not _is_key(leaf):
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.eval_shape(jax.random.key_data, leaf)
    return jax.random.key_data(leaf)


def _describe(leaf: Any) -> list[Any]:
    return [list(leaf.shape), str(leaf.dtype)]


def _target(leaf: Any) -> Any:
    """How Orbax is asked for a leaf: as an array on given devices, or as a numpy array."""
    raw = _raw(leaf)
    if _is_placed(leaf) and not _is_key(leaf):
        return jax.ShapeDtypeStruct(raw.shape, raw.dtype, sharding=leaf.sharding)
    return np.empty(raw.shape, raw.dtype)


def _is_placed(leaf: Any) -> bool:
    """Whether the leaf must lie on certain devices; others follow the arrays that they meet."""
    if isinstance(leaf, jax.Array):
        return leaf.committed
    return getattr(leaf, "sharding", None) is not None


def _like(stored: Any, leaf: Any) -> Any:
    """The stored array as the target's kind of array (an empty one is not stored at all)."""
    if stored is None:
        stored = np.empty(_raw(leaf).shape, _raw(leaf).dtype)
    if _is_key(leaf):
        stored = jax.random.wrap_key_data(jnp.array(stored), impl=_key_impl(leaf))
    if _is_placed(leaf):
        return distributed.put(stored, leaf.sharding)
    return stored if _is_key(leaf) else jnp.array(stored)


def _sizes(checkpoint: epath.Path) -> dict[str, int]:
    found = {}
    for folder, _, names in checkpoint.walk():
        for name in names:
            found[str((folder / name).relative_to(checkpoint))] = (folder / name).stat().length
    return {name: size for name, size in sorted(found.items()) if name != SIZES}


def _check_whole(checkpoint: epath.Path, expected: Mapping[str, int]) -> None:
    found = _sizes(checkpoint)
    for name, size in expected.items():
        if found.get(name) != size:
            raise ValueError(f"{name} has {found.get(name, 'no')} of {size} bytes")


def _check_same(
    checkpoint: epath.Path, stored: Mapping[str, Any], target: Mapping[str, Any]
) -> None:
    wanted = {name: _describe(leaf) for name, leaf in target.items()}
    for name in dict.fromkeys([*wanted, *stored]):
        if stored.get(name) != wanted.get(name):
            raise UserError(
                f"checkpoint {checkpoint} belongs to another configuration: {name} is "
                f"{_shown(stored.get(name))} there and {_shown(wanted.get(name))} in this run; "
                "resume with the configuration it was made with, or choose another --workdir"
            )


def _shown(described: list[Any] | None) -> str:
    return "absent" if described is None else f"{described[1]}{described[0]}"


# --- cache ---------------------------------------------------------------------------------------


def cache_directory() -> Path:
    """$JAXALIGN_CACHE, or jaxalign in $XDG_CACHE_HOME, or ~/.cache/jaxalign."""
    if chosen := os.environ.get("JAXALIGN_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxalign"


def cached(
    kind: str,
    config: Mapping[str, Any],
    make: Callable[[], PyTree],
    like: PyTree | None = None,
) -> PyTree:
    """`make()`, or what it returned when it was last called for this kind and config.

    Files are written and read array by array, so that a host holds one of them at a time.

    With several processes, which may have caches of their own, either all read or all make: `make`
    may compute on all devices.

    kind: a word for the file name, for example "base-digits".
    config: all that the result depends on, as JSON can hold it: the file is named by its hash.
    make: returns nested dicts of arrays (or any tree, when `like` gives its structure).
    like: a tree of arrays or `ShapeDtypeStruct`s; a file that does not fit it is made again. What
        is read goes where its leaf has a sharding, as in `Checkpoints.restore`.
    Raises: UserError when the disk is full.
    """
    text = json.dumps(config, sort_keys=True)
    name = f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.npz"
    path = cache_directory() / name
    found = None
    if path.exists():
        try:
            found = _load(path, like)
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
            warnings.warn(f"{path} is broken, and made again ({error})", stacklevel=2)
    if distributed.all_agree(found is not None):
        return found
    tree = jax.tree.map(jnp.asarray, make())
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    _store(path, tree)
    return tree


def _store(path: Path, tree: PyTree) -> None:
    leaves = _flatten(tree)
    dtypes = {name: str(leaf.dtype) for name, leaf in leaves.items()}
    stored: dict[str, Any] = {f"tree/{name}": _Stored(leaf) for name, leaf in leaves.items()}
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, dtypes=np.array(json.dumps(dtypes)), **stored)


class _Stored:
    """An array as bytes, as the format knows numpy's own types only; fetched when it is asked."""

    def __init__(self, leaf: Array) -> None:
        self._leaf = leaf

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        del dtype, copy
        array = np.asarray(distributed.fetch(self._leaf), order="C")
        return array.reshape((*array.shape, 1)).view(np.uint8)


def _load(path: Path, like: PyTree | None) -> PyTree:
    # Opened here, as numpy leaves a broken file open.
    with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
        dtypes = json.loads(str(file["dtypes"]))

        def read(name: str) -> np.ndarray:
            return file[f"tree/{name}"].view(jnp.dtype(dtypes[name]))[..., 0]

        if like is None:
            return _nest({name: jnp.array(read(name)) for name in dtypes})
        wanted = _flatten(like)
        if wanted.keys() != dtypes.keys():
            raise ValueError("its arrays are not those wanted")
        return jax.tree.unflatten(
            jax.tree.structure(like), [_fitting(read(name), leaf) for name, leaf in wanted.items()]
        )


def _fitting(array: np.ndarray, leaf: Any) -> Array:
    """The array where the leaf lies. Raises ValueError for one of another shape or dtype."""
    if _describe(array) != _describe(leaf):
        raise ValueError("its arrays are not those wanted")
    return _like(array, leaf)


def _nest(arrays: Mapping[str, Array]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *parents, last = name.split("/")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[last] = array
    return tree
