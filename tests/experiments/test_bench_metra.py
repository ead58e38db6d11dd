"""The bench of skills: its lines, and that the loop remembers what the program remembers."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from experiments import bench_metra, measuring, skills
from experiments.bench_metra import Bench
from jaxalign.core.types import UserError
from jaxalign.rollout.episodes import Episodes

SMALL = dict(
    environment="plane", learners=(2,), environments=(8,), width=8, updates=2, buffer=2, repeats=1
)


def test_a_line_for_each_implementation(capsys):
    lines = bench_metra.run(Bench("metra", **SMALL))
    assert [line["implementation"] for line in lines] == [measuring.COMPILED, "loop"]
    for line in lines:
        # Two seeds walk two epochs of eight episodes of 200 steps, with two updates an epoch.
        seconds = line["median_seconds"]
        assert line["steps_per_second"] * seconds == pytest.approx(6400)
        assert line["updates_per_second"] * seconds == pytest.approx(8)
    assert "updates/s" in capsys.readouterr().err


def test_the_loop_remembers_what_the_program_remembers():
    seen, actions = np.random.default_rng(0).normal(size=(2, 5, 8, 2)).astype(np.float32)
    told = bench_metra.draw(np.random.default_rng(1), 8, 2)
    np.testing.assert_allclose(np.linalg.norm(told, axis=1), 1, rtol=1e-6)
    walked = Episodes(seen, actions[:-1], None)
    own = bench_metra.metra.Config()
    theirs = bench_metra.host_transitions(walked, told)
    ours = skills.transitions(jax.tree.map(jax.numpy.asarray, walked), jax.numpy.asarray(told), own)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    buffer = bench_metra.HostBuffer(jax.tree.map(lambda a: np.zeros((64, *a.shape[1:])), theirs))
    for _ in range(3):
        buffer.write(theirs)
    assert (buffer.at, buffer.size) == (32, 64)
    assert buffer.sample(np.random.default_rng(0), 7).observation.shape == (7, 2)


def test_impossible_sizes():
    with pytest.raises(UserError, match="epochs = 0"):
        Bench("metra", epochs=0)
    with pytest.raises(UserError, match="environments = "):
        Bench("metra", environments=(12,))
