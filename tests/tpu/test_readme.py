"""tpu/README.md to the letter: its commands rehearsed, its names given, its links alive."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments import cli
from tpu import launch
from tpu.recovery import NO_CAPACITY, RESTARTABLE, Limits

TPU = Path(__file__).parents[2] / "tpu"
TEXT = (TPU / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", TEXT, re.M | re.S)


def commands() -> Iterator[str]:
    """The commands from top to bottom, each in one line."""
    for block in BLOCKS:
        yield from filter(None, block.replace("\\\n", " ").splitlines())


def exported() -> dict[str, str]:
    lines = [shlex.split(line)[1:] for line in commands() if line.startswith("export ")]
    return dict(pair.split("=", 1) for line in lines for pair in line)


def expanded(command: str) -> list[str]:
    """The command's words as the shell would have them, with the names of the document."""
    names = exported()
    return shlex.split(re.sub(r"\$(\w+)", lambda found: names[found[1]], command))


OURS = [line for line in commands() if line.startswith("python -m tpu.launch")]


def test_there_is_something_to_follow():
    assert len(OURS) >= 5
    assert set(re.findall(r"^```(\w*)$", TEXT, re.M)) == {"bash", ""}


@pytest.fixture
def rehearse(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """What a launch of the document prints with --dry-run."""
    for name, value in exported().items():
        monkeypatch.setenv(name, value)

    def run(command: str) -> str:
        words = expanded(command)[3:]
        words = words if "--dry-run" in words else ["--dry-run", *words]
        with pytest.raises(SystemExit) as end:
            launch.main(words)
        found = capsys.readouterr()
        assert end.value.code == 0, found.err
        return found.out

    return run


@pytest.mark.parametrize("command", OURS)
def test_every_launch_can_be_rehearsed(command: str, rehearse):
    out = rehearse(command)
    assert " create " in out or "kubectl apply" in out
    assert " delete " in out


def test_names_are_given_before_they_are_used():
    given = {"PATH", "HOME"}
    for line in commands():
        assert set(re.findall(r"\$\{?(\w+)", line)) <= given, line
        if line.startswith("export "):
            given |= {word.split("=")[0] for word in shlex.split(line)[1:]}


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_is_shell(block: str):
    done = subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [line for line in commands() if line.startswith("python")])
def test_every_module_and_option_of_ours_exists(command: str):
    for part in command.split(" -- "):
        words = expanded(part)
        folder, name = words[2].split(".")
        file = TPU.parent / folder / f"{name}.py"
        assert file.exists()
        if folder == "tpu":
            text = file.read_text()
            options = [word for word in words if word.startswith("--")]
            assert all(f'"{option}"' in text or f"{option} " in text for option in options)


EXPERIMENTS = [
    words
    for line in commands()
    for part in line.split(" -- ")
    if (words := expanded(part))[:2] == ["python", "-m"] and words[2].startswith("experiments.")
]


@pytest.mark.parametrize("words", EXPERIMENTS, ids=shlex.join)
def test_every_experiment_takes_its_options(words: list[str]):
    name = words[2].removeprefix("experiments.")
    module = importlib.import_module(words[2])
    assert cli.parse(name, module.PRESETS, "", words[3:]).name == name


def test_the_deletion_by_hand_is_the_launchers(rehearse):
    [by_hand] = [line for line in commands() if "queued-resources delete" in line]
    out = rehearse(next(line for line in OURS if "--engine" not in line and "-smoke" not in line))
    found = [shlex.split(line) for line in out.splitlines() if " delete " in line]
    assert sorted(expanded(by_hand)) == sorted(found[0])


def test_the_table_of_ends_has_the_launchers_numbers():
    [rows] = re.findall(r"Its exit code \|\n(.*?)\n\n", TEXT, re.S)
    assert f"| {cli.PREEMPTED} |" in rows
    assert f"| {NO_CAPACITY} |" in rows
    assert f"({', '.join(map(str, RESTARTABLE))})" in rows
    assert f"`--retries` of these ({Limits().retries})" in rows
    assert f"`--wait-hours` ({Limits().wait / 3600:g})" in rows
    assert Limits().unreached == 5, "the table says five times"


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)h][^)]*)\)", TEXT))))
def test_links_lead_somewhere(target: str):
    assert (TPU / target).exists()


def test_no_command_needs_this_machines_names():
    assert not {"PROJECT", "ZONE", "BUCKET"} - set(exported())
    assert os.sep + "work" not in TEXT
