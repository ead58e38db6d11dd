"""Arithmetic of a program before it is compiled: matrix products and convolutions, through loops.

XLA's own count takes the body of a loop once, however often it runs. This one walks the program
as JAX traced it: a scan counts its body `length` times, a while loop as often as its condition
`i < n` allows (the most that integers of the program let n - i be), a choice counts its dearest
branch, a Pallas kernel each point of its grid, and what rematerialisation computes again is there
to be counted. Operations on single elements are left out: beside a product they cost next to
nothing.

Nothing is computed and nothing allocated: arguments may be `jax.ShapeDtypeStruct`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core as jex


class Cost(NamedTuple):
    """flops: additions and multiplications, all devices together.

    kernels: those of them that are in Pallas's kernels, which XLA does not look into.
    open_loops: the most turns that each loop without a fixed number of them can take; None where
        nothing bounds it.
    """

    flops: float
    open_loops: tuple[int | None, ...] = ()
    kernels: float = 0.0

    def times(self, count: float) -> Cost:
        return Cost(self.flops * count, self.open_loops, self.kernels * count)

    def __add__(self, other: Cost) -> Cost:  # ty: ignore[incompatible-method-override]
        loops = self.open_loops + other.open_loops
        return Cost(self.flops + other.flops, loops, self.kernels + other.kernels)


# What is known of an array: no element is below the first number or above the second.
Range = tuple[int, int] | None


def count(function: Callable[..., Any], *arguments: Any, turns: int = 1) -> Cost:
    """The cost of `function(*arguments)`.

    arguments: pytrees of arrays or `jax.ShapeDtypeStruct`. Leaves that are NumPy or Python integers
        have known values, which may bound loops; all others stand for any value.
    turns: of each loop that nothing bounds.
    """
    closed = jax.make_jaxpr(function)(*arguments)
    known = [_range_of(leaf) for leaf in jax.tree.leaves(arguments)]
    return _walk(closed.jaxpr, [*map(_range_of, closed.consts), *known], turns)[0]


def _range_of(value: Any) -> Range:
    """Of a value that is at hand on the host, and a small integer or several."""
    if isinstance(value, int | np.integer | np.ndarray) and np.size(value):
        array = np.asarray(value)
        if array.dtype.kind in "iub":
            return int(array.min()), int(array.max())
    return None


def _walk(jaxpr: jex.Jaxpr, known: Sequence[Range], turns: int) -> tuple[Cost, list[Range]]:
    """The cost of a program, and what is known of its results.

    known: of its constants and then its arguments.
    """
    ranges = dict(zip([*jaxpr.constvars, *jaxpr.invars], known, strict=True))

    def look(atom: Any) -> Range:
        return _range_of(atom.val) if isinstance(atom, jex.Literal) else ranges.get(atom)

    total = Cost(0.0)
    for equation in jaxpr.eqns:
        inputs = [look(atom) for atom in equation.invars]
        cost, outputs = _equation(equation, inputs, turns)
        total += cost
        ranges |= dict(zip(equation.outvars, outputs, strict=True))
    return total, [look(atom) for atom in jaxpr.outvars]


def _equation(equation: jex.JaxprEqn, inputs: list[Range], turns: int) -> tuple[Cost, list[Range]]:
    name = equation.primitive.name
    nothing: list[Range] = [None] * len(equation.outvars)
    if name == "dot_general":
        return Cost(_product_flops(equation)), nothing
    if name == "conv_general_dilated":
        return Cost(_convolution_flops(equation)), nothing
    if name in _LOOPS:
        return _LOOPS[name](equation, inputs, turns), nothing
    inner = list(_programs(equation.params))
    if not inner:
        found = _RANGES[name](equation, inputs) if name in _RANGES else None
        return Cost(0.0), [found] * len(equation.outvars)
    # A call: jit, remat, custom derivatives. Its arguments are the program's, one by one.
    fits = len(inputs) == len(inner[0].jaxpr.invars)
    cost, outputs = _closed(
        inner[0], inputs if fits else [None] * len(inner[0].jaxpr.invars), turns
    )
    if name == "pallas_call":  # written for one point of its grid
        cost = cost.times(math.prod(equation.params["grid_mapping"].grid))
        cost = cost._replace(kernels=cost.flops)
    if name == "shard_map":  # written for one device's part
        mesh = equation.params["mesh"]
        cost = cost.times(
            math.prod(mesh.shape[axis] for axis in equation.params["newly_manual_axes"])
        )
    return cost, outputs if len(outputs) == len(nothing) else nothing


def _programs(parameters: dict[str, Any]) -> Iterator[jex.ClosedJaxpr]:
    """The programs inside an equation."""
    for value in parameters.values():
        for item in value if isinstance(value, tuple | list) else [value]:
            if isinstance(item, jex.ClosedJaxpr):
                yield item
            elif isinstance(item, jex.Jaxpr) and not item.constvars:
                yield jex.ClosedJaxpr(item, ())


def _closed(
    closed: jex.ClosedJaxpr, inputs: Sequence[Range], turns: int
) -> tuple[Cost, list[Range]]:
    return _walk(closed.jaxpr, [*map(_range_of, closed.consts), *inputs], turns)


def _shape(atom: Any) -> tuple[int, ...]:
    return atom.aval.shape


# --- products -------------------------------------------------------------------------------------


def _product_flops(equation: jex.JaxprEqn) -> float:
    """Two operations for each element of the result and each element summed over."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    summed = math.prod(_shape(equation.invars[0])[axis] for axis in contracted)
    return 2.0 * math.prod(_shape(equation.outvars[0])) * summed


def _convolution_flops(equation: jex.JaxprEqn) -> float:
    """Two operations for each element of the result and each of its kernel's, edges too.

    Where the input is spread with zeros, as in the gradient of a stride, these do not count.
    """
    kernel = _shape(equation.invars[1])
    summed = math.prod(kernel) / kernel[equation.params["dimension_numbers"].rhs_spec[0]]
    zeros = math.prod(equation.params["lhs_dilation"])
    return 2.0 * math.prod(_shape(equation.outvars[0])) * summed / zeros


# --- loops and choices ----------------------------------------------------------------------------


def _scan(equation: jex.JaxprEqn, inputs: list[Range], turns: int) -> Cost:
    body = equation.params["jaxpr"].jaxpr
    sliced = _with_another_rank(equation.invars, body.invars)
    stacked = _with_another_rank(equation.outvars, body.outvars)
    # First come constants, then what is carried, then slices. Slices have the range of the whole;
    # what is carried may become anything.
    carried = len(stacked) - sum(stacked)
    constants = len(sliced) - sum(sliced) - carried
    known = [*inputs[:constants], *[None] * carried, *inputs[constants + carried :]]
    return _closed(equation.params["jaxpr"], known, turns)[0].times(equation.params["length"])


def _with_another_rank(outside: Sequence[Any], inside: Sequence[Any]) -> list[bool]:
    return [len(_shape(a)) != len(_shape(b)) for a, b in zip(outside, inside, strict=True)]


def _while(equation: jex.JaxprEqn, inputs: list[Range], turns: int) -> Cost:
    parameters = equation.params
    first, second = parameters["cond_nconsts"], parameters["body_nconsts"]
    carry = inputs[first + second :]
    bound = _turns(parameters, inputs[:first], carry)
    known = [*inputs[first : first + second], *[None] * len(carry)]
    body, _ = _closed(parameters["body_jaxpr"], known, turns)
    known = [*inputs[:first], *[None] * len(carry)]
    condition, _ = _closed(parameters["cond_jaxpr"], known, turns)
    cost = (body + condition).times(turns if bound is None else bound)
    return cost._replace(open_loops=(bound, *cost.open_loops))


def _cond(equation: jex.JaxprEqn, inputs: list[Range], turns: int) -> Cost:
    branches = [_closed(branch, inputs[1:], turns)[0] for branch in equation.params["branches"]]
    return max(branches, key=lambda cost: cost.flops)


_LOOPS = {"scan": _scan, "while": _while, "cond": _cond}


def _turns(parameters: dict[str, Any], constants: list[Range], carry: list[Range]) -> int | None:
    """The most turns that a loop can take, from those parts of its condition that say `i < n`."""
    condition = parameters["cond_jaxpr"].jaxpr
    carried = condition.invars[len(constants) :]
    known = dict(zip(condition.invars, [*constants, *carry], strict=True))
    step = {atom: _step(parameters, i) for i, atom in enumerate(carried)}
    bounds = []
    for equation in _conjuncts(condition):
        index, limit = equation.invars
        stride = 0 if isinstance(index, jex.Literal) else step.get(index)
        if isinstance(limit, jex.Literal):
            end = _range_of(limit.val)
        else:
            end = known.get(limit) if step.get(limit, 0) == 0 else None
        start = known.get(index) if stride else None
        if stride and stride > 0 and start and end:
            bounds.append(max(0, -(-(end[1] - start[0]) // stride)))
    return min(bounds, default=None)


# What hands the verdict of `a < b` on, unless it makes it harder to hold.
_HANDED_ON = ("and", "reduce_or", "convert_element_type")


def _conjuncts(condition: jex.Jaxpr) -> Iterator[jex.JaxprEqn]:
    """The equations `a < b` that must all hold for the condition to."""
    made = {equation.outvars[0]: equation for equation in condition.eqns if equation.outvars}
    waiting = list(condition.outvars)
    while waiting:
        equation = made.get(waiting.pop())
        if equation is not None and equation.primitive.name in _HANDED_ON:
            waiting += [atom for atom in equation.invars if not isinstance(atom, jex.Literal)]
        elif equation is not None and equation.primitive.name == "lt":
            yield equation


def _step(parameters: dict[str, Any], index: int) -> int | None:
    """What a turn adds to a carried number: 0 where it is handed on, None where it is unknown."""
    body = parameters["body_jaxpr"].jaxpr
    before = body.invars[parameters["body_nconsts"] + index]
    after = body.outvars[index]
    if after is before:
        return 0
    for equation in body.eqns:
        if after in equation.outvars and equation.primitive.name == "add":
            other = [atom for atom in equation.invars if atom is not before]
            if len(other) == 1 and isinstance(other[0], jex.Literal):
                return int(other[0].val)
    return None


# --- ranges of integers ---------------------------------------------------------------------------


def _hull(*ranges: Range) -> Range:
    known = [r for r in ranges if r is not None]
    if not known or len(known) < len(ranges):
        return None
    return min(low for low, _ in known), max(high for _, high in known)


def _corners(operation: Callable[[int, int], int]) -> Callable[..., Range]:
    """Of an operation that is monotone in each of its two arguments."""

    def of(_: jex.JaxprEqn, inputs: list[Range]) -> Range:
        if inputs[0] is None or inputs[1] is None:
            return None
        ends = [operation(a, b) for a in inputs[0] for b in inputs[1]]
        return min(ends), max(ends)

    return of


def _same(_: jex.JaxprEqn, inputs: list[Range]) -> Range:
    return inputs[0]


_RANGES: dict[str, Callable[[jex.JaxprEqn, list[Range]], Range]] = {
    "add": _corners(lambda a, b: a + b),
    "sub": _corners(lambda a, b: a - b),
    "mul": _corners(lambda a, b: a * b),
    "min": _corners(min),
    "max": _corners(max),
    "select_n": lambda _, inputs: _hull(*inputs[1:]),
    "concatenate": lambda _, inputs: _hull(*inputs),
    "iota": lambda e, _: (0, max(0, _shape(e.outvars[0])[e.params["dimension"]] - 1)),
    **dict.fromkeys(("convert_element_type", "copy", "reduce_max", "reduce_min"), _same),
    **dict.fromkeys(("broadcast_in_dim", "dynamic_slice", "reshape", "slice", "squeeze"), _same),
}
