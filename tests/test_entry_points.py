"""Every command that a user can give, as it is given: presets, a whole run, bad input.

An experiment is a module of `experiments` with `PRESETS`; a new one is tested without a word here.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from experiments import cli

ROOT = Path(__file__).parents[1]
NAMES = sorted(
    path.stem
    for path in (ROOT / "experiments").glob("*.py")
    if re.search(r"^PRESETS\b", path.read_text(encoding="utf-8"), re.MULTILINE)
)
PRESETS = [
    (name, preset)
    for name in NAMES
    for preset in importlib.import_module(f"experiments.{name}").PRESETS
]


@pytest.fixture(params=NAMES)
def experiment(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture):
    """Runs `python -m experiments.NAME WORDS` in this process: exit status, stdout, stderr."""

    def run(name: str, *words: str) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *words])
        monkeypatch.delitem(sys.modules, f"experiments.{name}", raising=False)
        status = 0
        try:
            runpy.run_module(f"experiments.{name}", run_name="__main__", alter_sys=True)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        return status, *capfd.readouterr()

    return run


def one_line(text: str) -> str:
    """The only line of what a refused command said."""
    lines = text.splitlines()
    assert len(lines) == 1, text
    assert lines[0].startswith("error: ")
    return lines[0]


# --- presets -------------------------------------------------------------------------------------


def test_there_is_an_experiment():
    assert "b2_diffurl" in NAMES


@pytest.mark.parametrize(("name", "preset"), PRESETS)
def test_a_preset_parses_to_its_own_config(name: str, preset: str):
    module: ModuleType = importlib.import_module(f"experiments.{name}")
    run = cli.parse(name, module.PRESETS, preset, [preset])
    assert run.config == module.PRESETS[preset]()
    assert dataclasses.is_dataclass(run.config)
    assert run.workdir == Path("runs") / f"{name}-{preset}-{getattr(run.config, 'seed', 0)}"
    json.dumps(cli.plain(dataclasses.asdict(run.config)), allow_nan=False)


@pytest.mark.parametrize(("name", "preset"), PRESETS)
def test_a_preset_says_what_it_is(name: str, preset: str):
    make = importlib.import_module(f"experiments.{name}").PRESETS[preset]
    assert (make.__doc__ or "").strip(), "its first line stands in --help"


def test_every_experiment_has_a_tiny_preset(experiment: str):
    assert (experiment, "tiny") in PRESETS


def test_help_names_every_preset(experiment: str, command):
    status, out, _ = command(experiment, "--help")
    assert status == 0
    shown = re.search(r"Presets:(.*?)The defaults below", out, re.DOTALL)
    assert shown, out
    for name, preset in PRESETS:
        assert name != experiment or re.search(rf"\b{preset}  ", shown[1])


# --- a whole run ---------------------------------------------------------------------------------


@pytest.fixture(scope="session", params=NAMES)
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A `tiny` run by the real command on one device: its experiment, directory and output."""
    workdir = tmp_path_factory.mktemp(request.param) / "run"
    words = ["-m", f"experiments.{request.param}", "tiny", "--workdir", str(workdir)]
    # Almost all of a tiny run is compilation, so compile with less care.
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, **quick},
        capture_output=True,
        text=True,
        timeout=240,
    )
    return request.param, workdir, done


@pytest.mark.timeout(300)
def test_tiny_finishes_and_leaves_what_it_promises(finished):
    name, workdir, done = finished
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    config = json.loads((workdir / "config.json").read_text())
    assert config["seed"] == 0
    recorded = json.loads((workdir / "env.json").read_text())
    assert recorded["command"].startswith(f"python -m experiments.{name} tiny")
    assert {"jax", "backend", "devices"} <= recorded.keys()
    result = json.loads((workdir / "result.json").read_text())
    assert result
    assert all(isinstance(v, int | float | str) for v in result.values()), "flat, without nulls"
    rows = [path.read_text().splitlines() for path in workdir.rglob("metrics.jsonl")]
    assert all(json.loads(line)["step"] == i for lines in rows for i, line in enumerate(lines))
    if "save_every" in config:  # it trains
        assert rows and any(path.is_dir() for path in workdir.rglob("ckpt"))
    assert "</html>" in (workdir / "report.html").read_text(encoding="utf-8")


def test_a_finished_run_is_not_overwritten(finished, command):
    name, workdir, _ = finished
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    status, _, err = command(name, "tiny", "--workdir", str(workdir))
    assert status == cli.USER_ERROR
    line = one_line(err)
    assert "--resume" in line
    assert str(workdir) in line
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before


def test_another_config_does_not_resume(finished, command):
    name, workdir, _ = finished
    status, _, err = command(name, "tiny", "--seed", "7", "--workdir", str(workdir), "--resume")
    assert status == cli.USER_ERROR
    assert "seed is 0 there and 7 here" in one_line(err)


# --- bad input -----------------------------------------------------------------------------------


def test_a_refusal_reaches_the_shell(experiment: str):
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.{experiment}", "tinny"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == cli.USER_ERROR
    assert "did you mean tiny?" in one_line(done.stderr)
    assert done.stdout == ""


def test_an_unknown_field_is_named_with_the_nearest(experiment: str, command, tmp_path: Path):
    status, _, err = command(experiment, "tiny", "--sede", "1")
    assert status == cli.USER_ERROR
    assert "no option --sede, did you mean --seed?" in one_line(err)
    assert not list(tmp_path.iterdir())


def test_a_value_of_the_wrong_type_is_named(experiment: str, command, tmp_path: Path):
    status, _, err = command(experiment, "tiny", "--seed", "many")
    assert status == cli.USER_ERROR
    assert one_line(err) == "error: --seed many: the value must be int"
    assert not list(tmp_path.iterdir())


B2_IMPOSSIBLE = {
    "negative size": (["--b2.groups", "-1"], "groups = -1: must be at least 1"),
    "no branch": (["--b2.branches", "0"], "branches"),
    "split beyond the steps": (["--b2.suffix-stop", "99"], "suffix_stop = 99"),
    "width not divisible": (["--network.width", "17"], "width = 17"),
    "unknown arm": (["--arms", "ppo"], "'ppo'"),
    "unknown reward": (["--reward", "beauty"], "reward = 'beauty'"),
    "mesh of nonsense": (["--mesh", "data=x"], "data=x"),
    "mesh too large": (["--mesh", "data=1024"], "1024"),
    "groups that 8 devices cannot share": (["--b2.groups", "6"], "groups"),
}


@pytest.mark.parametrize(("words", "said"), B2_IMPOSSIBLE.values(), ids=B2_IMPOSSIBLE)
def test_b2_diffurl_refuses_the_impossible(words: list[str], said: str, command, tmp_path: Path):
    status, _, err = command("b2_diffurl", "tiny", "--workdir", "run", *words)
    assert status == cli.USER_ERROR
    assert said in one_line(err)
    assert not list(tmp_path.iterdir()), "what is left makes the mended command fail"


PROMPT_FILES = {
    "missing": (None, "does not exist"),
    "empty": ("", "not JSON|Expecting value"),
    "no prompt": ("[]", "holds no prompt"),
    "not JSON": ("a red disc", "Expecting value"),
    "not a list": ('{"a": 1}', "holds a dict"),
    "not strings": ("[1]", "entry 1"),
    "unknown word": ('["a red elephant"]', "elephant"),
}


@pytest.mark.parametrize(("text", "said"), PROMPT_FILES.values(), ids=PROMPT_FILES)
def test_b2_diffurl_refuses_a_bad_prompt_file(
    text: str | None, said: str, command, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
):
    file = tmp_path_factory.mktemp("prompts") / "prompts.json"
    if text is not None:
        file.write_text(text)
    status, _, err = command("b2_diffurl", "tiny", "--workdir", "run", "--prompts", str(file))
    assert status == cli.USER_ERROR
    line = one_line(err)
    assert str(file) in line
    assert re.search(said, line)
    assert not list(tmp_path.iterdir()), "what is left makes the mended command fail"


# --- the documents -------------------------------------------------------------------------------


def test_the_readme_has_exactly_two_commands():
    blocks = re.findall(r"^```sh\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    run, test = blocks
    assert "python -m experiments.b2_diffurl" in run
    assert "python -m pytest" in test
    assert all("pip install -c constraints.txt -e" in block for block in blocks)


def test_constraints_hold_no_address():
    text = (ROOT / "constraints.txt").read_text()
    assert "jax==" in text
    assert not re.search(r"https?:|file:|@|--", text)
