"""An iteration of R3HF: on-policy at first, its identities, one program for seeds and rates.

Most tests run a model of two matrices, which compiles fast: every token attends equally to itself
and the real ones before. The learning test runs GPT-2 on the synthetic world.
"""

import dataclasses
import functools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.core import mesh as meshes
from jaxalign.core.checkpoint import Checkpoints
from jaxalign.core.loop import fit
from jaxalign.core.types import LanguageModel, UserError
from jaxalign.data import preferences
from jaxalign.data.preferences import Prompts
from jaxalign.methods import r3hf, supervised
from jaxalign.methods.r3hf import Config
from jaxalign.models import gpt2
from jaxalign.models.scalar_head import attach_head, with_scalar_head
from jaxalign.ops import redistribution as rd

VOCABULARY, WIDTH, PROMPT, LENGTH = 12, 8, 4, 6
PAD, STOP, FAVOURITE = 0, 1, 5
TOY = Config(
    rollouts=16,
    epochs=2,
    minibatches=2,
    micro_batches=2,
    policy_rate=1e-2,
    critic_rate=1e-2,
    kl_weight=0.05,
)
LOO = dataclasses.replace(TOY, algorithm="rloo", group=4)

# --- a model of two matrices ----------------------------------------------------------


def attend(params, x, table, seen):
    weight = seen / jnp.maximum(seen.sum(-1, keepdims=True), 1)
    return jnp.tanh(x + weight @ table @ params["mix"])


def hidden(params, ids, mask):
    x, earlier = params["embed"][ids], jnp.tri(ids.shape[1], dtype=bool)
    return attend(params, x, x, mask[:, None] & earlier[None])


def extend(params, cache, ids, position, visible, index):
    x, slot = params["embed"][ids], jnp.arange(visible.shape[1])
    cache = jax.lax.dynamic_update_slice_in_dim(cache, x, index, 1)
    earlier = slot[None] <= index + jnp.arange(ids.shape[1])[:, None]
    return attend(params, x, cache, visible[:, None] & earlier[None]), cache


def init(key):
    one, two = jax.random.split(key)
    embed = 0.5 * jax.random.normal(one, (VOCABULARY, WIDTH))
    return {"embed": embed, "mix": 0.5 * jax.random.normal(two, (WIDTH, WIDTH))}


MODEL = LanguageModel(
    init,
    hidden,
    lambda params: params["embed"],
    lambda table, hidden: hidden @ table.T,
    lambda params: lambda hidden: hidden @ params["embed"].T,
    lambda rows, length: jnp.zeros((rows, length, WIDTH)),
    extend,
    VOCABULARY,
    WIDTH,
    64,
)


def scores(params, ids, mask):
    states = hidden(params["model"], ids, mask)
    return (states @ params["head"]["kernel"])[..., 0] + params["head"]["bias"][None]


def count(token, ids, mask):
    """How often the token has been said so far: a score of prefixes that is known exactly."""
    return jnp.cumsum((ids == token) & mask, axis=1).astype(jnp.float32)


PARTS = r3hf.Parts(
    MODEL,
    scores,
    scores,
    lambda token, ids, mask: count(token, ids, mask)[:, -1],
    r3hf.Decoding(LENGTH, (STOP,), PAD),
)


@functools.cache
def params_of(seed):
    key, head_key = jax.random.split(jax.random.key(seed))
    head = {"kernel": jax.random.normal(head_key, (WIDTH, 1)), "bias": jnp.array([0.3])}
    return {"model": init(key), "head": head}


def make_task():
    rng = np.random.default_rng(0)
    ids = rng.integers(2, VOCABULARY, (10, PROMPT))
    mask = np.arange(PROMPT)[None] >= rng.integers(0, PROMPT, 10)[:, None]
    prompts = Prompts(jnp.asarray(np.where(mask, ids, PAD), jnp.int32), jnp.asarray(mask))
    return r3hf.Task(prompts, params_of(1), jnp.asarray(FAVOURITE))


def start(config=TOY):
    critic = params_of(2) if config.algorithm == "ppo" else None
    return r3hf.init(config, params_of(0)["model"], critic)


@functools.cache
def _iteration_of(config, devices):
    rows = meshes.batch_sharding(mesh_of(devices)) if devices else None
    return r3hf.make_iteration(PARTS, config, rows)


def iteration_of(config=TOY, devices=0):
    """The iteration, compiled once for all tests; on a mesh of so many devices, or without one."""
    return _iteration_of(config, devices)


def mesh_of(devices):
    return meshes.make_mesh({"data": devices}, jax.devices()[:devices])


@functools.cache
def _sample(config):
    return jax.jit(functools.partial(r3hf.sample, PARTS, config, None))


def samples_of(config=TOY):
    return _sample(config)(params_of(0)["model"], make_task(), jax.random.key(4))


def run(config, count, devices=0, state=None, seed=0):
    """The state after so many iterations, and the metrics of each."""
    state, task, log = state or start(config), make_task(), []
    if devices:
        state, task = jax.device_put((state, task), meshes.replicated(mesh_of(devices)))
    for i in range(count):
        key = jax.random.fold_in(jax.random.key(seed), i)
        if devices:
            key = jax.device_put(key, meshes.replicated(mesh_of(devices)))
        state, metrics = iteration_of(config, devices)(state, task, key)
        log.append({name: float(value) for name, value in metrics.items()})
    return state, log


def assert_close(a, b, rtol=1e-4, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def moved(a, b):
    return max(
        float(jnp.abs(x - y).max()) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)
    )


# --- one program, on-policy at first --------------------------------------------------


@pytest.mark.parametrize("config", [TOY, LOO], ids=["ppo", "rloo"])
def test_iterations(config):
    """The policy that is updated is the one that sampled; it starts at the reference."""
    first = start(config)
    state, log = run(config, 3, state=first)
    assert iteration_of(config)._cache_size() == 1
    for row in log:
        assert np.all(np.isfinite(list(row.values())))
        assert row["ratio_error"] < 1e-5
        assert row["policy_gradient_norm"] > 0
        assert 1 <= row["length"] <= LENGTH
        assert 0 < row["positive_share"] < 1
    assert log[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert log[0]["length_growth"] == log[0]["entropy_share"] == 1
    assert log[2]["length_growth"] == pytest.approx(log[2]["length"] / log[0]["length"])
    assert log[2]["episodes"] == 3 * config.rollouts
    assert log[2]["tokens"] == pytest.approx(config.rollouts * sum(row["length"] for row in log))
    assert int(state.step) == 3
    assert ("critic" in state.params) == ("value_loss" in log[0]) == (config is TOY)
    assert first.params["policy"]["mix"].is_deleted()  # donated
    assert_equal(state.slow["reference"], params_of(0)["model"])  # kept, and not deleted
    assert moved(state.params["policy"], params_of(0)["model"]) > 1e-3


def test_metrics_are_those_of_the_samples():
    """The first iteration's metrics, from samples drawn apart with the same keys."""
    key = jax.random.split(jax.random.fold_in(jax.random.key(0), 0), 3)[0]
    decoded, score, gold = _sample(TOY)(params_of(0)["model"], make_task(), key)
    _, (row,) = run(TOY, 1)
    mask, said = np.asarray(decoded.mask), np.asarray(decoded.ids) == FAVOURITE
    assert row["gold"] == pytest.approx((said & mask).sum(1).mean()) == pytest.approx(gold.mean())
    last = [np.flatnonzero(real)[-1] for real in mask]
    proxy = np.mean([s[i] for s, i in zip(np.asarray(score), last, strict=True)])
    assert row["proxy"] == pytest.approx(proxy, rel=1e-4)
    assert row["length"] == mask[:, PROMPT:].sum(1).mean()
    assert row["truncated"] == np.mean(~np.asarray(decoded.stopped))
    assert len({tuple(ids) for ids in np.asarray(decoded.ids)[:, :PROMPT].tolist()}) > 3


def test_responses_of_a_group_share_their_prompt():
    ids = np.asarray(samples_of(LOO).decoded.ids).reshape(4, 4, -1)
    assert (ids[:, :, :PROMPT] == ids[:, :1, :PROMPT]).all()
    assert (ids[:, 0] != ids[:, 1]).any(1).all()


# --- identities -----------------------------------------------------------------------


@functools.cache
def estimated(config, critic=scores):
    """The batch that `estimate` makes of the samples, drawn by the policy at the start."""
    parts = PARTS._replace(critic=critic)
    estimate = jax.jit(functools.partial(r3hf.estimate, parts, config))
    return estimate(start(config), samples_of(config), jax.random.key(3))


@functools.cache
def _gradient(critic):
    """The compiled gradient of the loss, and its metrics, at parameters that have moved on."""

    def measure(params, batch):
        mean, seen = r3hf.loss(PARTS._replace(critic=critic), TOY, params, batch, None)
        return mean.value(), {name: part.value() for name, part in seen.items()}

    return jax.jit(jax.grad(measure, has_aux=True))


def gradient_of(batch, critic=scores, away=0.02):
    params = jax.tree.map(
        lambda a: a + away * np.cos(np.arange(a.size, dtype=np.float32)).reshape(a.shape),
        start().params,
    )
    return _gradient(critic)(params, batch)


def residual(params, ids, mask):
    """A critic that adds the reward model's score of the prefix, which is not trained."""
    return scores(params, ids, mask) + scores(params_of(1), ids, mask)


def test_ppo_on_token_rewards_is_ppo_with_a_residual_critic():
    batch, _ = estimated(TOY)
    other, _ = estimated(dataclasses.replace(TOY, credit="sparse"), residual)
    potential = rd.prefix_scores(samples_of().scores, batch.mask[:, PROMPT:])
    assert float(jnp.abs(potential).max()) > 0.3  # else there is nothing to see
    np.testing.assert_allclose(batch.advantage, other.advantage, atol=3e-6)
    np.testing.assert_allclose(batch.value, other.value - potential, atol=3e-6)
    np.testing.assert_allclose(batch.target, other.target - potential, atol=3e-6)
    gradient, seen = gradient_of(batch)
    other_gradient, other_seen = gradient_of(other, residual)
    assert_close(gradient, other_gradient, 1e-4, 2e-6)  # of the policy and of the critic
    for name in ("policy_loss", "value_loss", "clipped"):
        assert seen[name] == pytest.approx(float(other_seen[name]), rel=1e-4, abs=1e-6)
    assert min(map(float, jax.tree.leaves(jax.tree.map(lambda g: jnp.abs(g).max(), gradient)))) > 0


def test_ratio_error_sees_another_policy():
    batch, _ = estimated(TOY)
    assert gradient_of(batch, away=0.0)[1]["ratio_error"] < 1e-5
    assert gradient_of(batch)[1]["ratio_error"] > 1e-2


def test_padding_does_not_matter():
    """Neither what stands under the mask, nor how much of it there is on the left."""
    batch, _ = estimated(TOY)
    gradient, seen = gradient_of(batch)
    junk = batch._replace(ids=jnp.where(batch.mask, batch.ids, 7))
    assert (junk.ids != batch.ids).any()
    wide = ((0, 0), (3, 0))
    wider = junk._replace(ids=jnp.pad(junk.ids, wide), mask=jnp.pad(junk.mask, wide))
    for same in (junk, wider):
        other_gradient, other_seen = gradient_of(same)
        assert_close(other_gradient, gradient, 1e-4, 1e-6)
        assert_close(other_seen, seen, 1e-4, 1e-6)


def test_leave_one_out_on_sums_does_not_see_the_redistribution():
    score, response = samples_of(LOO).scores, samples_of(LOO).decoded.response

    @functools.partial(jax.jit, static_argnums=0)
    def advantage(config):
        token = r3hf.credit(config, score, response, jax.random.key(0))
        return r3hf.rloo_advantage(config, token, token, response)

    plain = dataclasses.replace(LOO, token_weight=0.0)
    dense, sparse = advantage(plain), advantage(dataclasses.replace(plain, credit="sparse"))
    assert float(jnp.abs(dense).max()) > 0.1
    np.testing.assert_allclose(dense, sparse, atol=3e-6)
    assert float(jnp.abs(advantage(LOO) - dense).max()) > 0.1  # the token term does see it


def test_leave_one_out_adds_centred_token_rewards():
    rng = np.random.default_rng(0)
    reward, token = rng.normal(size=(2, 8, LENGTH)).astype(np.float32)
    counts = rng.integers(1, LENGTH + 1, 8)
    response = np.arange(LENGTH)[None] < counts[:, None]
    reward, token = reward * response, token * response
    config = dataclasses.replace(LOO, token_weight=0.5)
    advantage = np.asarray(r3hf.rloo_advantage(config, reward, token, response))
    for i, n in enumerate(counts):
        others = [reward[j].sum() for j in range(8) if j // 4 == i // 4 and j != i]
        expected = reward[i].sum() - np.mean(others) + 0.5 * (token[i] - token[i, :n].mean())
        np.testing.assert_allclose(advantage[i], expected * response[i], rtol=1e-4, atol=1e-5)


def test_every_credit_is_the_function_of_that_name():
    score, response = samples_of().scores, samples_of().decoded.response
    key, rules, rewards = jax.random.key(0), get_args(r3hf.Credit), {}
    credit = jax.jit(r3hf.credit, static_argnums=0)
    for rule in rules:
        config = dataclasses.replace(TOY, credit=rule)
        rewards[rule] = credit(config, score, response, key)
    assert len({np.asarray(reward).tobytes() for reward in rewards.values()}) == len(rules)
    np.testing.assert_allclose(rewards["sparse"], rd.sparse(score, response), atol=1e-6)
    np.testing.assert_allclose(
        rewards["redistributed"], rd.redistributed(score, response), atol=1e-6
    )
    half = dataclasses.replace(TOY, dense_weight=0.5)
    mixed = (rewards["redistributed"] + rewards["sparse"]) / 2
    np.testing.assert_allclose(credit(half, score, response, key), mixed, atol=1e-6)


def test_divergence_and_missing_stop_are_part_of_the_reward():
    """Sums of all rewards, from leave-one-out without token term and baseline."""
    decoded, score, _ = samples_of(LOO)
    config = dataclasses.replace(LOO, token_weight=0.0, whiten=False, missing_stop_penalty=2.0)
    moved_away = start(LOO)._replace(slow={"reference": init(jax.random.key(9))})
    estimate = jax.jit(functools.partial(r3hf.estimate, PARTS, config))
    batch, metrics = estimate(moved_away, samples_of(LOO), jax.random.key(3))
    states = hidden(moved_away.slow["reference"], decoded.ids, decoded.mask)[:, PROMPT - 1 : -1]
    density = jax.nn.log_softmax(states @ moved_away.slow["reference"]["embed"].T)
    chosen = jnp.take_along_axis(density, decoded.ids[:, PROMPT:, None], 2)[..., 0]
    divergence = np.asarray((decoded.log_density - chosen) * decoded.response).sum(1)
    assert metrics["kl"] == pytest.approx(divergence.mean(), rel=1e-3)
    total = np.asarray(rd.final_score(score, decoded.mask)) - 0.05 * divergence
    total = (total - 2.0 * ~np.asarray(decoded.stopped)).reshape(4, 4)
    expected = (total - (total.sum(1, keepdims=True) - total) / 3).reshape(-1)
    assert 0 < decoded.stopped.sum() < 16
    np.testing.assert_allclose(batch.advantage[:, 0], expected, rtol=1e-3, atol=1e-4)


# --- seeds, rates, devices, parts -----------------------------------------------------


def test_seeds_and_rates_are_mapped_over():
    rates = jnp.array([1e-2, 0.0, 3e-3])
    keys = jax.vmap(jax.random.key)(jnp.arange(3))
    many = jax.tree.map(lambda a: jnp.broadcast_to(a[None], (3, *a.shape)), start())
    many = jax.vmap(r3hf.set_rates)(many, rates, 2 * rates)
    step = jax.jit(jax.vmap(iteration_of(), in_axes=(0, None, 0)))
    states, metrics = step(many, make_task(), keys)
    for i, rate in enumerate(rates.tolist()):
        alone = r3hf.set_rates(start(), rate, 2 * rate)
        alone, row = iteration_of()(alone, make_task(), keys[i])
        assert_close(jax.tree.map(lambda a, i=i: a[i], states.params), alone.params, 1e-3, 1e-5)
        for name, value in row.items():
            assert float(metrics[name][i]) == pytest.approx(float(value), rel=1e-3, abs=1e-5)
    assert len(set(metrics["gold"].tolist())) > 1
    assert iteration_of()._cache_size() == 1  # rates and seeds are no part of the program


def test_policy_and_critic_have_rates_of_their_own():
    for policy, critic in ((0.0, 1e-2), (1e-2, 0.0)):
        state, _ = run(TOY, 1, state=r3hf.set_rates(start(), policy, critic))
        assert (moved(state.params["policy"], params_of(0)["model"]) > 1e-3) == (policy > 0)
        assert (moved(state.params["critic"], params_of(2)) > 1e-3) == (critic > 0)


def test_one_device_equals_eight():
    config = dataclasses.replace(TOY, micro_batches=1)  # each device needs a row
    one, one_log = run(TOY, 2)
    eight, eight_log = run(config, 2, devices=8)
    assert len(eight.params["policy"]["mix"].sharding.device_set) == 8
    # Micro-batches of half the size on one device do not change the update either.
    assert_close(eight.params, one.params, 1e-3, 1e-5)
    assert_close(eight.extra, one.extra, 1e-3)
    for a, b in zip(one_log, eight_log, strict=True):
        assert b == pytest.approx(a, rel=1e-3, abs=1e-5)
    assert iteration_of(config, 8)._cache_size() == 1


def test_each_response_is_learned_from_once_an_epoch(monkeypatch):
    """Rows are told apart by their advantages; the loss is replaced by a watcher."""
    seen = []

    def watch(parts, config, params, batch, key):
        jax.debug.callback(lambda row: seen.append(np.asarray(row)), batch.advantage[:, 0])
        mean = r3hf.Mean(params["policy"]["mix"].sum(), jnp.float32(1))
        return mean, {}

    monkeypatch.setattr(r3hf, "loss", watch)
    batch, _ = estimated(TOY)
    batch = batch._replace(advantage=batch.advantage.at[:, 0].set(jnp.arange(16.0)))
    optimizer = r3hf.make_optimizer(TOY)
    learn = jax.jit(functools.partial(r3hf.learn, PARTS, TOY, optimizer, None))
    jax.block_until_ready(learn(start(), batch, jax.random.key(0)))
    jax.effects_barrier()
    rows = np.stack(seen).astype(int)
    assert rows.shape == (8, 4)  # 2 epochs, 2 minibatches, 2 parts
    first, second = rows[:4].reshape(-1), rows[4:].reshape(-1)
    assert sorted(first) == sorted(second) == list(range(16))
    assert first.tolist() != second.tolist()


def test_resume_is_bit_equal(tmp_path):
    def train(steps, checkpoints=None, resume=False):
        return fit(
            start(),
            iteration_of(),
            lambda i: make_task(),
            jax.random.key(3),
            steps=steps,
            checkpoints=checkpoints,
            resume=resume,
        )

    straight = train(4)
    checkpoints = Checkpoints(tmp_path)
    train(2, checkpoints)
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path)
    resumed = train(4, checkpoints, resume=True)
    checkpoints.close()
    assert jax.tree.structure(resumed) == jax.tree.structure(straight)
    assert_equal(resumed, straight)
    assert int(resumed.step) == 4


# --- the start, health, and impossible configurations ----------------------------------


def test_starts_of_a_critic():
    policy, reward, fresh = params_of(0)["model"], params_of(1), params_of(2)
    assert_equal(r3hf.critic_params("reward", policy, reward, fresh), reward)
    assert_equal(r3hf.critic_params("random", policy, reward, fresh), fresh)
    zero = r3hf.critic_params("policy", policy, reward, fresh)
    assert_equal(zero["model"], policy)
    ids = jnp.full((1, 3), 4)
    assert not scores(zero, ids, ids > 0).any()
    with pytest.raises(UserError, match="no critic"):
        r3hf.init(TOY, policy)
    assert "critic" not in r3hf.init(LOO, policy).params


WELL = {
    "length_growth": 1.0,
    "truncated": 0.0,
    "positive_share": 0.5,
    "entropy_share": 1.0,
    "kl": 0.1,
    "ratio_error": 0.0,
}


@pytest.mark.parametrize(
    ("change", "level"),
    [
        ({}, None),
        ({"length_growth": 1.6}, "warn"),
        ({"length_growth": 2.1}, "stop"),
        ({"length_growth": 0.2}, None),
        ({"truncated": 0.3}, "warn"),
        ({"truncated": 0.6}, "stop"),
        ({"positive_share": 0.93}, "warn"),
        ({"positive_share": 0.97}, "stop"),
        ({"positive_share": 0.03}, "stop"),
        ({"entropy_share": 0.2}, "warn"),
        ({"entropy_share": 0.05}, "stop"),
        ({"kl": 30.0}, "warn"),
        ({"kl": 60.0}, "stop"),
        ({"ratio_error": 1e-3}, "stop"),
    ],
)
def test_health(change, level):
    alarms = r3hf.health({**WELL, **change}, TOY)
    assert [alarm.level for alarm in alarms] == ([level] if level else [])
    for alarm, name in zip(alarms, change, strict=False):
        assert alarm.reason.startswith(f"{name} = {change[name]:.3g}")
        assert "\n" not in alarm.reason


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rollouts": 0}, "rollouts = 0"),
        ({"clip": 0.0}, "clip = 0.0"),
        ({"kl_weight": -0.1}, "kl_weight = -0.1"),
        ({"decay": 1.1}, "decay = 1.1"),
        ({"dense_weight": 2.0}, "dense_weight = 2.0"),
        ({"group": 3}, "multiple of group = 3"),
        ({"minibatches": 3}, "multiple of minibatches"),
        ({"algorithm": "rloo"}, "group = 1"),
        ({"sampling": r3hf.Sampling(temperature=0)}, "temperature = 0"),
    ],
)
def test_impossible_configs(change, says):
    with pytest.raises(UserError, match=says):
        Config(**change)


# --- adapters -------------------------------------------------------------------------


def test_adapters_learn_and_the_reference_lies_below_them():
    world = preferences.synthetic(vocabulary=12, prompt=3, response=8)
    model = gpt2.gpt2(gpt2.Config(12, width=8, depth=1, heads=2, inner=16, context=11))
    policy = model.init(jax.random.key(0))
    config = dataclasses.replace(TOY, lora_rank=2)
    parts = r3hf.Parts(
        model,
        with_scalar_head(model).scores,
        lambda _, ids, mask: jnp.cumsum(ids * mask, axis=1).astype(float),
        lambda _, ids, mask: world.gold(ids, mask),
        r3hf.Decoding(8, (world.stop,), world.pad),
    )
    state = r3hf.init(config, policy, attach_head(policy, model.width), jax.random.key(1))
    assert state.slow == {}
    task = r3hf.Task(world.prompts(jax.random.key(2), 16), {}, {})
    step = r3hf.make_iteration(parts, config)
    for i in range(2):
        state, metrics = step(state, task, jax.random.key(i))
        assert metrics["ratio_error"] < 1e-5
        assert (abs(float(metrics["kl"])) < 1e-5) == (i == 0)
    assert_equal(state.params["policy"], policy)
    assert_equal(r3hf.reference_of(state), policy)
    assert moved(r3hf.policy_of(state.params), policy) > 1e-3


# --- it learns ------------------------------------------------------------------------


@functools.cache
def synthetic():
    """The synthetic world, a small GPT-2 fine-tuned on its demonstrations, and the task.

    The reward is the gold score itself, of whole responses and of prefixes.
    """
    world = preferences.synthetic()
    total = world.prompt_length + world.response_length
    sizes = dict(vocabulary=world.vocabulary, width=32, depth=2, heads=2, inner=64)
    model = gpt2.gpt2(gpt2.Config(**sizes, context=total))
    config = supervised.Config(updates=300, learning_rate=3e-3)
    state = supervised.init(jax.jit(model.init)(jax.random.key(0)), config)
    step = supervised.make_step(model, config, world.response_length)
    data = world.demonstrations(jax.random.key(1), 4096)
    for i in range(config.updates):
        state, _ = step(state, data, jax.random.fold_in(jax.random.key(2), i))
    task = r3hf.Task(world.prompts(jax.random.key(3), 512), {}, {})
    return world, model, state.params, task


def gold_of_prefixes(world, _, ids, mask):
    upto = jnp.tri(ids.shape[1], dtype=bool)
    return jax.vmap(lambda seen: world.gold(ids, mask & seen[None]), out_axes=1)(upto)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["ppo", "rloo"])
def test_gold_score_rises(algorithm, optimised):
    """Rewarded with the gold score itself, 64 responses at a time."""
    world, model, policy, task = synthetic()

    config = Config(
        algorithm=algorithm,
        group=1 if algorithm == "ppo" else 4,
        policy_rate=2e-3,
        critic_rate=2e-3,
        kl_weight=0.0,
        token_weight=0.2,
    )
    parts = r3hf.Parts(
        model,
        with_scalar_head(model).scores,
        functools.partial(gold_of_prefixes, world),
        lambda _, ids, mask: world.gold(ids, mask),
        r3hf.Decoding(world.response_length, (world.stop,), world.pad),
    )
    state = r3hf.init(config, policy, attach_head(policy, model.width))
    step, gold = r3hf.make_iteration(parts, config), []
    for i in range(35):
        state, metrics = step(state, task, jax.random.fold_in(jax.random.key(5), i))
        assert metrics["ratio_error"] < 1e-4
        gold.append(float(metrics["gold"]))
    assert np.mean(gold[-5:]) > np.mean(gold[:5]) + 0.8
