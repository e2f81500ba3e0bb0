"""Exact undo of one block of elements: what its merge forgot, as bytes, and the base's bits again from them.

The reader of a stream has the merged values and computes the same deltas. From these it knows the candidate
of each element, which elements have several preimages, and the interval of each of those; the stream says
which one it was. The writer knows the base, and takes nothing on trust: it compares every candidate with
the base, checks every index against its interval, and lists what does not agree. So a rule of the survey
that is too narrow costs bytes, never bits.

The dtype may change in the merge. Intervals are then of the base's values, and edges those of the result's:
from float32 to bfloat16 every element has some 2^16 preimages, and its index is nearly as long as what the
merge cut off.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lora_cli.arithmetic.ordered import Bits, bits_view, from_ordered, to_ordered
from lora_cli.arithmetic.packing import (
    Buffer,
    Exceptions,
    Positions,
    decode_choices,
    encode_choices,
    read_stream,
    write_stream,
)
from lora_cli.arithmetic.preimages import Preimages, Values

#: Elements that are surveyed at once, so that they stay in a core's own cache.
TILE_ELEMENTS = 1 << 16

# Part of the format: a number is never given to another dtype.
_CODES = {
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float32: 3,
    torch.float64: 4,
    torch.float8_e4m3fn: 5,
    torch.float8_e5m2: 6,
}


class _Suspects(NamedTuple):
    """The flagged elements of a block, in their order."""

    positions: Positions
    merged: Bits
    delta: Values


def encode(base: Tensor, merged: Tensor, delta: Tensor) -> bytes:
    """Return what decoding needs to make the base's bits from the merged values and the deltas.

    Args:
        base: A contiguous block of base values, in any shape. Whatever they are, they come back; what
            merging did not make of them costs six bytes and more an element.
        merged: What merging the deltas made of them, in the storage dtype of the output.
        delta: The deltas in the working type, every zero +0.0, as `TileKernel.delta` gives them.

    Returns:
        A stream as `packing` describes. Equal arguments give equal bytes on every machine.

    Raises:
        ShapeError: The three differ in shape, are not contiguous, or the block is too large.
        UsageError: The deltas are not in the working type.
    """
    base, merged, delta = _flat(base, merged, delta)
    preimages = Preimages(base.dtype, merged.dtype, min(base.numel(), TILE_ELEMENTS))
    candidate = torch.empty(preimages.elements, dtype=base.dtype)
    bits, suspects, missed = bits_view(base), [], []
    for tile in _tiles(base.numel()):
        out = candidate[: tile.stop - tile.start]
        flags = preimages.survey(merged[tile], delta[tile], out)
        suspects.append(_gather(tile, flags, merged, delta))
        wrong = bits_view(out) != bits[tile]
        wrong &= ~flags
        missed.append(np.flatnonzero(wrong) + tile.start)
    found = _joined(suspects)
    intervals = preimages.intervals(found.merged, found.delta)
    keys = to_ordered(bits[found.positions])
    outside = np.flatnonzero((keys - intervals.first).view(intervals.spare.dtype) > intervals.spare)
    keys[outside] = intervals.first[outside]
    positions = np.sort(np.concatenate([*missed, found.positions[outside]]))
    return write_stream(
        _kind(base.dtype, merged.dtype),
        base.numel(),
        encode_choices(keys, intervals),
        Exceptions(positions, bits[positions]),
    )


def decode(merged: Tensor, delta: Tensor, stream: Buffer, out: Tensor) -> Tensor:
    """Write the base's own bits into `out`.

    Args:
        merged: The block of merged values, as it was encoded.
        delta: Its deltas, bit for bit as they were.
        stream: What `encode` returned.
        out: Where the base values go, in their storage dtype; contiguous, in memory of its own.

    Returns:
        `out`. Which is the base if the merged values and deltas are those of the encoder: a stream cannot
        tell in every case that they are not.

    Raises:
        MalformedFileError: The stream is damaged, or belongs to other data; `out` is then of no use.
        ShapeError: As in `encode`.
        UsageError: As in `encode`.
    """
    result, merged, delta = _flat(out, merged, delta)
    kind = _kind(out.dtype, merged.dtype)
    bits = bits_view(result)
    choices, exceptions = read_stream(stream, kind, result.numel(), bits.dtype)
    preimages = Preimages(out.dtype, merged.dtype, min(result.numel(), TILE_ELEMENTS))
    suspects = []
    for tile in _tiles(result.numel()):
        flags = preimages.survey(merged[tile], delta[tile], result[tile])
        suspects.append(_gather(tile, flags, merged, delta))
    found = _joined(suspects)
    keys = decode_choices(choices, preimages.intervals(found.merged, found.delta))
    bits[found.positions] = from_ordered(keys)
    bits[exceptions.positions] = exceptions.patterns
    return out


def _gather(tile, flags, merged, delta) -> _Suspects:
    at = np.flatnonzero(flags)
    return _Suspects(at + tile.start, bits_view(merged)[tile][at], delta.numpy()[tile][at])


def _joined(parts) -> _Suspects:
    return _Suspects(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _tiles(elements: int):
    for begin in range(0, max(elements, 1), TILE_ELEMENTS):
        yield slice(begin, min(begin + TILE_ELEMENTS, elements))


def _kind(base: torch.dtype, merged: torch.dtype) -> int:
    return _CODES[base] << 8 | _CODES[merged]


def _flat(base: Tensor, merged: Tensor, delta: Tensor):
    return base.view(-1), merged.view(-1), delta.view(-1)
