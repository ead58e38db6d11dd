"""The `help_text` world: real English from Python's own help pages, and a score by rules.

The text is `pydoc_data.topics`, part of the standard library (the language reference, under the PSF
licence), so nothing is downloaded; each version of Python has its own edition. It is cut into
sentences: lower case, what stands in brackets left out, code as the word `<code>`, numbers as
`<number>`. A prompt is the first 4 to 8 words of a sentence, its demonstration the rest of it. One
prompt in ten, chosen by its first four words, is held out, so no prompt is in both splits.

The gold score rewards, by rules that can be checked, an ending with a full stop, different content
words, two content words of the prompt taken up, and a length near the target; repeats and unknown
words cost. It does not know grammar: what keeps the text English is staying near a model of it, and
`best` shows what the score alone would ask for.

Ids are ordered by kind, so the score needs no table: `<pad>`, `<stop>`, `<unk>`, `<code>`,
`<number>`, punctuation, function words, content words.

Dimensions: N or B rows, P = 8 prompt tokens (padded on the left), T response tokens.
"""

from __future__ import annotations

import functools
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.core.types import Array, UserError
from jaxalign.data.preferences import PAD, STOP, Pairs, PreferenceWorld, Prompts, Responses, label

UNKNOWN = 2
MARKS = ("<pad>", "<stop>", "<unk>", "<code>", "<number>", ".", ",", ";", ":")
FULL_STOP = MARKS.index(".")
FUNCTION_WORDS = """
    a about above after again all also although always am among an and another any are as at
    be because been before being below between both but by can cannot could did do does doing
    down during each either else even ever every few for from further had has have having he
    hence here how however i if in instead into is it its itself just like many may might more
    most much must neither never no nor not of off often on once one only or other otherwise
    our out over own rather same see should since so some still such than that the their them
    themselves then there therefore these they this those though through thus to too under
    unless until up upon us very was we were what when where whether which while who whose why
    will with within without would yet you your
    """
SHORTEST, LONGEST = 4, 8  # words of a prompt
SIZE = 1500  # words and marks of the vocabulary
# What the parts of the score are worth, so that real continuations score with a standard deviation
# of about 1.
VARIED, TAKEN_UP, ENDING, REPEAT, UNKNOWN_WORD, LENGTH = 2.0, 2.0, 2.0, 2.0, 2.0, 1.0
QUOTA = 5  # different content words that earn something
WINDOW = 8  # tokens within which a content word should not come again
TARGET = 14  # tokens, full stop and stop token included


class Text(NamedTuple):
    """The sentences as ids, and the vocabulary.

    words: the word of each id.
    content: id of the first content word; all above are content words too.
    sentences: one row of ids each, the full stop last.
    heldout: `[len(sentences)] bool`.
    successors: `[M] int32`, all pairs of neighbours in the training sentences: the second of each
        pair, sorted by the first, whose ranges start at `starts` (`[vocabulary + 1] int64`).
    """

    words: tuple[str, ...]
    content: int
    sentences: tuple[tuple[int, ...], ...]
    heldout: np.ndarray
    successors: np.ndarray
    starts: np.ndarray


def help_text(response: int = 32, temperature: float = 1.0) -> PreferenceWorld:
    """The world of Python's help pages. Prompts and texts are drawn on the host, not traced.

    response: T, at least 16; longer continuations are left out of the demonstrations.
    temperature: noise of the preference labels, in units of the score.
    Raises: UserError for a number out of range.
    """
    if response < 16:
        raise UserError(
            f"response {response}: the target is {TARGET} tokens, so give 16 or more to leave room"
        )
    if not temperature > 0:
        raise UserError(f"temperature {temperature}: it must be positive")
    text = read()
    return PreferenceWorld(
        name="help_text",
        vocabulary=len(text.words),
        prompt_length=LONGEST,
        response_length=response,
        pad=PAD,
        stop=STOP,
        prompts=partial(_draw_prompts, response, False),
        heldout=partial(_draw_prompts, response, True),
        demonstrations=partial(_demonstrations, response),
        pairs=partial(_pairs, response, temperature),
        gold=partial(gold, text.content),
        best=partial(best, response),
        ceiling=VARIED + TAKEN_UP + ENDING,
        words=partial(words, text.words),
    )


def words(names: Sequence[str], ids: Array | np.ndarray) -> str:
    """The text, a space between the words."""
    return " ".join(names[token] for token in np.asarray(ids).reshape(-1).tolist())


# ---------------------------------------------------------------- reading


@functools.cache
def read() -> Text:
    """The help pages as sentences, with the most frequent words as the vocabulary."""
    found = dict.fromkeys(_sentences())  # each once, in the order of the pages
    count = Counter(word for sentence in found for word in sentence)
    closed = frozenset(FUNCTION_WORDS.split())
    known = [word for word, _ in count.most_common() if word not in MARKS][: SIZE - len(MARKS)]
    function = sorted(word for word in known if word in closed)
    content = sorted(word for word in known if word not in closed)
    names = (*MARKS, *function, *content)
    number = {word: index for index, word in enumerate(names)}
    ids = tuple(tuple(number.get(word, UNKNOWN) for word in sentence) for sentence in found)
    first = [" ".join(sentence[:SHORTEST]) for sentence in found]
    heldout = np.array([zlib.crc32(start.encode()) % 10 == 0 for start in first])
    train = [sentence for sentence, out in zip(ids, heldout, strict=True) if not out]
    pairs = np.array([pair for row in train for pair in zip(row, (*row[1:], STOP), strict=True)])
    pairs = pairs[np.argsort(pairs[:, 0], kind="stable")].astype(np.int32)
    starts = np.searchsorted(pairs[:, 0], np.arange(len(names) + 1))
    return Text(names, len(MARKS) + len(function), ids, heldout, pairs[:, 1], starts)


def _sentences() -> list[tuple[str, ...]]:
    """Sentences of plain English with at least 3 words after the shortest prompt."""
    from pydoc_data import topics

    found = []
    for page in topics.topics.values():
        for block in re.split(r"\n\s*\n", page):
            plain = " ".join(block.split()).replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
            plain = re.sub(r'"[^"]*"', "<code>", plain).replace("*", "")
            plain = re.sub(r"\s*\([^()]*\)|\s*\[\d+\]", "", plain)
            plain = re.sub(r"\b\d+(\.\d+)*\b", "<number>", plain)
            found += [_split(sentence) for sentence in re.split(r"(?<=\.) (?=[A-Z<])", plain)]
    return [sentence for sentence in found if _is_plain(sentence)]


def _split(sentence: str) -> tuple[str, ...]:
    """Words and marks; anything else stays in one piece with its surroundings."""
    parts = re.sub(r"([.,;:])(?=\s|$)", r" \1 ", sentence.lower()).split()
    return tuple(parts)


def _is_plain(sentence: tuple[str, ...]) -> bool:
    word = re.compile(r"[a-z]+(['-][a-z]+)*|<code>|<number>|[.,;:]")
    return (
        len(sentence) >= SHORTEST + 4
        and sentence[-1] == "."
        and "." not in sentence[:-1]
        and sentence[0][0] != "<"
        and sum(part[0] == "<" for part in sentence) <= len(sentence) / 4
        and all(word.fullmatch(part) for part in sentence)
    )


@functools.cache
def _table(response: int, heldout: bool) -> Responses:
    """Every sentence of a split as a prompt and its continuation, `[N, P + T]`.

    A sentence has one prompt, of 4 to 8 words as its own words decide. Sentences without a content
    word in the prompt, and those that are too long, are left out.
    """
    text, rows = read(), []
    for sentence, out in zip(text.sentences, text.heldout, strict=True):
        length = SHORTEST + zlib.crc32(np.array(sentence).tobytes()) % (LONGEST - SHORTEST + 1)
        length = min(length, len(sentence) - 4)
        speaks = max(sentence[:length]) >= text.content
        if out == heldout and speaks and len(sentence) - length < response:
            rows.append((sentence[:length], (*sentence[length:], STOP)))
    ids = np.full((len(rows), LONGEST + response), PAD, np.int32)
    mask = np.zeros(ids.shape, bool)
    for row, (prompt, rest) in enumerate(rows):
        span = slice(LONGEST - len(prompt), LONGEST + len(rest))
        ids[row, span], mask[row, span] = (*prompt, *rest), True
    return Responses(ids, mask)


def _draw(response: int, heldout: bool, key: Array, n: int) -> Responses:
    table = _table(response, heldout)
    rows = np.asarray(jax.random.randint(key, (n,), 0, len(table.ids)))
    return Responses(table.ids[rows], table.mask[rows])


def _draw_prompts(response: int, heldout: bool, key: Array, n: int) -> Prompts:
    ids, mask = _draw(response, heldout, key, n)
    return Prompts(ids[:, :LONGEST], mask[:, :LONGEST])


def _demonstrations(response: int, key: Array, n: int) -> Responses:
    return _draw(response, False, key, n)


# ---------------------------------------------------------------- the score


@partial(jax.jit, static_argnums=0)
def gold(content: int, ids: Array, mask: Array) -> Array:
    """The score by rules, `[B] f32`.

    content: id of the first content word.
    ids, mask: `[B, P + T]`, as in `Responses`.
    """
    prompt, asked = ids[:, :LONGEST], mask[:, :LONGEST] & (ids[:, :LONGEST] >= content)
    response, real = ids[:, LONGEST:], mask[:, LONGEST:]
    word = real & (response >= content)
    same = (response[:, :, None] == response[:, None]) & real[:, :, None] & real[:, None]
    place = jnp.arange(response.shape[1])
    gap = (place[:, None] - place[None])[None]
    again = jnp.any(same & (gap > 0) & (gap <= WINDOW), axis=-1) & word
    again |= jnp.any(same & (gap == 1), axis=-1)
    different = word & ~jnp.any(same & (gap > 0), axis=-1)
    said = jnp.any((prompt[:, :, None] == response[:, None]) & word[:, None], axis=-1) & asked
    wanted = jnp.clip(jnp.sum(asked, axis=-1), 1, 2)
    length = jnp.sum(real, axis=-1)
    return (
        VARIED * jnp.minimum(jnp.sum(different, axis=-1), QUOTA) / QUOTA
        + TAKEN_UP * jnp.minimum(jnp.sum(said, axis=-1), wanted) / wanted
        + ENDING * _ends_well(response, real)
        - REPEAT * jnp.sum(again, axis=-1) / QUOTA
        - UNKNOWN_WORD * jnp.sum(real & (response == UNKNOWN), axis=-1) / QUOTA
        - LENGTH * jnp.abs(length - TARGET) / TARGET
    ).astype(jnp.float32)


def _ends_well(response: Array, real: Array) -> Array:
    """Whether a full stop, the only one, stands right before the stop token, `[B] bool`."""
    stop, full = real & (response == STOP), real & (response == FULL_STOP)
    return (jnp.sum(full, axis=-1) == 1) & jnp.any(full[:, :-1] & stop[:, 1:], axis=-1)


def best(response: int, prompts: Prompts) -> Responses:
    """Word lists that reach the ceiling: what the score asks for when nothing keeps it English.

    Two content words of the prompt come first, then others in the order of the vocabulary.
    """
    text = read()
    ids, asked = np.asarray(prompts.ids), np.asarray(prompts.mask)
    rest = np.full((len(ids), response), PAD, np.int32)
    for row, prompt, real in zip(rest, ids, asked, strict=True):
        taken = list(dict.fromkeys(token for token in prompt[real] if token >= text.content))[:2]
        others = [n for n in range(text.content, len(text.words)) if n not in taken]
        row[: TARGET - 2] = (taken + others)[: TARGET - 2]
    rest[:, TARGET - 2], rest[:, TARGET - 1] = FULL_STOP, STOP
    real = np.broadcast_to(np.arange(response) < TARGET, rest.shape)
    return Responses(np.concatenate([ids, rest], axis=-1), np.concatenate([asked, real], axis=-1))


# ---------------------------------------------------------------- a noisy writer


def respond(response: int, key: Array, prompts: Prompts) -> Responses:
    """Responses of a chain of neighbouring words, as the training sentences have them.

    Each row has habits of its own: it takes up a word of the prompt now and then, or says any word.
    """
    text, ids = read(), np.asarray(prompts.ids)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).tolist())
    n = len(ids)
    copies, slips = rng.uniform(0, 0.2, n), rng.uniform(0, 0.15, n)
    size = np.asarray(prompts.mask).sum(-1)
    last, live = ids[:, -1], np.ones(n, bool)
    said = np.full((n, response), PAD, np.int32)
    real = np.zeros((n, response), bool)
    for place in range(response):
        count = text.starts[last + 1] - text.starts[last]
        pick = text.starts[last] + np.floor(rng.uniform(size=n) * count).astype(int)
        pick = np.minimum(pick, len(text.successors) - 1)
        token = np.where(count > 0, text.successors[pick], STOP)
        copied = ids[np.arange(n), LONGEST - 1 - np.floor(rng.uniform(size=n) * size).astype(int)]
        which = rng.uniform(size=n)
        free = last != FULL_STOP  # after a full stop comes the stop token
        token = np.where(free & (which < copies), copied, token)
        anything = rng.integers(len(MARKS), len(text.words), n)
        token = np.where(free & (which > 1 - slips), anything, token)
        said[:, place], real[:, place] = np.where(live, token, PAD), live
        live &= token != STOP
        last = token
    return Responses(
        np.concatenate([ids, said], axis=-1),
        np.concatenate([np.asarray(prompts.mask), real], axis=-1),
    )


def _pairs(response: int, temperature: float, key: Array, n: int) -> Pairs:
    draw, one, two, choose = jax.random.split(key, 4)
    prompts = _draw_prompts(response, False, draw, n)
    first, second = respond(response, one, prompts), respond(response, two, prompts)
    content = read().content
    return label(choose, first, second, gold(content, *first) - gold(content, *second), temperature)


# ---------------------------------------------------------------- Hugging Face


def write_tokenizer(folder: str | Path) -> None:
    """The vocabulary as a tokenizer folder, which `AutoTokenizer.from_pretrained` reads.

    It splits at white space, so it reads what `words` writes.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {word: index for index, word in enumerate(read().words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=MARKS[UNKNOWN]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=MARKS[UNKNOWN],
        pad_token=MARKS[PAD],
        eos_token=MARKS[STOP],
    )
    fast.save_pretrained(str(folder))
