"""The bench of PPO on a language model: its work must be an iteration, and its lines true."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from experiments import bench, bench_decode, bench_rlhf
from experiments.measuring import Spent, Timing
from jaxalign.core.types import UserError
from jaxalign.methods.r3hf import Config

SIZES = dict(depth=1, width=16, heads=2, vocabulary=12, prompt=5, response=6, prompts=10, repeats=2)
TINY = dataclasses.replace(
    bench_rlhf.rlhf(), **SIZES, r3hf=Config(rollouts=16, policy_rate=1e-3), torch=False
)


@pytest.fixture(scope="module")
def problem() -> bench_rlhf.Problem:
    return bench_rlhf.make_problem(TINY)


@pytest.fixture(scope="module")
def variants(problem) -> list[bench_rlhf.Variant]:
    return bench_rlhf.compiled_variants(problem)


def test_what_is_timed_is_a_whole_iteration_and_its_sampling(problem, variants):
    whole, alone = variants
    result = whole.prepare(3)()
    before, (state, metrics) = problem.state, jax.device_get(result)
    for part in ("policy", "critic"):
        moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.params, before.params)[part]
        assert max(jax.tree.leaves(moved)) > 0
    assert state.step == 1 and metrics["ratio_error"] < 2e-5
    assert whole.count(result) == state.extra.tokens == round(16 * float(metrics["length"]))
    decoded = alone.prepare(3)()
    assert decoded.ids.shape == (16, 11) and alone.count(decoded) == decoded.length.sum()
    # With 12 words some responses meet the stop token and some do not.
    assert set(np.asarray(decoded.stopped)) == {True, False}


def test_a_line_of_json(variants, monkeypatch, capsys):
    monkeypatch.setattr(bench_rlhf, "compiled_variants", lambda _: variants)  # compiled already
    (line,) = bench_rlhf.run(TINY)
    shown = capsys.readouterr()
    printed = json.loads(shown.out)
    assert printed == json.loads(json.dumps(line)) | printed and printed["jax"]
    assert (line["case"], line["implementation"]) == ("rlhf", "jaxalign")
    assert line["ratio"] == line["decode_ratio"] == line["rest_ratio"] == 1
    assert line["tokens_per_second"] == line["new_tokens"] / line["median_seconds"]
    assert (line["optimizer_steps"], line["rows"], line["repeats"]) == (4, 16, 2)
    assert 16 <= line["new_tokens"] <= 16 * 6 and line["peak_memory_bytes"] > 1e6
    assert "of the rest" in shown.err


def test_ratios_are_those_of_the_turns(problem):
    def timing(*seconds):
        return Timing(9.0, [Spent(s, s) for s in seconds], [60] * len(seconds), 0)

    timings = {
        "jaxalign": timing(2.0, 4.0, 3.0),
        "jaxalign_decode": timing(1.0, 2.0, 1.0),
        "transformers": timing(7.0, 10.0, 6.0),
        "transformers_decode": timing(4.0, 6.0, 3.0),
    }
    variant = bench_rlhf.Variant("transformers", lambda run: lambda: run, int)
    line = bench_rlhf.describe(TINY, problem, variant, timings)
    assert (line["ratio"], line["decode_ratio"], line["rest_ratio"]) == (2.5, 3, 2)
    assert (line["decode_seconds"], line["decode_share"]) == (4, 4 / 7)
    assert line["tokens_per_second"] == 60 / 7


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rlhf", "--prompts", "0"], "prompts = 0"),
        (["rlhf", "--vocabulary", "2"], "vocabulary = 2"),
        (["rlhf", "--r3hf.rollouts", "20"], "multiple of 8"),
        (["decode", "--rows", "0"], "rows = 0"),
        (["rlfh"], "did you mean rlhf?"),
    ],
    ids=str,
)
def test_bad_input_gets_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(words)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and message in err and len(err.splitlines()) == 1


def test_the_command_line_reaches_the_bench_of_each_case(monkeypatch):
    ran = []
    for module in (bench, bench_decode, bench_rlhf):
        monkeypatch.setattr(module, "run", lambda config, name=module.__name__: ran.append(name))
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    for case in ("stage", "decode", "tail", "rlhf"):
        bench.main([case])
    names = ["bench", "bench_decode", "bench_decode", "bench_rlhf"]
    assert ran == [f"experiments.{name}" for name in names]


def test_presets_are_cases():
    assert {"rollout", "update", "stage", "decode", "tail", "rlhf"} <= bench.CASES.keys()
    with pytest.raises(UserError, match="heads = 0"):
        dataclasses.replace(TINY, heads=0)
