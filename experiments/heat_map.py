"""Rewards of single tokens as coloured words: which are shown, their colours, and the HTML.

Blue words raised the reward model's score, orange ones lowered it; white is no change. One scale
serves all that a report shows, the same on both sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments import pages
from experiments.comparison import Comparison, Response

START = "start"  # the policy that all arms start from
MOST_PROMPTS = 4
MOST_WORDS = 60  # of a prompt, its end; of a response in the picture, its beginning
COVERED = 0.98  # of the rewards lie within the scale; beyond it the colour is the last

_LOW, _MIDDLE, _HIGH = (0xB3, 0x58, 0x06), (0xFF, 0xFF, 0xFF), (0x21, 0x66, 0xAC)
_MARKS = {"\n": "↵", "\t": "⇥", "\r": ""}


class Block(NamedTuple):
    """A prompt, and who answered what, in the order of `START` and the arms."""

    prompt: tuple[str, ...]
    answers: tuple[tuple[str, Response], ...]


def blocks(run: Comparison) -> list[Block]:
    """The first prompts that responses were kept for, of the first seed that has some."""
    for seed in run.seeds:
        arms = {arm: run.runs[arm, seed] for arm in run.arms if (arm, seed) in run.runs}
        before = next((r.responses_before for r in arms.values() if r.responses_before), ())
        lists = {START: before, **{arm: each.responses_after for arm, each in arms.items()}}
        lists = {who: responses for who, responses in lists.items() if responses}
        if lists:
            return _by_prompt(lists)
    return []


def _by_prompt(lists: dict[str, tuple[Response, ...]]) -> list[Block]:
    count = min(MOST_PROMPTS, *map(len, lists.values()))
    return [
        Block(
            next(iter(lists.values()))[i].prompt,
            tuple((who, responses[i]) for who, responses in lists.items()),
        )
        for i in range(count)
    ]


def limit(shown: Sequence[Block]) -> float:
    """The size of reward at either end of the scale; 1 where there is no reward at all."""
    rewards = [abs(r) for block in shown for _, answer in block.answers for r in answer.reward]
    return float(np.quantile(rewards, COVERED)) or 1.0 if rewards else 1.0


def colour(reward: float, limit: float) -> str:
    """The colour "#rrggbb" of a word. limit: the size of reward at the ends of the scale."""
    part = min(abs(reward) / limit, 1.0)
    end = _HIGH if reward > 0 else _LOW
    mixed = (round(m + part * (e - m)) for m, e in zip(_MIDDLE, end, strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def ink(reward: float, limit: float) -> str:
    """The colour of the letters, to be read on `colour`."""
    return "#ffffff" if abs(reward) > 0.85 * limit else "#222222"


def visible(word: str) -> str:
    """The word as it is shown: without spaces around it, and with signs for what has no ink."""
    return _marked(word).strip() or "␣"


def _marked(text: str) -> str:
    return "".join(_MARKS.get(letter, letter) for letter in text)


def text_of(words: Sequence[str], most: int = MOST_WORDS) -> str:
    """The last `most` words as running text."""
    # The words of some tokenisers carry their spaces with them.
    gap = "" if any(word.startswith(" ") for word in words) else " "
    text = _marked(gap.join(words[-most:]).strip())
    return f"… {text}" if len(words) > most else text


# --- HTML ----------------------------------------------------------------------------------------

CSS = """
.heat { margin: 1.2em 0 1.8em; }
.heat p { margin: 0 0 .3em; }
.heat td { vertical-align: top; }
.heat th:nth-child(2) { text-align: left; }
.heat td.words { text-align: left; line-height: 1.9; width: 100%; }
.word { padding: .12em .3em; border: 1px solid #ddd; border-radius: 3px; white-space: nowrap;
  font-family: ui-monospace, monospace; font-size: .95em; }
.scale { display: inline-block; width: 14em; height: .9em; border: 1px solid #ddd;
  vertical-align: middle; margin: 0 .5em; }
"""


def section(run: Comparison, *, gold: bool) -> list[str]:
    """The words as text that can be selected, a word's reward as its title; [] without samples.

    gold: whether the true score is known.
    """
    shown = blocks(run)
    if not shown:
        return []
    end = limit(shown)
    steps = ", ".join(colour(x, end) for x in (-end, 0, end))
    scale = f'<span class="scale" style="background: linear-gradient(to right, {steps})"></span>'
    size = pages.number(end)
    parts = ["<h2>Rewards of tokens</h2>", pages.note(CAPTION)]
    parts.append(
        f'<p class="note">-{size}{scale}+{size} (stronger ones have the end\'s colour)</p>'
    )
    return parts + [_block(block, end, gold) for block in shown]


CAPTION = (
    "Held-out prompts, the answers of the policy before and of each arm after reinforcement "
    "learning, word by word. A word is coloured by how much it changed the reward model's score of "
    "the answer so far, blue up and orange down; the reward model is the one that was not "
    "calibrated, for every arm. The prompts are the first ones, not chosen."
)


def _block(block: Block, end: float, gold: bool) -> str:
    heads = ["", "answer", "score", *(["gold"] if gold else [])]
    head = "".join(f"<th>{text}</th>" for text in heads)
    rows = "\n".join(_row(who, answer, end, gold) for who, answer in block.answers)
    return (
        f'<div class="heat"><p>Prompt: {pages.safe(text_of(block.prompt))}</p>\n'
        f"<table><thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table></div>"
    )


def _row(who: str, answer: Response, end: float, gold: bool) -> str:
    words = " ".join(
        f'<span class="word" title="{reward:+.3g}" '
        f'style="background:{colour(reward, end)};color:{ink(reward, end)}">'
        f"{pages.safe(visible(word))}</span>"
        for word, reward in zip(answer.response, answer.reward, strict=True)
    )
    numbers = [answer.score, *([answer.gold] if gold else [])]
    cells = "".join(f"<td>{pages.number(x, 2)}</td>" for x in numbers)
    return f'<tr><td>{pages.safe(who)}</td><td class="words">{words}</td>{cells}</tr>'
