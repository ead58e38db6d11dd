"""Google Kubernetes Engine: the job as a JobSet (https://jobset.sigs.k8s.io) queued by Kueue.

`tpu/jobset.yaml` is the form and `render` fills it in. JobSet restarts the run by itself, as often
as the job's retries say, and stops at once on the exit codes that would come again. So the
launcher only applies, watches and deletes, and every start has `--resume`: in an empty workdir it
changes nothing.
"""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.cli import NON_FINITE, USER_ERROR
from tpu.job import Job, Shell, show
from tpu.recovery import BUG, PREEMPTED, Seen, Slice, Work, combine

TEMPLATE = Path(__file__).with_name("jobset.yaml")
STOP_CODES = (BUG, USER_ERROR, NON_FINITE)
_SHORT = 120  # seconds for a question
_OF_JOBSET = "jobset.sigs.k8s.io/jobset-name"
_FIRST = "jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"


def render(job: Job, image: str, queue: str, account: str) -> str:
    """The JobSet of a job, as YAML.

    image: container image with jaxalign installed, its python first on the PATH.
    queue: LocalQueue of Kueue.
    account: Kubernetes service account that may write to the workdir.
    """
    slice_of = job.topology
    selectors = {
        "cloud.google.com/gke-tpu-accelerator": slice_of.gke_accelerator,
        "cloud.google.com/gke-tpu-topology": slice_of.gke_topology,
    }
    if job.spot:
        selectors["cloud.google.com/gke-spot"] = "true"
    holes = {
        "NAME": job.name,
        "QUEUE": queue,
        "RETRIES": job.retries,
        "SLICES": job.slices,
        "HOSTS": slice_of.hosts,
        "CHIPS_PER_HOST": slice_of.chips_per_host,
        "STOP_CODES": json.dumps(STOP_CODES),
        "ACCOUNT": account,
        "SELECTORS": json.dumps(selectors),
        "IMAGE": image,
        "COMMAND": json.dumps(job.words(resume=True)),
        "ENVIRONMENT": json.dumps(_variables(job.environment)),
    }
    return string.Template(TEMPLATE.read_text()).substitute(holes)


def _variables(environment: Mapping[str, str]) -> list[dict[str, str]]:
    # Kubernetes would replace what looks like $(NAME).
    return [{"name": k, "value": v.replace("$(", "$$(")} for k, v in environment.items()]


class JobSet:
    """One JobSet on the cluster that kubectl talks to.

    namespace: of Kubernetes.
    """

    def __init__(
        self, job: Job, shell: Shell, image: str, queue: str, account: str, namespace: str
    ) -> None:
        self._job, self._shell = job, shell
        self._yaml = render(job, image, queue, account)
        self._in = ["--namespace", namespace]
        self._shown = 0

    def create(self) -> bool:
        words = ["kubectl", "apply", *self._in, "--filename", "-"]
        return self._shell.tell(self._shell.run(words, text=self._yaml))

    def delete(self) -> bool:
        words = ["kubectl", "delete", "jobset", self._job.name, *self._in, "--ignore-not-found"]
        return self._shell.tell(self._shell.run(words))

    def look(self) -> Seen:
        words = ["kubectl", "get", "jobset", self._job.name, *self._in, "--output", "json"]
        done = self._shell.run(words, timeout=_SHORT)
        if self._shell.dry:
            return Seen(Slice.ABSENT)
        if done.code and "NotFound" in done.err:
            return Seen(Slice.ABSENT)
        if not self._shell.tell(done):
            return Seen(Slice.UNKNOWN)
        state = progress(json.loads(done.out))
        return state._replace(code=self._code()) if state.code else state

    def _code(self) -> int:
        """What a JobSet that failed ended with."""
        words = ["kubectl", "get", "pods", *self._in, "--selector", self._pods()]
        done = self._shell.run([*words, "--output", "json"], timeout=_SHORT)
        if not self._shell.tell(done):
            return PREEMPTED
        return combine(exit_codes(json.loads(done.out))) or PREEMPTED

    def _pods(self, *more: str) -> str:
        return ",".join([f"{_OF_JOBSET}={self._job.name}", *more])

    def start(self, resume: bool) -> bool:
        """JobSet has started it."""
        return True

    def restart(self) -> bool:
        return True

    def follow(self) -> bool:
        words = ["kubectl", "logs", *self._in, "--selector", self._pods(_FIRST), "--tail=-1"]
        done = self._shell.run(words, timeout=_SHORT)
        log = done.out.encode(errors="surrogateescape")
        start = self._shown if len(log) >= self._shown else 0  # a restart begins a new log
        self._shown = start + show(log[start:].decode(errors="surrogateescape"))
        return self._shell.tell(done)

    def show_end(self) -> None:
        words = ["kubectl", "logs", *self._in, "--selector", self._pods(), "--prefix"]
        show(self._shell.run([*words, "--tail=20"], timeout=_SHORT).out)


def progress(jobset: Mapping[str, Any]) -> Seen:
    """How a JobSet stands, from its `status`; a code that is not 0 where it has failed."""
    status = jobset.get("status", {})
    conditions = status.get("conditions", [])
    true = {each["type"] for each in conditions if each.get("status") == "True"}
    if "Completed" in true:
        return Seen(Slice.READY, Work.ENDED, 0)
    if "Failed" in true:
        return Seen(Slice.READY, Work.ENDED, PREEMPTED)
    jobs = status.get("replicatedJobsStatus", [])
    if sum(each.get("ready", 0) + each.get("succeeded", 0) for each in jobs):
        return Seen(Slice.READY, Work.RUNNING)
    return Seen(Slice.WAITING)  # in Kueue's queue, or its machines are on their way


def exit_codes(pods: Mapping[str, Any]) -> Sequence[int]:
    """The exit codes of the pods that have ended."""
    states = [
        container.get("state", {}).get("terminated")
        for pod in pods.get("items", [])
        for container in pod.get("status", {}).get("containerStatuses", [])
    ]
    return [state["exitCode"] for state in states if state]
