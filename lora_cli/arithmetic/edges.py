"""Where rounding changes its mind: which sums in the working type become a stored value.

A stored value m stands for all sums from the middle between m and its lower neighbour to the middle between
m and its upper one. The middles themselves go to whichever of the two is even (IEEE 754-2019, 4.3.1).
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lora_cli.arithmetic.ordered import Bits, from_ordered, largest_key, to_ordered
from lora_cli.arithmetic.rounding import overflow_limit

Flags = NDArray[np.bool_]
Values = NDArray[np.floating[Any]]


class Edges(NamedTuple):
    """The sums that round to a value: those from `least` on, up to but without `beyond`.

    As numbers, that is. A sum that is exactly zero rounds to +0.0 and is within the edges of +0.0 alone;
    only where nothing was added can it be -0.0, which no number tells.
    """

    least: Values
    beyond: Values


def edges_of(bits: Bits, dtype: torch.dtype, work: torch.dtype) -> Edges:
    """Return which sums round to stored values.

    Args:
        bits: The patterns of the values. What is said of those that are not finite means nothing.
        dtype: Their storage dtype.
        work: The working type, in which the edges are given. Sums that must be refused as too large are
            within nobody's.
    """
    if dtype.itemsize > 2:
        return _computed(bits, dtype, work)
    table = _table(dtype, work)
    index = bits.view(f"u{bits.itemsize}")
    return Edges(table.least.take(index), table.beyond.take(index))


@cache
def _table(dtype: torch.dtype, work: torch.dtype) -> Edges:
    """Return the edges of all patterns of at most 16 bits, in the order of the patterns as unsigned numbers."""
    width = dtype.itemsize
    patterns = np.arange(1 << 8 * width).astype(f"u{width}").view(f"i{width}")
    edges = _computed(patterns, dtype, work)
    for values in edges:
        values.setflags(write=False)
    return edges


def _computed(bits: Bits, dtype: torch.dtype, work: torch.dtype) -> Edges:
    keys = to_ordered(bits)
    one = keys.dtype.type(1)
    if dtype == work:
        return Edges(values_at(keys, dtype, work), values_at(keys + one, dtype, work))
    below, here, above = (values_at(part, dtype, torch.float64) for part in (keys - one, keys, keys + one))
    limit = overflow_limit(dtype)
    number = np.dtype(f"f{work.itemsize}")
    with np.errstate(over="ignore", invalid="ignore"):
        # Exact in the working type, which has two more bits at least, and a wider range than any other.
        low = np.clip((below + here) / 2, -limit, limit).astype(number)
        high = np.clip((here + above) / 2, -limit, limit).astype(number)
    # The limit is refused already, by even values too, and zero does not go to -0.0.
    even = bits & one == 0
    least = stepped(low, ~even | (low == -limit))
    beyond = stepped(high, even & (high != limit) & (keys != -1))
    return Edges(least, beyond)


def stepped(values: Values, steps: Flags | int) -> Values:
    """Return values moved by whole steps of their type; from +0.0 one down is -0.0."""
    keys = to_ordered(values.view(f"i{values.itemsize}"))
    keys += steps
    moved: Values = from_ordered(keys, keys).view(values.dtype)
    return moved


def values_at(keys: Bits, dtype: torch.dtype, work: torch.dtype) -> Values:
    """Return the numbers at keys in the working type, in memory of their own; infinite beyond the finite ones."""
    patterns = from_ordered(keys)
    if dtype.itemsize == 1:
        found: Values = by_pattern(dtype, work).take(patterns.view(np.uint8))
        return found
    values: Values = torch.from_numpy(patterns).view(dtype).to(work).numpy()
    return values


@cache
def by_pattern(dtype: torch.dtype, work: torch.dtype) -> Values:
    """Return the values of all patterns of one byte, as unsigned numbers. torch converts those slowly.

    NaN is infinite here, with its sign: it is what stands beyond the largest values of float8_e4m3fn.
    """
    patterns = torch.arange(256, dtype=torch.uint8)
    values: Values = patterns.view(dtype).to(work).numpy()
    keys = to_ordered(patterns.numpy().view(np.int8))
    values[keys > largest_key(dtype)] = np.inf
    values[keys < ~largest_key(dtype)] = -np.inf
    values.setflags(write=False)
    return values
