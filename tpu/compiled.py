"""What a compiled program does on each chip, read off its text: XLA's own sums count loops once.

The text is that of `jax.stages.Compiled.as_text()`, one device's program after partitioning. A
`while` counts as often as its condition lets it turn where start and end are constants, and
`turns` times where data end it; a choice counts its dearest branch.

  flops         of convolutions and products; positions in the padding of a window do not count,
                nor does what is inside of a Pallas kernel
  memory        bytes read from and written to HBM by each fusion; what stays in on-chip memory,
                marked `S(1)` in layouts, does not count, nor what a slice leaves of an array
  interconnect  bytes that a chip sends, by collective, as rings send them: (n - 1) / n of the whole
                array for gathering and scattering over n chips, twice that for a sum
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# What moves nothing, or is counted where it starts.
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("partition-id", "replica-id", "opt-barrier", "iota"),
}
ITEM_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}

_ARRAY = re.compile(r"([a-z]+[0-9]*[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
_LINE = re.compile(r"^\s*(ROOT )?%([\w.\-]+) = ")
_HEAD = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
_NAME = re.compile(r"%([\w.\-]+)")


class Instruction(NamedTuple):
    """name, opcode, operands' names; kind: the text of its type; rest: of its attributes."""

    name: str
    opcode: str
    operands: list[str]
    kind: str
    rest: str
    root: bool
    inside: str  # the text between the parentheses, which of a constant is its value


class Tally(NamedTuple):
    """Of one chip. sent: bytes by collective. calls: how often each collective runs."""

    flops: float = 0.0
    memory: float = 0.0
    sent: Mapping[str, float] = {}
    calls: Mapping[str, float] = {}

    def times(self, count: float) -> Tally:
        scale = {name: value * count for name, value in self.sent.items()}
        calls = {name: value * count for name, value in self.calls.items()}
        return Tally(self.flops * count, self.memory * count, scale, calls)

    def plus(self, other: Tally) -> Tally:
        sent, calls = Counter(self.sent), Counter(self.calls)
        sent.update(other.sent)
        calls.update(other.calls)
        return Tally(self.flops + other.flops, self.memory + other.memory, sent, calls)


def tally(text: str, turns: int = 1) -> Tally:
    """What one chip does in a run of the program.

    turns: of each loop whose end is not a number in the program.
    """
    return _Reader(text, turns).computation(_entry(text))


def collectives(text: str) -> Counter[str]:
    """How often each collective is written in the program, loops apart."""
    found: Counter[str] = Counter()
    for instructions in _parse(text).values():
        found.update(kind for i in instructions.values() if (kind := _collective(i)))
    return found


# --- text -----------------------------------------------------------------------------------------


def _entry(text: str) -> str:
    return next(m[2] for line in text.splitlines() if (m := _HEAD.match(line)) and m[1])


def _parse(text: str) -> dict[str, dict[str, Instruction]]:
    """The instructions of each computation by name."""
    computations: dict[str, dict[str, Instruction]] = {}
    current: dict[str, Instruction] = {}
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = computations.setdefault(head[2], {})
        elif found := _LINE.match(line):
            instruction = _instruction(found[2], line[found.end() :], bool(found[1]))
            current[instruction.name] = instruction
    return computations


def _instruction(name: str, text: str, root: bool) -> Instruction:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    kind, text = text[:end], text[end:].lstrip()
    begin = text.index("(")
    close = _closing(text, begin)
    inside = text[begin + 1 : close]
    return Instruction(
        name, text[:begin], _NAME.findall(inside), kind, text[close + 1 :], root, inside
    )


def _closing(text: str, begin: int) -> int:
    depth = 0
    for i in range(begin, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i
    raise ValueError(f"no closing parenthesis in {text[:80]!r}")


def _shape(kind: str) -> list[int]:
    """Of an array's type."""
    found = _ARRAY.search(kind)
    assert found, kind
    return [int(size) for size in found[2].split(",") if size]


def _bytes(kind: str, *, everywhere: bool = False) -> float:
    """Bytes of a type in HBM; everywhere: on the chip too."""
    total = 0.0
    for item, sizes, layout in _ARRAY.findall(kind):
        if everywhere or not re.search(r"S\([1-9]", layout):
            bits = ITEM_BITS.get(item) or int((re.search(r"\d+", item) or ["8"])[0])
            total += math.prod(int(size) for size in sizes.split(",") if size) * bits / 8
    return total


def _attribute(rest: str, name: str) -> str | None:
    found = re.search(rf"\b{name}=%([\w.\-]+)", rest)
    return found[1] if found else None


def _renames(instruction: Instruction) -> bool:
    """Whether the instruction only sees parts that lie side by side as one array."""
    return instruction.opcode == "custom-call" and '"ConcatBitcast"' in instruction.rest


def _collective(instruction: Instruction) -> str | None:
    """Which collective an instruction begins. One that goes on beside products is written in each
    of their fusions again, with the flags that it waits for.
    """
    goes_on = re.search(r'"async_collective_fusion_config":\{"flag_start":"\d', instruction.rest)
    kind = instruction.opcode.removesuffix("-start")
    return kind if kind in COLLECTIVES and not goes_on else None


# --- sums -----------------------------------------------------------------------------------------


class _Reader:
    """The computations of a program, and the tally of each, made once."""

    def __init__(self, text: str, turns: int) -> None:
        self.parsed, self.turns = _parse(text), turns
        self.known: dict[str, Tally] = {}

    def computation(self, name: str) -> Tally:
        if name not in self.known:
            total = Tally()
            for instruction in self.parsed[name].values():
                total = total.plus(self._instruction(self.parsed[name], instruction))
            self.known[name] = total
        return self.known[name]

    def _instruction(self, around: dict[str, Instruction], it: Instruction) -> Tally:
        if it.opcode in FREE or it.opcode.endswith("-done") or _renames(it):
            return Tally()
        if it.opcode == "while":
            body = _attribute(it.rest, "body")
            assert body, it.rest
            return self.computation(body).times(self._turns(around, it))
        if it.opcode == "conditional":
            return max(map(self.computation, _branches(it)), key=lambda t: (t.flops, t.memory))
        called = _attribute(it.rest, "calls") or _attribute(it.rest, "to_apply")
        if it.opcode in ("call", "async-start") and called:
            return self.computation(called)
        total = Tally(memory=self._memory(around, it))
        if it.opcode == "fusion" and called:
            inner = self.computation(called)  # whose memory is on the chip
            return total.plus(inner._replace(memory=0.0))
        if it.opcode in ("convolution", "dot"):
            return total._replace(flops=_flops(around, it))
        if kind := _collective(it):
            return total._replace(sent={kind: _sent(around, it, kind)}, calls={kind: 1.0})
        return total

    def _turns(self, around: dict[str, Instruction], loop: Instruction) -> int:
        """How often a loop turns: `i < n` with both ends constant, else as planned for."""
        known = re.search(r'known_trip_count[^\d]*"?(\d+)', loop.rest)
        if known:
            return int(known[1])
        condition = self.parsed[_attribute(loop.rest, "condition") or ""]
        test = next(i for i in condition.values() if i.root)
        start = around[loop.operands[0]]
        if test.opcode != "compare" or "direction=LT" not in test.rest or not start.operands:
            return self.turns
        ends, stride = [], 1
        for name in test.operands:
            atom, carried = condition[name], re.search(r"index=(\d+)", condition[name].rest)
            if atom.opcode == "get-tuple-element" and carried:
                stride = self._stride(loop, int(carried[1])) or stride
                atom = _source(around, start.operands[int(carried[1])])
            ends.append(_integer(atom))
        first, last = ends
        return self.turns if first is None or last is None else max(0, -((first - last) // stride))

    def _stride(self, loop: Instruction, index: int) -> int | None:
        """What a turn adds to a number that the loop carries; None where it adds no constant."""
        body = self.parsed[_attribute(loop.rest, "body") or ""]
        root = next(i for i in body.values() if i.root)
        after = _source(body, root.operands[index])
        terms = [_integer(_source(body, name)) for name in after.operands]
        return next((t for t in terms if t), None) if after.opcode == "add" else None

    def _memory(self, around: dict[str, Instruction], it: Instruction) -> float:
        """Bytes that an instruction moves to and from HBM."""
        kinds = [around[name].kind for name in it.operands]
        if it.opcode == "fusion":
            body = self.parsed[_attribute(it.rest, "calls") or ""]
            read = sum(_read(body, i, kind) for i, kind in enumerate(kinds))
            return read + _written(body, it.kind)
        if it.opcode in ("dynamic-slice", "gather", "slice"):
            return 2 * _bytes(it.kind)
        if it.opcode == "dynamic-update-slice":
            return 2 * _bytes(kinds[1])
        if it.opcode.endswith("-start"):
            return _bytes(it.kind)  # its type has both ends
        return sum(map(_bytes, kinds)) + _bytes(it.kind)


def _integer(it: Instruction) -> int | None:
    """The value of a constant."""
    found = re.fullmatch(r"-?\d+", it.inside) if it.opcode == "constant" else None
    return int(found[0]) if found else None


def _source(around: dict[str, Instruction], name: str) -> Instruction:
    """The instruction behind copies."""
    it = around[name]
    while it.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
        it = around[it.operands[0]]
    return it


def _branches(it: Instruction) -> list[str]:
    found = re.search(r"branch_computations=\{([^}]*)\}", it.rest)
    if found:
        return _NAME.findall(found[1])
    names = (_attribute(it.rest, f"{which}_computation") for which in ("true", "false"))
    return [name for name in names if name]


# --- memory ---------------------------------------------------------------------------------------


def _read(body: dict[str, Instruction], index: int, kind: str) -> float:
    """Bytes that a fusion reads of its operand `index`."""
    whole = _bytes(kind)
    if not whole:
        return 0.0
    given = (i for i in body.values() if i.opcode == "parameter" and i.inside == str(index))
    uses = list(_uses(body, next(given).name))
    if all(u.opcode in ("dynamic-slice", "gather") and p == 0 for u, p in uses):
        return min(whole, sum(_bytes(u.kind, everywhere=True) for u, _ in uses))
    if all(u.opcode == "dynamic-update-slice" and p == 0 for u, p in uses):
        return 0.0  # overwritten in place
    return whole


def _uses(body: dict[str, Instruction], name: str) -> Iterator[tuple[Instruction, int]]:
    """Who reads a value, and as which operand; through bitcasts."""
    for it in body.values():
        for position, operand in enumerate(it.operands):
            if operand == name and it.opcode == "bitcast":
                yield from _uses(body, it.name)
            elif operand == name:
                yield it, position


def _written(body: dict[str, Instruction], kind: str) -> float:
    """Bytes that a fusion writes: of an update in place the new part alone."""
    root = next(i for i in body.values() if i.root)
    parts = [body[name] for name in root.operands] if root.opcode == "tuple" else [root]
    kinds = _ARRAY.finditer(kind)
    total = 0.0
    for part, found in zip(parts, kinds, strict=False):
        part = _source(body, part.name)
        if part.opcode == "dynamic-update-slice" and _bytes(found[0]):
            total += _bytes(body[part.operands[1]].kind, everywhere=True)
        else:
            total += _bytes(found[0])
    return total


# --- products -------------------------------------------------------------------------------------


def _flops(around: dict[str, Instruction], it: Instruction) -> float:
    left, right = (_shape(around[name].kind) for name in it.operands[:2])
    if it.opcode == "dot":
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", it.rest)
        summed = math.prod(left[int(axis)] for axis in axes[1].split(",") if axis) if axes else 1
        return 2.0 * math.prod(_shape(it.kind)) * summed
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", it.rest)
    assert labels, it.rest
    out = _shape(it.kind)
    windows = _windows(it.rest)
    turns = 1
    for axis in sorted(set(labels[3]) - {"b", "f"}):
        size = {
            part: sizes[at.index(axis)]
            for part, at, sizes in zip(
                ("in", "window", "out"), labels.groups(), (left, right, out), strict=True
            )
        }
        turns *= _positions(size["in"], size["window"], size["out"], windows[int(axis)])
    groups = re.search(r"batch_group_count=(\d+)", it.rest)
    features = right[labels[2].index("i")] * out[labels[3].index("f")]
    return 2.0 * features * out[labels[3].index("b")] * turns / (int(groups[1]) if groups else 1)


class _Window(NamedTuple):
    stride: int
    low: int
    spread: int  # of the input, with zeros between
    step: int  # of the window


def _windows(rest: str) -> list[_Window]:
    """Of each spatial axis."""
    found = re.search(r"window=\{([^}]*)\}", rest)
    if not found:
        return []
    fields = dict(part.split("=") for part in found[1].split())
    count = len(fields["size"].split("x"))

    def numbers(name: str, default: str) -> list[int]:
        text = fields.get(name, "x".join([default] * count))
        return [int(part.split("_")[0]) for part in text.split("x")]

    names = (("stride", "1"), ("pad", "0_0"), ("lhs_dilate", "1"), ("rhs_dilate", "1"))
    return [_Window(*row) for row in zip(*(numbers(*name) for name in names), strict=True)]


def _positions(size: int, window: int, out: int, how: _Window) -> int:
    """Pairs of a window's and a result's positions that meet an element of the input."""
    found = 0
    for w in range(window):
        # spread * k = stride * o + step * w - low for some 0 <= k < size
        shift = how.step * w - how.low
        for o in range(out):
            at = how.stride * o + shift
            found += at >= 0 and at % how.spread == 0 and at // how.spread < size
    return found


# --- interconnect ---------------------------------------------------------------------------------


def _sent(around: dict[str, Instruction], it: Instruction, kind: str) -> float:
    """Bytes that a chip sends in one call."""
    given = sum(_bytes(around[name].kind, everywhere=True) for name in it.operands)
    if kind == "collective-permute":
        return given
    chips = _group(it.rest)
    share = (chips - 1) / chips
    if kind == "all-gather":
        return given * (chips - 1)
    return given * share * (2 if kind == "all-reduce" else 1)


def _group(rest: str) -> int:
    """Chips that talk to each other, in any of the ways in which XLA writes it."""
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(found[2])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
        # Part of an axis is written 'axis':(before)size.
        parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    found = re.search(r"replica_groups=\{\{([\d,]*)\}", rest)
    return len(found[1].split(",")) if found else 1
