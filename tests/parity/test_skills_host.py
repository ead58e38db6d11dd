"""Skills learned where MuJoCo's C library steps the environments."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from experiments import metra as presets
from experiments import skills, skills_host
from jaxalign.core import metrics as sinks
from jaxalign.envs.mujoco_host import HostEnvironments

pytest.importorskip("mujoco.mjx")
pytest.importorskip("gymnasium")

pytestmark = pytest.mark.parity

CONFIG = dataclasses.replace(presets.tiny(), environment="half-cheetah", arms=("metra", "random"))
T = 200


def test_paths_go_to_the_seed_that_walked_them():
    """Each seed's policy sees its own environments, and what it saw is filed under it."""
    walkers = HostEnvironments("half-cheetah", 6)

    def policy(seen, keys):
        assert seen.shape == (2, 3, 18) and keys.shape == (2,)
        signs = jax.numpy.array([1.0, -1.0])[:, None, None]
        return jax.numpy.broadcast_to(signs, (2, 3, 6))

    walked = skills_host.walk(walkers, policy, 2, jax.random.key(0))
    assert walked.observations.shape == (2, T + 1, 3, 18)
    np.testing.assert_array_equal(walked.actions[0], 1.0)
    np.testing.assert_array_equal(walked.actions[1], -1.0)
    last = walkers.observation.reshape(2, 3, 18)
    np.testing.assert_array_equal(walked.observations[:, -1], last)


def test_a_run_and_its_other_half(tmp_path):
    """Rows are as a compiled run leaves them; a resumed run draws what the whole one drew."""
    lab = skills.make_lab(CONFIG, 2)
    ends = []
    for parts in ((4,), (2, 4)):
        directories = {seed: tmp_path / f"{len(parts)}-{seed}" for seed in (0, 1)}
        for i, epochs in enumerate(parts):
            config = dataclasses.replace(CONFIG, epochs=epochs, evaluate_every=2)
            skills.train_arm(lab, config, "metra", directories, resume=i > 0)
        rows = sinks.read_json_lines(directories[1] / "metrics.jsonl")
        assert [row["step"] for row in rows] == [0, 1, 2]
        ends.append({name: v for name, v in rows[-1].items() if name != "seconds"})
        with np.load(directories[0] / "skills.npz") as shown:
            assert shown["place"].shape == (T + 1, CONFIG.shown, 1)
    assert ends[0] == ends[1] and ends[0]["environment_steps"] == 4 * 2 * T
    result = json.loads((tmp_path / "1-0" / "result.json").read_text())
    assert result["coverage"] > 0 and np.isfinite(result["phi_loss"])
