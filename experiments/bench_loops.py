"""The stage of B2-DiffuRL as Python loops over compiled single steps, for `experiments.bench`.

`Released` works as the released code and jannerm/ddpo do: the branches of a group one after the
other, every latent to the host, one compiled call for each (micro-batch, step) and a look at its
loss. `Batched` is the kindest loop there is: all branches in one call, nothing but the number of
kept pairs read by the host, and the same numbers as the compiled stage.

Dimensions: T steps, G groups, K branches, W rows a group, M pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.core import step as steps
from jaxalign.core.state import TrainState
from jaxalign.core.types import Array, Mean, Params, UserError
from jaxalign.methods import b2_diffurl
from jaxalign.methods.b2_diffurl import Config, PairBatch, Pairs, Samples, Task
from jaxalign.models import lora
from jaxalign.ops import diffusion
from jaxalign.ops import policy_gradient as pg
from jaxalign.rollout.diffusion import Context, Predict, Rollout, step_out

Number = Array | np.integer | int  # the host counts, compiled code calculates


class Prepared(NamedTuple):
    """What an update knows before its first gradient. history, share: as in `b2_diffurl.update`.

    advantage, row_weight: `[G, W]`. keep: `[G, W] bool`. step_weight: `[T]`.
    """

    advantage: Array
    keep: Array
    row_weight: Array
    step_weight: Array
    history: pg.Moments
    share: Array


class Sums(NamedTuple):
    """Gradients and losses added up over micro-batches."""

    gradient: Params
    loss: Mean


class Pieces:
    """What a loop calls, each compiled by itself. The split is `suffix_start` from the end."""

    def __init__(
        self, predict: Predict, config: Config, shape: tuple[int, ...], reward: b2_diffurl.Reward
    ) -> None:
        if len(config.branches) > 1:
            raise UserError(
                f"branches = {config.branches}: the loops know one branching; add --no-loops"
            )
        self.predict, self.config, self.shape, self.reward = predict, config, shape, reward
        self.split = config.steps - config.suffix_start
        self.optimizer = b2_diffurl.make_optimizer(config)
        # Numbers that live on the device already, so that no call has to send one.
        self.index = [jnp.asarray(i, jnp.int32) for i in range(config.steps)]
        for name in ("start", "step", "repeat", "assemble", "score", "prepare", "select", "zeros"):
            setattr(self, name, jax.jit(getattr(self, name)))
        for name in ("add_at", "add", "apply", "finish"):
            setattr(self, name, jax.jit(getattr(self, name)))

    def start(self, task: Task, key: Array) -> tuple[Array, Array, Array]:
        """Prompts `[G]`, initial noise `[G, ...]` and the paths' key, drawn as in `b2_diffurl`."""
        prompt_key, start_key, path_key = jax.random.split(key, 3)
        groups = (self.config.groups,)
        prompt = jax.random.randint(prompt_key, groups, 0, task.prompts)
        return prompt, jax.random.normal(start_key, (*groups, *self.shape), jnp.float32), path_key

    def step(
        self, params: Params, task: Task, i: Array, x: Array, prompt: Array, key: Array
    ) -> tuple[Array, Array]:
        """Rows x `[B, ...]` one step on, and the log-densities `[B]`."""
        effective, context = lora.effective(params), task.rows(prompt)
        gaussian = step_out(self.predict, effective, task.sampler, i, x, context)
        noise = jax.random.normal(jax.random.fold_in(key, i), x.shape, jnp.float32)
        x = gaussian.mean + gaussian.std * noise
        return x, diffusion.log_density(gaussian, x)

    def repeat(self, x: Array, prompt: Array) -> tuple[Array, Array]:
        """Every group K times, neighbours."""
        return jnp.repeat(x, self.config.leaves, 0), jnp.repeat(prompt, self.config.leaves)

    def assemble(
        self,
        trunk: list[Array],
        trunk_density: list[Array],
        leaf: list[Array],
        density: list[Array],
    ) -> Rollout:
        """The record of a tree from its pieces, `[G, ...]` and `[G*K, ...]` each."""
        total, split, groups = self.config.steps, self.split, self.config.groups

        def column(parts: list[Array], begin: int, size: int) -> Array:
            stacked = jnp.stack(parts).reshape(len(parts), groups, -1, *parts[0].shape[1:])
            rest = ((begin, size - begin - len(parts)), *[(0, 0)] * (stacked.ndim - 1))
            return jnp.pad(stacked, rest)

        latents = [column(trunk, 0, total + 1), column(leaf, split, total + 1)]
        densities = [column(density, split, total)]
        empty = jnp.zeros((total, groups, 1))
        densities.insert(0, column(trunk_density, 0, total) if trunk_density else empty)
        return Rollout(jnp.concatenate(latents, 2), jnp.concatenate(densities, 2), *self.bounds())

    def bounds(self) -> tuple[Array, Array]:
        """First and last position of the columns `[W]`: the trunk, then the branches."""
        split, leaves = self.split, self.config.leaves
        return jnp.array([0] + [split] * leaves), jnp.array([split] + [self.config.steps] * leaves)

    def score(self, pictures: Array, task: Task, prompt: Array) -> Array:
        batch = b2_diffurl._reward_batch(self.config, task, prompt)
        return self.reward(pictures, batch, task.reward)

    def prepare(self, state: TrainState, task: Task, samples: Samples, rewards: Array) -> Prepared:
        config, prompts = self.config, task.prompts
        rewards = rewards.reshape(config.groups, -1)
        repeated = jnp.repeat(samples.prompt, config.leaves)
        now = pg.moments_by(repeated, rewards.reshape(-1), prompts)
        history = pg.push(state.extra.history, now)
        credit = b2_diffurl.credit(config, rewards, samples.prompt, pg.pool(history))
        advantage = jnp.clip(credit.advantage, -config.advantage_clip, config.advantage_clip)
        row_weight = jnp.broadcast_to(credit.weight, advantage.shape)
        change = b2_diffurl._latent_change(samples.record)
        weight = diffusion.step_weights(config.step_weight, task.sampler, change)
        one = jnp.ones(())
        share = pg.within_share(rewards, samples.prompt, prompts) if config.leaves > 1 else one
        return Prepared(advantage, credit.keep, row_weight, weight, history, share)

    def select(self, ready: Prepared, record: Rollout, key: Array, update: Number) -> Pairs:
        key = jax.random.fold_in(key, update)
        return b2_diffurl.select_pairs(ready.keep, record, ready.step_weight, key)

    def zeros(self, params: Params) -> Sums:
        trained, _ = self.partition(params)
        return Sums(jax.tree.map(jnp.zeros_like, trained), Mean(jnp.zeros(()), jnp.zeros(())))

    def partition(self, params: Params) -> tuple[Params, Params]:
        return steps.states.partition(params, b2_diffurl.trainable(self.config))

    def add(
        self,
        sums: Sums,
        params: Params,
        reference: Params,
        task: Task,
        weight: Array,
        batch: PairBatch,
    ) -> Sums:
        """One micro-batch's gradient and loss added to `sums`."""
        trained, frozen = self.partition(params)

        def total(trained: Params) -> tuple[Array, Mean]:
            merged = steps.states.merge(trained, frozen)
            loss, _ = b2_diffurl.pair_loss(
                self.predict, self.config, task.sampler, weight, reference, merged, batch
            )
            return loss.total, loss

        gradient, loss = jax.grad(total, has_aux=True)(trained)
        return Sums(jax.tree.map(jnp.add, sums.gradient, gradient), sums.loss + loss)

    def add_at(
        self,
        sums: Sums,
        params: Params,
        reference: Params,
        task: Task,
        ready: Prepared,
        samples: Samples,
        order: Array,
        begin: Number,
        end: Number,
    ) -> Sums:
        """The same for the pairs `order[begin : begin + micro_batch]`, as far as `end`."""
        position = begin + jnp.arange(self.config.micro_batch)
        index = order[jnp.minimum(position, order.shape[0] - 1)]
        batch = b2_diffurl.gather(
            index, position < end, samples, ready.advantage, ready.row_weight, task
        )
        return self.add(sums, params, reference, task, ready.step_weight, batch)

    def apply(self, state: TrainState, sums: Sums) -> TrainState:
        weight = jnp.where(sums.loss.weight == 0, 1.0, sums.loss.weight)
        gradient = jax.tree.map(lambda g: g / weight, sums.gradient)
        trainable = b2_diffurl.trainable(self.config)
        return steps.apply_gradient(state, gradient, self.optimizer, trainable=trainable)

    def finish(
        self, state: TrainState, samples: Samples, ready: Prepared, pairs: Number
    ) -> TrainState:
        return b2_diffurl._finish_stage(
            self.config, state, samples, ready.history, ready.share, jnp.asarray(pairs), {}
        )[0]


class Batched:
    """The kindest loop: the compiled stage's own work and numbers, one call a step."""

    def __init__(self, pieces: Pieces) -> None:
        self.pieces = pieces

    def sample(self, state: TrainState, task: Task, key: Array) -> Samples:
        p, split = self.pieces, self.pieces.split
        prompt, x, key = p.start(task, key)
        paths: list[list[Array]] = [[x], []]
        densities: list[list[Array]] = [[], []]
        rows = prompt
        for i, index in enumerate(p.index):
            if i == split:
                x, rows = p.repeat(x, prompt)
                paths[1].append(x)
            x, density = p.step(state.params, task, index, x, rows, key)
            paths[i >= split].append(x)
            densities[i >= split].append(density)
        record = p.assemble(paths[0], densities[0], paths[1], densities[1])
        return Samples(prompt, x, record)

    def update(
        self, state: TrainState, task: Task, samples: Samples, rewards: Array, key: Array
    ) -> TrainState:
        p, config = self.pieces, self.pieces.config
        ready = p.prepare(state, task, samples, rewards)
        reference, nothing, total = b2_diffurl.reference_params(state), p.zeros(state.params), 0
        for epoch in range(config.epochs):
            pairs = p.select(ready, samples.record, key, np.int32(epoch * config.updates))
            count = int(pairs.count)  # the only wait: how many calls to make
            total += count
            share = -(-count // config.updates)
            for begin in range(0, share * config.updates, max(share, 1)):
                end, sums = min(begin + share, count), nothing
                for at in range(begin, end, config.micro_batch):
                    sums = p.add_at(
                        sums, state.params, reference, task, ready, samples, pairs.order, at, end
                    )
                state = p.apply(state, sums)
        return p.finish(state, samples, ready, np.int32(total))

    def stage(self, state: TrainState, task: Task, key: Array) -> TrainState:
        sample_key, update_key = jax.random.split(key)
        samples = self.sample(state, task, sample_key)
        rewards = self.pieces.score(samples.pictures, task, samples.prompt)
        return self.update(state, task, samples, rewards, update_key)


class Released:
    """The loop of the released code. rows: trajectories of a micro-batch, each at one step."""

    def __init__(self, pieces: Pieces, rows: int = 2) -> None:
        self.pieces, self.rows = pieces, rows

    def _stretch(
        self, state: TrainState, task: Task, prompt: Array, x: Array, key: Array, stretch: range
    ) -> tuple[Array, list[np.ndarray], list[np.ndarray]]:
        """Rows x through some steps; latents and densities of each on the host."""
        path, densities = [np.asarray(x)], []
        for i in stretch:
            x, density = self.pieces.step(state.params, task, self.pieces.index[i], x, prompt, key)
            path.append(np.asarray(x))
            densities.append(np.asarray(density))
        return x, path, densities

    def sample(self, state: TrainState, task: Task, key: Array) -> Samples:
        p, config = self.pieces, self.pieces.config
        split, leaves, groups = p.split, config.leaves, config.groups
        prompt, x, key = p.start(task, key)
        x, trunk, trunk_density = self._stretch(state, task, prompt, x, key, range(split))
        latents = np.zeros((config.steps + 1, groups, leaves + 1, *p.shape), np.float32)
        density = np.zeros((config.steps, groups, leaves + 1), np.float32)
        latents[: split + 1, :, 0] = trunk
        if split:
            density[:split, :, 0] = trunk_density
        for k in range(leaves):
            branch_key = jax.random.fold_in(key, config.steps + k)
            _, path, densities = self._stretch(
                state, task, prompt, x, branch_key, range(split, config.steps)
            )
            latents[split:, :, k + 1], density[split:, :, k + 1] = path, densities
        pictures = latents[-1, :, 1:].reshape(-1, *p.shape)
        return Samples(prompt, pictures, Rollout(latents, density, *p.bounds()))

    def update(
        self, state: TrainState, task: Task, samples: Samples, rewards: Array, key: Array
    ) -> TrainState:
        p, config = self.pieces, self.pieces.config
        ready = p.prepare(state, task, samples, rewards)
        chance = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        host = jax.device_get(ready)
        prompt, context = np.asarray(samples.prompt), np.asarray(task.context)
        reference, nothing = b2_diffurl.reference_params(state), p.zeros(state.params)
        kept, pairs = np.argwhere(host.keep), 0
        for _ in range(config.epochs):
            for share in np.array_split(chance.permutation(kept), config.updates):
                sums = nothing
                for batch in self._micro_batches(share, samples.record, host, chance):
                    rows = Context(context[prompt[batch.pop("group")]], task.null)
                    whole = PairBatch(**batch, context=rows)
                    sums = p.add(sums, state.params, reference, task, ready.step_weight, whole)
                    float(sums.loss.total)  # every peer looks at the loss
                    pairs += np.count_nonzero(batch["weight"])
                state = p.apply(state, sums)
        return p.finish(state, samples, ready, np.int32(pairs))

    def _micro_batches(
        self, share: np.ndarray, record: Rollout, ready: Prepared, chance: np.random.Generator
    ) -> Iterator[dict[str, Any]]:
        """Batches of kept (group, row) at one step each, every row in an order of its own."""
        split, trained = self.pieces.split, np.flatnonzero(ready.step_weight > 0)
        trunk, leaf = share[share[:, 1] == 0], share[share[:, 1] > 0]
        for rows, steps_ in ((trunk, trained[trained < split]), (leaf, trained[trained >= split])):
            for begin in range(0, len(rows), self.rows):
                group, row = rows[begin : begin + self.rows].T
                here = np.float32(np.arange(self.rows) < len(group))
                group, row = np.resize(group, self.rows), np.resize(row, self.rows)
                orders = [chance.permutation(steps_) for _ in range(self.rows)]
                for step in np.stack(orders, 1).astype(np.int32):
                    yield {
                        "x": record.latents[step, group, row],
                        "x_next": record.latents[step + 1, group, row],
                        "step": step,
                        "log_density": record.log_density[step, group, row],
                        "advantage": ready.advantage[group, row],
                        "weight": here * ready.row_weight[group, row],
                        "group": group,
                    }

    def stage(self, state: TrainState, task: Task, key: Array) -> TrainState:
        sample_key, update_key = jax.random.split(key)
        samples = self.sample(state, task, sample_key)
        rewards = self.pieces.score(samples.pictures, task, samples.prompt)
        return self.update(state, task, samples, rewards, update_key)


Loop = Batched | Released
