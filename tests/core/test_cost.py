"""Counted operations against sums made by hand."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxalign.core import cost, step
from jaxalign.core.types import Mean

ROWS, INNER, COLUMNS = 3, 5, 7
PRODUCT = 2 * ROWS * INNER * COLUMNS


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def multiply(a, b):
    return a @ b


A, B = array(ROWS, INNER), array(INNER, COLUMNS)
SQUARE = array(4, 4)


def test_a_product_and_what_surrounds_it():
    assert cost.count(multiply, A, B) == cost.Cost(PRODUCT)
    assert cost.count(jax.jit(lambda a, b: jax.nn.relu(a @ b).sum()), A, B).flops == PRODUCT
    assert cost.count(lambda a: jnp.tanh(a) + 1, A).flops == 0


def test_products_of_batches_and_einsum():
    batched = cost.count(jax.vmap(multiply), array(11, 3, 5), array(11, 5, 7))
    assert batched.flops == 11 * PRODUCT
    attention = cost.count(
        lambda q, k: jnp.einsum("btnh,bsnh->bnts", q, k), array(2, 6, 3, 8), array(2, 9, 3, 8)
    )
    assert attention.flops == 2 * (2 * 3 * 6 * 9) * 8


def convolve(x, kernel, stride=1, groups=1):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def test_convolutions_and_their_gradients():
    x, kernel = array(2, 8, 8, 4), array(3, 3, 4, 6)
    forward = 2 * (2 * 8 * 8 * 6) * (3 * 3 * 4)
    assert cost.count(convolve, x, kernel).flops == forward
    grouped = cost.count(lambda a, b: convolve(a, b, groups=2), x, array(3, 3, 2, 6))
    assert grouped.flops == forward / 2

    def loss(x, kernel, stride):
        return convolve(x, kernel, stride).sum()

    # The gradients by input and by kernel are as dear as the convolution, which itself falls away.
    both = cost.count(jax.grad(lambda a, b: loss(a, b, 1), argnums=(0, 1)), x, kernel)
    assert both.flops == 3 * forward
    strided = cost.count(jax.grad(lambda a, b: loss(a, b, 2), argnums=(0, 1)), x, kernel)
    assert abs(strided.flops / (3 * forward / 4) - 1) < 0.35  # edges count differently


def test_scans_multiply_and_nest():
    def inner(x, weight):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, weight)[0]

    weights = array(6, 4, 4)
    assert cost.count(inner, SQUARE, weights).flops == 6 * 2 * 4**3

    def outer(x, weights):
        return jax.lax.scan(lambda x, _: (inner(x, weights), None), x, None, length=10)[0]

    assert cost.count(outer, SQUARE, weights).flops == 60 * 2 * 4**3
    # Backwards each product becomes two, and the forward pass stays for its results.
    gradient = cost.count(jax.grad(lambda x, w: inner(x, w).sum(), argnums=(0, 1)), SQUARE, weights)
    assert gradient.flops == 3 * 6 * 2 * 4**3


def power(x, count):
    return jax.lax.fori_loop(0, count, lambda i, y: y @ x, x)


def test_a_loop_whose_end_is_a_number():
    assert cost.count(lambda x: power(x, 9), SQUARE) == cost.Cost(9 * 2 * 4**3)
    # The value of an argument that is at hand, and what the program makes of it.
    assert cost.count(power, SQUARE, np.int32(7)) == cost.Cost(7 * 2 * 4**3, (7,))
    later = cost.count(lambda x, n: power(x, 2 * n + 1), SQUARE, np.int32(7))
    assert later == cost.Cost(15 * 2 * 4**3, (15,))


def test_a_loop_that_may_end_early_counts_all_of_its_turns():
    def body(carry):
        i, x = carry
        return i + 2, x @ x

    def run(x, limit):
        def running(carry):
            return (carry[0] < limit) & jnp.any(carry[1] > 0)

        return jax.lax.while_loop(running, body, (0, x))[1]

    assert cost.count(lambda x: run(x, 9), SQUARE) == cost.Cost(5 * 2 * 4**3, (5,))
    unknown = SQUARE, array(dtype=jnp.int32)
    assert cost.count(run, *unknown) == cost.Cost(2 * 4**3, (None,))
    assert cost.count(run, *unknown, turns=6) == cost.Cost(6 * 2 * 4**3, (None,))


def test_a_count_that_is_chosen_or_in_an_outer_loop():
    def epochs(x, step):
        def epoch(x, i):
            return power(x, jnp.where(step + i > 3, 50, 0)), None

        return jax.lax.scan(epoch, x, jnp.arange(10))[0]

    found = cost.count(epochs, SQUARE, array(dtype=jnp.int32))
    assert found == cost.Cost(10 * 50 * 2 * 4**3, (50,))

    def triangle(x):
        return jax.lax.scan(lambda y, i: (power(y, i), None), x, jnp.arange(1, 6))[0]

    assert cost.count(triangle, SQUARE) == cost.Cost(5 * 5 * 2 * 4**3, (5,))
    mapped = cost.count(jax.vmap(power, in_axes=(0, None)), array(3, 4, 4), np.int32(6))
    assert mapped.flops == 3 * 6 * 2 * 4**3


def test_a_choice_counts_its_dearest_branch():
    def choose(flag, x):
        return jax.lax.cond(flag, lambda x: x @ x @ x, lambda x: x, x)

    assert cost.count(choose, array(dtype=bool), SQUARE).flops == 2 * 2 * 4**3


def test_what_is_computed_again_counts_again():
    def layers(x, w):
        return jnp.sin(jnp.sin(x @ w) @ w).sum()

    plain = cost.count(jax.grad(layers, argnums=(0, 1)), SQUARE, SQUARE).flops
    again = cost.count(jax.grad(jax.checkpoint(layers), argnums=(0, 1)), SQUARE, SQUARE).flops
    assert plain == 6 * 2 * 4**3
    assert again > plain


def test_a_program_for_one_devices_part_counts_for_all_of_them():
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    parts = jax.shard_map(multiply, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
    whole = 2 * 8 * INNER * COLUMNS
    assert cost.count(parts, array(8, INNER), B).flops == whole


def test_a_train_step_counts_its_micro_batches():
    def objective(params, batch, key):
        error = (batch @ params["w"]) ** 2
        return Mean(error.sum(), jnp.float32(len(batch))), {}

    def gradient(params, batch, count):
        rows = step.split_micro(batch, 4)
        return step.accumulate(objective, params, lambda i: rows[i], count, jax.random.key(0))[0]

    given = {"w": array(INNER, 1)}, array(4 * ROWS, INNER)
    one = 2 * (2 * ROWS * INNER)  # forwards, and backwards by the weights
    assert cost.count(lambda p, b: gradient(p, b, 4), *given).flops == 4 * one
    assert cost.count(gradient, *given, np.int32(3)).flops == 3 * one
