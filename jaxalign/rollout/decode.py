"""Compiled rollouts of a language model: `decode` samples responses, `score` weighs them again.

The prompt goes through the network once and leaves its keys and values in a cache; a while loop
then adds a token to every row and ends when all rows have met a stop token. Both functions are
plain traceable code: the caller compiles them, inside a larger program if that suits.

The log-densities of both are those of the distribution that was sampled from: after the
constraint, temperature, top-k and top-p. Trainers that recompute them with the full softmax train
off-policy without noticing; `mismatch` measures what is left.

Rows that have ended still cost their share of every step. `halvings` lets the program shrink the
batch while it runs, in loops of B, B/2, B/4, ... rows: as soon as the live rows fit into the next
one they are gathered there, cache and all, without a word from the host.

Dimensions: B rows, P prompt slots, T response tokens at most, L = P + T slots of the cache, V
vocabulary, D width, w rows of the loop that runs.

Departures from generation as usual: a token depends on (key, row, step) and the row's own prompt
only, not on its neighbours, nor on when the batch shrinks (up to rounding: matrix products of other
sizes add in another order). Under `vmap` the loops run until the slowest member's condition fails;
rows that have ended ignore the steps that follow, so the result is the same, and no step copies
the cache to undo itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import core as jax_core

from jaxalign.core.types import Array, LanguageModel, Params, PyTree, UserError
from jaxalign.ops import sampling as ops
from jaxalign.ops.rows import on_own_rows
from jaxalign.ops.sampling import Sampling

LOGITS = 2**27  # that the trainer holds at a time: half a GiB


class Constraint(NamedTuple):
    """An automaton a row that says which tokens may come next.

    start: the states before the response, a pytree of arrays with leading axis B.
    mask: `(states, logits [B, V] f32) -> logits`, forbidden tokens at -inf; one must stay allowed.
    advance: `(states, token [B] i32) -> states`. Rows that have ended are advanced too, with pad.
    """

    start: PyTree
    mask: Callable[[PyTree, Array], Array]
    advance: Callable[[PyTree, Array], PyTree]


class Decoded(NamedTuple):
    """Prompts with their responses.

    ids: `[B, P+T] i32`, pad after the response.
    mask: `[B, P+T] bool`, prompt and response, the stop token included.
    log_density: `[B, T] f32`, in nats, of the distribution sampled from; 0 beyond the end.
    length: `[B] i32`, response tokens, the stop token included.
    stopped: `[B] bool`; False where the response was cut off after T tokens.
    """

    ids: Array
    mask: Array
    log_density: Array
    length: Array
    stopped: Array

    @property
    def response(self) -> Array:
        """Which response tokens are real, `[B, T] bool`."""
        return self.mask[:, self.mask.shape[1] - self.log_density.shape[1] :]


class _Drawn(NamedTuple):
    """Responses so far: token, log_density `[w, T]`, length, stopped `[w]`."""

    token: Array
    log_density: Array
    length: Array
    stopped: Array


class _Live(NamedTuple):
    """What a loop carries for each of its rows.

    row: `[w] i32`, the row of the batch. key: `[w]`. count: `[w] i32`, prompt tokens.
    visible: `[w, L] bool`, slots that hold tokens, or will. last: `[w] i32`, the newest token.
    """

    row: Array
    key: Array
    count: Array
    visible: Array
    cache: PyTree
    state: PyTree
    last: Array
    drawn: _Drawn


def decode(
    model: LanguageModel,
    params: Params,
    ids: Array,
    mask: Array,
    key: Array,
    *,
    length: int,
    sampling: Sampling,
    stop: Sequence[int] | Array,
    pad: int,
    constraint: Constraint | None = None,
    halvings: int = 0,
) -> Decoded:
    """Samples a response to every prompt.

    ids: `[B, P] i32`, left-padded. mask: `[B, P] bool`, the real tokens; every row's last slot is
        one, which is checked where the values are known (outside of compiled code).
    key: one typed key; row r draws its token t with `fold_in(fold_in(key, r), t)`.
    length: T, the longest response.
    stop: ids that end a response; may be empty. pad: what fills ids after the end; may be a stop
        token, since nothing reads the mask off the ids.
    halvings: how often the batch may shrink to half. Each compiles another copy of the loop. With
        lengths of a long tail 2 halve the work; with equal lengths they bring nothing.
    Raises: UserError for sizes that do not fit together or beyond the model's context.
    """
    _check(model, ids, mask, length)
    rows, prompt = ids.shape
    widths = _widths(rows, halvings)
    stops = jnp.asarray(stop, jnp.int32).reshape(-1)
    step_out = functools.partial(_step_out, model.predictor(params), sampling, stops, constraint)
    live, hidden = _prefill(model, params, ids, mask, key, length, pad, constraint)
    live = step_out(live, hidden, jnp.int32(0))
    # Counts the tokens drawn, the same for all rows. `done` is kept for the whole batch.
    step, done = jnp.int32(1), live.drawn

    def advance(carry: tuple[Array, _Live]) -> tuple[Array, _Live]:
        step, live = carry
        hidden, cache = model.extend(
            params,
            live.cache,
            live.last[:, None],
            (live.count + step - 1)[:, None],
            live.visible,
            prompt + step - 1,
        )
        return step + 1, step_out(live._replace(cache=cache), hidden[:, 0], step)

    def more_than(rows: int, carry: tuple[Array, _Live]) -> Array:
        step, live = carry
        return (step < length) & (_largest((~live.drawn.stopped).sum(dtype=jnp.int32)) > rows)

    for width, following in zip(widths, (*widths[1:], 0), strict=True):
        live = _shrink(live, width)
        condition = functools.partial(more_than, following)
        step, live = jax.lax.while_loop(condition, advance, (step, live))
        done = jax.tree.map(lambda all, part, row=live.row: all.at[row].set(part), done, live.drawn)
    return _decoded(ids, mask, done)


def _check(model: LanguageModel, ids: Array, mask: Array, length: int) -> None:
    if ids.ndim != 2 or ids.shape != mask.shape or not ids.size:
        raise UserError(
            f"prompts {ids.shape} with mask {mask.shape}: both must be [rows, slots] and not empty"
        )
    if length < 1:
        raise UserError(f"response length {length}: must be at least 1")
    total = ids.shape[1] + length
    if total > model.context:
        raise UserError(
            f"prompt of {ids.shape[1]} and response of {length} slots: together at most the "
            f"model's context, {model.context}; shorten one by {total - model.context}"
        )
    if isinstance(mask, jax_core.Tracer):
        return
    wrong = np.flatnonzero(~np.asarray(mask)[:, -1])
    if len(wrong):
        raise UserError(
            f"prompt {wrong[0]}: its last slot is padding; prompts must have a token and be padded "
            "on the left"
        )


def _widths(rows: int, halvings: int) -> list[int]:
    """Rows of each loop: B, B/2, B/4, ..., rounded up."""
    if halvings < 0:
        raise UserError(f"halvings = {halvings}: must not be negative; 0 keeps the batch whole")
    widths = [rows]
    while len(widths) <= halvings and widths[-1] > 1:
        widths.append((widths[-1] + 1) // 2)
    return widths


@jax.custom_batching.custom_vmap
def _largest(count: Array) -> Array:
    """The number itself; under `vmap` the largest of all members, the same for each of them."""
    return count


@_largest.def_vmap
def _largest_of_members(size: int, batched: Sequence[bool], count: Array) -> tuple[Array, bool]:
    del size, batched
    return _largest(count.max()), False


def _prefill(
    model: LanguageModel,
    params: Params,
    ids: Array,
    mask: Array,
    key: Array,
    length: int,
    pad: int,
    constraint: Constraint | None,
) -> tuple[_Live, Array]:
    """All rows with the prompt in their cache, and the state after its last token `[B, D]`."""
    rows, prompt = ids.shape
    # A query sees no slot after its own, so those of the response can be visible from the start.
    visible = jnp.concatenate([mask, jnp.ones((rows, length), bool)], axis=1)
    position = jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
    cache = model.empty_cache(rows, prompt + length)
    hidden, cache = model.extend(params, cache, ids, position, visible, jnp.int32(0))
    row = jnp.arange(rows, dtype=jnp.int32)
    return _Live(
        row=row,
        key=jax.vmap(jax.random.fold_in, (None, 0))(key, row),
        count=mask.sum(1, dtype=jnp.int32),
        visible=visible,
        cache=cache,
        state=None if constraint is None else constraint.start,
        last=ids[:, -1],
        drawn=_Drawn(
            token=jnp.full((rows, length), pad, jnp.int32),
            log_density=jnp.zeros((rows, length), jnp.float32),
            length=jnp.zeros(rows, jnp.int32),
            stopped=jnp.zeros(rows, bool),
        ),
    ), hidden[:, -1]


def _step_out(
    predict: Callable[[Array], Array],
    sampling: Sampling,
    stop: Array,
    constraint: Constraint | None,
    live: _Live,
    hidden: Array,
    step: Array,
) -> _Live:
    """Draws response token `step` of every row that has not ended, from hidden `[w, D]`."""
    logits = predict(hidden)
    if constraint is not None:
        logits = constraint.mask(live.state, logits)
    adjusted = ops.adjust(logits, sampling)
    token = ops.draw(jax.vmap(jax.random.fold_in, (0, None))(live.key, step), adjusted)
    before = live.drawn
    # Where the response has ended there is pad already.
    token = jnp.where(before.stopped, before.token[:, step], token)
    density = jnp.where(before.stopped, 0.0, ops.log_density(adjusted, token))
    drawn = _Drawn(
        token=before.token.at[:, step].set(token),
        log_density=before.log_density.at[:, step].set(density),
        length=before.length + ~before.stopped,
        stopped=before.stopped | (token[:, None] == stop[None, :]).any(1),
    )
    state = live.state if constraint is None else constraint.advance(live.state, token)
    return live._replace(state=state, last=token, drawn=drawn)


def _shrink(live: _Live, width: int) -> _Live:
    """The rows that have not ended, and as many of the others as fill the width."""
    if width == len(live.row):
        return live
    kept = jnp.argsort(live.drawn.stopped, stable=True)[:width]
    return jax.tree.map(lambda leaf: leaf[kept], live)


def _decoded(ids: Array, mask: Array, drawn: _Drawn) -> Decoded:
    response = jnp.arange(drawn.token.shape[1])[None, :] < drawn.length[:, None]
    return Decoded(
        ids=jnp.concatenate([ids.astype(jnp.int32), drawn.token], axis=1),
        mask=jnp.concatenate([mask, response], axis=1),
        log_density=drawn.log_density,
        length=drawn.length,
        stopped=drawn.stopped,
    )


# --- the trainer's side --------------------------------------------------------------------------


def score(
    model: LanguageModel,
    params: Params,
    ids: Array,
    mask: Array,
    length: int,
    sampling: Sampling,
    constraint: Constraint | None = None,
    chunk: int | None = None,
) -> tuple[Array, Array]:
    """Log-density and entropy `[B, T] f32`, in nats, of the response tokens; 0 beyond the end.

    ids, mask: `[B, P+T]`, as in `Decoded`. length: T.
    sampling, constraint: those of the rollout; the automaton runs again over the tokens drawn.
    chunk: tokens whose logits exist at a time, `[B, chunk, V]`, forward and backward; default: as
        many as have `LOGITS` of them on a device. Each chunk reads the table and, backwards, adds
        to its gradient, so few rows want long chunks.
    Differentiable in params. A token that newer parameters put outside of top-k or top-p is counted
    with those kept, so its density is finite (see `ops.sampling.adjust`).
    """
    prompt = ids.shape[1] - length
    if not 0 < prompt < ids.shape[1] or (chunk is not None and chunk < 1):
        raise UserError(
            f"length {length} of {ids.shape[1]} slots, in chunks of {chunk}: there must be a slot "
            "left for the prompt, and at least 1 token in a chunk"
        )
    # hidden state t-1 predicts token t
    hidden = model.hidden(params, ids, mask)[:, prompt - 1 : -1]
    start = None if constraint is None else constraint.start
    own = functools.partial(_score_rows, model, sampling, constraint, chunk)
    found = on_own_rows(own, model.rows, whole=1)(
        model.head(params), hidden, ids[:, prompt:], start
    )
    real = mask[:, prompt:]
    density, spread = (jnp.where(real, x, 0.0) for x in found)
    return density, spread


def _score_rows(
    model: LanguageModel,
    sampling: Sampling,
    constraint: Constraint | None,
    chunk: int | None,
    table: Array,
    hidden: Array,
    token: Array,
    state: PyTree,
) -> tuple[Array, Array]:
    """Log-density and entropy `[B, T]` of tokens `[B, T]` after hidden states `[B, T, D]`."""
    rows, length = token.shape
    chunk = min(length, chunk or max(1, LOGITS // (rows * len(table))))
    table = table.astype(jnp.float32)  # in which the gradients of the chunks add up

    def in_chunks(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, -length % chunk), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(rows, -1, chunk, *x.shape[2:]), 0, 2)

    @jax.checkpoint
    def one_chunk(state: PyTree, inputs: tuple[Array, Array]) -> tuple[PyTree, tuple[Array, Array]]:
        hidden, token = inputs
        logits = model.logits(table, hidden)
        if constraint is not None:
            state, logits = _constrain(constraint, state, token, logits)
        adjusted = ops.adjust(logits, sampling, token)
        return state, (ops.log_density(adjusted, token), ops.entropy(adjusted))

    _, outputs = jax.lax.scan(one_chunk, state, (in_chunks(hidden), in_chunks(token)))
    density, spread = (jnp.moveaxis(x.reshape(-1, rows)[:length], 0, 1) for x in outputs)
    return density, spread


def _constrain(
    constraint: Constraint, state: PyTree, token: Array, logits: Array
) -> tuple[PyTree, Array]:
    """Masks logits `[C, B, V]` of C steps along tokens `[C, B]`; the state after them as well."""

    def one_step(state: PyTree, token: Array) -> tuple[PyTree, PyTree]:
        return constraint.advance(state, token), state

    state, states = jax.lax.scan(one_step, state, token)
    return state, jax.vmap(constraint.mask)(states, logits)


def mismatch(decoded: Decoded, log_density: Array) -> Array:
    """Largest |rollout - trainer| log-density `[] f32`, in nats, over the response tokens.

    log_density: `[B, T]` of `score` with the parameters that decoded. In float32 it should stay
    below 1e-4, else rollout and trainer are not the same policy.
    """
    difference = jnp.abs(decoded.log_density - log_density)
    return jnp.where(decoded.response, difference, 0.0).max()
