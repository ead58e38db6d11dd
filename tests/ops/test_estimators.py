"""How well one batch's gradient points along the true one, on a chain where the truth is known.

Data N(0, 1) with its exact denoiser under Stable Diffusion's schedule: 20 DDIM steps, the last 14
trained, 1,280 rewards a batch. The reward is the final value plus an offset that the prefix
decides; the offset's size sets the prefix's share of the reward variance. The gradient of the mean
reward with respect to a shift of step i is the product of the later steps' slopes.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.ops import policy_gradient as pg
from jaxalign.ops.diffusion import ddim_sampler, scaled_linear_alphas

pytestmark = pytest.mark.usefixtures("optimised")

STEPS, SUFFIX, GROUPS, BRANCHES, BATCHES = 20, 14, 256, 5, 2000


def chain():
    alphas = scaled_linear_alphas()
    sampler = ddim_sampler(alphas, STEPS)
    alpha = jnp.asarray(alphas, jnp.float32)[sampler.timestep.astype(int)]
    return sampler.keep + sampler.push * jnp.sqrt(1 - alpha), sampler.std


def variance_by_origin():
    """What the initial noise and each step's noise add to the variance of the final value."""
    slope, std = chain()
    after = jnp.append(jnp.cumprod(slope[::-1])[::-1], 1.0)
    return jnp.append(after[0], after[1:] * std) ** 2


def final_variance():
    return variance_by_origin().sum()


def rollout(key, offset, groups, branches, shared):
    """Rewards `[G, K]` and suffix scores `[G, K, s]`; branches share the prefix if `shared`."""
    slope, std = chain()
    keys = jax.random.split(key, 4)
    width = 1 if shared else branches
    x = jax.random.normal(keys[0], (groups, width))
    prefix = jax.random.normal(keys[1], (STEPS - SUFFIX, groups, width))
    for i in range(STEPS - SUFFIX):
        x = slope[i] * x + std[i] * prefix[i]
    bonus = offset * jnp.sqrt(final_variance()) * jax.random.normal(keys[2], (groups, width))
    x = jnp.broadcast_to(x, (groups, branches))
    noise = jax.random.normal(keys[3], (SUFFIX, groups, branches))
    for i in range(SUFFIX):
        x = slope[STEPS - SUFFIX + i] * x + std[STEPS - SUFFIX + i] * noise[i]
    return x + bonus, jnp.moveaxis(noise, 0, -1) / std[None, None, STEPS - SUFFIX :]


def best_and_worst(rewards, mean, std):
    """The best and the worst branch of every group, the group's mean as baseline."""
    del mean, std
    centred = rewards - rewards.mean(1, keepdims=True)
    column = jnp.arange(BRANCHES)[None]
    best, worst = rewards.argmax(1, keepdims=True), rewards.argmin(1, keepdims=True)
    return pg.Credit(centred, (column == best) | (column == worst))


def independent_extremes(rewards, mean, std):
    """`pg.extremes` takes a column of independent rows."""
    prompts = [jnp.repeat(a, rewards.shape[1]) for a in (mean, std)]
    credit = pg.extremes(rewards.reshape(-1, 1), *prompts)
    return pg.Credit(credit.advantage.reshape(rewards.shape), credit.keep.reshape(rewards.shape))


ESTIMATORS = {
    "ddpo": (False, lambda r, m, s: pg.prompt_z(r, m, s)),
    "extremes": (False, independent_extremes),
    "branch_prompt_z": (True, lambda r, m, s: pg.prompt_z(r, m, s)),
    "official": (True, lambda r, m, s: pg.official(r, m, s)),
    "centred": (True, best_and_worst),
    "loo": (True, lambda r, m, s: pg.branch_loo(r, s)),
}  # fmt: skip

# The control of the last row is left out: over 4,000 batches ours is .44, elsewhere it was .48.
# prefix's share of the reward variance -> (kept by official, mean cosine by estimator)
TABLE = {
    0.0: (402, dict(
        ddpo=0.923, extremes=0.895, branch_prompt_z=0.926,
        official=0.906, centred=0.899, loo=0.920,
    )),
    0.64: (304, dict(
        ddpo=0.857, extremes=0.811, branch_prompt_z=0.840,
        official=0.850, centred=0.888, loo=0.910,
    )),
    0.87: (242, dict(
        ddpo=0.716, extremes=0.656, branch_prompt_z=0.729,
        official=0.825, centred=0.896, loo=0.917,
    )),
    0.96: (202, dict(
        ddpo=0.513, branch_prompt_z=0.510, official=0.775,
        centred=0.904, loo=0.919,
    )),
}  # fmt: skip


def truth():
    slope, _ = chain()
    after = jnp.cumprod(slope[::-1])[::-1]
    return jnp.append(after[1:], 1.0)[STEPS - SUFFIX :]


def one_batch(key, offset):
    """Gradients `{name: [s]}` of one batch, the official number kept, and the prefix's share."""
    gradients, kept, share = {}, 0, 0.0
    prompt = jnp.zeros(GROUPS, jnp.int32)
    drawn = {shared: rollout(key, offset, GROUPS, BRANCHES, shared) for shared in (False, True)}
    for name, (shared, estimate) in ESTIMATORS.items():
        rewards, score = drawn[shared]
        pooled = pg.moments_by(jnp.zeros(rewards.size, jnp.int32), rewards.reshape(-1), 1)
        advantage, keep, _ = estimate(rewards, pooled.mean[prompt], pooled.std()[prompt])
        weight = jnp.where(keep, advantage, 0.0)
        gradients[name] = jnp.einsum("gk,gks->s", weight, score) / keep.sum()
        if name == "official":
            kept, share = keep.sum(), 1 - pg.within_share(rewards, prompt, 1)
    return gradients, kept, share


@jax.jit
def all_batches(keys, offset):
    return jax.lax.map(lambda k: one_batch(k, offset), keys, batch_size=8)


@pytest.mark.parametrize("share", TABLE)
def test_cosine_to_the_true_gradient(share):
    kept, expected = TABLE[share]
    without_offset = float(variance_by_origin()[: STEPS - SUFFIX + 1].sum() / final_variance())
    offset = np.sqrt(max(share - without_offset, 0.0) / (1 - share))
    keys = jax.random.split(jax.random.key(7), BATCHES)
    gradients, kept_seen, share_seen = all_batches(keys, offset)
    assert np.mean(share_seen) == pytest.approx(max(share, without_offset), abs=0.01)
    assert np.mean(kept_seen) == pytest.approx(kept, abs=5)
    for name, cosine in expected.items():
        g, true = np.asarray(gradients[name]), np.asarray(truth())
        seen = np.mean(g @ true / np.linalg.norm(g, axis=1) / np.linalg.norm(true))
        assert seen == pytest.approx(cosine, abs=0.03), name


def test_leave_one_out_is_unbiased():
    keys = jax.random.split(jax.random.key(3), 200)

    def gradient(key):
        rewards, score = rollout(key, 2.4, GROUPS, BRANCHES, shared=True)
        return (
            jnp.einsum("gk,gks->s", pg.branch_loo(rewards, jnp.ones(())).advantage, score)
            / rewards.size
        )

    samples = np.asarray(jax.jit(lambda keys: jax.lax.map(gradient, keys))(keys))
    error = samples.std(0) / np.sqrt(len(samples))
    assert np.all(np.abs(samples.mean(0) - np.asarray(truth())) < 4 * error)


def test_variance_of_the_final_value_is_the_sum_of_its_origins():
    rewards, _ = rollout(jax.random.key(5), 0.0, 40_000, 1, shared=False)
    shares = variance_by_origin() / final_variance()
    assert rewards.var() == pytest.approx(float(final_variance()), rel=0.03)
    assert shares.sum() == pytest.approx(1.0)
