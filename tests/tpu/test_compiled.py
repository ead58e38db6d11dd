"""What is read off compiled programs, against sums by hand; also what a TPU's text alone has."""

# ruff: noqa: E501 (lines as XLA writes them)

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tpu import compiled

CHIPS = 8


def mesh():
    return Mesh(np.array(jax.devices()[:CHIPS]), ("data",))


def array(spec, *shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh(), spec))


def text_of(function, *arguments, out=None):
    where = NamedSharding(mesh(), P() if out is None else out)
    return jax.jit(function, out_shardings=where).lower(*arguments).compile().as_text()


def test_a_sum_over_chips_in_a_loop():
    def descend(w, batch):
        def step(w, rows):
            return w - jax.grad(lambda w: ((rows @ w) ** 2).sum())(w), None

        return jax.lax.scan(step, w, batch)[0]

    text = text_of(descend, array(P(), 32, 16), array(P(None, "data"), 5, 64, 32))
    found = compiled.tally(text)
    # Each chip has 8 of the 64 rows: a product forwards and one backwards, five times.
    assert found.flops == 5 * 2 * (2 * 8 * 32 * 16)
    assert found.calls == {"all-reduce": 5}
    assert found.sent == {"all-reduce": 5 * 2 * 7 / 8 * (32 * 16 * 4)}
    assert compiled.collectives(text) == {"all-reduce": 1}


def test_parameters_gathered_from_all_chips():
    text = text_of(
        lambda w, x: x @ w, array(P(None, "data"), 64, 32), array(P("data"), 8, 64), out=P("data")
    )
    found = compiled.tally(text)
    assert found.sent == {"all-gather": 7 / 8 * (64 * 32 * 4)}
    assert found.flops == 2 * 64 * 32


def test_a_loop_that_data_end_turns_as_planned_for():
    def run(x, count):
        return jax.lax.fori_loop(0, count, lambda _, y: y @ x, x)

    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh(), P()))
    text = text_of(run, array(P(), 16, 16), count)
    assert compiled.tally(text, turns=7).flops == 7 * compiled.tally(text, turns=1).flops > 0


CONVOLUTION = """HloModule hand

%inner (p0: f32[2,16,16,8], p1: f32[3,3,8,4]) -> f32[2,16,16,4] {
  %p0 = f32[2,16,16,8]{3,2,1,0:T(8,128)} parameter(0)
  %p1 = f32[3,3,8,4]{3,2,1,0:T(8,128)S(1)} parameter(1)
  ROOT %c = f32[2,16,16,4]{3,2,1,0:T(8,128)} convolution(%p0, %p1), window={WINDOW}, dim_labels=LABELS
}

ENTRY %main (a: f32[2,16,16,8], b: f32[3,3,8,4]) -> f32[2,16,16,4] {
  %a = f32[2,16,16,8]{3,2,1,0:T(8,128)} parameter(0)
  %b = f32[3,3,8,4]{3,2,1,0:T(8,128)S(1)} parameter(1)
  ROOT %f = f32[2,16,16,4]{3,2,1,0:T(8,128)} fusion(%a, %b), kind=kOutput, calls=%inner
}
"""


def test_windows_count_no_padding_and_on_chip_memory_does_not_move():
    window = "size=3x3 pad=1_1x1_1"
    text = CONVOLUTION.replace("WINDOW", window).replace("LABELS", "b01f_01io->b01f")
    found = compiled.tally(text)
    inside = (3 * 16 - 2) ** 2  # pairs of positions along both sides, but for the two edges
    assert found.flops == 2 * 2 * 8 * 4 * inside
    assert found.memory == 4 * (2 * 16 * 16 * 8 + 2 * 16 * 16 * 4)  # the kernel, S(1), is there


BATCHED = """HloModule hand

ENTRY %main (a: bf16[8,1024,4], b: f32[8,4,512]) -> f32[8,1024,512] {
  %a = bf16[8,1024,4]{1,2,0:T(4,128)(2,1)} parameter(0)
  %b = f32[8,4,512]{2,1,0:T(4,128)} parameter(1)
  ROOT %c = f32[8,1024,512]{1,2,0:T(8,128)} convolution(%a, %b), window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0io->0bf
}
"""


def test_batched_products_as_the_tpu_writes_them():
    # A convolution over the batch, of whose window one position in eight meets its own matrix.
    assert compiled.tally(BATCHED).flops == 8 * 2 * 1024 * 4 * 512


LOOP = """HloModule hand

%body (t: (s32[], f32[64,8], f32[8])) -> (s32[], f32[64,8], f32[8]) {
  %t = (s32[]{:T(128)}, f32[64,8]{1,0:T(8,128)}, f32[8]{0:T(128)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  %stack = f32[64,8]{1,0:T(8,128)} get-tuple-element(%t), index=1
  %row = f32[8]{0:T(128)S(1)} get-tuple-element(%t), index=2
  %zero = s32[]{:T(128)} constant(0)
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)S(6)} add(%i, %one)
  %new = f32[64,8]{1,0:T(8,128)} fusion(%stack, %row, %i, %zero), kind=kLoop, calls=%place
  ROOT %out = (s32[]{:T(128)}, f32[64,8]{1,0:T(8,128)}, f32[8]{0:T(128)S(1)}) tuple(%next, %new, %row)
}

%place (q0: f32[64,8], q1: f32[8], q2: s32[], q3: s32[]) -> f32[64,8] {
  %q0 = f32[64,8]{1,0:T(8,128)} parameter(0)
  %q1 = f32[8]{0:T(128)S(1)} parameter(1)
  %q2 = s32[]{:T(128)S(6)} parameter(2)
  %q3 = s32[]{:T(128)S(6)} parameter(3)
  %u = f32[1,8]{1,0:T(8,128)} bitcast(%q1)
  ROOT %d = f32[64,8]{1,0:T(8,128)} dynamic-update-slice(%q0, %u, %q2, %q3)
}

%until (s: (s32[], f32[64,8], f32[8])) -> pred[] {
  %s = (s32[]{:T(128)}, f32[64,8]{1,0:T(8,128)}, f32[8]{0:T(128)S(1)}) parameter(0)
  %n = s32[]{:T(128)} constant(LAST)
  %j = s32[]{:T(128)} get-tuple-element(%s), index=0
  ROOT %lt = pred[]{:T(512)} compare(%j, %n), direction=LT
}

ENTRY %main (a: f32[64,8], b: f32[8]) -> f32[64,8] {
  %a = f32[64,8]{1,0:T(8,128)} parameter(0)
  %b = f32[8]{0:T(128)S(1)} parameter(1)
  %first = s32[]{:T(128)} constant(4)
  %init = (s32[]{:T(128)}, f32[64,8]{1,0:T(8,128)}, f32[8]{0:T(128)S(1)}) tuple(%first, %a, %b)
  %w = (s32[]{:T(128)}, f32[64,8]{1,0:T(8,128)}, f32[8]{0:T(128)S(1)}) while(%init), condition=%until, body=%body
  ROOT %r = f32[64,8]{1,0:T(8,128)} get-tuple-element(%w), index=1
}
"""


@pytest.mark.parametrize(("stride", "turns"), [(1, 16), (2, 8), (3, 6)])
def test_a_loop_may_count_in_strides(stride, turns):
    text = LOOP.replace("LAST", "20").replace("constant(1)", f"constant({stride})")
    one = LOOP.replace("LAST", "5")
    assert compiled.tally(text).memory == turns * compiled.tally(one).memory


@pytest.mark.parametrize("last", [4, 5, 20])
def test_a_row_written_in_place_costs_a_row(last):
    found = compiled.tally(LOOP.replace("LAST", str(last)))
    scalars = 4 * (1 + 2) + 2 * 4  # the counter's sum, and the two indices that the fusion reads
    assert found.memory == pytest.approx((last - 4) * (8 * 4 + scalars), rel=0.3)
    assert found.memory <= (last - 4) * 64  # far below the 2 KiB of the whole


KERNEL = """HloModule hand

ENTRY %main (a: bf16[2,512,64], b: bf16[2,512,64]) -> bf16[4,512,64] {
  %a = bf16[2,512,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[2,512,64]{2,1,0:T(8,128)(2,1)} parameter(1)
  %both = bf16[4,512,64]{2,1,0:T(8,128)(2,1)} custom-call(%a, %b), custom_call_target="ConcatBitcast"
  ROOT %k = bf16[4,512,64]{2,1,0:T(8,128)(2,1)} custom-call(%both), custom_call_target="tpu_custom_call"
}
"""


def test_a_kernel_reads_its_operands_and_writes_its_results():
    assert compiled.tally(KERNEL) == compiled.Tally(memory=2 * 2 * 4 * 512 * 64)


BESIDE = """HloModule m, is_scheduled=true
%begin (p: bf16[64,512]) -> bf16[4096,512] {
  %p = bf16[64,512]{1,0} parameter(0)
  ROOT %g = bf16[4096,512]{1,0} all-gather(%p), replica_groups=[1,64]<=[64], dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_start":"-1","flag_end":"-1"}}
}
%product (p: bf16[64,512]) -> bf16[4096,512] {
  %p = bf16[64,512]{1,0} parameter(0)
  ROOT %g = bf16[4096,512]{1,0} all-gather(%p), replica_groups=[1,64]<=[64], dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"}}
}
ENTRY %main (a: bf16[64,512]) -> bf16[4096,512] {
  %a = bf16[64,512]{1,0} parameter(0)
  %first = bf16[4096,512]{1,0} fusion(%a), kind=kCustom, calls=%begin
  ROOT %second = bf16[4096,512]{1,0} fusion(%a), kind=kOutput, calls=%product
}
"""


def test_a_collective_beside_products_counts_where_it_begins():
    found = compiled.tally(BESIDE)
    assert found.calls == {"all-gather": 1}
    assert found.sent == {"all-gather": 63 * 2 * 64 * 512}
    assert compiled.collectives(BESIDE) == {"all-gather": 1}
