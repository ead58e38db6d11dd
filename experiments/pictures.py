"""Aligning a base model of a picture world by a reward: what B2-DiffuRL's experiments share.

A lab is a world, its networks and its base model (trained once, then cached). An arm is a way to
spend a budget of reward evaluations; `train_arm` trains one and leaves its folder. Arms differ in
nothing but their `b2_diffurl.Config`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.core import distributed, limits
from jaxalign.core import mesh as meshes
from jaxalign.core import metrics as sinks
from jaxalign.core.checkpoint import Checkpoints, cached
from jaxalign.core.loop import Hook, Step, fit
from jaxalign.core.state import TrainState
from jaxalign.core.types import Array, Model, NonFinite, Params, PyTree, UserError
from jaxalign.data import world as worlds
from jaxalign.data.world import Prompts, Reward, World
from jaxalign.methods import b2_diffurl, denoising
from jaxalign.models.patch_transformer import patch_transformer, token_embedding
from jaxalign.ops import diffusion, diversity
from jaxalign.rewards import jpeg
from jaxalign.rewards.host import HostReward, to_uint8
from jaxalign.rollout.diffusion import denoise, guided, path_divergence

ALPHAS = diffusion.scaled_linear_alphas()


@dataclasses.dataclass(frozen=True)
class Network:
    """The patch transformer."""

    width: int = 96
    depth: int = 3
    heads: int = 4

    def __post_init__(self) -> None:
        if min(self.width, self.depth, self.heads) < 1 or self.width % (2 * self.heads):
            raise UserError(
                f"width = {self.width}, depth = {self.depth}, heads = {self.heads}: all at "
                "least 1, and the width divisible by twice the heads; change one of them"
            )


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a run does; every field is a flag of the command line."""

    world: Literal["sprites", "digits"] = "digits"
    grammar: str = "all"  # sprites: place, colour, relation or all
    reward: str = "mixed"  # one of the world's; compressibility, incompressibility: JPEG size
    prompts: str = ""  # a JSON list of captions to train on instead of the world's own
    arms: tuple[str, ...] = ("ddpo", "official", "telescope")
    network: Network = Network()
    base: denoising.Config = denoising.Config()
    b2: b2_diffurl.Config = b2_diffurl.Config()
    evaluate_every: int = 10  # stages
    pictures: int = 8  # of each prompt in an evaluation
    save_every: int = 10  # stages
    mesh: str = "data=-1"
    tensorboard: bool = False
    wandb: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        limits.known("arms", self.arms, ARMS)
        if min(self.evaluate_every, self.pictures, self.save_every) < 1:
            raise UserError("evaluate_every, pictures and save_every must be at least 1")


# --- arms: the same budget of rewards spent in different ways -------------------------------------

Arm = Callable[[b2_diffurl.Config], b2_diffurl.Config]


def _independent(c: b2_diffurl.Config) -> b2_diffurl.Config:
    """As many pictures as before, each with a path of its own."""
    return dataclasses.replace(c, groups=c.groups * c.leaves, branches=(1,), estimator="prompt_z")


def _whole_path(c: b2_diffurl.Config) -> b2_diffurl.Config:
    return dataclasses.replace(c, suffix_start=c.steps, suffix_stop=c.steps, growth="clock")


def _telescope(c: b2_diffurl.Config) -> b2_diffurl.Config:
    """Pairs of branches, split at half the steps: as many pictures from more initial noises."""
    half = c.steps // 2
    return dataclasses.replace(
        c,
        groups=c.groups * c.leaves // 2,
        branches=(2,),
        suffix_start=half,
        suffix_stop=half,
        growth="clock",
        estimator="telescope_shrunk",
        keep_share=0.3,
    )


ARMS: Mapping[str, Arm] = {
    # independent paths, prompt z-scores, every step trained: DDPO
    "ddpo": lambda c: _whole_path(_independent(c)),
    # the same with backward progressive training
    "ddpo_bpt": _independent,
    # branches and selection, every step trained from the first stage on
    "branch": lambda c: _whole_path(dataclasses.replace(c, estimator="official")),
    # B2-DiffuRL as released
    "official": lambda c: dataclasses.replace(c, estimator="official"),
    # B2-DiffuRL with a leave-one-out baseline among the branches
    "loo": lambda c: dataclasses.replace(c, estimator="branch_loo"),
    # credit for prefix and suffix from branch means with shrunken baselines, on all steps of the
    # rows with the largest credit
    "telescope": _telescope,
    # control: selection of the best and the worst without branches, with backward training
    "extremes": lambda c: dataclasses.replace(_independent(c), estimator="extremes"),
}


# --- the world and its base model -----------------------------------------------------------------


def make_world(config: Experiment) -> World:
    """The world of the run, its training prompts replaced by the user's where a file is given."""
    if config.world == "sprites":
        from jaxalign.data import sprites

        world = sprites.world(config.grammar)
    else:
        from jaxalign.data import digits

        world = digits.world()
    known = [*world.rewards, *jpeg.REWARDS]
    if config.reward not in known:
        raise UserError(
            f"reward = {config.reward!r}: the {world.name} world has {', '.join(known)}; give "
            "one of these"
        )
    if config.prompts:
        world = world._replace(train=worlds.load_prompt_file(config.prompts, world))
    return world


def check(config: Experiment) -> None:
    """Raises UserError for what is wrong with a configuration, before anything is written."""
    make_world(config)
    mesh = meshes.make_mesh(meshes.parse_mesh(config.mesh))
    meshes.check_divisible("base.batch", config.base.batch, mesh)
    for arm in config.arms:
        b2 = ARMS[arm](config.b2)
        meshes.check_divisible(f"groups of arm {arm}", b2.groups, mesh)
        meshes.check_divisible(f"micro_batch of arm {arm}", b2.micro_batch, mesh)


class Networks(NamedTuple):
    """The text encoder and the denoiser of a world."""

    text: Model
    net: Model


def make_networks(world: World, network: Network) -> Networks:
    """The networks that fit a world's pictures and captions."""
    length = world.vocabulary.length
    return Networks(
        token_embedding(world.vocabulary.size, length, network.width),
        patch_transformer(
            world.image_shape,
            world.patch,
            width=network.width,
            depth=network.depth,
            heads=network.heads,
            length=length,
        ),
    )


def base_model(config: Experiment, world: World, mesh: jax.sharding.Mesh) -> Params:
    """`{"text", "net"}` of the base model, trained once for each configuration."""
    networks = make_networks(world, config.network)

    def train() -> Params:
        images, tokens = world.corpus(config.base.seed)
        data = {"images": images, "tokens": tokens, "alphas": ALPHAS.astype(np.float32)}
        state, key = denoising.init(*networks, config.base), jax.random.key(config.base.seed)
        data, state, key = distributed.put((data, state, key), meshes.replicated(mesh))
        state = fit(
            state,
            denoising.make_step(*networks, config.base, meshes.batch_sharding(mesh)),
            lambda i: data,
            key,
            steps=config.base.updates,
            title=f"base model ({world.name})",
            shown=("loss",),
            put=lambda data: data,
        )
        return state.slow

    key = {"world": world.name, "network": config.network, "training": config.base, "corpus": 1}
    return cached("base", {name: _plain(value) for name, value in key.items()}, train)


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value


# --- evaluation -----------------------------------------------------------------------------------


class Evaluation(NamedTuple):
    """`pictures` of each prompt of a list, prompt by prompt, and everything read off them.

    images: `[P*N, H, W, C]`. reward, success: `[P*N]`. code: `[P*N] i32`, factors read. divergence:
    `[P*N]`, KL(policy || base) of the whole path in nats.
    """

    images: Array
    reward: Array
    success: Array
    code: Array
    divergence: Array


class Drawn(NamedTuple):
    """The pictures of an evaluation, with what a reward may know of each (`b2_diffurl.Reward`)."""

    images: Array
    batch: dict[str, Any]
    divergence: Array


@functools.cache
def compiled_drawing(
    apply: Callable[..., Array], shape: tuple[int, ...], b2: b2_diffurl.Config, pictures: int
) -> Callable[[TrainState, b2_diffurl.Task, Array], Drawn]:
    """`(state, task, key) -> Drawn`: `pictures` of each prompt by the state's policy."""
    predict = guided(apply, b2.guidance)

    @jax.jit
    def draw(state: TrainState, task: b2_diffurl.Task, key: Array) -> Drawn:
        params, base = b2_diffurl.policy_params(state, b2), b2_diffurl.reference_params(state)
        prompt = jnp.repeat(jnp.arange(task.prompts), pictures)
        start_key, path_key = jax.random.split(key)
        start = jax.random.normal(start_key, (prompt.shape[0], *shape))
        context = task.rows(prompt)
        images, path, _ = denoise(predict, params, task.sampler, start, context, path_key)
        divergence = path_divergence(predict, params, base, task.sampler, path, context)
        return Drawn(images, {"prompt": prompt, "target": task.target[prompt]}, divergence.sum(0))

    return draw


@functools.cache
def compiled_reading(
    success: Reward, factors: Callable[[Array, PyTree], Array], sizes: tuple[int, ...]
) -> Callable[[Drawn, Array, PyTree], Evaluation]:
    """`(drawn, rewards, reward_params) -> Evaluation`: what the world sees in the pictures."""

    @jax.jit
    def read(drawn: Drawn, reward: Array, params: PyTree) -> Evaluation:
        code = worlds.factor_code(factors(drawn.images, params), sizes)
        seen = success(drawn.images, drawn.batch, params)
        return Evaluation(drawn.images, reward, seen, code, drawn.divergence)

    return read


@functools.partial(jax.jit, static_argnums=1)
def summarise(evaluation: Evaluation, pictures: int) -> dict[str, Array]:
    """The numbers of an evaluation of `pictures` a prompt."""
    by_prompt = evaluation.images.reshape(-1, pictures, *evaluation.images.shape[1:])
    return {
        "reward": evaluation.reward.mean(),
        "success": evaluation.success.mean(),
        "entropy": diversity.code_entropy(evaluation.code.reshape(-1, pictures)).mean(),
        "distance": diversity.pairwise_distance(by_prompt).mean(),
        "divergence": evaluation.divergence.mean(),
    }


# --- one arm --------------------------------------------------------------------------------------


class Lab(NamedTuple):
    """What all arms of a run share: the world, its networks and base, and the embedded prompts."""

    world: World
    networks: Networks
    base: Params
    mesh: jax.sharding.Mesh


def make_lab(config: Experiment) -> Lab:
    """The lab of a configuration; trains the base model where it is not cached."""
    world = make_world(config)
    mesh = meshes.make_mesh(meshes.parse_mesh(config.mesh))
    return Lab(world, make_networks(world, config.network), base_model(config, world, mesh), mesh)


def make_task(lab: Lab, config: b2_diffurl.Config, prompts: Prompts) -> b2_diffurl.Task:
    """The prompts embedded once for the whole run, on every device."""
    text, tokens = lab.networks.text, jnp.asarray(prompts.tokens)
    sampler = diffusion.ddim_sampler(ALPHAS, config.steps, eta=config.eta, prediction="v")
    embed = jax.jit(text.apply)
    task = b2_diffurl.Task(
        sampler,
        embed(lab.base["text"], tokens),
        embed(lab.base["text"], jnp.zeros_like(tokens[:1]))[0],
        jnp.asarray(prompts.target),
        lab.world.reward_params,
    )
    return distributed.put(task, meshes.replicated(lab.mesh))


def make_evaluation(
    lab: Lab, config: Experiment, b2: b2_diffurl.Config, host: HostReward | None
) -> Callable[[TrainState], dict[str, Evaluation]]:
    """`state -> {"train": Evaluation, "heldout": Evaluation}`; the same noise at every call."""
    world = lab.world
    draw = compiled_drawing(lab.networks.net.apply, world.image_shape, b2, config.pictures)
    read = compiled_reading(world.success, world.factors, world.factor_sizes)
    score = make_score(lab, config.reward, host)
    task = make_task(lab, b2, worlds.concatenate(world.train, world.heldout))
    key = distributed.put(jax.random.key(10_000 + config.seed), meshes.replicated(lab.mesh))
    boundary = len(world.train.text) * config.pictures

    def run(state: TrainState) -> dict[str, Evaluation]:
        drawn = draw(state, task, key)
        seen = read(drawn, score(drawn.images, drawn.batch, task.reward), task.reward)
        parts = {"train": slice(None, boundary), "heldout": slice(boundary, None)}
        return {name: Evaluation(*(a[rows] for a in seen)) for name, rows in parts.items()}

    return run


# --- rewards, of the world and of the host --------------------------------------------------------


def open_reward(config: Experiment) -> HostReward | None:
    """The run's reward if it is one of the host, to be closed; None for one of the world."""
    if config.reward not in jpeg.REWARDS:
        return None
    return HostReward(config.reward, jpeg.REWARDS[config.reward])


def make_score(lab: Lab, reward: str, host: HostReward | None) -> b2_diffurl.Reward:
    """The run's reward to be called outside of compiled code, as a `b2_diffurl.Reward`."""
    if host is None:
        return jax.jit(lab.world.rewards[reward])
    everywhere = meshes.replicated(lab.mesh)
    return lambda images, batch, _: distributed.put(
        host.result(host.submit(to_uint8(images), batch)), everywhere
    )


def make_stage(
    lab: Lab, config: Experiment, b2: b2_diffurl.Config, host: HostReward | None
) -> Callable[[TrainState, b2_diffurl.Task, Array], tuple[TrainState, dict[str, Array]]]:
    """A stage of the run with either kind of reward."""
    apply, shape = lab.networks.net.apply, lab.world.image_shape
    rows = meshes.batch_sharding(lab.mesh)
    if host is None:
        # The rate lives in the optimizer's state: one compiled stage serves all of a sweep.
        any_rate = dataclasses.replace(b2, learning_rate=1.0)
        return compiled_stage(apply, any_rate, shape, lab.world.rewards[config.reward], rows)
    predict, decode = guided(apply, b2.guidance), b2_diffurl.pictures_are_latents
    chunks = math.gcd(2, rows.shard_shape((b2.groups,))[0])  # as many as the devices can share
    return b2_diffurl.make_host_stage(predict, b2, shape, decode, host, rows, chunks)


@functools.cache
def compiled_stage(
    apply: Callable[..., Array],
    b2: b2_diffurl.Config,
    shape: tuple[int, ...],
    reward: b2_diffurl.Reward,
    rows: jax.sharding.NamedSharding,
) -> Callable[[TrainState, b2_diffurl.Task, Array], tuple[TrainState, dict[str, Array]]]:
    """`b2_diffurl.make_stage`, once for equal arguments; pictures are their own latents."""
    predict = guided(apply, b2.guidance)
    return b2_diffurl.make_stage(predict, b2, shape, b2_diffurl.pictures_are_latents, reward, rows)


class RatioIsOne:
    """A sink that stops the run if the policy that trains is not the one that sampled."""

    limit = 1e-5  # of the log ratio, relative to the log density: rounding of the last bits

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        error = metrics.get("ratio_error", 0.0)
        if error > self.limit:
            raise NonFinite(
                f"stopped at stage {step}: before the first update the density ratio must be 1, "
                f"but its log is off by "
                f"{error:.3g}; rollout and update evaluate different functions"
            )

    def resume(self, step: int) -> None:
        """Nothing to take back."""

    def close(self) -> None:
        """Nothing to close."""


def train_arm(
    lab: Lab, config: Experiment, arm: str, directory: Path, *, resume: bool
) -> dict[str, float]:
    """Trains one arm into its folder, and returns the final numbers."""
    b2 = ARMS[arm](config.b2)
    task = make_task(lab, b2, lab.world.train)
    key = jax.random.key(config.seed)
    state = b2_diffurl.init(b2, lab.base["net"], task.prompts, key, LORA_RULE)
    state, key = distributed.put((state, key), meshes.replicated(lab.mesh))
    host = open_reward(config)
    stage, evaluation = make_stage(lab, config, b2, host), make_evaluation(lab, config, b2, host)
    sample_grid = functools.partial(save_samples, lab.world, config.pictures, directory)

    def measure(state: TrainState, step: int) -> dict[str, Array]:
        results = evaluation(state)
        if step in (0, b2.stages):
            sample_grid("before" if step == 0 else "after", results)
        numbers = {name: summarise(seen, config.pictures) for name, seen in results.items()}
        return {f"{name}/{k}": v for name, by in numbers.items() for k, v in by.items()}

    with host or contextlib.nullcontext():
        run_stages(state, stage, task, key, config, b2, arm, directory, measure, resume=resume)
    return leave_result(directory, arm, config.seed)


def run_stages(
    state: TrainState,
    stage: Step,
    task: b2_diffurl.Task,
    key: Array,
    config: Any,
    b2: b2_diffurl.Config,
    arm: str,
    directory: Path,
    measure: Callable[[TrainState, int], Mapping[str, Any]],
    *,
    resume: bool,
) -> TrainState:
    """The state after all stages of an arm, whose metrics and checkpoints are left in its folder.

    config: of the experiment, which says how often what is done. measure: `(state, step) ->
        metrics`, every `evaluate_every` stages.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(Checkpoints(directory / "ckpt")) as checkpoints:
        opened = sinks.open_sinks(config, directory, arm)
        state = fit(
            state,
            stage,
            lambda i: task,
            key,
            steps=b2.stages,
            checkpoints=checkpoints,
            save_every=config.save_every,
            resume=resume,
            sinks=[RatioIsOne(), *opened],
            hooks=[Hook(config.evaluate_every, measure)],
            title=arm,
            speed=(b2.groups * b2.leaves, "images"),
            shown=("reward", "suffix"),
            put=lambda task: task,
        )
        for sink in opened:
            sink.close()
    return state


def leave_result(directory: Path, arm: str, seed: int) -> dict[str, float]:
    """Writes an arm's last numbers as its `result.json`, and returns them."""
    rows = sinks.read_json_lines(directory / "metrics.jsonl")
    result = {name: value for name, value in rows[-1].items() if name != "step"}
    sinks.write_json(directory / "result.json", {"arm": arm, "seed": seed, **result})
    return result


LORA_RULE = r".*attention/(qkv|kv_context|out)/kernel"


def save_samples(
    world: World, pictures: int, directory: Path, when: str, results: Mapping[str, Evaluation]
) -> None:
    """`samples-WHEN.npz`: four pictures of each prompt, 8 bit, and the rewards of all of them."""
    arrays: dict[str, np.ndarray] = {}
    for name, evaluation in results.items():
        images = np.asarray(distributed.fetch(evaluation.images)).reshape(
            -1, pictures, *world.image_shape
        )
        reward = np.asarray(distributed.fetch(evaluation.reward)).reshape(-1, pictures)
        success = np.asarray(distributed.fetch(evaluation.success)).reshape(-1, pictures)
        arrays[f"{name}/images"] = np.asarray(to_uint8(images[:, :4]))
        arrays[f"{name}/prompts"] = np.array(getattr(world, name).text)
        arrays[f"{name}/reward"], arrays[f"{name}/success"] = reward, success
    with (
        sinks.replacing(directory / f"samples-{when}.npz") as temporary,
        open(temporary, "wb") as file,
    ):
        np.savez_compressed(file, allow_pickle=False, **arrays)


def run_arms(lab: Lab, config: Experiment, directory: Path, *, resume: bool) -> None:
    """All arms of one seed, then `result.json` with "ARM/NUMBER" keys."""
    accuracy = lab.world.accuracy(lab.world.reward_params)
    result = {f"reader/accuracy on {name} pictures": share for name, share in accuracy.items()}
    for arm in config.arms:
        numbers = train_arm(lab, config, arm, directory / arm, resume=resume)
        result |= {f"{arm}/{name}": value for name, value in numbers.items()}
    sinks.write_json(directory / "result.json", result)


def small(**changes: Any) -> b2_diffurl.Config:
    """A stage that a CPU runs in a second: 160 pictures, 10 steps, else the released shares."""
    config = b2_diffurl.Config(
        groups=32,
        branches=(5,),
        steps=10,
        guidance=1.0,
        suffix_start=7,
        suffix_stop=10,
        epochs=1,
        updates=4,
        micro_batch=96,  # the fastest of 24 to 192 on two cores
        step_weight="drop_last",
        kl_weight=0.02,
        learning_rate=4e-4,
    )
    return dataclasses.replace(config, **changes)
