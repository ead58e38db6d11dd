"""The launcher: what it decides, what it calls, and the script that runs on the machines.

The programs that it calls are stand-ins that replay what clouds do: machines that never come, that
are taken away in mid-run, that do not answer.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments import cli
from tests.tpu.stubs import Stubs, fails, says
from tpu import launch
from tpu.gke import exit_codes, progress
from tpu.recovery import (
    NO_CAPACITY,
    Do,
    Limits,
    Past,
    Seen,
    Slice,
    Work,
    after,
    combine,
    next_action,
)

ROOT = Path(__file__).parents[2]
GONE = fails("ERROR: NOT_FOUND: no such resource")
RUN = ["--", "python", "-m", "experiments.metra", "tiny"]


# --- deciding ------------------------------------------------------------------------------------

LIMITS = Limits(retries=2, wait=100.0, unreached=3)
DECISIONS = {
    "nothing there": (Seen(Slice.ABSENT), Past(), Do.CREATE, 0),
    "an order that was refused": (Seen(Slice.ABSENT), Past(unreached=1), Do.FINISH, 2),
    "vanished": (Seen(Slice.ABSENT), Past(asked=True), Do.RECREATE, 0),
    "in the queue": (Seen(Slice.WAITING), Past(asked=True, waited=99.0), Do.WAIT, 0),
    "too long in the queue": (Seen(Slice.WAITING), Past(waited=100.0), Do.FINISH, NO_CAPACITY),
    "preempted": (Seen(Slice.LOST), Past(asked=True), Do.RECREATE, 0),
    "preempted too often": (Seen(Slice.LOST), Past(restarts=2), Do.FINISH, 42),
    "no answer": (Seen(Slice.READY), Past(unreached=2), Do.WAIT, 0),
    "no answer for long": (Seen(Slice.READY), Past(unreached=3), Do.RECREATE, 0),
    "new machines": (Seen(Slice.READY, Work.IDLE), Past(), Do.START, 0),
    "going": (Seen(Slice.READY, Work.RUNNING), Past(), Do.FOLLOW, 0),
    "finished": (Seen(Slice.READY, Work.ENDED, 0), Past(), Do.FINISH, 0),
    "a bug": (Seen(Slice.READY, Work.ENDED, 1), Past(), Do.FINISH, 1),
    "to be mended": (Seen(Slice.READY, Work.ENDED, 2), Past(), Do.FINISH, 2),
    "not finite": (Seen(Slice.READY, Work.ENDED, 3), Past(), Do.FINISH, 3),
    "stopped, just now": (Seen(Slice.READY, Work.ENDED, 42), Past(), Do.WAIT, 0),
    "stopped": (Seen(Slice.READY, Work.ENDED, 42), Past(ended=1), Do.RESTART, 0),
    "aborted": (Seen(Slice.READY, Work.ENDED, 134), Past(ended=1), Do.RESTART, 0),
    "killed": (Seen(Slice.READY, Work.ENDED, 137), Past(ended=1), Do.RESTART, 0),
    "terminated": (Seen(Slice.READY, Work.ENDED, 143), Past(ended=1), Do.RESTART, 0),
    "stopped too often": (Seen(Slice.READY, Work.ENDED, 42), Past(0, 0, 0, 1, 2), Do.FINISH, 42),
    "no cloud": (Seen(Slice.UNKNOWN), Past(), Do.FINISH, 2),
    "no cloud any more": (Seen(Slice.UNKNOWN), Past(asked=True, unreached=1), Do.WAIT, 0),
}


@pytest.mark.parametrize(("seen", "past", "do", "code"), DECISIONS.values(), ids=DECISIONS)
def test_what_is_done_next(seen: Seen, past: Past, do: Do, code: int):
    action = next_action(seen, past, LIMITS)
    assert (action.do, action.code) == (do, code)


def test_pauses_double_up_to_the_longest():
    pauses = [
        next_action(Seen(Slice.LOST), Past(restarts=n, streak=n), Limits()).seconds
        for n in range(6)
    ]
    assert pauses == [30.0, 60.0, 120.0, 240.0, 480.0, 600.0]


@pytest.mark.parametrize(
    ("codes", "one"),
    [
        ([0, 0], 0),
        ([0, 42], 42),
        ([42, 42, 42], 42),
        ([137, 134], 137),
        ([137, 1, 134], 137),  # a peer was killed, and its end is the cause
        ([1, 134], 1),
        ([2, 2], 2),
        ([3, 134], 3),
        ([139, 134], 139),
        ([134, 134], 134),
    ],
)
def test_one_code_for_all_processes(codes: list[int], one: int):
    assert combine(codes) == one


class Weather:
    """A made-up cloud that refuses, loses and silences machines at random."""

    def __init__(self, seed: int, retries: int) -> None:
        self.dice, self.retries = random.Random(seed), retries
        self.slice, self.work, self.left = Slice.ABSENT, Work.IDLE, 5
        self.starts: list[bool] = []
        self.created = 0

    def luck(self, chance: float) -> bool:
        return self.dice.random() < chance

    def look(self) -> Seen:
        if self.slice is Slice.WAITING:
            self.slice = self.dice.choice([Slice.WAITING, Slice.READY, Slice.READY, Slice.LOST])
        elif self.slice is Slice.READY and self.luck(0.1):
            self.slice = self.dice.choice([Slice.LOST, Slice.ABSENT])
        if self.slice is Slice.READY and self.luck(0.1):
            return Seen(Slice.READY)
        if self.work is Work.ENDED:
            return Seen(self.slice, self.work, 0 if self.left <= 0 else self.code)
        return Seen(self.slice, self.work)

    def create(self) -> bool:
        assert self.slice is Slice.ABSENT
        self.created += 1
        self.slice, self.work = Slice.WAITING, Work.IDLE
        return True

    def start(self, resume: bool) -> bool:
        assert self.slice is Slice.READY
        if self.luck(0.2):
            return False
        self.starts.append(resume)
        self.work = Work.RUNNING
        return True

    def restart(self) -> bool:
        return self.start(resume=True)

    def follow(self) -> bool:
        self.left -= 1
        if self.left <= 0 or self.luck(0.2):
            self.work, self.code = Work.ENDED, self.dice.choice([42, 134, 137, 143])
        return True

    def show_end(self) -> None: ...

    def delete(self) -> bool:
        self.slice = Slice.ABSENT
        return True


def test_in_any_weather_it_ends_resumes_and_leaves_nothing_behind():
    ends = set()
    for seed in range(300):
        cloud = Weather(seed, retries=seed % 12)
        code = launch.supervise(cloud, Limits(retries=cloud.retries), sleep=lambda _: None)
        ends.add(code)
        assert cloud.slice is Slice.ABSENT, "machines are left, and cost money"
        assert cloud.created + len(cloud.starts) <= 2 * (cloud.retries + 1)
        assert cloud.starts[:1] in ([], [False])
        assert all(cloud.starts[1:]), "every later start resumes"
        assert code != 0 or cloud.left <= 0
    assert ends == {0, 42}


def test_memory_of_a_queue_ends_with_it():
    seen, limits = Seen(Slice.WAITING), Limits()
    past = after(next_action(seen, Past(asked=True), limits), seen, Past(asked=True))
    assert past.waited == limits.poll
    lost = Seen(Slice.LOST)
    assert after(next_action(lost, past, limits), lost, past).waited == 0.0


# --- queued resources ----------------------------------------------------------------------------


@pytest.fixture
def stubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stubs:
    monkeypatch.setenv("BUCKET", "bucket")
    monkeypatch.setenv("PROJECT", "project")
    monkeypatch.setenv("ZONE", "zone")
    monkeypatch.setenv("IMAGE", "image")
    return Stubs(tmp_path, monkeypatch, "gcloud", "kubectl", "git")


def run(*words: str) -> tuple[int, list[float]]:
    """The launcher's exit code, and its pauses."""
    pauses: list[float] = []
    with pytest.raises(SystemExit) as end:
        launch.main(["--name", "run", "--topology", "v5litepod-4", *words], sleep=pauses.append)
    assert isinstance(end.value.code, int)
    return end.value.code, pauses


def tag() -> str:
    options = launch._parser().parse_args(["--name", "run", "--topology", "v5litepod-4"])
    return launch.job_of(options, RUN[1:]).tag


def status(state: str) -> tuple[int, str, str]:
    return says(f"jaxalign-worker {tag()} {state}")


NEW = fails("bash: /tmp/run_worker.sh: No such file or directory", 127)


def test_from_order_to_return(stubs: Stubs, capfd: pytest.CaptureFixture):
    stubs.script(
        {
            "describe": [GONE, says("WAITING_FOR_RESOURCES"), says("PROVISIONING"), says("ACTIVE")],
            "sh status": [NEW, status("running"), status("running"), status("ended 0")],
            "sh log": [says("step 1"), says("step 2"), says("")],
        }
    )
    code, pauses = run("--poll", "7", *RUN)
    assert code == 0
    assert pauses.count(7.0) == 4, "two looks at the queue, two at the run"
    verbs = [call.split()[4] for call in stubs.calls("gcloud") if "describe" not in call]
    assert verbs[:2] == ["create", "ssh"]
    assert verbs[-1] == "delete"
    assert len(stubs.calls(" create ")) == len(stubs.calls(" delete ")) == 1
    [start] = stubs.calls("sh start")
    assert "python -m experiments.metra tiny --workdir gs://bucket/runs/run'" in start
    assert "JAX_COMPILATION_CACHE_DIR=gs://bucket/compiled" in start
    assert "XLA_FLAGS" not in start
    assert capfd.readouterr().out == "step 1\nstep 2\n\n"
    places = [call.split("sh log ")[1].split("'")[0] for call in stubs.calls("sh log")]
    assert places == ["0", "7", "14"], "each byte of the log is fetched once"


def test_a_preemption_in_mid_run_goes_on_elsewhere(stubs: Stubs):
    active, lost = says("ACTIVE"), [says("SUSPENDING"), says("SUSPENDED")]
    stubs.script(
        {
            "describe": [GONE, active, active, *lost, GONE, active],
            "sh status": [NEW, status("running"), NEW, status("running"), status("ended 0")],
        }
    )
    code, _ = run("--spot", *RUN)
    assert code == 0
    creates, starts = stubs.calls(" create "), stubs.calls("sh start")
    assert len(creates) == 2
    assert all("--spot" in call for call in creates)
    assert ["--resume" in call for call in starts] == [False, True]
    assert len(stubs.calls(" delete ")) == 2


def test_a_run_that_saved_itself_goes_on_in_place(stubs: Stubs):
    states = [NEW, *[status("ended 42")] * 2, status("running"), status("ended 0")]
    stubs.script({"describe": [GONE, says("ACTIVE")], "sh status": states})
    code, pauses = run(*RUN)
    assert code == 0
    assert Limits().grace in pauses
    assert len(stubs.calls(" create ")) == 1
    assert ["--resume" in call for call in stubs.calls("sh start")] == [False, True]
    assert len(stubs.calls("sh setup")) == 1, "what is installed stays installed"


def test_an_order_that_fails_is_made_anew_so_many_times(stubs: Stubs, capfd):
    failed = says("FAILED\tno capacity in the zone")
    stubs.script({"describe": [GONE, failed, GONE, failed, GONE, failed]})
    code, pauses = run("--retries", "2", *RUN)
    assert code == cli.PREEMPTED
    assert "no capacity in the zone" in capfd.readouterr().err
    assert pauses == [0.0, 30.0, 0.0, 60.0, 0.0]
    assert len(stubs.calls(" create ")) == len(stubs.calls(" delete ")) == 3


def test_a_slice_that_never_comes_is_given_back(stubs: Stubs):
    stubs.script({"describe": [GONE, says("WAITING_FOR_RESOURCES")]})
    code, pauses = run("--wait-hours", "0.5", "--poll", "600", *RUN)
    assert code == NO_CAPACITY
    assert sum(pauses) == 1800.0
    assert len(stubs.calls(" delete ")) == 1


def test_a_refused_order_is_the_users_to_mend(stubs: Stubs, capfd: pytest.CaptureFixture):
    stubs.script({"describe": [GONE], " create ": [fails("ERROR: quota is 0")]})
    code, _ = run(*RUN)
    assert code == cli.USER_ERROR
    assert "quota is 0" in capfd.readouterr().err
    assert not stubs.calls(" delete ")


def test_a_connection_that_fails_once_is_tried_again(stubs: Stubs):
    lost = fails("ssh: connection refused", 255)
    stubs.script(
        {
            "describe": [GONE, says("ACTIVE")],
            "sh status": [lost, NEW, NEW, lost, status("running"), status("ended 0")],
            "scp": [lost, says("")],
        }
    )
    code, _ = run(*RUN)
    assert code == 0
    assert len(stubs.calls(" create ")) == 1
    assert len(stubs.calls("sh start")) == 1


def test_machines_that_fall_silent_are_replaced(stubs: Stubs):
    silent = [fails("ssh: timeout", 255)] * Limits().unreached
    stubs.script(
        {
            "describe": [GONE, *[says("ACTIVE")] * 8, GONE, says("ACTIVE")],
            "sh status": [NEW, status("running"), *silent, silent[0], NEW, status("ended 0")],
        }
    )
    code, _ = run(*RUN)
    assert code == 0
    assert ["--resume" in call for call in stubs.calls("sh start")] == [False, True]


@pytest.mark.parametrize("code", [1, 2, 3])
def test_a_run_that_would_fail_again_is_not_retried(stubs: Stubs, code: int, capfd):
    stubs.script(
        {
            "describe": [says("ACTIVE")],
            "sh status": [status(f"ended {code}")],
            "sh last": [says("Traceback")],
        }
    )
    assert run(*RUN)[0] == code
    assert "Traceback" in capfd.readouterr().out
    assert len(stubs.calls(" delete ")) == 1
    assert not stubs.calls("sh start")


def test_a_cloud_that_cannot_be_asked_costs_nothing(stubs: Stubs):
    stubs.script({"describe": [fails("ERROR: no credentials")]})
    assert run(*RUN)[0] == cli.USER_ERROR
    assert not stubs.calls(" create ")
    assert not stubs.calls(" delete ")


def test_the_launcher_finds_its_run_again_and_no_other(stubs: Stubs, capfd):
    states = [status("running"), status("ended 0")]
    stubs.script({"describe": [says("ACTIVE")], "sh status": states})
    assert run("--keep", *RUN)[0] == 0
    assert not stubs.calls("sh start")
    assert not stubs.calls(" delete ")
    stubs.script({"describe": [says("ACTIVE")], "sh status": [says("jaxalign-worker x running")]})
    assert run(*RUN)[0] == cli.USER_ERROR
    assert "another command runs" in capfd.readouterr().err


def test_an_old_run_on_kept_machines_is_not_in_the_way(stubs: Stubs):
    old = says("jaxalign-worker old ended 0")
    stubs.script({"describe": [says("ACTIVE")], "sh status": [old, status("ended 0")]})
    assert run(*RUN)[0] == 0
    assert len(stubs.calls("sh start")) == 1


def test_slices_are_ordered_together_and_asked_one_by_one(stubs: Stubs):
    both = [status("ended 0")] * 2
    states = [NEW, NEW, status("running"), status("ended 0"), *both]
    stubs.script({"describe": [GONE, says("ACTIVE")], "sh status": states})
    assert run("--slices", "2", *RUN)[0] == 0
    [create] = stubs.calls(" create ")
    assert "--node-count 2 --node-prefix run" in create
    assert "--node-id" not in create
    assert [call.split()[5] for call in stubs.calls("sh start")] == ["run-0", "run-1"]


# --- the command line ----------------------------------------------------------------------------

IMPOSSIBLE = {
    "no name": (["--topology", "v4-8", *RUN], "--name"),
    "bad name": (["--name", "My_Run", "--topology", "v4-8", *RUN], "My_Run"),
    "unknown slice": (["--name", "a", "--topology", "v5e-16", *RUN], "v5e-16"),
    "unknown option": (["--name", "a", "--topology", "v4-8", "--sport", *RUN], "--sport"),
    "no slices": (["--name", "a", "--topology", "v4-8", "--slices", "0", *RUN], "--slices 0"),
    "no command": (["--name", "a", "--topology", "v4-8"], "python -m"),
    "a local workdir": (["--name", "a", "--topology", "v4-8", "--workdir", "x", *RUN], "gs://"),
    "workdir twice": (["--name", "a", "--topology", "v4-8", *RUN, "--workdir=gs://b"], "before"),
    "a bad variable": (["--name", "a", "--topology", "v4-8", "--env", "x", *RUN], "--env x"),
    "GKE's alone": (["--name", "a", "--topology", "tpu7x-8", *RUN], "--engine gke"),
}


@pytest.mark.parametrize(("words", "said"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_the_impossible_is_refused_in_one_line(stubs: Stubs, words: list[str], said: str, capfd):
    with pytest.raises(SystemExit) as end:
        launch.main(words)
    assert end.value.code == cli.USER_ERROR
    [line] = capfd.readouterr().err.splitlines()
    assert said in line
    assert not stubs.calls()


@pytest.mark.parametrize("name", ["PROJECT", "ZONE", "BUCKET"])
def test_names_come_from_the_environment_or_are_asked_for(stubs, name, monkeypatch, capfd):
    monkeypatch.delenv(name)
    assert run(*RUN)[0] == cli.USER_ERROR
    assert name in capfd.readouterr().err


def test_a_rehearsal_prints_everything_and_calls_nothing(stubs: Stubs, capfd):
    assert run("--dry-run", *RUN)[0] == 0
    lines = capfd.readouterr().out.splitlines()
    assert not stubs.calls()
    commands = [line for line in lines if not line.startswith("#")]
    assert all(line.startswith(("gcloud ", "git ")) for line in commands)
    assert sum(" create " in line for line in commands) == 2
    assert "--resume" in commands[-3]
    assert " delete " in commands[-1]


def test_without_gcloud_it_says_so(stubs: Stubs, monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert run(*RUN)[0] == cli.USER_ERROR
    assert "no such program" in capfd.readouterr().err


def test_what_trains_nothing_gets_no_workdir(stubs: Stubs, capfd):
    assert run("--dry-run", "--", "python", "-m", "tpu.smoke", "--quick")[0] == 0
    out = capfd.readouterr().out
    assert "--workdir" not in out
    assert "--resume" not in out


# --- GKE -----------------------------------------------------------------------------------------


def jobset(**status: object) -> tuple[int, str, str]:
    return says(json.dumps({"status": status}))


def ready(count: int) -> tuple[int, str, str]:
    return jobset(replicatedJobsStatus=[{"name": "slice", "ready": count}])


def condition(kind: str) -> tuple[int, str, str]:
    return jobset(conditions=[{"type": kind, "status": "True"}])


MISSING = fails('Error from server (NotFound): jobsets "run" not found')
FAILED_PODS = {
    "items": [
        {"status": {"containerStatuses": [{"state": {"terminated": {"exitCode": code}}}]}}
        for code in (134, 3)
    ]
}


def test_a_jobset_from_apply_to_delete(stubs: Stubs, capfd):
    stubs.script(
        {
            "get jobset": [MISSING, jobset(), ready(1), ready(0), ready(1), condition("Completed")],
            "kubectl logs": [says("step 1"), says("step 1\nstep 2")],
        }
    )
    assert run("--engine", "gke", *RUN)[0] == 0
    assert capfd.readouterr().out == "step 1\nstep 2\n"
    assert len(stubs.calls("kubectl apply")) == len(stubs.calls("kubectl delete")) == 1
    assert '"--resume"' in (stubs.folder / "applied").read_text()


def test_a_failed_jobset_ends_with_its_runs_code(stubs: Stubs):
    pods = [says(json.dumps(FAILED_PODS))]
    stubs.script({"get jobset": [ready(1), condition("Failed")], "get pods": pods})
    assert run("--engine", "gke", *RUN)[0] == 3
    assert len(stubs.calls("kubectl delete")) == 1


def test_a_jobset_without_restarts_left_can_be_resumed(stubs: Stubs):
    stubs.script({"get jobset": [condition("Failed")], "get pods": [says('{"items": []}')]})
    assert run("--engine", "gke", *RUN)[0] == cli.PREEMPTED


def test_a_cluster_that_cannot_be_asked_is_left_alone(stubs: Stubs):
    stubs.script({"get jobset": [fails("connection refused")]})
    assert run("--engine", "gke", *RUN)[0] == cli.USER_ERROR
    assert not stubs.calls("kubectl apply")


def test_the_status_of_a_jobset_is_read():
    assert progress({}) == Seen(Slice.WAITING)
    assert exit_codes(FAILED_PODS) == [134, 3]
    assert exit_codes({"items": [{"status": {"containerStatuses": [{"state": {}}]}}]}) == []


# --- on the machines -----------------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Path]:
    """The home directory of a machine with the tree installed."""
    (tmp_path / "jaxalign" / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / "jaxalign" / ".venv" / "bin" / "python").symlink_to(shutil.which("bash") or "")
    yield tmp_path
    worker(tmp_path, "end_old")


def worker(home: Path, *words: str) -> str:
    """What the script prints. `python` there is bash."""
    done = subprocess.run(
        ["bash", str(ROOT / "tpu" / "run_worker.sh"), *words],
        env={**os.environ, "HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def until(home: Path, state: str) -> None:
    end = time.monotonic() + 30
    while state not in (seen := worker(home, "status")):
        assert time.monotonic() < end, f"{seen!r} instead of {state!r}"
        time.sleep(0.05)


def test_a_run_outlives_its_connection_and_tells_how_it_ended(machine: Path):
    assert worker(machine, "status") == ""
    worker(machine, "start", "abc", "WORD=two words", "python", "-c", 'echo "$WORD" here; exit 42')
    until(machine, "jaxalign-worker abc ended 42")
    assert worker(machine, "log", "0") == "two words here\n"
    assert worker(machine, "log", "4") == "words here\n"
    assert "exit code 42" in worker(machine, "last")


def test_a_new_start_ends_the_old_run_and_its_children(machine: Path):
    worker(machine, "start", "abc", "python", "-c", "sleep 1000; true")
    until(machine, "abc running")
    worker(machine, "start", "def", "python", "-c", "exit 0")
    until(machine, "def ended 0")
    assert worker(machine, "last") == ""


def test_a_shutdown_leaves_the_run_time_to_save(machine: Path):
    save = "trap 'echo saved; exit 42' TERM; echo ready; while true; do sleep 0.05; done"
    worker(machine, "start", "abc", "python", "-c", save)
    while "ready" not in worker(machine, "log", "0"):
        time.sleep(0.05)
    group = (machine / "jaxalign-run" / "pid").read_text().strip()
    os.killpg(int(group), 15)  # everything at once, as a system does that goes down
    until(machine, "ended 42")
    assert "saved" in worker(machine, "log", "0")


def test_a_machine_that_went_down_is_seen(machine: Path):
    worker(machine, "start", "abc", "python", "-c", "sleep 1000")
    until(machine, "abc running")
    os.killpg(int((machine / "jaxalign-run" / "pid").read_text()), 9)
    until(machine, "abc ended 137")


def test_the_tree_is_installed_with_its_constraints(tmp_path, monkeypatch):
    stubs = Stubs(tmp_path, monkeypatch, "uv", "sudo")
    stubs.script({})
    archive = tmp_path / "tree.tar.gz"
    subprocess.run(
        ["tar", "-czf", str(archive), "-C", str(ROOT), "constraints.txt", "pyproject.toml"],
        check=True,
    )
    worker(tmp_path, "setup", str(archive), "tpu,report")
    assert (tmp_path / "jaxalign" / "constraints.txt").exists()
    assert stubs.calls("uv pip install")[0].endswith("-c constraints.txt -e '.[tpu,report]'")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", sorted((ROOT / "tpu").glob("*.sh")), ids=lambda p: p.name)
def test_scripts_pass_shellcheck(script: Path):
    done = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# --- both together -------------------------------------------------------------------------------

# A cloud of one machine: what is sent there by ssh runs here, in a home of its own.
CLOUD = """#!/usr/bin/env bash
set -euo pipefail
cd {folder}
words=$*
case $words in
  *" create "*) echo ACTIVE >state ;;
  *" delete "*) rm -f state ;;
  *" describe "*) cat state 2>/dev/null || {{ echo NOT_FOUND >&2; exit 1; }} ;;
  *" scp "*) cp "$5" "$6" . ;;
  *" ssh "*) HOME=$PWD PATH=$PWD:$PATH bash -c "${{words##*--command=}}" ;;
esac
"""
GIT = """#!/usr/bin/env bash
[[ $* != *archive* ]] || tar -czf "$6" -C {root} constraints.txt
"""
# Installs a python that is stopped at its first run.
UV = """#!/usr/bin/env bash
mkdir -p .venv/bin
cat >.venv/bin/python <<'EOF'
#!/usr/bin/env bash
echo "$JAX_PLATFORMS $*"
[[ $* == *--resume ]] || exit 42
EOF
chmod +x .venv/bin/python
"""


def test_a_stopped_run_goes_on_to_its_end_on_a_machine(stubs, tmp_path, monkeypatch, capfd):
    programs = {"gcloud": CLOUD, "git": GIT, "uv": UV, "sudo": "#!/bin/sh\ncat >/dev/null\n"}
    for name, text in programs.items():
        braces = name in ("gcloud", "git")
        program = tmp_path / name
        program.write_text(text.format(folder=tmp_path, root=ROOT) if braces else text)
        program.chmod(0o755)
    monkeypatch.setattr("tpu.queued_resources.AWAY", str(tmp_path))
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        time.sleep(0.2)  # the machine needs a moment

    with pytest.raises(SystemExit) as end:
        words = ["--name", "run", "--topology", "v5litepod-4", "--retries", "2", *RUN]
        launch.main(words, sleep=sleep)
    assert end.value.code == 0
    said = "tpu,cpu -m experiments.metra tiny --workdir gs://bucket/runs/run --resume"
    assert said in capfd.readouterr().out.splitlines()
    assert Limits().grace in pauses
    assert not (tmp_path / "state").exists(), "the machine is given back"
