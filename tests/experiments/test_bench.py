"""The bench: what it compares must be the same work, and what it prints must be true."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import bench, measuring
from experiments.bench_loops import Batched, Pieces, Released
from experiments.pictures import Network
from jaxalign.core.types import UserError
from jaxalign.methods import b2_diffurl

TINY = dataclasses.replace(
    bench.stage(),
    network=Network(width=16, depth=1, heads=2),
    b2=dataclasses.replace(
        bench.stage().b2,
        groups=8,
        branches=(3,),
        steps=4,
        suffix_start=3,
        suffix_stop=3,
        step_weight="uniform",
        micro_batch=8,
        updates=2,
        threshold=0.1,
    ),
    repeats=2,
    torch=False,
)
FLAGS = [
    *("--network.width", "16", "--network.depth", "1", "--network.heads", "2"),
    *("--b2.groups", "8", "--b2.branches", "2", "--b2.steps", "4", "--repeats", "2", "--no-torch"),
    *("--b2.suffix-start", "3", "--b2.suffix-stop", "4", "--b2.micro-batch", "16"),
]


@pytest.fixture(scope="module")
def problem() -> bench.Problem:
    return bench.make_problem(TINY)


@pytest.fixture(scope="module")
def pieces(problem: bench.Problem) -> Pieces:
    reward = problem.world.rewards["mixed"]
    return Pieces(problem.predict, problem.config, problem.world.image_shape, reward)


@pytest.fixture(scope="module")
def ours(problem: bench.Problem) -> b2_diffurl.TrainState:
    """The state after one compiled stage."""
    variant = bench.compiled_variant(problem, "stage")
    return jax.device_get(variant.prepare(0)()[0])


def test_the_batched_loop_does_the_compiled_stage(problem, pieces, ours):
    theirs = jax.device_get(Batched(pieces).stage(problem.state, problem.task, bench.run_key(0)))
    assert theirs.extra.trained_pairs == ours.extra.trained_pairs > 0
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), ours.params, problem.state.params)
    assert max(jax.tree.leaves(moved)) > 1e-4
    # Adam divides small gradients by themselves: rounding shows, but less than a tenth of a step.
    step = 0.1 * problem.config.learning_rate
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=step), theirs.params, ours.params
    )
    jax.tree.map(np.testing.assert_array_equal, theirs.extra.suffix, ours.extra.suffix)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        theirs.extra.history,
        ours.extra.history,
    )


@pytest.mark.parametrize("rows", [2, 5])
def test_the_released_loop_trains_on_every_kept_pair_once(problem, pieces, rows, monkeypatch):
    state, task, key = problem.state, problem.task, jax.random.key(3)
    loop = Released(pieces, rows)
    samples = loop.sample(state, task, key)
    rewards = pieces.score(samples.pictures, task, samples.prompt)
    seen = []
    real = pieces.add

    def add(sums, params, reference, task, weight, batch):
        seen.extend(
            (int(s), x.tobytes())
            for s, x, w in zip(batch.step, batch.x_next, batch.weight, strict=True)
            if w > 0
        )
        return real(sums, params, reference, task, weight, batch)

    monkeypatch.setattr(pieces, "add", add)
    after = loop.update(state, task, samples, rewards, key)
    ready = pieces.prepare(state, task, samples, rewards)
    latents = samples.record.latents
    expected = {
        (step, latents[step + 1, group, row].tobytes())
        for group, row in np.argwhere(ready.keep)
        for step in range(1, 4)
    }
    assert len(seen) == len(expected) > 0 and set(seen) == expected
    assert after.extra.trained_pairs == len(expected)


def test_the_released_loop_samples_the_same_tree(problem, pieces):
    """The prefix is the compiled one's; densities are of the latents that are kept."""
    key = jax.random.key(5)
    mine = Released(pieces).sample(problem.state, problem.task, key)
    batched = Batched(pieces).sample(problem.state, problem.task, key)
    split = pieces.split
    np.testing.assert_array_equal(mine.prompt, batched.prompt)
    np.testing.assert_allclose(
        mine.record.latents[: split + 1, :, 0],
        batched.record.latents[: split + 1, :, 0],
        rtol=1e-5,
        atol=1e-5,
    )
    rewards = pieces.score(mine.pictures, problem.task, mine.prompt)
    _, metrics = jax.jit(
        lambda state, task, samples, rewards: b2_diffurl.update(
            problem.predict, problem.config, pieces.optimizer, state, task, samples, rewards, key
        )
    )(problem.state, problem.task, jax.tree.map(jnp.asarray, mine), rewards)
    assert metrics["ratio_error"] < 1e-5


def test_nested_branchings_are_refused(problem):
    config = dataclasses.replace(problem.config, branches=(2, 2), estimator="telescope")
    with pytest.raises(UserError, match="--no-loops"):
        Pieces(problem.predict, config, (16, 16, 3), problem.world.rewards["mixed"])


def test_sampled_rows_are_those_the_stage_counts(problem, ours):
    assert bench.sampled_rows(problem.config) == ours.extra.network_evaluations == 8 * (1 + 3 * 3)
    nested = dataclasses.replace(
        problem.config, branches=(2, 3), estimator="telescope", guidance=2.0
    )
    assert bench.sampled_rows(nested) == 2 * 8 * (1 * 1 + 2 * 1 + 6 * 2)


def test_flops_are_those_of_the_compiled_network(problem):
    """Outside of loops the compiler counts too; it adds what is not a matrix product."""
    network, world = TINY.network, problem.world
    length = world.vocabulary.length
    counted = bench.forward_flops(network, world.image_shape, world.patch, length)
    x, t, context = jnp.zeros((1, *world.image_shape)), jnp.zeros(1), jnp.zeros((1, length, 16))
    apply = bench.make_networks(world, network).net.apply
    lowered = jax.jit(apply).lower(problem.state.params["model"], x, t, context)
    analysis = lowered.compile().cost_analysis()
    assert analysis
    compiler = analysis["flops"]
    assert counted < compiler < 1.25 * counted


def test_measure_takes_turns_and_leaves_preparation_out(monkeypatch):
    clock, turns = [0.0], []
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(measuring.time, "process_time", lambda: 2 * clock[0])

    def variant(name, seconds):
        def prepare(run):
            clock[0] += 100.0

            def thunk():
                turns.append((run, name))
                clock[0] += seconds + (7.0 if run == 0 else 0.0)
                return run

            return thunk

        return measuring.Variant(name, prepare, lambda result: 10 * result)

    timings = measuring.measure([variant("a", 1.0), variant("b", 3.0)], 3)
    assert turns[2:] == [(1, "a"), (1, "b"), (2, "b"), (2, "a"), (3, "a"), (3, "b")]
    assert timings["a"].first == pytest.approx(8.0)
    assert np.asarray(timings["a"].spent) == pytest.approx(np.array([[1.0, 2.0]] * 3))
    assert np.asarray(timings["b"].spent) == pytest.approx(np.array([[3.0, 6.0]] * 3))
    assert timings["b"].counts == [10, 20, 30]
    assert timings["a"].memory > 1e6


def test_peak_memory_sees_a_large_array():
    measuring.reset_peak_memory()
    before = measuring.peak_memory()
    np.ones(25_000_000)
    assert measuring.peak_memory() - before > 1e8


def test_every_case_runs_in_every_implementation(problem):
    """A rollout's result is its samples; an update's and a stage's counts the pairs trained on."""
    for case in ("rollout", "update", "stage"):
        variants = [bench.compiled_variant(problem, case), *bench.loop_variants(problem, case)]
        names = [variant.name for variant in variants]
        assert names == ["jaxalign", "loop_released", "loop_16_rows", "loop_batched"]
        pairs = [variant.count(variant.prepare(1)()) for variant in variants]
        assert (min(pairs) > 0) == (case != "rollout")
        assert pairs[0] == pairs[3]
        assert case != "update" or len(set(pairs)) == 1  # all select from the same pictures


def test_a_line_of_json_for_each_implementation(capsys):
    cache = jax.config.values["jax_enable_compilation_cache"]
    try:
        bench.main(["update", *FLAGS, "--no-loops"])
        assert not jax.config.values["jax_enable_compilation_cache"]
    finally:
        jax.config.update("jax_enable_compilation_cache", cache)
    out, err = capsys.readouterr()
    (line,) = [json.loads(line) for line in out.splitlines()]
    assert (line["case"], line["implementation"]) == ("update", "jaxalign")
    assert (line["ratio"], line["repeats"]) == (1.0, 2)
    assert line["p10_seconds"] <= line["median_seconds"] <= line["p90_seconds"]
    assert line["images_per_second"] == pytest.approx(16 / line["median_seconds"])
    assert line["flops_per_second"] > 0 and line["peak_memory_bytes"] > 1e6
    assert line["trained_pairs"] > 0 and line["jax"] and line["device"]
    assert "median s" in err and "jaxalign" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stages"], "did you mean stage?"),
        (["stage", "--repeats", "0"], "repeats = 0"),
        (["stage", "--workdir", "x"], "--workdir"),
        (["stage", "--b2.suffix-start", "30"], "suffix_start = 30"),
    ],
)
def test_bad_input_gets_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(words)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and message in err and len(err.splitlines()) == 1
