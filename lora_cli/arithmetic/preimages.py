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

**Gains.** A merge may multiply each sum by a gain g of its own, as DoRA does:

    f(w) = round_storage( round_work( g · round_work( work(w) + delta ) ) )

where a zero that nothing is added to keeps its sign, as above, so that a gain of 1 is the same f. It is as monotone;
g < 0 only changes the sign of the results of -g. With g = 0 all base values whose sums have one sign are one
interval. Spacings no longer say where there are several, so that f itself is tried at the candidate's neighbours
(`_survey_results`). That rule, too, is part of the format.

f is evaluated in one place, `_Map.ahead`, and guessed backwards in one other, `_Map.back`; for whole tiles `survey`
does the same in buffers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_cli.arithmetic.edges import Flags, Values, by_pattern, edges_of, stepped, values_at
from lora_cli.arithmetic.floats import fraction_bits
from lora_cli.arithmetic.ordered import Bits, bits_view, largest_key, to_ordered
from lora_cli.arithmetic.rounding import bounded, cast, work_dtype

Counts = NDArray[np.unsignedinteger[Any]]


class Intervals(NamedTuple):
    """Runs of base values, each in the order of the line.

    Attributes:
        first: The key of the lowest one.
        spare: How many follow it, as an unsigned number of the keys' width.
    """

    first: Bits
    spare: Counts


class _Map(NamedTuple):
    """What is done to base values before the result is rounded to storage.

    Attributes:
        subtrahend: The negative delta of each, every zero +0.0: a zero that it is taken from keeps its sign, as in
            `TileKernel.merge`.
        gains: What each sum is multiplied by, not negative; None where there is nothing but sums.
    """

    subtrahend: Values
    gains: Values | None

    def at(self, places: NDArray[np.intp]) -> _Map:
        return _Map(self.subtrahend[places], None if self.gains is None else self.gains[places])

    def ahead(self, values: Values) -> Values:
        """Return what becomes of base values, in their place."""
        values -= self.subtrahend
        if self.gains is not None:
            values *= self.gains
        return values

    def back(self, results: Values) -> Values:
        """Return about what became these; a gain of 0 leaves no number."""
        if self.gains is None:
            return results + self.subtrahend
        values: Values = results / self.gains
        values += self.subtrahend
        return values


class Preimages:
    """The inverse of the merge between two storage dtypes, with buffers for one tile. One for each thread.

    Args:
        base: The storage dtype of the base.
        merged: The storage dtype of the result.
        elements: The most elements that a tile to be surveyed will have.
    """

    def __init__(self, base: torch.dtype, merged: torch.dtype, elements: int) -> None:
        self.base, self.merged, self.work = base, merged, work_dtype(base, merged)
        self._top = largest_key(base)
        self._largest = torch.finfo(base).max
        self._difference = torch.empty(elements, dtype=self.work)
        self._results = torch.empty(elements, dtype=merged)
        self._patterns = tuple(np.empty(elements, f"i{base.itemsize}") for _ in range(2))
        self._flags = tuple(np.empty(elements, np.bool_) for _ in range(2))

    def survey(self, merged: Tensor, delta: Tensor, out: Tensor, gains: Tensor | None = None) -> Flags:
        """Write the candidates of one tile, and flag where other base values may merge to the same.

        A candidate is round_storage(merged - delta), or round_storage(round_work(merged / gain) - delta), as
        `TileKernel.subtract` has it, but the largest finite value where that overflows.

        Args:
            merged: A flat tile of results, in their storage dtype, finite.
            delta: The deltas, in the working type, every zero +0.0.
            out: Where the candidates go, in the storage dtype of the base. It shares no memory with the
                others.
            gains: What each sum was multiplied by, in the working type.

        Returns:
            A flag for each element, perhaps in a buffer that the next call overwrites. An element with
            several preimages that is overlooked (ties between subnormals in bytes) only costs space later.
        """
        difference = self._loaded(merged)
        if gains is not None:
            torch.div(difference, gains, out=difference)
        torch.sub(difference, delta, out=difference)
        if gains is not None:
            self._store(bounded(difference, self.base), out)
            return self._survey_results(merged, out, delta, gains)
        self._store(difference.clamp_(-self._largest, self._largest), out)
        if self.base != self.merged:
            return self._survey_spacings(merged, out)
        if self.base == torch.float64:
            return self._survey_neighbours(bits_view(merged), bits_view(out), _map(delta.numpy(), None))
        return self._survey_patterns(bits_view(merged), bits_view(out), bits_view(difference))

    def _loaded(self, stored: Tensor) -> Tensor:
        """Return a tile in the working type, in the buffer; beyond the finite values infinity."""
        values = self._difference[: stored.numel()]
        if stored.dtype.itemsize == 1:
            patterns = bits_view(stored).view(np.uint8)
            by_pattern(stored.dtype, self.work).take(patterns, out=values.numpy(), mode="clip")
        else:
            values.copy_(stored)
        return values

    def _store(self, values: Tensor, out: Tensor) -> None:
        """Round a tile that fits into `out`."""
        if self.work == torch.float64 and out.dtype.itemsize <= 2:
            cast(values, out)
        else:
            out.copy_(values)

    def _survey_patterns(self, merged: Bits, candidate: Bits, difference: Bits) -> Flags:
        """Flag by comparing patterns, which is quick where both dtypes are one.

        The sums that round to m span one spacing of m. They hold several base values where those are spaced
        more narrowly: in a lower binade than m, or at the lower end of its own. Spaced alike, they hold two
        only if they begin and end at one, and then m - delta is the midpoint of these.
        """
        magnitude, binade = (buffer[: merged.size] for buffer in self._patterns)
        flags, ties = (buffer[: merged.size] for buffer in self._flags)
        finite, fraction = np.iinfo(merged.dtype).max, fraction_bits(self.base)
        np.bitwise_and(candidate, finite, out=magnitude)
        np.bitwise_and(merged, finite >> fraction << fraction, out=binade)
        np.less_equal(magnitude, binade, out=flags)
        if self.base.itemsize > 1:
            # Subnormal ties do not show below. Bytes are left out, many of which may be subnormal.
            flags |= np.less_equal(magnitude, 1 << fraction, out=ties)
        dropped = fraction_bits(self.work) - fraction
        np.bitwise_and(difference, (1 << dropped) - 1, out=difference)
        np.equal(difference, 1 << (dropped - 1), out=ties)
        flags |= ties
        return flags

    def _survey_spacings(self, merged: Tensor, candidate: Tensor) -> Flags:
        """Flag where base values are spaced as widely as results or more narrowly, for any two dtypes.

        With some spaced twice as widely among them, so that none that ties is missing.
        """
        least = torch.finfo(self.merged).smallest_normal
        ratio = 2.0 ** (1 + fraction_bits(self.base) - fraction_bits(self.merged))
        widest = merged.to(self.work, copy=True).abs_().clamp_(min=least).mul_(ratio)
        magnitude = candidate.to(self.work, copy=True).abs_()
        flags: Flags = magnitude.numpy() <= widest.numpy()
        return flags

    def _survey_neighbours(self, merged: Bits, candidate: Bits, change: _Map) -> Flags:
        """Flag by trying the candidate's neighbours: right for any map, and for float64, where ties are common."""
        edges = edges_of(merged, self.merged, self.work)
        keys = to_ordered(candidate)
        one = keys.dtype.type(1)
        flags = self._reached(keys - one, change, edges.least)
        flags |= ~self._reached(keys + one, change, edges.beyond)
        return flags

    def _survey_results(self, merged: Tensor, candidate: Tensor, delta: Tensor, gains: Tensor) -> Flags:
        """Flag where a neighbour of the candidate merges to the same result, and at zeros, which have each other."""
        bits, results = bits_view(candidate), bits_view(merged)
        neighbour = self._patterns[0][: bits.size]
        stored, found = torch.from_numpy(neighbour).view(self.base), self._results[: bits.size]
        flags, same = (buffer[: bits.size] for buffer in self._flags)
        np.bitwise_and(bits, np.iinfo(bits.dtype).max, out=neighbour)
        np.equal(neighbour, 0, out=flags)
        for step in (1, -1):
            np.add(bits, step, out=neighbour)
            values = self._loaded(stored)
            torch.add(values, delta, out=values)
            torch.mul(values, gains, out=values)
            self._store(bounded(values, self.merged), found)
            np.equal(bits_view(found), results, out=same)
            flags |= same
        return flags

    def intervals(self, merged: Bits, delta: Values, gains: Values | None = None) -> Intervals:
        """Return the base values that merge to each result.

        Args:
            merged: Patterns of results, finite, in any number.
            delta: The delta of each, in the working type, every zero +0.0.
            gains: What each sum was multiplied by, in the working type.

        Returns:
            The exact intervals. Of a result that no base value merges to the numbers mean nothing, but each
            is a possible key.
        """
        if gains is not None:
            merged = np.where(np.signbit(gains), merged ^ np.iinfo(merged.dtype).min, merged)
        change = _map(delta, gains)
        edges = edges_of(merged, self.merged, self.work)
        first = self._first(edges.least, change)
        end = self._first(edges.beyond, change)
        spare: Counts = (end - first).view(f"u{end.itemsize}")
        spare -= spare > 0
        return Intervals(first, spare)

    def _first(self, threshold: Values, change: _Map) -> Bits:
        """Return the lowest key whose result is at least `threshold`; one beyond the largest if there is none."""
        guess = self._guess(threshold, change, closely=self.base == self.work)
        reached = self._reached(guess, change, threshold)
        first: Bits = guess + ~reached
        # `first` and the key below it are the guess and another. One must reach the threshold, one must not.
        other: Bits = first - reached
        proven = self._reached(other, change, threshold) ^ reached
        if not proven.all():
            at = np.flatnonzero(~proven)
            first[at] = self._search(threshold[at], change.at(at))
        return first

    def _guess(self, threshold: Values, change: _Map, *, closely: bool) -> Bits:
        """Return the key of a base value near to where results begin to reach the threshold; it may be infinite.

        They do so from the middle between the threshold and the number below on, not from itself. That
        matters where the base is spaced as narrowly as the working type, or nearly cancels.
        """
        with np.errstate(all="ignore"):
            values = change.back(threshold)
            if closely:
                values -= (threshold - stepped(threshold, -1)) / 2
        return to_ordered(bits_view(torch.from_numpy(values).to(self.base)))

    def _reached(self, keys: Bits, change: _Map, threshold: Values) -> Flags:
        """Return whether what base values become is at least `threshold`: all there is of f."""
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            values = change.ahead(values_at(keys, self.base, self.work))
            reached: Flags = values >= threshold
        # As a number -0.0 is not below +0.0, as a result it is.
        zeros = np.flatnonzero(threshold.view(f"i{threshold.itemsize}") == 0)
        reached[zeros] &= ~np.signbit(values[zeros])
        return reached

    def _search(self, threshold: Values, change: _Map) -> Bits:
        """Return what `_first` does, by bisection, which gallops away from a closer guess until it can halve."""
        near = self._guess(threshold, change, closely=True)
        low, high = np.full_like(near, ~self._top - 1), np.full_like(near, self._top + 1)
        first, at, reach, one = high.copy(), np.arange(near.size), 2, near.dtype.type(1)
        while at.size:
            anchor = np.maximum(np.minimum(near[at], self._top - reach), ~self._top + reach)
            middle = (low & high) + ((low ^ high) >> 1)
            probe = np.maximum(np.minimum(middle, anchor + reach), anchor - reach)
            probe = np.maximum(np.minimum(probe, high - one), low + one)
            reached = self._reached(probe, change.at(at), threshold[at])
            low, high = np.where(reached, low, probe), np.where(reached, probe, high)
            first[at] = high
            open_ = np.flatnonzero(high - low != 1)
            at, low, high = at[open_], low[open_], high[open_]
            reach = min(16 * reach, self._top)
        return first


def _map(delta: Values, gains: Values | None) -> _Map:
    return _Map(0 - delta, None if gains is None else np.abs(gains))
