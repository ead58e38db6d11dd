"""What `experiments.bench_sd_torch` does with diffusers is what ours does; and it shows if not."""

from __future__ import annotations

import dataclasses
import functools
import importlib

import jax
import numpy as np
import pytest

from experiments import bench_sd
from experiments import bench_sd_programs as programs
from experiments.bench_sd_programs import Setting

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
theirs = importlib.import_module("experiments.bench_sd_torch")

pytestmark = pytest.mark.parity

SETTING = Setting(8, False)


@pytest.fixture(autouse=True)
def _strict():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def problem() -> programs.Problem:
    return programs.make_problem(bench_sd.SIZES["tiny"], steps=3, seed=1)


def test_pictures_from_the_same_noise(problem):
    ours = programs.Ours(problem, "rollout", None).program(SETTING).outcome()
    made = theirs.Diffusers(problem, "rollout", None)
    program = made.program(SETTING, compiled=False)
    assert bench_sd.check_same(problem, ours, program.outcome(), "diffusers") < 1e-4
    drawn = theirs.Rollout(made, SETTING, compiled=False).run()
    assert [tuple(a.shape) for a in drawn] == [(4, 8, 4, 4, 4), (3, 8)]
    config = dataclasses.replace(problem.config, guidance=2.0)
    other = theirs.Diffusers(problem._replace(config=config), "rollout", None)
    outcome = other.program(SETTING, compiled=False).outcome()
    with pytest.raises(bench_sd.Differs, match="guided otherwise"):
        bench_sd.check_same(problem, ours, outcome, "guided otherwise")


def test_gradients_of_the_same_pairs(problem):
    pairs = programs.make_pairs(problem, 8)
    ours = programs.Ours(problem, "update", pairs).program(SETTING).outcome()
    made = theirs.Diffusers(problem, "update", pairs)
    check = functools.partial(bench_sd.check_same, problem, ours)
    for remat in (False, True):  # the second after steps of the first have moved the adapters
        program = made.program(Setting(8, remat), compiled=False)
        assert check(program.outcome(), "diffusers") < 1e-3
        program.run(0)
        assert made.net.is_gradient_checkpointing == remat
    for name, (down, up) in theirs.adapters(problem).items():
        layer = made.net.get_submodule(name)
        assert 0 < (layer.down - down).abs().max() < 1e-3 and (layer.up != up).any()
    made.pairs = pairs._replace(advantage=-np.asarray(pairs.advantage))
    with pytest.raises(bench_sd.Differs):
        check(made.program(SETTING, compiled=False).outcome(), "another loss")
