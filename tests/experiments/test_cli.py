"""The command line: what it understands, what it says, and the exit codes.

Run as a program, this file is a small experiment, for the test that sends it a signal.
"""

import dataclasses
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import pytest

from experiments import cli
from jaxalign.core.checkpoint import Checkpoints
from jaxalign.core.loop import Preempted, fit
from jaxalign.core.metrics import JsonLines
from jaxalign.core.types import NonFinite, UserError


@dataclasses.dataclass(frozen=True)
class Method:
    groups: int = 32  # how many prompts share a baseline
    estimator: Literal["official", "branch_loo"] = "official"
    clip: bool = True


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0
    learning_rate: float = 1e-3
    steps: int = 10
    widths: tuple[int, ...] = (8, 8)
    prompts: str | None = None
    b2: Method = Method()

    def __post_init__(self):
        if self.steps < 1:
            raise UserError(f"--steps {self.steps}: must be at least 1")
        if self.b2.groups % self.steps and self.b2.groups > 100:
            raise UserError("groups over 100 must be a multiple of steps")


def digits():
    """Real handwriting.

    A second paragraph that is not shown.
    """
    return Config()


def tiny():
    """One CPU, under a minute."""
    return Config(steps=2, b2=Method(groups=4))


PRESETS = {"digits": digits, "tiny": tiny}


def parse(*words):
    return cli.parse("toy", PRESETS, "digits", words)


# --- parsing -------------------------------------------------------------------------------------


def test_defaults():
    run = parse()
    assert (run.name, run.preset, run.config) == ("toy", "digits", Config())
    assert run.workdir == Path("runs/toy-digits-0")
    assert run.seeds == [0] and run.resume is False
    assert run.command == "python -m experiments.toy"


def test_presets_flags_and_spellings():
    words = "tiny --learning_rate=3e-4 --b2.groups 6 --b2.no-clip --b2.estimator branch_loo"
    run = parse(*words.split(), "--widths", "1", "2", "3", "--prompts", "a b", "--resume")
    assert run.config == Config(
        steps=2,
        learning_rate=3e-4,
        widths=(1, 2, 3),
        prompts="a b",
        b2=Method(6, "branch_loo", False),
    )
    assert run.resume
    assert run.command == f"python -m experiments.toy {words} --widths 1 2 3 --prompts 'a b'"
    assert parse("tiny", "--learning-rate", "3e-4").config.learning_rate == 3e-4
    assert parse("--resume", "tiny").preset == "tiny"
    assert parse("--seed", "-3").config.seed == -3


def test_seeds_and_workdir():
    run = parse("tiny", "--seed", "5", "--seeds", "3", "--workdir", "somewhere/else")
    assert run.seeds == [5, 6, 7] and run.workdir == Path("somewhere/else")
    assert parse("tiny", "--seed", "5").workdir == Path("runs/toy-tiny-5")
    assert parse("tiny", "--seed", "5").seeds == [5]


@pytest.mark.parametrize(
    "words,line",
    [
        ("tini", "no preset 'tini', did you mean tiny?"),
        ("qqq", "no preset 'qqq'; choose one of digits, tiny"),
        ("--learning_rat 1", "no option --learning_rat, did you mean --learning-rate?"),
        ("--groups 3", "no option --groups, did you mean --b2.groups?"),
        ("--b2.grups=3", "no option --b2.grups, did you mean --b2.groups?"),
        ("--workdri x", "no option --workdri, did you mean --workdir?"),
        ("--qqq 3", "no option --qqq; --help lists them all"),
        ("--seed x", "--seed x: the value must be int"),
        ("--seed=1.5", "--seed 1.5: the value must be int"),
        (
            "--steps 3 --learning-rate fast --seed 1",
            "--learning-rate fast: the value must be float",
        ),
        (
            "--b2.estimator best",
            "--b2.estimator best: the value must be one of official, branch_loo",
        ),
        ("--widths 3 x", "--widths 3 x: the value must be a list of int"),
        ("--seed 1 2", "--seed 1 2: the value must be int"),
        ("--seed", "--seed: a value is missing; it must be int"),
        ("--seed 1 --seed 2", "--seed is given twice; leave one out"),
        ("--b2.clip yes", "--b2.clip yes: is a switch; write --b2.clip alone, without a value"),
        ("tiny more", "'more' stands alone: after the preset come --field value pairs"),
        ("--seeds 0", "--seeds 0: must be at least 1"),
        ("--seeds x", "--seeds x: the value must be int"),
        ("--steps -4", "--steps -4: must be at least 1"),
        ("--steps 7 --b2.groups 120", "groups over 100 must be a multiple of steps"),
    ],
)
def test_bad_words_give_one_line(words, line, capfd):
    with pytest.raises(SystemExit) as ended:
        cli.main(lambda run: pytest.fail("ran"), "toy", PRESETS, "digits", words.split())
    out, err = capfd.readouterr()
    assert ended.value.code == 2
    assert err == f"error: {line}\n" and out == ""


def test_a_config_that_only_fits_with_all_flags_is_not_blamed_for_one():
    # --b2.groups 105 alone is refused by the config, with --steps 7 it is right; --seed is wrong.
    assert parse("--b2.groups", "105", "--steps", "7").config.b2.groups == 105
    with pytest.raises(UserError, match=r"^--seed x: the value must be int$"):
        parse("--b2.groups", "105", "--steps", "7", "--seed", "x")


def test_help_lists_presets_and_fields(capfd):
    with pytest.raises(SystemExit) as ended:
        cli.main(lambda run: pytest.fail("ran"), "toy", PRESETS, "digits", ["tiny", "--help"])
    assert ended.value.code == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", capfd.readouterr().out)
    assert "python -m experiments.toy [PRESET]" in text
    assert re.search(r"digits +Real handwriting\.\n", text)
    assert re.search(r"tiny +One CPU, under a minute\.\n", text)
    for flag in ("--learning-rate FLOAT", "--b2.groups INT", "--workdir", "--resume", "--seeds"):
        assert flag in text
    assert "how many prompts share a baseline (default: 4)" in text
    assert "second paragraph" not in text


# --- work directories ----------------------------------------------------------------------------


def test_a_workdir_is_made_with_its_records(tmp_path):
    run = parse("tiny", "--workdir", str(tmp_path / "a" / "b"))
    assert cli.open_workdir(run) == tmp_path / "a" / "b"
    config = json.loads((run.workdir / "config.json").read_text())
    assert config["steps"] == 2 and config["b2"] == {
        "groups": 4,
        "estimator": "official",
        "clip": True,
    }
    assert config["widths"] == [8, 8] and config["prompts"] is None
    env = json.loads((run.workdir / "env.json").read_text())
    assert env["command"] == run.command and env["preset"] == "tiny" and env["jax"]


def test_a_used_workdir_is_left_alone(tmp_path):
    run = parse("tiny", "--workdir", str(tmp_path))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(
        UserError, match=r"not empty: go on with --resume, or choose another --workdir"
    ):
        cli.open_workdir(run)
    with pytest.raises(UserError, match="no run's directory"):
        cli.open_workdir(dataclasses.replace(run, resume=True))
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_resume_needs_the_same_config(tmp_path):
    here = ["--workdir", str(tmp_path / "run")]
    cli.open_workdir(parse("tiny", *here, "--resume"))  # nothing there yet: it starts
    cli.open_workdir(parse("tiny", *here, "--resume"))
    with pytest.raises(UserError, match=r"b2\.groups is 4 there and 6 here"):
        cli.open_workdir(parse("tiny", *here, "--resume", "--b2.groups", "6"))
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps({**config, "old": 1}))
    with pytest.raises(UserError, match=r"old is 1 there and 'absent' here"):
        cli.open_workdir(parse("tiny", *here, "--resume"))


def test_a_workdir_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    for path in ("file", "file/below"):
        with pytest.raises(UserError, match="not a directory to write in"):
            cli.open_workdir(parse("--workdir", str(tmp_path / path)))


def test_each_seed_has_its_directory_and_all_open_first(tmp_path):
    here = ["--workdir", str(tmp_path / "run")]
    (run,) = cli.open_seeds(parse("tiny", *here))
    assert run.workdir == tmp_path / "run" and (run.workdir / "config.json").exists()
    runs = cli.open_seeds(parse("--seed", "3", "--seeds", "2", "--workdir", str(tmp_path / "two")))
    assert [run.workdir.name for run in runs] == ["seed-3", "seed-4"]
    assert [run.config.seed for run in runs] == [3, 4]
    assert json.loads((runs[1].workdir / "config.json").read_text())["seed"] == 4

    (tmp_path / "three" / "seed-1").mkdir(parents=True)
    (tmp_path / "three" / "seed-1" / "result.json").write_text("{}")
    with pytest.raises(UserError, match="seed-1 exists and is not empty"):
        cli.open_seeds(parse("--seeds", "2", "--workdir", str(tmp_path / "three")))


# --- exit codes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error,code,line",
    [
        (UserError("--batch 3: too small"), 2, "error: --batch 3: too small"),
        (NonFinite("stopped at step 4"), 3, "error: stopped at step 4"),
        (
            Preempted(7, saved=True),
            42,
            "stopped at step 7; resume with: python -m experiments.toy tiny --seed 1 --resume",
        ),
        (
            Preempted(7, saved=False),
            42,
            "stopped at step 7; nothing is saved, as it had no checkpoints",
        ),
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            OSError(errno.ENOSPC, "No space left on device", "a.npz"),
            2,
            "error: a.npz: the disk is full; free some space",
        ),
    ],
)
@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_exit_codes(error, code, line, resume, capfd):
    def run(_):
        raise error

    with pytest.raises(SystemExit) as ended:
        cli.main(run, "toy", PRESETS, "digits", ["tiny", "--seed", "1", *resume])
    assert ended.value.code == code
    assert capfd.readouterr().err == f"{line}\n"


def test_a_bug_keeps_its_traceback_and_a_good_run_returns():
    def bug(_):
        raise FileNotFoundError(errno.ENOENT, "none")

    with pytest.raises(FileNotFoundError):
        cli.main(bug, "toy", PRESETS, "digits", [])
    seen = []
    cli.main(seen.append, "toy", PRESETS, "digits", ["tiny"])
    assert seen[0].preset == "tiny"


def test_sigterm_saves_and_exits_with_42_and_resume_ends_well(tmp_path):
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": str(root), "JAXALIGN_PROGRESS": "off"}
    command = [sys.executable, __file__, "tiny", "--workdir", str(tmp_path / "run")]
    child = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    rows = tmp_path / "run" / "metrics.jsonl"
    end = time.monotonic() + 60
    while child.poll() is None and time.monotonic() < end:
        if rows.exists() and rows.read_text().count("\n") >= 2:
            child.send_signal(signal.SIGTERM)
            break
        time.sleep(0.005)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 42, err
    found = re.search(
        r"stopped at step (\d+); resume with: python -m experiments\.toy tiny .*--resume\n", err
    )
    assert found, err
    assert (tmp_path / "run" / "ckpt" / found[1]).is_dir()

    words = ["tiny", "--workdir", str(tmp_path / "run"), "--resume"]
    cli.main(small_experiment, "toy", PRESETS, "digits", words)
    assert [json.loads(line)["step"] for line in rows.read_text().splitlines()] == list(
        range(1, 201)
    )


# --- this file as a program ----------------------------------------------------------------------


class State(NamedTuple):
    step: Any


def small_experiment(run, pause=0.0):
    (run,) = cli.open_seeds(run)

    def batches(i):
        time.sleep(pause)
        return jnp.float32(i)

    with (
        closing(Checkpoints(run.workdir / "ckpt")) as checkpoints,
        closing(JsonLines(run.workdir / "metrics.jsonl")) as sink,
    ):
        fit(
            State(jnp.int32(0)),
            jax.jit(lambda state, batch, key: (State(state.step + 1), {"loss": batch})),
            batches,
            jax.random.key(0),
            steps=200,
            checkpoints=checkpoints,
            resume=run.resume,
            sinks=[sink],
        )


if __name__ == "__main__":
    cli.main(partial(small_experiment, pause=0.02), "toy", PRESETS, "digits")
