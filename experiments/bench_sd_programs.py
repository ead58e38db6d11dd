"""What `experiments.bench_sd` times of ours: Stable Diffusion's U-Net in sampling and in learning.

Dimensions: B images, M pairs, L prompt tokens of K features, h w C of a latent, T steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.random_pipeline import _random as random_params
from jaxalign.core import cost
from jaxalign.core import mesh as meshes
from jaxalign.core import step as training
from jaxalign.core.state import TrainState
from jaxalign.core.types import Array, Params, PyTree
from jaxalign.methods import b2_diffurl
from jaxalign.models import lora, unet
from jaxalign.models.lora_files import RULE
from jaxalign.ops import diffusion
from jaxalign.ops.diffusion import Sampler
from jaxalign.rollout.diffusion import Context, denoise, guided, step_out

Case = Literal["rollout", "update"]
TOKENS = 77  # of a prompt


@dataclasses.dataclass(frozen=True)
class Size:
    """side: of the latents. context: features of a prompt's token. batches: images, or pairs."""

    side: int
    widths: tuple[int, ...]
    layers: int
    heads: int
    context: int
    groups: int
    dtype: str
    batches: tuple[int, ...]
    remat: tuple[bool, ...]


SIZES = {
    "tiny": Size(4, (8, 16), 1, 2, 8, 4, "float32", (8,), (False,)),
    "small": Size(16, (64, 128, 256, 256), 2, 4, 128, 32, "float32", (4,), (False,)),
    "full": Size(
        64, (320, 640, 1280, 1280), 2, 8, 768, 32, "bfloat16",
        (4, 8, 16, 32, 64, 128), (False, True),
    ),
}  # fmt: skip


class Problem(NamedTuple):
    """What all implementations are given.

    values: the U-Net's config.json. params: `{"model", "lora"}`, of NumPy. null: `[L, K]`.
    """

    size: Size
    values: Mapping[str, Any]
    config: b2_diffurl.Config
    params: Params
    sampler: Sampler
    null: np.ndarray
    seed: int


class Setting(NamedTuple):
    """batch: images, or pairs."""

    batch: int
    remat: bool


class Program(NamedTuple):
    """An implementation at one setting.

    run: number of the turn -> all results, waited for.
    outcome: in one row what every implementation must come to: the last latents of pictures from
        given noise, or the gradient of the adapters.
    memory: peak bytes of it alone, where they are known.
    where: what it runs on, in words.
    """

    run: Callable[[int], Any]
    outcome: Callable[[], np.ndarray]
    memory: Callable[[], int | None]
    where: str = ""


def unet_values(size: Size) -> dict[str, Any]:
    """The config.json of a U-Net of Stable Diffusion 1.x: no attention at the coarsest level."""
    plain = len(size.widths) - 1
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": size.side,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": list(size.widths),
        "down_block_types": [unet.WITH[0]] * plain + [unet.WITHOUT[0]],
        "up_block_types": [unet.WITHOUT[1]] + [unet.WITH[1]] * plain,
        "layers_per_block": size.layers,
        "attention_head_dim": size.heads,
        "cross_attention_dim": size.context,
        "norm_num_groups": size.groups,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
    }


def make_problem(size: Size, steps: int, seed: int) -> Problem:
    """A network and adapters of random weights, none of them zero but biases."""
    values = unet_values(size)
    config = b2_diffurl.Config(steps=steps, suffix_start=steps, suffix_stop=steps, lora_rank=4)
    init = unet.unet(unet.from_hub(values)).init
    base = jax.eval_shape(init, jax.random.key(0))

    def adapters(key: Array) -> Params:
        return lora.init_lora(key, base, config.lora_rank, RULE)

    params = {
        "model": random_params(init, (seed, 0)),
        "lora": random_params(adapters, (seed, 1)),
    }
    alphas = diffusion.scaled_linear_alphas()
    sampler = diffusion.ddim_sampler(alphas, config.steps, eta=config.eta)
    null = np.random.default_rng((seed, 2)).standard_normal((TOKENS, size.context))
    return Problem(size, values, config, params, sampler, null.astype(np.float32), seed)


def prompts(problem: Problem, batch: int) -> np.ndarray:
    """States of as many prompts `[B, L, K] f32`."""
    random = np.random.default_rng((problem.seed, 3))
    shape = (batch, TOKENS, problem.size.context)
    return random.standard_normal(shape).astype(np.float32)


def start_noise(problem: Problem, batch: int, key: Array) -> tuple[Array, Array]:
    """What a picture begins with `[B, h, w, C]`, and the key of the path's noise."""
    start_key, path_key = jax.random.split(key)
    side = problem.size.side
    return jax.random.normal(start_key, (batch, side, side, 4)), path_key


def path_noise(problem: Problem, batch: int) -> np.ndarray:
    """All noise `[T+1, B, h, w, C]` of the run that outcomes are of: the start, then the steps'."""
    start, key = start_noise(problem, batch, outcome_key())
    noise = [
        jax.random.normal(jax.random.fold_in(key, i), start.shape)
        for i in range(problem.config.steps)
    ]
    return np.stack([start, *noise])


def outcome_key() -> Array:
    """Of the run that outcomes are of."""
    return jax.random.key(0)


class Pairs(NamedTuple):
    """x, x_next: `[M, h, w, C] f32`. step: `[M] i32`. log_density, advantage: `[M] f32`."""

    x: np.ndarray
    x_next: np.ndarray
    step: np.ndarray
    log_density: np.ndarray
    advantage: np.ndarray


def make_pairs(problem: Problem, batch: int) -> Pairs:
    """Random latents and the steps that this very policy took from them; so ratios are near 1."""
    random, side = np.random.default_rng((problem.seed, 4)), problem.size.side
    x, noise = random.standard_normal((2, batch, side, side, 4)).astype(np.float32)
    step = np.arange(batch, dtype=np.int32) % problem.config.steps
    net = network(problem, remat=False)

    @jax.jit
    def take(params: Params, sampler: Sampler, x: Array, noise: Array, *context: Array) -> Any:
        predict = guided(net, problem.config.guidance)
        merged = lora.effective(params)
        taken = step_out(predict, merged, sampler, jnp.asarray(step), x, Context(*context))
        x_next = taken.mean + taken.std * noise
        return x_next, diffusion.log_density(taken, x_next)

    context = prompts(problem, batch), problem.null
    x_next, density = jax.device_get(take(problem.params, problem.sampler, x, noise, *context))
    advantage = random.standard_normal(batch).astype(np.float32)
    return Pairs(x, x_next, step, density, advantage)


def tiled(pairs: Pairs, batch: int) -> Pairs:
    """As many of them, some several times."""
    index = np.arange(batch) % len(pairs.x)
    return Pairs(*(array[index] for array in pairs))


# --- ours ----------------------------------------------------------------------------------------


def network(problem: Problem, *, remat: bool) -> Callable[..., Array]:
    """The U-Net's `apply`."""
    config = unet.from_hub(problem.values)
    return unet.unet(config, jnp.dtype(problem.size.dtype), remat=remat).apply


def own_mesh() -> jax.sharding.Mesh:
    """All of a CPU, but one of several accelerators, as torch has it."""
    whole = jax.default_backend() == "cpu"
    return meshes.make_mesh(devices=None if whole else jax.devices()[:1])


def sampling(problem: Problem, batch: int, rows: Any) -> Callable[..., Any]:
    """`(params, sampler, prompts, null, key) -> (last latents, path, log-densities)`."""
    predict = guided(network(problem, remat=False), problem.config.guidance)

    def sample(params: Params, sampler: Sampler, prompt: Array, null: Array, key: Array) -> Any:
        start, key = start_noise(problem, batch, key)
        start = jax.lax.with_sharding_constraint(start, rows)
        context = Context(prompt, null)
        return denoise(predict, lora.effective(params), sampler, start, context, key)

    return sample


def learning(problem: Problem, remat: bool) -> Callable[..., Any]:
    """`(state, sampler, pairs, prompts, null, key) -> (gradient, adapters, optimizer's memory)`."""
    config = problem.config
    predict = guided(network(problem, remat=remat), config.guidance)
    optimizer, rule = b2_diffurl.make_optimizer(config), b2_diffurl.trainable(config)

    def learn(
        state: TrainState, sampler: Sampler, pairs: Pairs, prompt: Array, null: Array, key: Array
    ) -> Any:
        ones = jnp.ones(sampler.steps)

        def objective(params: Params, batch: b2_diffurl.PairBatch, _: Array) -> Any:
            return b2_diffurl.pair_loss(predict, config, sampler, ones, {}, params, batch)

        batch = b2_diffurl.PairBatch(
            *pairs, weight=jnp.ones(len(pairs.x)), context=Context(prompt, null)
        )
        gradient, _ = training.accumulate(
            objective, state.params, lambda i: batch, 1, key, trainable=rule
        )
        state = training.apply_gradient(state, gradient, optimizer, trainable=rule)
        return gradient["lora"], state.params["lora"], state.opt_state

    return learn


class Ours:
    """Our programs of a case; parameters lie on the devices once for all of them."""

    def __init__(self, problem: Problem, case: Case, pairs: Pairs | None) -> None:
        """pairs: of the case update, to be repeated in larger batches."""
        self.problem, self.case, self.pairs, self.mesh = problem, case, pairs, own_mesh()
        params: Params | TrainState = problem.params
        if case == "update":
            params = jax.jit(init_state, static_argnums=1)(params, problem.config)
        self.given = self._everywhere((params, problem.sampler))
        self.null = self._everywhere(problem.null)

    def _everywhere(self, tree: PyTree) -> PyTree:
        return jax.device_put(tree, meshes.replicated(self.mesh))

    def program(self, setting: Setting) -> Program:
        """Rows are spread over the mesh; every update begins at the same adapters."""
        problem, rows = self.problem, meshes.batch_sharding(self.mesh)
        batch: tuple[PyTree, ...] = (prompts(problem, setting.batch),)
        if self.pairs is None:
            function = sampling(problem, setting.batch, rows)
        else:
            function = learning(problem, setting.remat)
            batch = (tiled(self.pairs, setting.batch), *batch)
        given = (*self.given, *jax.device_put(batch, rows), self.null)
        compiled = jax.jit(function).lower(*given, self._everywhere(outcome_key())).compile()

        def run(turn: int) -> Any:
            key = self._everywhere(jax.random.fold_in(outcome_key(), turn))
            return jax.block_until_ready(compiled(*given, key))

        def outcome() -> np.ndarray:
            result = compiled(*given, self._everywhere(outcome_key()))
            leaves = jax.tree.leaves(result[0])
            return np.concatenate([np.ravel(leaf) for leaf in leaves])

        where = f"{self.mesh.size} devices"
        return Program(run, outcome, lambda: program_bytes(compiled), where)


def init_state(params: Params, config: b2_diffurl.Config) -> TrainState:
    """Before the first step, with these adapters."""
    fresh = b2_diffurl.init(config, params["model"], 1, jax.random.key(0), RULE)
    return fresh._replace(params=params)


def program_bytes(compiled: Any) -> int:
    """What a program needs at most on one device, by XLA's account."""
    sizes = compiled.memory_analysis()
    kept = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return kept + sizes.temp_size_in_bytes


def image_flops(problem: Problem, case: Case, pairs: Pairs | None) -> float:
    """Operations an image of our program, as it is traced for the smallest batch."""
    batch, rows = problem.size.batches[0], meshes.batch_sharding(own_mesh())
    context = prompts(problem, batch), problem.null, outcome_key()
    if case == "rollout":
        program, given = sampling(problem, batch, rows), (problem.params, problem.sampler)
        return cost.count(program, *given, *context).flops / batch
    state = jax.eval_shape(lambda params: init_state(params, problem.config), problem.params)
    program = learning(problem, remat=False)
    return cost.count(program, state, problem.sampler, pairs, *context).flops / batch
