"""Against torch and diffusers: network, sampler, loss and optimizer compute what theirs compute.

The network and the stage are those that `experiments.bench` times, so the bench compares equals.
"""

from __future__ import annotations

import dataclasses
import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import bench
from experiments.pictures import Network
from jaxalign.methods import b2_diffurl
from jaxalign.models import patch_transformer as ours
from jaxalign.ops import diffusion

torch = pytest.importorskip("torch")
bench_torch = importlib.import_module("experiments.bench_torch")

pytestmark = pytest.mark.parity

SHAPE, PATCH, WIDTH, DEPTH, HEADS, LENGTH, BATCH = (8, 12, 3), 4, 32, 2, 4, 5, 7


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def assert_close(ours, theirs, tolerance: float = 1e-5) -> None:
    """Largest difference, relative to the largest value."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


@pytest.fixture(scope="module")
def network():
    """Our network with random parameters and its torch twin."""
    model = ours.patch_transformer(
        SHAPE, PATCH, width=WIDTH, depth=DEPTH, heads=HEADS, length=LENGTH
    )
    start, more = jax.random.split(jax.random.key(0))
    params = jax.jit(lambda: bench.everywhere_random(model.init(start), more))()
    net = bench_torch.PatchTransformer(SHAPE, PATCH, WIDTH, DEPTH, HEADS)
    net.load(params)
    return model, params, net


@pytest.fixture(scope="module")
def inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    chance = np.random.default_rng(0)
    x = chance.normal(size=(BATCH, *SHAPE)).astype(np.float32)
    context = chance.normal(size=(BATCH, LENGTH, WIDTH)).astype(np.float32)
    return x, np.array([0, 1, 51, 333, 501, 951, 999], np.float32), context


def tensors(*arrays):
    return [torch.tensor(np.asarray(a)) for a in arrays]


# --- network -------------------------------------------------------------------------------------


def test_the_network_forward(network, inputs):
    model, params, net = network
    with torch.no_grad():
        theirs = net(*tensors(*inputs))
    assert_close(model.apply(params, *inputs), theirs)


def test_each_block_forward(network):
    _, params, net = network
    chance = np.random.default_rng(1)
    h = chance.normal(size=(BATCH, 6, WIDTH)).astype(np.float32)
    context = chance.normal(size=(BATCH, LENGTH, WIDTH)).astype(np.float32)
    condition = chance.normal(size=(BATCH, WIDTH)).astype(np.float32)
    for i in range(DEPTH):
        block = ours.Block(HEADS)
        mine = block.apply({"params": params[f"block_{i}"]}, h, context, condition)
        with torch.no_grad():
            assert_close(mine, net.blocks[i](*tensors(h, context, condition)))


def test_a_twin_with_a_missing_parameter_is_refused(network):
    _, params, net = network
    with pytest.raises(ValueError, match="skip"):
        net.load({name: value for name, value in params.items() if name != "skip"})


def test_the_network_gradients(network, inputs):
    model, params, net = network
    target = np.random.default_rng(2).normal(size=(BATCH, *SHAPE)).astype(np.float32)

    def loss(params, x, t, context):
        return ((model.apply(params, x, t, context) - target) ** 2).mean()

    mine, mine_x = jax.grad(loss, argnums=(0, 1))(params, *inputs)
    x, t, context = tensors(*inputs)
    net.zero_grad()
    x.requires_grad_()
    ((net(x, t, context) - torch.tensor(target)) ** 2).mean().backward()
    jax.tree.map(assert_close, mine, net.gather(params, lambda p: p.grad))
    assert_close(mine_x, x.grad)


# --- sampler -------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("steps", [10, 20, 50])
def test_ddim_step_and_density(steps, prediction):
    """DDIM of Song et al. written from x0 and epsilon in float64, its density by torch."""
    alphas = diffusion.scaled_linear_alphas()
    sampler = diffusion.ddim_sampler(alphas, steps, prediction=prediction)
    chance = np.random.default_rng(3)
    x, out, noise = (chance.normal(size=(3, 4, 4, 2)).astype(np.float32) for _ in range(3))
    for i in range(steps):
        gaussian = diffusion.transition(sampler, jnp.int32(i), x, out)
        after = gaussian.mean + gaussian.std * noise
        t = 1 + (steps - 1 - i) * (1000 // steps)
        a, prev = (torch.tensor(alphas[j]) for j in (t, max(t - 1000 // steps, 0)))
        z, o, n = (torch.tensor(value).double() for value in (x, out, noise))
        eps = a.sqrt() * o + (1 - a).sqrt() * z if prediction == "v" else o
        x0 = (z - (1 - a).sqrt() * eps) / a.sqrt()
        std = ((1 - prev) / (1 - a) * (1 - a / prev)).sqrt()
        mean = prev.sqrt() * x0 + (1 - prev - std**2).sqrt() * eps
        assert sampler.timestep[i] == t
        assert_close(after, mean + std * n, 3e-6)
        there = torch.tensor(np.asarray(after)).double()
        normal = torch.distributions.Normal(mean, std)
        expected = normal.log_prob(there).mean((1, 2, 3))
        assert_close(diffusion.log_density(gaussian, after), expected, 1e-4)
        # and of the bench's own density, given the same mean
        mine = bench_torch.log_density(there, mean, std)
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("steps", [10, 20, 50])
def test_stock_ddim_of_diffusers(steps):
    """Under Stable Diffusion's config every step of the stock scheduler is ours, and the last."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
        timestep_spacing="leading",
    )
    scheduler.set_timesteps(steps)
    sampler = diffusion.ddim_sampler(diffusion.scaled_linear_alphas(), steps)
    np.testing.assert_array_equal(sampler.timestep, scheduler.timesteps)
    chance = np.random.default_rng(4)
    x = chance.normal(size=(2, 4, 8, 8)).astype(np.float32)
    for i, t in enumerate(scheduler.timesteps):
        out, noise = (chance.normal(size=x.shape).astype(np.float32) for _ in range(2))
        gaussian = diffusion.transition(sampler, jnp.int32(i), x, out)
        mine = gaussian.mean + gaussian.std * noise
        theirs = scheduler.step(
            torch.tensor(out), t, torch.tensor(x), eta=1.0, variance_noise=torch.tensor(noise)
        ).prev_sample
        assert_close(mine, theirs)
        x = np.array(mine)


# --- optimizer -----------------------------------------------------------------------------------


def test_adamw_behind_a_clipped_norm():
    config = b2_diffurl.Config(learning_rate=3e-3, weight_decay=0.1, gradient_clip=1.0)
    optimizer = b2_diffurl.make_optimizer(config)
    chance = np.random.default_rng(5)
    start = {"a": chance.normal(size=(5, 3)), "b": chance.normal(size=4)}
    params: dict = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), start)
    theirs = {k: torch.nn.Parameter(torch.tensor(np.asarray(v))) for k, v in params.items()}
    adamw = torch.optim.AdamW(theirs.values(), lr=3e-3, weight_decay=0.1)
    state = optimizer.init(params)
    for i in range(20):
        # both above and below the norm that is clipped at
        size = 10.0 ** ((i % 3) - 2)
        gradient = {k: np.float32(size * chance.normal(size=v.shape)) for k, v in params.items()}
        change, state = optimizer.update(gradient, state, params)
        params = dict(optax.apply_updates(params, change))
        for name, p in theirs.items():
            p.grad = torch.tensor(gradient[name])
        torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        adamw.step()
    for name, p in theirs.items():
        assert_close(params[name], p.detach())


# --- the stage that the bench times --------------------------------------------------------------


@pytest.fixture(scope="module", params=[0.0, 0.5], ids=["plain", "kl"])
def problem(request: pytest.FixtureRequest) -> bench.Problem:
    preset = bench.stage()
    small = dataclasses.replace(
        preset.b2,
        groups=8,
        branches=(3,),
        steps=5,
        suffix_start=4,
        suffix_stop=4,
        updates=1,
        threshold=0.1,
        kl_weight=request.param,
        clip=1e-3,
    )
    made = bench.make_problem(dataclasses.replace(preset, network=Network(16, 1, 2), b2=small))
    # Away from the sampling policy, so that ratio, clipping and penalty have something to say.
    params = dict(made.state.params)
    params["model"] = bench.everywhere_random(params["model"], jax.random.key(9))
    return made._replace(state=made.state._replace(params=params))


def torch_stage(problem: bench.Problem, micro_batch: int):
    world = problem.world
    net = bench_torch.PatchTransformer(world.image_shape, world.patch, 16, 1, 2)
    net.load(b2_diffurl.reference_params(problem.state))
    setting = bench_torch.Setting(1, micro_batch, compiled=False)
    task = problem.task
    stage = bench_torch.Stage(
        net, problem.config, task.sampler, task.context, lambda *_: None, setting
    )
    net.load(problem.state.params["model"])
    return stage


def torch_record(problem: bench.Problem):
    record = problem.samples.record
    latents, density = np.array(record.latents)[:, :, 1:], np.array(record.log_density)[:, :, 1:]
    return bench_torch.Record(
        *tensors(
            problem.samples.prompt,
            latents.reshape(len(latents), -1, *problem.world.image_shape),
            density.reshape(len(density), -1),
        )
    )


@pytest.mark.parametrize("micro_batch", [0, 5])
def test_the_update_of_a_stage(problem, micro_batch):
    """Selection, loss, clipping and the first optimizer step, from the same pictures."""
    config, optimizer = problem.config, b2_diffurl.make_optimizer(problem.config)
    after, metrics = jax.jit(
        lambda *given: b2_diffurl.update(problem.predict, config, optimizer, *given)
    )(problem.state, problem.task, problem.samples, problem.rewards, jax.random.key(0))
    assert metrics["clipped"] > 0
    stage = torch_stage(problem, micro_batch)
    assert isinstance(stage.net, bench_torch.PatchTransformer)
    pairs = stage.update(torch_record(problem), torch.tensor(np.asarray(problem.rewards)))
    assert pairs == after.extra.trained_pairs > 0
    # Adam's first moment is now a tenth of the clipped gradient: compare that, as the step itself
    # is but the gradient's sign.
    moment = after.opt_state[1].inner_state[0].mu["model"]
    theirs = stage.net.gather(moment, lambda p: stage.optimizer.state[p]["exp_avg"])
    scale = max(float(jnp.abs(m).max()) for m in jax.tree.leaves(moment))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * scale), moment, theirs
    )
    assert math.isfinite(scale) and scale > 0


def test_the_rollout_of_a_stage(problem):
    """The same prompts and noises give the same tree of latents and densities."""
    config, world = problem.config, problem.world
    key = jax.random.key(1)
    state, task = problem.state, problem.task
    samples = jax.jit(
        lambda *given: b2_diffurl.sample(
            problem.predict, config, config.groups, world.image_shape, None, *given
        )
    )(state, task, key)
    path_key = jax.random.split(key, 3)[2]
    prompt, stage = torch.tensor(np.asarray(samples.prompt)), torch_stage(problem, 0)

    def noise(step: int, shape: tuple[int, ...]):
        if step < 0:
            return torch.tensor(np.array(samples.record.latents[0, :, 0]))
        drawn = jax.random.normal(jax.random.fold_in(path_key, step), shape, jnp.float32)
        return torch.tensor(np.asarray(drawn))

    stage.noise = noise
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randint", lambda *_: prompt)
        record = stage.sample()
    theirs = torch_record(problem._replace(samples=samples))
    split = config.steps - config.suffix_start
    assert_close(theirs.latents[split:], record.latents[split:])
    assert_close(theirs.density[split:], record.density[split:], 1e-4)
