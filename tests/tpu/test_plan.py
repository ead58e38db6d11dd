"""Plans of slices: sizes against arithmetic, what does not fit is refused, and the command line."""

import dataclasses
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import cli, metra, seed_axis, skill_worlds
from jaxalign.core import cost
from jaxalign.core import mesh as meshes
from jaxalign.core.types import UserError
from tpu import plan, plan_table, programs
from tpu.topologies import Topology, find

ROOT = Path(__file__).parents[2]
SLICE = find("v5litepod-8")


def run_of(name, *words):
    module = importlib.import_module(f"experiments.{name}")
    return cli.parse(name, module.PRESETS, words[0], list(words))


def plan_of(*words):
    return plan.make(run_of(*words), SLICE, compiling=False)


@pytest.fixture
def uncounted(monkeypatch):
    """Operations are not counted, which takes seconds and has tests of its own."""
    monkeypatch.setattr(cost, "count", lambda *_, **__: cost.Cost(1e12))


# --- sizes ----------------------------------------------------------------------------------------


def test_each_chip_has_its_share_of_the_seeds(uncounted):
    found = plan_of("metra", "tiny", "--seeds", "16")["programs"][0]["held"]
    config = metra.tiny()
    # Two seeds a chip: phi, policy, two critics and two slow ones of 16 units, two numbers.
    phi = (2 * 16 + 16) + (16 * 16 + 16) + (16 * 2 + 2)
    policy = (4 * 16 + 16) + (16 * 16 + 16) + 2 * (16 * 2 + 2)
    critic = (6 * 16 + 16) + (16 * 16 + 16) + (16 * 1 + 1)
    trained = phi + policy + 2 * critic + 2
    assert found["parameters"] == 2 * 4 * (trained + 2 * critic)
    assert found["optimizer"] == pytest.approx(2 * 4 * 2 * trained, rel=0.02)
    rows, visited = 4 * config.buffer * (2 + 2 + 2 + 2 + 1), (2 * skill_worlds.REACH) ** 2
    assert found["buffer"] == pytest.approx(2 * (rows + visited), rel=0.01)


def test_seeds_that_do_not_divide_lie_everywhere(uncounted):
    three = plan_of("hiql", "tiny", "--seeds", "3")["programs"][0]
    eight = plan_of("hiql", "tiny", "--seeds", "8")["programs"][0]
    assert three["held"]["parameters"] == 3 * eight["held"]["parameters"]


@pytest.mark.parametrize("seeds", [3, 16])
def test_the_plan_deals_seeds_out_as_a_run_does(seeds):
    mesh = meshes.make_mesh()
    state = seed_axis.OF._replace(  # ty: ignore
        step=np.zeros(()), params={"w": np.zeros((seeds, 8))}, opt_state=(), slow=(), extra=()
    )
    real, rows = seed_axis.spread(state, seeds, mesh)
    abstract, planned = programs._deal(jax.eval_shape(lambda: state), seeds, mesh)
    same = jax.tree.map(
        lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), real, abstract
    )
    assert all(jax.tree.leaves(same))
    assert rows == planned


TINY_LLAMA = dataclasses.replace(
    programs.LLAMA_8B,
    vocabulary=256, width=32, inner=64, depth=2, heads=4, kv_heads=2, head_dim=8,
)  # fmt: skip


def test_ppo_spreads_its_models_and_its_cache(monkeypatch, uncounted):
    monkeypatch.setattr(programs, "LLAMA_8B", TINY_LLAMA)
    words = "nectar --mesh fsdp=-1 --rl.micro-batches 1 --source.prompt 8 --source.response 4"
    run = run_of("r3hf", *words.split(), "--source.pairs", "64")
    found = plan.make(run, SLICE, compiling=False)
    rollout, update = found["programs"]
    block = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64  # and norms, which are small
    policy, body = 2 * 256 * 32 + 2 * block, 256 * 32 + 2 * block
    assert update["held"]["parameters"] == pytest.approx(4 * (policy + body) / 8, rel=0.05)
    assert update["held"]["optimizer"] == pytest.approx(8 * (policy + body) / 8, rel=0.05)
    # Keys and values of 2 layers, 2 heads of 8, in bfloat16, for 16 rows and 12 slots a chip.
    assert rollout["within"]["cache"] == 2 * 2 * (2 * 8) * 2 * 16 * 12


def test_two_depths_are_extended_to_the_models_own(monkeypatch, uncounted):
    monkeypatch.setattr(programs, "LLAMA_8B", dataclasses.replace(TINY_LLAMA, depth=7))
    words = "nectar --mesh fsdp=-1 --rl.micro-batches 1 --source.prompt 8 --source.response 4"
    run = run_of("r3hf", *words.split(), "--source.pairs", "64")
    whole = plan.make(run, SLICE, compiling=False)
    extended = plan.make(run, SLICE, compiling=False, layers=(1, 3))
    assert extended["programs"] == whole["programs"] and extended["seconds"] == whole["seconds"]


TINY_UNET = dataclasses.replace(
    programs.SD14, size=16, widths=(32, 32), depth=(1, 0), heads=(2, 2), layers=1, context=16
)
TINY_VAE = dataclasses.replace(programs.VAE, widths=(32, 32), layers=1)
TINY_CLIP = dataclasses.replace(
    programs.CLIP_H, width=32, inner=64, depth=1, heads=2, side=28, projected=16
)


@pytest.fixture
def tiny_pictures(monkeypatch):
    monkeypatch.setitem(programs.PIPELINES, "", TINY_UNET)
    monkeypatch.setattr(programs, "VAE", TINY_VAE)
    monkeypatch.setattr(programs, "CLIP_H", TINY_CLIP)


def test_stable_diffusion_counts_chunks_and_trees(tiny_pictures, uncounted):
    words = "sd14-template1 --b2.groups 64 --b2.steps 4 --b2.suffix-start 2 --b2.suffix-stop 4"
    found = plan.make(
        run_of("b2_diffurl", *words.split(), "--groups-per-device", "2"), SLICE, compiling=False
    )
    rollout, update = found["programs"]
    assert rollout["times"] == 64 // 8 // 2
    # Latents of 5 positions, 8 groups a chip, trunk and 5 branches, 16 x 16 x 4; densities; leaves.
    latents = 4 * 16 * 16 * 4 * (5 * 8 * 6 + 8 * 5)
    assert update["held"]["trajectories"] == pytest.approx(latents, rel=0.01)
    assert rollout["beside"] == {"trajectories": update["held"]["trajectories"]}


# --- verdicts -------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_with_exit_code_1(monkeypatch, capsys, uncounted):
    monkeypatch.setattr(plan, "has_compiler", lambda: False)
    monkeypatch.setattr(plan, "prepare", lambda *_, **__: None)
    words = ["metra", "tiny", "--seeds", "16", "--topology", "v5litepod-4,v5litepod-8"]
    assert plan.main(words) == plan.FITS
    text = capsys.readouterr().out
    assert "from shapes alone" in text and "cheapest that fits: v5litepod-" in text
    monkeypatch.setattr(Topology, "available_bytes", 1000)
    assert plan.main(words) == plan.FITS_NOT
    assert "does not fit: training: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("metra", "say NAME PRESET"),
        ("starc tiny --topology v4-8", "there are plans for metra, hiql"),
        ("metra tiny", "--topology is missing"),
        ("metra tiny --topology", "--topology: a value is missing"),
        ("metra tiny --topology v5e-8", "'v5e-8' is not known"),
        ("metra tinny --topology v4-8", "did you mean tiny"),
        ("metra tiny --topology v4-8 --layers 2,4", "two depths of r3hf's"),
        ("metra --quick --topology v4-8", "say NAME PRESET"),
        ("r3hf nectar --topology v4-8 --layers 4,2", "the smaller one first"),
    ],
)
def test_mistakes_are_named(words, complaint):
    with pytest.raises(UserError, match=complaint):
        plan.parse(words.split())


def test_a_refusal_keeps_the_compilers_figures():
    text = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
        "hbm. Used 29.57G of 15.75G hbm. Exceeded hbm capacity by 13.82G.\n\nTotal hbm usage >= ..."
    )
    assert plan._refusal(text).endswith(
        "Used 29.57G of 15.75G hbm. Exceeded hbm capacity by 13.82G."
    )
    assert plan_table._figures(text) == "29.57G of 15.75G"


def stored():
    return [json.loads(path.read_text()) for path in (ROOT / "tpu" / "plans").rglob("*.json")]


# --- the document ---------------------------------------------------------------------------------


def test_the_document_is_that_of_the_stored_plans(tmp_path):
    readme = (ROOT / "tpu" / "README.md").read_text()
    emptied = readme.split(plan_table.BEGIN)[0] + plan_table.BEGIN + plan_table.END
    emptied += readme.split(plan_table.END)[1]
    (tmp_path / "README.md").write_text(emptied)
    plan_table.build(target=tmp_path / "PLANS.md", readme=tmp_path / "README.md")
    for name in ("PLANS.md", "README.md"):
        assert (tmp_path / name).read_text() == (ROOT / "tpu" / name).read_text()


def test_the_compilers_sizes_are_those_of_arithmetic():
    assert {found["name"] for found in stored()} == set(programs.PROGRAMS)
    plans = [found for found in stored() if found["compiled"] and not found["refused"]]
    for each in (each for found in plans for each in found["programs"]):
        # What the compiler allots to the arguments, in tiles, is what their shapes say.
        assert each["arguments"] == pytest.approx(each["counted"], rel=0.05)
        assert each["formula"] == pytest.approx(each["flops"], rel=0.25)


# Parameters of the models in the stored plans, as their makers count them.
LLAMA, HEAD, LLAMA_SCALAR = 8_030_261_248, 128_256 * 4096, 4097
PIPELINES = {"": 859_520_964, "sdxl": 2_567_463_684}


@pytest.mark.parametrize("found", [pytest.param(p, id=p["slug"]) for p in stored()])
def test_stored_parameters_are_those_of_the_models(found):
    held = found["programs"][-1]["held"]
    parts = found["mesh"].get("fsdp", 1)
    if found["name"] == "r3hf":
        parameters = 4 * (2 * LLAMA - HEAD + LLAMA_SCALAR) / parts
        assert held["optimizer"] == pytest.approx(2 * parameters, rel=0.05)
    elif found["name"] == "b2_diffurl":
        model = "sdxl" if "--model sdxl" in found["command"] else ""
        parameters = 4 * PIPELINES[model] / parts  # and small adapters
    else:
        return  # small networks, whose sum another test makes
    assert held["parameters"] == pytest.approx(parameters, rel=0.05)


# --- with the TPU's compiler ----------------------------------------------------------------------


def planned(*words):
    return python("-m", "tpu.plan", *words)


def python(*words):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, timeout=280)


@pytest.mark.parity
@pytest.mark.skipif(not plan.has_compiler(), reason="the extra `tpu` is missing")
@pytest.mark.parametrize("quick", [[], ["--quick"]])
def test_a_preset_compiled_for_four_chips(quick):
    done = planned("metra", "tiny", "--seeds", "4", "--topology", "v5litepod-4", *quick)
    assert done.returncode == plan.FITS, done.stderr[-2000:]
    assert "compiled in" in done.stdout and "a step takes at least" in done.stdout
    assert ("bytes through HBM are too many" in done.stdout) == bool(quick)


ATTENTION = """
import sys
import jax, jax.numpy as jnp
from jaxalign.core import mesh as meshes
from jaxalign.models import fused_attention
from tpu import plan
from tpu.topologies import find

topology = find("v5litepod-4")
plan.prepare([topology], compiling=True)
rows = meshes.batch_sharding(meshes.make_mesh({"data": 4}, plan.slice_devices(topology)))
array = jax.ShapeDtypeStruct((8, int(sys.argv[1]), 8, 40), jnp.bfloat16, sharding=rows)

def total(query, key, value):
    return fused_attention.attend(query, key, value, rows=rows).astype(jnp.float32).sum()

made = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(array, array, array).compile()
print(made.as_text().count('"tpu_custom_call"'), made.memory_analysis().temp_size_in_bytes)
"""


@pytest.mark.parity
@pytest.mark.skipif(not plan.has_compiler(), reason="the extra `tpu` is missing")
@pytest.mark.parametrize(("length", "kernels"), [(4096, 3), (256, 0)])
def test_long_attention_is_a_kernel_on_a_tpu(length, kernels):
    done = python("-c", ATTENTION, str(length))
    assert done.returncode == 0, done.stderr[-2000:]
    calls, activations = map(int, done.stdout.split())
    assert calls == kernels
    assert activations < 2 * 8 * length * length  # the weights of one head of one row, in bfloat16


@pytest.mark.parity
@pytest.mark.skipif(not plan.has_compiler(), reason="the extra `tpu` is missing")
def test_a_preset_that_the_compiler_refuses():
    big = ("metra", "tiny", "--seeds", "4", "--buffer", "2000000000", "--topology", "v5litepod-4")
    done = planned(*big)
    assert done.returncode == plan.FITS_NOT, done.stderr[-2000:]
    assert "does not fit: training: RESOURCE_EXHAUSTED" in done.stdout
