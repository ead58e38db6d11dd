"""How often each method's compiled step speaks over the mesh, on (data=4, fsdp=2).

Seeds that are dealt out have nothing to say to each other. Where a batch is shared, gradients and
metrics are summed, and what estimators ask of whole groups is gathered; a number that rises means
that the partitioner found a worse way.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable

import jax
import pytest
from jax.sharding import Mesh

from experiments import b2_diffurl as b2_presets
from experiments import cli, downstream, pictures, seed_axis, skill_worlds, skills, starc_figure1
from experiments import hiql as hiql_presets
from experiments import metra as metra_presets
from experiments import r3hf as r3hf_presets
from jaxalign.core import mesh as meshes
from jaxalign.envs import skill_tasks
from jaxalign.methods import b2_diffurl
from tpu import programs

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return meshes.make_mesh({"data": 4, "fsdp": 2})


def collectives(text: str) -> dict[str, int]:
    """Instructions of each kind in a compiled program; those in loops count once."""
    found = Counter(re.findall(rf"= \S+ ({'|'.join(KINDS)})(?:-start)?\(", text))
    grouped = re.findall(rf"= \([^=]*\) ({'|'.join(KINDS)})(?:-start)?\(", text)
    return dict(found + Counter(grouped))


def compiled(program: programs.Program) -> str:
    arguments = jax.tree.map(
        lambda leaf: (
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            if not isinstance(leaf, jax.ShapeDtypeStruct)
            else leaf
        ),
        program.arguments,
    )
    function = program.function
    function = function if hasattr(function, "lower") else jax.jit(function)
    return function.lower(*arguments).compile().as_text()


def metra_dealt(mesh: Mesh) -> str:
    config = dataclasses.replace(metra_presets.tiny(), arms=("metra",))
    (program,) = programs.metra(config, range(8), mesh)
    return compiled(program)


def hiql_dealt(mesh: Mesh) -> str:
    (program,) = programs.hiql(hiql_presets.tiny(), range(8), mesh)
    return compiled(program)


def hiql_shared(mesh: Mesh) -> str:
    (program,) = programs.hiql(hiql_presets.tiny(), range(1), mesh)
    return compiled(program)


def r3hf_programs(mesh: Mesh) -> list[programs.Program]:
    """PPO of a small Llama, whose rules halve its matrices."""
    sizes = dataclasses.replace(
        programs.LLAMA_8B,
        vocabulary=256, width=32, inner=64, depth=2, heads=4, kv_heads=2, head_dim=8,
    )  # fmt: skip
    words = "--rl.micro-batches 1 --rl.rollouts 64 --source.prompt 8 --source.response 4"
    run = cli.parse("r3hf", r3hf_presets.PRESETS, "tiny", ["nectar", *words.split()])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "LLAMA_8B", sizes)
        return programs.r3hf(run.config, [0], mesh)


def r3hf_rollout(mesh: Mesh) -> str:
    return compiled(r3hf_programs(mesh)[0])


def r3hf_update(mesh: Mesh) -> str:
    return compiled(r3hf_programs(mesh)[1])


def b2_stage(mesh: Mesh) -> str:
    config = dataclasses.replace(b2_presets.tiny(), arms=("ddpo",))
    world = pictures.make_world(config)
    networks = pictures.make_networks(world, config.network)
    base = {
        "text": networks.text.init(jax.random.key(0)),
        "net": networks.net.init(jax.random.key(1)),
    }
    lab = pictures.Lab(world, networks, base, mesh)
    b2 = pictures.ARMS["ddpo"](config.b2)
    task = pictures.make_task(lab, b2, world.train)
    state = b2_diffurl.init(b2, base["net"], task.prompts, jax.random.key(0), pictures.LORA_RULE)
    state, key = jax.device_put((state, jax.random.key(0)), meshes.replicated(mesh))
    stage = pictures.make_stage(lab, config, b2, None)
    return stage.lower(state, task, key).compile().as_text()


def downstream_dealt(mesh: Mesh) -> str:
    config, skilled = downstream.tiny(), dataclasses.replace(metra_presets.tiny(), arms=("metra",))
    environment, seeds = skill_worlds.make(skilled.environment, skilled.physics), range(8)
    lab = downstream.Lab(skill_tasks.make(config.control, environment), (), mesh)
    own = skilled.metra
    learned = skills.start_state(skills.metra, own, environment, skilled.buffer, seeds)
    learned = skills.learner(learned)._replace(opt_state={}, slow={})
    low = downstream.Skills(skills.metra, own, seed_axis.spread(learned, len(seeds), mesh)[0])
    high = downstream.chooser(config, "metra", own)
    state = downstream.start_state(high, own, lab.task, seeds)
    state, key = seed_axis.spread(state, len(seeds), mesh)[0], jax.random.key(0)
    train = downstream.make_training(high, low, lab, config, seeds)
    key = jax.device_put(key, meshes.replicated(mesh))
    return train.lower(state, (low.state, ()), key).compile().as_text()


def starc_figure(mesh: Mesh) -> str:
    evaluate = starc_figure1.compiled(mesh, 4, 2, 0.9, 2, 3)
    keys = jax.device_put(jax.random.split(jax.random.key(0), 8), meshes.batch_sharding(mesh))
    return evaluate.lower(keys).compile().as_text()


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (metra_dealt, {}),
        (hiql_dealt, {}),
        (hiql_shared, {"all-reduce": 2}),
        (r3hf_rollout, {"all-reduce": 3, "all-gather": 55, "all-to-all": 8}),
        (r3hf_update, {"all-reduce": 8, "all-gather": 100, "reduce-scatter": 28, "all-to-all": 8}),
        (b2_stage, {"all-reduce": 7, "all-gather": 6}),
        (downstream_dealt, {}),
        (starc_figure, {}),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_step_speaks_no_more_than_it_must(
    step: Callable[[Mesh], str], expected: dict[str, int], mesh: Mesh
):
    found = collectives(step(mesh))
    assert found.keys() == expected.keys()
    assert all(found[kind] <= most for kind, most in expected.items()), found
