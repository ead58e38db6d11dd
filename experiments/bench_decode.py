"""How fast responses are sampled, and beside what; a part of `python -m experiments.bench`.

`decode` times prompts and responses of fixed lengths, on small models of two families, against
`generate` of transformers (torch) with the same weights, which travel in a Hugging Face folder.
Both sample at temperature 1 and never stop early; torch gets the threads that it likes best.
`tail` times responses of very different lengths with a batch that shrinks none, one, two, ... times
while it decodes.

All are measured in turns in one process, beside a copy of a large array, which tells the bandwidth
that the machine has left. What is counted:
  - `ratio`: seconds over those of `jaxalign` in the same turn, the median over turns;
  - `tokens_per_second`: new tokens of all rows, the prompt's time included;
  - `prefill_seconds`: a response of one token; `step_seconds`: what each further token takes;
  - `bandwidth_share`: the bytes that a step cannot avoid reading, each parameter that takes part
    and the keys and values of the tokens so far, over what a copy moves in the time of a step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import importlib.util
import logging
import os
import statistics as stats
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any, Literal, NamedTuple

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
from jaxalign.core.types import Array, LanguageModel, Params, UserError
from jaxalign.models import folders, gpt2, llama
from jaxalign.ops.sampling import Sampling
from jaxalign.rollout.decode import Constraint, decode

Family = Literal["gpt2", "llama"]
PAD, COPIED_BYTES = 0, 2**28


@dataclasses.dataclass(frozen=True)
class Bench:
    """Sizes and comparisons."""

    case: Literal["decode", "tail"]
    families: tuple[Family, ...] = ("gpt2", "llama")
    depth: int = 4
    width: int = 256
    heads: int = 4
    vocabulary: int = 16384
    rows: int = 16  # the batch
    prompt: int = 64  # tokens
    length: int = 128  # new tokens
    halvings: tuple[int, ...] = (0,)  # each is timed; the first is what others are compared with
    mean_length: float = 1.0  # of the responses, as a share of `length`; exponential when below 1
    repeats: int = 9  # of every implementation, in turns
    torch: bool = True  # compare with transformers, where torch is installed
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("depth", "width", "heads", "rows", "prompt", "repeats"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)}: must be at least 1")
        if self.length < 2:
            raise UserError(f"length = {self.length}: a step is timed from 2 new tokens on")
        if not 0 < self.mean_length <= 1:
            raise UserError(f"mean_length = {self.mean_length}: must be above 0 and at most 1")
        if self.torch and self.mean_length < 1:
            raise UserError("torch with mean_length below 1: they end otherwise; use --no-torch")


def decode_against_transformers() -> Bench:
    """Responses of one length, against transformers."""
    return Bench("decode")


def decode_tail() -> Bench:
    """Responses of many lengths, by how often the batch may shrink."""
    return Bench(
        "tail", ("llama",), rows=64, halvings=(0, 1, 2, 3), mean_length=0.2, torch=False, repeats=7
    )


CASES = {"decode": decode_against_transformers, "tail": decode_tail}


# --- what is timed -------------------------------------------------------------------------------


class Problem(NamedTuple):
    """What all implementations are given. ends: `[B] i32`, tokens of each response."""

    family: Family
    config: folders.Config
    model: LanguageModel
    params: Params
    ids: Array
    mask: Array
    ends: Array


def make_problem(bench: Bench, family: Family) -> Problem:
    """A network with random weights, whose head spreads its choice widely, and random prompts."""
    names = ("vocabulary", "width", "depth", "heads")
    sizes = {name: getattr(bench, name) for name in names}
    context = bench.prompt + bench.length
    if family == "gpt2":
        config = gpt2.Config(**sizes, inner=4 * bench.width, context=context)
    else:
        config = llama.Config(
            **sizes,
            inner=8 * bench.width // 3 // 32 * 32 or 32,
            kv_heads=max(bench.heads // 2, 1),
            head_dim=bench.width // bench.heads,
            context=context,
            tied=True,
        )
    model, chance = folders.build(config), np.random.default_rng(bench.seed)
    shape = (bench.rows, bench.prompt)
    drawn = chance.exponential(bench.mean_length * bench.length, bench.rows)
    ends = np.clip(np.ceil(drawn), 1, bench.length).astype(np.int32)
    return Problem(
        family,
        config,
        model,
        jax.jit(model.init)(jax.random.key(bench.seed)),
        jnp.asarray(chance.integers(1, bench.vocabulary, shape), jnp.int32),
        jnp.ones(shape, bool),
        jnp.asarray(ends if bench.mean_length < 1 else np.full_like(ends, bench.length)),
    )


def ends_at(ends: Array) -> Constraint:
    """Token 0 at the end of each response and nowhere else."""

    def mask(state: tuple[Array, Array], logits: Array) -> Array:
        step, end = state
        stop = (jnp.arange(logits.shape[-1]) == PAD)[None, :]
        return jnp.where(stop == (step + 1 == end)[:, None], logits, -jnp.inf)

    return Constraint((jnp.zeros_like(ends), ends), mask, lambda s, token: (s[0] + 1, s[1]))


def ours(bench: Bench, problem: Problem, length: int, halvings: int, name: str) -> Variant:
    """Our program for responses of `length` tokens at most."""

    @jax.jit
    def run(params: Params, ids: Array, mask: Array, ends: Array, key: Array) -> Any:
        constraint = ends_at(ends) if bench.mean_length < 1 else None
        return decode(
            problem.model,
            params,
            ids,
            mask,
            key,
            length=length,
            sampling=Sampling(),
            stop=(PAD,) if constraint else (),
            pad=PAD,
            constraint=constraint,
            halvings=halvings,
        )

    def prepare(turn: int) -> Thunk:
        inputs = (problem.params, problem.ids, problem.mask, problem.ends)
        return lambda: jax.block_until_ready(run(*inputs, jax.random.key(turn)))

    return Variant(name, prepare, lambda decoded: int(decoded.length.sum()))


def copying() -> Variant:
    """Reads and writes a large array with all threads."""
    source = jnp.zeros(COPIED_BYTES // 4, jnp.float32)
    add = jax.jit(lambda x: x + 1)
    return Variant("copy", lambda turn: lambda: jax.block_until_ready(add(source)), lambda _: 0)


def in_transformers(config: folders.Config, params: Params) -> Any:
    """The same network with the same weights in transformers, by way of a folder."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        folders.save(path, config, params)
        return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@contextlib.contextmanager
def transformers_variants(bench: Bench, problem: Problem) -> Generator[list[Variant]]:
    """`generate` for all new tokens and for one, at the number of threads that is fastest."""
    import torch
    import transformers

    model = in_transformers(problem.config, problem.params)
    before = torch.get_num_threads()
    make = functools.partial(_theirs, torch, transformers, model, problem)
    choices = sorted({1, os.cpu_count() or 1})
    try:
        whole, threads = fastest([(make(bench.length, n, "transformers"), n) for n in choices])
        yield [whole, make(1, threads, "transformers_prefill")]
    finally:
        torch.set_num_threads(before)
        gc.collect()


def _theirs(
    torch: Any,
    transformers: Any,
    model: Any,
    problem: Problem,
    length: int,
    threads: int,
    name: str,
) -> Variant:
    """`generate` for `length` tokens of every row."""
    ids = torch.tensor(np.asarray(problem.ids), dtype=torch.long)
    mask = torch.ones_like(ids)
    how = transformers.GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=length,
        min_new_tokens=length,
        pad_token_id=PAD,
        use_cache=True,
    )

    def generate() -> Any:
        with torch.inference_mode():
            return model.generate(ids, attention_mask=mask, generation_config=how)

    def prepare(turn: int) -> Thunk:
        torch.set_num_threads(threads)
        torch.manual_seed(turn)
        return generate

    def new_tokens(result: Any) -> int:
        return result.shape[0] * (result.shape[1] - problem.ids.shape[1])

    return Variant(name, prepare, new_tokens, f"eager, {threads} threads")


# --- what is reported ----------------------------------------------------------------------------


def step_bytes(problem: Problem) -> float:
    """Bytes that an average decode step must read: parameters once, keys and values so far."""
    leaves = jax.tree_util.tree_leaves_with_path(problem.params)
    tied, unread = getattr(problem.config, "tied", True), 0
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        # Of a table only the rows looked up are read, unless it is the head as well.
        if name.endswith("embedding") and not (tied and name.startswith("token")):
            unread += leaf.nbytes
    total = sum(leaf.nbytes for _, leaf in leaves)
    rows, prompt = problem.ids.shape
    cache = jax.eval_shape(functools.partial(problem.model.empty_cache, rows, 1))
    slot = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    return total - unread + slot * (prompt + float(problem.ends.mean()) / 2)


def describe(
    bench: Bench, problem: Problem, name: str, note: str, timings: dict[str, Timing]
) -> dict[str, Any]:
    """One line of the output."""
    seconds, tokens = timings[name].median, stats.median(timings[name].counts)
    prefill = timings[_prefill_of(name)].median
    step = (seconds - prefill) / (bench.length - 1)
    bandwidth = 2 * COPIED_BYTES / timings["copy"].median
    return {
        "case": bench.case,
        "model": problem.family,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(problem.params)),
        "implementation": name,
        "note": note,
        **summary(timings, name),
        "tokens_per_second": tokens / seconds,
        "prefill_seconds": prefill,
        "step_seconds": step,
        "bandwidth_bytes_per_second": bandwidth,
        # When rows end early the last steps are few and cheap: no bound is known.
        "bandwidth_share": step_bytes(problem) / bandwidth / step
        if bench.case == "decode"
        else None,
        "rows": bench.rows,
        "prompt": bench.prompt,
        "length": bench.length,
        "new_tokens": tokens,
    }


def _prefill_of(name: str) -> str:
    return "transformers_prefill" if name.startswith("transformers") else f"{COMPILED}_prefill"


COLUMNS = {
    "model": Column("model"),
    "implementation": Column("implementation"),
    "median s": Column("median_seconds", "{:.4f}"),
    "ratio": Column("ratio", "{:.2f}"),
    "cpu ratio": Column("cpu_ratio", "{:.2f}"),
    "tokens/s": Column("tokens_per_second", "{:.0f}"),
    "prefill s": Column("prefill_seconds", "{:.4f}"),
    "step s": Column("step_seconds", "{:.5f}"),
    "of bandwidth": Column("bandwidth_share", "{:.0%}"),
    "compile s": Column("compile_seconds", "{:.1f}"),
    "": Column("note"),
}


def run_family(bench: Bench, family: Family) -> list[dict[str, Any]]:
    """Measures one model; a line for each implementation."""
    problem = make_problem(bench, family)
    first, *others = bench.halvings
    shown = [ours(bench, problem, bench.length, first, COMPILED)]
    shown += [ours(bench, problem, bench.length, n, f"{COMPILED}_halvings_{n}") for n in others]
    aside = [ours(bench, problem, 1, 0, f"{COMPILED}_prefill"), copying()]
    with contextlib.ExitStack() as stack:
        if bench.torch and importlib.util.find_spec("torch"):
            theirs = stack.enter_context(transformers_variants(bench, problem))
            shown, aside = [*shown, theirs[0]], [*aside, theirs[1]]
        elif bench.torch:
            print("torch is not installed: not compared with", file=sys.stderr)
        timings = measure([*shown, *aside], bench.repeats)
    return [describe(bench, problem, v.name, v.note, timings) for v in shown]


def run(bench: Bench) -> list[dict[str, Any]]:
    """Measures and prints; returns the lines."""
    lines = [line for family in bench.families for line in run_family(bench, family)]
    show(lines, COLUMNS)
    return lines
