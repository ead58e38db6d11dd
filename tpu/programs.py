"""The programs that an experiment runs on its devices, as shapes alone: nothing is allocated.

For each experiment a function `(config, seeds, mesh) -> list[Program]` builds what a run would
compile, from the experiment's own functions, with every argument a `jax.ShapeDtypeStruct` that
knows how it is spread over the mesh. The mesh may be of devices that are not there.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxalign.core import mesh as meshes
from jaxalign.core.state import TrainState
from jaxalign.core.types import Array, PyTree, UserError
from jaxalign.methods import b2_diffurl as b2_method
from jaxalign.methods import r3hf as r3hf_method
from jaxalign.models import clip, llama, unet, vae
from jaxalign.ops.chunks import map_chunks
from jaxalign.rollout.diffusion import Rollout, guided, level_sizes


class Program(NamedTuple):
    """One compiled function of a run.

    name: what it does in a training step, for example "update".
    function, arguments: of `jax.ShapeDtypeStruct`s with shardings; NumPy integers among them are
        values that the compiled program is planned for, such as a stage's number.
    donated: which arguments it may overwrite.
    held: arguments by what they are, for example "parameters"; the rest count as "other".
    within: arrays of which it is known that the program keeps them while it runs.
    beside: what else lies in the devices' memory meanwhile.
    turns: of a loop that data end, how many to plan for.
    exchanged: bytes that each device has to send by arithmetic, where something predicts them.
    times: how often it runs in a training step.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[PyTree, ...]
    donated: tuple[int, ...] = ()
    held: Mapping[str, PyTree] = {}
    within: Mapping[str, PyTree] = {}
    beside: Mapping[str, PyTree] = {}
    turns: int = 1
    times: int = 1
    exchanged: float | None = None


def spread(tree: PyTree, sharding: NamedSharding | PyTree) -> PyTree:
    """The shapes of `tree`, each with its sharding. sharding: one for all leaves, or a tree."""
    if isinstance(sharding, NamedSharding):
        sharding = jax.tree.map(lambda _: sharding, tree)
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        tree,
        sharding,
    )


def bytes_a_device(tree: PyTree) -> int:
    """Bytes of the part of `tree` that each device holds."""

    def size(leaf: Any) -> int:
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return 0  # a value planned for
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
        item = 8 if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
        return math.prod(shape) * item

    return sum(map(size, jax.tree.leaves(tree)))


def _key(mesh: Mesh) -> jax.ShapeDtypeStruct:
    return spread(jax.eval_shape(lambda: jax.random.key(0)), meshes.replicated(mesh))


def sum_over(devices: int, size: float) -> float:
    """Bytes that each of n devices sends so that all have the sum of arrays of `size` bytes."""
    return 2 * (devices - 1) / devices * size


# --- seeds side by side ---------------------------------------------------------------------------


def _deal(state: PyTree, seeds: int, mesh: Mesh) -> tuple[PyTree, NamedSharding | None]:
    """As `experiments.seed_axis.spread`: seeds are dealt out where they divide, else rows are."""
    everywhere, rows = meshes.replicated(mesh), meshes.batch_sharding(mesh)
    dealt = seeds % meshes.data_devices(mesh) == 0
    where = jax.tree.map(lambda leaf: rows if dealt and leaf.ndim else everywhere, state)
    return spread(state, where), None if dealt else rows


def metra(config: Any, seeds: Sequence[int], mesh: Mesh) -> list[Program]:
    """Skills: `at_once` epochs of the first arm, or where the host walks, one epoch's learning."""
    from experiments import skill_worlds, skills, skills_host

    arm = config.arms[0]
    method, own = skills.METHODS[arm], getattr(config, arm)
    environment = skill_worlds.make(config.environment, config.physics)
    lab = skills.Lab(environment, None, mesh)
    state = jax.eval_shape(
        lambda: skills.start_state(method, own, environment, config.buffer, seeds)
    )
    state, _ = _deal(state, len(seeds), mesh)
    state = state._replace(step=np.int32(config.epochs // config.at_once))
    held = {
        "parameters": (state.params, state.slow),
        "optimizer": state.opt_state,
        "buffer": state.extra,
    }
    common: dict[str, Any] = {"donated": (0,), "held": held, "turns": config.updates}
    if config.physics == "host" and skill_worlds.is_mujoco(config.environment):
        function = skills_host.make_learning(method, own, lab, config, seeds)
        walked = (state, *_walked(own, environment, config, seeds, mesh), np.int32(0))
        return [Program("learning", function, walked, times=config.at_once, **common)]
    function = skills.make_training(method, own, lab, config, seeds)
    world = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, environment.world))
    given = (state, spread(world, meshes.replicated(mesh)), _key(mesh))
    return [Program("training", function, given, **common)]


def _walked(
    own: Any, environment: Any, config: Any, seeds: Sequence[int], mesh: Mesh
) -> tuple[PyTree, PyTree, PyTree]:
    """An epoch's episodes, skills and keys, as the host hands them over."""
    from jaxalign.rollout.episodes import Episodes

    count, steps, side = len(seeds), environment.steps, config.environments

    def array(*shape: int) -> Any:
        return jax.ShapeDtypeStruct((count, *shape), jnp.float32)

    walked = Episodes(
        array(steps + 1, side, environment.observation_size),
        array(steps, side, environment.action_size),
        None,
    )
    keys = jax.eval_shape(lambda: jax.vmap(jax.random.key)(np.asarray(seeds)))
    given, _ = _deal((walked, array(side, own.skill_size), keys), count, mesh)
    return given


def hiql(config: Any, seeds: Sequence[int], mesh: Mesh) -> list[Program]:
    """Offline goal-conditioned learning: `at_once` updates of the first arm."""
    from experiments import offline

    arm = config.arms[0]
    method, own = offline.METHODS[arm], getattr(config, arm)
    data = spread(_trajectories(config), meshes.replicated(mesh))
    state = jax.eval_shape(lambda data: offline.start_state(method, own, data, seeds), data)
    state, rows = _deal(state, len(seeds), mesh)
    function = offline.make_training(method, own, seeds, config.at_once, rows)
    held = {
        "parameters": (state.params, state.slow),
        "optimizer": state.opt_state,
        "data": data,
    }
    # Without seeds to deal out, each update sums its gradients over all devices.
    gradients = 0 if rows is None else bytes_a_device(state.params)
    exchanged = config.at_once * sum_over(mesh.size, gradients)
    given = (state, data, _key(mesh))
    return [Program("training", function, given, (0,), held, exchanged=exchanged)]


def _trajectories(config: Any) -> PyTree:
    """A data set of OGBench's size for the task: a million states and more, by its recipe."""
    from experiments import offline_data
    from jaxalign.data import pointmaze_data
    from jaxalign.data.trajectories import Trajectories

    if not offline_data.in_maze(config.task):
        raise UserError(f"task {config.task!r}: plans are for point mazes; give one of those")
    recipe = pointmaze_data.recipe(config.task)
    episodes = config.data_episodes or recipe.episodes
    states = episodes * recipe.length
    shapes = [(states, 2), (states, 2), (states,), (states - episodes,)]
    kinds = [jnp.float32, jnp.float32, jnp.int32, jnp.int32]
    return Trajectories(*map(jax.ShapeDtypeStruct, shapes, kinds))  # ty: ignore


# --- language models ------------------------------------------------------------------------------

LLAMA_8B = llama.Config(
    vocabulary=128_256,
    width=4096,
    inner=14_336,
    depth=32,
    heads=32,
    kv_heads=8,
    head_dim=128,
    context=131_072,
    eps=1e-5,
    theta=500_000.0,
    scaling=llama.RotaryScaling(8.0, 1.0, 4.0, 8192),
)


def language_sizes(config: Any) -> llama.Config:
    """Of the language model of a run of `r3hf`.

    Raises: UserError for one that is no Llama or Qwen.
    """
    from jaxalign.models import folders

    path = config.source.model
    sizes = folders.read_config(path) if path else LLAMA_8B
    if not isinstance(sizes, llama.Config):
        raise UserError(f"source.model {path}: plans are for models like Llama; give one")
    return sizes


def r3hf(config: Any, seeds: Sequence[int], mesh: Mesh, depth: int | None = None) -> list[Program]:
    """PPO of the first arm: sampling with scores, and the learning from them.

    The model is that of `--source.model`, Llama 3.1 8B where none is named. How it computes, how
    the parameters lie and where the arm starts is said by the run's own functions.

    depth: of all the models, in the place of their own.
    """
    del seeds  # one after the other
    from experiments import language

    source, arm = config.source, config.arms[0]
    r3, rows = language.arm_config(config, arm), meshes.batch_sharding(mesh)
    part = r3.rollouts // (r3.minibatches * r3.micro_batches)
    meshes.check_divisible("rl.rollouts / (minibatches * micro_batches) =", part, mesh)
    lab = language_lab(config, mesh, depth)
    parts = language.make_parts(lab.problem, lab.scalar, lab.judge)
    networks = {name: getattr(lab, name) for name in ("policy", "reward", "calibrated")}
    state = meshes.lying(
        jax.eval_shape(lambda n: language.start_state(lab._replace(**n), config, arm), networks),
        mesh,
        lab.problem.rules,
    )
    prompts = spread(lab.problem.prompts, meshes.replicated(mesh))
    task = r3hf_method.Task(prompts, language.reward_of(lab, arm), ())

    def rollout(state: TrainState, task: r3hf_method.Task, key: Array) -> r3hf_method.Samples:
        policy = r3hf_method.policy_of(state.params)
        return r3hf_method.sample(parts, r3, rows, policy, task, key)

    def update(
        state: TrainState, task: r3hf_method.Task, samples: r3hf_method.Samples, key: Array
    ) -> tuple[TrainState, PyTree]:
        batch, metrics = r3hf_method.estimate(parts, r3, state, samples, key)
        optimizer = r3hf_method.make_optimizer(r3)
        state, log = r3hf_method.learn(parts, r3, optimizer, rows, state, batch, key)
        return state, (metrics, log)

    stay = language.staying(update, mesh, lab.problem.rules)
    given = (state, task, _key(mesh))
    samples = spread(jax.eval_shape(rollout, *given), rows)
    slots = source.prompt + source.response
    cache = jax.eval_shape(lambda: lab.problem.model.empty_cache(r3.rollouts, slots))
    kept = {"start of the arms": lab.policy}
    if lab.calibrated is not None:
        other = lab.reward if task.reward is lab.calibrated else lab.calibrated
        kept["other reward model"] = other
    held = {
        "parameters": state.params,
        "reference": state.slow,
        "reward model": task.reward,
        "optimizer": state.opt_state,
        "prompts": prompts,
    }
    sampling, learning = _ppo_exchanged(config, r3, lab.problem.config, mesh)
    return [
        Program(
            "rollout",
            rollout,
            given,
            held=held,
            within={"cache": spread(cache, rows), "responses": samples},
            beside=kept,
            turns=source.response - 1,
            exchanged=sampling,
        ),
        Program(
            "update",
            stay,
            (state, task, samples, _key(mesh)),
            (0,),
            held,
            beside=kept,
            exchanged=learning,
        ),
    ]


def _ppo_exchanged(config: Any, r3: r3hf_method.Config, sizes: Any, mesh: Mesh) -> tuple:
    """Bytes that each device has to send in PPO of a model like Llama: sampling, and learning.

    All in bfloat16: a pass over whole texts gathers every matrix, and again backwards; the gradient
    is scattered. The head is gathered once and its gradient summed over all devices. A decode step
    sums what the rows of an `fsdp` group get from each part, and exchanges their logits, in f32.
    """
    if not isinstance(sizes, llama.Config) or r3.algorithm != "ppo" or r3.lora_rank:
        return None, None
    parts = mesh.shape.get("fsdp", 1)
    groups, share = meshes.data_devices(mesh) // parts, (parts - 1) / parts
    inward = sizes.head_dim * (sizes.heads + 2 * sizes.kv_heads) + 2 * sizes.inner
    outward = sizes.head_dim * sizes.heads + sizes.inner
    matrices = 2 * sizes.depth * sizes.width * (inward + outward)
    head = 2 * sizes.vocabulary * sizes.width
    rows = r3.rollouts // groups
    step = sizes.depth * sum_over(parts, 2 * rows * inward)
    step += share * 4 * rows * sizes.vocabulary / parts
    sampling = config.source.response * step + share * (2 * matrices + head)  # prefill, and scores
    turns = r3.epochs * r3.minibatches * r3.micro_batches
    turn = share * (2 * 3 * matrices + head) + sum_over(parts * groups, head)
    turn += sum_over(groups, 2 * matrices / parts)
    return sampling, turns * turn + share * (2 * matrices + head)


def language_lab(config: Any, mesh: Mesh, depth: int | None = None) -> Any:
    """The lab of a run of `r3hf` with shapes in the place of arrays, each where it lies.

    depth: of the models of the policy's sizes, in the place of their own.
    Raises: UserError for sets that are not real, and as `language_sizes`.
    """
    from experiments import language, problems
    from jaxalign.models import folders
    from jaxalign.models.scalar_head import with_scalar_head

    source, sizes = config.source, language_sizes(config)
    if source.name not in problems.REAL:
        raise UserError(f"source {source.name}: plans are for real sets, nectar, tldr or saferlhf")
    sizes = dataclasses.replace(sizes, depth=depth or sizes.depth)
    reward_sizes = folders.read_config(source.reward_model) if source.reward_model else sizes
    problem = problems.outline(source, mesh, sizes, reward_sizes)
    judge = with_scalar_head(folders.build(reward_sizes, **problems.computing(source, mesh)))
    policy = language.abstract_policy(problem, mesh)
    reward = language.abstract_reward(problem, judge, mesh)
    calibrated = reward if language.asks_for_calibration(config) else None
    scalar = with_scalar_head(problem.model)
    return language.Lab(problem, mesh, policy, scalar, judge, reward, calibrated, math.nan)


# --- pictures -------------------------------------------------------------------------------------

SD14 = unet.Config(
    size=64,
    channels_in=4,
    channels_out=4,
    widths=(320, 640, 1280, 1280),
    depth=(1, 1, 1, 0),
    heads=(8, 8, 8, 8),
    middle=1,
    layers=2,
    context=768,
    groups=32,
    eps=1e-5,
    linear=False,
)
SDXL = unet.Config(
    size=128,
    channels_in=4,
    channels_out=4,
    widths=(320, 640, 1280),
    depth=(0, 2, 10),
    heads=(5, 10, 20),
    middle=10,
    layers=2,
    context=2048,
    groups=32,
    eps=1e-5,
    linear=True,
    size_width=256,
    pooled=1280,
)
VAE = vae.Config(
    channels=3, latent_channels=4, widths=(128, 256, 512, 512), layers=2, groups=32, scale=0.18215
)
CLIP_H = clip.Config(
    width=1280, inner=5120, depth=32, heads=16, side=224, patch=14, projected=1024, gelu=True
)
PIPELINES = {"": SD14, "sd14": SD14, "sdxl": SDXL}
TOKENS = 77  # of a prompt, in CLIP's text encoders


def b2_diffurl(config: Any, seeds: Sequence[int], mesh: Mesh) -> list[Program]:
    """Stable Diffusion under the first arm's settings: a chunk of the rollout, and the update.

    `--model` is empty or sd14 for Stable Diffusion 1.4, sdxl, or a folder's. The reward is
    CLIPScore by ViT-H/14, or by the model of `--rewards.clip`; the stage is the last one, whose
    suffix is the longest; of its pairs those that the estimator can keep are trained on.
    """
    del seeds  # one after the other
    from experiments import stable_diffusion
    from jaxalign.models import clip_folders, diffusers_folders, lora_files
    from jaxalign.ops import diffusion
    from jaxalign.rewards.clip_score import clip_score

    if not isinstance(config, stable_diffusion.Experiment):
        raise UserError("plans are for Stable Diffusion's presets; give one of those, as sd14-ddpo")
    dtype, rows = jnp.dtype(config.dtype), meshes.batch_sharding(mesh)
    if config.model in PIPELINES:
        sizes, coding = PIPELINES[config.model], VAE
    else:
        sizes = diffusers_folders.read_unet_config(config.model)
        coding = diffusers_folders.read_vae_config(config.model)
    eyes = clip_folders.describe(config.rewards.clip).vision if config.rewards.clip else CLIP_H
    net, coder = unet.unet(sizes, dtype, remat=True, rows=rows), vae.autoencoder(coding, dtype)
    tower = clip.vision(eyes, clip.Normalisation(), dtype)
    b2 = stable_diffusion.method_of(config, config.arms[0], mesh)
    chunks = stable_diffusion.chunks_of(config, b2, mesh)
    shape = stable_diffusion.latent_shape(config, sizes.size, sizes.channels_in, coder.shrink)
    count = len(stable_diffusion.read_prompts(config).train)
    key, everywhere = jax.eval_shape(lambda: jax.random.key(0)), meshes.replicated(mesh)

    base = jax.eval_shape(net.init, key)
    make = functools.partial(b2_method.init, b2, prompts=count, lora_rule=lora_files.RULE)
    state = meshes.lying(
        jax.eval_shape(lambda p, key: make(p, key=key), base, key), mesh, unet.RULES
    )
    state = state._replace(extra=state.extra._replace(suffix=np.int32(b2.suffix_stop)))
    alphas = diffusion.scaled_linear_alphas()
    sampler = jax.eval_shape(lambda: diffusion.ddim_sampler(alphas, b2.steps, eta=b2.eta))
    context = _conditions(sizes, count)
    null = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), context)
    target = jax.ShapeDtypeStruct((count, eyes.projected), jnp.float32)
    known = spread((sampler, context, null, target), everywhere)
    scorer = meshes.lying(jax.eval_shape(tower.init, key), mesh, clip.RULES)
    decoder = meshes.lying(jax.eval_shape(coder.init, key), mesh, vae.RULES)
    task = b2_method.Task(*known, scorer, decoder)
    at_once = config.decode_per_device * meshes.data_devices(mesh)
    predict, reward = guided(net.apply, b2.guidance), clip_score(tower.embed, at_once)

    def rollout(state: TrainState, task: b2_method.Task, key: Array) -> tuple[PyTree, Array]:
        groups = b2.groups // chunks
        samples = b2_method.sample(predict, b2, groups, shape, rows, state, task, key)
        decode = functools.partial(coder.decode, task.decoder)
        pictures = map_chunks(decode, samples.pictures, at_once)
        batch = {"target": task.target[jnp.repeat(samples.prompt, b2.leaves)]}
        return samples, reward(pictures, batch, task.reward)

    def update(
        state: TrainState, task: b2_method.Task, samples: PyTree, rewards: Array, key: Array
    ) -> tuple[TrainState, PyTree]:
        optimizer = b2_method.make_optimizer(b2)
        return b2_method.update(predict, b2, optimizer, state, task, samples, rewards, key, rows)

    samples = _trees(b2, shape, mesh)
    rewards = spread(jax.ShapeDtypeStruct((b2.groups * b2.leaves,), jnp.float32), rows)
    held = {
        "parameters": state.params,
        "optimizer": state.opt_state,
        "reward model": task.reward,
        "autoencoder": task.decoder,
        "prompts": (task.context, task.null, task.target),
    }
    if state.slow:
        held["reference"] = state.slow
    kept = (
        {"start of the arms": meshes.lying(base, mesh, unet.RULES)} if len(config.arms) > 1 else {}
    )
    pairs = b2.suffix_stop * b2.groups * b2.leaves * _kept(b2)
    turns = math.ceil(math.ceil(pairs / b2.updates) / b2.micro_batch)
    return [
        Program(
            "rollout",
            rollout,
            (state, task, _key(mesh)),
            held=held,
            beside=kept | ({"trajectories": samples} if chunks > 1 else {}),
            turns=b2.steps,
            times=chunks,
        ),
        Program(
            "update",
            update,
            (state, task, samples, rewards, _key(mesh)),
            (0,),
            {**held, "trajectories": samples},
            beside=kept,
            turns=turns,
            exchanged=b2.epochs * b2.updates * turns * _exchanged(b2, state, shape, dtype, mesh),
        ),
    ]


def _exchanged(
    b2: b2_method.Config, state: TrainState, shape: tuple[int, ...], dtype: Any, mesh: Mesh
) -> float:
    """Bytes that a device has to send in a micro-batch: for gradients and for shuffled pairs.

    Gradients of adapted matrices are summed as they come out of the backward pass, before they
    become gradients of the adapters. Each device gets its pairs' two latents from those that drew
    them as a sum in which all others have zeros.
    """
    trained: Any = state.params["model"]
    gradients = 4 * sum(leaf.size for leaf in jax.tree.leaves(trained))
    if b2.lora_rank:
        adapters = state.params["lora"].values()
        matrices = sum(each["down"].shape[0] * each["up"].shape[1] for each in adapters)
        gradients = dtype.itemsize * matrices
    pairs = 2 * b2.micro_batch * 4 * math.prod(shape)
    return sum_over(meshes.data_devices(mesh), gradients + pairs)


def _conditions(sizes: unet.Config, count: int) -> PyTree:
    """What the U-Net takes for each prompt."""

    def array(*shape: int) -> Any:
        return jax.ShapeDtypeStruct((count, *shape), jnp.float32)

    tokens = array(TOKENS, sizes.context)
    if not sizes.size_width:
        return tokens
    return unet.Conditions(tokens, array(sizes.pooled), array(6))


def _trees(b2: b2_method.Config, shape: tuple[int, ...], mesh: Mesh) -> b2_method.Samples:
    """A stage's samples, groups dealt out to the devices."""
    groups, width, steps = b2.groups, sum(level_sizes(b2.branches)), b2.steps
    first = meshes.batch_sharding(mesh)
    second = NamedSharding(mesh, PartitionSpec(None, *first.spec))

    def array(where: NamedSharding, kind: Any, *sizes: int) -> Any:
        return jax.ShapeDtypeStruct(sizes, kind, sharding=where)

    everywhere = meshes.replicated(mesh)
    record = Rollout(
        array(second, jnp.float32, steps + 1, groups, width, *shape),
        array(second, jnp.float32, steps, groups, width),
        *(array(everywhere, jnp.int32, width) for _ in range(2)),
    )
    prompt = array(first, jnp.int32, groups)
    return b2_method.Samples(prompt, array(first, jnp.float32, groups * b2.leaves, *shape), record)


def _kept(b2: b2_method.Config) -> float:
    """The share of a stage's pairs that its estimator keeps at most."""
    if b2.estimator in ("official", "extremes"):  # the best and the worst of those compared
        return 2 / max(2, b2.leaves if b2.estimator == "official" else 5)
    return b2.keep_share if b2.estimator == "telescope_shrunk" else 1.0


Build = Callable[[Any, Sequence[int], Mesh], list[Program]]
PROGRAMS: Mapping[str, Build] = {
    "metra": metra,
    "hiql": hiql,
    "r3hf": r3hf,
    "b2_diffurl": b2_diffurl,
}
