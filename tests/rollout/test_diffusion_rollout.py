"""Trees of trajectories against a Python loop of single steps with the same keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.ops import diffusion
from jaxalign.rollout.diffusion import (
    Context,
    branch,
    denoise,
    guided,
    level_sizes,
    path_divergence,
    step_out,
)

STEPS, GROUPS, LENGTH, WIDTH = 5, 3, 2, 4
SAMPLER = diffusion.ddim_sampler(diffusion.scaled_linear_alphas(), STEPS)
SHAPES = [(4, 4, 1), (4, 8, 8), (6,)]


def per_row(a, like):
    return a.reshape(a.shape + (1,) * (like.ndim - a.ndim))


def predict(params, x, timestep, context):
    """A network of two numbers that knows the latent, the noise level and the row's prompt."""
    prompt = jnp.tanh(context.prompt.sum((1, 2)))
    return params["w"] * x + per_row(params["b"] * prompt + timestep / 1000, x)


def make_params(w=0.3, b=0.5):
    return {"w": jnp.float32(w), "b": jnp.float32(b)}


def make_inputs(shape=(4, 4, 1), groups=GROUPS):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (groups, *shape))
    prompt = jax.random.normal(keys[1], (groups, LENGTH, WIDTH))
    return x, Context(prompt, jax.random.normal(keys[2], (LENGTH, WIDTH)))


def run_branch(splits, factors, shape=(4, 4, 1), network=predict):
    x, context = make_inputs(shape)
    run = jax.jit(
        lambda x, context, splits: branch(
            network, make_params(), SAMPLER, x, context, jax.random.key(9), splits, factors
        )
    )
    return run(x, context, jnp.asarray(splits, jnp.int32))


def branch_by_loops(splits, factors, shape):
    """Step by step, level by level: the leaves, and the path and densities of each level."""
    x, context = jax.device_get(make_inputs(shape))
    sampler = jax.device_get(SAMPLER)
    bounds, rows, levels = (0, *splits, STEPS), 1, []
    for level, factor in enumerate((1, *factors)):
        rows *= factor
        x = np.repeat(x, factor, axis=0)
        prompt = np.tanh(np.repeat(context.prompt, rows, axis=0).sum((1, 2)))
        path, density = {bounds[level]: x}, {}
        for i in range(bounds[level], bounds[level + 1]):
            out = 0.3 * x + per_row(0.5 * prompt + sampler.timestep[i] / 1000, x)
            mean = sampler.keep[i] * x + sampler.push[i] * out
            noise = jax.random.normal(jax.random.fold_in(jax.random.key(9), i), x.shape)
            x = mean + sampler.std[i] * np.asarray(noise)
            z = (x - mean).reshape(len(x), -1) / sampler.std[i]
            path[i + 1] = x
            density[i] = (-(z**2) / 2 - np.log(sampler.std[i] * np.sqrt(2 * np.pi))).mean(1)
        levels.append((path, density))
    return x, levels


@pytest.mark.parametrize(
    ("splits", "factors", "shape"),
    [
        ((2,), (3,), (4, 4, 1)),
        ((0,), (3,), (4, 4, 1)),  # siblings share the noise they start from and nothing else
        ((1, 3), (2, 3), (4, 8, 8)),
        ((4,), (1,), (6,)),
    ],
)
def test_branch_is_a_loop_of_single_steps(splits, factors, shape):
    leaves, record = run_branch(splits, factors, shape)
    expected, levels = branch_by_loops(splits, factors, shape)
    rows = int(np.prod(factors))
    assert leaves.shape == (GROUPS, rows, *shape)
    np.testing.assert_allclose(leaves.reshape(expected.shape), expected, rtol=1e-5, atol=1e-5)
    first = 0
    for (path, density), width in zip(levels, level_sizes(factors), strict=True):
        for i, x in path.items():
            seen = record.latents[i, :, first : first + width].reshape(x.shape)
            np.testing.assert_allclose(seen, x, rtol=1e-5, atol=1e-5)
        for i, value in density.items():
            seen = record.log_density[i, :, first : first + width].reshape(-1)
            np.testing.assert_allclose(seen, value, rtol=1e-4, atol=1e-4)
        first += width


def test_layout_of_nested_branches():
    """1 trunk, 2 branches, 6 twigs; children of a row lie side by side and begin where it ends."""
    _, record = run_branch((1, 3), (2, 3))
    assert level_sizes((2, 3)) == (1, 2, 6)
    assert record.latents.shape == (STEPS + 1, GROUPS, 9, 4, 4, 1)
    assert record.log_density.shape == (STEPS, GROUPS, 9)
    assert record.first.tolist() == [0, 1, 1] + [3] * 6
    assert record.last.tolist() == [1, 3, 3] + [STEPS] * 6
    parent = [None, 0, 0, 1, 1, 1, 2, 2, 2]
    for column, above in enumerate(parent[1:], 1):
        split = int(record.first[column])
        np.testing.assert_array_equal(
            record.latents[split, :, column], record.latents[split, :, above]
        )
    ends = np.asarray(record.latents[STEPS, :, 3:]).reshape(GROUPS * 6, -1)
    assert len(np.unique(ends.round(4), axis=0)) == GROUPS * 6  # and none is another's copy


def test_record_is_float32_and_empty_where_a_column_did_not_run():
    def in_bfloat16(params, x, timestep, context):
        return predict(params, x, timestep, context).astype(jnp.bfloat16)

    leaves, record = run_branch((2,), (3,), network=in_bfloat16)
    assert {leaves.dtype, record.latents.dtype, record.log_density.dtype} == {jnp.dtype("float32")}
    np.testing.assert_array_equal(record.log_density[2:, :, 0], 0)
    np.testing.assert_array_equal(record.log_density[:2, :, 1:], 0)
    assert np.all(np.asarray(record.log_density[2:, :, 1:]) != 0)


def test_prefix_is_computed_once_and_branches_in_one_call():
    """The rows of every call of the network, seen while it runs."""
    calls = []

    def counting(params, x, timestep, context):
        rows = len(x)
        assert rows == len(timestep) == len(context.prompt)
        jax.debug.callback(lambda _: calls.append(rows), x[0, 0])
        return predict(params, x, timestep, context)

    jax.block_until_ready(run_branch((1, 3), (2, 3), shape=(6,), network=counting))
    jax.effects_barrier()
    assert sorted(calls) == sorted([GROUPS] * 1 + [2 * GROUPS] * 2 + [6 * GROUPS] * 2)


def test_one_program_serves_every_split_and_equals_the_program_of_that_split():
    x, context = make_inputs()
    traces = []

    def program(x, context, splits):
        traces.append(1)
        return branch(
            predict, make_params(), SAMPLER, x, context, jax.random.key(9), splits, (2, 2)
        )

    run = jax.jit(program)
    for splits in [(0, 0), (0, 3), (2, 3), (4, 4)]:
        leaves, record = run(x, context, jnp.array(splits, jnp.int32))
        if splits == (2, 3):
            fixed = jax.jit(lambda x, c, s=splits: program(x, c, jnp.array(s, jnp.int32)))
            before = len(traces)
            expected, its_record = fixed(x, context)
            del traces[before:]
            np.testing.assert_allclose(leaves, expected, rtol=1e-6, atol=1e-6)
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6),
                record,
                its_record,
            )
    assert len(traces) == 1


@pytest.mark.parametrize("shape", SHAPES)
def test_guidance_is_two_separate_calls(shape):
    def apply(params, x, timestep, context):
        return predict(params, x, timestep, Context(context, None))

    x, context = make_inputs(shape)
    timestep = jnp.array([900.0, 400.0, 1.0])
    null = jnp.stack([context.null] * GROUPS)
    asked, empty = (apply(make_params(), x, timestep, c) for c in (context.prompt, null))
    seen = guided(apply, 5.0)(make_params(), x, timestep, context)
    np.testing.assert_allclose(seen, empty + 5.0 * (asked - empty), rtol=1e-5, atol=1e-5)
    assert float(jnp.abs(asked - empty).max()) > 0.01
    plain = guided(apply, 1)(make_params(), x, timestep, context)
    np.testing.assert_array_equal(plain, asked)


def test_guidance_scale_one_does_not_double_the_batch():
    rows = []

    def apply(params, x, timestep, context):
        rows.append(len(x))
        return x

    for scale in (1.0, 3.0):
        x, context = make_inputs()
        guided(apply, scale)({}, x, jnp.ones(GROUPS), context)
    assert rows == [GROUPS, 2 * GROUPS]


def test_denoise_in_parts_is_denoise():
    x, context = make_inputs()
    key = jax.random.key(4)
    run = jax.jit(lambda x, a, b: denoise(predict, make_params(), SAMPLER, x, context, key, a, b))
    whole, path, density = run(x, 0, STEPS)
    half, early, early_density = run(x, 0, 2)
    end, late, late_density = run(half, 2, STEPS)
    np.testing.assert_array_equal(end, whole)
    np.testing.assert_array_equal(path[:3], early[:3])
    np.testing.assert_array_equal(path[2:], late[2:])
    np.testing.assert_array_equal(early[3:], 0)  # outside the range
    np.testing.assert_array_equal(late[:2], 0)
    np.testing.assert_array_equal(density, early_density + late_density)
    np.testing.assert_array_equal(path[-1], whole)
    np.testing.assert_array_equal(run(x, 3, 3)[0], x)  # no step


def test_denoise_runs_all_steps_unless_told():
    x, context = make_inputs()
    args = (predict, make_params(), SAMPLER, x, context, jax.random.key(4))
    np.testing.assert_array_equal(denoise(*args)[0], denoise(*args, 0, STEPS)[0])


def test_path_divergence():
    """Zero of itself; of an output shifted by c at every pixel, D (push c / std)^2 / 2."""
    x, context = make_inputs()
    params = make_params(b=0.0)
    _, path, _ = denoise(predict, params, SAMPLER, x, context, jax.random.key(4))

    def shifted(params, x, timestep, context):
        return predict({**params, "b": jnp.float32(0)}, x, timestep, context) + params["b"]

    run = jax.jit(lambda p, q: path_divergence(shifted, p, q, SAMPLER, path, context))
    np.testing.assert_array_equal(run(params, params), 0)
    seen = run(make_params(b=0.25), params)
    gain = np.asarray(SAMPLER.push, np.float64) / np.asarray(SAMPLER.std, np.float64)
    expected = np.broadcast_to(16 * (gain[:, None] * 0.25) ** 2 / 2, (STEPS, GROUPS))
    np.testing.assert_allclose(seen, expected, rtol=1e-3)


def test_step_out_takes_one_step_or_one_for_each_row():
    x, context = make_inputs()
    each = step_out(predict, make_params(), SAMPLER, jnp.array([0, 2, 4]), x, context)
    for row, i in enumerate((0, 2, 4)):
        same = step_out(predict, make_params(), SAMPLER, jnp.asarray(i), x, context)
        np.testing.assert_allclose(each.mean[row], same.mean[row], rtol=1e-6, atol=1e-6)
