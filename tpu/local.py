"""A pod on one machine: `python -m tpu.local -n 2 -d 4 [--timeout SECONDS] -- COMMAND ...`

Starts COMMAND, say `python -m experiments.metra tiny`, as N processes that are one run, each with D
virtual CPU devices. What process 0 says is passed on; the others write to files, whose ends are
shown when something goes wrong. A signal to this program goes to all of them; when one dies badly
the others get a while to end by themselves and are then killed. The exit code is that of the one
that failed first: 124 where the time was up, 128 + N where signal N killed it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import IO

from jaxalign.core import distributed

TIMED_OUT = 124
LOOK = 0.1  # seconds between two looks at the processes
TAIL = 30  # lines shown of a process that failed
NOISE = b"[Gloo] Rank"  # of the library that CPU processes talk through


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; the exit code."""
    options = _parse(argv)
    with tempfile.TemporaryDirectory(prefix="tpu-local-") as folder:
        pod = Pod(options.command, options.processes, options.devices, Path(folder))
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, pod.pass_on)
        code = pod.wait(options.timeout, options.grace)
        if code not in (0, 42):
            pod.show()
    return code


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tpu.local", description=__doc__)
    parser.add_argument("-n", "--processes", type=_positive, default=2)
    parser.add_argument("-d", "--devices", type=_positive, default=4, help="of each process")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds, then all are killed")
    parser.add_argument(
        "--grace", type=float, default=60, help="seconds that the others have after one failed"
    )
    parser.add_argument("command", nargs="+", help="after --")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return number


class Pod:
    """The processes of a run, the first of which leads.

    folder: for what processes other than the first say.
    """

    def __init__(self, command: Sequence[str], count: int, devices: int, folder: Path) -> None:
        address = f"127.0.0.1:{_free_port()}"
        self._logs = [folder / f"process-{i}.log" for i in range(count)]
        self.processes: list[subprocess.Popen] = []
        for i, log in enumerate(self._logs):
            environ = {**os.environ, **_environment(address, count, i, devices)}
            with open(log, "wb") as file:
                started = subprocess.Popen(
                    command,
                    env=environ,
                    stdout=file if i else subprocess.PIPE,
                    stderr=subprocess.STDOUT if i else subprocess.PIPE,
                    start_new_session=True,  # ctrl-c reaches it through `pass_on`, and not twice
                )
            self.processes.append(started)
        first = self.processes[0]
        self._streams = [
            threading.Thread(target=_copy, args=pipe, daemon=True)
            for pipe in ((first.stdout, sys.stdout.buffer), (first.stderr, sys.stderr.buffer))
        ]
        for stream in self._streams:
            stream.start()

    def pass_on(self, number: int, frame: FrameType | None = None) -> None:
        """Sends a signal to all processes that live."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def wait(self, timeout: float, grace: float) -> int:
        """The run's exit code, once no process is left. Seconds: of all, and after a failure."""
        end, code = time.monotonic() + timeout, 0
        while alive := [each for each in self.processes if each.poll() is None]:
            failed = next((each for each in self.processes if each.returncode), None)
            if failed and not code:
                code, end = _exit_code(failed), min(end, time.monotonic() + grace)
            if time.monotonic() > end:
                code = code or TIMED_OUT
                for process in alive:
                    _kill(process)
            time.sleep(LOOK)
        for stream in self._streams:
            stream.join(timeout=5)
        return code or next(map(_exit_code, (p for p in self.processes if p.returncode)), 0)

    def show(self) -> None:
        """Prints how each process ended, and the last lines of those whose words went to files."""
        for i, (process, log) in enumerate(zip(self.processes, self._logs, strict=True)):
            print(f"--- process {i} ended with {_exit_code(process)}", file=sys.stderr)
            lines = log.read_text(errors="replace").splitlines()
            lines = [line for line in lines if not line.startswith(NOISE.decode())]
            print(*lines[-TAIL:], sep="\n", end="\n" if lines else "", file=sys.stderr)


def _environment(address: str, count: int, index: int, devices: int) -> dict[str, str]:
    return {
        distributed.COORDINATOR: address,
        distributed.PROCESSES: str(count),
        distributed.PROCESS: str(index),
        distributed.HEARTBEAT: os.environ.get(distributed.HEARTBEAT, "20"),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
    }


def _free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def _copy(source: IO[bytes], target: IO[bytes]) -> None:
    with source:
        for line in source:
            if not line.startswith(NOISE):
                target.write(line)
                target.flush()


def _kill(process: subprocess.Popen) -> None:
    """With whatever the process has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _exit_code(process: subprocess.Popen) -> int:
    """As a shell tells it."""
    code = process.returncode
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main())
