"""Which base values merge to a given result: neighbours on the line of ordered integers, and how many.

For a fixed delta the merge of one element,

    f(w) = w, in the output's dtype                        where delta is ±0
           round_storage( round_work( work(w) + delta ) )  elsewhere

never changes the order of two values, since no rounding does. So the base values that merge to a result m
are an interval of keys (see `ordered`), and which of them it was is all that the merge forgot. Mostly the
interval holds one value, round_storage(m - delta), and nothing need be remembered.

Two steps find the rest. `survey` flags, cheaply, the elements whose interval may hold more than one value;
`intervals` computes the intervals of those few, and proves both ends of each by evaluating f there and one
step outside. Both are functions of (m, delta) alone and use nothing but elementwise IEEE operations, so
that whoever reads an undo stream finds what its writer found. **What `survey` flags is part of the format
of that stream**: another rule needs another version.

f is evaluated in one place, `Preimages._reached`, and guessed backwards in one other, `_guess`. A map with
a positive factor for each row is as monotone: it multiplies in the first, divides in the second, and is
surveyed by probing.

Midpoints and ties: IEEE 754-2019, 4.3.1. That differences of neighbouring floats are exact, which makes
good guesses: Sterbenz 1974, "Floating-Point Computation", theorem 4.3.1.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_cli.arithmetic.floats import bits_dtype, fraction_bits
from lora_cli.arithmetic.ordered import Bits, bits_view, from_ordered, largest_key, to_ordered
from lora_cli.arithmetic.rounding import cast, overflow_limit, work_dtype

Flags = NDArray[np.bool_]
Counts = NDArray[np.unsignedinteger[Any]]
Values = NDArray[np.floating[Any]]


class Intervals(NamedTuple):
    """Runs of base values, each in the order of the line.

    Attributes:
        first: The key of the lowest one.
        spare: How many follow it, as an unsigned number of the keys' width.
    """

    first: Bits
    spare: Counts


class _Edges(NamedTuple):
    """The sums that round to a result: those from `least` on, up to but without `beyond`."""

    least: Values
    beyond: Values


class Preimages:
    """The inverse of the merge between two storage dtypes, with buffers for one tile. One for each thread.

    Args:
        base: The storage dtype of the base.
        merged: The storage dtype of the result.
        elements: The most elements that a tile to be surveyed will have.
    """

    def __init__(self, base: torch.dtype, merged: torch.dtype, elements: int) -> None:
        self.base, self.merged, self.work = base, merged, work_dtype(base, merged)
        self.elements = elements
        self._top = largest_key(base)
        self._difference = torch.empty(elements, dtype=self.work)
        self._patterns = [np.empty(elements, _integers(base)) for _ in range(2)]
        self._flags = [np.empty(elements, np.bool_) for _ in range(2)]

    def survey(self, merged: Tensor, delta: Tensor, out: Tensor) -> Flags:
        """Write the candidates of one tile, and flag where other base values may merge to the same.

        A candidate is round_storage(merged - delta), as `TileKernel.subtract` has it, but the largest finite
        value where that overflows.

        Args:
            merged: A flat tile of results, in their storage dtype, finite.
            delta: The deltas, in the working type, every zero +0.0.
            out: Where the candidates go, in the storage dtype of the base. It shares no memory with the
                others.

        Returns:
            A flag for each element, in a buffer that the next call overwrites. An element with several
            preimages that is missed here (a tie among subnormals, say) costs its reader nothing but space.
        """
        difference = self._difference[: merged.numel()]
        if merged.dtype.itemsize == 1:
            _by_pattern(merged.dtype, self.work).take(bits_view(merged).view(np.uint8), out=difference.numpy())
        else:
            difference.copy_(merged)
        torch.sub(difference, delta, out=difference)
        largest = torch.finfo(self.base).max
        difference.clamp_(-largest, largest)
        if self.work == torch.float64 and self.base.itemsize <= 2:
            cast(difference, out)
        else:
            out.copy_(difference)
        if self.base == self.merged != torch.float64:
            return self._compare(bits_view(merged), bits_view(out), bits_view(difference))
        return self._probe(bits_view(merged), bits_view(out), delta.numpy())

    def _compare(self, merged: Bits, candidate: Bits, difference: Bits) -> Flags:
        """Flag by comparing patterns: where the base is as finely spaced as the result, only ties are shared.

        The sums that round to m span one spacing of m, which holds several base values if they are spaced
        more narrowly: in a lower binade than m, or right at its lower end. If they are spaced alike it holds
        two only if both of its ends are base values, and then m - delta is their midpoint.
        """
        count = merged.size
        largest = np.iinfo(merged.dtype).max
        fraction = fraction_bits(self.base)
        magnitude, binade = (buffer[:count] for buffer in self._patterns)
        flags, ties = (buffer[:count] for buffer in self._flags)
        np.bitwise_and(candidate, largest, out=magnitude)
        np.bitwise_and(merged, largest >> fraction << fraction, out=binade)
        np.less_equal(magnitude, binade, out=flags)
        dropped = fraction_bits(self.work) - fraction
        np.bitwise_and(difference, (1 << dropped) - 1, out=difference)
        np.equal(difference, 1 << (dropped - 1), out=ties)
        return np.logical_or(flags, ties, out=flags)

    def _probe(self, merged: Bits, candidate: Bits, delta: Values) -> Flags:
        """Flag by trying the candidate's neighbours. Slower; for dtypes that change, and for the many ties of float64."""
        edges = self._edges(merged)
        flags, reached = (buffer[: merged.size] for buffer in self._flags)
        flags.fill(False)
        keys = to_ordered(candidate)
        for step in (-1, 1):
            neighbours = keys + keys.dtype.type(step)
            np.greater(
                self._reached(neighbours, delta, edges.least),
                self._reached(neighbours, delta, edges.beyond),
                out=reached,
            )
            np.logical_or(flags, reached, out=flags)
        return flags

    def intervals(self, merged: Bits, delta: Values) -> Intervals:
        """Return the base values that merge to each result.

        Args:
            merged: Patterns of results, finite, in any number.
            delta: The delta of each, in the working type, every zero +0.0.

        Returns:
            The exact intervals. Of a result that no base value merges to the numbers mean nothing, but each
            is a possible key.
        """
        edges = self._edges(merged)
        shift: Values | float = 0.0
        if self.base == self.merged == torch.float64:
            # Half a spacing below m is no double, so the guess goes there in two steps.
            shift = (edges.beyond - edges.least) / 2
        first = self._first(edges.least, delta, shift)
        end = self._first(edges.beyond, delta, shift)
        _part_zeros(first, end, merged, delta)
        spare: Counts = (end - first).view(f"u{end.itemsize}")
        spare -= spare > 0
        return Intervals(first, spare)

    def _edges(self, merged: Bits) -> _Edges:
        if self.merged.itemsize > 2:
            return _edges_of(merged, self.merged, self.work)
        table = _edge_table(self.merged, self.work)
        index = merged.view(f"u{merged.itemsize}")
        return _Edges(table.least.take(index), table.beyond.take(index))

    def _first(self, threshold: Values, delta: Values, shift: Values | float) -> Bits:
        """Return the lowest key whose sum is at least `threshold`; one beyond the largest if there is none."""
        guess = self._guess(threshold, delta, shift)
        reached = self._reached(guess, delta, threshold)
        one = guess.dtype.type(1)
        first: Bits = guess + one
        other: Bits = first - reached
        other -= reached
        first -= reached
        # Now `first` and the key below it are guess and other, in one order or the other: one must reach the
        # threshold and one must not.
        proven = self._reached(other, delta, threshold) ^ reached
        if not proven.all():
            at = np.flatnonzero(~proven)
            first[at] = self._search(threshold[at], delta[at], guess[at])
        return first

    def _guess(self, threshold: Values, delta: Values, shift: Values | float) -> Bits:
        """Return the key of a finite base value near `threshold - delta - shift`."""
        with np.errstate(over="ignore", invalid="ignore"):
            values = torch.from_numpy(threshold - delta - shift)
        keys = to_ordered(bits_view(values.to(self.base)))
        return np.clip(keys, ~self._top, self._top, out=keys)

    def _reached(self, keys: Bits, delta: Values, threshold: Values) -> Flags:
        """Return whether the sums of base values and deltas are at least `threshold`: all there is of f."""
        with np.errstate(over="ignore", invalid="ignore"):
            reached: Flags = _values(keys, self.base, self.work) + delta >= threshold
        return reached

    def _search(self, threshold: Values, delta: Values, guess: Bits) -> Bits:
        """Return what `_first` does, by bisection from the neighbourhood of the guess."""
        low, high = np.full_like(guess, ~self._top - 1), np.full_like(guess, self._top + 1)
        first = high.copy()
        near = np.clip(guess, ~self._top + 3, self._top - 3)
        probes = [near - near.dtype.type(4), near + near.dtype.type(4)]
        at = np.arange(guess.size)
        while at.size:
            probe = probes.pop() if probes else (low & high) + ((low ^ high) >> 1)
            reached = self._reached(probe, delta[at], threshold[at])
            low, high = np.where(reached, low, np.maximum(low, probe)), np.where(reached, np.minimum(high, probe), high)
            first[at] = high
            open_ = np.flatnonzero(low + low.dtype.type(1) != high)
            at, low, high = at[open_], low[open_], high[open_]
            probes = [other[open_] for other in probes]
        return first


def _part_zeros(first: Bits, end: Bits, merged: Bits, delta: Values) -> None:
    """Where nothing was added each zero kept its sign, which comparing sums as numbers does not see."""
    unchanged = np.flatnonzero(delta == 0)
    results = merged[unchanged]
    first[unchanged[results == 0]] = 0
    end[unchanged[results == np.iinfo(merged.dtype).min]] = 0


def _integers(dtype: torch.dtype) -> str:
    return f"i{bits_dtype(dtype).itemsize}"


def _values(keys: Bits, dtype: torch.dtype, work: torch.dtype) -> Values:
    """Return the numbers at keys, infinite beyond the finite ones, in memory of their own."""
    if dtype.itemsize == 1:
        table = _by_pattern(dtype, work)
        found: Values = table.take(from_ordered(keys).view(np.uint8))
        return found
    stored = torch.from_numpy(from_ordered(keys)).view(dtype)
    values: Values = stored.to(work).numpy()
    return values


@cache
def _by_pattern(dtype: torch.dtype, work: torch.dtype) -> Values:
    """Return the values of all patterns of one byte, which torch converts seven times slower than others.

    What lies beyond the finite values is infinite, NaN included, to stand for sums that do not fit.
    """
    patterns = torch.arange(256, dtype=torch.uint8)
    values: Values = patterns.view(dtype).to(work).numpy()
    keys = to_ordered(patterns.numpy().view(np.int8))
    values[keys > largest_key(dtype)] = np.inf
    values[keys < ~largest_key(dtype)] = -np.inf
    values.setflags(write=False)
    return values


@cache
def _edge_table(dtype: torch.dtype, work: torch.dtype) -> _Edges:
    """Return the edges of all patterns of at most 16 bits, in the order of the patterns as unsigned numbers."""
    patterns = np.arange(1 << 8 * dtype.itemsize).astype(f"u{dtype.itemsize}").view(_integers(dtype))
    edges = _edges_of(patterns, dtype, work)
    for values in edges:
        values.setflags(write=False)
    return edges


def _edges_of(bits: Bits, dtype: torch.dtype, work: torch.dtype) -> _Edges:
    """Return which sums in the working type round to each pattern of a storage dtype."""
    keys = to_ordered(bits)
    one = keys.dtype.type(1)
    if dtype == work:
        return _Edges(_values(keys, dtype, work), _values(keys + one, dtype, work))
    below, here, above = (_values(part, dtype, torch.float64) for part in (keys - one, keys, keys + one))
    limit = overflow_limit(dtype)
    number = np.dtype(f"f{work.itemsize}")
    with np.errstate(all="ignore"):
        # Exact in the working type, which has at least two bits more and a wider range than any other.
        low = np.clip((below + here) / 2, -limit, limit).astype(number)
        high = np.clip((here + above) / 2, -limit, limit).astype(number)
        # Midpoints go to the even side, except where values are refused from them on, and that 0.0 is +0.0's.
        even = bits & one == 0
        low_open = ~even | (low == -limit)
        high_closed = even & (high != limit) & (keys != -1)
        least = np.where(low_open, np.nextafter(low, np.inf), low)
        beyond = np.where(high_closed, np.nextafter(high, np.inf), high)
    return _Edges(least, beyond)
