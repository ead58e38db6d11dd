"""Nectar, TL;DR and SafeRLHF: preference pairs from a local folder, as tokens.

The folder is a copy of the data set's repository on the Hugging Face Hub (parquet or JSON lines,
with or without a card); nothing is downloaded here. Columns that are read:

- nectar (berkeley-nest/Nectar): prompt, and answers, a list of {answer, rank}, rank 1 the best. A
  row with K answers gives a pair for each two answers of different rank, 21 for K = 7.
- tldr (CarperAI/openai_summarize_comparisons): prompt, chosen, rejected. For demonstrations
  (CarperAI/openai_summarize_tldr): prompt, label.
- saferlhf and saferlhf_safety (PKU-Alignment/PKU-SafeRLHF): prompt, response_0, response_1, and
  better_response_id (for the more helpful response) or safer_response_id.

Text. A dialogue is "\\n\\nHuman: ...\\n\\nAssistant:", as Nectar writes it; a post ends with
"\\nTL;DR:", which the comparisons write before the response instead. White space between prompt and
response becomes one space, the first character of the response, as byte-level tokenizers like it.

Rows whose prompt or response has too many tokens are left out rather than cut: a response without
its end would be judged for another text. `warnings` says how many.

Departures: the release of SafeRLHF has a dialogue template of its own; here all have Nectar's.

Dimensions: N pairs, P prompt tokens (padded on the left), T response tokens.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxalign.core.types import UserError
from jaxalign.data.preferences import Pairs, Responses

Row = Mapping[str, Any]
Tokens = list[int]


class Choice(NamedTuple):
    """One prompt, its responses, and which is preferred to which.

    prompt: text.
    responses: texts.
    order: pairs (better, worse) of places in `responses`; empty when all are equal.
    """

    prompt: str
    responses: tuple[str, ...]
    order: tuple[tuple[int, int], ...]


class _Source(NamedTuple):
    """A data set: its name on the Hub, the columns that are read, and how a row is read."""

    repository: str
    columns: tuple[str, ...]
    read: Callable[[Row], Choice]


def load(
    name: Literal["nectar", "tldr", "saferlhf", "saferlhf_safety"],
    path: str | Path,
    tokenizer: Any,
    prompt_length: int,
    response_length: int,
    split: str = "train",
    limit: int | None = None,
) -> Pairs:
    """The preference pairs of a split, in its order.

    name: the data set; saferlhf prefers the more helpful response, saferlhf_safety the safer one.
    path: a local folder in the layout of the Hub.
    tokenizer: a tokenizer of transformers; its end-of-sequence token ends every response.
    prompt_length, response_length: P and T in tokens, the end token included.
    split: "train" or "test", as far as the data set has it.
    limit: at most so many pairs; None is all.
    Raises: UserError if the data set, its columns, or the tokenizer are not as described, if P + T
        exceeds what the tokenizer's model reads, or if no pair is left.
    """
    if name not in _PAIRS:
        raise UserError(f"data set {name!r} is unknown: use one of {', '.join(_PAIRS)}")
    layout = _layout(tokenizer, prompt_length, response_length)
    columns = _collect(_PAIRS[name], Path(path), split, layout, limit)
    prompts, chosen, rejected = columns
    return Pairs(_pad(layout, prompts, chosen), _pad(layout, prompts, rejected))


def load_demonstrations(
    name: Literal["nectar", "tldr"],
    path: str | Path,
    tokenizer: Any,
    prompt_length: int,
    response_length: int,
    split: str = "train",
    limit: int | None = None,
) -> Responses:
    """Prompts with good responses, for supervised fine-tuning; arguments and errors as in `load`.

    nectar gives the answers ranked first; tldr reads CarperAI/openai_summarize_tldr.
    """
    if name not in _DEMONSTRATIONS:
        raise UserError(
            f"data set {name!r} has no demonstrations: use one of {', '.join(_DEMONSTRATIONS)}"
        )
    layout = _layout(tokenizer, prompt_length, response_length)
    prompts, good, _ = _collect(_DEMONSTRATIONS[name], Path(path), split, layout, limit)
    return _pad(layout, prompts, good)


# ---------------------------------------------------------------- what a row says


def _nectar(row: Row) -> Choice:
    answers = row["answers"]
    wrong = [answer for answer in answers if not {"answer", "rank"} <= answer.keys()]
    if wrong:
        raise UserError(
            f"an answer of Nectar has the fields {', '.join(wrong[0])}: it needs answer and rank"
        )
    answers = [a for a in answers if a["answer"] is not None and a["rank"] is not None]
    answers = sorted(answers, key=lambda answer: answer["rank"])
    ranked = enumerate(answer["rank"] for answer in answers)
    pairs = itertools.combinations(ranked, 2)
    order = tuple((a, b) for (a, high), (b, low) in pairs if high < low)
    prompt = row["prompt"].strip()
    return Choice(f"\n\n{prompt}", tuple(answer["answer"] for answer in answers), order)


def _best_of_nectar(row: Row) -> Choice:
    choice = _nectar(row)
    return choice._replace(responses=choice.responses[:1], order=((0, 0),)[: len(choice.order)])


def _comparison(row: Row) -> Choice:
    prompt = row["prompt"].strip().removesuffix("TL;DR:").rstrip()
    texts = (row[name].strip().removeprefix("TL;DR:") for name in ("chosen", "rejected"))
    return Choice(f"{prompt}\nTL;DR:", tuple(texts), ((0, 1),))


def _summary(row: Row) -> Choice:
    prompt = row["prompt"].strip().removesuffix("TL;DR:").rstrip()
    return Choice(f"{prompt}\nTL;DR:", (row["label"],), ((0, 0),))


def _helpful(row: Row) -> Choice:
    return _two(row, row["better_response_id"])


def _safe(row: Row) -> Choice:
    return _two(row, row["safer_response_id"])


def _two(row: Row, preferred: int) -> Choice:
    prompt = f"\n\nHuman: {row['prompt'].strip()}\n\nAssistant:"
    order = {0: ((0, 1),), 1: ((1, 0),)}.get(preferred, ())
    return Choice(prompt, (row["response_0"], row["response_1"]), order)


_NECTAR = ("prompt", "answers")
_SAFER = ("prompt", "response_0", "response_1")
_SAFER_REPOSITORY = "PKU-Alignment/PKU-SafeRLHF"
_PAIRS = {
    "nectar": _Source("berkeley-nest/Nectar", _NECTAR, _nectar),
    "tldr": _Source(
        "CarperAI/openai_summarize_comparisons", ("prompt", "chosen", "rejected"), _comparison
    ),
    "saferlhf": _Source(_SAFER_REPOSITORY, (*_SAFER, "better_response_id"), _helpful),
    "saferlhf_safety": _Source(_SAFER_REPOSITORY, (*_SAFER, "safer_response_id"), _safe),
}
# The preferred response of a demonstration is the only one, so its pairs are of itself.
_DEMONSTRATIONS = {
    "nectar": _Source("berkeley-nest/Nectar", _NECTAR, _best_of_nectar),
    "tldr": _Source("CarperAI/openai_summarize_tldr", ("prompt", "label"), _summary),
}


# ---------------------------------------------------------------- reading the folder


def _rows(source: _Source, path: Path, split: str) -> Iterator[Row]:
    """The rows of a split, with the columns that the source needs."""
    if not path.is_dir():
        raise UserError(
            f"data set folder {path} does not exist: get it with 'hf download {source.repository} "
            f"--repo-type dataset --local-dir {path}'"
        )
    try:
        from datasets import exceptions, load_dataset
    except ModuleNotFoundError:
        raise UserError(
            f"data set folder {path} is read by the package datasets, which is not installed: "
            "pip install 'jaxalign[hub]'"
        ) from None
    errors = (OSError, ValueError, exceptions.DatasetsError)
    try:
        # Streaming reads the files where they are; without it they are copied to a cache first.
        rows = load_dataset(str(path), split=split, streaming=True)
        for number, row in enumerate(rows):
            _check_columns(source, path, row, number)
            yield row
    except errors as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"split {split!r} of the data set folder {path} cannot be read ({reason}): get a copy "
            f"of {source.repository}, and a split that it has"
        ) from None


def _check_columns(source: _Source, path: Path, row: Row, number: int) -> None:
    missing = [name for name in source.columns if name not in row]
    if missing:
        raise UserError(
            f"data set folder {path}, row {number}: no {', '.join(missing)} among {', '.join(row)};"
            f" give a copy of {source.repository}, whose columns are {', '.join(source.columns)}"
        )


# ---------------------------------------------------------------- tokens


class _Layout(NamedTuple):
    """Where tokens go: P, T, the id that ends a response, and the id under the padding."""

    tokenizer: Any
    prompt: int
    response: int
    stop: int
    pad: int


def _layout(tokenizer: Any, prompt_length: int, response_length: int) -> _Layout:
    if prompt_length < 1 or response_length < 1:
        raise UserError(
            f"prompt of {prompt_length} and response of {response_length} tokens: give 1 or more"
        )
    context, stop = tokenizer.model_max_length, tokenizer.eos_token_id
    if prompt_length + response_length > context:
        raise UserError(
            f"prompt of {prompt_length} and response of {response_length} tokens: the tokenizer's "
            f"model reads {context} in all, so give less"
        )
    if stop is None:
        raise UserError(
            f"tokenizer {tokenizer.name_or_path!r} has no end-of-sequence token, so no response "
            "would end: set tokenizer.eos_token"
        )
    pad = stop if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return _Layout(tokenizer, prompt_length, response_length, stop, pad)


def _collect(
    source: _Source, path: Path, split: str, layout: _Layout, limit: int | None
) -> tuple[list[Tokens], list[Tokens], list[Tokens]]:
    """Prompts, preferred and other responses of all pairs that fit, in the order of the rows."""
    if limit is not None and limit < 1:
        raise UserError(f"limit {limit}: give 1 or more pairs, or None for all")
    found: list[tuple[Tokens, Tokens, Tokens]] = []
    pairs = equal = 0
    for row in _rows(source, path, split):
        whole = all(row[name] is not None for name in source.columns)
        choice = source.read(row) if whole else Choice("", (), ())
        equal += not choice.order
        pairs += len(choice.order)
        found += _encode(layout, choice)
        if limit is not None and len(found) >= limit:
            found, pairs = found[:limit], pairs - (len(found) - limit)
            break
    _report(path, split, layout, pairs, equal, len(found))
    prompts, better, worse = zip(*found, strict=True)
    return list(prompts), list(better), list(worse)


def _report(path: Path, split: str, layout: _Layout, pairs: int, equal: int, kept: int) -> None:
    """Says what was left out. Raises: UserError if nothing is left."""
    long = pairs - kept
    reason = (
        f"{long} of {pairs} pairs have a prompt of more than {layout.prompt} or a response of more "
        f"than {layout.response} tokens, {equal} rows prefer nothing"
    )
    if not kept:
        raise UserError(
            f"split {split!r} of {path} leaves no pair ({reason}): give longer lengths or a "
            "split with preferences"
        )
    if long or equal:
        warnings.warn(f"left out from split {split!r} of {path}: {reason}", stacklevel=4)


def _encode(layout: _Layout, choice: Choice) -> Iterator[tuple[Tokens, Tokens, Tokens]]:
    """The pairs of a row that fit, as tokens."""
    if not choice.order:
        return
    prompt = layout.tokenizer(choice.prompt)["input_ids"]
    if prompt and prompt[-1] == layout.stop:
        prompt = prompt[:-1]  # some tokenizers end every text
    texts = [f" {text.strip()}" for text in choice.responses]
    plain = layout.tokenizer(texts, add_special_tokens=False)["input_ids"]
    responses = [[*ids, layout.stop] for ids in plain]
    for better, worse in choice.order:
        longest = max(len(responses[better]), len(responses[worse]))
        if 1 <= len(prompt) <= layout.prompt and longest <= layout.response:
            yield prompt, responses[better], responses[worse]


def _pad(layout: _Layout, prompts: list[Tokens], responses: list[Tokens]) -> Responses:
    ids = np.full((len(prompts), layout.prompt + layout.response), layout.pad, np.int32)
    mask = np.zeros(ids.shape, bool)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        span = slice(layout.prompt - len(prompt), layout.prompt + len(response))
        ids[row, span], mask[row, span] = [*prompt, *response], True
    return Responses(ids, mask)
