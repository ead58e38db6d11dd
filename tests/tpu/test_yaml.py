"""The JobSet and the SkyPilot task, read as their engines would, against the table of slices."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tpu import flags, topologies
from tpu.gke import STOP_CODES, TEMPLATE, render
from tpu.job import Job
from tpu.recovery import RESTARTABLE
from tpu.topologies import TOPOLOGIES

TPU = Path(__file__).parents[2] / "tpu"
COMMAND = ("python", "-m", "experiments.metra", "tiny", "--workdir", "gs://bucket/runs/it's")


def job(name: str, **fields: Any) -> Job:
    topology = topologies.find(name)
    return Job("run", topology, COMMAND, flags.environment(topology, "gs://bucket/c"), **fields)


def jobset(name: str = "v5litepod-16", **fields: Any) -> dict[str, Any]:
    return yaml.safe_load(render(job(name, **fields), "image", "queue", "account"))


def parts(found: dict[str, Any]) -> tuple[Any, Any, Any]:
    """The replicated job, its Job, and its pod."""
    [replicated] = found["spec"]["replicatedJobs"]
    work = replicated["template"]["spec"]
    return replicated, work, work["template"]["spec"]


# --- form ----------------------------------------------------------------------------------------

# What the API takes where the form uses it: a type, a dict of fields (no others), a list of one.
POD = {
    "restartPolicy": str,
    "hostNetwork": bool,
    "dnsPolicy": str,
    "serviceAccountName": str,
    "terminationGracePeriodSeconds": int,
    "nodeSelector": {".*": str},
    "tolerations": [{"key": str, "operator": str, "value": str, "effect": str}],
    "containers": [
        {
            "name": str,
            "image": str,
            "command": [str],
            "env": [{"name": str, "value": str}],
            "ports": [{"containerPort": int}],
            "resources": {"limits": {".*": int}},
        }
    ],
}
EXIT_CODES = {"containerName": str, "operator": str, "values": [int]}
JOB = {
    "backoffLimit": int,
    "completionMode": str,
    "completions": int,
    "parallelism": int,
    "podFailurePolicy": {"rules": [{"action": str, "onExitCodes": EXIT_CODES}]},
    "template": {"spec": POD},
}
JOBSET = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str, "labels": {".*": str}, "annotations": {".*": str}},
    "spec": {
        "failurePolicy": {
            "maxRestarts": int,
            "restartStrategy": str,
            "rules": [{"action": str, "onJobFailureReasons": [str]}],
        },
        "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": JOB}}],
    },
}


def faults(found: Any, form: Any, place: str = "") -> list[str]:
    """The places where `found` has another type than `form`, or a field that is not there."""
    if isinstance(form, type):
        right = type(found) is form  # True is no int
        return [] if right else [f"{place}: {found!r} is not {form.__name__}"]
    if isinstance(form, list):
        if not isinstance(found, list):
            return [f"{place}: not a list"]
        return [line for i, x in enumerate(found) for line in faults(x, form[0], f"{place}[{i}]")]
    if not isinstance(found, dict):
        return [f"{place}: not fields"]
    lines = []
    for name, value in found.items():
        inner = form.get(name, form.get(".*"))
        if inner is None:
            lines.append(f"{place}.{name}: no such field")
        else:
            lines += faults(value, inner, f"{place}.{name}")
    return lines


@pytest.mark.parametrize("name", TOPOLOGIES)
@pytest.mark.parametrize("spot", [False, True])
def test_a_jobset_has_the_form_that_kubernetes_takes(name: str, spot: bool):
    assert not faults(jobset(name, spot=spot, slices=2), JOBSET)


def test_a_wrong_form_is_seen():
    wrong = jobset()
    _, work, pod = parts(wrong)
    work["completions"] = "4"
    pod["resorces"] = {}
    assert len(faults(wrong, JOBSET)) == 2


def test_every_hole_is_filled():
    holes = set(re.findall(r"\$\{(\w+)\}", TEMPLATE.read_text()))
    assert holes
    assert "${" not in render(job("v4-8"), "image", "queue", "account")
    assert isinstance(yaml.safe_load(TEMPLATE.read_text()), dict), "the form itself is YAML"


# --- content -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_a_jobset_asks_for_the_slice_of_the_table(name: str):
    row = topologies.find(name)
    replicated, work, pod = parts(jobset(name, slices=3))
    assert replicated["replicas"] == 3
    assert work["completions"] == work["parallelism"] == row.hosts
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": row.gke_accelerator,
        "cloud.google.com/gke-tpu-topology": row.gke_topology,
    }
    [container] = pod["containers"]
    assert container["resources"]["limits"]["google.com/tpu"] * row.hosts == row.chips


def test_python_is_process_one_and_resumes():
    [container] = parts(jobset())[2]["containers"]
    assert container["command"] == [*COMMAND, "--resume"]
    assert {"name": "JAX_PLATFORMS", "value": "tpu,cpu"} in container["env"]


def test_spot_machines_are_asked_for_and_borne():
    spot, usual = parts(jobset(spot=True))[2], parts(jobset())[2]
    assert spot["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert "cloud.google.com/gke-spot" not in usual["nodeSelector"]
    assert "cloud.google.com/gke-spot" in [each["key"] for each in spot["tolerations"]]
    assert spot["terminationGracePeriodSeconds"] <= 30, "the notice of a spot machine"


def test_the_exit_codes_are_the_launchers():
    found = jobset(retries=7)
    policy = found["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 7
    assert policy["rules"] == [
        {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    ]
    _, work, pod = parts(found)
    [rule] = work["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == list(STOP_CODES)
    assert rule["onExitCodes"]["containerName"] == pod["containers"][0]["name"]
    assert pod["restartPolicy"] == "Never", "which a podFailurePolicy demands"


def test_the_queue_and_the_account_are_named():
    found = jobset()
    assert found["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "queue"
    assert parts(found)[2]["serviceAccountName"] == "account"


# --- SkyPilot ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sky() -> dict[str, Any]:
    return yaml.safe_load((TPU / "sky.yaml").read_text())


def test_the_sky_task_has_the_form_that_skypilot_takes(sky: dict[str, Any]):
    form = {
        "name": str,
        "workdir": str,
        "resources": {
            "infra": str,
            "accelerators": str,
            "accelerator_args": {"runtime_version": str},
            "use_spot": bool,
            "job_recovery": {"max_restarts_on_errors": int, "recover_on_exit_codes": [int]},
        },
        "envs": {".*": str},
        "setup": str,
        "run": str,
    }
    assert sky["envs"].pop("BUCKET") is None, "SkyPilot then demands --env BUCKET"
    assert not faults(sky, form)
    sky["envs"]["BUCKET"] = None


def test_the_sky_task_asks_for_a_slice_of_the_table(sky: dict[str, Any]):
    row = topologies.find(sky["resources"]["accelerators"].removeprefix("tpu-"))
    assert sky["resources"]["accelerator_args"]["runtime_version"] == row.runtime
    codes = sky["resources"]["job_recovery"]["recover_on_exit_codes"]
    assert sorted(codes) == sorted(RESTARTABLE)
    assert "--resume" in sky["run"]
    for name, value in flags.environment(row, "gs://$BUCKET/compiled").items():
        assert name == "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" or value in sky["run"]


@pytest.mark.parametrize("part", ["setup", "run"])
def test_the_sky_scripts_are_sound(sky: dict[str, Any], part: str):
    done = subprocess.run(["bash", "-n"], input=sky[part], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    names = set(re.findall(r"\$\{?(\w+)", sky[part])) - {"HOME", "PATH", "PWD"}
    assert names <= set(sky["envs"]), "every name is given"
