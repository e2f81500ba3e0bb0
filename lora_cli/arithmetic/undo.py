"""Exact undo of one block of elements: what its merge forgot, as bytes, and the base's bits again from them.

The reader of a stream has the merged values and computes the same deltas. From these it knows the candidate
of each element, which elements may have several preimages, and the interval of each of those; the stream
says which one it was. The writer has the base, and takes nothing on trust: it compares every other
candidate with the base, checks every index against its interval, and writes out what does not agree. So a
survey that overlooks something costs bytes, never bits.

Threads that encode and decode must not flush subnormal numbers to zero, as those that merge
(`rounding.check_flush_to_zero`).

The dtype may change in the merge. The intervals are then of the base's values, their edges the result's.
To a wider dtype hardly anything is forgotten. From float32 to bfloat16 every element has some 2^16
preimages, and its index is as long as what was cut off.

Sums may have been multiplied by gains. The stream does not say so: whoever keeps it knows that there are gains, as
it knows the deltas. What is flagged and which intervals there are then follows from (m, delta, g) alone, in the
same way on every machine, and is as much a part of the format as it is without.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_cli.arithmetic.edges import Flags
from lora_cli.arithmetic.floats import dtype_name
from lora_cli.arithmetic.ordered import Bits, bits_view, from_ordered, to_ordered
from lora_cli.arithmetic.packing import (
    MAX_ELEMENTS,
    Buffer,
    Exceptions,
    Positions,
    decode_choices,
    encode_choices,
    read_stream,
    stream_lengths,
    write_stream,
)
from lora_cli.arithmetic.preimages import Counts, Intervals, Preimages
from lora_cli.errors import ShapeError, UsageError

#: Elements that are surveyed at once, and suspects whose intervals are computed at once: they stay in a
#: core's own cache.
_TILE = 1 << 16
_BATCH = 1 << 17

# Part of the format: a number is never given to another dtype.
_CODES = {
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float32: 3,
    torch.float64: 4,
    torch.float8_e4m3fn: 5,
    torch.float8_e5m2: 6,
}
# Kind → bytes of the base's patterns.
_WIDTHS = {base << 8 | merged: dtype.itemsize for dtype, base in _CODES.items() for merged in _CODES.values()}


def encode(base: Tensor, merged: Tensor, delta: Tensor, gains: Tensor | None = None) -> bytes:
    """Return what decoding needs to make the base's bits from the merged values, the deltas and the gains.

    Args:
        base: A contiguous block of base values, of any shape. Whatever they are, they come back; those that
            do not merge to what is there cost their own bytes and four more each.
        merged: What merging the deltas made of them, in the storage dtype of the output.
        delta: The deltas in the working type, every zero +0.0, as `TileKernel.delta` gives them.
        gains: What each sum was multiplied by, one for each element, in the working type. None is not the
            same as ones: the values merged are, but not the stream.

    Returns:
        A stream as `packing` describes. Equal arguments give equal bytes on every machine.

    Raises:
        ShapeError: The tensors differ in shape, one is not contiguous, or the block is too large.
        UsageError: Deltas or gains are not in the working type, or only a part of a block has gains.
        UnsupportedError: A dtype cannot take a delta.
    """
    encoder = Encoder(base.dtype, merged.dtype)
    encoder.add(base, merged, delta, gains)
    return encoder.finish()


class Encoder:
    """Encodes one block run by run, each of them while its elements are in a core's own cache.

    Args:
        base: The storage dtype of the base.
        merged: That of the output.
    """

    def __init__(self, base: torch.dtype, merged: torch.dtype) -> None:
        self._block = _Block(base, merged)
        self._base: list[Bits] = []
        self._overlooked: list[Positions] = []
        self._patterns: list[Bits] = []

    def add(self, base: Tensor, merged: Tensor, delta: Tensor, gains: Tensor | None = None) -> None:
        """Take the next run of elements of the block. Arguments and errors are those of `encode`."""
        _check(base, merged, delta, gains)
        bits = bits_view(base.view(-1))
        candidates = torch.empty(min(base.numel(), _TILE), dtype=base.dtype)
        begin = self._block.elements
        surveys = self._block.surveys(merged, delta, gains, lambda tile: candidates[: tile.stop - tile.start])
        for tile, candidate, flags, at in surveys:
            here = bits[tile]
            self._base.append(here[at])
            wrong = bits_view(candidate) != here
            np.greater(wrong, flags, out=wrong)
            if wrong.any():
                places = np.flatnonzero(wrong)
                self._overlooked.append(places + (begin + tile.start))
                self._patterns.append(here[places])

    def finish(self) -> bytes:
        """Return the stream of the block."""
        suspects, intervals = self._block.suspects()
        nothing = bits_view(torch.empty(0, dtype=self._block.base))
        patterns = np.concatenate([nothing, *self._base])
        keys = to_ordered(patterns)
        outside = np.flatnonzero((keys - intervals.first).view(intervals.spare.dtype) > intervals.spare)
        positions = np.concatenate([*self._overlooked, suspects[outside]])
        order = np.argsort(positions)
        exceptions = Exceptions(positions[order], np.concatenate([nothing, *self._patterns, patterns[outside]])[order])
        keys[outside] = intervals.first[outside]
        return write_stream(self._block.kind, self._block.elements, encode_choices(keys, intervals), exceptions)


def decode(merged: Tensor, delta: Tensor, stream: Buffer, out: Tensor, gains: Tensor | None = None) -> Tensor:
    """Write the base's own bits into `out`.

    Args:
        merged: The block of merged values, as it was encoded.
        delta: Its deltas, bit for bit as they were.
        stream: What `encode` returned.
        out: Where the base values go, in their storage dtype; contiguous, in memory of its own.
        gains: Its gains, bit for bit as they were, if it had any.

    Returns:
        `out`. It is the base if merged values, deltas and gains are those that were encoded: that they are not
        cannot always be seen here.

    Raises:
        MalformedFileError: The stream is damaged, or belongs to other data. `out` is then of no use.
        ShapeError: As in `encode`.
        UsageError: As in `encode`.
        UnsupportedError: As in `encode`.
    """
    block = _Block(out.dtype, merged.dtype)
    _check(out, merged, delta, gains)
    values = out.view(-1)
    bits = bits_view(values)
    choices, exceptions = read_stream(stream, block.kind, bits.size, bits.dtype)
    for _ in block.surveys(merged, delta, gains, lambda tile: values[tile]):
        pass
    suspects, intervals = block.suspects()
    bits[suspects] = from_ordered(decode_choices(choices, intervals))
    bits[exceptions.positions] = exceptions.patterns
    return out


def lengths(stream: Buffer) -> tuple[int, int]:
    """Return how many bytes of a stream are worth compressing, and how many after them are noise.

    Args:
        stream: A stream, or anything that begins with its header.

    Raises:
        MalformedFileError: No stream begins like this. One that does may still be damaged.
    """
    return stream_lengths(stream, _WIDTHS)


class _Tools(threading.local):
    """What each thread keeps between blocks: the inverse of each merge that it has met, with its buffers."""

    def __init__(self) -> None:
        self._preimages: dict[tuple[torch.dtype, torch.dtype, int], Preimages] = {}

    def preimages(self, base: torch.dtype, merged: torch.dtype, elements: int) -> Preimages:
        if (base, merged, elements) not in self._preimages:
            self._preimages[base, merged, elements] = Preimages(base, merged, elements)
        return self._preimages[base, merged, elements]


_TOOLS = _Tools()


class _Block:
    """A block whose suspects are found tile by tile, and their intervals batch by batch, within the cache."""

    def __init__(self, base: torch.dtype, merged: torch.dtype) -> None:
        self._preimages = _TOOLS.preimages(base, merged, _TILE)
        self.base = base
        self.kind = _CODES[base] << 8 | _CODES[merged]
        self.elements = 0
        self._gained: bool | None = None
        self._waiting = 0
        self._pending: list[tuple[NDArray[Any], ...]] = []
        none = bits_view(torch.empty(0, dtype=base))
        nowhere: Positions = np.empty(0, np.int64)
        self._found: list[tuple[Positions, Bits, Counts]] = [(nowhere, none, none.view(f"u{base.itemsize}"))]

    def surveys(
        self, merged: Tensor, delta: Tensor, gains: Tensor | None, out: Callable[[slice], Tensor]
    ) -> Iterator[tuple[slice, Tensor, Flags, Positions]]:
        """Survey the next run of elements tile by tile, writing the candidates where `out` says.

        Yields:
            The tile within the run, its candidates, flags, and where in the tile these are set.
        """
        self._take_kind(delta, gains)
        merged, maps = merged.view(-1), [numbers.view(-1) for numbers in (delta, gains) if numbers is not None]
        bits = bits_view(merged)
        begin, self.elements = self.elements, self.elements + bits.size
        if self.elements > MAX_ELEMENTS:
            raise ShapeError("The block is too large", expected=f"at most {MAX_ELEMENTS}", found=self.elements)
        for start in range(0, bits.size, _TILE):
            tile = slice(start, min(start + _TILE, bits.size))
            candidate, here = out(tile), [numbers[tile] for numbers in maps]
            flags = self._preimages.survey(merged[tile], here[0], candidate, *here[1:])
            at = _where(flags)
            yield tile, candidate, flags, at
            self._pending.append((at + (begin + start), bits[tile][at], *(numbers.numpy()[at] for numbers in here)))
            self._waiting += at.size
            if self._waiting >= _BATCH:
                self._settle()

    def suspects(self) -> tuple[Positions, Intervals]:
        """Return where the flagged elements are, and their intervals."""
        self._settle()
        positions, first, spare = (np.concatenate(column) for column in zip(*self._found, strict=True))
        return positions, Intervals(first, spare)

    def _take_kind(self, delta: Tensor, gains: Tensor | None) -> None:
        for what, numbers in (("deltas", delta), ("gains", gains)):
            if numbers is not None and numbers.dtype != self._preimages.work:
                work, found = dtype_name(self._preimages.work), dtype_name(numbers.dtype)
                raise UsageError(f"The {what} are not in the working type", expected=work, found=found)
        if self._gained not in (None, gains is not None):
            raise UsageError("A block has a gain for each of its elements, or for none")
        self._gained = gains is not None

    def _settle(self) -> None:
        if not self._pending:
            return
        positions, *columns = (np.concatenate(column) for column in zip(*self._pending, strict=True))
        self._pending.clear()
        self._waiting = 0
        self._found.append((positions, *self._preimages.intervals(*columns)))


def _where(flags: Flags) -> Positions:
    """Return the positions of flags that are set, as `numpy.flatnonzero` does.

    numpy's way to find few flags costs a mispredicted branch each, up to a tenth of all. From a twentieth on
    look for words of eight flags first, which are more than a tenth, and then in these.
    """
    if flags.size % 8 or not flags.size // 20 < np.count_nonzero(flags) <= flags.size // 10:
        return np.flatnonzero(flags)
    words = flags.view(np.uint64)
    taken = np.flatnonzero(words != 0)
    within = np.flatnonzero(words[taken].view(np.bool_))
    at: Positions = taken[within >> 3]
    at <<= 3
    within &= 7
    at += within
    return at


def _check(base: Tensor, merged: Tensor, delta: Tensor, gains: Tensor | None) -> None:
    others = [tensor for tensor in (merged, delta, gains) if tensor is not None]
    if any(tensor.shape != base.shape for tensor in others):
        shapes = " and ".join(str(tuple(tensor.shape)) for tensor in others)
        raise ShapeError("The tensors of a block differ in shape", expected=tuple(base.shape), found=shapes)
    if not all(tensor.is_contiguous() for tensor in (base, *others)):
        raise ShapeError("The tensors of a block must be contiguous")
