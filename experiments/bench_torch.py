"""The patch transformer and the stage of B2-DiffuRL in torch, for `experiments.bench`.

The same maths, weights copied from ours, and the same algorithm: the prefix once, all branches in
one batch, the official selection, the kept pairs compacted. Imported only where torch is installed.

Dimensions: T steps, G groups, K branches, W rows a group, P prompts, S stages remembered, M pairs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jaxalign.core.types import UserError
from jaxalign.methods.b2_diffurl import Config

# --- the network ---------------------------------------------------------------------------------


def timestep_embedding(timestep: Tensor, frequency: Tensor) -> Tensor:
    """Features `[B, 2 * len(frequency)]` of noise levels `[B]`; cosines first."""
    angle = timestep[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], -1)


def patchify(x: Tensor, patch: int) -> Tensor:
    """`[B, H, W, C]` to `[B, N, patch * patch * C]`."""
    b, h, w, c = x.shape
    x = x.view(b, h // patch, patch, w // patch, patch, c).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(b, -1, patch * patch * c)


def unpatchify(x: Tensor, patch: int, shape: tuple[int, int, int]) -> Tensor:
    """The inverse of `patchify` for pictures of `shape` = (H, W, C)."""
    h, w, c = shape
    x = x.reshape(-1, h // patch, w // patch, patch, patch, c).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, h, w, c)


class Attention(nn.Module):
    """Patches attend to patches and prompt tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.kv_context = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        k_text, v_text = self.kv_context(context).chunk(2, -1)
        k, v = torch.cat([k, k_text], 1), torch.cat([v, v_text], 1)
        q, k, v = (a.unflatten(-1, (self.heads, -1)).transpose(1, 2) for a in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v)
        return self.out(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """One transformer block; the condition `[B, D]` shifts, scales and gates both halves."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.adapt = nn.Linear(width, 6 * width)
        self.attention = Attention(width, heads)
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, context: Tensor, condition: Tensor) -> Tensor:
        adapted = self.adapt(F.silu(condition))[:, None].chunk(6, -1)
        shift1, scale1, gate1, shift2, scale2, gate2 = adapted
        x = x + gate1 * self.attention(self.norm(x) * (1 + scale1) + shift1, context)
        h = self.up(self.norm(x) * (1 + scale2) + shift2)
        return x + gate2 * self.down(F.gelu(h, approximate="tanh"))


class PatchTransformer(nn.Module):
    """`jaxalign.models.patch_transformer`, module for module, so that weights copy by name."""

    frequency: Tensor

    def __init__(
        self, shape: tuple[int, int, int], patch: int, width: int, depth: int, heads: int
    ) -> None:
        super().__init__()
        self.shape, self.patch = shape, patch
        inside = patch * patch * shape[2]
        self.position = nn.Parameter(torch.zeros(1, shape[0] * shape[1] // patch**2, width))
        self.patch_in = nn.Linear(inside, width)
        self.time_in, self.time_out = nn.Linear(width, width), nn.Linear(width, width)
        self.context_in = nn.Linear(width, width)
        for i in range(depth):
            self.add_module(f"block_{i}", Block(width, heads))
        self.norm_out = nn.LayerNorm(width, eps=1e-6)
        self.patch_out, self.skip = nn.Linear(width, inside), nn.Linear(width, 1)
        frequency = np.exp(-np.log(10_000.0) * np.arange(width // 2) / (width // 2))
        self.register_buffer("frequency", torch.tensor(frequency, dtype=torch.float32), False)
        self.blocks = [getattr(self, f"block_{i}") for i in range(depth)]

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        h = self.patch_in(patchify(x, self.patch)) + self.position
        condition = self.time_in(timestep_embedding(timestep, self.frequency))
        condition = self.time_out(F.silu(condition)) + self.context_in(context.mean(1))
        for block in self.blocks:
            h = block(h, context, condition)
        out = self.patch_out(self.norm_out(h))
        skip = self.skip(F.silu(condition))
        return unpatchify(out, self.patch, self.shape) + skip[:, :, None, None] * x

    def load(self, params: Mapping[str, Any]) -> None:
        """Copies our parameters; every one of both sides must find its partner."""
        named = dict(self.named_parameters())
        for path, value in _flat(params):
            parts = path.split("/")
            kernel = parts[-1] == "kernel"
            parts[-1] = {"kernel": "weight", "scale": "weight"}.get(parts[-1], parts[-1])
            array = np.asarray(value).T if kernel else np.asarray(value)
            with torch.no_grad():
                named.pop(".".join(parts)).copy_(torch.tensor(array))
        if named:
            raise ValueError(f"without a value: {', '.join(named)}")

    def gather(self, like: Mapping[str, Any], value: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """`value` of every parameter as the nested dict of arrays that our network has."""
        named, result = dict(self.named_parameters()), {}
        for path, _ in _flat(like):
            *parents, last = path.split("/")
            name = {"kernel": "weight", "scale": "weight"}.get(last, last)
            array = value(named[".".join([*parents, name])]).detach().numpy()
            inner = result
            for parent in parents:
                inner = inner.setdefault(parent, {})
            inner[last] = array.T if last == "kernel" else array
        return result


def _flat(params: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    items = []
    for name, value in params.items():
        inner = isinstance(value, Mapping)
        items += _flat(value, f"{prefix}{name}/") if inner else [(prefix + name, value)]
    return items


# --- the sampler ---------------------------------------------------------------------------------


class Sampler(NamedTuple):
    """`ops.diffusion.Sampler`: `[T]` each."""

    timestep: Tensor
    keep: Tensor
    push: Tensor
    std: Tensor


def log_density(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log-density `[B]` of x `[B, ...]`, averaged over its dimensions."""
    z = (x - mean) / std
    return (-0.5 * z**2 - std.log() - 0.5 * math.log(2 * math.pi)).flatten(1).mean(1)


# --- the stage -----------------------------------------------------------------------------------


class Setting(NamedTuple):
    """How torch runs: threads, pairs of a micro-batch (0: a whole share), compiled or not."""

    threads: int
    micro_batch: int
    compiled: bool

    def __str__(self) -> str:
        how = "compiled" if self.compiled else "eager"
        return f"{how}, {self.threads} threads, micro-batch {self.micro_batch or 'whole'}"


class Record(NamedTuple):
    """prompt: `[G]`. latents: `[T+1, G*K, ...]`, of the suffix. density: `[T, G*K]`."""

    prompt: Tensor
    latents: Tensor
    density: Tensor


class Stage:
    """One stage as one writes it well: branches in one batch, kept pairs only, no wait in loops.

    score: (pictures `[G*K, ...]`, prompt `[G]`) -> rewards `[G*K]`, on NumPy arrays.
    """

    def __init__(
        self,
        net: PatchTransformer,
        config: Config,
        sampler: tuple[Any, ...],
        context: Any,
        score: Callable[[np.ndarray, np.ndarray], np.ndarray],
        setting: Setting,
    ) -> None:
        self.check(config)
        self.net, self.config, self.setting, self.score = net, config, setting, score
        self.reference = copy.deepcopy(net).requires_grad_(False) if config.kl_weight else None
        self.sampler = Sampler(*(torch.tensor(np.asarray(a)) for a in sampler))
        self.context = torch.tensor(np.asarray(context))
        # Pairs of positive weight, and the weights, which here do not depend on the rollout.
        weight = torch.ones(config.steps)
        if config.step_weight == "drop_last":
            weight[-2:] = 0
        self.weight = weight / weight.mean()
        self.history = [torch.zeros(3, len(self.context)) for _ in range(config.history + 1)]
        self.optimizer = torch.optim.AdamW(
            net.parameters(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,
        )
        compile_ = torch.compile if setting.compiled else (lambda function, **_: function)
        self._step = compile_(self.step, dynamic=False)
        self._loss = compile_(self.loss, dynamic=False)

    @staticmethod
    def check(config: Config) -> None:
        plain = (config.estimator, len(config.branches), config.guidance)
        if plain != ("official", 1, 1.0) or config.lora_rank or config.ema:
            raise UserError(
                f"estimator = {config.estimator}, guidance = {config.guidance}: the torch stage "
                "knows official, one branching, no guidance, adapters or average; add --no-torch"
            )
        if config.step_weight not in ("uniform", "drop_last"):
            raise UserError(
                f"step_weight = {config.step_weight}: the torch stage knows uniform and drop_last; "
                "add --no-torch"
            )

    def noise(self, step: int, shape: tuple[int, ...]) -> Tensor:
        """The noise of a step; -1 is the start."""
        del step
        return torch.randn(shape)

    def step(self, x: Tensor, at: Sampler, context: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Rows x `[B, ...]` one step on, and the log-densities `[B]`. at: the step's `[]` each."""
        out = self.net(x, at.timestep.expand(len(x)), context)
        mean = at.keep * x + at.push * out
        after = mean + at.std * noise
        return after, log_density(after, mean, at.std)

    def loss(
        self,
        x: Tensor,
        after: Tensor,
        step: Tensor,
        density: Tensor,
        advantage: Tensor,
        weight: Tensor,
        context: Tensor,
    ) -> Tensor:
        """The clipped surrogate summed over M pairs with their weights `[M]`."""
        s, clip = self.sampler, self.config.clip
        keep, push, std = (a[step][:, None, None, None] for a in (s.keep, s.push, s.std))
        mean = keep * x + push * self.net(x, s.timestep[step], context)
        ratio = (log_density(after, mean, std) - density).exp()
        item = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))
        if self.reference is not None:
            theirs = keep * x + push * self.reference(x, s.timestep[step], context)
            divergence = 0.5 * ((mean - theirs) / std).square().flatten(1).mean(1)
            item = item + self.config.kl_weight * divergence
        return (item * self.weight[step] * weight).sum()

    @torch.no_grad()
    def sample(self) -> Record:
        config, shape = self.config, self.net.shape
        prompt = torch.randint(len(self.context), (config.groups,))
        x, context = self.noise(-1, (config.groups, *shape)), self.context[prompt]
        split = config.steps - config.suffix_start
        rows = config.groups * config.leaves
        latents = torch.zeros(config.steps + 1, rows, *shape)
        density = torch.zeros(config.steps, rows)
        for i in range(config.steps):
            if i == split:
                x, context = (a.repeat_interleave(config.leaves, 0) for a in (x, context))
                latents[i] = x
            noise = self.noise(i, tuple(x.shape))
            # Numbers picked out here: an index that is a tensor breaks a compiled graph.
            at = Sampler(*(a[i] for a in self.sampler))
            x, log = self._step(x, at, context, noise)
            if i >= split:
                latents[i + 1], density[i] = x, log
        return Record(prompt, latents, density)

    def select(self, prompt: Tensor, rewards: Tensor) -> tuple[Tensor, Tensor]:
        """z-scores `[G*K]` over the prompt's pool, and the rows that are kept `[R]`."""
        config, count = self.config, len(self.context)
        row = prompt.repeat_interleave(config.leaves)
        number = torch.zeros(count).index_add(0, row, torch.ones_like(rewards))
        mean = torch.zeros(count).index_add(0, row, rewards) / number.clamp(min=1)
        deviation = torch.zeros(count).index_add(0, row, (rewards - mean[row]) ** 2)
        self.history = [*self.history[1:], torch.stack([number, mean, deviation])]
        n, m, d = torch.stack(self.history, 1)
        total = n.sum(0)
        mean = (n * m).sum(0) / total.clamp(min=1)
        deviation = (d + n * (m - mean) ** 2).sum(0)
        std = (deviation / (total - 1).clamp(min=1)).sqrt()
        z = ((rewards - mean[row]) / (std[row] + 1e-8)).view(config.groups, -1)
        column = torch.arange(config.leaves)
        best = (column == z.argmax(1, True)) & (z >= config.threshold)
        worst = (column == z.argmin(1, True)) & (z < -config.threshold)
        clip = config.advantage_clip
        return z.flatten().clamp(-clip, clip), (best | worst).flatten().nonzero()[:, 0]

    def update(self, record: Record, rewards: Tensor) -> int:
        """Selection and all optimizer steps; returns the number of pairs trained on."""
        config = self.config
        advantage, kept = self.select(record.prompt, rewards)
        trained = torch.arange(config.steps - config.suffix_start, config.steps)
        trained = trained[self.weight[trained] > 0]
        pairs = torch.cartesian_prod(kept, trained)
        share = max(-(-len(pairs) // config.updates), 1)
        for _ in range(config.epochs):
            order = pairs[torch.randperm(len(pairs))]
            for part in order.split(share):
                self.optimizer.zero_grad(set_to_none=True)
                for micro in part.split(self.setting.micro_batch or share):
                    self._backward(micro, record, advantage, len(part))
                nn.utils.clip_grad_norm_(self.net.parameters(), config.gradient_clip, foreach=True)
                self.optimizer.step()
        return config.epochs * len(pairs)

    def _backward(self, micro: Tensor, record: Record, advantage: Tensor, pairs: int) -> None:
        weight = torch.full((len(micro),), 1 / pairs)
        if self.setting.compiled:  # one shape, one compilation
            missing = self.setting.micro_batch - len(micro)
            weight, micro = F.pad(weight, (0, missing)), F.pad(micro, (0, 0, 0, missing))
            # The padding repeats row 0 at a trained step: a real pair of weight 0.
            micro = torch.where((weight > 0)[:, None], micro, micro[:1])
        row, step = micro[:, 0], micro[:, 1]
        x, after = record.latents[step, row], record.latents[step + 1, row]
        context = self.context[record.prompt[row // self.config.leaves]]
        density = record.density[step, row]
        self._loss(x, after, step, density, advantage[row], weight, context).backward()

    def run(self) -> int:
        """One stage; returns the number of pairs trained on."""
        record = self.sample()
        rewards = self.score(record.latents[-1].numpy(), record.prompt.numpy())
        return self.update(record, torch.tensor(rewards))
