"""Relabelled goals against a sampler written as loops, and the places where leaks would show."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.core.types import UserError
from jaxalign.ops import goals
from jaxalign.ops.goals import Goals

LENGTHS = (9, 2, 14)  # states an episode
SIZE = 60_000


class Episodes(NamedTuple):
    observations: jax.Array
    actions: jax.Array
    end: jax.Array
    valid: jax.Array


def episodes():
    """Observations and actions say which state they are of."""
    last = np.cumsum(LENGTHS) - 1
    end = np.repeat(last, LENGTHS)
    index = np.arange(len(end))
    return Episodes(
        jnp.asarray(index[:, None], jnp.float32),
        jnp.asarray(index[:, None], jnp.float32),
        jnp.asarray(end, jnp.int32),
        jnp.asarray(index[index != end], jnp.int32),
    )


def indices(config, seed=0, size=SIZE):
    """The batch as indices: its fields without the axis of observations."""
    batch = jax.jit(goals.sample, static_argnums=(1, 3))(
        episodes(), config, jax.random.key(seed), size
    )
    return {name: np.asarray(a).reshape(size).astype(int) for name, a in batch._asdict().items()}


def chances(config):
    """Probability of each (state, value goal) and (state, goal, target), summed by hand."""
    data = episodes()
    end, valid, count = np.asarray(data.end), np.asarray(data.valid), sum(LENGTHS)
    value, high = np.zeros((count, count)), np.zeros((count, count, count))
    for i in valid:
        for steps in range(1, 3000):
            chance = config.discount ** (steps - 1) * (1 - config.discount)
            value[i, min(i + steps, end[i])] += config.value_trajectory * chance
        value[i, i] += config.value_current
        value[i, valid] += config.value_random / len(valid)
        ahead = min(i + config.subgoal_steps, end[i])
        later = np.arange(i + 1, end[i] + 1)
        # A number uniform between the first and the last, rounded.
        near = np.clip(np.stack([later - 0.5, later + 0.5]), i + 1, end[i])
        share = np.diff(near, axis=0)[0] / max(end[i] - i - 1, 1)
        share = share if len(later) > 1 else np.ones(1)
        for g, chance in zip(later, share, strict=True):
            high[i, g, min(ahead, g)] += (1 - config.actor_random) * chance
        high[i, valid, ahead] += config.actor_random / len(valid)
    return value / len(valid), high / len(valid)


def assert_drawn_from(chance, *drawn):
    """Chi-square of counts against chances, on cells that expect at least five."""
    count = np.zeros(chance.shape)
    np.add.at(count, drawn, 1)
    assert not count[chance == 0].any()
    expected = chance * SIZE
    cells = expected >= 5
    assert expected[cells].sum() > 0.99 * SIZE
    statistic = ((count - expected)[cells] ** 2 / expected[cells]).sum()
    freedom = cells.sum() - 1
    assert abs(statistic - freedom) < 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize(
    "config",
    [
        Goals(discount=0.8, subgoal_steps=4, actor_random=0.4),
        Goals(0.0, 1.0, 0.0, discount=0.5, subgoal_steps=1),
        Goals(0.0, 0.0, 1.0, subgoal_steps=50, actor_random=1.0),
    ],
)
def test_goals_have_the_chances_of_the_literal_sampler(config):
    drawn, (value, high) = indices(config), chances(config)
    assert value.sum() == pytest.approx(1) and high.sum() == pytest.approx(1)
    assert_drawn_from(value, drawn["observation"], drawn["value_goal"])
    assert_drawn_from(high, drawn["observation"], drawn["high_goal"], drawn["high_target"])


def test_what_belongs_to_a_transition_stays_in_its_episode():
    data, drawn = episodes(), indices(Goals(subgoal_steps=4, actor_random=0.5))
    i, end = drawn["observation"], np.asarray(data.end)
    assert (i < end[i]).all() and set(i) == set(np.asarray(data.valid).tolist())
    np.testing.assert_array_equal(drawn["action"], i)
    np.testing.assert_array_equal(drawn["next_observation"], i + 1)
    np.testing.assert_array_equal(drawn["low_goal"], np.minimum(i + 4, end[i]))
    np.testing.assert_array_equal(drawn["actor_goal"], drawn["high_goal"])
    assert (end[drawn["high_target"]] == end[i]).all() and (drawn["high_target"] > i).all()
    reached = drawn["value_goal"] == i
    np.testing.assert_array_equal(drawn["reward"], np.where(reached, 0, -1))
    np.testing.assert_array_equal(drawn["mask"], np.where(reached, 0, 1))


def test_goals_of_values_and_policies_are_drawn_apart():
    drawn = indices(Goals(0.0, 0.0, 1.0, actor_random=1.0))
    both = np.corrcoef(drawn["value_goal"], drawn["actor_goal"])[0, 1]
    with_state = np.corrcoef(drawn["observation"], drawn["actor_goal"])[0, 1]
    assert abs(both) < 0.02 and abs(with_state) < 0.02


def test_geometric_steps_are_exact_in_float32():
    discount = 0.99
    assert int(goals.geometric(jnp.float32(0), discount)) == 1
    highest = goals.geometric(jnp.float32(1 - 2**-24), discount)
    assert int(highest) == int(np.floor(24 * np.log(0.5) / np.log(discount))) + 1
    # On either side of a step's edge 1 - discount ** n.
    steps = np.arange(1, 800)
    edge = 1 - discount ** steps.astype(float)
    for offset, expected in ((-2e-6, steps), (2e-6, steps + 1)):
        inside = discount**steps * (1 - discount) > 4e-6  # where a step is wider than the offset
        got = goals.geometric(jnp.asarray(edge + offset, jnp.float32), discount)
        np.testing.assert_array_equal(np.asarray(got)[inside], expected[inside])


def test_future_states_are_exact_where_indices_are_large():
    i = jnp.full(1001, 16_000_000, jnp.int32)
    u = jnp.linspace(0, 1, 1001, endpoint=False)
    state = np.asarray(goals.uniform_future(u, i, i + 1001))
    np.testing.assert_allclose(state - 16_000_001, np.round(1000 * (1 - np.asarray(u))), atol=1)
    assert len(set(state)) > 990  # in float32, 16 million and a fraction has no fraction
    np.testing.assert_array_equal(goals.uniform_future(u, i, i + 1), i + 1)


def test_seeds_in_one_program_draw_what_they_draw_alone():
    data, config = episodes(), Goals(actor_random=0.5)
    keys = jax.random.split(jax.random.key(0), 3)
    together = jax.jit(jax.vmap(lambda key: goals.sample(data, config, key, 32)))(keys)
    for seed, key in enumerate(keys):
        alone = goals.sample(data, config, key, 32)
        jax.tree.map(lambda a, b, s=seed: np.testing.assert_array_equal(a[s], b), together, alone)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"subgoal_steps": 0}, "subgoal_steps = 0: must be at least 1"),
        ({"subgoal_steps": -3}, "subgoal_steps = -3"),
        ({"value_random": 0.4}, "= 1.1: these shares must add up to 1"),
        ({"value_current": -0.1, "value_random": 0.6}, "value_current = -0.1: a share"),
        ({"actor_random": 1.5}, "actor_random = 1.5: a share"),
        ({"discount": 1.0}, "discount = 1.0: must lie between 0 and 1"),
        ({"discount": 0.0}, "discount = 0.0"),
    ],
)
def test_impossible_goals(change, says):
    with pytest.raises(UserError, match=says) as error:
        dataclasses.replace(Goals(), **change)
    assert "\n" not in str(error.value)
