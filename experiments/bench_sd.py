"""How fast Stable Diffusion's U-Net samples and learns; a part of `python -m experiments.bench`.

`sd-rollout` times 20 steps of DDIM with guidance 5, the adapters merged, every latent and density
kept. `sd-update` times one optimizer step on adapters of rank 4 by the clipped surrogate of a batch
of (row, step) pairs, guided as well. `sd` times both. Ours are `denoise`, `pair_loss` and
`accumulate` as a run uses them. Where torch and diffusers are installed `UNet2DConditionModel` does
the same with torch's fused attention, eager and compiled (`bench_sd_torch`), on the same weights,
which travel in a folder. Weights are random: the time does not depend on them.

Nothing is timed that is not seen to be the same: from given noise torch must come to our last
latents, and from given pairs to our gradient of the adapters.

On an accelerator the network is that of Stable Diffusion 1.4, products are in bfloat16, one device
is used, and each implementation is tried at larger and larger batches until its half of the memory
is full, updates with and without rematerialisation; the fastest of each is measured, in turns. On a
CPU the network is small, in float32, on all cores. What is counted:
  - `ratio`: seconds an image over those of `jaxalign` in the same turn, the median over turns; the
    images of an update are its pairs; `cpu_ratio`: the same of the processor time of all threads;
  - `flops`: of all products and convolutions of our program without rematerialisation, an image;
    `peak_share`: what is done of them in a second, over the device's peak in bfloat16;
  - `compile_seconds`: what the first call took longer than the next one;
  - `peak_memory_bytes`: of the program with its weights, by XLA's account of ours and by the most
    that torch has allocated, which it counts on a GPU only.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import statistics as stats
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from experiments import bench_sd_programs as programs
from experiments.bench_sd_programs import SIZES, Case, Pairs, Problem, Program, Setting
from experiments.measuring import (
    COMPILED,
    Column,
    Timing,
    Variant,
    measure,
    say,
    show,
    summary,
    timed,
)
from jaxalign.core import mesh as meshes
from jaxalign.core.types import UserError

EAGER, TORCH_COMPILED = "diffusers", "diffusers_compiled"


@dataclasses.dataclass(frozen=True)
class Bench:
    """Sizes and comparisons."""

    cases: tuple[Case, ...] = ("rollout", "update")
    size: Literal["auto", "tiny", "small", "full"] = "auto"  # full on accelerators, small on a CPU
    batches: tuple[int, ...] = ()  # images, or pairs, to try, smallest first; () for the size's own
    steps: int = 20  # of the sampler
    repeats: int = 5  # of every implementation, in turns
    torch: bool = True  # compare with diffusers, where torch and it are installed
    torch_compile: bool = True  # and with what torch.compile makes of it, which takes minutes
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "repeats", *(["batches"] if self.batches else [])):
            value = getattr(self, name)
            if min(value if isinstance(value, tuple) else (value,)) < 1:
                raise UserError(f"{name} = {value}: must be at least 1; give positive numbers")


def sd() -> Bench:
    """Stable Diffusion's U-Net, sampling and learning, against diffusers."""
    return Bench()


def sd_rollout() -> Bench:
    """Sampling pictures by Stable Diffusion's U-Net, against diffusers."""
    return Bench(("rollout",))


def sd_update() -> Bench:
    """An optimizer step on adapters of Stable Diffusion's U-Net, against diffusers."""
    return Bench(("update",))


CASES = {"sd": sd, "sd-rollout": sd_rollout, "sd-update": sd_update}


# --- the best of each ----------------------------------------------------------------------------


class Tried(NamedTuple):
    """A program that ran, at its setting. seconds: of the second run."""

    name: str
    program: Program
    setting: Setting
    seconds: float
    compile_seconds: float

    @property
    def speed(self) -> float:
        return self.setting.batch / self.seconds


Make = Callable[[Setting], Program]


def attempts(name: str, make: Make, settings: Sequence[Setting]) -> list[Tried]:
    """The settings that fit into memory, each compiled, run, and run again.

    Raises: UserError when not even the first fits.
    """
    tried: list[Tried] = []
    full: set[bool] = set()  # the kinds, with and without rematerialisation, that need too much
    for setting in settings:
        if setting.remat in full:
            continue
        try:
            tried.append(attempt(name, make, setting))
        except Exception as error:
            if not out_of_memory(error):
                raise
            full.add(setting.remat)
            say(f"{name}: no memory for {setting}")
    if not tried:
        few = settings[0].batch
        raise UserError(f"{name}: no memory for {few} images at once; give fewer by --batches")
    return tried


def attempt(name: str, make: Make, setting: Setting) -> Tried:
    """One of them."""

    def compile_and_run() -> Program:
        program = make(setting)
        program.run(0)
        return program

    first, program = timed(compile_and_run)
    again, _ = timed(lambda: program.run(1))
    say(f"{name}: {setting}: {setting.batch / again.seconds:.3g} images/s")
    return Tried(name, program, setting, again.seconds, max(first.seconds - again.seconds, 0.0))


def out_of_memory(error: Exception) -> bool:
    """As XLA and torch say it."""
    return "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower()


# How far outcomes may differ, of their length. Late steps have little noise and gradients divide by
# it: those of bfloat16 are a fifth away from those of float32, torch's as ours.
TOLERANCE = {"float32": 1e-2, "bfloat16": 0.4}


class Differs(Exception):
    """An implementation does not do the work that is timed."""


def check_same(problem: Problem, ours: np.ndarray, theirs: np.ndarray, name: str) -> float:
    """The distance of two outcomes over the length of ours.

    Raises: Differs where it is more than rounding.
    """
    if ours.shape != theirs.shape:
        raise Differs(f"{name}: comes to {theirs.shape}, ours to {ours.shape}")
    error = float(np.linalg.norm(ours - theirs) / np.linalg.norm(ours))
    allowed = TOLERANCE[problem.size.dtype]
    if not error < allowed:
        raise Differs(f"{name}: its outcome is {error:.2g} away from ours, allowed {allowed:g}")
    return error


def choose(
    problem: Problem, makes: Mapping[str, Make], settings: Sequence[Setting]
) -> tuple[list[Tried], dict[str, float]]:
    """Each implementation at its fastest setting, and how far its outcome is from ours.

    A compiler of torch that fails is named and left out.
    """
    chosen, errors = [], {}
    for name, make in makes.items():
        try:
            tried = attempts(name, make, settings)
        except Exception as error:
            if name != TORCH_COMPILED:
                raise
            reason = str(error).strip().split("\n")[0]
            print(f"torch.compile failed: {type(error).__name__}: {reason}", file=sys.stderr)
            continue
        ours = makes[COMPILED](tried[0].setting).outcome()
        errors[name] = check_same(problem, ours, tried[0].program.outcome(), name)
        chosen.append(max(tried, key=lambda each: each.speed))
    return chosen, errors


def implementations(
    bench: Bench, problem: Problem, case: Case, pairs: Pairs | None
) -> dict[str, Make]:
    """Ours, and torch's where it is there; each makes a program once for a setting."""
    makes: dict[str, Make] = {COMPILED: programs.Ours(problem, case, pairs).program}
    missing = [name for name in ("torch", "diffusers") if not importlib.util.find_spec(name)]
    if bench.torch and missing:
        print(f"{' and '.join(missing)} not installed: not compared with", file=sys.stderr)
    elif bench.torch:
        from experiments.bench_sd_torch import Diffusers

        theirs = Diffusers(problem, case, pairs)
        makes[EAGER] = functools.partial(theirs.program, compiled=False)
        if bench.torch_compile:
            makes[TORCH_COMPILED] = functools.partial(theirs.program, compiled=True)
    return {name: functools.cache(make) for name, make in makes.items()}


# --- what is reported ----------------------------------------------------------------------------

# Dense bfloat16 operations a second, as the makers state them, by what JAX calls the device.
# TPU v4 to v6e: cloud.google.com/tpu/docs, a chip; a device is half a chip of TPU7x.
PEAKS = {
    "NVIDIA H200": 989.4e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA A100": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,
}


def device_peak(kind: str) -> float | None:
    """Operations a second of the device that JAX calls `kind`, by the longest name that fits."""
    fitting = [name for name in PEAKS if kind.startswith(name)]
    return PEAKS[max(fitting, key=len)] if fitting else None


def variant(tried: Tried) -> Variant:
    """For `measure`."""

    def prepare(turn: int) -> Callable[[], Any]:
        return lambda: tried.program.run(turn)

    batch = tried.setting.batch
    kind = "rematerialised" if tried.setting.remat else ""
    note = ", ".join(filter(None, (f"{batch} at once", kind, tried.program.where)))
    return Variant(tried.name, prepare, lambda _: batch, note)


def describe(
    case: Case,
    problem: Problem,
    tried: Tried,
    timings: Mapping[str, Timing],
    flops: float,
    error: float,
) -> dict[str, Any]:
    """One line of the output."""
    timing = timings[tried.name]
    per_image = timings[COMPILED].counts[0] / timing.counts[0]  # batches may differ
    said = summary(timings, tried.name)
    speed = stats.median(timing.counts) / timing.median
    kind = jax.devices()[0].device_kind
    peak = device_peak(kind) if problem.size.dtype == "bfloat16" else None
    return {
        "case": f"sd-{case}",
        "implementation": tried.name,
        "note": variant(tried).note,
        **said,
        "ratio": said["ratio"] * per_image,
        "cpu_ratio": said["cpu_ratio"] * per_image,
        "compile_seconds": tried.compile_seconds,
        "peak_memory_bytes": tried.program.memory(),
        "images_per_second": speed,
        "flops": flops,
        "flops_per_second": flops * speed,
        "peak_share": None if peak is None else flops * speed / peak,
        "difference": error,
        "batch": tried.setting.batch,
        "remat": tried.setting.remat,
        "steps": problem.config.steps,
        "side": problem.size.side,
        "widths": list(problem.size.widths),
        "dtype": problem.size.dtype,
        "device_kind": kind,
    }


COLUMNS = {
    "case": Column("case"),
    "implementation": Column("implementation"),
    "median s": Column("median_seconds", "{:.4f}"),
    "p10": Column("p10_seconds", "{:.4f}"),
    "p90": Column("p90_seconds", "{:.4f}"),
    "ratio": Column("ratio", "{:.2f}"),
    "cpu ratio": Column("cpu_ratio", "{:.2f}"),
    "images/s": Column("images_per_second", "{:.3g}"),
    "GFLOP/s": Column("flops_per_second", "{:.1f}", 1e9),
    "of peak": Column("peak_share", "{:.0%}"),
    "peak MB": Column("peak_memory_bytes", "{:.0f}", 1e6),
    "compile s": Column("compile_seconds", "{:.1f}"),
    "difference": Column("difference", "{:.1g}"),
    "": Column("note"),
}


def run_case(bench: Bench, problem: Problem, case: Case) -> list[dict[str, Any]]:
    """Checks, tries and measures; a line for each implementation."""
    size = problem.size
    pairs = programs.make_pairs(problem, size.batches[0]) if case == "update" else None
    kinds = size.remat if case == "update" else (False,)
    settings = [Setting(batch, remat) for batch in size.batches for remat in kinds]
    chosen, errors = choose(problem, implementations(bench, problem, case, pairs), settings)
    timings = measure([variant(tried) for tried in chosen], bench.repeats)
    flops = programs.image_flops(problem, case, pairs)
    return [describe(case, problem, each, timings, flops, errors[each.name]) for each in chosen]


def run(bench: Bench) -> list[dict[str, Any]]:
    """Measures and prints; returns the lines.

    Raises: UserError where a batch cannot be spread over the devices, or none fits into memory.
    """
    # Both libraries get the same share of an accelerator; read when the first device is started.
    if bench.torch:
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.48")
    chosen = bench.size
    if chosen == "auto":
        chosen = "small" if jax.default_backend() == "cpu" else "full"
    size = SIZES[chosen]
    size = dataclasses.replace(size, batches=tuple(sorted(bench.batches or size.batches)))
    for batch in size.batches:
        meshes.check_divisible("batches", batch, programs.own_mesh())
    problem = programs.make_problem(size, bench.steps, bench.seed)
    lines = [line for case in bench.cases for line in run_case(bench, problem, case)]
    show(lines, COLUMNS)
    return lines
