"""The one training loop: resume, hooks, metrics without stalls, a stop on NaN or signal.

Numbers of step n are read after step n+1 was dispatched, so the device never waits for the host;
only where a checkpoint is due, or a hook, the loop catches up first. What the order of things in
`fit` promises:

* A state is saved only after its metrics and parameters were found finite and its row was written.
  So a run killed at any moment goes on from its newest checkpoint, drops the rows after it, and
  ends with the same state and the same rows as a run that was never killed.
* `batches` and keys are functions of the step's index, so there is no iterator to restore.
* Processes of a run do all this in step: a signal to any of them stops all after the same step.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.core import distributed, profile
from jaxalign.core.checkpoint import Checkpoints
from jaxalign.core.metrics import Progress, Sink
from jaxalign.core.types import Array, NonFinite, PyTree, UserError

Step = Callable[[Any, PyTree, Array], tuple[Any, Mapping[str, Any]]]

_fold_in = jax.jit(jax.random.fold_in)


@jax.jit
def _all_finite(tree: PyTree) -> Array:
    finite = [
        jnp.isfinite(x).all()
        for x in jax.tree.leaves(tree)
        if jnp.isdtype(x.dtype, "real floating")
    ]
    return jnp.all(jnp.array(finite))


class Hook(NamedTuple):
    """Something to do now and then, such as an evaluation.

    every: run before the first step of the run, after each `every` steps, and after the last.
    run: `(state, step) -> metrics or None`; the metrics join the row of that step. It must not
        donate the state.
    """

    every: int
    run: Callable[[Any, int], Mapping[str, Any] | None]


class Preempted(Exception):
    """The run was asked to stop (SIGTERM or SIGINT) and did, after `step` completed steps."""

    def __init__(self, step: int, saved: bool) -> None:
        kept = "its state is saved" if saved else "nothing is saved, as it had no checkpoints"
        super().__init__(f"stopped at step {step}; {kept}")
        self.step, self.saved = step, saved


def fit(
    state: Any,
    step: Step,
    batches: Callable[[int], PyTree],
    key: Array,
    *,
    steps: int,
    checkpoints: Checkpoints | None = None,
    save_every: int = 0,
    resume: bool = False,
    sinks: Sequence[Sink] = (),
    hooks: Sequence[Hook] = (),
    title: str = "",
    speed: tuple[int, str] = (1, "steps"),
    shown: Sequence[str] = (),
    put: Callable[[PyTree], PyTree] = jax.device_put,
    clock: Callable[[], float] = time.monotonic,
) -> Any:
    """The state after `steps` steps in all, from `state.step` or from the newest checkpoint.

    step: `(state, batch, key) -> (state, metrics)`, usually jitted and donating the state. Metrics
        are scalars by name, or `[S]` of S seeds that are trained as one; a metric may be absent on
        some steps. No implicit transfers inside.
    batches: the batch of step i (from 0), on the host or on the device.
    key: the key of step i is `fold_in(key, i)`.
    checkpoints: saved to after each `save_every` steps (if not 0) and after the last.
    resume: go on from the newest checkpoint, if there is one. The sinks go back to it too.
    sinks: take one row a step: the step's metrics, those of the hooks run after it, and "seconds",
        the time spent on steps since step 0.
    speed: what a step makes, for the progress bar: (160, "images").
    shown: names of metrics beside the progress bar.
    put: moves a host batch to the devices; with a mesh
        `lambda batch: jax.device_put(batch, batch_sharding(mesh))`.
    clock: seconds; tests bring their own.
    Raises: NonFinite when a step's metric is not finite, Preempted after SIGTERM or SIGINT (a
        second SIGINT interrupts at once), UserError when checkpoints of another run are in the way.
    """
    state, key = _begin(state, key, checkpoints, resume)
    start = int(jax.device_get(state.step))
    seconds = _rewind(sinks, start) if resume else 0.0
    profiled = profile.taken() if checkpoints is not None else profile.Request(Path(), 0)
    # The first steps compile, and are left out where there are others.
    skip = max(0, min(2, steps - start - profiled.steps))
    with (
        Progress(steps, title, start, speed) as bar,
        _Signals() as signals,
        profile.recorded(step, *profiled, skip) as step,
    ):
        record = _Record(sinks, seconds, clock, bar, shown, checkpoints)
        if start == 0:
            record.write(0, _run(hooks, state))
        pending: tuple[int, Mapping[str, Any]] | None = None
        record.start_clock()
        for i in range(start, steps):
            n = i + 1  # steps done at the end of this turn
            batch, step_key = put(batches(i)), _fold_in(key, jax.device_put(np.uint32(i)))
            with jax.transfer_guard("disallow"):
                state, metrics = step(state, batch, step_key)
            if pending:  # the numbers of the step before, read while this one runs
                record.write(pending[0], record.read(*pending))
            pending = (n, metrics)

            due = [hook for hook in hooks if _is_due(hook.every, n, steps)]
            save = checkpoints is not None and _is_due(save_every, n, steps)
            stop = signals.stop_is_due()
            if not (due or save or stop or n == steps):
                continue
            # Do not change this order: read and check, hooks, row, checkpoint.
            row, pending = record.read(n, metrics), None
            record.write(n, {**row, **_run(due, state, n)})
            if checkpoints is not None and (save or stop):
                record.check_parameters(n, state)
                checkpoints.save(n, state, key)
            if stop:
                _wait(checkpoints)
                raise Preempted(n, saved=checkpoints is not None)
            record.start_clock()
    _wait(checkpoints)
    return state


def _begin(
    state: Any, key: Array, checkpoints: Checkpoints | None, resume: bool
) -> tuple[Any, Array]:
    """State and key to start from. The key is put where the state is."""
    if checkpoints is not None and resume:
        restored = checkpoints.restore(state)
        state, key = restored[:2] if restored else (state, key)
    elif checkpoints is not None and checkpoints.steps():
        raise UserError(
            f"{checkpoints.directory} holds checkpoints up to step {checkpoints.steps()[-1]}: "
            "go on from them with --resume, or choose another --workdir"
        )
    return state, distributed.put(key, state.step.sharding) if state.step.committed else key


def _rewind(sinks: Sequence[Sink], step: int) -> float:
    """Takes the sinks back to `step`; the seconds that the run had spent by then."""
    rows = [sink.resume(step) for sink in sinks]
    return max((row.get("seconds") or 0.0 for row in rows if row), default=0.0)


def _is_due(every: int, n: int, steps: int) -> bool:
    return n == steps or (every > 0 and n % every == 0)


def _run(hooks: Sequence[Hook], state: Any, n: int = 0) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    for hook in hooks:
        metrics |= _numbers(hook.run(state, n) or {})
    return metrics


def _numbers(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers of any make as Python's, or lists of them; waits for the device."""
    found = distributed.fetch(dict(metrics))
    return {name: np.asarray(value).tolist() for name, value in found.items()}


def _is_finite(value: Any) -> bool:
    array = np.asarray(value)
    return array.dtype.kind != "f" or bool(np.isfinite(array).all())


def _wait(checkpoints: Checkpoints | None) -> None:
    if checkpoints is not None:
        checkpoints.wait()


class _Record:
    """The numbers' way from the device to the sinks, with the seconds spent on steps."""

    def __init__(
        self,
        sinks: Sequence[Sink],
        seconds: float,
        clock: Callable[[], float],
        bar: Progress,
        shown: Sequence[str],
        checkpoints: Checkpoints | None,
    ) -> None:
        self._sinks, self._bar, self._shown = sinks, bar, shown
        self._seconds, self._clock, self._since = seconds, clock, 0.0
        self._checkpoints = checkpoints

    def start_clock(self) -> None:
        """Steps run from here on; what came since the last `read` (hooks, saving) is left out."""
        self._since = self._clock()

    def read(self, n: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """The metrics of step n as numbers. Raises NonFinite, after the row was written."""
        row = _numbers(metrics)
        now = self._clock()
        self._seconds, self._since = self._seconds + now - self._since, now
        bad = [name for name, x in row.items() if not _is_finite(x)]
        if bad:
            self.write(n, row)
            raise NonFinite(self._stopped(n, f"{bad[0]} is {row[bad[0]]}"))
        return row

    def check_parameters(self, n: int, state: Any) -> None:
        """Raises NonFinite for a state that must not be saved: its next step would be lost."""
        if not _all_finite(getattr(state, "params", ())):
            raise NonFinite(self._stopped(n, "a parameter is not finite"))

    def write(self, n: int, row: Mapping[str, Any]) -> None:
        """One row, to every sink; none where there is nothing to say."""
        if row:
            for sink in self._sinks:
                sink.write(n, {**row, "seconds": self._seconds})
        self._bar.update(n, **{name: row[name] for name in self._shown if name in row})

    def _stopped(self, n: int, what: str) -> str:
        _wait(self._checkpoints)
        saved = self._checkpoints.steps() if self._checkpoints is not None else []
        kept = (
            f"the last good checkpoint is step {saved[-1]} in {self._checkpoints.directory}"
            if saved and self._checkpoints is not None
            else "there is no checkpoint from before"
        )
        return (
            f"stopped at step {n}: {what}; {kept}; "
            "lower the learning rate, or look for what made it so in the rows before"
        )


class _Signals:
    """While open, SIGTERM and SIGINT only ask to stop; a second SIGINT interrupts at once.

    With several processes SIGTERM is JAX's, which tells all of them, and SIGINT becomes one.
    """

    def __init__(self) -> None:
        self.stop = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is not threading.main_thread():
            return self  # Python lets nobody else set handlers
        several = distributed.count() > 1
        for number in (signal.SIGINT,) if several else (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._seen)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def stop_is_due(self) -> bool:
        """Whether to stop after this step; asked once a step."""
        return distributed.stop_is_due() if distributed.count() > 1 else self.stop

    def _seen(self, number: int, frame: FrameType | None) -> None:
        if self.stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stop = True
        if distributed.count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)
        # Not print: the signal may have come in the middle of one.
        os.write(2, b"\nstopping after this step (ctrl-c again: at once)\n")
