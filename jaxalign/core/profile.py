"""A profile of a few steps of a run, for xprof, TensorBoard or `python -m tpu.profile`.

`asking` goes around a run; the first loop in it that keeps checkpoints records. The steps that are
recorded are waited for, one block of them, and the others run as always.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxalign.core.types import PyTree

FOLDER = "profile"  # in a run's directory


class Request(NamedTuple):
    """A profile of so many steps, to be left in the directory."""

    directory: Path
    steps: int


_asked: ContextVar[Request | None] = ContextVar("profile", default=None)


@contextlib.contextmanager
def asking(directory: Path, steps: int) -> Generator[None]:
    """Asks the loop within for a profile; steps: 0 for none."""
    token = _asked.set(Request(directory, steps) if steps else None)
    try:
        yield
    finally:
        _asked.reset(token)


def taken() -> Request:
    """What was asked for, once; later loops of the run are not recorded."""
    request = _asked.get()
    _asked.set(None)
    return request or Request(Path(), 0)


@contextlib.contextmanager
def recorded(
    step: Callable[..., Any], directory: Path, steps: int, skip: int = 2
) -> Generator[Callable[..., Any], None, None]:
    """The step, of which calls `skip + 1` to `skip + steps` leave a profile in the directory.

    It holds `plugins/profile/TIME/HOST.xplane.pb` and `HOST.trace.json.gz`, as `jax.profiler`
    writes them. A run that ends sooner leaves what it came to.

    step: any function of arrays whose output tells when it is done.
    steps: 0 for no profile; the step comes back as it is.
    skip: first calls that are left out, as they compile.
    """
    if steps == 0:
        yield step
        return
    recorder = _Recorder(step, directory, skip, skip + steps)
    try:
        yield recorder
    finally:
        recorder.stop()


class _Recorder:
    """A step that counts its calls, and records those from `first` to before `end`."""

    def __init__(self, step: Callable[..., Any], directory: Path, first: int, end: int) -> None:
        self._step, self._directory, self._first, self._end = step, directory, first, end
        self._calls, self._open = 0, False
        self._last: PyTree = None  # output of the newest step

    def __call__(self, *arguments: Any) -> Any:
        if self._calls == self._first:
            jax.block_until_ready(arguments)  # the steps before are not in the profile
            jax.profiler.start_trace(self._directory)
            self._open = True
        # xprof finds the steps by this annotation.
        with jax.profiler.StepTraceAnnotation("step", step_num=self._calls):
            output = self._step(*arguments)
        self._calls += 1
        self._last = output if self._open else None
        if self._calls == self._end:
            self.stop()
        return output

    def stop(self) -> None:
        """Writes the profile, if one is being recorded."""
        if not self._open:
            return
        self._open = False
        # A step that failed may have taken its input, the last output, with it.
        left = [x for x in jax.tree.leaves(self._last) if not x.is_deleted()]
        jax.block_until_ready(left)
        self._last = None
        jax.profiler.stop_trace()
