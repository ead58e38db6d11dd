"""A stage of B2-DiffuRL: on-policy at first, each kept pair once an epoch, one program.

Most tests run a network of one matrix on 4x4 pictures, which compiles fast; the density ratio is
also tested on the patch transformer that the experiments train.
"""

import dataclasses
import functools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign.core import mesh as meshes
from jaxalign.core.checkpoint import Checkpoints
from jaxalign.core.loop import fit
from jaxalign.core.types import UserError
from jaxalign.methods import b2_diffurl
from jaxalign.methods.b2_diffurl import Config
from jaxalign.models.patch_transformer import patch_transformer
from jaxalign.ops import diffusion
from jaxalign.ops import policy_gradient as pg
from jaxalign.rollout.diffusion import Rollout, denoise, guided, path_divergence

SHAPE, PROMPTS, LENGTH, WIDTH = (4, 4, 1), 3, 2, 16
TOY = Config(
    stages=6,
    groups=8,
    branches=(3,),
    steps=4,
    guidance=1.0,
    suffix_start=2,
    suffix_stop=4,
    estimator="branch_loo",
    history=2,
    epochs=2,
    updates=2,
    micro_batch=16,
    learning_rate=1e-2,
)
INDEPENDENT = dict(groups=20, branches=(1,), suffix_start=4)
FORMS = {
    "prompt_z": INDEPENDENT,
    "extremes": INDEPENDENT,
    "telescope": dict(branches=(2, 2)),
    "telescope_shrunk": dict(branches=(2, 2)),
}
ESTIMATORS = get_args(b2_diffurl.Estimator)
ROUNDING = 1e-5  # of the log ratio, which differs between processors; runs stop above it


def config_of(estimator, **changes):
    return dataclasses.replace(TOY, estimator=estimator, **FORMS.get(estimator, {}), **changes)


# --- a world of brightness ------------------------------------------------------------


def predict(params, x, timestep, context):
    """v of one matrix: of the latent, the mean prompt token and the noise level."""
    rows = x.reshape(len(x), -1)
    out = rows @ params["mix"] + context.prompt.mean(1) @ params["text"]
    return (out + timestep[:, None] / 1000 * params["time"][None]).reshape(x.shape)


@functools.cache
def base():
    rng = np.random.default_rng(0)
    shapes = {"mix": (16, 16), "text": (WIDTH, 16), "time": (16,)}
    return {n: jnp.asarray(0.1 * rng.normal(size=s), jnp.float32) for n, s in shapes.items()}


def make_task(steps=4):
    rng = np.random.default_rng(1)
    context = jnp.asarray(rng.normal(size=(PROMPTS, LENGTH, WIDTH)), jnp.float32)
    sampler = diffusion.ddim_sampler(diffusion.scaled_linear_alphas(), steps, prediction="v")
    return b2_diffurl.Task(sampler, context, context[0] * 0, jnp.array([-0.5, 0.0, 0.5]), 1.0)


def reward(pictures, batch, scale):
    """How near the picture's brightness is to the one its prompt asks for."""
    brightness = pictures.reshape(len(pictures), -1).mean(1)
    return -scale * jnp.abs(brightness - batch["target"])


@functools.cache
def _stage_of(config, devices):
    rows = meshes.batch_sharding(mesh_of(devices)) if devices else None
    return b2_diffurl.make_stage(
        predict, config, SHAPE, b2_diffurl.pictures_are_latents, reward, rows
    )


def stage_of(config, devices=0):
    """The stage, compiled once for all tests; on a mesh of so many devices, or (0) without one."""
    return _stage_of(config, devices)


def mesh_of(devices):
    return meshes.make_mesh({"data": devices}, jax.devices()[:devices])


@functools.cache
def sample_of(config):
    """The compiled rollout of the stage with that config."""

    def run(state, task, key):
        sample_key, _ = jax.random.split(key)
        samples = b2_diffurl.sample(
            predict, config, config.groups, SHAPE, None, state, task, sample_key
        )
        batch = b2_diffurl._reward_batch(config, task, samples.prompt)
        return samples, reward(samples.pictures, batch, task.reward)

    return jax.jit(run)


def start(config):
    return b2_diffurl.init(config, base(), PROMPTS, jax.random.key(7))


def run_stages(config, count, devices=0, seed=0, learning_rate=None):
    """The state after `count` stages, and the metrics of each."""
    rate = learning_rate or config.learning_rate  # lives in the state, not in the compiled stage
    state, task, log = start(dataclasses.replace(config, learning_rate=rate)), make_task(), []
    if devices:
        state, task = jax.device_put((state, task), meshes.replicated(mesh_of(devices)))
    for i in range(count):
        key = jax.random.fold_in(jax.random.key(seed), i)
        if devices:
            key = jax.device_put(key, meshes.replicated(mesh_of(devices)))
        state, metrics = stage_of(config, devices)(state, task, key)
        log.append({name: float(value) for name, value in metrics.items()})
    return state, log


def assert_close(a, b, rtol=1e-4, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# --- one program, on-policy at first --------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_stages_of_every_estimator(estimator):
    """Growing suffix, one compilation; the sampling policy is the one that is updated."""
    config = config_of(estimator)
    state, log = run_stages(config, 4)
    assert stage_of(config)._cache_size() == 1
    fixed = config.suffix_start == config.suffix_stop
    assert [row["suffix"] for row in log] == ([4] * 4 if fixed else [2, 2, 3, 3])
    for row in log:
        assert np.all(np.isfinite(list(row.values())))
        # Seen is exactly 0. The bound leaves room for a compiler that orders the sums of a density
        # differently in the rollout and in the update; a rounded latent would be 1e-5 or more.
        assert row["ratio_error"] <= ROUNDING
        assert row["gradient_norm"] > 0
    assert log[-1]["reward_evaluations"] == 4 * config.groups * config.leaves
    assert int(state.step) == 4


@pytest.mark.parametrize("estimator", ["official", "telescope"])
def test_ratio_is_one_for_the_network_of_the_experiments(estimator):
    """With guidance too, and after updates: the rollout always uses the newest policy."""
    net = patch_transformer((8, 8, 1), 4, width=WIDTH, depth=1, heads=2, length=LENGTH)
    config = config_of(estimator, guidance=2.0, threshold=0.1)
    stage = b2_diffurl.make_stage(
        guided(net.apply, 2.0), config, (8, 8, 1), b2_diffurl.pictures_are_latents, reward
    )
    state = b2_diffurl.init(
        config, jax.jit(net.init)(jax.random.key(0)), PROMPTS, jax.random.key(1)
    )
    for i in range(3):
        state, metrics = stage(state, make_task(), jax.random.key(i))
        assert metrics["ratio_error"] <= ROUNDING
        assert metrics["gradient_norm"] > 0
    assert stage._cache_size() == 1


def test_ratio_error_sees_another_policy():
    """The metric can fail: with parameters that did not sample it is far from zero."""
    config, task = TOY, make_task()
    samples, rewards = sample_of(config)(start(config), task, jax.random.key(0))
    moved = jax.tree.map(lambda a: a + 0.01, base())
    state = b2_diffurl.init(config, moved, PROMPTS, jax.random.key(7))
    optimizer = b2_diffurl.make_optimizer(config)
    update = jax.jit(functools.partial(b2_diffurl.update, predict, config, optimizer))
    _, metrics = update(state, task, samples, rewards, jax.random.key(1))
    assert metrics["ratio_error"] > ROUNDING


# --- which pairs are trained ----------------------------------------------------------


def test_select_pairs_takes_rows_kept_at_steps_run_and_weighted():
    """Two groups; trunk and two branches that part at step 1 of 3; the last step has no weight."""
    keep = np.array([[False, True, False], [True, True, True]])
    first, last = np.array([0, 1, 1]), np.array([1, 3, 3])
    record = Rollout(None, None, jnp.asarray(first), jnp.asarray(last))
    weight = jnp.array([1.5, 1.5, 0.0])
    pairs = b2_diffurl.select_pairs(jnp.asarray(keep), record, weight, jax.random.key(0))
    expected = {
        np.ravel_multi_index((step, group, row), (3, 2, 3))
        for step in range(2)
        for group in range(2)
        for row in range(3)
        if keep[group, row] and first[row] <= step < last[row]
    }
    count = int(pairs.count)
    assert count == len(expected) == 4
    assert set(np.asarray(pairs.order[:count]).tolist()) == expected
    assert sorted(np.asarray(pairs.order).tolist()) == list(range(18))
    other = b2_diffurl.select_pairs(jnp.asarray(keep), record, weight, jax.random.key(3)).order
    assert other[:count].tolist() != pairs.order[:count].tolist()  # shuffled by the key


def keep_of_release(rewards, prompt, threshold):
    """What the released code keeps in a first stage, when the pool is this stage's scores."""
    keep = np.zeros(rewards.shape, bool)
    for g, row in enumerate(rewards):
        scores = rewards[prompt == prompt[g]].reshape(-1)
        z = (row - scores.mean()) / (scores.std(ddof=1) + 1e-8)
        keep[g, z.argmax()] |= z.max() >= threshold
        keep[g, z.argmin()] |= z.min() < -threshold
    return keep


def test_every_kept_pair_is_trained_once_an_epoch(monkeypatch):
    config, task, seen = config_of("official"), make_task(), []
    gather = b2_diffurl.gather

    def watched(index, used, *rest):
        jax.debug.callback(lambda i, u: seen.append((np.asarray(i), np.asarray(u))), index, used)
        return gather(index, used, *rest)

    monkeypatch.setattr(b2_diffurl, "gather", watched)
    stage = b2_diffurl.make_stage(predict, config, SHAPE, b2_diffurl.pictures_are_latents, reward)
    key, state = jax.random.key(5), start(config)
    samples, rewards = sample_of(config)(state, task, key)
    state, metrics = jax.block_until_ready(stage(state, task, key))
    jax.effects_barrier()

    rewards = np.asarray(rewards).reshape(8, 3)
    keep = keep_of_release(rewards, np.asarray(samples.prompt), config.threshold)
    expected = [
        np.ravel_multi_index((step, g, 1 + k), samples.record.log_density.shape)
        for g, k in np.argwhere(keep)
        for step in (2, 3)  # the trained suffix; column 0 is the trunk
    ]
    assert 0 < keep.sum() < keep.size
    trained = np.concatenate([index[used] for index, used in seen])
    assert sorted(trained.tolist()) == sorted(expected * config.epochs)
    assert metrics["trained_pairs"] == config.epochs * len(expected)
    assert metrics["kept"] == pytest.approx(keep.sum() / (8 * 4))


def test_nothing_kept_is_no_update():
    config = config_of("official", threshold=50.0, weight_decay=0.0)
    state, (metrics,) = run_stages(config, 1)
    assert metrics["kept"] == metrics["trained_pairs"] == metrics["loss"] == 0
    assert_equal(state.params["model"], base())


# --- the update -----------------------------------------------------------------------


def first_moment(state):
    """Adam's first moment after one step: a tenth of the clipped gradient."""
    return optax.tree.get(state.opt_state, "mu")["model"]


def test_without_branches_it_is_one_ddpo_step():
    """The gradient of -mean A log p over all pairs of a sample, prompt z-scores, whole path."""
    config = config_of("prompt_z", epochs=1, updates=1, gradient_clip=1e9)
    task, key, state = make_task(), jax.random.key(2), start(config)
    samples, rewards = sample_of(config)(state, task, key)
    state, metrics = stage_of(config)(state, task, key)
    prompt, rewards = np.asarray(samples.prompt), np.asarray(rewards)
    advantage = np.zeros(20, np.float32)
    for p in set(prompt.tolist()):
        mine = rewards[prompt == p]
        spread = mine.std(ddof=1) if len(mine) > 1 else 0.0
        advantage[prompt == p] = (mine - mine.mean()) / (spread + 1e-8)
    advantage = np.clip(advantage, -5, 5)
    path = samples.record.latents[:, :, 1]  # the split is at the start: no step in column 0

    def surrogate(params):
        total = 0.0
        for step in range(4):
            x, x_next = path[step], path[step + 1]
            t = jnp.full(20, task.sampler.timestep[step])
            out = predict(params, x, t, task.rows(samples.prompt))
            mean = task.sampler.keep[step] * x + task.sampler.push[step] * out
            z = (x_next - mean) / task.sampler.std[step]
            total += (advantage * (-(z**2) / 2).mean((1, 2, 3))).sum()
        return -total / 80

    gradient = jax.grad(surrogate)(base())
    assert_close(jax.tree.map(lambda m: 10 * m, first_moment(state)), gradient, 1e-3, 1e-6)
    assert metrics["gradient_norm"] == pytest.approx(float(optax.tree.norm(gradient)), rel=1e-3)
    assert metrics["loss"] == pytest.approx(-advantage.mean(), abs=1e-5)


def test_one_device_equals_eight():
    one, one_log = run_stages(TOY, 2)
    eight, eight_log = run_stages(TOY, 2, devices=8)
    assert len(eight.params["model"]["mix"].sharding.device_set) == 8
    assert_close(eight.params, one.params)
    assert_close(eight.extra, one.extra)
    for a, b in zip(one_log, eight_log, strict=True):
        assert b.pop("ratio_error") <= ROUNDING
        a.pop("ratio_error")
        assert b == pytest.approx(a, rel=1e-3, abs=1e-5)
    assert stage_of(TOY, 8)._cache_size() == 1


def test_micro_batches_do_not_change_the_update():
    one, log = run_stages(TOY, 1)
    cut, cut_log = run_stages(dataclasses.replace(TOY, micro_batch=5), 1)
    assert_close(cut.params, one.params)
    assert cut_log[0]["loss"] == pytest.approx(log[0]["loss"], rel=1e-3, abs=1e-6)
    assert cut_log[0]["trained_pairs"] == log[0]["trained_pairs"] == 2 * 8 * 3 * 2


def test_reward_rises():
    """Minus the distance to the brightness asked for: most of it is gone after 12 stages."""
    config = dataclasses.replace(TOY, groups=64, micro_batch=128, step_weight="inverse_gain")
    for seed, rate in ((0, 0.01), (1, 0.01), (2, 0.02)):
        _, log = run_stages(config, 12, seed=seed, learning_rate=rate)
        rewards = [row["reward"] for row in log]
        before, after = np.mean(rewards[:2]), np.mean(rewards[-2:])
        assert after > 0.35 * before
    assert stage_of(config)._cache_size() == 1  # the rate is no part of the program


def divergence_from_base(state, config):
    task, key = make_task(), jax.random.key(11)
    context = task.rows(jnp.arange(24) % PROMPTS)
    x = jax.random.normal(key, (24, *SHAPE))
    params = b2_diffurl.policy_params(state, config)

    @jax.jit
    def measure(params):
        _, path, _ = denoise(predict, params, task.sampler, x, context, key)
        return path_divergence(predict, params, base(), task.sampler, path, context).sum(0).mean()

    return float(measure(params))


def test_divergence_penalty_holds_the_policy_back():
    config = dataclasses.replace(TOY, kl_weight=100.0)
    free, held = (divergence_from_base(run_stages(c, 4)[0], c) for c in (TOY, config))
    assert free > 0.01
    assert held < 0.5 * free


# --- what changes, and what does not --------------------------------------------------


def test_adapters_train_alone_and_the_average_follows_them():
    config = dataclasses.replace(TOY, lora_rank=2, ema=0.75)
    state = start(config)
    assert "reference" not in state.slow
    assert_equal(b2_diffurl.policy_params(state, config), base())  # fresh adapters change nothing
    moments = jax.tree.leaves(optax.tree.get(state.opt_state, "mu"))
    assert sum(leaf.size for leaf in moments) == 2 * (2 * (16 + 16))  # two matrices, rank 2
    averages, adapters = [], []
    for i in range(2):
        averages.append(jax.device_get(state.slow["ema"]["lora"]))
        state, metrics = stage_of(config)(state, make_task(), jax.random.key(i))
        adapters.append(jax.device_get(state.params["lora"]))
        assert metrics["ratio_error"] <= ROUNDING
        expected = jax.tree.map(lambda s, f: 0.75 * s + 0.25 * f, averages[-1], adapters[-1])
        assert_close(state.slow["ema"]["lora"], expected, 1e-5, 1e-7)
    assert_equal(state.params["model"], base())
    assert_equal(b2_diffurl.reference_params(state), base())
    policy = b2_diffurl.policy_params(state, config)
    mean = state.slow["ema"]["lora"]["mix"]
    assert_close(policy["mix"], base()["mix"] + mean["down"] @ mean["up"])
    assert float(jnp.abs(mean["up"]).max()) > 1e-4
    assert_equal(policy["time"], base()["time"])


def test_base_is_kept_beside_a_policy_that_is_trained_whole():
    state, _ = run_stages(TOY, 1)
    assert_equal(b2_diffurl.reference_params(state), base())
    assert float(jnp.abs(b2_diffurl.policy_params(state, TOY)["mix"] - base()["mix"]).max()) > 1e-3


def test_state_is_donated_and_the_base_is_not():
    state = start(TOY)
    before = state.params["model"]["mix"]
    stage_of(TOY)(state, make_task(), jax.random.key(0))
    assert before.is_deleted()
    assert not base()["mix"].is_deleted()


def test_history_holds_this_stage_and_those_before():
    """With room for two past stages the pool of the fourth stage forgets the first."""
    state, _ = run_stages(TOY, 4)
    assert state.extra.history.count.shape == (3, PROMPTS)
    assert float(state.extra.history.count.sum()) == 3 * TOY.groups * TOY.leaves


def test_released_suffix_schedule():
    """20 steps, 14 to 20 over 100 stages: the intervals of the launch script."""
    config = Config()
    assert (config.steps, config.suffix_start, config.suffix_stop) == (20, 14, 20)
    grow = jax.jit(jax.vmap(lambda j: b2_diffurl.next_suffix(config, j, j, j)))
    last_stage = {14: 14, 15: 28, 16: 42, 17: 57, 18: 71, 19: 85, 20: 99}
    expected = [min(s for s, last in last_stage.items() if j <= last) for j in range(100)]
    assert grow(jnp.arange(100)).tolist() == expected


def test_adaptive_growth_waits_until_the_suffix_is_exhausted():
    config = Config(growth="adaptive", growth_share=0.4)

    def grow(suffix, share):
        args = (jnp.asarray(50), jnp.asarray(suffix), jnp.asarray(share))
        return int(b2_diffurl.next_suffix(config, *args))

    assert grow(14, 0.41) == 14  # most of the variance still arises there
    assert grow(14, 0.39) == 15
    assert grow(20, 0.0) == 20


def test_splits_share_the_suffix_equally():
    assert b2_diffurl.split_points(Config(), jnp.asarray(14)).tolist() == [6]
    nested = Config(branches=(2, 2, 2), estimator="telescope")
    assert b2_diffurl.split_points(nested, jnp.asarray(14)).tolist() == [6, 10, 15]
    assert b2_diffurl.split_points(nested, jnp.asarray(20)).tolist() == [0, 6, 13]


def test_trunk_is_trained_by_telescoping_credit_only():
    rewards = jnp.asarray(np.random.default_rng(0).normal(size=(20, 4)), jnp.float32)
    prompt = jnp.arange(20) % PROMPTS
    pooled = pg.moments_by(jnp.repeat(prompt, 4), rewards.reshape(-1), PROMPTS)
    for estimator in ESTIMATORS:
        config = dataclasses.replace(
            TOY, groups=20, estimator=estimator, branches=(4,), suffix_start=4
        )
        credit = b2_diffurl.credit(config, rewards, prompt, pooled)
        assert credit.advantage.shape == credit.keep.shape == (20, 5)
        assert bool(credit.keep[:, 0].all()) == estimator.startswith("telescope")
        assert bool(credit.keep[:, 0].any()) == estimator.startswith("telescope")


def test_network_evaluations_count_the_shared_prefix_once():
    """8 groups: 2 prefix steps of 1 row, 2 suffix steps of 3; unshared it would be 8 * 3 * 4."""
    _, (metrics,) = run_stages(TOY, 1)
    assert metrics["network_evaluations"] == 8 * (2 * 1 + 2 * 3)


# --- resume, and impossible configurations --------------------------------------------


def test_resume_is_bit_equal(tmp_path):
    def run(steps, checkpoints=None, resume=False):
        return fit(
            start(TOY),
            stage_of(TOY),
            lambda i: make_task(),
            jax.random.key(3),
            steps=steps,
            checkpoints=checkpoints,
            resume=resume,
        )

    straight = run(4)
    checkpoints = Checkpoints(tmp_path)
    run(2, checkpoints)
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path)
    resumed = run(4, checkpoints, resume=True)
    checkpoints.close()
    assert jax.tree.structure(resumed) == jax.tree.structure(straight)
    assert_equal(resumed, straight)
    assert int(resumed.step) == 4


@pytest.mark.parametrize(
    ("change", "says"),
    [
        *(({name: 0}, f"{name} = 0: must be at least 1")
          for name in ("stages", "groups", "history", "epochs", "updates", "micro_batch")),
        *(({name: 0.0}, f"{name} = 0.0: must be positive")
          for name in ("learning_rate", "gradient_clip", "clip", "advantage_clip")),
        *(({name: -1}, f"{name} = -1: must not be negative")
          for name in ("kl_weight", "weight_decay", "lora_rank", "threshold")),
        ({"groups": -8}, "groups = -8"),
        ({"steps": -1}, "steps = -1"),
        ({"ema": 1.0}, "ema = 1.0: a decay lies in"),
        ({"keep_share": 0.0}, "keep_share = 0.0"),
        ({"keep_share": 1.5}, "keep_share = 1.5"),
        ({"suffix_start": 0}, "suffix_start = 0"),
        ({"suffix_stop": 5}, "suffix_stop = 5: need .* steps = 4"),  # split beyond the steps
        ({"suffix_start": 4, "suffix_stop": 3}, "suffix_start = 4, suffix_stop = 3"),
        ({"branches": ()}, "give at least one number"),
        ({"branches": (0,)}, "each at least 1"),
        ({"branches": (-2,), "estimator": "official"}, "each at least 1"),
        ({"branches": (2, 2)}, "nested branchings need estimator telescope"),
        ({"branches": (2, 2, 2), "estimator": "telescope"}, "3 splits do not fit"),
        ({"branches": (1,)}, "compares sibling branches"),
        ({"branches": (2, 1), "estimator": "telescope"}, "compares sibling branches"),
        ({"branches": (1,), "estimator": "extremes"}, "groups = 8"),  # not whole fives
        ({"step_weight": "drop_last"}, "drop_last"),  # nothing of a suffix of two is left
    ],
)  # fmt: skip
def test_impossible_configs(change, says):
    with pytest.raises(UserError, match=says) as error:
        dataclasses.replace(TOY, **change)
    assert "\n" not in str(error.value)
