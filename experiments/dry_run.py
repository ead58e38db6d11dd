"""What a run on Stable Diffusion would cost on the devices at hand, without its weights.

Bytes are of one device, operations of a whole stage over all devices. For TPU slices that are not
at hand `python -m tpu.plan` says more.
"""

from __future__ import annotations

import jax

from experiments.stable_diffusion import Experiment
from jaxalign.core import cost
from jaxalign.core import mesh as meshes
from tpu.plan import in_words, lower
from tpu.programs import Program, b2_diffurl, bytes_a_device

# Parameters above which a CPU is not asked to compile: it takes minutes, and a CPU's memory says
# little about an accelerator's.
MOST_ON_CPU = 1 << 30


def describe(config: Experiment) -> str:
    """The costs of the first arm, as lines for a terminal.

    Raises: UserError for a mesh that does not fit the devices, and folders whose configurations
        cannot be read.
    """
    mesh = meshes.make_mesh(meshes.parse_mesh(config.mesh))
    programs = b2_diffurl(config, [config.seed], mesh)
    held = programs[-1].held
    count = sum(leaf.size for leaf in jax.tree.leaves(held["parameters"]))
    shape = ",".join(f"{name}={size}" for name, size in mesh.shape.items())
    lines = [
        f"{count:,} parameters; mesh {shape} of {mesh.devices.flat[0].device_kind}",
        "on each device:",
    ]
    lines += [f"  {name:14} {in_words(bytes_a_device(tree))}" for name, tree in held.items()]
    trajectories = {**programs[0].beside, **programs[0].within}
    lines += [
        f"  {name:14} {in_words(bytes_a_device(tree))}"
        for name, tree in trajectories.items()
        if name not in held
    ]
    total = 0.0
    for program in programs:
        counted = cost.count(program.function, *program.arguments, turns=program.turns).flops
        total += program.times * counted
        lines.append(f"{program.name}, {program.times} times a stage: {counted:.3e} FLOP")
        lines.append(f"  {_measured(program, bytes_a_device(held['parameters']))}")
    lines.append(f"a stage: {total:.3e} FLOP, {total / mesh.size:.3e} on each device")
    return "\n".join(lines)


def _measured(program: Program, parameters: int) -> str:
    """XLA's own account of the program's memory."""
    if jax.default_backend() == "cpu" and parameters > MOST_ON_CPU:
        return "activations: not asked of a CPU; `python -m tpu.plan` compiles for TPU slices"
    sizes = lower(program).compile().memory_analysis()
    return (
        f"XLA: arguments {in_words(sizes.argument_size_in_bytes)}, activations "
        f"{in_words(sizes.temp_size_in_bytes)}, code {in_words(sizes.generated_code_size_in_bytes)}"
    )
