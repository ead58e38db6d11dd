"""Stand-ins for `gcloud`, `kubectl` and others, which answer by script and keep a record."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path

import pytest

# Answers are [exit code, stdout, stderr], one a call of its kind; the last one stays.
_PROGRAM = """#!{python} -SE
import json, os, sys
folder, words = {folder!r}, sys.argv[1:]
with open(os.path.join(folder, "calls"), "a") as file:
    print(json.dumps([{name!r}, *words]), file=file)
if "--filename" in words:
    open(os.path.join(folder, "applied"), "w").write(sys.stdin.read())
with open(os.path.join(folder, "answers.json")) as file:
    answers = json.load(file)
text = " ".join([{name!r}, *words])
for kind, replies in answers.items():
    if kind in text:
        counter = os.path.join(folder, "count-" + kind.replace(" ", "-").replace("/", "-"))
        done = os.path.getsize(counter) if os.path.exists(counter) else 0
        open(counter, "a").write("x")
        code, out, err = replies[min(done, len(replies) - 1)]
        sys.stdout.write(out)
        sys.stderr.write(err)
        sys.exit(code)
"""


class Stubs:
    """Programs on the PATH that answer by script.

    answers: replies for each kind of call; a kind is a piece of the command line, and the first
        kind that fits answers. What fits none succeeds without a word.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
        self.folder = folder
        for name in names:
            program = folder / name
            program.write_text(
                _PROGRAM.format(python=sys.executable, folder=str(folder), name=name)
            )
            program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def script(self, answers: dict[str, list[tuple[int, str, str]]]) -> None:
        (self.folder / "answers.json").write_text(json.dumps(answers))

    def calls(self, piece: str = "") -> list[str]:
        """The command lines so far that have this piece."""
        file = self.folder / "calls"
        lines = file.read_text().splitlines() if file.exists() else []
        return [text for line in lines if piece in (text := shlex.join(json.loads(line)))]


def says(text: str) -> tuple[int, str, str]:
    return 0, f"{text}\n", ""


def fails(text: str, code: int = 1) -> tuple[int, str, str]:
    return code, "", f"{text}\n"
