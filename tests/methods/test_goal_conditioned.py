"""HIQL's five neighbours against the formulas written out; what all six methods promise."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.core import mesh as meshes
from jaxalign.core.types import UserError
from jaxalign.methods import crl, gcbc, gciql, gcivl, hiql, qrl
from jaxalign.ops import goals
from jaxalign.ops.goals import Batch, Goals

S, A, D, B = 3, 2, 8, 16  # sizes of states, actions, representations, batches
KEY = jax.random.key(0)
WIDTHS = dict(actor_hidden=(16,), batch=B)
VALUES = dict(value_hidden=(16,), **WIDTHS)
CONFIGS = {
    hiql: hiql.Config(representation=D, **VALUES),
    gcbc: gcbc.Config(**WIDTHS),
    gcivl: gcivl.Config(**VALUES),
    gciql: gciql.Config(**VALUES),
    crl: crl.Config(representation=D, **VALUES),
    qrl: qrl.Config(representation=D, intervals=4, **VALUES),
}
NEIGHBOURS = [method for method in CONFIGS if method is not hiql]
SLOW = {gcivl: "value", gciql: "critic"}


def name(method):
    return method.__name__.split(".")[-1]


def make_batch(seed=0):
    rng = np.random.default_rng(seed)
    state = [jnp.asarray(rng.normal(size=(B, S)), jnp.float32) for _ in range(7)]
    reached = jnp.asarray(rng.random(B) < 0.3, jnp.float32)
    return Batch(
        observation=state[0],
        action=jnp.asarray(rng.uniform(-1, 1, (B, A)), jnp.float32),
        next_observation=state[0] + 0.1 * state[1],
        value_goal=state[2],
        reward=reached - 1,
        mask=1 - reached,
        actor_goal=state[3],
        low_goal=state[4],
        high_goal=state[5],
        high_target=state[6],
    )


def moved(tree, seed):
    """Biases that are not zero, slow copies that differ from the trained ones."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    pairs = zip(leaves, keys, strict=True)
    return jax.tree.unflatten(
        structure, [a + 0.2 * jax.random.normal(k, a.shape) for a, k in pairs]
    )


@functools.cache
def start(method):
    state = jax.jit(method.init, static_argnums=(0, 1, 2))(CONFIGS[method], S, A, KEY)
    return state._replace(params=moved(state.params, 1), slow=moved(state.slow, 2))


@functools.cache
def updated(method):
    return jax.jit(method.update, static_argnums=0)


# --- the formulas, one call a term ---------------------------------------------------------------


def net(p, *inputs):
    x = jnp.concatenate(inputs, -1)
    for i in range(sum(layer.startswith("hidden") for layer in p)):
        x = jax.nn.gelu(x @ p[f"hidden_{i}"]["kernel"] + p[f"hidden_{i}"]["bias"][None])
        if f"norm_{i}" in p:
            x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)
            x = x * p[f"norm_{i}"]["scale"][None] + p[f"norm_{i}"]["bias"][None]
    return x @ p["out"]["kernel"] + p["out"]["bias"][None]


def twin(p, *inputs):
    return [net(jax.tree.map(lambda a, i=i: a[i], p), *inputs) for i in range(2)]


def log_density(mean, value):
    return -0.5 * ((value - mean) ** 2).sum(-1) - 0.5 * A * jnp.log(2 * jnp.pi)


def expectile(advantage, error, tau):
    return (jnp.where(advantage >= 0, tau, 1 - tau) * error**2).mean()


def ddpg_bc(q, mean, b, alpha):
    scale = jax.lax.stop_gradient(abs(q).mean() + 1e-6)
    return -q.mean() / scale - alpha * log_density(mean, b.action).mean()


def literal_gcbc(config, p, slow, b):
    mean = net(p["actor"]["mean"], b.observation, b.actor_goal)
    return {"loss": -log_density(mean, b.action).mean()}


def literal_gcivl(config, p, slow, b):
    fixed, gamma = jax.lax.stop_gradient(p), config.goals.discount
    next_1, next_2 = (v[:, 0] for v in twin(slow["value"], b.next_observation, b.value_goal))
    slow_1, slow_2 = (v[:, 0] for v in twin(slow["value"], b.observation, b.value_goal))
    advantage = b.reward + gamma * b.mask * jnp.minimum(next_1, next_2) - (slow_1 + slow_2) / 2
    one, two = (v[:, 0] for v in twin(p["value"], b.observation, b.value_goal))
    value_loss = expectile(
        advantage, b.reward + gamma * b.mask * next_1 - one, config.expectile
    ) + expectile(advantage, b.reward + gamma * b.mask * next_2 - two, config.expectile)
    before = sum(twin(fixed["value"], b.observation, b.actor_goal))[:, 0] / 2
    after = sum(twin(fixed["value"], b.next_observation, b.actor_goal))[:, 0] / 2
    weight = jnp.minimum(jnp.exp(config.alpha * (after - before)), 100)
    mean = net(p["actor"]["mean"], b.observation, b.actor_goal)
    return {
        "value_loss": value_loss,
        "actor_loss": -(weight * log_density(mean, b.action)).mean(),
    }


def literal_gciql(config, p, slow, b):
    fixed = jax.lax.stop_gradient(p)
    one, two = twin(slow["critic"], b.observation, b.value_goal, b.action)
    error = jnp.minimum(one, two)[:, 0] - net(p["value"], b.observation, b.value_goal)[:, 0]
    following = net(fixed["value"], b.next_observation, b.value_goal)[:, 0]
    target = b.reward + config.goals.discount * b.mask * following
    q_1, q_2 = (q[:, 0] for q in twin(p["critic"], b.observation, b.value_goal, b.action))
    mean = net(p["actor"]["mean"], b.observation, b.actor_goal)
    policy_q = twin(fixed["critic"], b.observation, b.actor_goal, mean.clip(-1, 1))
    return {
        "value_loss": expectile(error, error, config.expectile),
        "critic_loss": ((q_1 - target) ** 2).mean() + ((q_2 - target) ** 2).mean(),
        "actor_loss": ddpg_bc(jnp.minimum(*policy_q)[:, 0], mean, b, config.alpha),
    }


def literal_crl(config, p, slow, b):
    fixed = jax.lax.stop_gradient(p)
    losses = []
    for phi, psi in zip(
        twin(p["phi"], b.observation, b.action), twin(p["psi"], b.value_goal), strict=True
    ):
        chance = jax.nn.sigmoid(phi @ psi.T / jnp.sqrt(D))
        own = jnp.eye(B)
        losses.append(-(own * jnp.log(chance) + (1 - own) * jnp.log(1 - chance)).mean())
    mean = net(p["actor"]["mean"], b.observation, b.actor_goal)
    phis = twin(fixed["phi"], b.observation, mean.clip(-1, 1))
    psis = twin(fixed["psi"], b.actor_goal)
    q_1, q_2 = ((x * y).sum(-1) / jnp.sqrt(D) for x, y in zip(phis, psis, strict=True))
    return {
        "critic_loss": (losses[0] + losses[1]) / 2,
        "actor_loss": ddpg_bc(jnp.minimum(q_1, q_2), mean, b, config.alpha),
    }


def literal_distance(p, x, y):
    """Components of four intervals: their union, measured between neighbouring end points."""
    x, y = x.reshape(-1, D // 4, 4), y.reshape(-1, D // 4, 4)
    ends = jnp.sort(jnp.concatenate([x, y], -1), -1)
    middle = ((ends[..., 1:] + ends[..., :-1]) / 2)[..., None]
    inside = ((x[..., None, :] < middle) & (middle < y[..., None, :])).any(-1)
    length = ((ends[..., 1:] - ends[..., :-1]) * inside).sum(-1)
    mix = jax.nn.sigmoid(p["mix"])
    return mix * length.mean(-1) + (1 - mix) * length.max(-1)


def literal_qrl(config, p, slow, b):
    fixed = jax.lax.stop_gradient(p)
    s, ahead = net(p["phi"], b.observation), net(p["phi"], b.next_observation)
    far = literal_distance(p, s, net(p["phi"], b.value_goal))
    near = literal_distance(p, s, ahead)
    excess = (jnp.maximum(near - 1, 0) ** 2).mean()
    lam = jnp.exp(p["log_lambda"])
    value_loss = (
        (100 * jnp.log1p(jnp.exp(5 - far / 100))).mean()
        + jax.lax.stop_gradient(lam) * excess
        + lam * (config.slack - jax.lax.stop_gradient(excess))
    )
    predicted = s + net(p["dynamics"], s, b.action)
    both = literal_distance(p, ahead, predicted) + literal_distance(p, predicted, ahead)
    mean = net(p["actor"]["mean"], b.observation, b.actor_goal)
    here, there = net(fixed["phi"], b.observation), net(fixed["phi"], b.actor_goal)
    result = here + net(fixed["dynamics"], here, mean.clip(-1, 1))
    return {
        "value_loss": value_loss,
        "dynamics_loss": both.mean() / 2,
        "actor_loss": ddpg_bc(-literal_distance(fixed, result, there), mean, b, config.alpha),
    }


LITERAL = {
    gcbc: literal_gcbc,
    gcivl: literal_gcivl,
    gciql: literal_gciql,
    crl: literal_crl,
    qrl: literal_qrl,
}


def measure(method, batch):
    """Metrics of an update and the gradient it took: Adam's first average is a tenth of it."""
    after, metrics = updated(method)(CONFIGS[method], start(method), batch, KEY)
    return metrics, jax.tree.map(lambda average: 10 * average, after.opt_state[0].mu)


@pytest.mark.parametrize("method", NEIGHBOURS, ids=name)
def test_losses_and_gradients_are_those_of_the_formulas(method):
    state, b = start(method), make_batch()

    def literal(params):
        terms = LITERAL[method](CONFIGS[method], params, state.slow, b)
        return sum(terms.values()), terms

    metrics, gradient = measure(method, b)
    (total, terms), expected = jax.jit(jax.value_and_grad(literal, has_aux=True))(state.params)
    for term, number in terms.items():
        np.testing.assert_allclose(metrics[term], number, rtol=1e-5, err_msg=term)
    np.testing.assert_allclose(metrics["loss"], total, rtol=1e-5)
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5 * float(abs(e).max())),
        gradient,
        expected,
    )
    assert all(abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("method", SLOW, ids=name)
def test_slow_networks_follow_the_parameters_before_the_step(method):
    state, part = start(method), SLOW[method]
    after, _ = updated(method)(CONFIGS[method], state, make_batch(), KEY)
    jax.tree.map(
        lambda new, old, fast: np.testing.assert_allclose(
            new, 0.995 * old + 0.005 * fast, rtol=1e-5, atol=1e-7
        ),
        after.slow[part],
        state.slow[part],
        state.params[part],
    )


def test_lambda_rises_where_steps_are_too_long_and_falls_where_they_are_short():
    b = make_batch()
    for distance, falls in ((0.0, True), (50.0, False)):
        far = b._replace(next_observation=b.observation + distance)
        metrics, gradient = measure(qrl, far)
        assert (metrics["value_excess"] < CONFIGS[qrl].slack) == falls
        # A gradient is descended.
        assert (gradient["log_lambda"] > 0) == falls


# --- what all of them promise --------------------------------------------------------------------


@pytest.mark.parametrize("method", CONFIGS, ids=name)
def test_seeds_in_one_program_learn_what_they_learn_alone(method):
    config, batches = CONFIGS[method], [make_batch(seed) for seed in range(3)]
    states = [start(method)._replace(params=moved(start(method).params, seed)) for seed in range(3)]
    many, stacked = (
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *three) for three in (states, batches)
    )
    keys = jax.random.split(KEY, 3)
    together = jax.jit(jax.vmap(functools.partial(method.update, config)))(many, stacked, keys)
    for seed, (state, batch) in enumerate(zip(states, batches, strict=True)):
        alone = updated(method)(config, state, batch, keys[seed])
        jax.tree.map(
            lambda a, b, s=seed: np.testing.assert_allclose(a[s], b, rtol=1e-4, atol=1e-5),
            together,
            alone,
        )


@pytest.mark.parametrize("method", [hiql, crl], ids=name)
def test_a_batch_on_eight_devices_is_one_batch(method):
    mesh = meshes.make_mesh(meshes.parse_mesh("data=8"))
    state = jax.device_put(start(method), meshes.replicated(mesh))
    batch = jax.device_put(make_batch(), meshes.batch_sharding(mesh))
    assert len(batch.action.sharding.device_set) == 8
    spread = updated(method)(CONFIGS[method], state, batch, KEY)
    alone = updated(method)(CONFIGS[method], start(method), make_batch(), KEY)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), spread, alone)


@pytest.mark.parametrize("method", CONFIGS, ids=name)
def test_actions_and_values(method):
    config, state, b = CONFIGS[method], start(method), make_batch()
    act = jax.jit(functools.partial(method.act, config))
    mode = act(state.params, b.observation, b.value_goal, KEY, 0.0)
    other = act(state.params, b.observation, b.value_goal, jax.random.key(1), 0.0)
    np.testing.assert_array_equal(mode, other)
    wild = act(state.params, b.observation, b.value_goal, KEY, 3.0)
    assert mode.shape == wild.shape == (B, A)
    assert abs(wild).max() == 1 and abs(wild - mode).max() > 0.5
    if method is not gcbc:
        value = jax.jit(functools.partial(method.value, config))
        assert value(state.params, b.observation, b.value_goal).shape == (B,)


@pytest.mark.parametrize("method", CONFIGS, ids=name)
def test_defaults_are_ogbenchs(method):
    config = method.Config()
    assert (config.batch, config.learning_rate) == (1024, 3e-4)
    assert config.actor_hidden == (512, 512, 512)
    shares = {crl: (0.0, 1.0, 0.0), qrl: (0.0, 0.0, 1.0)}.get(method, (0.2, 0.5, 0.3))
    assert config.goals == Goals(*shares, 0.0, 0.99, 25)
    own = {
        hiql: dict(expectile=0.7, low_alpha=3.0, high_alpha=3.0, representation=10),
        gcbc: {},
        gcivl: dict(expectile=0.9, alpha=10.0),
        gciql: dict(expectile=0.9, alpha=0.3),
        crl: dict(alpha=0.1, representation=512),
        qrl: dict(alpha=0.003, representation=512, intervals=8, slack=0.05),
    }[method]
    assert {field: getattr(config, field) for field in own} == own


def test_the_value_of_a_quasimetric_is_minus_a_distance():
    state, b = start(qrl), make_batch()
    value = jax.jit(functools.partial(qrl.value, CONFIGS[qrl]))
    assert not value(state.params, b.observation, b.observation).any()
    there = net(state.params["phi"], b.observation), net(state.params["phi"], b.value_goal)
    expected = -literal_distance(state.params, *there)
    ours = value(state.params, b.observation, b.value_goal)
    np.testing.assert_allclose(ours, expected, rtol=1e-4)


# --- learning ------------------------------------------------------------------------------------

SPEED, NEAR = 0.1, 0.1  # of a step of length 1 on the square [-1, 1]^2; how near counts as reached


class Walks(NamedTuple):
    observations: jax.Array
    actions: jax.Array
    end: jax.Array
    valid: jax.Array


def noisy_walks(count=200, steps=40):
    """Straight walks to random places of an open square, one after the other, with much noise."""
    rng = np.random.default_rng(0)
    place, goal = rng.uniform(-1, 1, (2, count, 2))
    places, actions = [place], []
    for _ in range(steps):
        arrived = np.linalg.norm(goal - place, axis=1, keepdims=True) < 1.5 * NEAR
        goal = np.where(arrived, rng.uniform(-1, 1, (count, 2)), goal)
        direction = (goal - place) / np.linalg.norm(goal - place, axis=1, keepdims=True)
        actions.append(np.clip(direction + rng.normal(0, 0.5, (count, 2)), -1, 1))
        place = np.clip(place + SPEED * actions[-1], -1, 1)
        places.append(place)
    actions.append(np.zeros((count, 2)))
    index = np.arange(count * (steps + 1))
    end = index // (steps + 1) * (steps + 1) + steps
    return Walks(
        jnp.asarray(np.stack(places, 1).reshape(-1, 2), jnp.float32),
        jnp.asarray(np.stack(actions, 1).reshape(-1, 2), jnp.float32),
        jnp.asarray(end, jnp.int32),
        jnp.asarray(index[index != end], jnp.int32),
    )


def success(act):
    """The share of 200 random goals that `act(place, goal)` reaches within 40 steps."""
    place, goal = jax.random.uniform(jax.random.key(5), (2, 200, 2), minval=-1, maxval=1)

    def step(carry, _):
        place, reached = carry
        place = (place + SPEED * act(place, goal)).clip(-1, 1)
        return (place, reached | (jnp.linalg.norm(place - goal, axis=1) < NEAR)), None

    (_, reached), _ = jax.lax.scan(step, (place, jnp.zeros(200, bool)), length=40)
    return reached.mean()


@pytest.mark.slow
@pytest.mark.parametrize("method", [hiql, gcivl], ids=name)
def test_goals_are_reached(method, optimised):
    config = dataclasses.replace(
        CONFIGS[method],
        goals=Goals(discount=0.95, subgoal_steps=6),
        batch=256,
        learning_rate=3e-3,
        target_rate=0.02,
        value_hidden=(32, 32),
        actor_hidden=(32, 32),
    )

    @jax.jit
    def learn(data):
        def step(state, key):
            batch = goals.sample(data, config.goals, key, config.batch)
            return method.update(config, state, batch, key)[0], None

        state = method.init(config, 2, 2, KEY)
        state, _ = jax.lax.scan(step, state, jax.random.split(jax.random.key(1), 800))
        return success(lambda place, goal: method.act(config, state.params, place, goal, KEY, 0.0))

    assert learn(noisy_walks()) > 0.8
    assert success(lambda place, _: jnp.zeros_like(place) + 0.5) < 0.2


@pytest.mark.parametrize(
    ("method", "change", "says"),
    [
        (gcbc, {"batch": 0}, "batch = 0: must be at least 1"),
        (gcbc, {"learning_rate": -1.0}, "learning_rate = -1.0: must be positive"),
        (gcivl, {"expectile": 1.0}, "expectile = 1.0: must lie between 0 and 1"),
        (gcivl, {"alpha": 0.0}, "alpha = 0.0"),
        (gciql, {"target_rate": 1.0}, "target_rate = 1.0"),
        (gciql, {"actor_hidden": (0,)}, r"actor_hidden = \(0,\)"),
        (crl, {"representation": 0}, "representation = 0"),
        (crl, {"alpha": -0.1}, "alpha = -0.1"),
        (qrl, {"intervals": 3}, "intervals = 3: must divide representation = 8"),
        (qrl, {"slack": 0.0}, "slack = 0.0"),
    ],
)
def test_impossible_configs(method, change, says):
    with pytest.raises(UserError, match=says) as error:
        dataclasses.replace(CONFIGS[method], **change)
    assert "\n" not in str(error.value)
