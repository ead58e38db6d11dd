"""How fast PPO on a language model is, and beside what; a part of `python -m experiments.bench`.

`rlhf` times one whole iteration of `methods.r3hf` on small GPT-2 networks: sample responses, score
every prefix with the reward model, weigh the tokens under the reference policy, values,
redistributed rewards and advantages, then all optimizer steps of policy and critic. Ours is one
compiled program on all devices. Where torch is installed the same iteration runs on the networks
and `generate` of transformers (`bench_rlhf_torch`), eager, on the processor, with the same weights,
at the threads that are fastest. Responses end at a stop token, which random weights seldom draw:
almost all have full length.

Sampling is timed on its own as well. What is counted:
  - `ratio`: seconds over those of `jaxalign` in the same turn, the median over turns;
  - `tokens_per_second`: response tokens over the seconds of the whole iteration;
  - `decode_seconds`, `decode_share`: sampling alone, and its part in the iteration;
  - `decode_ratio`, `rest_ratio`: as `ratio`, for sampling and for what is left without it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import statistics as stats
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.measuring import (
    COMPILED,
    Column,
    Thunk,
    Timing,
    Variant,
    fastest,
    measure,
    show,
    summary,
)
from jaxalign.core import mesh as meshes
from jaxalign.core.state import TrainState
from jaxalign.core.types import Array, Params, UserError
from jaxalign.data.preferences import Prompts
from jaxalign.methods import r3hf
from jaxalign.methods.r3hf import Config
from jaxalign.models import folders, gpt2
from jaxalign.models.scalar_head import with_scalar_head
from jaxalign.rollout import decode

PAD, STOP, TORCH = 0, 1, "transformers"


@dataclasses.dataclass(frozen=True)
class Bench:
    """Sizes and comparisons."""

    r3hf: Config = Config(rollouts=32)
    depth: int = 4
    width: int = 256
    heads: int = 4
    vocabulary: int = 8192
    prompt: int = 32  # tokens
    response: int = 64  # tokens at most
    prompts: int = 256  # to draw from
    repeats: int = 9  # of every implementation, in turns
    torch: bool = True  # compare with transformers, where torch is installed
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("depth", "width", "heads", "prompt", "response", "prompts", "repeats"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)}: must be at least 1")
        if self.vocabulary < 3:
            raise UserError(
                f"vocabulary = {self.vocabulary}: must be at least 3, for padding, stop and a word"
            )


def rlhf() -> Bench:
    """A whole PPO iteration on a language model, against transformers."""
    return Bench()


CASES = {"rlhf": rlhf}


# --- what is timed -------------------------------------------------------------------------------


class Problem(NamedTuple):
    """What all implementations are given. state: not donated, copied for each run."""

    network: gpt2.Config
    config: Config
    parts: r3hf.Parts
    task: r3hf.Task
    state: TrainState


def make_problem(bench: Bench) -> Problem:
    """Random networks, and random prompts that fill their slots."""
    sizes = {name: getattr(bench, name) for name in ("vocabulary", "width", "depth", "heads")}
    context = bench.prompt + bench.response
    network = gpt2.Config(**sizes, inner=4 * bench.width, context=context)
    model = folders.build(network)
    scalar = with_scalar_head(model)
    keys = jax.random.split(jax.random.key(bench.seed), 3)
    policy = jax.jit(model.init)(keys[0])
    reward, critic = (jax.jit(scalar.init)(key) for key in keys[1:])
    chance = np.random.default_rng(bench.seed)
    ids = chance.integers(STOP + 1, bench.vocabulary, (bench.prompts, bench.prompt), np.int32)
    decoding = r3hf.Decoding(bench.response, (STOP,), PAD)
    parts = r3hf.Parts(model, scalar.scores, scalar.scores, judge_nothing, decoding)
    task = r3hf.Task(Prompts(jnp.asarray(ids), jnp.ones(ids.shape, bool)), reward, ())
    return Problem(network, bench.r3hf, parts, task, r3hf.init(bench.r3hf, policy, critic))


def judge_nothing(params: Params, ids: Array, mask: Array) -> Array:
    """A true score that costs nothing, as no training reads it."""
    del params, mask
    return jnp.zeros(len(ids))


def compiled_variants(problem: Problem) -> list[Variant]:
    """The iteration as a run uses it, on all devices, the state donated; and its sampling."""
    config, parts, mesh = problem.config, problem.parts, meshes.make_mesh()
    rows, everywhere = meshes.batch_sharding(mesh), meshes.replicated(mesh)
    given = jax.device_put((problem.state, problem.task), everywhere)
    iteration = r3hf.make_iteration(parts, config, rows)

    @jax.jit
    def sample(policy: Params, task: r3hf.Task, key: Array) -> decode.Decoded:
        return r3hf.sample(parts, config, rows, policy, task, key).decoded

    def prepare(run: int) -> Thunk:
        (state, task), key = given, jax.device_put(jax.random.key(run), everywhere)
        state = jax.block_until_ready(jax.tree.map(jnp.copy, state))
        return lambda: jax.block_until_ready(iteration(state, task, key))

    def prepare_sample(run: int) -> Thunk:
        (state, task), key = given, jax.device_put(jax.random.key(run), everywhere)
        return lambda: jax.block_until_ready(sample(state.params["policy"], task, key))

    note = f"one program, {mesh.size} devices"
    return [
        Variant(COMPILED, prepare, lambda result: int(result[0].extra.tokens), note),
        Variant(decode_of(COMPILED), prepare_sample, lambda decoded: int(decoded.length.sum())),
    ]


def torch_variants(problem: Problem) -> list[Variant]:
    """The iteration on networks of transformers, and its sampling."""
    import torch

    from experiments.bench_rlhf_torch import Iteration

    made = Iteration(problem)

    def make(name: str, work: Thunk, threads: int) -> Variant:
        def prepare(run: int) -> Thunk:
            torch.set_num_threads(threads)
            torch.manual_seed(run)
            return work

        return Variant(name, prepare, int, f"eager, {threads} threads")

    whole = functools.partial(make, TORCH, made.run)
    choices = sorted({1, os.cpu_count() or 1})
    chosen, threads = fastest([(whole(n), n) for n in choices], trials=2)
    alone = make(decode_of(TORCH), lambda: made.sample().response.sum(), threads)
    return [chosen, alone]


def decode_of(name: str) -> str:
    """The name of an implementation's sampling alone."""
    return f"{name}_decode"


# --- what is reported ----------------------------------------------------------------------------


def describe(
    bench: Bench, problem: Problem, variant: Variant, timings: Mapping[str, Timing]
) -> dict[str, Any]:
    """One line of the output."""
    name, config = variant.name, problem.config
    whole, alone = timings[name].median, timings[decode_of(name)].median
    ratio = {part: _ratio(timings, name, part) for part in ("decode", "rest")}
    return {
        "case": "rlhf",
        "implementation": name,
        "note": variant.note,
        **summary(timings, name),
        "tokens_per_second": stats.median(timings[name].counts) / whole,
        "decode_seconds": alone,
        "decode_share": alone / whole,
        "decode_ratio": ratio["decode"],
        "rest_ratio": ratio["rest"],
        "new_tokens": stats.median(timings[name].counts),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(problem.state.params["policy"])),
        "rows": config.rollouts,
        "prompt": bench.prompt,
        "response": bench.response,
        "optimizer_steps": config.epochs * config.minibatches,
    }


def _ratio(timings: Mapping[str, Timing], name: str, part: str) -> float:
    """Seconds of a part over ours in the same turn, the median over turns."""

    def seconds(name: str) -> list[float]:
        turns = zip(timings[name].spent, timings[decode_of(name)].spent, strict=True)
        return [d.seconds if part == "decode" else w.seconds - d.seconds for w, d in turns]

    turns = zip(seconds(name), seconds(COMPILED), strict=True)
    return stats.median(theirs / own for theirs, own in turns)


COLUMNS = {
    "implementation": Column("implementation"),
    "median s": Column("median_seconds", "{:.4f}"),
    "p10": Column("p10_seconds", "{:.4f}"),
    "p90": Column("p90_seconds", "{:.4f}"),
    "ratio": Column("ratio", "{:.2f}"),
    "cpu ratio": Column("cpu_ratio", "{:.2f}"),
    "tokens/s": Column("tokens_per_second", "{:.0f}"),
    "decode s": Column("decode_seconds", "{:.4f}"),
    "of it": Column("decode_share", "{:.0%}"),
    "ratio of decode": Column("decode_ratio", "{:.2f}"),
    "of the rest": Column("rest_ratio", "{:.2f}"),
    "compile s": Column("compile_seconds", "{:.1f}"),
    "peak MB": Column("peak_memory_bytes", "{:.0f}", 1e6),
    "": Column("note"),
}


def run(bench: Bench) -> list[dict[str, Any]]:
    """Measures and prints; returns the lines.

    Raises: UserError where the responses cannot be spread over the devices.
    """
    part = bench.r3hf.rollouts // (bench.r3hf.minibatches * bench.r3hf.micro_batches)
    what = "r3hf.rollouts / (minibatches * micro_batches) ="
    meshes.check_divisible(what, part, meshes.make_mesh())
    problem = make_problem(bench)
    pairs: list[Sequence[Variant]] = [compiled_variants(problem)]
    if bench.torch and importlib.util.find_spec("torch"):
        pairs.append(torch_variants(problem))
    elif bench.torch:
        print("torch is not installed: not compared with", file=sys.stderr)
    timings = measure([variant for pair in pairs for variant in pair], bench.repeats)
    lines = [describe(bench, problem, whole, timings) for whole, _ in pairs]
    show(lines, COLUMNS)
    return lines
