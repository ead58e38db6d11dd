"""Stable Diffusion's U-Net of torch diffusers in sampling and in learning, for
`experiments.bench_sd`.

The same arithmetic as ours on the same weights, as one writes it well: torch's fused attention,
images with channels last, guidance in one doubled batch, adapters beside frozen layers as PEFT has
them, a fused optimizer. On a GPU if torch has one, else on one core or all, whichever is faster.
Imported only where torch is installed.

Dimensions: B images, M pairs, h w C of a latent (here `[C, h, w]`), T steps.
"""

from __future__ import annotations

import functools
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments import bench_sd_programs as programs
from experiments.bench_sd_programs import Case, Pairs, Problem, Program, Setting
from experiments.measuring import timed
from experiments.random_pipeline import write_json, write_tensors
from jaxalign.models import diffusers_folders, hub

SHARE = 0.48  # of a GPU's memory; ours has as much


class Adapted(nn.Module):
    """A frozen layer `[.., in] -> [.., out]` and its adapter: down `[r, in]`, up `[out, r]`."""

    def __init__(self, base: nn.Module, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.base, self.down, self.up = base, nn.Parameter(down), nn.Parameter(up)

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(x, self.down.to(x.dtype))
        return self.base(x) + F.linear(low, self.up.to(x.dtype))


@functools.cache
def device() -> torch.device:
    """A GPU if torch has one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load(problem: Problem) -> Any:
    """The base network as a `UNet2DConditionModel`, frozen, by way of a folder."""
    diffusers.utils.logging.set_verbosity_error()
    params = problem.params["model"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "unet"
        write_json(path / "config.json", problem.values)
        write_tensors(path, diffusers_folders.STEMS[0], params, hub.mirrored(params))
        net = diffusers.UNet2DConditionModel.from_pretrained(
            path, torch_dtype=getattr(torch, problem.size.dtype)
        )
    return net.to(device(), memory_format=torch.channels_last).requires_grad_(False)


def adapters(problem: Problem) -> dict[str, tuple[Tensor, Tensor]]:
    """Module to (down, up) as torch has them, in the order of our leaves."""
    table = {
        tensor.path: tensor.name
        for tensor in hub.mirrored(dict.fromkeys(problem.params["lora"], 0))
    }
    found = {}
    for path in sorted(table):
        pair = problem.params["lora"][path]
        down, up = (torch.tensor(pair[part].T, device=device()) for part in ("down", "up"))
        found[table[path].removesuffix(".weight")] = down, up
    return found


def channels_first(pictures: np.ndarray) -> Tensor:
    """`[.., h, w, C]` to `[.., C, h, w]`."""
    return torch.tensor(np.moveaxis(pictures, -1, -3), device=device())


class Diffusers:
    """One network for all settings of a case."""

    def __init__(self, problem: Problem, case: Case, pairs: Pairs | None) -> None:
        """pairs: of the case update."""
        if device().type == "cuda":
            torch.cuda.set_per_process_memory_fraction(SHARE)
        # Each setting has its own shapes.
        torch._dynamo.config.recompile_limit = 64
        self.problem, self.pairs, self.net = problem, pairs, load(problem)
        self.work: Any = {"rollout": Rollout, "update": Update}[case]
        for name, (down, up) in adapters(problem).items():
            layer = self.net.get_submodule(name)
            if case == "rollout":
                with torch.no_grad():
                    layer.weight += (up @ down).to(layer.weight.dtype)
            else:
                self.net.set_submodule(name, Adapted(layer, down, up))
        if device().type == "cpu":
            self._choose_threads()

    def _choose_threads(self) -> None:
        """The faster of one and all: on a busy machine threads wait for each other."""
        few = Guided(self, Setting(1, False))
        side = self.problem.size.side
        x, step = torch.zeros(1, 4, side, side), torch.zeros(1, dtype=torch.long)
        seconds = {}
        for threads in sorted({1, len(os.sched_getaffinity(0))}):
            torch.set_num_threads(threads)
            with torch.no_grad():
                few.transition(x, step)  # threads start
                seconds[threads] = timed(lambda: few.transition(x, step))[0].seconds
        torch.set_num_threads(min(seconds, key=seconds.__getitem__))

    @torch.no_grad()
    def restore(self) -> None:
        """The adapters as they were, which updates move."""
        for name, (down, up) in adapters(self.problem).items():
            layer = self.net.get_submodule(name)
            layer.down.copy_(down)
            layer.up.copy_(up)

    def program(self, setting: Setting, compiled: bool) -> Program:
        """Eager, or compiled for these very shapes."""
        work = self.work(self, setting, compiled)

        def run(turn: int) -> Any:
            torch.manual_seed(turn)
            reset_peak()
            work.run()
            wait()

        return Program(run, work.outcome, peak_bytes, where())


def where() -> str:
    """What it runs on, for a line of the output."""
    return device().type if device().type != "cpu" else f"{torch.get_num_threads()} threads"


def wait() -> None:
    """Until all that was asked of a GPU is done."""
    if device().type == "cuda":
        torch.cuda.synchronize()


def reset_peak() -> None:
    """Of a GPU's allocated memory."""
    if device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_bytes() -> int | None:
    """The most that was allocated since the last run began, on a GPU."""
    return torch.cuda.max_memory_allocated() if device().type == "cuda" else None


class Guided:
    """What sampling and learning share: the network's guided output, and a step's distribution."""

    def __init__(self, made: Diffusers, setting: Setting) -> None:
        self.problem, self.net, self.batch = made.problem, made.net, setting.batch
        self.dtype = getattr(torch, made.problem.size.dtype)
        timestep, keep, push, std = (
            torch.tensor(np.asarray(values), device=device()) for values in made.problem.sampler
        )
        self.timestep, self.keep, self.push, self.std = timestep, keep, push, std
        prompt = torch.tensor(programs.prompts(made.problem, setting.batch))
        null = torch.tensor(made.problem.null).expand_as(prompt)
        self.context = torch.cat([null, prompt]).to(device(), self.dtype)

    def transition(self, x: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """Mean `[B, C, h, w]` and std `[B, 1, 1, 1]` of the step from x at steps `[B]`."""
        both = torch.cat([x, x]).to(self.dtype, memory_format=torch.channels_last)
        timestep = self.timestep[step].repeat(2)
        out = self.net(both, timestep, encoder_hidden_states=self.context, return_dict=False)[0]
        unconditional, conditional = out.float().chunk(2)
        out = unconditional + self.problem.config.guidance * (conditional - unconditional)
        keep, push, std = (a[step][:, None, None, None] for a in (self.keep, self.push, self.std))
        return keep * x + push * out, std


def log_density(mean: Tensor, std: Tensor, x: Tensor) -> Tensor:
    """`[B]`, averaged over the latent's dimensions."""
    item = -0.5 * ((x - mean) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)
    return item.mean((1, 2, 3))


class Rollout(Guided):
    """Pictures from noise, with every latent and density on the way."""

    def __init__(self, made: Diffusers, setting: Setting, compiled: bool) -> None:
        super().__init__(made, setting)
        side = made.problem.size.side
        self.shape = (setting.batch, 4, side, side)
        self.advance: Callable[..., tuple[Tensor, Tensor]] = self._advance
        if compiled:
            self.advance = torch.compile(self._advance, dynamic=False)

    def _advance(self, x: Tensor, noise: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = self.transition(x, step)
        x = mean + std * noise
        return x, log_density(mean, std, x)

    def _draw(self) -> Tensor:
        return torch.randn(self.shape, device=device())

    @torch.no_grad()
    def run(self, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The path `[T+1, B, C, h, w]` and the densities `[T, B]`.

        noise: as many arrays as the path has; drawn where there is none.
        """
        steps = self.problem.config.steps
        x = self._draw() if noise is None else noise[0]
        path, density = torch.empty((steps + 1, *x.shape), device=device()), []
        path[0] = x
        rows = torch.arange(steps, device=device())[:, None].expand(-1, self.batch).contiguous()
        for i in range(steps):
            x, dense = self.advance(x, self._draw() if noise is None else noise[i + 1], rows[i])
            path[i + 1] = x
            density.append(dense)
        return path, torch.stack(density)

    def outcome(self) -> np.ndarray:
        """The last latents `[B, h, w, C]` from our noise."""
        path, _ = self.run(channels_first(programs.path_noise(self.problem, self.batch)))
        return np.moveaxis(path[-1].cpu().numpy(), 1, -1).ravel()


class Update(Guided):
    """One optimizer step on the adapters."""

    def __init__(self, made: Diffusers, setting: Setting, compiled: bool) -> None:
        super().__init__(made, setting)
        assert made.pairs is not None
        given = programs.tiled(made.pairs, setting.batch)
        self.x, self.x_next = channels_first(given.x), channels_first(given.x_next)
        self.step = torch.tensor(given.step, dtype=torch.long, device=device())
        self.density = torch.tensor(given.log_density, device=device())
        self.advantage = torch.tensor(given.advantage, device=device())
        self.parameters = [p for p in self.net.parameters() if p.requires_grad]
        config = self.problem.config
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self.net.train()  # there is no dropout; rematerialisation asks for it
        self.remat, self.restore = setting.remat, made.restore
        self.loss: Callable[[], Tensor] = self._loss
        if compiled:
            self.loss = torch.compile(self._loss, dynamic=False)

    def _loss(self) -> Tensor:
        """The clipped surrogate's mean."""
        mean, std = self.transition(self.x, self.step)
        ratio = (log_density(mean, std, self.x_next) - self.density).exp()
        clip = self.problem.config.clip
        held = ratio.clamp(1 - clip, 1 + clip)
        return torch.maximum(-self.advantage * ratio, -self.advantage * held).mean()

    def gradient(self) -> None:
        """Into the adapters."""
        if self.net.is_gradient_checkpointing != self.remat:  # settings share the network
            switch = "enable" if self.remat else "disable"
            getattr(self.net, f"{switch}_gradient_checkpointing")()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss().backward()

    def run(self) -> None:
        self.gradient()
        nn.utils.clip_grad_norm_(self.parameters, self.problem.config.gradient_clip, foreach=True)
        self.optimizer.step()

    def outcome(self) -> np.ndarray:
        """The gradient of the adapters, in the order of ours."""
        self.restore()
        self.gradient()
        found = []
        for name in adapters(self.problem):
            layer = self.net.get_submodule(name)
            found += [layer.down.grad, layer.up.grad]
        return np.concatenate([leaf.T.cpu().numpy().ravel() for leaf in found])
