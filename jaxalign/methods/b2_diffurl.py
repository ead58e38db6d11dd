"""B2-DiffuRL: backward progressive training and branch-based sampling for diffusion models.

Hu et al., "Towards Better Alignment: Training Diffusion Models with Reinforcement Learning Against
Sparse Rewards", CVPR 2025 (arXiv 2503.11240), and the code released with it. One stage is

    sample   every group's prefix once, then K branches of it from the split to the picture,
    score    the pictures with a reward,
    select   an advantage for every row of the tree (`ops.policy_gradient`), and which rows count,
    update   a clipped policy gradient over the kept (row, step) pairs of the trained suffix.

The trained suffix grows backward from the last steps. With one branch, the whole path trained and
the estimator `prompt_z`, the same program is DDPO (Black et al. 2024).

Departures from the released code:
  - one compiled program per stage; the split is a traced number, so it compiles only once;
  - latents are kept in float32 (it keeps float16, which moves the density ratio away from 1);
  - an epoch's pairs are shared out evenly over its updates; the release loses the remainder;
  - estimators beyond `official`, adaptive growth, step weights, KL penalty, EMA: off by default.

Dimensions: T steps, G groups, K branches, W rows a group (trunk and branches), P prompts, M pairs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from jaxalign.core import distributed
from jaxalign.core import mesh as meshes
from jaxalign.core import state as states
from jaxalign.core import step as steps
from jaxalign.core.state import TrainState
from jaxalign.core.types import Array, Max, Mean, Params, PyTree, UserError
from jaxalign.models import lora
from jaxalign.ops import diffusion
from jaxalign.ops import policy_gradient as pg
from jaxalign.ops.diffusion import Sampler, StepWeight
from jaxalign.rewards.host import HostReward, to_uint8
from jaxalign.rollout.diffusion import Context, Predict, Rollout, branch, step_out

Estimator = Literal[
    "official",
    "branch_loo",
    "branch_z",
    "prompt_z",
    "grpo",
    "extremes",
    "telescope",
    "telescope_shrunk",
]


@dataclasses.dataclass(frozen=True)
class Config:
    """Defaults are those of the released launch script; its symbols stand in the comments."""

    stages: int = 100  # J
    groups: int = 256  # 32 batches of 8 prompts
    branches: tuple[int, ...] = (5,)  # K; several numbers nest further branchings in the suffix
    steps: int = 20  # T
    eta: float = 1.0
    guidance: float = 5.0
    suffix_start: int = 14  # s_lo, trained steps in the first stage
    suffix_stop: int = 20  # s_hi, in the last
    growth: Literal["clock", "adaptive"] = "clock"
    # adaptive: grow when less than this share of the reward's variance arises in the suffix
    growth_share: float = 0.5
    estimator: Estimator = "official"
    threshold: float = 0.5  # official: z of the best and the worst branch
    keep_share: float = 1.0  # telescope_shrunk: rows trained on, those of largest advantage
    history: int = 8  # stages whose scores join a prompt's baseline
    epochs: int = 2
    updates: int = 3  # optimizer steps an epoch
    micro_batch: int = 128  # (row, step) pairs in memory at once
    clip: float = 0.1  # on the density ratio, whose log is averaged over dimensions
    advantage_clip: float = 5.0
    step_weight: StepWeight = "uniform"
    kl_weight: float = 0.0  # of KL(policy || base) per dimension
    learning_rate: float = 1e-4
    weight_decay: float = 1e-4
    gradient_clip: float = 1.0
    ema: float = 0.0  # decay a stage of the averaged policy; 0 keeps none
    lora_rank: int = 0  # 0 trains all weights

    def __post_init__(self) -> None:
        for name in ("stages", "groups", "steps", "history", "epochs", "updates", "micro_batch"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"{name} = {getattr(self, name)}: must be at least 1; give a positive number"
                )
        for name in ("learning_rate", "gradient_clip", "clip", "advantage_clip"):
            if not getattr(self, name) > 0:
                raise UserError(
                    f"{name} = {getattr(self, name)}: must be positive; try the default"
                )
        for name in ("kl_weight", "weight_decay", "lora_rank", "threshold"):
            if getattr(self, name) < 0:
                raise UserError(
                    f"{name} = {getattr(self, name)}: must not be negative; 0 turns it off"
                )
        if not 0 < self.keep_share <= 1:
            raise UserError(f"keep_share = {self.keep_share}: a share lies in (0, 1]; 1 keeps all")
        if not 0 <= self.ema < 1:
            raise UserError(f"ema = {self.ema}: a decay lies in [0, 1); 0 keeps no average")
        self._check_suffix()
        self._check_branches()

    def _check_suffix(self) -> None:
        if not 1 <= self.suffix_start <= self.suffix_stop <= self.steps:
            raise UserError(
                f"suffix_start = {self.suffix_start}, suffix_stop = {self.suffix_stop}: need "
                f"1 <= suffix_start <= suffix_stop <= steps = {self.steps}; change one of the three"
            )
        trained = self.steps if self.estimator.startswith("telescope") else self.suffix_start
        if self.step_weight == "drop_last" and trained <= 2:
            raise UserError(
                f"step_weight = drop_last: leaves none of the {trained} trained steps; lengthen "
                "suffix_start, or choose another step_weight"
            )

    def _check_branches(self) -> None:
        if not self.branches or min(self.branches) < 1:
            raise UserError(
                f"branches = {self.branches}: give at least one number, each at least 1"
            )
        nested = self.estimator.startswith("telescope")
        if len(self.branches) > 1 and not nested:
            raise UserError(
                f"branches = {self.branches}: nested branchings need estimator telescope; "
                "give one number"
            )
        if len(self.branches) > self.suffix_start:
            raise UserError(
                f"branches = {self.branches}: {len(self.branches)} splits do not fit in "
                f"suffix_start = {self.suffix_start} steps; lengthen the suffix"
            )
        if min(self.branches) < 2 and (nested or self.estimator.startswith("branch")):
            raise UserError(
                f"branches = {self.branches}: estimator {self.estimator} compares sibling "
                "branches; give at least 2"
            )
        if self.estimator == "extremes" and self.groups * self.leaves % 5:
            raise UserError(
                f"groups = {self.groups}, branches = {self.branches}: estimator extremes "
                "selects among 5 pictures at a time; let their product be a multiple of 5"
            )

    @property
    def leaves(self) -> int:
        """Pictures a group."""
        return math.prod(self.branches)


class Task(NamedTuple):
    """What a stage reads and never changes; an argument of the compiled code.

    sampler: the steps. context: `[P, ...]`, null: `[...]`, embedded prompts and the empty prompt,
    arrays or pytrees as the network takes them.
    target: pytree of `[P, ...]`, what the reward needs to know of each prompt.
    reward, decoder: parameters of the reward, and of what turns latents into pictures.
    """

    sampler: Sampler
    context: PyTree
    null: PyTree
    target: PyTree
    reward: PyTree
    decoder: PyTree = None

    @property
    def prompts(self) -> int:
        return jax.tree.leaves(self.context)[0].shape[0]

    def rows(self, prompt: Array) -> Context:
        return Context(self.context, self.null).rows(prompt)


class Extra(NamedTuple):
    """history: per-prompt score moments `[S, P]`. suffix: `[] i32`, steps the next stage trains.

    The rest are running totals `[] i32`: rewards asked, network rows evaluated in sampling, and
    (row, step) pairs trained on.
    """

    history: pg.Moments
    suffix: Array
    reward_evaluations: Array
    network_evaluations: Array
    trained_pairs: Array


class Samples(NamedTuple):
    """prompt: `[G] i32`. pictures: `[G*leaves, ...]`. record: the tree they came from."""

    prompt: Array
    pictures: Array
    record: Rollout


# (Task.decoder, latents [B, ...]) -> pictures [B, ...]
Decode = Callable[[PyTree, Array], Array]

# (pictures [B, ...], {"prompt": [B], ...} with the rows of Task.target, Task.reward) -> f32[B]
Reward = Callable[[Array, dict[str, Any], PyTree], Array]


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """AdamW behind a clipped gradient norm, as released.

    The rates are kept in the optimizer's state, so that one compiled stage serves a sweep over
    them.
    """
    adamw = optax.inject_hyperparams(optax.adamw)(
        config.learning_rate, weight_decay=config.weight_decay
    )
    return optax.chain(optax.clip_by_global_norm(config.gradient_clip), adamw)


def trainable(config: Config) -> str:
    """The path rule of what is trained: the adapters if there are any, else the network."""
    return "lora/.*" if config.lora_rank else "model/.*"


def init(
    config: Config, base: Params, prompts: int, key: Array, lora_rule: str = ".*"
) -> TrainState:
    """The state before the first stage: the base model, with adapters if `lora_rank` is not 0."""
    # Copies: the state is donated to the stage, the base is not.
    params = {"model": jax.tree.map(jnp.copy, base)}
    if config.lora_rank:
        params["lora"] = lora.init_lora(key, base, config.lora_rank, lora_rule)
    # An adapted model is its own reference: the base without the adapters.
    slow = {} if config.lora_rank else {"reference": {"model": jax.tree.map(jnp.copy, base)}}
    if config.ema:
        slow["ema"] = jax.tree.map(jnp.copy, states.partition(params, trainable(config))[0])
    totals = [jnp.zeros((), jnp.int32) for _ in range(3)]
    history = pg.empty_history(config.history + 1, prompts)
    extra = Extra(history, jnp.asarray(config.suffix_start, jnp.int32), *totals)
    return states.create(
        params, make_optimizer(config), trainable=trainable(config), slow=slow, extra=extra
    )


def reference_params(state: TrainState) -> Params:
    """Network parameters of the base model."""
    return state.slow["reference"]["model"] if "reference" in state.slow else state.params["model"]


def policy_params(state: TrainState, config: Config) -> Params:
    """Network parameters of the trained model: the average where one is kept, adapters merged."""
    params = state.params
    if config.ema:
        params = states.merge(state.slow["ema"], states.partition(params, trainable(config))[1])
    return lora.effective(params)


def split_points(config: Config, suffix: Array) -> Array:
    """Branch steps `[levels] i32`: the suffix's first step, then at equal shares of the suffix."""
    levels = len(config.branches)
    return config.steps - suffix + suffix * jnp.arange(levels, dtype=jnp.int32) // levels


def sample(
    predict: Predict,
    config: Config,
    groups: int,
    shape: tuple[int, ...],
    rows: NamedSharding | None,
    state: TrainState,
    task: Task,
    key: Array,
) -> Samples:
    """Draws prompts with replacement and samples their trees.

    groups: how many trees. shape: of a latent. rows: how groups lie on a mesh.
    """
    prompt_key, start_key, path_key = jax.random.split(key, 3)
    prompt = jax.random.randint(prompt_key, (groups,), 0, task.prompts)
    start = jax.random.normal(start_key, (groups, *shape), jnp.float32)
    if rows is not None:
        prompt, start = jax.lax.with_sharding_constraint((prompt, start), rows)
    leaves, record = branch(
        predict,
        lora.effective(state.params),
        task.sampler,
        start,
        task.rows(prompt),
        path_key,
        split_points(config, state.extra.suffix),
        config.branches,
    )
    return Samples(prompt, leaves.reshape(-1, *shape), record)


def credit(config: Config, rewards: Array, prompt: Array, pooled: pg.Moments) -> pg.Credit:
    """Credit for the whole tree by the estimator of `config`. rewards: `[G, leaves]`."""
    mean, std = pooled.mean[prompt], pooled.std()[prompt]
    if config.estimator == "telescope":
        return pg.telescope(rewards, mean, std, config.branches)
    if config.estimator == "telescope_shrunk":
        return pg.telescope_shrunk(rewards, mean, std, config.branches, config.keep_share)
    leaf = {
        "official": lambda: pg.official(rewards, mean, std, config.threshold),
        "branch_loo": lambda: pg.branch_loo(rewards, std),
        "branch_z": lambda: pg.branch_z(rewards),
        "prompt_z": lambda: pg.prompt_z(rewards, mean, std),
        "grpo": lambda: pg.grpo(rewards, prompt, pooled.count.shape[0]),
        "extremes": lambda: pg.extremes(rewards, mean, std, config.threshold),
    }[config.estimator]()
    trunk = ((0, 0), (1, 0))  # one column, not trained
    return pg.Credit(jnp.pad(leaf.advantage, trunk), jnp.pad(leaf.keep, trunk))


class Pairs(NamedTuple):
    """order: `[T*G*W] i32`, flat indices, the kept pairs first and shuffled. count: `[] i32`."""

    order: Array
    count: Array


def select_pairs(keep: Array, record: Rollout, weight: Array, key: Array) -> Pairs:
    """The pairs to train on: kept rows `[G, W]`, steps that the row ran, steps of positive weight
    `[T]`.
    """
    step = jnp.arange(weight.shape[0])[:, None, None]
    ran = (step >= record.first[None, None]) & (step < record.last[None, None])
    chosen = (keep[None] & ran & (weight > 0)[:, None, None]).reshape(-1)
    # Unchosen pairs sort behind every chosen one: compaction and shuffle in one.
    rank = jnp.where(chosen, jax.random.uniform(key, chosen.shape), 2.0)
    return Pairs(jnp.argsort(rank), chosen.sum())


class PairBatch(NamedTuple):
    """M pairs: latent before and after the step `[M, ...]`, the rest `[M]`; weight is 0 on
    padding.
    """

    x: Array
    x_next: Array
    step: Array
    log_density: Array
    advantage: Array
    weight: Array
    context: Context


def gather(
    index: Array, used: Array, samples: Samples, advantage: Array, weight: Array, task: Task
) -> PairBatch:
    """The pairs at flat indices `[M]` into [T, G, W]; used `[M] bool` is false on padding."""
    record = samples.record
    step, group, row = jnp.unravel_index(index, record.log_density.shape)
    return PairBatch(
        record.latents[step, group, row],
        record.latents[step + 1, group, row],
        step,
        record.log_density[step, group, row],
        advantage[group, row],
        weight[group, row] * used,
        task.rows(samples.prompt[group]),
    )


def pair_loss(
    predict: Predict,
    config: Config,
    sampler: Sampler,
    step_weight: Array,
    reference: Params,
    params: Params,
    batch: PairBatch,
) -> tuple[Mean, dict[str, Mean | Max]]:
    """The clipped surrogate of M pairs, and the KL penalty where `kl_weight` asks for it."""
    ours = step_out(predict, lora.effective(params), sampler, batch.step, batch.x, batch.context)
    log_ratio = diffusion.log_density(ours, batch.x_next) - batch.log_density
    item = pg.clipped_surrogate(log_ratio, batch.advantage, config.clip)
    if config.kl_weight:
        theirs = step_out(predict, reference, sampler, batch.step, batch.x, batch.context)
        dimensions = math.prod(batch.x.shape[1:])
        item = item + config.kl_weight * diffusion.divergence(ours, theirs) / dimensions
    item = item * step_weight[batch.step]
    total = batch.weight.sum()
    # Relative, because a density far from 1 rounds more coarsely.
    error = jnp.abs(log_ratio) / jnp.maximum(jnp.abs(batch.log_density), 1.0)
    clipped = (jnp.abs(jnp.expm1(log_ratio)) > config.clip) * batch.weight
    metrics: dict[str, Mean | Max] = {
        "ratio_error": Max(jnp.max(error * batch.weight)),
        "clipped": Mean(clipped.sum(), total),
    }
    return Mean((item * batch.weight).sum(), total), metrics


def update(
    predict: Predict,
    config: Config,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    task: Task,
    samples: Samples,
    rewards: Array,
    key: Array,
    rows: NamedSharding | None = None,
) -> tuple[TrainState, dict[str, Array]]:
    """Selection and all optimizer steps of a stage.

    rewards: `[G*leaves] f32`. rows: how groups lie on a mesh, and so the pairs of a micro-batch.
    """
    rewards = rewards.reshape(config.groups, config.leaves)
    prompts = task.prompts
    now = pg.moments_by(jnp.repeat(samples.prompt, config.leaves), rewards.reshape(-1), prompts)
    history = pg.push(state.extra.history, now)
    earned = credit(config, rewards, samples.prompt, pg.pool(history))
    state, log = learn(predict, config, optimizer, state, task, samples, earned, key, rows)
    share = pg.within_share(rewards, samples.prompt, prompts) if config.leaves > 1 else jnp.ones(())
    metrics = {
        "reward": rewards.mean(),
        "reward_std": rewards.std(),
        "suffix": state.extra.suffix,
        "within_share": share,
        "kept": earned.keep.mean(),
        "loss": log["loss"].mean(),
        "gradient_norm": log["gradient_norm"].mean(),
        "clipped": log["clipped"].mean(),
        # Before the first optimizer step the policy is the one that sampled: this must be 0.
        "ratio_error": log["ratio_error"][0],
    }
    return _finish_stage(config, state, samples, history, share, log["pairs"].sum(), metrics)


def learn(
    predict: Predict,
    config: Config,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    task: Task,
    samples: Samples,
    earned: pg.Credit,
    key: Array,
    rows: NamedSharding | None,
) -> tuple[TrainState, dict[str, Array]]:
    """The optimizer steps on the kept pairs; and what each of them measured, `[steps]` a name."""
    record = samples.record
    advantage = jnp.clip(earned.advantage, -config.advantage_clip, config.advantage_clip)
    row_weight = jnp.broadcast_to(earned.weight, advantage.shape)
    weight = diffusion.step_weights(config.step_weight, task.sampler, _latent_change(record))
    reference = reference_params(state)  # read before the loop: the updates do not move it

    def objective(params: Params, batch: PairBatch, _: Array) -> tuple[Mean, dict[str, Mean | Max]]:
        return pair_loss(predict, config, task.sampler, weight, reference, params, batch)

    def optimizer_step(carry: tuple[TrainState, Pairs], i: Array) -> tuple[tuple, dict]:
        state, pairs = carry
        pairs = jax.lax.cond(
            i % config.updates == 0,
            lambda: select_pairs(earned.keep, record, weight, jax.random.fold_in(key, i)),
            lambda: pairs,
        )
        share = -(-pairs.count // config.updates)
        begin = (i % config.updates) * share
        end = jnp.minimum(begin + share, pairs.count)

        def take(micro: Array) -> PairBatch:
            position = begin + micro * config.micro_batch + jnp.arange(config.micro_batch)
            index = pairs.order[jnp.minimum(position, pairs.order.shape[0] - 1)]
            if rows is not None:  # or every device would compute all of the pairs
                index, position = jax.lax.with_sharding_constraint((index, position), rows)
            return gather(index, position < end, samples, advantage, row_weight, task)

        count = -(-jnp.maximum(end - begin, 0) // config.micro_batch)
        rule = trainable(config)
        gradient, seen = steps.accumulate(objective, state.params, take, count, key, trainable=rule)
        seen |= {"gradient_norm": optax.tree.norm(gradient), "pairs": end - begin}
        return (steps.apply_gradient(state, gradient, optimizer, trainable=rule), pairs), seen

    nothing = Pairs(jnp.zeros(record.log_density.size, jnp.int32), jnp.zeros((), jnp.int32))
    number = jnp.arange(config.epochs * config.updates)
    (state, _), log = jax.lax.scan(optimizer_step, (state, nothing), number)
    return state, log


def _latent_change(record: Rollout) -> Array:
    """Mean squared change `[T]` of the latents at each step, over the rows that ran it."""
    change = (record.latents[1:] - record.latents[:-1]) ** 2
    change = change.reshape(*record.log_density.shape, -1).mean(-1)
    step = jnp.arange(change.shape[0])[:, None]
    ran = ((step >= record.first[None]) & (step < record.last[None]))[:, None]
    return (change * ran).sum((1, 2)) / (ran.sum((1, 2)) * change.shape[1])


def _finish_stage(
    config: Config,
    state: TrainState,
    samples: Samples,
    history: pg.Moments,
    share: Array,
    pairs: Array,
    metrics: dict[str, Array],
) -> tuple[TrainState, dict[str, Array]]:
    """Counts what the stage cost, moves the average and the suffix."""
    old, record = state.extra, samples.record
    rows = 1 if config.guidance == 1 else 2
    extra = Extra(
        history,
        next_suffix(config, state.step + 1, old.suffix, share),
        old.reward_evaluations + config.groups * config.leaves,
        old.network_evaluations + rows * config.groups * (record.last - record.first).sum(),
        old.trained_pairs + pairs,
    )
    slow = state.slow
    if config.ema:
        trained = states.partition(state.params, trainable(config))[0]
        slow = {**slow, "ema": steps.follow(slow["ema"], trained, config.ema)}
    totals = ("reward_evaluations", "network_evaluations", "trained_pairs")
    metrics |= {name: getattr(extra, name) for name in totals}
    return state._replace(step=state.step + 1, slow=slow, extra=extra), metrics


def next_suffix(config: Config, stage: Array, suffix: Array, share: Array) -> Array:
    """Steps trained in `stage` (counted from 0).

    By the clock, the range in equal parts over the run; adaptive, one more step when less than
    `growth_share` of the variance still arises in the suffix.
    """
    span = config.suffix_stop - config.suffix_start + 1
    if config.growth == "clock":
        grown = config.suffix_start + stage * span // config.stages
    else:
        grown = suffix + (share < config.growth_share)
    return jnp.minimum(grown, config.suffix_stop).astype(jnp.int32)


def pictures_are_latents(_: PyTree, latents: Array) -> Array:
    """What decodes where the network works on pictures."""
    return latents


def make_stage(
    predict: Predict,
    config: Config,
    shape: tuple[int, ...],
    decode: Decode,
    reward: Reward,
    rows: NamedSharding | None = None,
    chunks: int = 1,
) -> Callable[[TrainState, Task, Array], tuple[TrainState, dict[str, Array]]]:
    """The whole stage as one compiled program `(state, task, key) -> (state, metrics)`.

    The state is donated.

    shape: of a latent. reward: on device; for host rewards see `make_host_stage`.
    rows: how groups lie on a mesh; a group's branches stay on its device.
    chunks: parts of the groups that are sampled and scored one after the other, to save memory.
    Raises: UserError when the groups cannot be shared out so.
    """
    groups, optimizer = _chunk_groups(config, chunks, rows), make_optimizer(config)

    def stage(state: TrainState, task: Task, key: Array) -> tuple[TrainState, dict[str, Array]]:
        def draw(key: Array) -> tuple[Samples, Array]:
            samples = sample(predict, config, groups, shape, rows, state, task, key)
            pictures = decode(task.decoder, samples.pictures)
            batch = _reward_batch(config, task, samples.prompt)
            return samples, reward(pictures, batch, task.reward)

        *sample_keys, update_key = _stage_keys(key, chunks)
        if chunks == 1:
            samples, rewards = draw(sample_keys[0])
        else:
            samples, rewards = _join(*jax.lax.map(draw, jnp.stack(sample_keys)))
        return update(predict, config, optimizer, state, task, samples, rewards, update_key, rows)

    return jax.jit(stage, donate_argnums=0)


def _chunk_groups(config: Config, chunks: int, rows: NamedSharding | None) -> int:
    """Groups of one chunk."""
    if chunks < 1 or config.groups % chunks:
        raise UserError(
            f"chunks = {chunks}: must be at least 1 and divide groups = {config.groups}; "
            "change one of the two"
        )
    groups = config.groups // chunks
    if rows is not None:
        what = f"groups / {chunks} chunks ="
        meshes.check_divisible(what, groups, rows.mesh)  # ty: ignore[invalid-argument-type]
    return groups


def _stage_keys(key: Array, chunks: int) -> list[Array]:
    """A key for each chunk's samples, then the update's."""
    sample_key, update_key = jax.random.split(key)
    return [*(jax.random.split(sample_key, chunks) if chunks > 1 else [sample_key]), update_key]


def make_host_stage(
    predict: Predict,
    config: Config,
    shape: tuple[int, ...],
    decode: Decode,
    reward: HostReward,
    rows: NamedSharding | None = None,
    chunks: int = 2,
) -> Callable[[TrainState, Task, Array], tuple[TrainState, dict[str, Array]]]:
    """As `make_stage` with a reward on the host, which scores a chunk while the next is sampled.

    decode: to pictures in [-1, 1]; the reward sees them as bytes. chunks: of the groups, each
    sampled by the same compiled program; the samples are those of `make_stage` with as many.
    Raises: UserError when the groups cannot be shared out so, and what `reward.result` raises.
    """
    groups, optimizer = _chunk_groups(config, chunks, rows), make_optimizer(config)
    split = jax.jit(functools.partial(_stage_keys, chunks=chunks))

    @jax.jit
    def rollout(state: TrainState, task: Task, key: Array) -> tuple[Samples, Array, dict[str, Any]]:
        samples = sample(predict, config, groups, shape, rows, state, task, key)
        pictures = to_uint8(decode(task.decoder, samples.pictures))
        return samples, pictures, _reward_batch(config, task, samples.prompt)

    @functools.partial(jax.jit, donate_argnums=0)
    def learn(
        state: TrainState, task: Task, parts: list[Samples], rewards: list[Array], key: Array
    ) -> tuple[TrainState, dict[str, Array]]:
        joined = _join(*jax.tree.map(lambda *a: jnp.stack(a), *zip(parts, rewards, strict=True)))
        return update(predict, config, optimizer, state, task, *joined, key, rows)

    def stage(state: TrainState, task: Task, key: Array) -> tuple[TrainState, dict[str, Array]]:
        *sample_keys, update_key = split(key)
        parts, asked = [], []
        for sample_key in sample_keys:
            samples, pictures, batch = rollout(state, task, sample_key)
            parts.append(samples)
            asked.append(reward.submit(pictures, batch))
        where = rows or state.step.sharding
        rewards = [distributed.put(reward.result(a), where) for a in asked]
        return learn(state, task, parts, rewards, update_key)

    return stage


def _join(parts: Samples, rewards: Array) -> tuple[Samples, Array]:
    """Chunks, stacked `[C, ...]`, as one stage.

    Their groups take turns, so that on a mesh each stays on its device.
    """
    groups, record = parts.prompt.shape[1], parts.record

    def join(a: Array, axis: int = 0) -> Array:
        grouped = a.reshape(*a.shape[: axis + 1], groups, -1, *a.shape[axis + 2 :])
        turns = jnp.moveaxis(grouped, 0, axis + 1)
        return turns.reshape(*turns.shape[:axis], -1, *turns.shape[axis + 3 :])

    record = Rollout(
        join(record.latents, 1), join(record.log_density, 1), record.first[0], record.last[0]
    )
    return Samples(join(parts.prompt), join(parts.pictures), record), join(rewards)


def _reward_batch(config: Config, task: Task, prompt: Array) -> dict[str, Any]:
    """What the reward may know of each picture: its prompt's number and its prompt's targets."""
    row = jnp.repeat(prompt, config.leaves)
    return {"prompt": row, "target": jax.tree.map(lambda a: a[row], task.target)}
