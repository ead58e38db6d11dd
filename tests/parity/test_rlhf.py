"""The PPO iteration of `experiments.bench_rlhf` in torch computes what ours computes."""

from __future__ import annotations

import dataclasses
import importlib

import jax
import numpy as np
import pytest

from experiments import bench_rlhf
from jaxalign.core.types import UserError
from jaxalign.methods import r3hf
from jaxalign.rollout.decode import Decoded, score

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
theirs = importlib.import_module("experiments.bench_rlhf_torch")

pytestmark = pytest.mark.parity

CONFIG = r3hf.Config(
    rollouts=12,
    group=2,
    dense_weight=0.7,
    kl_weight=0.3,
    discount=0.97,
    minibatches=1,
    micro_batches=2,
    epochs=3,
    policy_rate=3e-3,
    critic_rate=1e-2,
)
TINY = bench_rlhf.Bench(
    CONFIG, depth=2, width=32, heads=4, vocabulary=13, prompt=5, response=7, prompts=9
)


@pytest.fixture(autouse=True)
def _strict():
    torch.set_num_threads(1)
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def problem() -> bench_rlhf.Problem:
    """Prompts of several lengths; weights away from their initial values."""
    problem = bench_rlhf.make_problem(TINY)
    mask = np.arange(5)[None] >= (np.arange(9) % 4)[:, None]
    prompts = r3hf.Prompts(np.where(mask, problem.task.prompts.ids, 0), mask)
    keys = iter(jax.random.split(jax.random.key(5), 200))
    state, task = problem.state, problem.task

    def noisy(leaf):
        return leaf + 0.05 * jax.random.normal(next(keys), leaf.shape)

    return problem._replace(
        task=task._replace(prompts=prompts, reward=jax.tree.map(noisy, task.reward)),
        state=state._replace(params=jax.tree.map(noisy, state.params)),
    )


@pytest.fixture
def iteration(problem):
    made = theirs.Iteration(problem)
    made.reference = theirs.in_transformers(problem.network, problem.state.slow["reference"])
    return made


@pytest.fixture
def sampled(iteration):
    torch.manual_seed(0)
    return iteration.sample()


@pytest.fixture
def ours(problem, sampled) -> r3hf.Samples:
    """Their responses as ours, scored by our reward model."""
    ids, mask, density, stopped = (x.numpy() for x in sampled)
    decoded = Decoded(ids.astype(np.int32), mask, density, mask[:, 5:].sum(1), stopped)
    scores = jax.jit(problem.parts.reward)(problem.task.reward, decoded.ids, mask)
    return r3hf.Samples(decoded, scores, np.zeros(12, np.float32))


def assert_close(ours, theirs, tolerance: float = 1e-5) -> None:
    """Largest difference, relative to the largest value."""
    theirs = theirs.detach().numpy()
    assert ours.shape == theirs.shape and np.abs(theirs).max() > 0
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


def both(tree, iteration):
    """Leaves of ours, from every kind of layer, each with its parameter of theirs."""
    critic, head = tree["critic"]["model"], tree["critic"]["head"]
    pairs = [
        (head["kernel"].T, iteration.critic.head.weight),
        (head["bias"], iteration.critic.head.bias),
    ]
    networks = (tree["policy"], iteration.policy.transformer), (critic, iteration.critic.trunk)
    for ours, theirs in networks:
        pairs += [
            (ours["token"]["embedding"], theirs.wte.weight),
            (ours["position"]["embedding"], theirs.wpe.weight),
            (ours["norm"]["scale"], theirs.ln_f.weight),
            (ours["block_1"]["up"]["kernel"], theirs.h[1].mlp.c_fc.weight),
            (ours["block_0"]["attention"]["out"]["kernel"], theirs.h[0].attn.c_proj.weight),
        ]
    return pairs


def estimate(problem, samples):
    @jax.jit
    def run(state, samples, key):
        return r3hf.estimate(problem.parts, problem.config, state, samples, key)[0]

    return run(problem.state, samples, jax.random.key(0))


def test_their_responses_end_like_ours_and_have_the_density_that_we_score(problem, sampled, ours):
    decoded = ours.decoded
    lengths = decoded.length
    assert set(decoded.stopped) == {True, False} and len(set(lengths)) > 2
    for ids, length, stopped in zip(decoded.ids[:, 5:], lengths, decoded.stopped, strict=True):
        assert (bench_rlhf.STOP in ids[:length]) == stopped and not ids[length:].any()
        assert bench_rlhf.STOP not in ids[: length - 1]
    np.testing.assert_array_equal(decoded.mask[:, 5:].cumsum(1).max(1), lengths)
    density, _ = jax.jit(lambda *given: score(problem.parts.policy, *given, 7, CONFIG.sampling))(
        problem.state.params["policy"], decoded.ids, decoded.mask
    )
    assert_close(density, sampled.log_density)
    prompts = np.concatenate([problem.task.prompts.ids, problem.task.prompts.mask], 1).tolist()
    drawn = np.concatenate([decoded.ids[:, :5], decoded.mask[:, :5]], 1).tolist()
    assert all(row in prompts for row in drawn) and drawn[::2] == drawn[1::2]


def test_tokens_are_worth_the_same(problem, iteration, sampled, ours):
    batch = iteration.estimate(sampled)
    expected = estimate(problem, ours)
    for name in ("advantage", "value", "target"):
        assert_close(getattr(expected, name), getattr(batch, name))


def test_losses_and_gradients_are_the_same(problem, iteration, sampled, ours):
    """At densities and values that are far from those before the update, so that both clip."""
    shift = torch.randn(12, 7) * sampled.response
    batch = iteration.estimate(sampled)
    batch = batch._replace(
        log_density=batch.log_density + 0.3 * shift, value=batch.value + 0.5 * shift
    )
    sums = iteration.loss(batch)
    tokens = sampled.response.sum()
    (sums["policy_loss"] + sums["value_loss"]).div(tokens).backward()

    @jax.jit
    def loss(params, batch):
        mean, metrics = r3hf.loss(problem.parts, CONFIG, params, batch, jax.random.key(0))
        return mean.value(), metrics

    given = r3hf.Batch(*(x.numpy() for x in batch))._replace(ids=ours.decoded.ids)
    gradient, metrics = jax.grad(loss, has_aux=True)(problem.state.params, given)
    assert 0.1 < metrics["clipped"].value() < 0.9
    for name, total in sums.items():
        assert_close(metrics[name].value(), total / tokens)
    for mine, parameter in both(gradient, iteration):
        assert_close(mine, parameter.grad)


def test_an_update_ends_at_the_same_parameters(problem, iteration, sampled, ours):
    """With one minibatch an epoch the order of the rows plays no role."""
    log = iteration.learn(iteration.estimate(sampled))
    batch, optimizer = estimate(problem, ours), r3hf.make_optimizer(CONFIG)

    @jax.jit
    def learn(state, batch, key):
        return r3hf.learn(problem.parts, CONFIG, optimizer, None, state, batch, key)

    state, seen = learn(problem.state, batch, jax.random.key(0))
    for name in ("policy_loss", "value_loss", "entropy"):
        np.testing.assert_allclose(seen[name], [step[name] for step in log], rtol=1e-4, atol=1e-6)
    moved = jax.tree.map(lambda new, old: new - old, state.params, problem.state.params)
    start = both(problem.state.params, iteration)
    for (mine, parameter), (before, _) in zip(both(moved, iteration), start, strict=True):
        # Adam divides small gradients by themselves: rounding shows.
        assert_close(mine, parameter.detach() - torch.tensor(np.asarray(before)), 2e-2)


@pytest.mark.parametrize(
    "changes", [dict(credit="sparse"), dict(sampling=r3hf.Sampling(temperature=0.5))], ids=str
)
def test_what_torch_does_not_compute_is_refused(problem, changes):
    with pytest.raises(UserError, match="--no-torch"):
        theirs.Iteration.check(dataclasses.replace(CONFIG, **changes))
