"""Cloud TPU by queued resources: slices are ordered, used over ssh, and deleted, all by `gcloud`.

The run does not hang on the ssh connection: `run_worker.sh` starts it in the background of every
machine, and each look asks the machines how it stands. So a launcher that was stopped finds its
run again, and a lost connection costs nothing.

States of a queued resource: https://cloud.google.com/tpu/docs/queued-resources.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from jaxalign.core.types import UserError
from tpu.job import Done, Job, Shell, show
from tpu.recovery import Seen, Slice, Work, combine

ROOT = Path(__file__).parents[1]
SCRIPT = "run_worker.sh"
AWAY = "/tmp"  # where files arrive on the machines
MARK = "jaxalign-worker"  # begins a line of `run_worker.sh status`

_SLICES = {
    "ACTIVE": Slice.READY,
    "FAILED": Slice.LOST,
    "SUSPENDED": Slice.LOST,
}  # all others pass by themselves
_STATE = "value(state.state,state.failedData.error.message)"  # with a tab between
_SHORT, _LONG = 300, 3600  # seconds for a question, and for an installation


class QueuedResource:
    """One queued resource with the job's slices.

    project, zone: where it is ordered.
    commit: what is copied to the machines, as git names it.
    extras: of the installation there, for example "tpu,report".
    """

    def __init__(
        self, job: Job, shell: Shell, project: str, zone: str, commit: str, extras: str
    ) -> None:
        if job.topology.runtime is None:
            raise UserError(
                f"{job.topology.name}: Cloud TPU does not offer it, GKE alone; add --engine gke"
            )
        self._job, self._shell, self._commit, self._extras = job, shell, commit, extras
        self._where = ["--project", project, "--zone", zone]
        self._tag = job.tag
        self._shown = 0  # bytes of the first machine's log

    # --- the slice -------------------------------------------------------------------------------

    def create(self) -> bool:
        job = self._job
        words = [
            *_queued("create", job.name, self._where),
            *("--accelerator-type", job.topology.name),
            *("--runtime-version", str(job.topology.runtime)),
        ]
        if job.slices == 1:
            words += ["--node-id", job.name]
        else:
            words += ["--node-count", str(job.slices), "--node-prefix", job.name]
        if job.spot:
            words += ["--spot"]
        return self._shell.tell(self._shell.run(words))

    def delete(self) -> bool:
        words = [*_queued("delete", self._job.name, self._where), "--force"]
        done = self._shell.run(words)
        return _is_absent(done) or self._shell.tell(done)

    def look(self) -> Seen:
        words = _queued("describe", self._job.name, self._where)
        done = self._shell.run([*words, "--format", _STATE], timeout=_SHORT)
        if done.code:
            absent = _is_absent(done) or self._shell.tell(done)
            return Seen(Slice.ABSENT if absent else Slice.UNKNOWN)
        state, _, why = done.out.strip().partition("\t")
        if why:
            print(why, file=sys.stderr, flush=True)
        found = _SLICES.get(state, Slice.WAITING)
        return self._look_inside() if found is Slice.READY or self._shell.dry else Seen(found)

    # --- the machines ----------------------------------------------------------------------------

    @property
    def _nodes(self) -> list[str]:
        name, slices = self._job.name, self._job.slices
        return [name] if slices == 1 else [f"{name}-{i}" for i in range(slices)]

    def start(self, resume: bool) -> bool:
        packed = Path(tempfile.gettempdir()) / f"jaxalign-{self._tag}.tar.gz"
        words = ["git", "-C", str(ROOT), "archive", "--format=tar.gz", "--output", str(packed)]
        try:
            copied = self._shell.tell(self._shell.run([*words, self._commit])) and all(
                self._copy(node, packed) for node in self._nodes
            )
        finally:
            packed.unlink(missing_ok=True)
        setup = ["setup", f"{AWAY}/{packed.name}", self._extras]
        return copied and self._everywhere(*setup) and self._run(resume)

    def restart(self) -> bool:
        return self._run(resume=True)

    def _run(self, resume: bool) -> bool:
        variables = [f"{name}={value}" for name, value in self._job.environment.items()]
        self._shown = 0
        return self._everywhere("start", self._tag, *variables, *self._job.words(resume))

    def _copy(self, node: str, archive: Path) -> bool:
        files = [str(archive), str(ROOT / "tpu" / SCRIPT)]
        words = [*_machines("scp", *files, f"{node}:{AWAY}/"), *self._where, "--worker=all"]
        return self._shell.tell(self._shell.run(words))

    def _everywhere(self, *words: str) -> bool:
        return all(self._shell.tell(self._ssh(node, "all", words, _LONG)) for node in self._nodes)

    def _ssh(self, node: str, worker: str, words: Sequence[str], timeout: float = _SHORT) -> Done:
        command = shlex.join(["bash", f"{AWAY}/{SCRIPT}", *words])
        asked = [*_machines("ssh", node), *self._where, f"--worker={worker}"]
        return self._shell.run([*asked, f"--command={command}"], timeout=timeout)

    def _look_inside(self) -> Seen:
        lines = []
        for node in self._nodes:
            done = self._ssh(node, "all", ["status"])
            # The script itself is not there yet on new machines.
            if done.code and "No such file" not in done.err:
                self._shell.tell(done)
                return Seen(Slice.READY, Work.UNKNOWN)
            lines += [line.split()[1:] for line in done.out.splitlines() if line.startswith(MARK)]
        return _progress(lines, self._tag, self._job.slices * self._job.topology.hosts)

    def follow(self) -> bool:
        done = self._ssh(self._nodes[0], "0", ["log", str(self._shown)])
        self._shown += show(done.out)
        return self._shell.tell(done)

    def show_end(self) -> None:
        for node in self._nodes:
            show(self._ssh(node, "all", ["last"]).out)


def _queued(verb: str, name: str, where: Sequence[str]) -> list[str]:
    return ["gcloud", "compute", "tpus", "queued-resources", verb, name, *where, "--quiet"]


def _machines(verb: str, *words: str) -> list[str]:
    return ["gcloud", "compute", "tpus", "tpu-vm", verb, *words, "--quiet"]


def _is_absent(done: Done) -> bool:
    return done.code != 0 and "NOT_FOUND" in done.err


def _progress(lines: Sequence[Sequence[str]], tag: str, machines: int) -> Seen:
    """The run as a whole, from a line `TAG STATE [CODE]` of each machine."""
    if [line for line in lines if line[0] != tag and line[1] == "running"]:
        raise UserError(
            "another command runs on machines of this name: choose another --name, or delete them"
        )
    ours = [line[1:] for line in lines if line[0] == tag]
    if any(line[0] == "running" for line in ours):
        return Seen(Slice.READY, Work.RUNNING)
    if len(ours) < machines:  # some have not begun, or lie under another run
        return Seen(Slice.READY, Work.IDLE)
    return Seen(Slice.READY, Work.ENDED, combine([int(line[1]) for line in ours]))
