"""The bench of offline goal-conditioned learning: its lines, and the loop that it compares with."""

from __future__ import annotations

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import bench, bench_hiql, cli, measuring, offline
from experiments.bench_hiql import Bench
from jaxalign.core.types import UserError
from jaxalign.ops import goals

SMALL = dict(widths=(8,), batch=16, updates=2, data_episodes=2, repeats=1)


def test_a_line_for_each_implementation_of_an_update(capsys):
    lines = bench_hiql.run(Bench("hiql", **SMALL))
    assert [line["implementation"] for line in lines] == [measuring.COMPILED, "loop"]
    for line in lines:
        assert line["learners"] == 2 and line["updates_per_second"] > 0
    assert lines[0]["ratio"] == 1.0
    assert "updates/s" in capsys.readouterr().err


def test_attempts_without_the_real_environment(monkeypatch, capsys):
    monkeypatch.setattr(offline.pointmaze, "HORIZON", 3)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (line,) = bench_hiql.run(Bench("attempts", attempts=2, **SMALL))
    assert line["attempts"] == 10 and line["attempts_per_second"] > 0
    assert "ogbench is not installed" in capsys.readouterr().err


def test_the_loop_draws_what_the_program_draws():
    """The same fields, shapes and types; and as many goals that are reached."""
    problem = bench_hiql.make_problem(Bench("hiql", **{**SMALL, "batch": 4096}), 8)
    data, config = problem.lab.data, problem.config
    theirs = bench_hiql.draw(jax.tree.map(np.asarray, data), config, np.random.default_rng(0))
    ours = goals.sample(data, config.goals, jax.random.key(0), config.batch)
    for name, a, b in zip(ours._fields, ours, theirs, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), name
        assert np.abs(jnp.mean(a, axis=0) - np.mean(b, axis=0)).max() < 1.5, name
    assert np.mean(theirs.mask) == pytest.approx(float(ours.mask.mean()), abs=0.04)


@pytest.mark.parametrize("case", list(bench.CASES))
def test_the_command_line_takes_every_case(case):
    """A field must not be called like a flag of all experiments."""
    assert cli.parse("bench", bench.CASES, "stage", [case]).config == bench.CASES[case]()


def test_impossible_sizes():
    with pytest.raises(UserError, match="updates = 0"):
        Bench("hiql", updates=0)
