"""What the benches share: variants of one piece of work, timed in turns, and lines about them.

All variants are measured in turns in one process, so that a busy machine slows all of them alike.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import statistics as stats
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxalign.core.metrics import environment

COMPILED = "jaxalign"  # the variant that others are compared with

# Works once, until all results are there, and returns them.
Thunk = Callable[[], Any]
Line = Mapping[str, Any]


class Variant(NamedTuple):
    """An implementation.

    prepare: number of the run -> thunk; its own time does not count.
    count: a thunk's result -> how much was done, for example tokens.
    """

    name: str
    prepare: Callable[[int], Thunk]
    count: Callable[[Any], int]
    note: str = ""


class Spent(NamedTuple):
    """seconds: by the clock. cpu: of all threads, which a busy machine changes less."""

    seconds: float
    cpu: float


class Timing(NamedTuple):
    """first: seconds of the first run. spent, counts: of each repeat. memory: peak bytes."""

    first: float
    spent: list[Spent]
    counts: list[int]
    memory: int

    @property
    def median(self) -> float:
        """Seconds of the median repeat."""
        return stats.median(spent.seconds for spent in self.spent)


def measure(variants: Sequence[Variant], repeats: int) -> dict[str, Timing]:
    """Every variant once to compile, then all in turns, each turn beginning with another one."""
    timings: dict[str, Timing] = {}
    for variant in variants:
        say(f"first run: {variant.name}")
        first, _ = timed(variant.prepare(0))
        timings[variant.name] = Timing(first.seconds, [], [], 0)
    for run in range(repeats):
        say(f"turn {run + 1} of {repeats}")
        begin = run % len(variants)
        for variant in [*variants[begin:], *variants[:begin]]:
            thunk = variant.prepare(run + 1)
            reset_peak_memory()
            spent, result = timed(thunk)
            timing = timings[variant.name]
            timing.spent.append(spent)
            timing.counts.append(variant.count(result))
            timings[variant.name] = timing._replace(memory=max(timing.memory, peak_memory()))
    return timings


def fastest(candidates: Sequence[tuple[Variant, Any]], trials: int = 3) -> tuple[Variant, Any]:
    """The variant, with its setting, whose best of some trials takes the least time."""

    def trial(candidate: tuple[Variant, Any]) -> float:
        variant, setting = candidate
        variant.prepare(0)()  # compiles
        seconds = min(timed(variant.prepare(i + 1))[0].seconds for i in range(trials))
        say(f"tried {variant.name}, {setting}: {seconds:.3f} s")
        return seconds

    return min(candidates, key=trial)


def timed(thunk: Thunk) -> tuple[Spent, Any]:
    """What a thunk costs, and its result."""
    begin, used = time.perf_counter(), time.process_time()
    result = thunk()
    return Spent(time.perf_counter() - begin, time.process_time() - used), result


def say(what: str) -> None:
    """What goes on, over the last such line, where somebody looks at the screen."""
    if sys.stderr.isatty() or os.environ.get("JAXALIGN_PROGRESS") == "on":
        end = "\r" if sys.stderr.isatty() else "\n"
        print(f"{what:<70}", end=end, file=sys.stderr, flush=True)


def reset_peak_memory() -> None:
    """Linux forgets the process's peak when asked to; elsewhere it stays that of the whole run."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Peak bytes of the device where it counts them, else of the process."""
    device = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in device:
        return device["peak_bytes_in_use"]
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# --- what is printed -----------------------------------------------------------------------------


def summary(timings: Mapping[str, Timing], name: str) -> dict[str, Any]:
    """What every line says of a variant; ratios are medians over turns, against `jaxalign`."""
    timing, ours = timings[name], timings[COMPILED]
    low, high = np.quantile([spent.seconds for spent in timing.spent], [0.1, 0.9])
    turns = list(zip(timing.spent, ours.spent, strict=True))
    return {
        "median_seconds": timing.median,
        "p10_seconds": float(low),
        "p90_seconds": float(high),
        "ratio": stats.median(theirs.seconds / own.seconds for theirs, own in turns),
        "cpu_seconds": stats.median(spent.cpu for spent in timing.spent),
        "cpu_ratio": stats.median(theirs.cpu / own.cpu for theirs, own in turns),
        "compile_seconds": max(timing.first - timing.median, 0.0),
        "peak_memory_bytes": timing.memory,
        "repeats": len(timing.spent),
    }


def versions() -> dict[str, Any]:
    """The environment, flat, with those packages' versions that take part, and the load."""
    known = environment()
    for name in ("torch", "transformers"):
        if name in sys.modules:
            known[name] = sys.modules[name].__version__
    load = os.getloadavg() if hasattr(os, "getloadavg") else (float("nan"),)
    return {**known, "load": round(load[0], 2)}


class Column(NamedTuple):
    """field: of a line. form: how its value divided by unit is written."""

    field: str
    form: str = "{}"
    unit: float = 1


def show(lines: Sequence[Line], columns: Mapping[str, Column]) -> None:
    """One JSON object a line on stdout, with the environment; a table on stderr."""
    known = versions()
    for line in lines:
        print(json.dumps({**line, **known}), flush=True)
    say("")
    print(table(lines, columns), file=sys.stderr, flush=True)


def table(lines: Sequence[Line], columns: Mapping[str, Column]) -> str:
    """The lines side by side, words on the left of their column and numbers on the right."""
    words = [isinstance(lines[0][column.field], str) for column in columns.values()]
    rows = [[*columns], *([_cell(line, column) for column in columns.values()] for line in lines)]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if word else cell.rjust(width)
            for cell, width, word in zip(row, widths, words, strict=True)
        ).rstrip()
        for row in rows
    )


def _cell(line: Line, column: Column) -> str:
    value = line[column.field]
    if value is None:
        return "-"
    return value if isinstance(value, str) else column.form.format(value / column.unit)
