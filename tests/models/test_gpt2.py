"""Every causal language model: what it sees, cache and padding, gradients, devices, adapters."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxalign.core import mesh
from jaxalign.core.types import UserError
from jaxalign.models import attention, folders, gpt2, llama, lora, scalar_head

GOLDEN = Path(__file__).parent / "golden"
T, SLOTS = 9, 12
CONFIGS = {
    "gpt2": gpt2.Config(vocabulary=24, width=16, depth=1, heads=4, inner=40, context=32),
    "qwen": llama.Config(
        vocabulary=24,
        width=16,
        inner=32,
        depth=2,
        heads=4,
        kv_heads=2,
        head_dim=6,
        context=32,
        qkv_bias=True,
        qk_norm=True,
    ),
}


@functools.cache
def made(name: str):
    """A compiled model with every parameter away from its initial value."""
    model = folders.build(CONFIGS[name])
    model = model._replace(hidden=jax.jit(model.hidden), extend=jax.jit(model.extend))
    leaves, tree = jax.tree.flatten(jax.eval_shape(model.init, jax.random.key(0)))
    rng = np.random.default_rng(0)
    return model, tree.unflatten(
        [jnp.asarray(0.4 * rng.normal(size=a.shape) + (a.ndim == 1), jnp.float32) for a in leaves]
    )


@pytest.fixture(params=CONFIGS)
def pair(request):
    return made(request.param)


def inputs(left=(0, 3, 5)):
    ids = np.random.default_rng(1).integers(0, 24, size=(len(left), T))
    return jnp.asarray(ids, jnp.int32), jnp.arange(T)[None] >= jnp.asarray(left)[:, None]


def near(found, expected, tolerance=1e-5):
    assert np.abs(np.asarray(found) - np.asarray(expected)).max() <= tolerance


# --- what torch says -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", folders.FAMILIES)
def test_a_folder_of_transformers_computes_what_torch_computed(family):
    """tests/parity/test_language_models.py writes these folders."""
    with np.load(GOLDEN / family / "expected.npz") as file:
        expected = dict(file)
    ids, mask = expected["ids"], expected["mask"]
    with jax.default_matmul_precision("highest"):
        model, params = folders.load(GOLDEN / family)
        hidden = jax.jit(model.hidden)(params, ids, mask)
        logits = model.logits(model.head(params), hidden)
    assert logits.dtype == jnp.float32
    near(np.asarray(hidden)[mask], expected["hidden"][mask], 1e-4)
    near(np.asarray(logits)[mask], expected["logits"][mask], 1e-4)


# --- what a token sees ---------------------------------------------------------------------------


def test_the_future_is_hidden(pair):
    model, params = pair
    ids, mask = inputs((0, 0))
    before, after = (
        model.hidden(params, ids, mask),
        model.hidden(params, ids.at[:, 6].add(1) % 24, mask),
    )
    near(after[:, :6], before[:, :6], 1e-6)
    assert np.abs(after[:, 6:] - before[:, 6:]).max(axis=(0, 2)).min() > 1e-3


def test_padding_anywhere_changes_nothing(pair):
    """Left, right and in between: the real tokens have the same states."""
    model, params = pair
    ids, _ = inputs((0,))
    places = [np.arange(5), np.arange(T - 5, T), np.array([0, 2, 3, 6, 8])]
    rows, masks = np.full((3, T), 7, np.int32), np.zeros((3, T), bool)
    for row, mask, place in zip(rows, masks, places, strict=True):
        row[place], mask[place] = ids[0, :5], True
    found = np.asarray(model.hidden(params, rows, masks))
    alone = model.hidden(params, ids[:, :5], jnp.ones((1, 5), bool))[0]
    for states, place in zip(found, places, strict=True):
        near(states[place], alone)


def test_rows_of_padding_are_finite(pair):
    model, params = pair
    ids, mask = inputs()
    mask = mask.at[1].set(False)

    def loss(params):
        hidden = model.hidden(params, ids, mask)
        return jnp.where(mask[:, :, None], hidden**2, 0.0).sum()

    gradient = jax.jit(jax.grad(loss))(params)
    assert np.isfinite(model.hidden(params, ids, mask)).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


# --- cache ---------------------------------------------------------------------------------------


def by_cache(model, params, ids, mask, cuts):
    """All states, the tokens given in pieces that end at `cuts`."""
    cache = model.empty_cache(ids.shape[0], SLOTS)
    position, states = attention.positions(mask), []
    for start, stop in zip((0, *cuts), (*cuts, T), strict=True):
        visible = jnp.zeros((ids.shape[0], SLOTS), bool).at[:, :stop].set(mask[:, :stop])
        out, cache = model.extend(
            params, cache, ids[:, start:stop], position[:, start:stop], visible, jnp.int32(start)
        )
        states.append(out)
    return jnp.concatenate(states, axis=1)


@pytest.mark.parametrize("cuts", [(4, 5, 6, 7, 8), (4,)])
def test_cached_is_whole(pair, cuts):
    model, params = pair
    ids, mask = inputs()
    found = by_cache(model, params, ids, mask, cuts)
    expected = model.hidden(params, ids, mask)
    near(np.asarray(found)[mask], np.asarray(expected)[mask])


def test_cache_rows_come_first(pair):
    model, _ = pair
    for leaf in jax.tree.leaves(model.empty_cache(5, SLOTS)):
        assert leaf.shape[0] == 5 and SLOTS in leaf.shape


def test_a_decode_step_copies_no_cache(pair):
    """In a compiled loop the cache is written in place and read as it lies."""
    model, params = pair
    rows, slots = 5, 48

    def loop(params, cache, token):
        def body(i, carry):
            cache, token = carry
            visible = jnp.broadcast_to((jnp.arange(slots) <= i)[None], (rows, slots))
            position = jnp.full((rows, 1), i)
            hidden, cache = model.extend(params, cache, token, position, visible, i)
            return cache, model.logits(model.head(params), hidden).argmax(-1).astype(jnp.int32)

        return jax.lax.fori_loop(0, 4, body, (cache, token))

    cache, token = model.empty_cache(rows, slots), jnp.zeros((rows, 1), jnp.int32)
    text = jax.jit(loop, donate_argnums=1).lower(params, cache, token).compile().as_text()
    shape = ",".join(map(str, jax.tree.leaves(cache)[0].shape))
    assert f"f32[{shape}]" in text
    copies = [line for line in text.splitlines() if f"f32[{shape}]" in line and " copy(" in line]
    assert not copies


# --- precision, memory, devices ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "qwen"])
def test_bfloat16_products(name):
    model, params = made(name)
    half = folders.build(CONFIGS[name], jnp.bfloat16)
    ids, mask = inputs()
    hidden = jax.jit(half.hidden)(params, ids, mask)
    assert hidden.dtype == jnp.bfloat16
    assert half.logits(half.head(params), hidden).dtype == jnp.float32
    assert jax.tree.leaves(half.empty_cache(1, 4))[0].dtype == jnp.bfloat16
    expected = model.hidden(params, ids, mask)
    error = np.abs(np.asarray(hidden, np.float32) - expected)[np.asarray(mask)]
    assert 0 < error.mean() < 0.02 * np.abs(expected).mean() + 0.02


def test_remat_changes_no_gradient():
    model, params = made("gpt2")
    ids, mask = inputs()

    def gradient(model):
        return jax.jit(jax.grad(lambda p: (model.hidden(p, ids, mask) ** 2).mean()))(params)

    saving = folders.build(CONFIGS["gpt2"], remat=True)
    jax.tree.map(near, gradient(saving), gradient(model))
    traced = jax.make_jaxpr(lambda p: saving.hidden(p, ids, mask))(params)
    assert "remat" in str(traced) or "checkpoint" in str(traced)


@pytest.mark.parametrize(("name", "rules"), [("gpt2", gpt2.RULES), ("qwen", llama.RULES)])
def test_eight_devices_say_what_one_says(name, rules):
    model, params = made(name)
    ids, mask = inputs((0, 3, 5, 1))
    expected = model.hidden(params, ids, mask)
    devices = mesh.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    places = mesh.shardings(params, devices, rules)
    cut = {leaf.spec for leaf in jax.tree.leaves(places)}
    assert PartitionSpec("fsdp", "tensor") in cut and PartitionSpec("tensor", "fsdp") in cut
    spread = NamedSharding(devices, PartitionSpec(("data", "fsdp")))
    ids, mask = jax.device_put((ids, mask), spread)
    found = model.hidden(jax.device_put(params, places), ids, mask)
    near(found, expected)


# --- adapters and scalar heads -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "qwen"])
def test_adapters_by_path(name):
    model, params = made(name)
    adapters = lora.init_lora(
        jax.random.key(0), params, 2, r".*attention/(query|key|value|out)/kernel"
    )
    assert len(adapters) == CONFIGS[name].depth * 4
    ids, mask = inputs()

    def hidden(adapters):
        return model.hidden(lora.effective({"model": params, "lora": adapters}), ids, mask)

    near(hidden(adapters), model.hidden(params, ids, mask), 1e-6)
    gradient = jax.jit(jax.grad(lambda a: (hidden(a) ** 2)[:, -1].sum()))(adapters)
    # A key's adapter needs the others to have moved, where heads share keys or not.
    assert all(np.abs(g["up"]).max() > 0 for g in gradient.values())


def test_a_scalar_for_each_prefix(pair):
    model, params = pair
    scalar = scalar_head.with_scalar_head(model)
    ids, mask = inputs()
    params = scalar_head.attach_head(params, model.width, jax.random.key(1))
    assert "lm_head" not in params["model"]
    expected = jax.eval_shape(scalar.init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, expected)
    params["head"]["bias"] = jnp.array([0.25])
    scores = jax.jit(scalar.scores)(params, ids, mask)
    assert scores.shape == ids.shape and scores.dtype == jnp.float32
    hidden = np.asarray(model.hidden(params["model"], ids, mask))
    near(scores, hidden @ np.asarray(params["head"]["kernel"])[:, 0] + 0.25)


def test_a_head_without_key_is_zero():
    model, params = made("gpt2")
    scalar = scalar_head.with_scalar_head(model)
    scores = scalar.scores(scalar_head.attach_head(params, model.width), *inputs())
    np.testing.assert_array_equal(scores, 0)


def test_a_new_head_has_the_published_scale():
    head = scalar_head.attach_head({}, 9_999, jax.random.key(0))["head"]["kernel"]
    assert float(head.std()) == pytest.approx(0.01, rel=0.05)


def test_heads_must_divide_the_width():
    with pytest.raises(UserError, match="width 16, heads 3"):
        gpt2.Config(vocabulary=24, width=16, depth=1, heads=3, inner=8)


def test_an_untied_head_is_a_matrix_of_its_own():
    config = gpt2.Config(vocabulary=24, width=16, depth=1, heads=2, inner=8, tied=False)
    hidden = jnp.ones((2, 3, 16))
    model = gpt2.gpt2(config)
    table = model.head({"lm_head": {"kernel": jnp.full((16, 24), 0.5)}})
    logits = model.logits(table, hidden)
    np.testing.assert_array_equal(logits, np.full((2, 3, 24), 8.0))


def test_initial_scale():
    """Outputs of the halves start smaller by sqrt(2 depth) (Radford et al. 2019, section 2.3)."""
    config = gpt2.Config(vocabulary=64, width=64, depth=2, heads=4, inner=64, context=64)
    params = gpt2.gpt2(config).init(jax.random.key(0))
    block = params["block_1"]
    assert float(block["up"]["kernel"].std()) == pytest.approx(0.02, rel=0.05)
    assert float(block["down"]["kernel"].std()) == pytest.approx(0.01, rel=0.05)
    assert float(params["token"]["embedding"].std()) == pytest.approx(0.02, rel=0.05)
