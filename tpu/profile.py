"""Where the time of a profiled run went: its operations, those that took longest first.

    python -m tpu.profile WORKDIR [--top 20]

reads the newest profile under WORKDIR, which `--profile STEPS` has left, and prints a table. The
times are an operation's own, without those of the operations inside it (a loop's body, a called
computation). The same files open in xprof (`pip install xprof && xprof WORKDIR/profile`), which
shows time lines, memory and the roofline besides.

Format: Chrome trace events, https://www.tensorflow.org/guide/profiler and the trace viewer's.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from experiments.cli import exit_codes
from jaxalign.core.types import UserError

Event = Mapping[str, Any]


class Row(NamedTuple):
    """One operation of a compiled program. seconds: of all its calls, on all devices."""

    operation: str
    kind: str
    calls: int
    seconds: float


def newest(workdir: Path) -> list[Path]:
    """The traces of the newest profile under a directory, one for each process that made one.

    Raises: UserError where there is none.
    """
    files = sorted(workdir.rglob("*.trace.json.gz"))
    if not files:
        raise UserError(f"{workdir}: holds no profile; run with --profile 5 to make one")
    last = max(file.parent.name for file in files)  # a time, year first
    return [file for file in files if file.parent.name == last]


def operations(trace: Mapping[str, Any]) -> list[Row]:
    """The operations on devices that a trace recorded, those that took longest first."""
    events = [each for each in trace["traceEvents"] if each.get("ph") == "X"]
    lines: dict[tuple[int, int], list[Event]] = defaultdict(list)
    on_device = _device_lines(trace["traceEvents"])
    for event in events:
        line = (event["pid"], event["tid"])
        if line in on_device or (not on_device and "hlo_op" in event.get("args", {})):
            lines[line].append(event)
    calls: dict[tuple[str, str], int] = defaultdict(int)
    spent: dict[tuple[str, str], float] = defaultdict(float)
    for line in lines.values():
        for event, own in _own_times(line):
            name = (str(event["name"]), _kind(event))
            calls[name] += 1
            spent[name] += own * 1e-6
    rows = [Row(*name, calls[name], seconds) for name, seconds in spent.items()]
    return sorted(rows, key=lambda row: -row.seconds)


def _device_lines(events: Iterable[Event]) -> set[tuple[int, int]]:
    """The lines on which TPUs and GPUs record operations; none in a profile of a CPU."""
    named = [each for each in events if each.get("ph") == "M" and "name" in each.get("args", {})]
    devices = {
        each["pid"]
        for each in named
        if each["name"] == "process_name" and each["args"]["name"].startswith("/device:")
    }
    return {
        (each["pid"], each["tid"])
        for each in named
        if each["name"] == "thread_name"
        and each["pid"] in devices
        and (each["args"]["name"] == "XLA Ops" or each["args"]["name"].startswith("Stream #"))
    }


def _own_times(line: Sequence[Event]) -> list[tuple[Event, float]]:
    """Each event of one line with its time in microseconds, less that of the events inside it."""
    ordered = sorted(line, key=lambda event: (event["ts"], -event["dur"]))
    own = [float(event["dur"]) for event in ordered]
    around: list[int] = []
    for i, event in enumerate(ordered):
        while around and event["ts"] >= ordered[around[-1]]["ts"] + ordered[around[-1]]["dur"]:
            around.pop()
        if around:
            own[around[-1]] -= event["dur"]
        around.append(i)
    return [(event, max(time, 0.0)) for event, time in zip(ordered, own, strict=True)]


def _kind(event: Event) -> str:
    """What XLA calls this sort of operation; on a CPU its name without the number."""
    return event.get("args", {}).get("hlo_category") or str(event["name"]).split(".")[0]


def table(rows: Sequence[Row], top: int) -> str:
    """The first rows as text, with their share of all the time."""
    whole = sum(row.seconds for row in rows) or 1.0
    lines = [f"{'share':>7} {'ms':>10} {'calls':>7}  {'kind':24} operation"]
    for row in rows[:top]:
        share, time = f"{row.seconds / whole:7.1%}", f"{row.seconds * 1e3:10.3f}"
        lines.append(f"{share} {time} {row.calls:7d}  {row.kind[:24]:24} {row.operation}")
    rest = rows[top:]
    if rest:
        left = sum(row.seconds for row in rest)
        lines.append(f"{left / whole:7.1%} {left * 1e3:10.3f} {'':7}  {len(rest)} others")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The command line. Ends the process with the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tpu.profile", description=__doc__)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--top", type=int, default=20)
    options = parser.parse_args(sys.argv[1:] if argv is None else argv)
    with exit_codes():
        for file in newest(options.workdir):
            with gzip.open(file) as opened:
                rows = operations(json.load(opened))
            print(f"{file}\n{table(rows, options.top)}")
    raise SystemExit(0)


if __name__ == "__main__":
    main()
