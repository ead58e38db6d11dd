"""The ring of transitions: what is overwritten, what is drawn, and that nothing is copied."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.core.checkpoint import Checkpoints
from jaxalign.core.types import UserError
from jaxalign.ops.skills import Transitions
from jaxalign.rollout import buffer

KEY = jax.random.key(0)
write = jax.jit(buffer.write)
sample = jax.jit(buffer.sample, static_argnums=2)


def rows(first, count):
    """Transitions numbered from `first`, each leaf telling its number."""
    number = jnp.arange(first, first + count, dtype=jnp.float32)
    wide = number[:, None] + jnp.array([[0.0, 0.5]])
    return Transitions(wide, -wide, wide + 1, 2 * wide, number)


def empty(capacity):
    return buffer.create(jax.tree.map(lambda leaf: leaf[0], rows(0, 1)), capacity)


def numbers(ring):
    """Of the rows held, checking that the leaves of a row stayed together."""
    held = jax.tree.map(lambda leaf: leaf[: int(ring.size)], ring.data)
    jax.tree.map(
        np.testing.assert_array_equal,
        held,
        jax.tree.map(lambda *leaf: jnp.concatenate(leaf), *(rows(i, 1) for i in held.terminal)),
    )
    return held.terminal.astype(int).tolist()


def test_new_rows_overwrite_the_oldest():
    ring, held = empty(6), []
    for first in range(0, 10, 2):
        ring = write(ring, rows(first, 2))
        held = [*held, first, first + 1][-6:]
        assert sorted(numbers(ring)) == held
        assert ring.size == min(first + 2, 6) and ring.at == (first + 2) % 6
    assert numbers(ring) == [6, 7, 8, 9, 4, 5]


def test_pieces_of_several_lengths_are_never_cut():
    ring = write(write(empty(6), rows(0, 1)), rows(1, 3))
    ring = write(ring, rows(4, 3))  # four rows are left of the end, then one too few
    assert sorted(numbers(ring)) == [3, 4, 5, 6] and ring.size == 4
    ring = write(ring, rows(7, 3))
    assert sorted(numbers(ring)) == [4, 5, 6, 7, 8, 9]


def test_draws_are_uniform_over_the_rows_held():
    ring = write(write(empty(1000), rows(1, 5)), rows(6, 5))
    drawn = sample(ring, KEY, 5_000)
    found, counts = np.unique(drawn.terminal, return_counts=True)
    np.testing.assert_array_equal(found, np.arange(1, 11))  # no row that is not yet written
    assert ((counts - 500) ** 2 / 500).sum() < 27.9  # chi-square, 9 degrees, 0.1 %
    np.testing.assert_array_equal(drawn.action, -drawn.observation)
    np.testing.assert_array_equal(drawn.next_observation, drawn.observation + 1)


def test_it_goes_on_from_a_checkpoint(tmp_path):
    ring = write(write(empty(4), rows(0, 2)), rows(2, 2))
    ring = write(ring, rows(4, 2))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, ring, KEY)
    checkpoints.wait()
    restored, key, _ = checkpoints.restore(jax.tree.map(jnp.zeros_like, ring))
    checkpoints.close()
    on, again = write(ring, rows(6, 2)), write(restored, rows(6, 2))
    jax.tree.map(np.testing.assert_array_equal, on, again)
    jax.tree.map(np.testing.assert_array_equal, sample(on, KEY, 9), sample(again, key, 9))


def test_a_write_happens_in_place():
    ring = empty(8)
    place = ring.data.observation.unsafe_buffer_pointer()
    written = jax.jit(buffer.write, donate_argnums=0)(ring, rows(0, 4))
    assert written.data.observation.unsafe_buffer_pointer() == place
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(ring))


def test_buffers_side_by_side():
    one, two = write(empty(6), rows(0, 2)), write(empty(6), rows(10, 2))
    both = jax.tree.map(lambda *leaf: jnp.stack(leaf), one, two)
    new = jax.tree.map(lambda *leaf: jnp.stack(leaf), rows(2, 2), rows(12, 2))
    both = jax.jit(jax.vmap(buffer.write))(both, new)
    for i, first in enumerate((0, 10)):
        assert numbers(jax.tree.map(lambda leaf, i=i: leaf[i], both)) == list(
            range(first, first + 4)
        )


def test_impossible_sizes():
    with pytest.raises(UserError, match="buffer capacity = 0: must be at least 1"):
        empty(0)
    with pytest.raises(
        UserError, match=r"buffer capacity = 7: must be a multiple of the 3 rows .* 6"
    ):
        buffer.write(empty(7), rows(0, 3))
    with pytest.raises(UserError, match=r"buffer capacity = 2: .* 3 rows written at once; try 3"):
        buffer.write(empty(2), rows(0, 3))
