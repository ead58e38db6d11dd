"""Many single runs shared out to worker processes of one core each.

On small networks that does more than one process on all cores. A job is done when its folder holds
`result.json`, so a list of jobs that was cut short goes on where it stopped.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Protocol, TypeVar

from experiments import cli
from jaxalign.core import metrics
from jaxalign.core.types import UserError


class Job(Protocol):
    """What is asked of a job: it can be sent to another process, and says its name as text."""

    @property
    def directory(self) -> Path:
        """The folder that the run leaves."""
        ...


AnyJob = TypeVar("AnyJob", bound=Job)


def is_done(job: Job) -> bool:
    """Whether its folder has a result."""
    return (job.directory / "result.json").exists()


def start_worker(cores: multiprocessing.Queue) -> None:
    """Binds the process to one core before JAX starts its threads; keeps compiled programs."""
    import jax

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {cores.get()})
    os.environ["JAXALIGN_PROGRESS"] = "off"
    jax.config.update("jax_platforms", "cpu")
    cli.keep_compiled_programs()


def run_jobs(
    jobs: Sequence[AnyJob], work: Callable[[AnyJob], AnyJob], workers: int, title: str
) -> None:
    """All jobs that have no result yet, `workers` at a time, with a progress bar.

    work: does a job in a worker process and returns it; a function of a module.
    """
    missing = [job for job in jobs if not is_done(job)]
    if not missing:
        return
    context = multiprocessing.get_context("spawn")
    cores: multiprocessing.Queue = context.Queue()
    available = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    for worker in range(workers):
        cores.put(available[worker % len(available)])
    done = len(jobs) - len(missing)
    # An executor, as a pool would wait for ever for the job of a worker that died.
    with (
        futures.ProcessPoolExecutor(workers, context, start_worker, (cores,)) as pool,
        metrics.Progress(len(jobs), title, done) as bar,
    ):
        try:
            for job in futures.as_completed([pool.submit(work, job) for job in missing]):
                done += 1
                print(job.result(), file=sys.stderr)
                bar.update(done)
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, BrokenProcessPool):
                raise UserError(
                    f"{title}: a worker process died, perhaps for want of memory; what is done is "
                    "kept: go on with --resume, with fewer workers"
                ) from error
            raise
