"""What a run needs of a TPU slice, known before it is rented: memory, time at best, and its price.

    python -m tpu.plan NAME PRESET [--field value ...] [--mesh data=-1,fsdp=8] [--seeds N] \\
        --topology v5litepod-256[,v5p-128,...] [--save tpu/plans] [--layers 2,4] [--quick]
    python -m tpu.plan --table            rebuilds tpu/PLANS.md from tpu/plans/*.json

NAME, PRESET and fields are those of `python -m experiments.NAME`. The programs that the run would
compile (`tpu.programs`) are compiled for the slice by libtpu's compiler, which the extra `tpu`
installs and which needs no TPU. Printed for each chip are the bytes of what the run keeps, the
compiler's own peak of memory, operations, bytes through HBM and through the interconnect, and the
time that the slowest of the three needs at least: no step is faster, real ones are slower.

A language model's layers are all alike, and 32 of them take the compiler half an hour: `--layers
2,4` compiles it with two and with four, and extends the line through both to the model's own depth.
Operations and bytes that are sent come out right so; memory does roughly, better from `8,16`.

With `--quick` the compiler looks for a program in an eighth of the time or less, and finds one with
the same operations and collectives that moves up to twice the bytes through HBM, as it keeps less
on the chip. Runs compile without it.

Exit codes: 0 the run fits one of the slices, 1 it fits none (one line each says by how much), 2 the
user can mend it. Without the compiler shapes alone are added up, and the plan says so: what a
program needs beside its arguments is then unknown.

Prices are list prices of a chip and hour on demand in the United States, in dollars, as
https://cloud.google.com/tpu/pricing had them in 2025: good to rank slices by, not to budget with.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from experiments import cli
from jaxalign.core import cost
from jaxalign.core import mesh as meshes
from jaxalign.core.types import UserError
from tpu import compiled, plan_table
from tpu import programs as programs_of
from tpu.programs import PROGRAMS, Program, bytes_a_device
from tpu.topologies import Topology, find

FITS, FITS_NOT, USER_ERROR = 0, 1, 2
QUICK = {"xla_optimization_level": "EFFORT_O0"}
PRICES = {"v4": 3.22, "v5e": 1.20, "v5p": 4.20, "v6e": 2.70}
# What libtpu asks of its surroundings; a compiler needs none of it.
SURROUNDINGS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}
Plan = dict[str, Any]


def has_compiler() -> bool:
    """Whether the TPU's compiler is installed."""
    return importlib.util.find_spec("libtpu") is not None


# --- one slice ------------------------------------------------------------------------------------


def make(
    run: cli.Run,
    topology: Topology,
    *,
    compiling: bool = True,
    layers: tuple[int, int] | None = None,
    quick: bool = False,
) -> Plan:
    """The plan of a run on a slice, as what JSON can hold.

    compiling: with the TPU's compiler; else from shapes, over devices that this process has.
    layers: two depths to compile at, of a language model. quick: with little optimization.
    Raises: UserError where the mesh does not fit the slice.
    """
    devices = slice_devices(topology) if compiling else jax.devices()[: topology.devices]
    mesh = meshes.make_mesh(meshes.parse_mesh(run.config.mesh), devices)
    # Plans are of chips; where a chip is two devices, each has half of it.
    share = topology.devices // topology.chips
    options = (QUICK if quick else {}) if compiling else None

    def needs(program: Program) -> Plan:
        return _program(program, topology, share, options)

    if layers:
        found = _extended(run, mesh, layers, needs)
    else:
        found = [needs(each) for each in PROGRAMS[run.name](run.config, run.seeds, mesh)]
    for each in found:
        _judge(each, topology, share)
    plan: Plan = {
        "name": run.name,
        "preset": run.preset,
        "command": run.command.replace("experiments.", "tpu.plan ", 1),
        "slug": _slug(run.command),
        "topology": topology.name,
        "chips": topology.chips,
        "mesh": dict(mesh.shape),
        "compiled": compiling,
        "layers": layers,
        "quick": quick and compiling,
        "available": topology.available_bytes,
        "programs": found,
        "refused": next((each["refused"] for each in found if each["refused"]), None),
        "versions": _versions(),
    }
    if not plan["refused"]:
        seconds = {name: _total(found, name) for name in ("compute", "memory", "interconnect")}
        plan["seconds"] = sum(each["times"] * max(each["seconds"].values()) for each in found)
        plan["parts"] = seconds
        plan["bound"] = max(seconds, key=lambda name: seconds[name])
        price = PRICES.get(topology.generation)
        plan["price"] = price and price * topology.chips
    return plan


def _extended(
    run: cli.Run,
    mesh: jax.sharding.Mesh,
    layers: tuple[int, int],
    needs: Callable[[Program], Plan],
) -> list[Plan]:
    """The programs at the model's own depth, on the line through two small ones."""
    depth = programs_of.language_sizes(run.config).depth
    few, more = (
        [needs(each) for each in programs_of.r3hf(run.config, run.seeds, mesh, count)]
        for count in layers
    )
    times = (depth - layers[0]) / (layers[1] - layers[0])
    found = [_line(a, b, times) for a, b in zip(few, more, strict=True)]
    for each in found:
        if "peak" in each:  # donated outputs lie where the arguments lay
            each["peak"] = each["arguments"] + each["temporary"] + each["code"]
    return found


def _line(a: Any, b: Any, times: float, name: str = "") -> Any:
    """a + times * (b - a), number by number; what is no number must not differ.

    Activations grow with the depth once its layers need more than the rest of the model; of few
    layers they say too little, so they are never taken to be less than those of the deeper one.
    """
    if isinstance(a, dict) and isinstance(b, dict):
        refused = a.get("refused") or b.get("refused")
        # The compiler says nothing else of what it refuses; collectives may be missing in either.
        names = [each for each in a if each in b] if refused else dict.fromkeys([*a, *b])
        return {each: _line(a.get(each, 0), b.get(each, 0), times, each) for each in names}
    if name == "compile_seconds":
        return a + b
    if name == "times" or not (isinstance(a, int | float) and isinstance(b, int | float)):
        return a or b
    line = a + times * (b - a)
    return max(b, line) if name == "temporary" else line


def slice_devices(topology: Topology) -> Sequence[jax.Device]:
    """The devices of a slice that is not there."""
    from jax.experimental import topologies

    found = topologies.get_topology_desc(
        topology_name=topology.compiler_name, platform="tpu", **topology.compiler_options
    )
    return found.devices


def _versions() -> dict[str, str]:
    names = ("jax", "libtpu") if has_compiler() else ("jax",)
    return {name: importlib.metadata.version(name) for name in names}


def _total(programs: Sequence[Plan], name: str) -> float:
    return sum(each["times"] * each["seconds"][name] for each in programs)


def _program(
    program: Program, topology: Topology, share: int, options: Mapping[str, str] | None
) -> Plan:
    """What one program needs of a chip. options: of the compiler; None does without it."""
    parts = {"held": program.held, "within": program.within, "beside": program.beside}
    found: Plan = {"name": program.name, "times": program.times, "refused": None}
    for name, trees in parts.items():
        found[name] = {what: share * bytes_a_device(tree) for what, tree in trees.items()}
    found["counted"] = share * bytes_a_device(program.arguments)
    counted = cost.count(program.function, *program.arguments, turns=program.turns)
    found["formula"] = counted.flops / topology.chips
    found["exchanged"] = program.exchanged and share * program.exchanged
    if options is not None:
        kernels = counted.kernels / topology.chips
        found |= _compiled(program, share, kernels, dict(options))
    return found


def _judge(found: Plan, topology: Topology, share: int) -> None:
    """Adds whether the program fits, and the least time that it takes."""
    peak = found.get("peak", found["counted"]) + sum(found["beside"].values())
    if not found["refused"] and peak > share * topology.available_bytes:
        room = in_words(share * topology.available_bytes)
        found["refused"] = f"{found['name']}: {in_words(peak)} on a chip exceed its {room}"
    if not found["refused"]:
        found["seconds"] = _seconds(found, topology)


def _compiled(program: Program, share: int, kernels: float, options: dict[str, str]) -> Plan:
    """What the compiler says. kernels: operations in Pallas's, of which it says nothing."""
    began = time.monotonic()
    try:
        made = lower(program).compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"refused": f"{program.name}: {_refusal(str(error))}"}
    took, sizes = time.monotonic() - began, made.memory_analysis()
    does = compiled.tally(made.as_text(), program.turns).times(share)
    held = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return {
        "compile_seconds": round(took, 1),
        "arguments": share * sizes.argument_size_in_bytes,
        "temporary": share * sizes.temp_size_in_bytes,
        "code": share * sizes.generated_code_size_in_bytes,
        "peak": share * (held + sizes.temp_size_in_bytes + sizes.generated_code_size_in_bytes),
        "flops": does.flops + kernels,
        "memory": does.memory,
        "sent": dict(does.sent),
        "calls": dict(does.calls),
    }


def lower(program: Program) -> Any:
    """The program lowered for its arguments' devices; values among them are constants in it."""
    leaves, tree = jax.tree.flatten(program.arguments)
    open_ = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.ShapeDtypeStruct)]

    def run(*given: Any) -> Any:
        full = list(leaves)
        for i, leaf in zip(open_, given, strict=True):
            full[i] = leaf
        return program.function(*jax.tree.unflatten(tree, full))

    counts = [len(jax.tree.leaves(argument)) for argument in program.arguments]
    owner = [i for i, count in enumerate(counts) for _ in range(count)]
    donated = tuple(j for j, i in enumerate(open_) if owner[i] in program.donated)
    made = jax.jit(run, donate_argnums=donated, keep_unused=True)
    return made.lower(*(leaves[i] for i in open_))


def _refusal(message: str) -> str:
    """The compiler's complaint about memory in one line."""
    text = " ".join(message.split())
    found = re.search(r"RESOURCE_EXHAUSTED.*?(?=Total hbm usage|Largest program|$)", text)
    return (found[0] if found else text)[:300].strip()


def _seconds(found: Plan, topology: Topology) -> dict[str, float]:
    """The least that each resource needs; from shapes, arithmetic alone."""
    return {
        "compute": found.get("flops", found["formula"]) / topology.peak_bf16_flops,
        "memory": found.get("memory", 0.0) / topology.hbm_bandwidth,
        "interconnect": sum(found.get("sent", {}).values()) / topology.ici_bandwidth,
    }


# --- words ----------------------------------------------------------------------------------------


def in_words(count: float) -> str:
    """So many bytes, in the largest unit that fits."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def _sizes(parts: Mapping[str, float]) -> str:
    return (
        ", ".join(f"{name} {in_words(size)}" for name, size in parts.items() if size) or "nothing"
    )


def describe(plan: Plan) -> str:
    """The plan as lines for a terminal."""
    mesh = ",".join(f"{name}={size}" for name, size in plan["mesh"].items())
    lines = [
        f"{plan['name']} {plan['preset']} on {plan['topology']}: {plan['chips']} chips, {mesh}"
    ]
    if not plan["compiled"]:
        lines.append("  from shapes alone, as the TPU compiler is not installed (extra `tpu`)")
    if plan["layers"]:
        lines.append("  extended from depths {} and {}".format(*plan["layers"]))
    if plan["quick"]:
        lines.append("  compiled with --quick: bytes through HBM are too many, up to twice")
    for each in plan["programs"]:
        lines += _program_lines(each)
    if plan["refused"]:
        return "\n".join([*lines, f"  does not fit: {plan['refused']}"])
    parts = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in plan["parts"].items())
    lines.append(
        f"  a step takes at least {plan['seconds']:.3g} s, bound by {plan['bound']} ({parts})"
    )
    if plan["price"]:
        steps = plan["price"] * plan["seconds"] / 3.6
        lines.append(
            f"  list price {plan['price']:.2f} $ an hour, {steps:.3g} $ for 1,000 steps at best"
        )
    return "\n".join(lines)


def _program_lines(each: Plan) -> list[str]:
    times = f", {each['times']} times a step" if each["times"] > 1 else ""
    took = f", compiled in {each['compile_seconds']:.0f} s" if "compile_seconds" in each else ""
    lines = [f"  {each['name']}{times}{took}; on each chip"]
    lines.append(f"    keeps       {_sizes(each['held'])}")
    if each["within"]:
        lines.append(f"    meanwhile   {_sizes(each['within'])}")
    if each["beside"]:
        lines.append(f"    beside it   {_sizes(each['beside'])}")
    if "peak" in each:
        work = {"arguments": each["arguments"], "activations": each["temporary"]}
        lines.append(f"    peak        {in_words(each['peak'])} ({_sizes(work)})")
    if "flops" in each:
        lines.append(
            f"    computes    {each['flops']:.3e} FLOP (formula: {each['formula']:.3e}); "
            f"moves {in_words(each['memory'])} through HBM"
        )
        sent = ", ".join(
            f"{in_words(size)} by {each['calls'][name]:.0f} {name}"
            for name, size in each["sent"].items()
        )
        lines.append(f"    sends       {sent or 'nothing'}")
    elif not each["refused"]:
        lines.append(f"    computes    {each['formula']:.3e} FLOP by formula")
    return lines


def cheapest(plans: Sequence[Plan]) -> str:
    """Which of the slices that fit does a step for the least money, at best."""
    fit = [plan for plan in plans if not plan["refused"]]
    priced = [plan for plan in fit if plan["price"]]
    if not priced:
        return f"{len(fit)} of {len(plans)} fit, none of known price"
    best = min(priced, key=lambda plan: plan["price"] * plan["seconds"])
    return f"cheapest that fits: {best['topology']} ({len(fit)} of {len(plans)} fit)"


# --- command line ---------------------------------------------------------------------------------


class Asked(NamedTuple):
    """What a command line asks for. folder: to save plans in. layers, quick: as in `make`."""

    run: cli.Run
    slices: list[Topology]
    folder: Path | None
    layers: tuple[int, int] | None
    quick: bool


def parse(argv: Sequence[str]) -> Asked:
    """What is asked for.

    Raises: UserError for anything wrong, in one line.
    """
    words, own = list(argv), {"--topology": "", "--save": "", "--layers": ""}
    for flag in own:
        if flag in words:
            at = words.index(flag)
            if at + 1 == len(words):
                raise UserError(f"{flag}: a value is missing; give one")
            own[flag] = words[at + 1]
            del words[at : at + 2]
    if quick := "--quick" in words:
        words.remove("--quick")
    if len(words) < 2 or words[0].startswith("-") or words[1].startswith("-"):
        raise UserError(
            "say NAME PRESET, as in python -m tpu.plan hiql small --topology v5litepod-8"
        )
    if words[0] not in PROGRAMS:
        raise UserError(f"{words[0]!r}: there are plans for {', '.join(PROGRAMS)}; give one")
    if not own["--topology"]:
        raise UserError("--topology is missing: name slices, such as v5litepod-8,v5p-16")
    module = importlib.import_module(f"experiments.{words[0]}")
    run = cli.parse(words[0], module.PRESETS, words[1], words[1:])
    slices = [find(name) for name in own["--topology"].split(",")]
    folder = Path(own["--save"]) if own["--save"] else None
    return Asked(run, slices, folder, _layers(run, own["--layers"]), quick)


def _layers(run: cli.Run, text: str) -> tuple[int, int] | None:
    if not text:
        return None
    found = re.fullmatch(r"(\d+),(\d+)", text)
    if run.name != "r3hf" or not found or not 0 < int(found[1]) < int(found[2]):
        raise UserError(
            f"--layers {text}: give two depths of r3hf's language model, the smaller one first, "
            "such as 2,4"
        )
    return int(found[1]), int(found[2])


def _slug(command: str) -> str:
    """A file's name from `python -m experiments.NAME PRESET --flag value ...`."""
    words = command.partition("experiments.")[2]
    return re.sub(r"[^A-Za-z0-9_.]+", "-", words).strip("-")


def prepare(slices: Sequence[Topology], *, compiling: bool) -> None:
    """Settings of a process that plans; before the first use of a device."""
    jax.config.update("jax_platforms", "cpu")
    for name, value in SURROUNDINGS.items():
        os.environ.setdefault(name, value)
    if not compiling:
        jax.config.update("jax_num_cpu_devices", max(each.devices for each in slices))


def main(argv: Sequence[str]) -> int:
    """Prints the plans; the exit code says whether one fits."""
    if list(argv) == ["--table"]:
        print(plan_table.build())
        return FITS
    run, slices, folder, layers, quick = parse(argv)
    prepare(slices, compiling=has_compiler())
    plans = []
    for topology in slices:
        plan = make(run, topology, compiling=has_compiler(), layers=layers, quick=quick)
        plans.append(plan)
        print(describe(plan), flush=True)
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            how = "-quick" if plan["quick"] else ""
            path = folder / f"{_slug(run.command)}-{topology.name}{how}.json"
            path.write_text(json.dumps(plan, indent=1) + "\n")
    if all(plan["refused"] for plan in plans):
        return FITS_NOT
    if len(plans) > 1:
        print(cheapest(plans))
    return FITS


if __name__ == "__main__":
    try:
        raise SystemExit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(USER_ERROR) from None
