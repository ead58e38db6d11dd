"""Runs an experiment on TPU slices, from the order of the machines to their return.

    python -m tpu.launch --name RUN --topology v5litepod-16 [--spot] [--dry-run] ... \\
        -- python -m experiments.NAME PRESET ...

It orders the slice, copies the committed tree there, installs it, runs the command on every
machine, shows the log of the first, starts again with `--resume` what a preemption has stopped, and
deletes everything at the end, however the run ends. Stopped itself, it leaves the run alone; the
same command finds it again. `--dry-run` prints every program that it would call, and calls none.

Exit codes are the run's (see `experiments.cli`): 0 done, 1 a bug, 2 something to mend, 3 a number
was not finite; 42 when restarts were used up; 4 when no slice came in time; 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from experiments.cli import INTERRUPTED, exit_codes
from jaxalign.core.types import UserError
from tpu import flags, topologies
from tpu.gke import JobSet
from tpu.job import Engine, Job, Shell, trains
from tpu.queued_resources import ROOT, QueuedResource
from tpu.recovery import Action, Do, Limits, Past, Seen, Slice, after, next_action

# --- the command line ----------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as all commands here do."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists all options")


def _parser() -> argparse.ArgumentParser:
    default = os.environ.get
    parser = _Parser(
        prog="python -m tpu.launch",
        usage="%(prog)s --name RUN --topology SLICE [options] -- python -m experiments.NAME ...",
        description="Runs an experiment on TPU slices and deletes them at the end.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--name", required=True, help="of the run, and of the machines made for it")
    add("--topology", required=True, help="of a slice, such as v5litepod-16 (tpu/topologies.py)")
    add("--slices", type=int, default=1, help="how many of them")
    add("--spot", action="store_true", help="cheaper, and may be taken away at any moment")
    add("--workdir", help="gs:// directory of the run (gs://$BUCKET/runs/RUN)")
    add("--cache", help="of compiled programs (gs://BUCKET/compiled, of the workdir's bucket)")
    add("--env", action="append", default=[], metavar="NAME=VALUE", help="a variable of the run")
    add("--retries", type=int, default=20, help="restarts in all")
    add("--wait-hours", type=float, default=24.0, help="in the queue before it gives up")
    add("--poll", type=float, default=30.0, help="seconds between two looks")
    add("--keep", action="store_true", help="leave the machines there, at their price")
    add("--dry-run", action="store_true", help="print the commands and do nothing")
    add("--engine", choices=("queued", "gke"), default="queued", help="Cloud TPU, or Kubernetes")
    queued = parser.add_argument_group("queued resources")
    queued.add_argument("--project", default=default("PROJECT"), help="of Google Cloud ($PROJECT)")
    queued.add_argument("--zone", default=default("ZONE"), help="that has such slices ($ZONE)")
    queued.add_argument("--commit", default="HEAD", help="what is copied to the machines")
    queued.add_argument("--extras", default="tpu,digits,report", help="of the installation there")
    gke = parser.add_argument_group("GKE")
    gke.add_argument("--image", default=default("IMAGE"), help="container with jaxalign ($IMAGE)")
    gke.add_argument("--queue", default="default", help="LocalQueue of Kueue")
    gke.add_argument("--namespace", default="default", help="of Kubernetes")
    gke.add_argument("--account", default="default", help="Kubernetes service account of the run")
    return parser


def job_of(options: argparse.Namespace, command: Sequence[str]) -> Job:
    """The job that the command line asks for. Raises: UserError for what cannot work."""
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", options.name):
        raise UserError(
            f"--name {options.name}: must be lower-case letters, digits and dashes, begin with a "
            "letter, and have at most 40 characters"
        )
    for value, flag, least in [
        (options.slices, "--slices", 1),
        (options.retries, "--retries", 0),
        (options.wait_hours, "--wait-hours", 0),
        (options.poll, "--poll", 0),
    ]:
        if value < least:
            raise UserError(f"{flag} {value}: must be at least {least}")
    workdir, words = _with_workdir(options, command)
    bucket = "/".join(workdir.split("/")[:3]) if workdir else None
    cache = options.cache or (f"{bucket}/compiled" if bucket else None)
    topology = topologies.find(options.topology)
    return Job(
        name=options.name,
        topology=topology,
        command=tuple(words),
        environment={**flags.environment(topology, cache), **_variables(options.env)},
        slices=options.slices,
        spot=options.spot,
        retries=options.retries,
    )


def _with_workdir(options: argparse.Namespace, command: Sequence[str]) -> tuple[str, list[str]]:
    """The workdir, and the command with it; empty for what is no run of an experiment."""
    words = list(command)
    if words[:2] != ["python", "-m"] or len(words) < 3:
        raise UserError("the command after -- must begin with python -m, and a module")
    if not trains(words):
        return options.workdir or "", words
    given = [i for i, word in enumerate(words) if word.split("=")[0] == "--workdir"]
    if given:
        raise UserError("--workdir stands after the --; give it to tpu.launch, before the --")
    bucket = os.environ.get("BUCKET", "").removeprefix("gs://").rstrip("/")
    workdir = options.workdir or (f"gs://{bucket}/runs/{options.name}" if bucket else "")
    if not workdir.startswith("gs://"):
        raise UserError(
            f"--workdir {workdir or '(none)'}: must begin with gs://, as the disks of a slice go "
            "with it; give one, or set BUCKET"
        )
    return workdir, [*words, "--workdir", workdir]


def _variables(given: Sequence[str]) -> dict[str, str]:
    wrong = [each for each in given if not re.match(r"[A-Za-z_]\w*=", each)]
    if wrong:
        raise UserError(f"--env {wrong[0]}: must be NAME=VALUE")
    return dict(each.split("=", 1) for each in given)


def engine_of(options: argparse.Namespace, job: Job, shell: Shell) -> Engine:
    """The engine that the command line asks for. Raises: UserError for a missing name."""
    if options.engine == "gke":
        image = _needed(options.image, "--image", "IMAGE")
        return JobSet(job, shell, image, options.queue, options.account, options.namespace)
    project = _needed(options.project, "--project", "PROJECT")
    zone = _needed(options.zone, "--zone", "ZONE")
    return QueuedResource(job, shell, project, zone, options.commit, options.extras)


def _needed(value: str | None, flag: str, variable: str) -> str:
    if not value:
        raise UserError(f"{flag} is missing; give it, or set {variable} in the environment")
    return value


# --- what it does --------------------------------------------------------------------------------


def supervise(
    engine: Engine,
    limits: Limits,
    keep: bool = False,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Takes a job from order to end; the exit code.

    keep: do not delete the machines at the end.
    sleep: waits for so many seconds; tests bring their own.
    """
    past, said = Past(), ""
    while True:
        seen = engine.look()
        action = next_action(seen, past, limits)
        if action.why and action.why != said:
            _say(action.why)
        said = action.why
        if action.do is Do.FINISH:
            return _finish(engine, action, seen, keep)
        sleep(action.seconds)
        reached = _act(engine, action.do, past)
        past = after(action, seen, past, reached)
        if action.do is Do.FOLLOW:
            sleep(limits.poll)


def _act(engine: Engine, do: Do, past: Past) -> bool:
    """Whether the engine's commands went well."""
    if do is Do.CREATE:
        return engine.create()
    if do is Do.START:
        return engine.start(resume=past.started)
    if do is Do.RESTART:
        return engine.restart()
    if do is Do.FOLLOW:
        return engine.follow()
    return engine.delete() if do is Do.RECREATE else True


def _finish(engine: Engine, action: Action, seen: Seen, keep: bool) -> int:
    if seen.slice is Slice.READY:
        engine.follow()
        if action.code:
            engine.show_end()
    if seen.slice is Slice.UNKNOWN:
        _say("nothing was deleted: see whether machines are left, and delete them")
    elif keep:
        _say("the machines are kept, and cost money until they are deleted")
    elif seen.slice is not Slice.ABSENT and not engine.delete():
        _say("the machines could not be deleted: do it by hand, they cost money")
    return action.code


def rehearse(engine: Engine) -> None:
    """Calls for everything that a run with one preemption calls for; for a dry shell."""
    print("# order, copy, install, run")
    engine.create()
    engine.look()
    engine.start(resume=False)
    print("# again and again: how it stands, and what the first process wrote")
    engine.look()
    engine.follow()
    print("# after a preemption: anew, and on from the newest checkpoint")
    engine.delete()
    engine.create()
    engine.start(resume=True)
    print("# at the end, however the run ended")
    engine.follow()
    engine.delete()


def _mention_changes(shell: Shell) -> None:
    words = ["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"]
    if shell.run(words).out.strip():
        _say("note: changes that are not committed are not copied to the machines")


def _say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def main(
    argv: Sequence[str] | None = None, sleep: Callable[[float], None] = time.sleep
) -> NoReturn:
    """The command line. Ends the process with the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    with exit_codes():
        options = _parser().parse_args(argv[:cut])
        job = job_of(options, argv[cut + 1 :])
        engine = engine_of(options, job, Shell(options.dry_run))
        if options.dry_run:
            rehearse(engine)
            raise SystemExit(0)
        limits = Limits(retries=options.retries, wait=options.wait_hours * 3600, poll=options.poll)
        if options.engine == "gke":
            limits = limits._replace(retries=0, grace=0.0)  # JobSet has restarted it by itself
        else:
            _mention_changes(Shell())
        try:
            code = supervise(engine, limits, options.keep, sleep)
        except KeyboardInterrupt:
            _say("the launcher stops, the run goes on; the same command finds it again")
            code = INTERRUPTED
    raise SystemExit(code)


if __name__ == "__main__":
    main()
