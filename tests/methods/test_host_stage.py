"""B2-DiffuRL with a reward on the host: as on the device, in chunks, beside the rollouts."""

from __future__ import annotations

import contextlib
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


def decode(_, latents):
    return latents


def brightness(images, batch):
    """Of the first pixel row, and of the prompt: rewards must meet their own pictures."""
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


class Switched(HostReward):
    """A reward whose score can be changed, so that one compiled stage serves all tests."""

    def __init__(self) -> None:
        super().__init__("moody", lambda images, batch: self.score(images, batch))
        self.score = brightness
        self.submitted = 0
        self.on_submit = lambda count: None

    def submit(self, pictures, batch):
        self.submitted += 1
        self.on_submit(self.submitted)
        return super().submit(pictures, batch)


@pytest.fixture(scope="module")
def compiled():
    with Switched() as reward:
        yield reward, make_host(reward, 2)


@pytest.fixture
def reward(compiled):
    reward, _ = compiled
    reward.score, reward.submitted, reward.on_submit = brightness, 0, lambda count: None
    return reward


@pytest.fixture
def stage(compiled, reward):
    """In two chunks, asking `reward`."""
    return compiled[1]


def run(stage, state, task):
    key = jax.random.fold_in(jax.random.key(7), 0)
    if state.step.committed:
        key = jax.device_put(key, state.step.sharding)
    with jax.transfer_guard("disallow"):
        state, metrics = stage(state, task, key)
    return state, jax.device_get(metrics)


def assert_close(a, b, tolerance: float = 1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, tolerance, tolerance), a, b)


def assert_same_weights(a, b):
    """On average: Adam makes whole steps even of gradients that are all rounding."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.abs(np.asarray(x) - np.asarray(y)).mean() < 1e-4


# --- the same as on the device -------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [1, 2])
def test_as_many_chunks_are_the_stage_on_the_device(reward: HostReward, chunks: int):
    config = dataclasses.replace(CONFIG, estimator="telescope", ema=0.5)
    device = b2_diffurl.make_stage(PREDICT, config, SHAPE, decode, device_brightness, chunks=chunks)
    expected, log = run(device, make_state(config), make_task())
    state, host_log = run(make_host(reward, chunks, config=config), make_state(config), make_task())
    assert log.keys() == host_log.keys()
    # What rounding leaves of a log ratio of 0.
    assert host_log.pop("ratio_error") < 1e-5 > log.pop("ratio_error")
    assert_close(host_log, log)
    assert_close(state.extra, expected.extra)
    assert_same_weights((state.params, state.slow), (expected.params, expected.slow))
    start = make_state(config)
    assert not np.allclose(
        state.params["model"]["patch_in"]["kernel"], start.params["model"]["patch_in"]["kernel"]
    )
    assert int(state.step) == 1


def test_chunks_learn_from_all_groups_with_their_own_rewards(reward: Switched, stage):
    """By the per-prompt history: counts and means of what was scored, chunk by chunk."""
    asked = []

    def score(images, batch):
        asked.append((batch["prompt"], brightness(images, batch), images.copy()))
        return asked[-1][1]

    reward.score = score
    before = make_state()
    state, log = run(stage, before, make_task())
    assert len(asked) == 2
    prompt, rewards, images = (np.concatenate(a) for a in zip(*asked, strict=True))
    assert images.shape == (CONFIG.groups * CONFIG.leaves, *SHAPE)
    assert (asked[0][2] != asked[1][2]).mean() > 0.5, "the chunks are drawn apart"
    assert (prompt.reshape(-1, 2)[:, 0] == prompt.reshape(-1, 2)[:, 1]).all(), "siblings together"
    history = state.extra.history
    for p in range(PROMPTS):
        assert history.count[-1, p] == (prompt == p).sum()
        np.testing.assert_allclose(history.mean[-1, p], rewards[prompt == p].mean(), rtol=1e-5)
    np.testing.assert_allclose(log["reward"], rewards.mean(), rtol=1e-5)
    assert log["ratio_error"] < 1e-5, "latents and densities must come from the same group"
    assert log["trained_pairs"] == CONFIG.groups * CONFIG.leaves * CONFIG.suffix_start
    assert log["reward_evaluations"] == CONFIG.groups * CONFIG.leaves
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.params)), "donated"


def test_devices_do_not_matter(reward: HostReward, stage):
    """Two chunks of 8 groups on one device and on eight."""
    mesh = meshes.make_mesh()
    put = meshes.replicated(mesh)
    sharded = make_host(reward, 2, meshes.batch_sharding(mesh))
    state, log = run(sharded, jax.device_put(make_state(), put), jax.device_put(make_task(), put))
    expected, one_log = run(stage, make_state(), make_task())
    assert log.pop("ratio_error") < 1e-5 > one_log.pop("ratio_error")
    assert_close(log, one_log)
    assert_close(jax.device_get(state.extra), jax.device_get(expected.extra))
    assert_same_weights(state.params, expected.params)


def test_joining_keeps_every_group_whole():
    """Rows carry the number of their group: all fields of a joined group must name the same."""
    chunks, groups, leaves, width, steps = 3, 4, 2, 3, 2

    def part(c: int):
        number = 100 * c + jnp.arange(groups)
        leaf = (number[:, None] * 10 + jnp.arange(leaves)[None]).reshape(-1)
        density = jnp.tile(number[None, :, None], (steps, 1, width))
        latents = jnp.tile(number[None, :, None, None], (steps + 1, 1, width, 5))
        record = b2_diffurl.Rollout(latents, density, jnp.arange(width), jnp.arange(width) + 1)
        return b2_diffurl.Samples(number, leaf[:, None] * jnp.ones((1, 5)), record), leaf

    stacked = jax.tree.map(lambda *a: jnp.stack(a), *(part(c) for c in range(chunks)))
    samples, joined = b2_diffurl._join(*stacked)
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


# --- beside the rollouts -------------------------------------------------------------------------


def test_the_next_chunk_is_dispatched_while_one_is_scored(reward: Switched, stage):
    dispatched, scored = threading.Event(), []

    def score(images, batch):
        assert dispatched.wait(30), "the second chunk waits for the rewards of the first"
        scored.append(reward.submitted)
        return brightness(images, batch)

    reward.score = score
    reward.on_submit = lambda count: dispatched.set() if count == 2 else None
    run(stage, make_state(), make_task())
    assert scored == [2, 2]


# --- what may go wrong ---------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [0, -1, 3, 32])
def test_chunks_must_divide_the_groups(reward: HostReward, chunks: int):
    with pytest.raises(UserError, match=f"chunks = {chunks}: must be at least 1 and divide groups"):
        make_host(reward, chunks)


def test_chunks_must_suit_the_devices(reward: HostReward):
    rows = meshes.batch_sharding(meshes.make_mesh())
    with pytest.raises(UserError, match="groups / 4 chunks = 4: must be a positive multiple of 8"):
        make_host(reward, 4, rows)


def train(stage, directory: Path, *, resume: bool):
    """Four stages through `fit`: the state, and the steps that have a checkpoint."""
    task = make_task()
    with contextlib.closing(Checkpoints(directory)) as checkpoints:
        state = fit(
            make_state(),
            stage,
            lambda i: task,
            jax.random.key(0),
            steps=4,
            checkpoints=checkpoints,
            save_every=1,
            resume=resume,
        )
        return state, checkpoints.steps()


BAD = {
    "NaN": (lambda images: [np.nan] * len(images), NonFinite, "16 of 16 numbers are not finite"),
    "raises": (lambda images: 1 / 0, UserError, "raised ZeroDivisionError: division by zero"),
    "wrong shape": (lambda images: [0.0], UserError, "gave shape (1,) for 16 pictures"),
}


@pytest.mark.parametrize(("bad", "kind", "said"), BAD.values(), ids=BAD)
def test_a_bad_reward_stops_the_run_and_nothing_is_lost(
    bad, kind, said: str, reward: Switched, stage, tmp_path: Path
):
    def score(images, batch):
        return bad(images) if reward.submitted > 4 else brightness(images, batch)

    reward.score = score  # good for two stages
    with pytest.raises(kind) as caught:
        train(stage, tmp_path / "ckpt", resume=False)
    assert str(caught.value).startswith("reward moody: ")
    assert said in str(caught.value)

    reward.score, reward.submitted = brightness, 0
    state, steps = train(stage, tmp_path / "ckpt", resume=True)
    assert steps == [3, 4]
    assert reward.submitted == 4, "two stages were left"
    whole, _ = train(stage, tmp_path / "whole", resume=False)
    jax.tree.map(np.testing.assert_array_equal, state, whole)
