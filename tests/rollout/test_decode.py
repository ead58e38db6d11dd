"""Decoding against a loop of full forwards, and the trainer's densities against the rollout's."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from jaxalign.core.mesh import batch_sharding, make_mesh, replicated
from jaxalign.core.types import LanguageModel, UserError
from jaxalign.ops.sampling import Sampling, adjust, draw, entropy, log_density
from jaxalign.rollout.decode import Constraint, decode, mismatch, score

VOCABULARY, WIDTH, CONTEXT = 11, 8, 40
ROWS, PROMPT, LENGTH, PAD = 6, 4, 9, 0


def tiny_model(seen=None) -> LanguageModel:
    """One layer of attention with learned positions; `seen` is told the rows of each `extend`."""

    def init(key):
        keys = jax.random.split(key, 4)
        shapes = {
            "embed": (VOCABULARY, WIDTH),
            "position": (CONTEXT, WIDTH),
            "mix": (WIDTH, 3 * WIDTH),
            "head": (WIDTH, VOCABULARY),
        }
        return {
            name: jax.random.normal(k, shape)
            for k, (name, shape) in zip(keys, shapes.items(), strict=True)
        }

    def attend(query, keys, values, seen):
        weight = jnp.einsum("bsd,bld->bsl", query, keys)
        weight = jax.nn.softmax(jnp.where(seen, weight, -1e9))
        return jnp.einsum("bsl,bld->bsd", weight, values)

    def project(params, ids, position):
        x = params["embed"][ids] + params["position"][position]
        return x, jnp.split(x @ params["mix"] / WIDTH**0.5, 3, axis=-1)

    def hidden(params, ids, mask):
        position = jnp.maximum(jnp.cumsum(mask, 1) - 1, 0)
        x, (query, keys, values) = project(params, ids, position)
        causal = jnp.tril(jnp.ones((ids.shape[1],) * 2, bool))
        return x + attend(query, keys, values, mask[:, None, :] & causal[None])

    def extend(params, cache, ids, position, visible, index):
        if seen:
            jax.debug.callback(seen, len(ids))
        x, (query, *new) = project(params, ids, position)
        keys, values = (
            jax.lax.dynamic_update_slice_in_dim(old, n, index, 1)
            for old, n in zip(cache, new, strict=True)
        )
        upto = index + jnp.arange(ids.shape[1])
        reached = jnp.arange(visible.shape[1])[None, :] <= upto[:, None]
        return x + attend(query, keys, values, visible[:, None] & reached[None]), (keys, values)

    return LanguageModel(
        init=init,
        hidden=hidden,
        head=lambda params: params["head"].T,
        logits=lambda table, hidden: hidden @ table.T / WIDTH / 2,
        predictor=lambda params: lambda hidden: hidden @ params["head"] / WIDTH / 2,
        empty_cache=lambda rows, slots: (jnp.zeros((rows, slots, WIDTH)),) * 2,
        extend=extend,
        vocabulary=VOCABULARY,
        width=WIDTH,
        context=CONTEXT,
    )


MODEL = tiny_model()


@functools.cache
def params():
    with jax.ensure_compile_time_eval():  # whoever asks first
        return MODEL.init(jax.random.key(0))


def prompts(rows: int = ROWS):
    chance = np.random.default_rng(1)
    ids = chance.integers(0, VOCABULARY, (rows, PROMPT)).astype(np.int32)
    padding = chance.integers(0, PROMPT, rows)
    mask = np.arange(PROMPT)[None] >= padding[:, None]
    return np.where(mask, ids, PAD), mask


@functools.cache
def compiled(model=MODEL, **how):
    how = dict(length=LENGTH, sampling=Sampling(), pad=PAD) | how
    return jax.jit(lambda *inputs, stop: decode(model, *inputs, stop=stop, **how))


def stops(tokens):
    """Stop tokens as one shape, so that one program serves all; no token is -1."""
    return np.array([*tokens, *(-1,) * VOCABULARY], np.int32)[:VOCABULARY]


def run(ids, mask, seed=3, weights=None, stop=(), key=None, **how):
    key = jax.random.key(seed) if key is None else key
    return compiled(**how)(weights or params(), ids, mask, key, stop=stops(stop))


HOW = [
    Sampling(),
    Sampling(top_k=4),
    Sampling(top_p=0.8),
    Sampling(temperature=1.3, top_k=7, top_p=0.6),
    Sampling(temperature=0),
]
STOP = (5, 7)


def rescore(decoded, weights=None, length=LENGTH, sampling=HOW[0], constraint=None, chunk=4):
    how = dict(length=length, sampling=sampling, constraint=constraint, chunk=chunk)
    run = jax.jit(lambda *inputs: score(MODEL, *inputs, **how))
    return run(weights or params(), decoded.ids, decoded.mask)


def assert_same(one, other):
    """Tokens equal, densities up to rounding."""
    for field in ("ids", "mask", "length", "stopped"):
        np.testing.assert_array_equal(getattr(one, field), getattr(other, field), field)
    np.testing.assert_allclose(one.log_density, other.log_density, atol=1e-5)


# --- what is sampled -----------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", HOW, ids=str)
def test_rollout_and_trainer_are_the_same_policy(sampling):
    decoded = run(*prompts(), sampling=sampling, stop=STOP)
    density, spread = rescore(decoded, sampling=sampling)
    assert float(mismatch(decoded, density)) <= 1e-5
    assert np.all(np.asarray(density) <= 0) and np.all(np.asarray(spread) >= -1e-6)
    if sampling.temperature == 0:
        assert not np.any(density) and not np.any(spread)
    elif sampling != Sampling():  # the full softmax is another policy, and that is seen
        assert float(mismatch(decoded, rescore(decoded)[0])) > 0.05


def test_the_cache_changes_nothing():
    """Against a full forward for each token."""
    (ids, mask), key = prompts(), jax.random.key(3)

    @jax.jit
    def next_token(ids, mask, step):
        hidden = jnp.take(MODEL.hidden(params(), ids, mask), PROMPT + step - 1, axis=1)
        adjusted = adjust(MODEL.logits(MODEL.head(params()), hidden), Sampling())
        fold = jax.vmap(jax.random.fold_in, (None, 0))
        keys = jax.vmap(jax.random.fold_in, (0, None))(fold(key, jnp.arange(ROWS)), step)
        token = draw(keys, adjusted)
        return token, log_density(adjusted, token)

    ids, mask = (np.pad(x, ((0, 0), (0, LENGTH))) for x in (ids, mask))
    densities = []
    for step in range(LENGTH):
        ids[:, PROMPT + step], density = next_token(ids, mask, step)
        mask[:, PROMPT + step] = True
        densities.append(density)
    decoded = run(*prompts())
    np.testing.assert_array_equal(decoded.ids, ids)
    np.testing.assert_allclose(decoded.log_density, np.stack(densities, 1), atol=1e-5)
    assert (
        not decoded.stopped.any() and np.all(decoded.length == LENGTH) and decoded.mask[:, 4:].all()
    )


# --- ends ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", [PAD, STOP[0]], ids=["another token", "a stop token"])
def test_a_row_ends_with_its_stop_token(pad):
    endless, decoded = run(*prompts()), run(*prompts(), stop=STOP, pad=pad)
    drawn, response = np.asarray(endless.ids)[:, PROMPT:], np.asarray(decoded.response)
    lengths = []
    for row in range(ROWS):
        at = np.flatnonzero(np.isin(drawn[row], STOP))
        lengths.append(at[0] + 1 if len(at) else LENGTH)
        assert bool(decoded.stopped[row]) == bool(len(at))
    np.testing.assert_array_equal(decoded.length, lengths)
    np.testing.assert_array_equal(response, np.arange(LENGTH)[None] < np.array(lengths)[:, None])
    np.testing.assert_array_equal(decoded.ids[:, PROMPT:], np.where(response, drawn, pad))
    np.testing.assert_allclose(
        decoded.log_density, np.where(response, endless.log_density, 0), atol=1e-6
    )
    assert min(lengths) < max(lengths) and 0 < np.sum(decoded.stopped) < ROWS


CALLS: list[int] = []
WATCHED = tiny_model(seen=CALLS.append)


@pytest.mark.parametrize("stop", [(), STOP, tuple(range(VOCABULARY))], ids=["none", "two", "all"])
def test_the_loop_ends_with_the_last_row(stop):
    CALLS.clear()
    decoded = run(*prompts(4), seed=11, model=WATCHED, stop=stop)
    jax.block_until_ready(decoded)
    jax.effects_barrier()
    assert len(CALLS) == int(decoded.length.max())  # the prompt, then one for each further token
    if stop == STOP:
        assert len(CALLS) < LENGTH


# --- neighbours and the shrinking batch ----------------------------------------------------------


def test_shrinking_the_batch_changes_nothing():
    for seed in (3, 4, 5):
        whole = run(*prompts(), seed, stop=STOP)
        assert_same(whole, run(*prompts(), seed, stop=STOP, halvings=9))
        assert len(np.unique(whole.length)) > 2


@pytest.mark.parametrize(
    "how", [dict(), dict(stop=tuple(range(VOCABULARY))), dict(length=1)], ids=["no", "all", "one"]
)
def test_shrinking_when_none_ends_or_all_do_or_there_is_one_step(how):
    assert_same(run(*prompts(), **how), run(*prompts(), halvings=2, **how))


def test_the_batch_shrinks_as_soon_as_the_live_rows_fit():
    """Loops of 6, 3 and 2 rows, by the lengths of the responses."""
    ends = np.array([1, 9, 2, 1, 4, 5])

    def only_at_its_end(state, logits):
        step, end = state
        stops = jnp.arange(VOCABULARY)[None] == STOP[0]
        return jnp.where(stops == (step + 1 == end)[:, None], logits, -jnp.inf)

    @jax.jit
    def constrained(weights, ids, mask, key, ends):
        start = (jnp.zeros_like(ends), ends)
        constraint = Constraint(start, only_at_its_end, lambda s, token: (s[0] + 1, s[1]))
        how = dict(length=LENGTH, sampling=Sampling(), stop=STOP[:1], pad=PAD)
        return decode(WATCHED, weights, ids, mask, key, constraint=constraint, halvings=2, **how)

    CALLS.clear()
    decoded = constrained(params(), *prompts(), jax.random.key(0), ends)
    jax.block_until_ready(decoded)
    jax.effects_barrier()
    np.testing.assert_array_equal(decoded.length, ends)
    # 4 rows live after the prompt, 3 from the second token on, 2 from the fourth.
    assert sorted(map(int, CALLS), reverse=True) == [6, 6, 3, 3, 2, 2, 2, 2, 2]


def test_rows_do_not_depend_on_their_neighbours():
    ids, mask = prompts()
    whole, alone = run(ids, mask, stop=STOP), run(ids[:1], mask[:1], stop=STOP)
    assert_same(jax.tree.map(lambda x: x[:1], whole), alone)
    changed = np.concatenate([ids[:3], ids[3:] + 1]), np.concatenate([mask[:3], ~mask[3:] | True])
    other = run(*changed, stop=STOP)
    assert_same(*(jax.tree.map(lambda x: x[:3], d) for d in (whole, other)))
    assert np.any(np.asarray(whole.ids[3:, PROMPT:]) != np.asarray(other.ids[3:, PROMPT:]))


# --- constraints ---------------------------------------------------------------------------------


def no_repeats(rows: int = ROWS) -> Constraint:
    """No token twice in a row's response."""
    return Constraint(
        start=jnp.zeros((rows, VOCABULARY), bool),
        mask=lambda used, logits: jnp.where(used, -jnp.inf, logits),
        advance=lambda used, token: used | (token[:, None] == jnp.arange(VOCABULARY)[None]),
    )


@pytest.mark.parametrize(
    ("sampling", "halvings"), [(Sampling(), 0), (Sampling(temperature=1.5, top_k=5), 2)]
)
def test_a_constraint_holds_for_rollout_and_trainer(sampling, halvings):
    constraint = no_repeats()
    decoded = jax.jit(
        lambda *inputs: decode(
            MODEL,
            *inputs,
            length=LENGTH,
            sampling=sampling,
            stop=STOP,
            pad=PAD,
            constraint=no_repeats(),
            halvings=halvings,
        )
    )(params(), *prompts(), jax.random.key(2))
    for row in range(ROWS):
        drawn = decoded.ids[row, PROMPT:][decoded.response[row]]
        assert len(np.unique(drawn)) == len(drawn)
    density, spread = rescore(decoded, sampling=sampling, constraint=constraint)
    assert float(mismatch(decoded, density)) <= 1e-5
    assert np.isfinite(spread).all()
    assert float(mismatch(decoded, rescore(decoded, sampling=sampling)[0])) > 0.01


# --- one program, many members, many devices -----------------------------------------------------


def test_one_trace_serves_all_prompts():
    before = run(*prompts(), stop=STOP)
    traces = compiled()._cache_size()
    ids, mask = prompts()
    other = run(ids[::-1].copy(), np.ones_like(mask), seed=8, stop=STOP)
    assert compiled()._cache_size() == traces
    assert np.any(before.ids != other.ids)


def test_seeds_under_vmap():
    keys = jax.random.split(jax.random.key(4), 3)
    weights = [MODEL.init(key) for key in keys]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *weights)
    one = functools.partial(
        decode, MODEL, length=LENGTH, sampling=Sampling(), stop=STOP, pad=PAD, halvings=2
    )
    many = jax.jit(jax.vmap(one, (0, None, None, 0)))
    together = many(stacked, *prompts(), keys)
    for i in range(3):
        alone = run(*prompts(), weights=weights[i], key=keys[i], stop=STOP)
        assert_same(jax.tree.map(lambda x, i=i: x[i], together), alone)
    # A condition for each member would make every step copy the caches of those that are done.
    jaxpr = jax.make_jaxpr(many)(stacked, *prompts(), keys)
    loops = [e for e in equations(jaxpr.jaxpr) if e.primitive.name == "while"]
    loops = [e for e in loops if e.params["cond_jaxpr"].out_avals[0].shape == ()]
    caches = (3, ROWS, PROMPT + LENGTH, WIDTH)
    assert sum(caches in [v.aval.shape for v in e.outvars] for e in loops) == 1
    assert not any(
        e.primitive.name == "select_n" and e.outvars[0].aval.shape == caches
        for e in equations(jaxpr.jaxpr)
    )


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for part in jaxprs_in_params(equation.params):
            yield from equations(part)


@pytest.mark.parametrize("halvings", [0, 1])
def test_eight_devices_draw_what_one_draws(halvings):
    mesh, sampling = make_mesh(), Sampling(top_k=9, top_p=0.9)
    ids, mask = prompts(16)
    alone = run(ids, mask, stop=STOP, sampling=sampling, halvings=halvings)
    spread = jax.device_put((ids, mask), batch_sharding(mesh))
    weights = jax.device_put(params(), replicated(mesh))
    key = jax.device_put(jax.random.key(3), replicated(mesh))
    how = dict(weights=weights, key=key, stop=STOP, sampling=sampling, halvings=halvings)
    together = run(*spread, **how)
    assert_same(alone, together)
    if not halvings:
        assert len(together.ids.sharding.device_set) == 8
        assert not together.ids.sharding.is_fully_replicated


# --- the trainer's side --------------------------------------------------------------------------


def losses(length=LENGTH):
    """The same loss chunked and at once, as functions of the parameters."""
    decoded = run(*prompts(), stop=STOP)
    weight = jax.random.normal(jax.random.key(1), (ROWS, LENGTH))

    def chunked(weights, chunk):
        density, spread = score(
            MODEL, weights, decoded.ids, decoded.mask, length, HOW[3], no_repeats(), chunk
        )
        return (weight * density + spread).sum()

    def at_once(weights):
        logits = MODEL.logits(MODEL.head(weights), MODEL.hidden(weights, decoded.ids, decoded.mask))
        logits, token = logits[:, PROMPT - 1 : -1], decoded.ids[:, PROMPT:]
        constraint, state = no_repeats(), no_repeats().start
        masked = []
        for step in range(LENGTH):
            masked.append(constraint.mask(state, logits[:, step]))
            state = constraint.advance(state, token[:, step])
        adjusted = adjust(jnp.stack(masked, 1), HOW[3], token)
        terms = weight * log_density(adjusted, token) + entropy(adjusted)
        return jnp.where(decoded.response, terms, 0).sum()

    return chunked, at_once


@pytest.mark.parametrize("chunk", [4, 99])
def test_chunks_change_neither_value_nor_gradient(chunk):
    chunked, at_once = losses()
    value, gradient = jax.jit(jax.value_and_grad(functools.partial(chunked, chunk=chunk)))(params())
    expected, reference = jax.jit(jax.value_and_grad(at_once))(params())
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for ours, theirs in zip(*map(jax.tree.leaves, (gradient, reference)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_logits_of_all_tokens_never_exist():
    chunked, at_once = losses()

    def largest(loss):
        jaxpr = jax.make_jaxpr(jax.value_and_grad(loss))(params()).jaxpr
        made = [v.aval for e in equations(jaxpr) for v in e.outvars]
        made = [a for a in made if VOCABULARY in a.shape and a.dtype == jnp.float32]
        return max(a.size for a in made)

    assert largest(at_once) >= ROWS * LENGTH * VOCABULARY
    assert largest(functools.partial(chunked, chunk=2)) == ROWS * 2 * VOCABULARY


def test_mismatch_looks_at_response_tokens_only():
    decoded = run(*prompts(), stop=STOP)
    real = np.asarray(decoded.response)
    assert float(mismatch(decoded, decoded.log_density)) == 0
    assert float(mismatch(decoded, decoded.log_density + np.where(real, 0, 9.0))) == 0
    row, step = np.argwhere(real)[-1]
    moved = decoded.log_density.at[row, step].add(-0.25)
    np.testing.assert_allclose(mismatch(decoded, moved), 0.25, rtol=1e-5)
    assert np.isnan(mismatch(decoded, decoded.log_density.at[row, step].set(jnp.nan)))


# --- mistakes ------------------------------------------------------------------------------------


def test_mistakes_are_named():
    ids, mask = prompts()

    def wrong(ids=ids, mask=mask, length=LENGTH, **how):
        how = dict(sampling=Sampling(), stop=(), pad=PAD) | how
        with pytest.raises(UserError) as raised:
            decode(MODEL, params(), ids, mask, jax.random.key(0), length=length, **how)
        assert "\n" not in str(raised.value)
        return str(raised.value)

    assert "at least 1" in wrong(length=0)
    assert "context, 40; shorten one by 3" in wrong(length=CONTEXT - PROMPT + 3)
    assert "halvings = -1" in wrong(halvings=-1)
    assert "(6, 3)" in wrong(mask=mask[:, 1:])
    assert "prompt 2: its last slot" in wrong(mask=mask & (np.arange(ROWS) != 2)[:, None])
    assert "prompt 0: its last slot" in wrong(mask=mask[:, ::-1] & ~mask.all(1, keepdims=True))
    for length, chunk in ((0, 4), (PROMPT + LENGTH, 4), (LENGTH, 0), (LENGTH, -1)):
        with pytest.raises(UserError, match=f"^length {length} of 13 slots, in chunks of {chunk}"):
            whole = np.pad(ids, ((0, 0), (0, LENGTH)))
            score(MODEL, params(), whole, whole > -1, length, Sampling(), chunk=chunk)
