"""The bench of decoding: its work must be what it says, and its lines true."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from experiments import bench_decode
from experiments.measuring import Spent, Timing
from jaxalign.core.types import UserError

SIZES = dict(depth=1, width=16, heads=2, vocabulary=40, rows=4, prompt=5, length=6, repeats=2)
TINY = dataclasses.replace(bench_decode.decode_against_transformers(), **SIZES, torch=False)
TAIL = dataclasses.replace(bench_decode.decode_tail(), **SIZES, halvings=(0, 1))


@functools.cache
def problem_of(family):
    return bench_decode.make_problem(TINY, family)


@pytest.fixture(autouse=True)
def _small_copies(monkeypatch):
    monkeypatch.setattr(bench_decode, "COPIED_BYTES", 2**20)


def test_a_line_for_each_model(capsys):
    lines = bench_decode.run(TINY)
    shown = capsys.readouterr()
    assert [json.loads(line)["model"] for line in shown.out.splitlines()] == ["gpt2", "llama"]
    assert "tokens/s" in shown.err
    for line in lines:
        assert line["ratio"] == 1 and line["new_tokens"] == 4 * 6
        assert line["tokens_per_second"] == pytest.approx(24 / line["median_seconds"])
        assert line["bandwidth_bytes_per_second"] > 1e8


def test_the_tail_ends_where_it_should_however_often_the_batch_shrinks():
    lines = bench_decode.run(TAIL)
    problem = bench_decode.make_problem(TAIL, "llama")
    assert [line["implementation"] for line in lines] == ["jaxalign", "jaxalign_halvings_1"]
    ends = np.asarray(problem.ends)
    assert {line["new_tokens"] for line in lines} == {ends.sum()} and len(set(ends)) > 1
    decoded = bench_decode.ours(TAIL, problem, 6, 1, "").prepare(0)()
    np.testing.assert_array_equal(decoded.length, ends)
    assert decoded.stopped.all()


@pytest.mark.parametrize(("family", "heads"), [("gpt2", 2), ("llama", 1)])
def test_bytes_of_a_step(family, heads):
    problem = problem_of(family)
    sizes = jax.tree_util.tree_leaves_with_path(problem.params)
    looked_up = sum(leaf.nbytes for path, leaf in sizes if "position" in str(path))
    assert bool(looked_up) == (family == "gpt2")
    slots = 4 * (5 + 6 / 2)  # rows, and the tokens that an average step sees
    cached = slots * 2 * heads * 8 * 4  # keys and values of head width 8
    expected = sum(leaf.nbytes for _, leaf in sizes) - looked_up + cached
    assert bench_decode.step_bytes(problem) == expected


def test_ratios_and_steps_are_those_of_the_turns():
    def timing(*seconds):
        return Timing(9.0, [Spent(s, 2 * s) for s in seconds], [24] * len(seconds), 0)

    timings = {
        "jaxalign": timing(1.0, 2.0, 1.0),
        "jaxalign_prefill": timing(0.5, 0.5, 0.5),
        "transformers": timing(3.0, 4.0, 4.0),
        "transformers_prefill": timing(1.0, 1.0, 1.0),
        "copy": timing(0.1, 0.1, 0.2),
    }
    problem = problem_of("gpt2")
    line = bench_decode.describe(TINY, problem, "transformers", "", timings)
    assert (line["ratio"], line["cpu_ratio"]) == (3, 3)
    assert (line["step_seconds"], line["tokens_per_second"]) == ((4 - 1) / 5, 6)
    assert line["bandwidth_bytes_per_second"] == 2 * bench_decode.COPIED_BYTES / 0.1
    share = bench_decode.step_bytes(problem) / line["bandwidth_bytes_per_second"] / 0.6
    assert line["bandwidth_share"] == pytest.approx(share)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (dict(rows=0), "^rows = 0: "),
        (dict(length=1), "^length = 1: "),
        (dict(mean_length=0.0), "^mean_length = 0.0: "),
        (dict(mean_length=0.5, torch=True), "--no-torch"),
    ],
    ids=str,
)
def test_wrong_sizes_are_refused(wrong, match):
    with pytest.raises(UserError, match=match):
        dataclasses.replace(TINY, **wrong)


def test_presets_are_cases():
    for name, preset in bench_decode.CASES.items():
        assert preset().case == name
