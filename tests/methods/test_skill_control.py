"""High levels that pick skills, against their formulas; both learn to point where they are told."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.core.types import UserError
from jaxalign.envs.skill_tasks import Choices
from jaxalign.methods import skill_control_ppo as ppo
from jaxalign.methods import skill_control_sac as sac

KEY = jax.random.key(0)
T, E, S, D = 3, 4, 2, 2  # choices of an episode, episodes, observation, skill
OFFSET, SCALE = np.array([0.5, -1.0]), np.array([2.0, 0.5])
SMALL = dict(hidden=(8, 6), episodes=E, batch=16, learning_rate=0.01)
CONFIGS = {
    sac: sac.Config(**SMALL, updates=6, buffer=240, warm_up=24),
    ppo: ppo.Config(**SMALL, updates=4),
}


def title(method):
    return method.__name__.split("_")[-1]


both = pytest.mark.parametrize("method", (sac, ppo), ids=title)


@functools.cache
def start(method):
    state = jax.jit(method.init, static_argnums=(0, 1, 2))(
        CONFIGS[method], S, D, OFFSET, SCALE, KEY
    )
    rng = np.random.default_rng(0)

    def move(leaf):
        return jnp.asarray(leaf + 0.3 * rng.normal(size=leaf.shape), jnp.float32)

    return state._replace(params=jax.tree.map(move, state.params))


@functools.cache
def update(method, config):
    return jax.jit(functools.partial(method.update, config))


def make_episodes(seed=0, one_hot=True):
    rng = np.random.default_rng(seed)
    seen = rng.normal(size=(T + 1, E, S))
    action = np.eye(D)[rng.integers(D, size=(T, E))] if one_hot else rng.uniform(-1, 1, (T, E, D))
    last = np.zeros((T, E))
    last[-1] = 1
    made = Choices(seen[:-1], action, seen[1:], 3 * rng.normal(size=(T, E)), last)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), made)


@both
def test_an_update_is_finite_and_counted(method):
    config = CONFIGS[method]
    state = start(method)
    for i in range(2):
        state, log = update(method, config)(state, make_episodes(i), jax.random.key(i))
    assert int(state.step) == 2 and update(method, config)._cache_size() == 1
    assert all(np.isfinite(value) for value in log.values())
    apart = jax.tree.map(
        lambda a, b: float(jnp.abs(a - b).max()), state.params, start(method).params
    )
    assert min(jax.tree.leaves(apart)) > 0, "something did not learn"
    chosen = method.act(config, state, jnp.ones((5, S)), KEY, 1.0)
    assert chosen.shape == (5, D) and (np.abs(chosen) <= 1).all()


def test_sac_waits_for_its_buffer_and_remembers():
    config, first = CONFIGS[sac], make_episodes(one_hot=False)
    state, log = update(sac, config)(start(sac), first, KEY)
    jax.tree.map(np.testing.assert_array_equal, state.params, start(sac).params)
    assert all(float(value) == 0 for value in log.values())
    memory = state.extra["buffer"]
    assert int(memory.size) == T * E
    np.testing.assert_array_equal(memory.data.reward[: T * E], first.reward.reshape(-1))
    np.testing.assert_array_equal(memory.data.action[: T * E], first.action.reshape(-1, D))
    assert (np.asarray(memory.data.terminal[: T * E]).reshape(T, E)[-1] == 1).all()


def net(p, x, activation):
    for i in range(2):
        x = activation(x @ p[f"hidden_{i}"]["kernel"] + p[f"hidden_{i}"]["bias"])
    return x


def out(p, x, name="out"):
    return x @ p[name]["kernel"] + p[name]["bias"]


def test_sac_critics_learn_reward_and_what_follows():
    """The critics' loss of one step, written out in NumPy."""
    config, state = CONFIGS[sac], start(sac)
    rows = jax.tree.map(lambda leaf: leaf.reshape(T * E, *leaf.shape[2:]), make_episodes(3, False))
    found = jax.jit(sac.gradient_step, static_argnums=0)(config, state, rows, KEY)[1]
    p, slow = jax.device_get((state.params, state.slow["critic"]))
    seen, ahead = (
        (np.asarray(o) - OFFSET) / SCALE for o in (rows.observation, rows.next_observation)
    )
    trunk = net(p["actor"], ahead, np.tanh)
    mean, log_std = out(p["actor"], trunk, "mean"), out(p["actor"], trunk, "log_std")
    noise = np.asarray(jax.random.normal(jax.random.split(KEY)[0], mean.shape))
    action = np.tanh(mean + np.exp(log_std) * noise)
    density = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi) - np.log(1 - action**2 + 1e-6)

    def twins(p, o, a):
        each = [jax.tree.map(lambda leaf, i=i: leaf[i], p) for i in range(2)]
        x = np.concatenate([o, a], -1)
        return [out(q, net(q, x, lambda y: np.maximum(y, 0)))[:, 0] for q in each]

    soft = np.minimum(*twins(slow, ahead, action))
    soft = soft - np.exp(p["log_temperature"]) * density.sum(-1)
    target = np.asarray(rows.reward) + config.discount * (1 - np.asarray(rows.terminal)) * soft
    errors = [q - target for q in twins(p["critic"], seen, np.asarray(rows.action))]
    expected = 0.5 * sum((error**2).mean() for error in errors)
    np.testing.assert_allclose(found["critic_loss"], expected, rtol=1e-4)


def test_ppo_learns_from_advantages_of_the_whole_episode():
    """Losses of the first gradient step: the ratio is 1, values and advantages are loops."""
    config, made = ppo.Config(**SMALL, updates=1), make_episodes(5)
    state = start(ppo)
    found = update(ppo, config)(state, made, KEY)[1]
    p = jax.device_get(state.params)
    seen = (np.asarray(made.observation) - OFFSET) / SCALE
    value = out(p["value"], net(p["value"], seen, np.tanh))[..., 0]
    logits = out(p["actor"], net(p["actor"], seen, np.tanh))
    chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    advantage = np.zeros((T, E))
    for e in range(E):
        for t in range(T):
            for later in range(t, T):
                following = value[later + 1, e] if later + 1 < T else 0.0
                error = made.reward[later, e] + config.discount * following - value[later, e]
                advantage[t, e] += (config.discount * config.decay) ** (later - t) * error
    drawn = jax.random.randint(jax.random.split(KEY, 1)[0], (config.batch,), 0, T * E)
    picked = advantage.reshape(-1)[drawn]
    standard = (picked - picked.mean()) / picked.std()
    entropy = -(chances * np.log(chances)).sum(-1).reshape(-1)[drawn].mean()
    np.testing.assert_allclose(found["value_loss"], (picked**2).mean(), rtol=1e-4)
    np.testing.assert_allclose(found["entropy"], entropy, rtol=1e-5)
    np.testing.assert_allclose(
        found["actor_loss"], -standard.mean() - config.entropy_weight * entropy, atol=1e-5
    )


def test_ppo_draws_by_its_probabilities():
    state, seen = start(ppo), jnp.zeros((4000, S))
    drawn = np.asarray(ppo.act(CONFIGS[ppo], state, seen, KEY, 1.0))
    p = jax.device_get(state.params["actor"])
    logits = out(p, net(p, (np.zeros(S) - OFFSET) / SCALE, np.tanh))
    chances = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(drawn.mean(0), chances, atol=0.04)
    surest = np.asarray(ppo.act(CONFIGS[ppo], state, seen, KEY, 0.0))
    np.testing.assert_array_equal(surest, np.eye(D)[[chances.argmax()]].repeat(4000, 0))


@both
def test_choices_learn_to_point_where_they_are_told(method):
    """Every choice ends an episode, and earns what it has along what is seen."""
    config, state = CONFIGS[method], start(method)
    state = state._replace(extra={**state.extra, "offset": jnp.zeros(S), "scale": jnp.ones(S)})

    def look(key):
        if method is ppo:
            return jax.nn.one_hot(jax.random.randint(key, (T * E,), 0, D), D)
        seen = jax.random.normal(key, (T * E, S))
        return seen / jnp.linalg.norm(seen, axis=-1, keepdims=True)

    @jax.jit
    def choose(state, key, temperature):
        keys = jax.random.split(key)
        seen = look(keys[0])
        chosen = method.act(config, state, seen, keys[1], temperature)
        length = jnp.maximum(jnp.linalg.norm(chosen, axis=-1), 1e-6)
        made = Choices(seen, chosen, seen, (chosen * seen).sum(-1) / length, jnp.ones(T * E))
        return jax.tree.map(lambda leaf: leaf.reshape(T, E, *leaf.shape[1:]), made)

    def score(state):
        judged = [choose(state, jax.random.key(i), 0.0).reward.mean() for i in range(10)]
        return float(np.mean(judged))

    before = score(state)
    for i in range(150):
        own_key, learn_key = jax.random.split(jax.random.key(100 + i))
        state, _ = update(method, config)(state, choose(state, own_key, 1.0), learn_key)
    assert before < 0.7 and score(state) > 0.9, (before, score(state))


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: sac.Config(updates=0), "updates = 0"),
        (lambda: sac.Config(buffer=64, warm_up=65), "warm_up = 65"),
        (lambda: sac.Config(discount=1.0), "discount = 1.0"),
        (lambda: ppo.Config(clip=0.0), "clip = 0.0"),
        (lambda: ppo.Config(episodes=0), "episodes = 0"),
    ],
)
def test_mistakes_are_named(made, said):
    with pytest.raises(UserError) as error:
        made()
    assert said in str(error.value) and "\n" not in str(error.value)
