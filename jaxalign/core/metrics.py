"""Where a run's numbers go: metric files, the progress bar, and the record of the environment.

A sink has `write(step, metrics)`, `resume(step)` and `close()`. `JsonLines` is always there, and
tables, plots and reports are made from it alone; `TensorBoard` and `WandB` are for those who wish.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import importlib
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import rich.console
import rich.progress
import rich.text

from jaxalign.core import distributed
from jaxalign.core.types import UserError

Numbers = Mapping[str, float]


class Sink(Protocol):
    """A place that metrics are written to."""

    def write(self, step: int, metrics: Numbers) -> None:
        """Takes the metrics of one step; steps come in rising order."""

    def resume(self, step: int) -> dict[str, Any] | None:
        """Forgets what came after `step`, to go on from there; the last row kept, if known."""

    def close(self) -> None:
        """Writes out what is left."""


# --- files ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Generator[None, None, None]:
    """Turns a full disk, met while writing `path`, into a UserError."""
    try:
        yield
    except Exception as error:
        if not disk_full(error):
            raise
        raise UserError(
            f"{path}: the disk is full; what was written before is intact: "
            "free some space, then go on with --resume"
        ) from error


def disk_full(error: BaseException | None) -> bool:
    """Whether the error, or one that it came from, says that no space is left."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error) or "Disk quota exceeded" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def replacing(path: Path) -> Generator[Path, None, None]:
    """A temporary path that takes the place of `path` once the block ends well.

    A reader, or a run killed at any moment, sees the old file or the new one, never half of one.
    """
    # Named by process, so that two that write the same file do not write into each other's: on
    # machines of the same run numbers are often the same.
    temporary = path.with_name(f"{path.name}.{platform.node()}-{os.getpid()}.tmp")
    with writing(path):
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` as JSON in one piece. NaN and infinities become null.

    Raises: UserError when the disk is full.
    """
    with replacing(Path(path)) as temporary:
        temporary.write_text(json.dumps(plain(value), indent=2, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """The value in JSON's own types: numbers read back equal, what is not finite is null."""
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy and jax, scalars and arrays
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    return str(value)


# --- sinks ---------------------------------------------------------------------------------------


class JsonLines:
    """One flat JSON object a line, "step" first, each line flushed as it is written.

    path: an existing file is continued, after its last line if that was cut short by a kill.
    resume_step: as a call of `resume`.
    Raises: UserError when the disk is full.
    """

    def __init__(self, path: str | os.PathLike, resume_step: int | None = None) -> None:
        self.path = Path(path)
        self._keep(lambda row: True)
        self._open()
        if resume_step is not None:
            self.resume(resume_step)

    def write(self, step: int, metrics: Numbers) -> None:
        """Adds one line."""
        row = plain({"step": step, **metrics})
        with writing(self.path):
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()

    def resume(self, step: int) -> dict[str, Any] | None:
        """Drops rows after `step`; at 0 drops all, as the run starts anew. The last row kept."""
        self.close()
        last = self._keep(lambda row: step > 0 and row["step"] <= step)
        self._open()
        return last

    def close(self) -> None:
        """Closes the file. On a full disk what could not be written is given up."""
        with contextlib.suppress(OSError):
            self._file.close()

    def _open(self) -> None:
        with writing(self.path):
            self._file = open(self.path, "a")  # noqa: SIM115 (open as long as the run)

    def _keep(self, wanted) -> dict[str, Any] | None:
        """Rewrites the file with the wanted rows only, unless that is the file as it is."""
        if not self.path.exists():
            return None
        text = self.path.read_text()
        lines = text[: text.rfind("\n") + 1].splitlines(keepends=True)
        kept = [line for line in lines if wanted(json.loads(line))]
        if "".join(kept) != text:
            with replacing(self.path) as temporary:
                temporary.write_text("".join(kept))
        return json.loads(kept[-1]) if kept else None


def read_json_lines(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of a `JsonLines` file, without a last line that is still being written."""
    text = Path(path).read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


class TensorBoard:
    """Scalars for TensorBoard in a directory.

    Raises: UserError when the package is missing.
    """

    def __init__(self, directory: str | os.PathLike) -> None:
        self._package = _optional("tensorboardX", extra="tensorboard")
        self._directory = str(directory)
        self._writer: Any = None
        self._purge: int | None = None

    def write(self, step: int, metrics: Numbers) -> None:
        """Adds the scalars of one step."""
        if self._writer is None:
            # Not before the first write: only now is it known whether the run goes on from a step.
            self._writer = self._package.SummaryWriter(self._directory, purge_step=self._purge)
        with writing(self._directory):
            for name, value in metrics.items():
                if value is not None:
                    self._writer.add_scalar(name, value, step)

    def resume(self, step: int) -> None:
        """Later steps of the earlier run are hidden by TensorBoard."""
        self._purge = step + 1

    def close(self) -> None:
        """Writes out what is left."""
        if self._writer is not None:
            self._writer.close()


class WandB:
    """Scalars for Weights & Biases; with WANDB_MODE=offline nothing leaves the machine.

    directory: local files, and `wandb_id`, by which a resumed run finds its place online. There
        steps that are run again are dropped by the server, and they are the same.
    config: shown beside the run.
    Raises: UserError when the package is missing.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        project: str = "jaxalign",
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self._package = _optional("wandb", extra="wandb")
        self._directory = Path(directory)
        self._options = {"project": project, "name": name, "config": plain(dict(config or {}))}
        self._run: Any = None
        self._id: str | None = None

    def write(self, step: int, metrics: Numbers) -> None:
        """Logs one step."""
        if self._run is None:
            self._start()
        with writing(self._directory):
            self._run.log(dict(metrics), step=step)

    def resume(self, step: int) -> None:
        """The run of this directory is continued."""
        file = self._directory / "wandb_id"
        self._id = file.read_text().strip() if step > 0 and file.exists() else None

    def close(self) -> None:
        """Ends the run, and waits for its upload."""
        if self._run is not None:
            self._run.finish()

    def _start(self) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        self._run = self._package.init(
            dir=str(self._directory),
            id=self._id,
            resume="allow" if self._id else None,
            settings=self._package.Settings(silent=True, console="off"),
            **self._options,
        )
        (self._directory / "wandb_id").write_text(self._run.id + "\n")


def open_sinks(config: Any, directory: Path, name: str) -> list[Sink]:
    """`metrics.jsonl` in a run's folder, and the sinks that its config asks for; to be closed.

    config: a dataclass with the switches `tensorboard` and `wandb`, which are process 0's alone.
    name: of the run.
    """
    opened: list[Sink] = [JsonLines(directory / "metrics.jsonl")]
    if not distributed.is_main():
        return opened
    if config.tensorboard:
        opened.append(TensorBoard(directory / "tensorboard"))
    if config.wandb:
        opened.append(WandB(directory, name=name, config=dataclasses.asdict(config)))
    return opened


def _optional(package: str, extra: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            f"{package} is not installed; it comes with: pip install 'jaxalign[{extra}]'"
        ) from error


# --- progress ------------------------------------------------------------------------------------


class Progress:
    """A progress bar on stderr, as a context; a line now and then where stderr is no terminal.

    total: the count at which the work is done.
    start: the count at which it begins, for a run that goes on.
    speed: how many of which unit a step makes, such as (160, "images"); the first step, which
        compiles, does not count.
    JAXALIGN_PROGRESS=off in the environment silences it.
    """

    seconds_between_lines = 10.0

    def __init__(
        self, total: int, title: str = "", start: int = 0, speed: tuple[int, str] = (1, "steps")
    ) -> None:
        self.total, self.title, self.start, self.step = total, title, start, start
        self.speed = speed
        self.off = os.environ.get("JAXALIGN_PROGRESS") == "off" or not distributed.is_main()
        self._bar: Any = None
        self._shown: dict[str, float] = {}
        self._begin = self._printed = time.monotonic()
        self._first: tuple[int, float] | None = None  # the first step done, and when

    def __enter__(self) -> Progress:
        self._begin = self._printed = time.monotonic()
        if not self.off and sys.stderr.isatty():
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("{task.description}", markup=False),
                rich.progress.BarColumn(bar_width=12),
                _Line(self),
                refresh_per_second=4,
                console=rich.console.Console(stderr=True),
            )
            self._bar.add_task(self.title, total=self.total, completed=self.start)
            self._bar.start()
        return self

    def update(self, step: int, **shown: float | None) -> None:
        """Moves to `step`; metrics given by name are shown from then on."""
        self.step = step
        if self._first is None and step > self.start:
            self._first = step, time.monotonic()
        self._shown.update({name: value for name, value in shown.items() if value is not None})
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step)
        elif time.monotonic() - self._printed >= self.seconds_between_lines:
            self._print()

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self.step > self.start:
            self._print()

    def line(self) -> str:
        """Count, speed, times and the metrics shown, as of now."""
        now, parts = time.monotonic(), [f"{self.step}/{self.total}"]
        first, since = self._first or (self.step, now)
        if self.step > first and now > since:
            rate, (work, unit) = (self.step - first) / (now - since), self.speed
            parts.append(f"{rate * work:.3g} {unit}/s")
            parts.append(f"{_clock((self.total - self.step) / rate)} left")
        parts += [f"{name} {value:.4g}" for name, value in self._shown.items()]
        return "  ".join([*parts, f"{_clock(now - self._begin)} gone"])

    def _print(self) -> None:
        if not self.off:
            self._printed = time.monotonic()
            print(f"{self.title} {self.line()}".strip(), file=sys.stderr, flush=True)


class _Line(rich.progress.ProgressColumn):
    """The text right of the bar; where the terminal is narrow, its end is left out."""

    def __init__(self, owner: Progress) -> None:
        super().__init__()
        self.owner = owner

    def render(self, task: rich.progress.Task) -> rich.text.Text:
        return rich.text.Text(self.owner.line(), no_wrap=True, overflow="ellipsis")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


# --- environment ---------------------------------------------------------------------------------

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def environment() -> dict[str, Any]:
    """What a reader of the numbers needs to know of where they were made, flat.

    Versions, backend, devices, processors and the commit; no name of machine or user.
    """
    devices = jax.devices()
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "backend": jax.default_backend(),
        "device": devices[0].device_kind,
        "devices": len(devices),
        "processes": jax.process_count(),
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        **commit(Path(__file__).parent),
    }


def commit(directory: Path) -> dict[str, Any]:
    """The commit that the sources in `directory` are at, and whether they were changed since.

    Empty where git does not know them: an installed copy inside somebody else's repository, say.
    """

    def git(*command: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(directory), *command], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if not git("ls-files", "."):
        return {}
    return {
        "commit": git("rev-parse", "HEAD"),
        "dirty": git("status", "--porcelain", "--untracked-files=no") != "",
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
