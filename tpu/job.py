"""What is to be run on which machines, and the programs that do it.

Both engines, `tpu.queued_resources` and `tpu.gke`, are written in terms of these.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from jaxalign.core.types import UserError
from tpu.recovery import Seen
from tpu.topologies import Topology


@dataclasses.dataclass(frozen=True)
class Job:
    """One run on one or more slices.

    name: of the run, the slice and everything else that is made for it.
    command: `python -m experiments.NAME PRESET ... --workdir DIR`, without `--resume`.
    environment: variables of the run, beyond what the machines have.
    slices: of `topology` each, joined by the data centre's network.
    spot: cheaper machines that can be taken away at any moment.
    retries: restarts in all.
    """

    name: str
    topology: Topology
    command: tuple[str, ...]
    environment: Mapping[str, str]
    slices: int = 1
    spot: bool = False
    retries: int = 20

    def words(self, resume: bool) -> list[str]:
        """The command; a run of an experiment goes on where it stopped with `resume`."""
        words = list(self.command)
        if resume and trains(words) and "--resume" not in words:
            words.append("--resume")
        return words

    @property
    def tag(self) -> str:
        """Tells one run from another on the same machines."""
        text = shlex.join(word for word in self.command if word != "--resume")
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def trains(command: Sequence[str]) -> bool:
    """Whether this is a run of an experiment, with a workdir and checkpoints."""
    return any(word.startswith("experiments.") for word in command)


class Engine(Protocol):
    """Machines and the run on them. Every method but `look` says whether its commands went well."""

    def look(self) -> Seen: ...

    def create(self) -> bool: ...

    def start(self, resume: bool) -> bool:
        """Makes the machines ready and starts the run."""
        ...

    def restart(self) -> bool: ...

    def follow(self) -> bool:
        """Shows what the first process has written since the last time."""
        ...

    def show_end(self) -> None:
        """Shows the last lines of the processes that failed."""

    def delete(self) -> bool: ...


# --- programs ------------------------------------------------------------------------------------


class Done(NamedTuple):
    """What a program left."""

    code: int
    out: str
    err: str


class Shell:
    """Runs programs such as `gcloud`; or, dry, only prints what it would run."""

    def __init__(self, dry: bool = False) -> None:
        self.dry = dry

    def run(
        self, words: Sequence[str], text: str | None = None, timeout: float | None = None
    ) -> Done:
        """The program's exit code and output; code 124 where it took longer than `timeout`.

        text: goes to its standard input.
        Raises: UserError when there is no such program.
        """
        if self.dry:
            here = f" <<'EOF'\n{text}EOF" if text is not None else ""
            print(shlex.join(words) + here)
            return Done(0, "", "")
        try:
            done = subprocess.run(
                words, input=(text or "").encode(), capture_output=True, timeout=timeout
            )
        except FileNotFoundError as error:
            raise UserError(
                f"{words[0]}: no such program here; install it, or see the commands with --dry-run"
            ) from error
        except subprocess.TimeoutExpired as error:
            return Done(124, _text(error.stdout), _text(error.stderr))
        return Done(done.returncode, _text(done.stdout), _text(done.stderr))

    def tell(self, done: Done) -> bool:
        """Whether it went well; says on stderr why it did not."""
        if done.code:
            print(_last_lines(done.err or done.out), file=sys.stderr, flush=True)
        return done.code == 0


def _text(found: bytes | None) -> str:
    """Every byte can be told again from the text, so that places in a log can be counted."""
    return (found or b"").decode(errors="surrogateescape")


def show(text: str) -> int:
    """Prints the end of a log; the count of its bytes."""
    found = text.encode(errors="surrogateescape")
    print(found.decode(errors="replace"), end="", flush=True)
    return len(found)


def _last_lines(text: str, count: int = 5) -> str:
    return "\n".join(text.strip().splitlines()[-count:]) or "no word of why"
