"""How fast it is, and beside what: `python -m experiments.bench CASE`.

    rollout, update, stage    B2-DiffuRL on pictures, here
    decode, tail              responses of language models, in `bench_decode`
    rlhf                      a whole PPO iteration on a language model, in `bench_rlhf`
    hiql, attempts            offline goal-conditioned learning and its judging, in `bench_hiql`
    metra                     skills: episodes, buffer and gradient steps, in `bench_metra`
    starc, val                distances between rewards, and regret, in `bench_starc`
    sd, sd-rollout, sd-update Stable Diffusion's U-Net against diffusers, in `bench_sd`

Here the compiled program at the size of the `sprites` preset is timed against the same algorithm as
Python loops over compiled single steps (`bench_loops`) and, where torch is installed, against the
same network and algorithm in torch (`bench_torch`), eager and compiled, at the threads and
micro-batch that torch likes best. Weights are random: the time does not depend on them. One JSON
line for each implementation on stdout, a table on stderr.

What is counted:
  - `ratio`: seconds over those of `jaxalign` in the same turn, the median over turns;
  - `cpu_seconds`, `cpu_ratio`: the same of the processor time of all threads, which a busy machine
    changes less;
  - `compile_seconds`: what the first run took longer than the median one;
  - `network_evaluations`: rows through the network, in sampling and forward in training;
  - `flops`: those of its matrix products by formula, of a trained pair three times a forward pass
    (four under a KL penalty), padding not counted;
  - `peak_memory_bytes`: the device's peak where it tells, else that of the whole process while this
    implementation ran.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import statistics as stats
import sys
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import (
    bench_decode,
    bench_hiql,
    bench_metra,
    bench_rlhf,
    bench_sd,
    bench_starc,
    cli,
)
from experiments.b2_diffurl import sprites
from experiments.bench_loops import Batched, Loop, Pieces, Released
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
from experiments.pictures import (
    ALPHAS,
    ARMS,
    LORA_RULE,
    Experiment,
    Network,
    make_networks,
    make_world,
)
from jaxalign.core import mesh as meshes
from jaxalign.core.state import TrainState
from jaxalign.core.types import Params, UserError
from jaxalign.data.world import World
from jaxalign.methods import b2_diffurl
from jaxalign.ops import diffusion
from jaxalign.rollout.diffusion import Predict, guided

Case = Literal["rollout", "update", "stage"]


@dataclasses.dataclass(frozen=True)
class Bench:
    """Sizes and comparisons."""

    case: Case
    b2: b2_diffurl.Config  # its split stays at suffix_start
    network: Network = Network()
    repeats: int = 15  # of every implementation, in turns
    loops: bool = True  # compare with Python loops
    torch: bool = True  # compare with torch, where it is installed
    seed: int = 0

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise UserError(f"repeats = {self.repeats}: must be at least 1")


def preset(case: Case) -> Bench:
    """The arm `official` of `sprites`, as in its first stages."""
    config = ARMS["official"](sprites().b2)
    return Bench(case, dataclasses.replace(config, suffix_stop=config.suffix_start))


def rollout() -> Bench:
    """Sampling the trees of a stage."""
    return preset("rollout")


def update() -> Bench:
    """Selection and all optimizer steps of a stage, on given pictures."""
    return preset("update")


def stage() -> Bench:
    """A whole stage: sample, score, select, update."""
    return preset("stage")


CASES = {
    "rollout": rollout,
    "update": update,
    "stage": stage,
    **bench_decode.CASES,
    **bench_rlhf.CASES,
    **bench_hiql.CASES,
    **bench_metra.CASES,
    **bench_starc.CASES,
    **bench_sd.CASES,
}


# --- what is timed -------------------------------------------------------------------------------


class Problem(NamedTuple):
    """What all implementations are given. state: not donated, copied for each run."""

    world: World
    config: b2_diffurl.Config
    predict: Predict
    task: b2_diffurl.Task
    state: TrainState
    samples: b2_diffurl.Samples
    rewards: jax.Array


def make_problem(bench: Bench) -> Problem:
    """The sprites world with a random network, and one rollout for the case `update`."""
    # The clock must not grow the suffix from run to run.
    config = dataclasses.replace(bench.b2, suffix_stop=bench.b2.suffix_start, growth="clock")
    world = make_world(Experiment(world="sprites", b2=config))
    networks = make_networks(world, bench.network)
    keys = jax.random.split(jax.random.key(bench.seed), 3)

    @jax.jit
    def random_network(tokens: jax.Array) -> tuple[Params, jax.Array, jax.Array]:
        text, empty = networks.text.init(keys[0]), jnp.zeros_like(tokens[:1])
        embedded = (networks.text.apply(text, rows) for rows in (tokens, empty))
        return everywhere_random(networks.net.init(keys[1]), keys[1]), *embedded

    params, context, null = random_network(world.train.tokens)
    task = b2_diffurl.Task(
        diffusion.ddim_sampler(ALPHAS, config.steps, eta=config.eta, prediction="v"),
        context,
        null[0],
        jnp.asarray(world.train.target),
        world.reward_params,
    )
    state = b2_diffurl.init(config, params, len(context), keys[1], LORA_RULE)
    predict = guided(networks.net.apply, config.guidance)
    shape, groups = world.image_shape, config.groups
    draw = jax.jit(functools.partial(b2_diffurl.sample, predict, config, groups, shape, None))
    samples = draw(state, task, keys[2])
    score = jax.jit(
        lambda s, task: world.rewards["mixed"](s.pictures, _batch(config, task, s), task.reward)
    )
    return Problem(world, config, predict, task, state, samples, score(samples, task))


def _batch(
    config: b2_diffurl.Config, task: b2_diffurl.Task, samples: b2_diffurl.Samples
) -> dict[str, Any]:
    return b2_diffurl._reward_batch(config, task, samples.prompt)


def everywhere_random(params: Params, key: jax.Array) -> Params:
    """Initial parameters moved a little, so that none is zero and every gradient flows."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    moved = [w + 0.02 * jax.random.normal(k, w.shape) for w, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, moved)


def pairs_of(before: TrainState, after: Any) -> int:
    """Pairs trained on, read off a state's counters; a rollout's samples have none."""
    state = after[0] if isinstance(after, tuple) and isinstance(after[0], TrainState) else after
    if not isinstance(state, TrainState):
        return 0
    return int(state.extra.trained_pairs - before.extra.trained_pairs)


def run_key(run: int) -> jax.Array:
    """The key of a repeat, the same for all implementations."""
    return jax.random.key(1000 + run)


def compiled_variant(problem: Problem, case: Case) -> Variant:
    """The programs of `b2_diffurl` as a run uses them: on all devices, the state donated."""
    predict, config, shape = problem.predict, problem.config, problem.world.image_shape
    mesh = meshes.make_mesh()
    rows, everywhere = meshes.batch_sharding(mesh), meshes.replicated(mesh)
    given = jax.device_put((problem.state, problem.task), everywhere)
    pictures = jax.device_put((problem.samples, problem.rewards), everywhere)
    optimizer = b2_diffurl.make_optimizer(config)
    draw = functools.partial(b2_diffurl.sample, predict, config, config.groups, shape, rows)
    sample = jax.jit(draw)
    train = jax.jit(
        functools.partial(b2_diffurl.update, predict, config, optimizer, rows=rows),
        donate_argnums=0,
    )
    reward = problem.world.rewards["mixed"]
    whole = b2_diffurl.make_stage(
        predict, config, shape, b2_diffurl.pictures_are_latents, reward, rows
    )

    def prepare(run: int) -> Thunk:
        (state, task), key = given, jax.device_put(run_key(run), everywhere)
        if case == "rollout":
            return lambda: jax.block_until_ready(sample(state, task, key))
        state = jax.block_until_ready(jax.tree.map(jnp.copy, state))
        if case == "update":
            return lambda: jax.block_until_ready(train(state, task, *pictures, key))
        return lambda: jax.block_until_ready(whole(state, task, key))

    return Variant(COMPILED, prepare, functools.partial(pairs_of, problem.state))


def loop_variant(problem: Problem, case: Case, name: str, loop: Loop, note: str) -> Variant:
    """A Python loop under its name."""
    samples = problem.samples
    if isinstance(loop, Released):  # which keeps its record on the host
        samples = jax.device_get(samples)

    def prepare(run: int) -> Thunk:
        state, task, key = problem.state, problem.task, run_key(run)
        if case == "rollout":
            return lambda: jax.block_until_ready(loop.sample(state, task, key))
        if case == "update":
            return lambda: jax.block_until_ready(
                loop.update(state, task, samples, problem.rewards, key)
            )
        return lambda: jax.block_until_ready(loop.stage(state, task, key))

    return Variant(name, prepare, functools.partial(pairs_of, problem.state), note)


def loop_variants(problem: Problem, case: Case) -> list[Variant]:
    """The loop of the released code, the same with larger micro-batches, and the kindest one."""
    reward = problem.world.rewards["mixed"]
    pieces = Pieces(problem.predict, problem.config, problem.world.image_shape, reward)
    released = "branches in turn, latents to the host, {} rows a micro-batch at one step"
    return [
        loop_variant(problem, case, "loop_released", Released(pieces, 2), released.format(2)),
        loop_variant(problem, case, "loop_16_rows", Released(pieces, 16), released.format(16)),
        loop_variant(
            problem, case, "loop_batched", Batched(pieces), "branches in one call, no waits"
        ),
    ]


# --- torch ---------------------------------------------------------------------------------------


def torch_variants(problem: Problem, network: Network, case: Case) -> list[Variant]:
    """Eager and compiled torch, each at the setting that a quick trial found fastest."""
    import torch

    from experiments.bench_torch import Setting

    torch.manual_seed(0)
    make = functools.partial(torch_variant, problem, network, case)
    threads = sorted({1, os.cpu_count() or 1})
    micro = (0,) if case == "rollout" else (0, 64, 128)
    settings = [Setting(t, m, False) for t in threads for m in micro]
    eager, best = fastest([(make("torch_eager", s), s) for s in settings])
    chosen = [eager]
    try:
        # Compiling takes minutes: with the threads that were best, and the shapes fixed.
        settings = [
            best._replace(micro_batch=m, compiled=True) for m in micro if m or len(micro) == 1
        ]
        chosen.append(fastest([(make("torch_compiled", s), s) for s in settings])[0])
    except Exception as error:  # no compiler, or one that fails: say so and go on
        reason = str(error).strip().split("\n")[0]
        print(f"torch.compile failed: {type(error).__name__}: {reason}", file=sys.stderr)
    return chosen


def torch_variant(
    problem: Problem, network: Network, case: Case, name: str, setting: Any
) -> Variant:
    """torch at one `bench_torch.Setting`, with weights and prompts of the problem."""
    import torch

    from experiments import bench_torch

    world, config, task = problem.world, problem.config, problem.task
    width, depth, heads = dataclasses.astuple(network)
    net = bench_torch.PatchTransformer(world.image_shape, world.patch, width, depth, heads)
    net.load(problem.state.params["model"])
    # The reward is ours on both sides: two copies of a batch of pictures are all that it costs.
    score = jax.jit(
        lambda pictures, prompt, task: world.rewards["mixed"](
            pictures, b2_diffurl._reward_batch(config, task, prompt), task.reward
        )
    )

    def rewards(pictures: np.ndarray, prompt: np.ndarray) -> np.ndarray:
        return np.array(score(pictures, prompt, task))

    made = bench_torch.Stage(net, config, task.sampler, task.context, rewards, setting)
    latents, density = (
        np.array(a) for a in (problem.samples.record.latents, problem.samples.record.log_density)
    )
    record = bench_torch.Record(
        torch.tensor(np.asarray(problem.samples.prompt)),
        torch.tensor(latents[:, :, 1:].reshape(len(latents), -1, *world.image_shape)),
        torch.tensor(density[:, :, 1:].reshape(len(density), -1)),
    )
    given = torch.tensor(np.asarray(problem.rewards))

    def prepare(run: int) -> Thunk:
        torch.set_num_threads(setting.threads)
        torch.manual_seed(run)
        made.history = [torch.zeros_like(old) for old in made.history]
        return {
            "rollout": made.sample,
            "update": lambda: made.update(record, given),
            "stage": made.run,
        }[case]

    read = (lambda result: 0) if case == "rollout" else int
    return Variant(name, prepare, read, str(setting))


# --- what is reported ----------------------------------------------------------------------------


def forward_flops(network: Network, shape: tuple[int, ...], patch: int, words: int) -> int:
    """Multiplications and additions of one row's matrix products in the patch transformer."""
    d, n, inside = network.width, shape[0] * shape[1] // patch**2, patch * patch * shape[2]
    attention = n * d * 3 * d + words * d * 2 * d + 2 * n * (n + words) * d + n * d * d
    block = attention + d * 6 * d + 2 * n * d * 4 * d
    return 2 * (2 * n * inside * d + 3 * d * d + d + network.depth * block)


def sampled_rows(config: b2_diffurl.Config) -> int:
    """Rows through the network in one rollout: each stretch once, twice under guidance."""
    splits = np.asarray(b2_diffurl.split_points(config, jnp.int32(config.suffix_start)))
    bounds, rows, total = [0, *splits.tolist(), config.steps], config.groups, 0
    for level, factor in enumerate((1, *config.branches)):
        rows *= factor
        total += rows * (bounds[level + 1] - bounds[level])
    return total * (1 if config.guidance == 1 else 2)


def describe(
    bench: Bench, problem: Problem, variant: Variant, timings: dict[str, Timing]
) -> dict[str, Any]:
    """One line of the output."""
    config, timing = problem.config, timings[variant.name]
    seconds, pairs = timing.median, stats.median(timing.counts)
    guidance = 1 if config.guidance == 1 else 2
    sampled, trained = 0 if bench.case == "update" else sampled_rows(config), guidance * pairs
    world = problem.world
    forward = forward_flops(bench.network, world.image_shape, world.patch, world.vocabulary.length)
    # With adapters the gradients of the base's own products are spared: no formula here knows them.
    passes = 4 if config.kl_weight else 3
    flops = None if config.lora_rank else forward * (sampled + passes * trained)
    return {
        "case": bench.case,
        "implementation": variant.name,
        "note": variant.note,
        **summary(timings, variant.name),
        "images_per_second": config.groups * config.leaves / seconds,
        "network_evaluations_per_second": (sampled + trained) / seconds,
        "flops": flops,
        "flops_per_second": None if flops is None else flops / seconds,
        "trained_pairs": pairs,
    }


COLUMNS = {
    "implementation": Column("implementation"),
    "median s": Column("median_seconds", "{:.4f}"),
    "p10": Column("p10_seconds", "{:.4f}"),
    "p90": Column("p90_seconds", "{:.4f}"),
    "ratio": Column("ratio", "{:.2f}"),
    "cpu s": Column("cpu_seconds", "{:.4f}"),
    "cpu ratio": Column("cpu_ratio", "{:.2f}"),
    "compile s": Column("compile_seconds", "{:.1f}"),
    "images/s": Column("images_per_second", "{:.0f}"),
    "rows/s": Column("network_evaluations_per_second", "{:.0f}"),
    "GFLOP/s": Column("flops_per_second", "{:.1f}", 1e9),
    "peak MB": Column("peak_memory_bytes", "{:.0f}", 1e6),
    "": Column("note"),
}


def run(bench: Bench) -> list[dict[str, Any]]:
    """Measures and prints; returns the lines."""
    problem = make_problem(bench)
    variants = [compiled_variant(problem, bench.case)]
    if bench.loops:
        variants += loop_variants(problem, bench.case)
    if bench.torch and importlib.util.find_spec("torch"):
        variants += torch_variants(problem, bench.network, bench.case)
    elif bench.torch:
        print("torch is not installed: not compared with", file=sys.stderr)
    timings = measure(variants, bench.repeats)
    lines = [describe(bench, problem, variant, timings) for variant in variants]
    show(lines, COLUMNS)
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line and measures."""
    words = list(sys.argv[1:] if argv is None else argv)
    with cli.exit_codes():
        for word in words:
            if word.split("=")[0] in ("--workdir", "--resume", "--seeds"):
                raise UserError(
                    f"{word}: the bench writes nothing and takes one seed; leave it out"
                )
        asked = cli.parse("bench", CASES, "stage", words)
        cli.use_all_cores()
        # A program out of the cache would show no compile time.
        jax.config.update("jax_enable_compilation_cache", False)
        parts = (bench_decode, bench_rlhf, bench_hiql, bench_metra, bench_starc, bench_sd)
        others = {part.Bench: part.run for part in parts}
        others.get(type(asked.config), run)(asked.config)


if __name__ == "__main__":
    main()
