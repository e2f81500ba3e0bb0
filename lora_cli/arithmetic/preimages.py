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
a positive factor for each row is as monotone: it would multiply in the first, divide in the second, and be
surveyed by `_survey_neighbours`, which tries f itself.
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
from lora_cli.arithmetic.rounding import cast, work_dtype

Counts = NDArray[np.unsignedinteger[Any]]


class Intervals(NamedTuple):
    """Runs of base values, each in the order of the line.

    Attributes:
        first: The key of the lowest one.
        spare: How many follow it, as an unsigned number of the keys' width.
    """

    first: Bits
    spare: Counts


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
        self._patterns = tuple(np.empty(elements, f"i{base.itemsize}") for _ in range(2))
        self._flags = tuple(np.empty(elements, np.bool_) for _ in range(2))

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
            A flag for each element, perhaps in a buffer that the next call overwrites. An element with
            several preimages that is overlooked (ties between subnormals in bytes) only costs space later.
        """
        difference = self._difference[: merged.numel()]
        if merged.dtype.itemsize == 1:
            patterns = bits_view(merged).view(np.uint8)
            by_pattern(merged.dtype, self.work).take(patterns, out=difference.numpy(), mode="clip")
        else:
            difference.copy_(merged)
        torch.sub(difference, delta, out=difference).clamp_(-self._largest, self._largest)
        if self.work == torch.float64 and self.base.itemsize <= 2:
            cast(difference, out)
        else:
            out.copy_(difference)
        if self.base != self.merged:
            return self._survey_spacings(merged, out)
        if self.base == torch.float64:
            return self._survey_neighbours(bits_view(merged), bits_view(out), delta.numpy())
        return self._survey_patterns(bits_view(merged), bits_view(out), bits_view(difference))

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

    def _survey_neighbours(self, merged: Bits, candidate: Bits, delta: Values) -> Flags:
        """Flag by trying the candidate's neighbours: right for any map, and for float64, where ties are common."""
        edges = edges_of(merged, self.merged, self.work)
        keys = to_ordered(candidate)
        one = keys.dtype.type(1)
        flags = self._reached(keys - one, delta, edges.least)
        flags |= ~self._reached(keys + one, delta, edges.beyond)
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
        edges = edges_of(merged, self.merged, self.work)
        first = self._first(edges.least, delta)
        end = self._first(edges.beyond, delta)
        _part_zeros(first, end, merged, delta)
        spare: Counts = (end - first).view(f"u{end.itemsize}")
        spare -= spare > 0
        return Intervals(first, spare)

    def _first(self, threshold: Values, delta: Values) -> Bits:
        """Return the lowest key whose sum is at least `threshold`; one beyond the largest if there is none."""
        guess = self._guess(threshold, delta, closely=self.base == self.work)
        reached = self._reached(guess, delta, threshold)
        first: Bits = guess + ~reached
        # `first` and the key below it are the guess and another. One must reach the threshold, one must not.
        other: Bits = first - reached
        proven = self._reached(other, delta, threshold) ^ reached
        if not proven.all():
            at = np.flatnonzero(~proven)
            first[at] = self._search(threshold[at], delta[at])
        return first

    def _guess(self, threshold: Values, delta: Values, *, closely: bool) -> Bits:
        """Return the key of a base value near to where sums begin to reach the threshold; it may be infinite.

        They do so from the middle between the threshold and the number below on, not from itself. That
        matters where the base is spaced as narrowly as the working type, or nearly cancels.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            values = threshold - delta
            if closely:
                values -= (threshold - stepped(threshold, -1)) / 2
        return to_ordered(bits_view(torch.from_numpy(values).to(self.base)))

    def _reached(self, keys: Bits, delta: Values, threshold: Values) -> Flags:
        """Return whether the sums of base values and deltas are at least `threshold`: all there is of f."""
        with np.errstate(over="ignore", invalid="ignore"):
            sums = values_at(keys, self.base, self.work)
            sums += delta
            reached: Flags = sums >= threshold
        return reached

    def _search(self, threshold: Values, delta: Values) -> Bits:
        """Return what `_first` does, by bisection, which gallops away from a closer guess until it can halve."""
        near = self._guess(threshold, delta, closely=True)
        low, high = np.full_like(near, ~self._top - 1), np.full_like(near, self._top + 1)
        first, at, reach, one = high.copy(), np.arange(near.size), 2, near.dtype.type(1)
        while at.size:
            anchor = np.maximum(np.minimum(near[at], self._top - reach), ~self._top + reach)
            middle = (low & high) + ((low ^ high) >> 1)
            probe = np.maximum(np.minimum(middle, anchor + reach), anchor - reach)
            probe = np.maximum(np.minimum(probe, high - one), low + one)
            reached = self._reached(probe, delta[at], threshold[at])
            low, high = np.where(reached, low, probe), np.where(reached, probe, high)
            first[at] = high
            open_ = np.flatnonzero(high - low != 1)
            at, low, high = at[open_], low[open_], high[open_]
            reach = min(16 * reach, self._top)
        return first


def _part_zeros(first: Bits, end: Bits, merged: Bits, delta: Values) -> None:
    """Where nothing was added each zero kept its sign, which comparing sums as numbers does not see."""
    unchanged = np.flatnonzero(delta == 0)
    results = merged[unchanged]
    first[unchanged[results == 0]] = 0
    end[unchanged[results == np.iinfo(merged.dtype).min]] = 0
