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
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from lora_cli.arithmetic.edges import Flags, Values
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


def encode(base: Tensor, merged: Tensor, delta: Tensor) -> bytes:
    """Return what decoding needs to make the base's bits from the merged values and the deltas.

    Args:
        base: A contiguous block of base values, of any shape. Whatever they are, they come back; those that
            do not merge to what is there cost their own bytes and four more each.
        merged: What merging the deltas made of them, in the storage dtype of the output.
        delta: The deltas in the working type, every zero +0.0, as `TileKernel.delta` gives them.

    Returns:
        A stream as `packing` describes. Equal arguments give equal bytes on every machine.

    Raises:
        ShapeError: The three differ in shape, one is not contiguous, or the block is too large.
        UsageError: The deltas are not in the working type.
        UnsupportedError: A dtype cannot take a delta.
    """
    block = _Block(base, merged, delta)
    bits = bits_view(base.view(-1))
    candidates = torch.empty(min(base.numel(), _TILE), dtype=base.dtype)
    overlooked = [np.empty(0, np.int64)]
    for tile, candidate, flags in block.surveys(lambda tile: candidates[: tile.stop - tile.start]):
        wrong = bits_view(candidate) != bits[tile]
        np.greater(wrong, flags, out=wrong)
        if wrong.any():
            overlooked.append(np.flatnonzero(wrong) + tile.start)
    suspects, intervals = block.suspects()
    keys = to_ordered(bits[suspects])
    outside = np.flatnonzero((keys - intervals.first).view(intervals.spare.dtype) > intervals.spare)
    keys[outside] = intervals.first[outside]
    positions = np.sort(np.concatenate([*overlooked, suspects[outside]]))
    exceptions = Exceptions(positions, bits[positions])
    return write_stream(block.kind, bits.size, encode_choices(keys, intervals), exceptions)


def decode(merged: Tensor, delta: Tensor, stream: Buffer, out: Tensor) -> Tensor:
    """Write the base's own bits into `out`.

    Args:
        merged: The block of merged values, as it was encoded.
        delta: Its deltas, bit for bit as they were.
        stream: What `encode` returned.
        out: Where the base values go, in their storage dtype; contiguous, in memory of its own.

    Returns:
        `out`. It is the base if merged values and deltas are those that were encoded: that they are not
        cannot always be seen here.

    Raises:
        MalformedFileError: The stream is damaged, or belongs to other data. `out` is then of no use.
        ShapeError: As in `encode`.
        UsageError: As in `encode`.
        UnsupportedError: As in `encode`.
    """
    block = _Block(out, merged, delta)
    values = out.view(-1)
    bits = bits_view(values)
    choices, exceptions = read_stream(stream, block.kind, bits.size, bits.dtype)
    for _ in block.surveys(lambda tile: values[tile]):
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
        self.preimages: dict[tuple[torch.dtype, torch.dtype], Preimages] = {}

    def of(self, base: torch.dtype, merged: torch.dtype) -> Preimages:
        if (base, merged) not in self.preimages:
            self.preimages[base, merged] = Preimages(base, merged, _TILE)
        return self.preimages[base, merged]


_TOOLS = _Tools()


class _Block:
    """A block whose suspects are found tile by tile, and their intervals batch by batch, within the cache."""

    def __init__(self, base: Tensor, merged: Tensor, delta: Tensor) -> None:
        _check(base, merged, delta)
        self._preimages = _TOOLS.of(base.dtype, merged.dtype)
        self.kind = _CODES[base.dtype] << 8 | _CODES[merged.dtype]
        if delta.dtype != self._preimages.work:
            work = dtype_name(self._preimages.work)
            raise UsageError("The deltas are not in the working type", expected=work, found=dtype_name(delta.dtype))
        self._merged, self._delta = merged.view(-1), delta.view(-1)
        self._bits, self._numbers = bits_view(self._merged), self._delta.numpy()
        self._pending: list[tuple[Positions, Bits, Values]] = []
        self._found: list[tuple[Positions, Bits, Counts]] = []

    def surveys(self, out: Callable[[slice], Tensor]) -> Iterator[tuple[slice, Tensor, Flags]]:
        """Survey tile by tile, writing the candidates where `out` says; yield them with their flags."""
        pending = 0
        for begin in range(0, self._bits.size, _TILE):
            tile = slice(begin, min(begin + _TILE, self._bits.size))
            candidate = out(tile)
            flags = self._preimages.survey(self._merged[tile], self._delta[tile], candidate)
            yield tile, candidate, flags
            at = _where(flags)
            at += begin
            self._pending.append((at, self._bits[at], self._numbers[at]))
            pending += at.size
            if pending >= _BATCH:
                self._settle()
                pending = 0

    def suspects(self) -> tuple[Positions, Intervals]:
        """Return where the flagged elements are, and their intervals."""
        self._settle()
        positions, first, spare = (np.concatenate(column) for column in zip(*self._found, strict=True))
        return positions, Intervals(first, spare)

    def _settle(self) -> None:
        nothing = np.empty(0, np.int64), self._bits[:0], self._numbers[:0]
        columns = zip(nothing, *self._pending, strict=True)
        positions, merged, delta = (np.concatenate(column) for column in columns)
        self._pending.clear()
        self._found.append((positions, *self._preimages.intervals(merged, delta)))


def _where(flags: Flags) -> Positions:
    """Return the positions of flags that are set, as `numpy.flatnonzero` does, in a third of the time.

    numpy's way to find few flags costs a mispredicted branch each, up to a tenth of all. So look for words
    of eight flags first, which are mostly more than a tenth, and then in these.
    """
    if flags.size % 8 or np.count_nonzero(flags) > flags.size // 10:
        return np.flatnonzero(flags)
    words = flags.view(np.uint64)
    taken = np.flatnonzero(words != 0)
    within = np.flatnonzero(words[taken].view(np.bool_))
    at: Positions = taken[within >> 3]
    at <<= 3
    within &= 7
    at += within
    return at


def _check(base: Tensor, merged: Tensor, delta: Tensor) -> None:
    if not base.shape == merged.shape == delta.shape:
        shapes = f"{tuple(merged.shape)} and {tuple(delta.shape)}"
        raise ShapeError("The tensors of a block differ in shape", expected=tuple(base.shape), found=shapes)
    if not (base.is_contiguous() and merged.is_contiguous() and delta.is_contiguous()):
        raise ShapeError("The tensors of a block must be contiguous")
    if base.numel() > MAX_ELEMENTS:
        raise ShapeError("The block is too large", expected=f"at most {MAX_ELEMENTS}", found=base.numel())
