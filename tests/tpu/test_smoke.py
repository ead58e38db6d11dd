"""The check of a slice, on the CPU devices of this process."""

import jax
import numpy as np
import pytest

from tpu import smoke


def main(*words: str) -> int:
    with pytest.raises(SystemExit) as end:
        smoke.main(list(words))
    assert isinstance(end.value.code, int)
    return end.value.code


def test_a_sound_machine_passes(capsys: pytest.CaptureFixture):
    assert main("--quick") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"1 processes, {jax.device_count()} devices (cpu)")
    assert [line.startswith("all-reduce") for line in lines] == [False, True, True, False]
    assert all("WRONG" not in line for line in lines)


def test_a_sum_that_is_wrong_fails(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(smoke.distributed, "fetch", lambda x: np.asarray(x) + 1)
    assert main("--quick") == 1
    assert "WRONG SUM" in capsys.readouterr().out


def test_parameters_that_differ_fail(monkeypatch: pytest.MonkeyPatch, capsys):
    # What process 0 would gather from a second one with other parameters.
    def both(row, tiled):
        return np.concatenate([row, row + 1])

    monkeypatch.setattr(smoke.multihost_utils, "process_allgather", both)
    assert main("--quick") == 1
    assert "PARAMETERS DIFFER" in capsys.readouterr().out


def test_experiments_are_run_and_leave_nothing(monkeypatch, tmp_path, capsys):
    seen = []

    def run_all(run):
        run.workdir.mkdir(parents=True)
        (run.workdir / "file").write_text("")
        seen.append((run.name, run.preset))
        print("noise")

    monkeypatch.setattr("experiments.starc.run_all", run_all)
    assert smoke.check([], ["starc"], str(tmp_path))
    assert seen == [("starc", "tiny")]
    assert not list(tmp_path.iterdir())
    out = capsys.readouterr().out
    assert "starc tiny:" in out
    assert "noise" not in out


def test_every_experiment_is_known_and_no_other(capsys: pytest.CaptureFixture):
    from tests.test_entry_points import NAMES

    assert set(smoke.METHODS) <= set(NAMES)
    assert main("--methods", "metra,ppo") == 2
    assert "--methods ppo" in capsys.readouterr().err
