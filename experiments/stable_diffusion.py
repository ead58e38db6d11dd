"""B2-DiffuRL on Stable Diffusion: what its presets of `b2_diffurl` and `evaluate_images` share.

A lab is a pipeline's folder read onto the mesh, with its prompts embedded and its rewards open. A
run trains each arm's adapters (or the whole U-Net) from the same weights, and leaves them in the
formats that torch's libraries read.

Dimensions: P prompts, N pictures of each, H W their sides, h w C a latent.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import cli, image_rewards, random_pipeline, report
from experiments.image_rewards import Opened, Rewards
from experiments.pictures import ARMS, leave_result, run_stages
from jaxalign.core import distributed, limits
from jaxalign.core import mesh as meshes
from jaxalign.core import metrics as sinks
from jaxalign.core.state import TrainState
from jaxalign.core.types import Array, Params, PyTree, UserError
from jaxalign.data import image_prompts
from jaxalign.data.image_prompts import Split
from jaxalign.data.world import read_prompt_file
from jaxalign.methods import b2_diffurl
from jaxalign.models import diffusers_export, lora_files, stable_diffusion, unet
from jaxalign.models.stable_diffusion import StableDiffusion
from jaxalign.ops import diffusion, diversity
from jaxalign.ops.chunks import map_chunks
from jaxalign.rewards.host import to_uint8
from jaxalign.rollout.diffusion import denoise, guided

RANDOM = "random"  # a model of random weights, made in the work directory
TEMPLATES = {"template1": "animals", "template2": "produce", "template3": "relations"}
EXPORTS = {"lora": f"lora/{lora_files.FILE}", "folder": "model"}
KEPT_SIDE = 256  # pixels of the pictures that a run keeps for its report


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a run does; every field is a flag of the command line."""

    model: str = ""  # folder in diffusers' layout, or a name in the local Hugging Face cache
    prompts: str = "template1"  # template1, template2, template3, or a JSON list of prompts
    rewards: Rewards = Rewards()
    arms: tuple[str, ...] = ("official",)
    pixels: int = 0  # the pictures' side; 0 is that of the U-Net's training
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of the products
    groups_per_device: int = 8  # sampled at once
    pairs_per_device: int = 16  # trained on at once; in the place of b2.micro-batch
    decode_per_device: int = 8  # latents decoded, and pictures scored, at once
    b2: b2_diffurl.Config = b2_diffurl.Config(lora_rank=4)
    export: Literal["lora", "folder"] = "lora"  # left at the end; folder: the whole pipeline
    evaluate_every: int = 10  # stages
    evaluate_prompts: int = 8  # of each list, evenly chosen
    pictures: int = 4  # of each prompt in an evaluation
    save_every: int = 10  # stages
    mesh: str = "data=-1"
    dry_run: bool = False  # print what the run would cost, and end
    tensorboard: bool = False
    wandb: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        limits.known("arms", self.arms, ARMS)
        limits.counts(
            self,
            "groups_per_device",
            "pairs_per_device",
            "decode_per_device",
            "evaluate_every",
            "evaluate_prompts",
            "pictures",
            "save_every",
        )
        if self.export == "lora" and not self.b2.lora_rank:
            raise UserError("export = lora: there are no adapters; give --export folder")


class Lab(NamedTuple):
    """What all arms of a run share.

    prompts: for training and held out; every list of rows is of the former, then the latter.
    conditions: what the U-Net takes for each prompt, `[P, ...]`. null: for the empty one, `[...]`.
    shape: of a latent.
    """

    model: StableDiffusion
    mesh: jax.sharding.Mesh
    prompts: Split
    conditions: PyTree
    null: PyTree
    rewards: Opened
    shape: tuple[int, int, int]


# --- the lab --------------------------------------------------------------------------------------


def read_prompts(config: Experiment) -> Split:
    """The prompts of the run; a user's own are all trained, and nothing is held out."""
    if config.prompts in TEMPLATES:
        return image_prompts.TEMPLATES[TEMPLATES[config.prompts]]()
    if not Path(config.prompts).suffix:
        known = ", ".join(TEMPLATES)
        raise UserError(f"prompts = {config.prompts!r}: give {known}, or a JSON file of prompts")
    return Split(tuple(read_prompt_file(config.prompts)), ())


def method_of(config: Experiment, arm: str, mesh: jax.sharding.Mesh) -> b2_diffurl.Config:
    """An arm's settings on this mesh.

    Raises: UserError where the groups cannot be shared out.
    """
    b2 = ARMS[arm](config.b2)
    meshes.check_divisible(f"groups of arm {arm}", b2.groups, mesh)
    return dataclasses.replace(b2, micro_batch=config.pairs_per_device * meshes.data_devices(mesh))


def chunks_of(config: Experiment, b2: b2_diffurl.Config, mesh: jax.sharding.Mesh) -> int:
    """The fewest parts of a stage's groups of which each device holds `groups_per_device`."""
    devices = meshes.data_devices(mesh)
    each = b2.groups // devices
    fits = (
        n for n in range(1, each + 1) if each % n == 0 and each // n <= config.groups_per_device
    )
    return next(fits)


def latent_shape(config: Experiment, side: int, channels: int, shrink: int) -> tuple[int, int, int]:
    """(h, w, C) of the run's latents.

    side, channels: of the latents that the U-Net was trained on. shrink: pixels along one's side.
    Raises: UserError for pictures whose side the autoencoder cannot make.
    """
    if config.pixels % shrink:
        raise UserError(f"pixels = {config.pixels}: must be a multiple of {shrink}")
    side = config.pixels // shrink or side
    return side, side, channels


def check(config: Experiment) -> None:
    """Raises UserError for what is wrong with a configuration, before anything is read or made."""
    read_prompts(config)
    mesh = meshes.make_mesh(meshes.parse_mesh(config.mesh))
    for arm in config.arms:
        method_of(config, arm, mesh)
    if not config.model:
        raise UserError(
            "no model: give --model DIR, a folder in diffusers' layout, or a name in the local "
            "Hugging Face cache"
        )


def make_lab(config: Experiment) -> Lab:
    """Reads all networks onto the mesh and embeds the prompts.

    Raises: UserError for folders that are not as they must be, and rewards that lack something.
    """
    mesh = meshes.make_mesh(meshes.parse_mesh(config.mesh))
    dtype = jnp.dtype(config.dtype)

    def shardings(abstract: PyTree, rules: meshes.Rules) -> PyTree:
        return meshes.shardings(abstract, mesh, rules)

    prompts = read_prompts(config)
    both = [*prompts.train, *prompts.heldout]
    at_once = config.decode_per_device * meshes.data_devices(mesh)
    opened = image_rewards.open_rewards(config.rewards, both, dtype, shardings, at_once)
    rows = meshes.batch_sharding(mesh)
    model = stable_diffusion.load(config.model, dtype, shardings=shardings, remat=True, rows=rows)
    shape = latent_shape(config, model.side, model.channels, model.vae.shrink)
    pixels = shape[0] * model.vae.shrink
    embedded = stable_diffusion.embed_prompts(config.model, [*both, ""], pixels, dtype)
    everywhere = meshes.replicated(mesh)
    conditions = jax.tree.map(lambda a: a[:-1], embedded)
    null = jax.tree.map(lambda a: a[-1], embedded)
    conditions, null, target = distributed.put((conditions, null, opened.target), everywhere)
    return Lab(model, mesh, prompts, conditions, null, opened._replace(target=target), shape)


def make_task(
    lab: Lab, b2: b2_diffurl.Config, rows: Sequence[int] | None = None
) -> b2_diffurl.Task:
    """What a stage reads. rows: the prompts, by number; default: those for training."""
    chosen = np.arange(len(lab.prompts.train)) if rows is None else np.asarray(rows)
    conditions, target = jax.tree.map(lambda a: a[chosen], (lab.conditions, lab.rewards.target))
    alphas, kind = lab.model.schedule
    sampler = diffusion.ddim_sampler(alphas, b2.steps, eta=b2.eta, prediction=kind)
    sampler = distributed.put(sampler, meshes.replicated(lab.mesh))
    return b2_diffurl.Task(
        sampler, conditions, lab.null, target, lab.rewards.params, lab.model.params["vae"]
    )


def make_decode(lab: Lab, config: Experiment) -> b2_diffurl.Decode:
    """Latents to pictures, a chunk at a time."""
    chunk = config.decode_per_device * meshes.data_devices(lab.mesh)

    def decode(params: PyTree, latents: Array) -> Array:
        return map_chunks(functools.partial(lab.model.vae.decode, params), latents, chunk)

    return decode


def init_state(
    lab: Lab, config: Experiment, b2: b2_diffurl.Config, *, last: bool = False
) -> TrainState:
    """The state before the first stage, each parameter where its rule says.

    last: whether no other arm will start from the lab's U-Net, whose memory the state then takes.
    """
    base, prompts = lab.model.params["unet"], len(lab.prompts.train)
    make = functools.partial(b2_diffurl.init, b2, prompts=prompts, lora_rule=lora_files.RULE)
    key = distributed.put(jax.random.key(config.seed), meshes.replicated(lab.mesh))
    abstract = jax.eval_shape(lambda base, key: make(base, key=key), base, key)
    where = meshes.shardings(abstract, lab.mesh, unet.RULES)
    donated = (0,) if last else ()

    @functools.partial(jax.jit, out_shardings=where, donate_argnums=donated)
    def start(base: Params, key: Array) -> TrainState:
        return make(base, key=key)

    return start(base, key)


def make_stage(
    lab: Lab, config: Experiment, b2: b2_diffurl.Config
) -> Callable[[TrainState, b2_diffurl.Task, Array], tuple[TrainState, dict[str, Array]]]:
    """A stage of the run with either kind of reward."""
    predict, decode = guided(lab.model.unet.apply, b2.guidance), make_decode(lab, config)
    rows, chunks = meshes.batch_sharding(lab.mesh), chunks_of(config, b2, lab.mesh)
    if lab.rewards.host is not None:
        host = lab.rewards.host
        return b2_diffurl.make_host_stage(predict, b2, lab.shape, decode, host, rows, chunks)
    assert lab.rewards.device is not None
    return b2_diffurl.make_stage(predict, b2, lab.shape, decode, lab.rewards.device, rows, chunks)


# --- evaluation -----------------------------------------------------------------------------------


class Drawn(NamedTuple):
    """N pictures of each of P prompts, prompt by prompt.

    latents: `[P*N, h, w, C]`. images: `[P*N, H, W, 3]` in [-1, 1]. reward: `[P*N]`.
    """

    latents: Array
    images: Array
    reward: Array


def make_drawing(
    lab: Lab, config: Experiment, b2: b2_diffurl.Config, pictures: int
) -> Callable[[Params, Sequence[int], Array], Drawn]:
    """`(params of the U-Net, prompts by number, key) -> Drawn`; of a key always the same noise."""
    decode, score = make_decode(lab, config), make_score(lab)
    predict, devices = guided(lab.model.unet.apply, b2.guidance), meshes.data_devices(lab.mesh)
    chunk, rows_lie = (
        config.groups_per_device * b2.leaves * devices,
        meshes.batch_sharding(lab.mesh),
    )

    @jax.jit
    def draw(
        params: Params, task: b2_diffurl.Task, prompt: Array, key: Array
    ) -> tuple[Array, Array]:
        def some(numbered: Array) -> Array:
            if len(numbered) % devices == 0:  # or every device would draw all of them
                numbered = jax.lax.with_sharding_constraint(numbered, rows_lie)
            start_key, path_key = jax.random.split(jax.random.fold_in(key, numbered[0, 0]))
            start = jax.random.normal(start_key, (len(numbered), *lab.shape))
            context = task.rows(numbered[:, 1])
            return denoise(predict, params, task.sampler, start, context, path_key)[0]

        numbered = jnp.stack([jnp.arange(len(prompt)), prompt], axis=1)
        latents = map_chunks(some, numbered, chunk)
        return latents, decode(task.decoder, latents)

    def run(params: Params, rows: Sequence[int], key: Array) -> Drawn:
        task, prompt = make_task(lab, b2, rows), np.repeat(np.arange(len(rows)), pictures)
        everywhere = meshes.replicated(lab.mesh)
        latents, images = draw(params, task, distributed.put(prompt, everywhere), key)
        number = distributed.put(np.repeat(np.asarray(rows), pictures), everywhere)
        batch = {"prompt": number, "target": jax.tree.map(lambda a: a[prompt], task.target)}
        return Drawn(latents, images, score(images, batch, task.reward))

    return run


def make_score(lab: Lab) -> b2_diffurl.Reward:
    """The run's reward to be called outside of compiled code."""
    host = lab.rewards.host
    if host is None:
        assert lab.rewards.device is not None
        return jax.jit(lab.rewards.device)
    everywhere = meshes.replicated(lab.mesh)
    return lambda images, batch, _: distributed.put(
        host.result(host.submit(to_uint8(images), batch)), everywhere
    )


def chosen_rows(lab: Lab, count: int) -> dict[str, list[int]]:
    """At most `count` prompts of each list, evenly spread over it, by their numbers."""
    first, lists = 0, {}
    for name, prompts in zip(("train", "heldout"), lab.prompts, strict=True):
        spread = np.linspace(0, len(prompts) - 1, min(count, len(prompts))).round().astype(int)
        if len(prompts):
            lists[name] = [first + int(i) for i in spread]
        first += len(prompts)
    return lists


# --- one arm --------------------------------------------------------------------------------------


def train_arm(
    lab: Lab, config: Experiment, arm: str, directory: Path, *, resume: bool
) -> dict[str, float]:
    """Trains one arm into its folder, exports it, and returns the final numbers."""
    b2 = method_of(config, arm, lab.mesh)
    task = make_task(lab, b2)
    state = init_state(lab, config, b2, last=arm == config.arms[-1])
    stage = make_stage(lab, config, b2)
    lists = chosen_rows(lab, config.evaluate_prompts)
    draw = make_drawing(lab, config, b2, config.pictures)
    everywhere = meshes.replicated(lab.mesh)
    noise = distributed.put(jax.random.key(10_000 + config.seed), everywhere)
    merge = jax.jit(lambda state: b2_diffurl.policy_params(state, b2))

    def measure(state: TrainState, step: int) -> dict[str, Array]:
        params, numbers, drawn = merge(state), {}, {}
        for name, rows in lists.items():
            drawn[name] = seen = draw(params, rows, noise)
            by_prompt = seen.images.reshape(-1, config.pictures, *seen.images.shape[1:])
            numbers[f"{name}/reward"] = seen.reward.mean()
            numbers[f"{name}/distance"] = diversity.pairwise_distance(by_prompt).mean()
        if step in (0, b2.stages):
            when = "before" if step == 0 else "after"
            save_samples(lab, config, directory, when, lists, drawn)
        return numbers

    key = distributed.put(jax.random.key(config.seed), everywhere)
    state = run_stages(state, stage, task, key, config, b2, arm, directory, measure, resume=resume)
    export(config, b2, state, directory)
    return leave_result(directory, arm, config.seed)


def export(config: Experiment, b2: b2_diffurl.Config, state: TrainState, directory: Path) -> None:
    """Leaves what was trained as `lora/`, or as the whole pipeline in `model/`.

    What is there was left whole by the same run.
    """
    params = distributed.fetch(state.params)
    if not distributed.is_main() or (directory / EXPORTS[config.export]).exists():
        return
    if config.export == "lora":
        lora_files.save(directory / "lora", params["lora"])
        return
    merged = b2_diffurl.policy_params(state._replace(params=params), b2)
    diffusers_export.save_folder(config.model, directory / "model", merged)


def save_samples(
    lab: Lab,
    config: Experiment,
    directory: Path,
    when: str,
    lists: dict[str, list[int]],
    drawn: dict[str, Drawn],
) -> None:
    """`samples-WHEN.npz`: the pictures, small, their latents and their rewards."""
    arrays: dict[str, np.ndarray] = {}
    texts = [*lab.prompts.train, *lab.prompts.heldout]
    for name, seen in distributed.fetch(drawn).items():
        images = np.asarray(to_uint8(shrunk(jnp.asarray(seen.images))))
        arrays[f"{name}/images"] = images.reshape(-1, config.pictures, *images.shape[1:])
        arrays[f"{name}/latents"] = seen.latents
        arrays[f"{name}/reward"] = seen.reward.reshape(-1, config.pictures)
        arrays[f"{name}/prompts"] = np.array([texts[i] for i in lists[name]])
    if not distributed.is_main():
        return
    path = directory / f"samples-{when}.npz"
    with sinks.replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def shrunk(images: Array) -> Array:
    """Pictures `[B, H, W, 3]`, those that are too large by the mean of neighbouring pixels."""
    factor = -(-images.shape[1] // KEPT_SIDE)
    if factor == 1 or images.shape[1] % factor:
        return images
    side = images.shape[1] // factor
    return images.reshape(-1, side, factor, side, factor, 3).mean((2, 4))


def run_arms(lab: Lab, config: Experiment, directory: Path, *, resume: bool) -> None:
    """All arms of one seed, then `result.json` with "ARM/NUMBER" keys."""
    result: dict[str, float] = {}
    with lab.rewards.host or contextlib.nullcontext():
        for arm in config.arms:
            numbers = train_arm(lab, config, arm, directory / arm, resume=resume)
            result |= {f"{arm}/{name}": value for name, value in numbers.items()}
    sinks.write_json(directory / "result.json", result)


def with_model(config: Experiment, workdir: Path) -> Experiment:
    """The configuration with folders that exist where it asks for random networks."""
    if config.model != RANDOM:
        return config
    model, clip = workdir / "random-model", workdir / "random-clip"
    # On every process, each of which has a work directory of its own.
    random_pipeline.write_pipeline(model, config.seed)
    random_pipeline.write_clip(clip, config.seed)
    rewards = dataclasses.replace(config.rewards, clip=str(clip))
    return dataclasses.replace(config, model=str(model), rewards=rewards)


def run_all(run: cli.Run) -> None:
    """Every seed of the command line, one after the other, then the report."""
    if run.config.dry_run:
        from experiments import dry_run

        with tempfile.TemporaryDirectory() as folder:
            print(dry_run.describe(with_model(run.config, Path(folder))))
        return
    check(run.config)
    for each in cli.open_seeds(run):
        config = with_model(each.config, each.workdir)
        run_arms(make_lab(config), config, each.workdir, resume=each.resume)
    print(report.table(run.workdir))
    print(f"report: {report.build(run.workdir)}")
