"""B2-DiffuRL with a reward on the host: the same stage as on the device, in chunks, beside the rollouts."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.core import mesh as meshes
from jaxalign.core.checkpoint import Checkpoints
from jaxalign.core.loop import fit
from jaxalign.core.types import NonFinite, UserError
from jaxalign.methods import b2_diffurl
from jaxalign.models.patch_transformer import patch_transformer
from jaxalign.ops import diffusion
from jaxalign.rewards.host import HostReward, to_uint8
from jaxalign.rollout.diffusion import guided

SHAPE = (4, 4, 1)
PROMPTS = 3
CONFIG = b2_diffurl.Config(
    stages=4,
    groups=16,
    branches=(2,),
    steps=3,
    guidance=1.0,
    suffix_start=2,
    suffix_stop=3,
    estimator="branch_loo",
    history=2,
    epochs=1,
    updates=2,
    micro_batch=32,
    learning_rate=1e-2,
)
NET = patch_transformer(SHAPE, 2, width=8, depth=1, heads=2, length=2)
PREDICT = guided(NET.apply, 1.0)
SAMPLER = diffusion.ddim_sampler(diffusion.scaled_linear_alphas(), CONFIG.steps, prediction="v")


def decode(latents):
    return latents


def brightness(images, batch):
    """Of the first pixel row more or less, by the prompt: rewards must meet their own pictures."""
    share = images[:, 0].reshape(len(images), -1).mean(1) / 255
    return share * (1 + batch["target"]["bright"]) + batch["prompt"]


def device_brightness(pictures, batch, params):
    del params
    share = to_uint8(pictures)[:, 0].reshape(len(pictures), -1).astype(jnp.float32).mean(1) / 255
    return share * (1 + batch["target"]["bright"]) + batch["prompt"]


def make_task() -> b2_diffurl.Task:
    context = jax.random.normal(jax.random.key(5), (PROMPTS, 2, 8))
    target = {"bright": jnp.arange(float(PROMPTS))}
    return b2_diffurl.Task(SAMPLER, context, jnp.zeros((2, 8)), target, {})


def make_state(config: b2_diffurl.Config = CONFIG):
    base = NET.init(jax.random.key(1))
    noisy = jax.tree.map(lambda a: a + 0.1 * jax.random.normal(jax.random.key(2), a.shape), base)
    return b2_diffurl.init(config, noisy, PROMPTS, jax.random.key(3))


def make_host(reward: HostReward, chunks: int, rows=None, config: b2_diffurl.Config = CONFIG):
    return b2_diffurl.make_host_stage(PREDICT, config, SHAPE, decode, reward, rows, chunks)


@pytest.fixture
def bright():
    with HostReward("brightness", brightness) as reward:
        yield reward


def run(stage, state, task, stages: int = 2):
    log = []
    for i in range(stages):
        key = jax.random.fold_in(jax.random.key(7), jax.device_put(np.uint32(i)))
        if state.step.committed:
            key = jax.device_put(key, state.step.sharding)
        with jax.transfer_guard("disallow"):
            state, metrics = stage(state, task, key)
        log.append(jax.device_get(metrics))
    return state, log


def assert_close(a, b, atol: float = 2e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=atol), a, b)


# --- the same as on the device -------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["branch_loo", "telescope"])
def test_one_chunk_is_the_stage_on_the_device(bright: HostReward, estimator):
    config = dataclasses.replace(CONFIG, estimator=estimator, ema=0.5)
    device = b2_diffurl.make_stage(PREDICT, config, SHAPE, decode, device_brightness)
    state, log = run(device, make_state(config), make_task())
    host_state, host_log = run(make_host(bright, 1, config=config), make_state(config), make_task())
    assert log[0].keys() == host_log[0].keys()
    for ours, theirs in zip(host_log, log, strict=True):
        # The gradient of a ratio of 1 is what rounding leaves of the ratio.
        assert ours.pop("ratio_error") < 1e-6 > theirs.pop("ratio_error")
        assert_close(ours, theirs, 1e-5)
    moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), state.params, make_state(config).params)
    assert max(jax.tree.leaves(moved)) > 1e-2, "nothing was trained"
    # Adam makes full steps of the smallest gradients, so single weights may differ by more.
    for got, expected in zip(
        jax.tree.leaves(host_state.params), jax.tree.leaves(state.params), strict=True
    ):
        assert np.mean(np.abs(got - expected)) < 1e-4
    assert_close(host_state.extra, state.extra, 1e-5)
    assert int(host_state.step) == 2


def test_chunks_learn_from_all_groups_with_their_own_rewards(bright: HostReward):
    """By the per-prompt history: counts and means of what was scored, chunk by chunk."""
    asked = []

    def score(images, batch):
        asked.append((batch["prompt"], brightness(images, batch)))
        return asked[-1][1]

    with HostReward("brightness", score) as reward:
        state, log = run(make_host(reward, 4), make_state(), make_task(), 1)
    assert len(asked) == 4
    prompt, rewards = (np.concatenate(a) for a in zip(*asked, strict=True))
    assert prompt.shape == (CONFIG.groups * CONFIG.leaves,)
    history = state.extra.history
    for p in range(PROMPTS):
        assert history.count[-1, p] == (prompt == p).sum()
        if (prompt == p).any():
            np.testing.assert_allclose(history.mean[-1, p], rewards[prompt == p].mean(), rtol=1e-5)
    np.testing.assert_allclose(log[0]["reward"], rewards.mean(), rtol=1e-5)
    # Only branches of one group share a prompt in twos.
    assert (prompt.reshape(-1, 2)[:, 0] == prompt.reshape(-1, 2)[:, 1]).all()
    assert log[0]["ratio_error"] < 1e-6, "latents and densities must come from the same group"
    assert log[0]["trained_pairs"] == CONFIG.groups * CONFIG.leaves * CONFIG.suffix_start
    assert log[0]["reward_evaluations"] == CONFIG.groups * CONFIG.leaves


def test_joining_keeps_every_group_whole():
    """Rows numbered by (chunk, group, leaf): all fields of a joined group must name the same one."""
    chunks, groups, leaves, width, steps = 3, 4, 2, 3, 2

    def part(c: int):
        number = 100 * c + jnp.arange(groups)
        leaf = (number[:, None] * 10 + jnp.arange(leaves)).reshape(-1)
        density = jnp.tile(number[None, :, None], (steps, 1, width))
        latents = jnp.tile(number[None, :, None, None], (steps + 1, 1, width, 5))
        record = b2_diffurl.Rollout(latents, density, jnp.arange(width), jnp.arange(width) + 1)
        return b2_diffurl.Samples(number, leaf[:, None] * jnp.ones((1, 5)), record), leaf

    parts, rewards = zip(*(part(c) for c in range(chunks)), strict=True)
    samples, joined = b2_diffurl._join(parts, rewards)
    number = np.asarray(samples.prompt)
    assert sorted(number) == sorted(100 * c + g for c in range(chunks) for g in range(groups))
    leaf = (number[:, None] * 10 + np.arange(leaves)).reshape(-1)
    np.testing.assert_array_equal(joined, leaf)
    np.testing.assert_array_equal(samples.pictures[:, 4], leaf)
    record = samples.record
    assert record.latents.shape == (steps + 1, chunks * groups, width, 5)
    np.testing.assert_array_equal(record.latents[2, :, 1, 3], number)
    np.testing.assert_array_equal(record.log_density[1, :, 2], number)
    np.testing.assert_array_equal(record.last, np.arange(width) + 1)


def test_devices_do_not_matter(bright: HostReward):
    """Two chunks of 8 groups on 8 devices and on one."""
    logs, states = [], []
    for count in (1, 8):
        mesh = meshes.make_mesh({"data": count}, jax.devices()[:count])
        put = meshes.replicated(mesh)
        stage = make_host(bright, 2, meshes.batch_sharding(mesh))
        state, log = run(stage, jax.device_put(make_state(), put), jax.device_put(make_task(), put), 1)
        states.append(jax.device_get(state.extra))
        logs.append(log[0])
    assert_close(states[0], states[1], 1e-5)
    for log in logs:
        assert log.pop("ratio_error") < 1e-6
    assert_close(logs[0], logs[1], 1e-5)


# --- beside the rollouts -------------------------------------------------------------------------


def test_the_next_chunk_is_dispatched_while_one_is_scored():
    dispatched, order = threading.Event(), []

    class Watched(HostReward):
        def submit(self, pictures, batch):
            order.append("submit")
            if order.count("submit") == 2:
                dispatched.set()
            return super().submit(pictures, batch)

    def score(images, batch):
        assert dispatched.wait(60), "the second chunk waits for the first one's rewards"
        order.append("scored")
        return brightness(images, batch)

    with Watched("brightness", score) as reward:
        run(make_host(reward, 2), make_state(), make_task(), 1)
    assert order == ["submit", "submit", "scored", "scored"]


def test_the_state_is_donated_and_the_chunks_are_drawn_apart(bright: HostReward):
    seen = []

    def score(images, batch):
        seen.append(images.copy())
        return brightness(images, batch)

    with HostReward("brightness", score) as reward:
        state = make_state()
        run(make_host(reward, 2), state, make_task(), 1)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    assert (seen[0] != seen[1]).mean() > 0.5


# --- what may go wrong ---------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [0, -1, 3, 32])
def test_chunks_must_divide_the_groups(bright: HostReward, chunks: int):
    with pytest.raises(UserError, match=f"chunks = {chunks}: must be at least 1 and divide groups"):
        make_host(bright, chunks)


def test_chunks_must_suit_the_devices(bright: HostReward):
    rows = meshes.batch_sharding(meshes.make_mesh())
    with pytest.raises(UserError, match="groups / 4 chunks = 4: must be a positive multiple of 8"):
        make_host(bright, 4, rows)


@pytest.mark.parametrize(
    ("bad", "kind", "said"),
    [
        (lambda images: [float("nan")] * len(images), NonFinite, "16 of 16 numbers are not finite"),
        (lambda images: 1 / 0, UserError, "raised ZeroDivisionError: division by zero"),
        (lambda images: [0.0], UserError, "gave shape (1,) for 16 pictures"),
    ],
)
def test_a_bad_reward_stops_the_run_and_keeps_the_last_checkpoint(bad, kind, said, tmp_path: Path):
    calls = []

    def score(images, batch):
        calls.append(1)
        return brightness(images, batch) if len(calls) <= 4 else bad(images)

    def train(score, resume: bool):
        checkpoints = Checkpoints(tmp_path / "ckpt")
        try:
            with HostReward("moody", score) as reward:
                stage, state, task = make_host(reward, 2), make_state(), make_task()
                done = fit(
                    state, stage, lambda i: task, jax.random.key(0), steps=4, put=lambda task: task,
                    checkpoints=checkpoints, save_every=1, resume=resume,
                )
                return done, checkpoints.steps()
        finally:
            checkpoints.close()

    with pytest.raises(kind) as caught:
        train(score, False)
    assert str(caught.value).startswith("reward moody: ")
    assert said in str(caught.value)
    resumed, steps = train(brightness, True)
    assert steps == [3, 4], "begun again at 2"
    assert int(resumed.step) == 4
    expected, _ = run(make_host_again(), make_state(), make_task(), 4)
    jax.tree.map(np.testing.assert_array_equal, resumed.extra, expected.extra)


def make_host_again():
    raise NotImplementedError
