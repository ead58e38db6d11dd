"""Trainable parts, and gradients that do not depend on how the batch was cut."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign.core import state as states
from jaxalign.core import step as steps
from jaxalign.core.types import Max, Mean, UserError

ROWS = 8


def make_params():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "body": {"w": jax.random.normal(keys[0], (3, 4)), "b": jax.random.normal(keys[1], (4,))},
        "head": {"w": jax.random.normal(keys[2], (4, 1))},
    }


def make_batch(weight=None):
    rng = np.random.default_rng(1)
    return {
        "x": jnp.asarray(rng.normal(size=(ROWS, 3)), jnp.float32),
        "y": jnp.asarray(rng.normal(size=(ROWS,)), jnp.float32),
        "weight": jnp.asarray(rng.random(ROWS) if weight is None else weight, jnp.float32),
    }


def objective(params, batch, key):
    """Weighted squared error; its metrics count rows and find the worst."""
    del key
    h = jnp.tanh(batch["x"] @ params["body"]["w"] + params["body"]["b"][None])
    error = ((h @ params["head"]["w"])[:, 0] - batch["y"]) ** 2
    metrics = {
        "error": Mean(error.sum(), jnp.float32(len(error))),
        "worst": Max(error.max()),
        "rows": Mean(jnp.float32(len(error)), jnp.float32(1)),
    }
    return Mean((error * batch["weight"]).sum(), batch["weight"].sum()), metrics


@functools.partial(jax.jit, static_argnames=("micro_batches", "trainable"))
def gradient_of(params, batch, *, micro_batches, count=None, trainable=".*"):
    split = steps.split_micro(batch, micro_batches)
    take = functools.partial(jax.tree.map, lambda a, i: a[i], split)
    return steps.accumulate(
        objective,
        params,
        lambda i: take(jax.tree.map(lambda _: i, split)),
        micro_batches if count is None else count,
        jax.random.key(0),
        trainable=trainable,
    )


def assert_close(a, b, rtol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6), a, b)


# --- state ----------------------------------------------------------------------------


def test_partition_and_merge_are_inverses():
    params = make_params()
    trained, frozen = states.partition(params, "body/.*")
    assert trained["head"] == {"w": None}
    assert frozen["body"] == {"w": None, "b": None}
    assert states.merge(trained, frozen).keys() == params.keys()
    jax.tree.map(np.testing.assert_array_equal, states.merge(trained, frozen), params)


def test_the_whole_path_must_match():
    trained, _ = states.partition(make_params(), "body/w|head")
    assert len(jax.tree.leaves(trained)) == 1  # "head" alone is the beginning of a path


def test_paths():
    expected = {"body": {"w": "body/w", "b": "body/b"}, "head": {"w": "head/w"}}
    assert states.paths(make_params()) == expected


def test_nothing_to_train_is_the_users_error():
    with pytest.raises(
        UserError, match=r"'bdoy/\.\*' matches no parameter; paths look like 'body/b'"
    ):
        states.partition(make_params(), "bdoy/.*")


def test_optimizer_memory_is_for_trainable_leaves_only():
    state = states.create(make_params(), optax.adam(1e-3), trainable="head/.*")
    sizes = [leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert sizes == [4, 4]  # two moments of head/w
    assert int(state.step) == 0


# --- gradients ------------------------------------------------------------------------


def test_accumulation_is_the_gradient_of_the_whole_batch():
    params, batch = make_params(), make_batch()

    def plain(params):
        loss, _ = objective(params, batch, None)
        return loss.total / loss.weight

    loss, expected = jax.value_and_grad(plain)(params)
    for micro_batches in (1, 2, 4):
        gradient, metrics = gradient_of(params, batch, micro_batches=micro_batches)
        assert_close(gradient, expected)
        assert metrics["loss"] == pytest.approx(float(loss), rel=1e-5)
        assert metrics["rows"] == ROWS / micro_batches


def test_accumulation_with_masks_of_unequal_size():
    """All weight in one micro-batch, none in another: a mean of means would be wrong."""
    params, batch = make_params(), make_batch([1, 0, 0.5, 0, 1, 0, 0, 0])
    whole = gradient_of(params, batch, micro_batches=1)
    for micro_batches in (2, 4):
        parts = gradient_of(params, batch, micro_batches=micro_batches)
        assert_close(parts[0], whole[0])
        assert parts[1]["loss"] == pytest.approx(float(whole[1]["loss"]), rel=1e-5)
    kept = jax.tree.map(lambda a: a[jnp.array([0, 2, 4])], batch)  # padding is as good as absent
    assert_close(gradient_of(params, kept, micro_batches=1)[0], whole[0])


def test_traced_count_equals_static_count():
    params, batch = make_params(), make_batch()
    static = gradient_of(params, batch, micro_batches=4)
    traced = gradient_of(params, batch, micro_batches=4, count=jnp.asarray(4))
    assert_close(traced, static, rtol=1e-6)
    fewer = gradient_of(params, batch, micro_batches=4, count=jnp.asarray(2))
    first = jax.tree.map(lambda a: a[jnp.array([0, 4, 1, 5])], batch)  # every fourth row
    assert_close(fewer[0], gradient_of(params, first, micro_batches=1)[0])


def test_no_weight_gives_no_gradient_and_no_nan():
    params = make_params()
    zero = jax.tree.map(jnp.zeros_like, params)
    gradient, metrics = gradient_of(params, make_batch(np.zeros(ROWS)), micro_batches=2)
    assert_close(gradient, zero)
    assert metrics["loss"] == 0
    gradient, metrics = gradient_of(params, make_batch(), micro_batches=2, count=jnp.asarray(0))
    assert_close(gradient, zero)
    assert {name: float(value) for name, value in metrics.items()} == dict.fromkeys(metrics, 0.0)


def test_metrics_are_means_and_maxima_over_all_micro_batches():
    params, batch = make_params(), make_batch()
    _, metrics = gradient_of(params, batch, micro_batches=4)
    h = np.tanh(batch["x"] @ params["body"]["w"] + np.asarray(params["body"]["b"])[None])
    error = ((h @ params["head"]["w"])[:, 0] - batch["y"]) ** 2
    assert metrics["error"] == pytest.approx(float(error.mean()), rel=1e-5)
    assert metrics["worst"] == pytest.approx(float(error.max()), rel=1e-5)


def test_mean_and_max_add_up():
    total = Mean(jnp.float32(6), jnp.float32(2)) + Mean(jnp.float32(0), jnp.float32(1))
    assert total.value() == 2.0
    assert (Max(jnp.float32(1)) + Max(jnp.float32(3)) + Max(jnp.float32(2))).value() == 3.0
    empty = jax.grad(lambda w: Mean(w * 0.0, w * 0.0).value())(1.0)
    assert empty == 0.0


def test_frozen_leaves_have_no_gradient():
    gradient, _ = gradient_of(make_params(), make_batch(), micro_batches=2, trainable="head/.*")
    assert gradient["body"] == {"w": None, "b": None}
    whole, _ = gradient_of(make_params(), make_batch(), micro_batches=2)
    assert_close(gradient["head"], whole["head"])


def test_split_micro_takes_every_nth_row():
    split = steps.split_micro({"row": jnp.arange(8), "x": jnp.arange(16).reshape(8, 2)}, 2)
    np.testing.assert_array_equal(split["row"], [[0, 2, 4, 6], [1, 3, 5, 7]])
    np.testing.assert_array_equal(split["x"][1, 0], [2, 3])


# --- the whole step -------------------------------------------------------------------


def make_step(**options):
    optimizer = optax.adamw(0.1, weight_decay=0.1)  # decay would show on a frozen leaf
    step = functools.partial(steps.train_step, objective, optimizer, **options)
    slow = jax.tree.map(jnp.copy, make_params()) if options.get("ema") else None
    trainable = options.get("trainable", ".*")
    state = states.create(make_params(), optimizer, trainable=trainable, slow=slow)
    return state, jax.jit(step, donate_argnums=0)


def test_train_step_moves_the_trainable_part_only_and_donates():
    state, step = make_step(trainable="head/.*", micro_batches=2)
    before = state
    state, metrics = step(state, make_batch(), jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, state.params["body"], make_params()["body"])
    assert float(jnp.abs(state.params["head"]["w"] - make_params()["head"]["w"]).max()) > 0.01
    assert int(state.step) == 1
    gradient, _ = gradient_of(make_params(), make_batch(), micro_batches=1, trainable="head/.*")
    norm = np.linalg.norm(gradient["head"]["w"])
    assert metrics["gradient_norm"] == pytest.approx(norm, rel=1e-5)
    assert before.params["head"]["w"].is_deleted()


def test_train_step_does_not_depend_on_micro_batches():
    results = []
    for micro_batches in (1, 4):
        state, step = make_step(micro_batches=micro_batches)
        for i in range(2):
            state, _ = step(state, make_batch(), jax.random.key(i))
        results.append(state)
    assert_close(results[0].params, results[1].params)


def test_average_follows_with_a_warm_start():
    """Decay min(0.5, (1+n)/(10+n)): 0.1 at first."""
    state, step = make_step(ema=0.5)
    state, _ = step(state, make_batch(), jax.random.key(0))
    expected = steps.follow(make_params(), state.params, 0.1)
    assert_close(state.slow, expected)
    np.testing.assert_allclose(
        steps.follow({"a": jnp.float32(1)}, {"a": jnp.float32(3)}, 0.75)["a"], 1.5
    )
