"""What a preference world offers to training a language model, and a synthetic one, exactly known.

A world has prompts, a noisy writer (for supervised fine-tuning and for the pairs that a reward
model learns from), and the gold score, which labels the pairs and judges the result, but which a
method that learns from preferences does not see. Labels follow Bradley and Terry (1952): the first
response is chosen with probability sigmoid((gold(first) - gold(second)) / temperature).

The synthetic world stands on a ring of C content tokens. A response scores well, by `gold`, if

- each token lies 1 to `reach` places further along the ring than the one before (local);
- it says every token of the prompt `laps` times (a set; 0 to 1 for each token of the prompt);
- its last token before the stop is the first of the prompt (terminal, and far from its cause);
- it is `target` content tokens long: each token costs, and steps beyond the quota earn nothing.

So the best responses run around the ring, as `best` does, take up the prompt's tokens on the way
and stop at the first one. The parts are shares, so the score means the same for every length limit.

Dimensions: N or B rows, P prompt tokens (padded on the left), T response tokens, C content tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.core.types import Array, UserError

PAD, STOP = 0, 1
FIRST = 2  # id of the first content token
# What the parts of the synthetic score are worth, so that the noisy writer's scores have a standard
# deviation of about 1.
LOCAL, REPEAT, COVER, LAST, LENGTH = 3.0, 3.0, 2.0, 1.5, 1.0
SHARE = 0.6  # of the length limit: the best length, stop included
HELDOUT = 5  # prompts whose second token lies a multiple of this after the first are held out


class Prompts(NamedTuple):
    """Prompts, padded on the left.

    ids: `[N, P] int32`.
    mask: `[N, P] bool`, False is padding.
    """

    ids: Array | np.ndarray
    mask: Array | np.ndarray


class Responses(NamedTuple):
    """Prompts with their responses, as a language model or a reward model reads them.

    ids: `[N, P + T] int32`, the prompt in the last real places of the first P, then the response.
    mask: `[N, P + T] bool`, False is padding; the stop token is real.
    """

    ids: Array | np.ndarray
    mask: Array | np.ndarray


class Pairs(NamedTuple):
    """Two responses to each of N prompts, the preferred one and the other.

    chosen, rejected: `Responses` with the same prompts in the same rows.
    """

    chosen: Responses
    rejected: Responses


class PreferenceWorld(NamedTuple):
    """A preference problem, whole.

    name: short name, as in file names.
    vocabulary: number of ids.
    prompt_length, response_length: P and T.
    pad, stop: ids; padding is known by the mask alone, and a stop token ends a response.
    prompts, heldout: `(key, n) -> Prompts`, for training and for evaluation only.
    demonstrations: `(key, n) -> Responses`, what supervised fine-tuning learns from.
    pairs: `(key, n) -> Pairs`, labelled by the gold score with noise.
    gold: `(ids [B, P + T], mask [B, P + T]) -> [B] f32`, the true score; traceable.
    best: `Prompts -> Responses`, responses about as good as can be.
    ceiling: no response scores higher.
    words: `ids [L] -> str`, the tokens as words with spaces between them, one word a token.
    """

    name: str
    vocabulary: int
    prompt_length: int
    response_length: int
    pad: int
    stop: int
    prompts: Callable[[Array, int], Prompts]
    heldout: Callable[[Array, int], Prompts]
    demonstrations: Callable[[Array, int], Responses]
    pairs: Callable[[Array, int], Pairs]
    gold: Callable[[Array, Array], Array]
    best: Callable[[Prompts], Responses]
    ceiling: float
    words: Callable[[Array | np.ndarray], str]


def label(
    key: Array, first: Responses, second: Responses, difference: Array, temperature: float
) -> Pairs:
    """Pairs with the preferred response drawn by Bradley and Terry's rule.

    key: PRNG key.
    first, second: responses to the same prompts, row by row.
    difference: `[N] f32`, gold(first) - gold(second).
    temperature: noise, in the units of the score, positive; towards 0 the better one always wins.
    """
    chance = jax.nn.sigmoid(difference / temperature)
    wins = (jax.random.uniform(key, chance.shape) < chance)[:, None]
    chosen = [jnp.where(wins, a, b) for a, b in zip(first, second, strict=True)]
    rejected = [jnp.where(wins, b, a) for a, b in zip(first, second, strict=True)]
    return Pairs(Responses(*chosen), Responses(*rejected))


# ---------------------------------------------------------------- the synthetic world


class Rule(NamedTuple):
    """The numbers of a synthetic world; all static.

    content: C.
    prompt, response: P and T.
    reach: a step of 1..reach along the ring is good.
    target: content tokens of the best response; one step less is the quota of good steps.
    laps: how often each token of the prompt should be said.
    """

    content: int
    prompt: int
    response: int
    reach: int
    target: int
    laps: int


def synthetic(
    vocabulary: int = 32, prompt: int = 8, response: int = 16, temperature: float = 1.0
) -> PreferenceWorld:
    """The synthetic world.

    vocabulary: number of ids, padding and stop included, at least prompt + 8.
    prompt: P; prompts have 3 to P tokens, all different.
    response: T, at least 8; the best responses take about 60 % of it.
    temperature: noise of the preference labels, in units of the score.
    Raises: UserError for a number out of range.
    """
    if prompt < 3:
        raise UserError(f"prompt {prompt}: prompts have at least 3 tokens, so give 3 or more")
    if vocabulary < prompt + 8:
        raise UserError(
            f"vocabulary {vocabulary}: a world with prompts of {prompt} different tokens needs at "
            f"least {prompt + 8} ids"
        )
    if response < 8:
        raise UserError(f"response {response}: the best responses do not fit, so give 8 or more")
    if not temperature > 0:
        raise UserError(f"temperature {temperature}: it must be positive")
    content, target = vocabulary - FIRST, round(SHARE * response) - 1
    laps = max(1, target // (prompt + 1))
    rule = Rule(content, prompt, response, max(1, content // 6), target, laps)
    return PreferenceWorld(
        name=f"synthetic{response}",
        vocabulary=vocabulary,
        prompt_length=prompt,
        response_length=response,
        pad=PAD,
        stop=STOP,
        prompts=partial(draw_prompts, rule, False),
        heldout=partial(draw_prompts, rule, True),
        demonstrations=partial(_demonstrations, rule),
        pairs=partial(_pairs, rule, temperature),
        gold=partial(gold, rule),
        best=partial(best, rule),
        ceiling=LOCAL + COVER + LAST - LENGTH,
        words=words,
    )


def words(ids: Array | np.ndarray) -> str:
    """The tokens by their places on the ring: "<pad> <stop> 0 1 2 ..."."""
    names = {PAD: "<pad>", STOP: "<stop>"}
    flat = np.asarray(ids).reshape(-1).tolist()
    return " ".join(names.get(token, str(token - FIRST)) for token in flat)


@partial(jax.jit, static_argnums=0)
def gold(rule: Rule, ids: Array, mask: Array) -> Array:
    """The true score, `[B] f32`.

    ids, mask: `[B, P + T]`, as in `Responses`; T may differ from the rule's. A response without a
        stop token (a truncated one) goes without the terminal part.
    """
    prompt, asked = ids[:, : rule.prompt], mask[:, : rule.prompt]
    response, real = ids[:, rule.prompt :], mask[:, rule.prompt :]
    word = real & (response >= FIRST)
    both = word[:, 1:] & word[:, :-1]
    step = (response[:, 1:] - response[:, :-1]) % rule.content
    quota = rule.target - 1
    good = jnp.sum(both & (step >= 1) & (step <= rule.reach), axis=-1)
    repeats = jnp.sum(both & (step == 0), axis=-1)
    said = jnp.sum((response[:, None] == prompt[:, :, None]) & word[:, None], axis=-1)
    covered = jnp.sum(jnp.where(asked, jnp.minimum(said, rule.laps), 0), axis=-1)
    needed = rule.laps * jnp.maximum(jnp.sum(asked, axis=-1), 1)
    return (
        LOCAL * jnp.minimum(good, quota) / quota
        - REPEAT * repeats / quota
        + COVER * covered / needed
        + LAST * _ends_well(prompt, asked, response, real)
        - LENGTH * jnp.sum(real, axis=-1) / (rule.target + 1)
    ).astype(jnp.float32)


def _ends_well(prompt: Array, asked: Array, response: Array, real: Array) -> Array:
    """Whether the token before the stop is the first of the prompt, `[B] bool`."""
    stops = real & (response == STOP)
    before = jnp.argmax(stops, axis=-1) - 1
    last = jnp.take_along_axis(response, jnp.maximum(before, 0)[:, None], axis=-1)[:, 0]
    first = _first(prompt, asked)
    return jnp.any(stops, axis=-1) & (before >= 0) & (last == first) & jnp.any(asked, axis=-1)


def _first(prompt: Array, asked: Array) -> Array:
    """The first real token of each prompt, `[N] i32`."""
    return jnp.take_along_axis(prompt, jnp.argmax(asked, axis=-1)[:, None], axis=-1)[:, 0]


@partial(jax.jit, static_argnums=(0, 1, 3))
def draw_prompts(rule: Rule, heldout: bool, key: Array, n: int) -> Prompts:
    """n prompts of 3 to P different tokens; no prompt can be drawn from both splits.

    The split is by how far the second token lies after the first (see HELDOUT).
    """
    draw = jax.random.uniform(key, (n, rule.content + 3))
    first, order = _upto(rule.content, draw[:, 0]), draw[:, 3:]
    far = (rule.content - 1) // HELDOUT  # distances that are held out
    if heldout:
        distance = HELDOUT * (1 + _upto(far, draw[:, 1]))
    else:
        index = _upto(rule.content - 1 - far, draw[:, 1])
        distance = index + 1 + index // (HELDOUT - 1)
    second = (first + distance) % rule.content
    rows = jnp.arange(n)
    order = order.at[rows, first].set(-2.0).at[rows, second].set(-1.0)
    tokens = jnp.argsort(order, axis=-1)[:, : rule.prompt] + FIRST
    length = 3 + _upto(rule.prompt - 2, draw[:, 2:3])
    place = jnp.arange(rule.prompt)[None] - (rule.prompt - length)
    mask = place >= 0
    ids = jnp.take_along_axis(tokens, jnp.maximum(place, 0), axis=-1)
    return Prompts(jnp.where(mask, ids, PAD).astype(jnp.int32), mask)


def _upto(bound: int | Array, draw: Array) -> Array:
    """0 .. bound-1 as i32, from draws in [0, 1)."""
    return jnp.floor(draw * bound).astype(jnp.int32)


class _Habits(NamedTuple):
    """What a noisy writer does, row by row: each `[N] f32`.

    good, copied, repeated: chances of a good step, of a token of the prompt, of a repeat; the rest
        of the time it says any token.
    """

    good: Array
    copied: Array
    repeated: Array


@partial(jax.jit, static_argnums=0)
def respond(rule: Rule, key: Array, prompts: Prompts) -> Responses:
    """Responses of the noisy writer, who half knows what is good.

    Its habits differ from response to response, so that long responses differ in quality too.
    """
    ids, asked = jnp.asarray(prompts.ids), jnp.asarray(prompts.mask)
    first = _first(ids, asked) - FIRST
    draw = jax.random.uniform(key, (7 + 3 * rule.response, len(ids)))
    habits = _Habits(0.6 * draw[0], 0.4 * draw[1], 0.15 * draw[2])
    write = partial(_write, rule, habits, ids - FIRST, jnp.sum(asked, axis=-1))
    steps = draw[7:].reshape(rule.response, 3, -1)
    tokens = jax.lax.scan(write, _upto(rule.content, draw[3]), steps)[1].T
    share = 0.02 + (draw[4] + draw[5]) / 2  # of the limit; the longest are truncated
    length = jnp.clip(jnp.round(rule.response * share)[:, None], 2, rule.response)
    place = jnp.arange(rule.response)[None]
    knows = (draw[6] < 0.3)[:, None] & (place == length - 1)
    tokens = jnp.where(knows, first[:, None], tokens) + FIRST
    tokens = jnp.where(place == length, STOP, jnp.where(place < length, tokens, PAD))
    return _join(prompts, tokens, place <= length)


def _write(
    rule: Rule, habits: _Habits, prompt: Array, size: Array, last: Array, draw: Array
) -> tuple[Array, Array]:
    """One token more of every response, `[N]`, as ring places; `draw` is `[3, N]` in [0, 1)."""
    which, how, anything = draw
    onward = (last + 1 + _upto(rule.reach, how)) % rule.content
    pick = prompt.shape[1] - 1 - _upto(size, how)
    copied = jnp.take_along_axis(prompt, pick[:, None], axis=-1)[:, 0]
    token = _upto(rule.content, anything)
    edge = habits.good
    chosen = jnp.where(which < edge, onward, token)
    chosen = jnp.where((which >= edge) & (which < edge + habits.copied), copied, chosen)
    chosen = jnp.where(which >= 1 - habits.repeated, last, chosen)
    return chosen, chosen


def _join(prompts: Prompts, tokens: Array, real: Array) -> Responses:
    ids = jnp.concatenate([prompts.ids, tokens.astype(jnp.int32)], axis=-1)
    return Responses(ids, jnp.concatenate([prompts.mask, real], axis=-1))


def _demonstrations(rule: Rule, key: Array, n: int) -> Responses:
    draw, write = jax.random.split(key)
    return respond(rule, write, draw_prompts(rule, False, draw, n))


def _pairs(rule: Rule, temperature: float, key: Array, n: int) -> Pairs:
    draw, one, two, choose = jax.random.split(key, 4)
    prompts = draw_prompts(rule, False, draw, n)
    first, second = respond(rule, one, prompts), respond(rule, two, prompts)
    return label(choose, first, second, gold(rule, *first) - gold(rule, *second), temperature)


@partial(jax.jit, static_argnums=0)
def best(rule: Rule, prompts: Prompts) -> Responses:
    """A response to each prompt that gets all parts of the score, as far as there is room.

    It runs around the ring by good steps, takes up all tokens of the prompt on the way, as often as
    they are asked, and stops at the first one. Where that takes more tokens than the target, it is
    longer; so it is close to the best there is, and `ceiling` bounds it from above.
    """
    ids, asked = jnp.asarray(prompts.ids), jnp.asarray(prompts.mask)
    rows = jnp.arange(len(ids))[:, None]
    first = _first(ids, asked)[:, None]
    place = jnp.where(asked, (ids - first) % rule.content, 0)  # the first token is asked anyway
    wanted = jnp.zeros((len(ids), rule.content), bool).at[rows, place].set(True)
    ring = jnp.arange(rule.content)
    back = jnp.arange(1, rule.reach + 1)
    # From each place, the way back to the nearest wanted place, or as far as a good step reaches.
    near = wanted[:, (ring[:, None] - back[None]) % rule.content]
    stride = jnp.where(jnp.any(near, axis=-1), jnp.argmax(near, axis=-1) + 1, rule.reach)

    def walk(gone: Array, _: None) -> tuple[Array, Array]:
        here = (-gone) % rule.content
        return gone + jnp.take_along_axis(stride, here[:, None], axis=-1)[:, 0], gone

    gone = jax.lax.scan(walk, jnp.zeros_like(rows[:, 0]), None, length=rule.response - 1)[1].T
    needed = rule.laps * rule.content - (jnp.argmax(wanted[:, 1:], axis=-1) + 1)
    length = jnp.maximum(jnp.sum(gone < needed[:, None], axis=-1) + 1, rule.target)
    length = jnp.minimum(length, rule.response - 1)[:, None]
    place = jnp.arange(rule.response)[None]
    index = jnp.clip(length - 1 - place, 0, rule.response - 2)
    tokens = (first - FIRST - jnp.take_along_axis(gone, index, axis=-1)) % rule.content + FIRST
    tokens = jnp.where(place == length, STOP, jnp.where(place < length, tokens, PAD))
    return _join(prompts, tokens, place <= length)
