"""METRA and its siblings against the formulas written out; what all four methods promise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.core.types import UserError
from jaxalign.methods import csf, diayn, lsd, metra
from jaxalign.models import mlp
from jaxalign.ops import skills
from jaxalign.ops.skills import Transitions

S, A, D, B = 4, 2, 3, 16  # sizes of observations, actions, skills, batches
KEY = jax.random.key(0)
OFFSET, SCALE = np.array([0.5, -1.0, 0.0, 2.0]), np.array([2.0, 0.5, 1.0, 3.0])
SMALL = dict(skill_size=D, hidden=(8, 6), batch=B, learning_rate=0.01, initial_temperature=0.3)
METHODS = (metra, lsd, diayn, csf)
OWN = {metra: dict(initial_dual=2.0, slack=0.01), csf: dict(negatives=5)}


def make_config(method, **changes):
    return method.Config(**{**SMALL, **OWN.get(method, {}), **changes})


CASES = [
    (metra, make_config(metra)),
    (metra, make_config(metra, constraint="sum", discrete=True)),
    (lsd, make_config(lsd)),
    *((method, make_config(method, discrete=d)) for method in (diayn, csf) for d in (False, True)),
]


def name(case):
    """Of a method, or of what its configuration sets."""
    if hasattr(case, "__name__"):
        return case.__name__.split(".")[-1]
    return f"{getattr(case, 'constraint', '')}{'-discrete' if case.discrete else ''}"


def make_batch(config, seed=0):
    """Large steps, so that the constraint is broken by some rows and not by others."""
    rng = np.random.default_rng(seed)
    observation, move = rng.normal(size=(2, B, S))
    return Transitions(
        observation=jnp.asarray(observation, jnp.float32),
        action=jnp.asarray(rng.uniform(-1, 1, (B, A)), jnp.float32),
        next_observation=jnp.asarray(observation + move, jnp.float32),
        skill=skills.sample(jax.random.key(seed), B, D, config.discrete),
        terminal=jnp.asarray(rng.random(B) < 0.3, jnp.float32),
    )


def moved(tree, seed):
    """Biases that are not zero, slow copies that differ from the trained ones."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(leaf + 0.2 * rng.normal(size=leaf.shape), jnp.float32), tree
    )


@functools.cache
def start(method, config):
    init = jax.jit(method.init, static_argnums=(0, 1, 2))
    state = init(config, S, A, OFFSET, SCALE, KEY)
    state = state._replace(params=moved(state.params, 1), slow=moved(state.slow, 2))
    if method is lsd:  # their vectors have long converged
        find = jax.jit(mlp.singular_vectors, static_argnums=2)
        state.extra["vectors"] = find(state.params["phi"], KEY, 300)
    return state


@functools.cache
def update(method):
    return jax.jit(method.update, static_argnums=0)


@functools.cache
def updated(method, config):
    return update(method)(config, start(method, config), make_batch(config), KEY)


# --- the formulas, written out --------------------------------------------------------------------


def net(p, *inputs):
    x = jnp.concatenate(inputs, -1)
    for i in range(2):
        x = jnp.maximum(x @ p[f"hidden_{i}"]["kernel"] + p[f"hidden_{i}"]["bias"][None], 0)
    return x @ p["out"]["kernel"] + p["out"]["bias"][None]


def twins(p, *inputs):
    return [net(jax.tree.map(lambda a, i=i: a[i], p), *inputs) for i in range(2)]


def act_and_density(p, key, *inputs):
    """Actions of the policy, and their log densities by the change of variables."""
    x = jnp.concatenate(inputs, -1)
    for i in range(2):
        x = jnp.tanh(x @ p[f"hidden_{i}"]["kernel"] + p[f"hidden_{i}"]["bias"][None])
    mean, log_std = (x @ p[n]["kernel"] + p[n]["bias"][None] for n in ("mean", "log_std"))
    noise = jax.random.normal(key, mean.shape)
    action = jnp.tanh(mean + jnp.exp(log_std) * noise)
    normal = -0.5 * noise**2 - log_std - 0.5 * jnp.log(2 * jnp.pi)
    return action, (normal - jnp.log(1 - action**2 + 1e-6)).sum(-1)


def direction(config, z):
    if not config.discrete:
        return z
    return jnp.where(z == 1, 1.0, -1 / (D - 1))


def spectrally_divided(p, before):
    """By the largest singular values, with the singular vectors before the step."""
    divided = {}
    for layer, part in p.items():
        _, _, right = jnp.linalg.svd(before[layer]["kernel"])
        largest = jnp.linalg.norm(part["kernel"] @ right[0])
        divided[layer] = {**part, "kernel": part["kernel"] / largest}
    return divided


def latent_move(method, p, before, s, ahead):
    p = spectrally_divided(p, before["phi"]) if method is lsd else p
    return net(p, ahead) - net(p, s)


def log_guess(config, p, ahead, z):
    """log q(z | s') - log p(z)."""
    guess = net(p, ahead)
    if config.discrete:
        chance = jnp.exp(guess) / jnp.exp(guess).sum(-1, keepdims=True)
        return jnp.log((chance * z).sum(-1) / (1 / D))
    return -0.5 * ((z - guess) ** 2).sum(-1) + 0.5 * (z**2).sum(-1)


def literal_first_loss(method, config, p, before, multiplier, b, s, ahead, key):
    """The loss of phi or the discriminator, and of METRA the constraint."""
    if method is diayn:
        return -log_guess(config, p, ahead, b.skill).mean(), 0.0
    move = latent_move(method, p, before, s, ahead)
    reward = (move * direction(config, b.skill)).sum(-1)
    if method is metra:
        square = (move**2).sum(-1) / (D if config.constraint == "mean" else 1)
        left = jnp.minimum(1 - square, config.slack)
        return -(reward + multiplier * left).mean(), left.mean()
    if method is csf:
        others = skills.sample(key, config.negatives, D, config.discrete)
        exps = [jnp.exp(move @ direction(config, z)) for z in others]
        return -(reward - config.contrast * jnp.log(sum(exps))).mean(), 0.0
    return -reward.mean(), 0.0


def literal_critic_loss(method, config, p, before, slow, first, b, s, ahead, key):
    """first: of phi or the discriminator, after its step. before: all parameters before it."""
    action, density = act_and_density(before["actor"], key, ahead, b.skill)
    one, two = twins(slow["critic"], ahead, b.skill, action)
    q_1, q_2 = twins(p, s, b.skill, b.action)
    if method is csf:
        z = direction(config, b.skill)
        smaller = ((one * z).sum(-1) < (two * z).sum(-1))[:, None]
        step = latent_move(method, first, before, s, ahead)
        going_on = (1 - b.terminal)[:, None] * jnp.where(smaller, one, two)
        target = step + config.discount * going_on
        return ((q_1 - target) ** 2).mean() + ((q_2 - target) ** 2).mean()
    if method is diayn:
        reward = log_guess(config, first, ahead, b.skill)
    else:
        reward = (latent_move(method, first, before, s, ahead) * direction(config, b.skill)).sum(-1)
    alpha = jnp.exp(before["log_temperature"])
    soft = jnp.minimum(one, two)[:, 0] - alpha * density
    target = reward + config.discount * (1 - b.terminal) * soft
    return 0.5 * ((q_1[:, 0] - target) ** 2).mean() + 0.5 * ((q_2[:, 0] - target) ** 2).mean()


def literal_actor_loss(method, config, p, critic, alpha, b, s, key):
    action, density = act_and_density(p, key, s, b.skill)
    values = twins(critic, s, b.skill, action)
    if method is csf:
        values = [(psi * direction(config, b.skill)).sum(-1) for psi in values]
    else:
        values = [q[:, 0] for q in values]
    return (alpha * density - jnp.minimum(*values)).mean(), density


@functools.partial(jax.jit, static_argnums=(0, 1))
def literal(method, config, before, after, b):
    """{part: (loss, gradient)} and the constraint; later losses hold what has stepped before."""
    first = "discriminator" if method is diayn else "phi"
    s, ahead = ((o - OFFSET[None]) / SCALE[None] for o in (b.observation, b.next_observation))
    s, ahead = s.astype(jnp.float32), ahead.astype(jnp.float32)
    keys = jax.random.split(KEY, 3 if method is csf else 2)
    p, alpha = before.params, jnp.exp(before.params["log_temperature"])
    multiplier = jnp.exp(p["log_dual"]) if method is metra else 0.0

    def gradient(loss, *args):
        return jax.value_and_grad(lambda own: loss(method, config, own, *args), has_aux=True)

    (value, left), slope = gradient(literal_first_loss, p, multiplier, b, s, ahead, keys[0])(
        p[first]
    )
    found = {first: (value, slope)}
    found["critic"] = jax.value_and_grad(
        lambda own: literal_critic_loss(
            method, config, own, p, before.slow, after.params[first], b, s, ahead, keys[-2]
        )
    )(p["critic"])
    (value, density), slope = gradient(
        literal_actor_loss, after.params["critic"], alpha, b, s, keys[-1]
    )(p["actor"])
    found["actor"] = value, slope
    found["log_temperature"] = None, -(density - A / 2).mean()
    if method is metra:
        found["log_dual"] = None, left
    return found, left


@pytest.mark.parametrize(("method", "config"), CASES, ids=name)
def test_one_gradient_step_is_the_formulas(method, config):
    before, (after, metrics) = start(method, config), updated(method, config)
    found, left = literal(method, config, before, after, make_batch(config))
    assert found.keys() == before.params.keys()
    for part, (value, slope) in found.items():
        memory = after.opt_state[part][0]
        assert memory.count == 1
        # The first moment of Adam after one step is a tenth of the gradient.
        ours = jax.tree.map(lambda m: 10 * m, memory.mu)
        check_close(ours, slope)
        assert max(abs(leaf).max() for leaf in jax.tree.leaves(slope)) > 1e-3
        rate = 1e-4 if part == "log_dual" else config.learning_rate
        step = jax.tree.map(
            lambda p, g, r=rate: p - r * g / (abs(g) + 1e-8), before.params[part], ours
        )
        check_close(after.params[part], step)
        if value is not None:
            np.testing.assert_allclose(metrics[f"{part}_loss"], value, rtol=1e-5, atol=1e-6)
    if method is metra:
        np.testing.assert_allclose(metrics["constraint"], left, rtol=1e-5)
    check_close(
        after.slow,
        {
            "critic": jax.tree.map(
                lambda slow, fast: 0.995 * slow + 0.005 * fast,
                before.slow["critic"],
                after.params["critic"],
            )
        },
    )
    assert after.step == 1


def check_close(ours, expected, tolerance=1e-5):
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(
            a, e, rtol=tolerance, atol=tolerance * float(abs(e).max())
        ),
        ours,
        expected,
    )


# --- what the order does --------------------------------------------------------------------------


def test_the_reward_is_that_of_the_phi_just_updated():
    config = make_config(metra)
    before, (after, metrics), b = start(metra, config), updated(metra, config), make_batch(config)
    s, ahead = ((o - OFFSET[None]) / SCALE[None] for o in (b.observation, b.next_observation))

    def reward(phi):
        return ((net(phi, ahead) - net(phi, s)) * b.skill).sum(-1).mean()

    old, new = reward(before.params["phi"]), reward(after.params["phi"])
    np.testing.assert_allclose(metrics["reward"], new, rtol=1e-4)
    assert abs(old - new) > 0.01


@pytest.mark.parametrize(("size", "sign"), [(5.0, 1), (0.01, -1)])
def test_the_multiplier_grows_where_steps_are_too_long_and_falls_where_they_are_not(size, sign):
    config = make_config(metra)
    before, b = start(metra, config), make_batch(config)
    b = b._replace(next_observation=b.observation + size * (b.next_observation - b.observation))
    after, metrics = update(metra)(config, before, b, KEY)
    assert sign * metrics["constraint"] < 0
    # Adam's first step is its rate, whatever the gradient.
    moved = after.params["log_dual"] - before.params["log_dual"]
    np.testing.assert_allclose(moved, sign * 1e-4, rtol=0.02)
    assert metrics["dual"] == jnp.exp(before.params["log_dual"])
    if sign < 0:
        np.testing.assert_allclose(metrics["constraint"], config.slack, rtol=1e-4)


def test_the_temperature_falls_while_the_policy_is_more_random_than_its_target():
    config = make_config(metra)
    before, (after, metrics) = start(metra, config), updated(metra, config)
    assert metrics["entropy"] > -A / 2
    assert after.params["log_temperature"] < before.params["log_temperature"]
    assert metrics["temperature"] == jnp.exp(before.params["log_temperature"])


def test_rows_that_end_have_no_future():
    """The slow critics do not enter the target of terminal rows, and do that of others."""
    for method in METHODS:
        config = make_config(method)
        state, b = start(method, config), make_batch(config)
        other = state._replace(slow=moved(state.slow, 7))
        losses = [
            [
                update(method)(config, s, b._replace(terminal=t), KEY)[1]["critic_loss"]
                for s in (state, other)
            ]
            for t in (jnp.ones(B), jnp.zeros(B))
        ]
        assert losses[0][0] == losses[0][1]
        assert losses[1][0] != losses[1][1]


# --- what all methods promise ---------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=name)
def test_seeds_side_by_side_are_each_alone_and_donated(method):
    config = make_config(method)
    state = start(method, config)
    seeds = [state, state._replace(params=moved(state.params, 5))]
    batches = [make_batch(config), make_batch(config, 3)]
    keys = jax.random.split(jax.random.key(8), 2)
    many = jax.jit(jax.vmap(functools.partial(method.update, config)), donate_argnums=0)
    both, rows = (jax.tree.map(lambda *x: jnp.stack(x), *pair) for pair in (seeds, batches))
    together = many(both, rows, keys)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(both))
    for i in range(2):
        alone = update(method)(config, seeds[i], batches[i], keys[i])
        mine = jax.tree.map(lambda leaf, i=i: leaf[i], together)
        for ours, expected in ((mine[0].params, alone[0].params), (mine[1], alone[1])):
            check_close(ours, expected, 1e-4)


@pytest.mark.parametrize("method", METHODS, ids=name)
def test_many_steps_are_one_trace_and_stay_finite(method):
    config = make_config(method)
    state = updated(method, config)[0]
    traces = update(method)._cache_size()
    for i in range(5):
        state, metrics = update(method)(config, state, make_batch(config, i), jax.random.key(i))
    assert update(method)._cache_size() == traces and state.step == 6
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state, metrics)))


@pytest.mark.parametrize("method", METHODS, ids=name)
def test_actions_and_skills_shown(method):
    config = make_config(method)
    state, b = start(method, config), make_batch(config)
    act = jax.jit(method.act, static_argnums=0)
    calm = act(config, state, b.observation, b.skill, KEY, 0.0)
    again = act(config, state, b.observation, b.skill, jax.random.key(4), 0.0)
    np.testing.assert_array_equal(calm, again)
    wild = act(config, state, b.observation, b.skill, KEY)
    assert wild.shape == (B, A) and abs(wild).max() <= 1 and abs(wild - calm).max() > 0.1
    latent = jax.jit(method.latent, static_argnums=0)(config, state, jnp.stack([b.observation] * 2))
    assert latent.shape == (2, B, D)
    towards = jax.jit(method.skill_towards, static_argnums=0)
    there = towards(config, state, b.observation, b.next_observation)
    goal = method.latent(config, state, b.next_observation)
    wanted = goal if method is diayn else goal - latent[0]
    length = np.linalg.norm(wanted, axis=-1, keepdims=True)
    np.testing.assert_allclose(there, wanted / length, rtol=1e-4, atol=1e-5)
    discrete = towards(make_config(method, discrete=True), state, b.observation, b.next_observation)
    np.testing.assert_array_equal(discrete, np.eye(D)[np.argmax(wanted, -1)])


def test_latent_steps_of_lsd_are_no_longer_than_those_of_observations():
    config = make_config(lsd)
    state, b = start(lsd, config), make_batch(config)
    here, there = (lsd.latent(config, state, o) for o in (b.observation, b.next_observation))
    length = np.linalg.norm((b.next_observation - b.observation) / SCALE[None], axis=-1)
    ratio = np.linalg.norm(there - here, axis=-1) / length
    assert 0.05 < ratio.max() <= 1 + 1e-4


def test_the_settings_are_those_of_the_papers():
    sizes = functools.partial(jax.eval_shape, key=KEY)
    ones = np.ones(29, np.float32)
    for method in METHODS:
        config = method.Config()
        init = functools.partial(method.init, config, 29, 8, ones, ones)
        params = sizes(init).params
        count = {n: sum(leaf.size for leaf in jax.tree.leaves(p)) for n, p in params.items()}
        hidden = 1024 * 1024 + 2 * 1024
        first = "discriminator" if method is diayn else "phi"
        assert count[first] == 29 * 1024 + hidden + 2 * 1024 + 2
        assert count["actor"] == 31 * 1024 + hidden + 16 * 1024 + 16
        outputs = 2 if method is csf else 1
        assert count["critic"] == 2 * (39 * 1024 + hidden + outputs * 1024 + outputs)
        assert config.terminal_at_limit == (method is not csf)
        assert (config.batch, config.discount, config.learning_rate) == (256, 0.99, 1e-4)
    assert (metra.Config().initial_dual, metra.Config().slack) == (30, 1e-3)


@pytest.mark.parametrize(
    ("method", "change", "says"),
    [
        *(
            (m, {"skill_size": 0}, "skill_size = 0: skills need at least 1; raise it")
            for m in METHODS
        ),
        (
            metra,
            {"skill_size": 1, "discrete": True},
            "skill_size = 1: one-hot skills need at least 2",
        ),
        (metra, {"constraint": "max"}, "constraint = 'max': must be 'mean' or 'sum'"),
        (metra, {"slack": 0.0}, "slack = 0.0: must be positive"),
        (metra, {"dual_learning_rate": -1.0}, "dual_learning_rate = -1.0"),
        (lsd, {"hidden": (8, 0)}, r"hidden = \(8, 0\): must be at least 1"),
        (diayn, {"discount": 1.0}, "discount = 1.0: must lie between 0 and 1"),
        (csf, {"negatives": 0}, "negatives = 0: must be at least 1"),
        (csf, {"contrast": 0.0}, "contrast = 0.0: must be positive"),
    ],
)
def test_impossible_configs(method, change, says):
    with pytest.raises(UserError, match=says) as error:
        make_config(method, **change)
    assert "\n" not in str(error.value)
