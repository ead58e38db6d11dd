"""HIQL's losses and gradients against the formulas written out, and which network feeds which."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.core.types import UserError
from jaxalign.methods import hiql
from jaxalign.ops.goals import Batch, Goals

S, A, D, B = 3, 2, 4, 16  # sizes of states, actions, representations, batches
KEY = jax.random.key(0)
SMALL = dict(value_hidden=(16,), actor_hidden=(16,), representation=D, batch=B)
CONFIG = hiql.Config(**SMALL)
LEARNED = dataclasses.replace(hiql.original(), **SMALL)


@functools.cache
def batch():
    rng = np.random.default_rng(0)
    state = [jnp.asarray(rng.normal(size=(B, S)), jnp.float32) for _ in range(7)]
    reached = jnp.asarray(rng.random(B) < 0.3, jnp.float32)
    action = jnp.asarray(rng.uniform(-1, 1, (B, A)), jnp.float32)
    return Batch(
        observation=state[0],
        action=action,
        next_observation=state[0] + 0.1 * state[1],
        value_goal=state[2],
        reward=reached - 1,
        mask=1 - reached,
        actor_goal=state[3],
        low_goal=state[4],
        high_goal=state[5],
        high_target=state[6],
    )


@functools.cache
def start(config=CONFIG):
    """A state whose slow heads differ from the trained ones, and whose biases are not zero."""
    state = jax.jit(hiql.init, static_argnums=(0, 1, 2))(config, S, A, KEY)
    return state._replace(
        params=moved(state.params, 1, 0.1), slow={"value": moved(state.slow["value"], 2, 0.1)}
    )


def moved(tree, seed, scale):
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    pairs = zip(leaves, keys, strict=True)
    return jax.tree.unflatten(
        structure, [a + scale * jax.random.normal(k, a.shape) for a, k in pairs]
    )


# --- the formulas, one call a term ---------------------------------------------------------------


def net(p, *inputs, activation=jax.nn.gelu):
    x = jnp.concatenate(inputs, -1)
    for i in range(sum(name.startswith("hidden") for name in p)):
        x = activation(x @ p[f"hidden_{i}"]["kernel"] + p[f"hidden_{i}"]["bias"][None])
        if f"norm_{i}" in p:
            x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)
            x = x * p[f"norm_{i}"]["scale"][None] + p[f"norm_{i}"]["bias"][None]
    return x @ p["out"]["kernel"] + p["out"]["bias"][None]


def heads(p, *inputs):
    return [net(jax.tree.map(lambda a, i=i: a[i], p), *inputs)[:, 0] for i in range(2)]


def phi(p, s, g):
    x = net(p, s, g)
    return x * jnp.sqrt(D) / jnp.sqrt((x**2).sum(-1, keepdims=True))


def log_density(config, p, value, *inputs):
    activation = {"gelu": jax.nn.gelu, "relu": jax.nn.relu}[config.actor_activation]
    mean = net(p["mean"], *inputs, activation=activation)
    std = jnp.exp(p["log_std"])[None] if config.learned_std else jnp.ones((1, 1))
    error = (value - mean) / std
    return (-0.5 * error**2 - jnp.log(std) - 0.5 * jnp.log(2 * jnp.pi)).sum(-1)


def literal_value_loss(config, p, slow, b):
    fixed = jax.lax.stop_gradient(p)
    ahead = phi(fixed["representation"], b.next_observation, b.value_goal)
    here = phi(fixed["representation"], b.observation, b.value_goal)
    next_1, next_2 = heads(slow["value"], b.next_observation, ahead)
    slow_1, slow_2 = heads(slow["value"], b.observation, here)
    gamma = config.goals.discount
    advantage = b.reward + gamma * b.mask * jnp.minimum(next_1, next_2) - (slow_1 + slow_2) / 2
    weight = jnp.where(advantage >= 0, config.expectile, 1 - config.expectile)
    one, two = heads(
        p["value"], b.observation, phi(p["representation"], b.observation, b.value_goal)
    )
    error_1 = b.reward + gamma * b.mask * next_1 - one
    error_2 = b.reward + gamma * b.mask * next_2 - two
    return (weight * error_1**2).mean() + (weight * error_2**2).mean()


def literal_advantage(p, s, later, g):
    """Of `later` against s, by the trained heads, without reward and discount."""
    fixed = jax.lax.stop_gradient(p)
    after = heads(fixed["value"], later, phi(fixed["representation"], later, g))
    before = heads(fixed["value"], s, phi(fixed["representation"], s, g))
    return (after[0] + after[1]) / 2 - (before[0] + before[1]) / 2


def literal_low_loss(config, p, slow, b):
    advantage = literal_advantage(p, b.observation, b.next_observation, b.low_goal)
    subgoal = jax.lax.stop_gradient(phi(p["representation"], b.observation, b.low_goal))
    density = log_density(config, p["low"], b.action, b.observation, subgoal)
    return -(jnp.minimum(jnp.exp(config.low_alpha * advantage), 100) * density).mean()


def literal_high_loss(config, p, slow, b):
    advantage = literal_advantage(p, b.observation, b.high_target, b.high_goal)
    target = jax.lax.stop_gradient(phi(p["representation"], b.observation, b.high_target))
    density = log_density(config, p["high"], target, b.observation, b.high_goal)
    return -(jnp.minimum(jnp.exp(config.high_alpha * advantage), 100) * density).mean()


LITERAL = {
    "value_loss": literal_value_loss,
    "low_loss": literal_low_loss,
    "high_loss": literal_high_loss,
}


@functools.cache
def measured():
    """Loss, metrics and gradient of the method."""
    return jax.jit(jax.value_and_grad(hiql.loss, argnums=1, has_aux=True), static_argnums=0)


def terms(config, p, slow, b):
    return {name: term(config, p, slow, b) for name, term in LITERAL.items()}


def total(config, p, slow, b):
    return sum(terms(config, p, slow, b).values())


# --- tests ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [CONFIG, LEARNED], ids=["ogbench", "original"])
def test_losses_and_gradients_are_those_of_the_formulas(config):
    state, b = start(config), batch()
    (loss, metrics), gradient = measured()(config, state.params, state.slow, b)
    expected = jax.jit(terms, static_argnums=0)(config, state.params, state.slow, b)
    for name, number in expected.items():
        np.testing.assert_allclose(metrics[name], number, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(loss, sum(expected.values()), rtol=1e-5)
    literal = jax.jit(jax.grad(total, argnums=1), static_argnums=0)
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5 * float(abs(e).max())),
        gradient,
        literal(config, state.params, state.slow, b),
    )
    assert all(abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


def test_policies_give_no_gradient_to_the_representation_and_the_value():
    state, b = start(), batch()

    def policies(params):
        loss, metrics = hiql.loss(CONFIG, params, state.slow, b)
        return loss - metrics["value_loss"]

    gradient = jax.jit(jax.grad(policies))(state.params)
    for name in ("representation", "value"):
        # Of the difference of the two losses nothing is left but rounding.
        assert max(abs(leaf).max() for leaf in jax.tree.leaves(gradient[name])) < 1e-6
    assert all(abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(gradient["low"]))
    assert all(abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(gradient["high"]))


def test_slow_heads_move_the_value_loss_only_and_trained_heads_the_advantages():
    state, b = start(), batch()
    _, before = measured()(CONFIG, state.params, state.slow, b)[0]
    slow = {"value": moved(state.slow["value"], 5, 0.3)}
    _, after = measured()(CONFIG, state.params, slow, b)[0]
    assert abs(after["value_loss"] - before["value_loss"]) > 1e-3
    for name in ("low_advantage", "high_advantage", "low_loss", "high_loss", "value_mean"):
        assert after[name] == before[name]
    params = {**state.params, "value": moved(state.params["value"], 5, 0.3)}
    _, after = measured()(CONFIG, params, state.slow, b)[0]
    for name in ("low_advantage", "high_advantage", "value_mean", "value_loss"):
        assert abs(after[name] - before[name]) > 1e-3


def test_slow_heads_follow_the_parameters_before_the_step():
    state, b = start(), batch()
    config = dataclasses.replace(CONFIG, learning_rate=0.1)  # the step itself must show
    after, metrics = jax.jit(hiql.update, static_argnums=0)(config, state, b, KEY)
    jax.tree.map(
        lambda new, old, fast: np.testing.assert_allclose(
            new, 0.995 * old + 0.005 * fast, rtol=1e-5, atol=1e-7
        ),
        after.slow["value"],
        state.slow["value"],
        state.params["value"],
    )
    assert after.step == 1 and metrics["gradient_norm"] > 0
    # The first step of Adam moves each parameter by its rate, against the gradient's sign.
    _, gradient = measured()(config, state.params, state.slow, b)
    for name in ("representation", "low"):
        move = jax.tree.map(jnp.subtract, after.params[name], state.params[name])
        for m, g in zip(jax.tree.leaves(move), jax.tree.leaves(gradient[name]), strict=True):
            large = np.asarray(abs(g)) > 1e-4
            np.testing.assert_allclose(m[large], -0.1 * np.sign(g)[large], rtol=1e-3)


def test_subgoals_have_the_length_of_representations():
    state, b = start(), batch()
    nets = hiql.networks(CONFIG, S, A)
    act = jax.jit(hiql.act, static_argnums=0)
    high = nets.high.apply(state.params["high"], b.observation, b.high_goal).mean
    subgoal = high / jnp.linalg.norm(high, axis=-1, keepdims=True) * D**0.5
    low = nets.low.apply(state.params["low"], b.observation, subgoal).mean
    action = act(CONFIG, state.params, b.observation, b.high_goal, KEY, 0.0)
    np.testing.assert_allclose(action, np.clip(low, -1, 1), rtol=1e-4, atol=1e-6)
    wild = act(CONFIG, state.params, b.observation, b.high_goal, KEY, 5.0)
    assert abs(wild).max() == 1 and abs(wild - action).max() > 0.5


def test_the_value_is_the_mean_of_the_trained_heads():
    state, b = start(), batch()
    p = state.params
    one, two = heads(p["value"], b.observation, phi(p["representation"], b.observation, b.low_goal))
    ours = jax.jit(hiql.value, static_argnums=0)(CONFIG, p, b.observation, b.low_goal)
    np.testing.assert_allclose(ours, (one + two) / 2, rtol=1e-4, atol=1e-6)


def test_the_subgoal_shown_is_the_candidate_of_the_nearest_representation():
    state, b = start(), batch()
    high, candidates = state.params["high"]["mean"], b.low_goal[:7]
    wanted = net(high, b.observation, b.high_goal)
    wanted = wanted / jnp.linalg.norm(wanted, axis=-1, keepdims=True) * D**0.5
    distances = [
        ((phi(state.params["representation"], b.observation, there) - wanted) ** 2).sum(-1)
        for there in (jnp.broadcast_to(c[None], b.observation.shape) for c in candidates)
    ]
    ours = hiql.subgoal(CONFIG, state.params, b.observation, b.high_goal, candidates)
    np.testing.assert_array_equal(ours, np.argmin(distances, axis=0))
    assert len(set(ours.tolist())) > 1


def test_the_two_settings():
    ours, theirs = hiql.Config(), hiql.original()
    assert (ours.low_alpha, ours.high_alpha, theirs.low_alpha, theirs.high_alpha) == (3, 3, 1, 1)
    assert ours.goals == Goals() and theirs.goals == Goals(actor_random=0.3)
    shapes = jax.eval_shape(functools.partial(hiql.init, ours, 29, 8), KEY).params
    sizes = {
        name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in shapes.items()
    }
    # As counted in OGBench's own parameters for antmaze.
    millions = {"representation": 0.564, "value": 1.099, "low": 0.550, "high": 0.561}
    assert sizes == {name: pytest.approx(1e6 * m, abs=600) for name, m in millions.items()}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"expectile": 1.0}, "expectile = 1.0: must lie between 0 and 1"),
        ({"expectile": -0.2}, "expectile = -0.2"),
        ({"target_rate": 0.0}, "target_rate = 0.0"),
        ({"low_alpha": 0.0}, "low_alpha = 0.0: must be positive"),
        ({"high_alpha": -1.0}, "high_alpha = -1.0"),
        ({"learning_rate": 0.0}, "learning_rate = 0.0"),
        ({"batch": 0}, "batch = 0: must be at least 1"),
        ({"representation": 0}, "representation = 0"),
        ({"value_hidden": (16, 0)}, r"value_hidden = \(16, 0\)"),
    ],
)
def test_impossible_configs(change, says):
    with pytest.raises(UserError, match=says) as error:
        dataclasses.replace(CONFIG, **change)
    assert "\n" not in str(error.value)
