"""The bytes of an undo stream: which value of its interval each element was, in as many bits as that takes.

Writer and reader know the intervals, so what is stored for an element is its place in one: an index of
bit_length(spare) bits, none where the interval holds one value. Indices go bit plane by bit plane: bit j of
all elements that have one, in their order. Nearly all intervals hold two to four values, and whole bits
cost about a hundredth more than the logarithm of the count.

**The zero code.** Weights that were pruned are zeros, and sit in wide intervals around zero. Where an
interval reaches zero and holds three values or more, a flag says whether the weight was ±0. If it was, its
sign follows, else its index. Where it holds the two zeros alone, the sign is all there is to say. That costs
dense weights next to nothing, and in pruned ones leaves runs of equal bits for a general compressor.

A stream is little-endian, the first bit of a byte its lowest, and has five parts. The three in the middle
are worth compressing. The last, mostly the bulk, is noise.

    header         version and kind (u2 each), then u4: elements, flags, signs, exceptions, bytes of the last
                   part, CRC-32 of all else
    zero flags     one bit for each interval that reaches zero and holds three values or more
    zero signs     one bit for each flag that is set and each pair of zeros, in order; set where it was -0.0
    exceptions     positions in the block (u4, rising), then their patterns: elements that the rules get wrong
    index planes   each plane padded with zeros to whole bytes

How long each part must be follows from (m, delta) and from the parts before it, and is checked on reading.
Streams of this version are read forever.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_cli.arithmetic.edges import Flags
from lora_cli.arithmetic.ordered import Bits
from lora_cli.arithmetic.preimages import Counts, Intervals
from lora_cli.errors import MalformedFileError

VERSION = 1

#: A block has at most so many elements, so that all lengths fit in 32 bits.
MAX_ELEMENTS = 1 << 28

Buffer = bytes | bytearray | memoryview
Bytes = NDArray[np.uint8]
Positions = NDArray[np.integer[Any]]

_HEADER = struct.Struct("<HHIIIII")
_CHECKSUM = struct.Struct("<I")
HEADER_BYTES = _HEADER.size + _CHECKSUM.size


class Exceptions(NamedTuple):
    """Elements whose value is written out.

    Attributes:
        positions: Where in the block, rising.
        patterns: The base's own bits.
    """

    positions: Positions
    patterns: Bits


@dataclass(frozen=True, slots=True)
class Choices:
    """Coded places in intervals: the parts of a stream that depend on them.

    Attributes:
        questions: How many intervals may or may not have been a zero.
        zeros: How many elements are known to have been one.
        flags: A bit for each of the first.
        signs: A bit for each of the second.
        planes: The index planes of all others.
    """

    questions: int
    zeros: int
    flags: Bytes
    signs: Bytes
    planes: Bytes


def encode_choices(keys: Bits, intervals: Intervals) -> Choices:
    """Code which value of its interval each element is.

    Args:
        keys: The keys of the values. Each lies in its interval.
        intervals: Their intervals.
    """
    at, zero = _near_zero(intervals)
    found = keys[at]
    flags = ((found == 0) | (found == -1))[~zero]
    zero[~zero] = flags
    zeros = at[zero]
    index = (keys - intervals.first).view(intervals.spare.dtype)
    planes = _encode_planes(index, _without(intervals.spare, zeros))
    return Choices(flags.size, zeros.size, _pack(flags), _pack(keys[zeros] < 0), planes)


def decode_choices(choices: Choices, intervals: Intervals) -> Bits:
    """Return the keys that were coded.

    Raises:
        MalformedFileError: The parts are not those of these intervals.
    """
    at, zero = _near_zero(intervals)
    _expect("questions", int(np.count_nonzero(~zero)), choices.questions)
    zero[~zero] = _unpack(choices.flags, choices.questions).view(np.bool_)
    zeros = at[zero]
    _expect("zeros", zeros.size, choices.zeros)
    signs = _unpack(choices.signs, zeros.size)
    index = _decode_planes(choices.planes, _without(intervals.spare, zeros))
    keys: Bits = index.view(intervals.first.dtype)
    keys += intervals.first
    keys[zeros] = -signs.view(np.int8)
    outside = int(np.count_nonzero((keys - intervals.first).view(index.dtype) > intervals.spare))
    _expect("values outside of their intervals", 0, outside)
    return keys


def _near_zero(intervals: Intervals) -> tuple[Positions, Flags]:
    """Return which intervals have the zero code, and of each whether it holds both zeros and nothing else."""
    first, spare = intervals
    last = first + spare.view(first.dtype)
    pair = (spare == 1) & (first == -1)
    at = np.flatnonzero((spare > 1) & (first <= 0) & (last >= -1) | pair)
    return at, pair[at]


def _without(spare: Counts, zeros: Positions) -> Counts:
    """Return the numbers with 0 at some positions: nothing more is to be said of these."""
    if zeros.size:
        spare = spare.copy()
        spare[zeros] = 0
    return spare


def _encode_planes(index: Counts, spare: Counts) -> Bytes:
    planes = [np.empty(0, np.uint8)]
    alive = np.flatnonzero(spare != 0)
    while alive.size:
        index, spare = index[alive], spare[alive]
        planes.append(_pack((index & 1).astype(np.bool_)))
        index >>= 1
        spare >>= 1
        alive = np.flatnonzero(spare != 0)
    return np.concatenate(planes)


def _decode_planes(planes: Bytes, spare: Counts) -> Counts:
    index = np.zeros_like(spare)
    alive = np.flatnonzero(spare != 0)
    left = spare[alive]
    start = bit = 0
    while alive.size:
        end = start + _bytes_for(alive.size)
        index[alive] |= _unpack(planes[start:end], alive.size).astype(index.dtype) << bit
        left >>= 1
        more = np.flatnonzero(left != 0)
        alive, left = alive[more], left[more]
        start, bit = end, bit + 1
    _expect("bytes of index planes", start, planes.size)
    return index


def write_stream(kind: int, elements: int, choices: Choices, exceptions: Exceptions) -> bytes:
    """Put the parts of a block's stream together.

    Args:
        kind: Which dtypes the block is about, below 2^16.
        elements: How many elements the block has, at most `MAX_ELEMENTS`.
        choices: What was coded.
        exceptions: What could not be.
    """
    positions, patterns = exceptions
    counts = (choices.questions, choices.zeros, positions.size, choices.planes.size)
    header = _HEADER.pack(VERSION, kind, elements, *counts)
    parts = (choices.flags, choices.signs, positions.astype("<u4"), patterns, choices.planes)
    content = b"".join(part.tobytes() for part in parts)
    return header + _CHECKSUM.pack(_checksum(header, content)) + content


def read_stream(data: Buffer, kind: int, elements: int, pattern: np.dtype[Any]) -> tuple[Choices, Exceptions]:
    """Take a block's stream apart, without copying.

    Args:
        data: The stream.
        kind: What it was written with.
        elements: How many elements the block has.
        pattern: The integer type of the base's patterns.

    Raises:
        MalformedFileError: It is damaged, of another version, or of another block.
    """
    view = memoryview(data).cast("B")
    *declared, questions, zeros, exceptions, planes = _numbers(view)
    _expect("kind and elements", [kind, elements], declared)
    lengths = (_bytes_for(questions), _bytes_for(zeros), 4 * exceptions, pattern.itemsize * exceptions, planes)
    _expect("its length", HEADER_BYTES + sum(lengths), len(view))
    checksum = _checksum(view[: _HEADER.size], view[HEADER_BYTES:])
    _expect("the checksum", checksum, _CHECKSUM.unpack_from(view, _HEADER.size)[0])
    ends = list(accumulate(lengths, initial=HEADER_BYTES))
    parts = [np.frombuffer(view, np.uint8)[start:end] for start, end in pairwise(ends)]
    choices = Choices(questions, zeros, parts[0], parts[1], parts[4])
    return choices, Exceptions(_positions(parts[2].view("<u4"), elements), parts[3].view(pattern))


def stream_lengths(data: Buffer, widths: Mapping[int, int]) -> tuple[int, int]:
    """Return how many bytes of a stream come before the index planes, and how many these have, by its header alone.

    Args:
        data: A stream, or anything that begins with its header.
        widths: Kind → bytes of a pattern of the base.

    Raises:
        MalformedFileError: No stream begins like this. One that does may still be damaged.
    """
    kind, elements, flags, signs, exceptions, planes = _numbers(memoryview(data).cast("B"))
    width = widths.get(kind, 0)
    # An index has no more bits than its element, and each plane less than a byte of padding.
    most = 8 * width * _bytes_for(elements)
    if not width or elements > MAX_ELEMENTS or max(flags, signs, exceptions) > elements or planes > most:
        raise _malformed("the header of a block", (kind, elements, flags, signs, exceptions, planes))
    return HEADER_BYTES + _bytes_for(flags) + _bytes_for(signs) + (4 + width) * exceptions, planes


def _numbers(view: memoryview) -> tuple[int, ...]:
    """Return what the header of a stream says after its version."""
    if len(view) < HEADER_BYTES:
        raise _malformed(f"a stream's header of {HEADER_BYTES} bytes", f"{len(view)} bytes")
    version, *numbers = _HEADER.unpack_from(view)
    _expect("the version", VERSION, version)
    return tuple(numbers)


def _positions(positions: Positions, elements: int) -> Positions:
    if positions.size and not (int(positions[-1]) < elements and bool((positions[1:] > positions[:-1]).all())):
        raise _malformed(f"rising positions below {elements}", "others")
    return positions


def _checksum(header: Buffer, content: Buffer) -> int:
    return zlib.crc32(content, zlib.crc32(header))


def _pack(bits: Flags) -> Bytes:
    return np.packbits(bits, bitorder="little")


def _unpack(data: Bytes, count: int) -> Bytes:
    """Return `count` zeros and ones."""
    _expect(f"bytes for {count} bits", _bytes_for(count), data.size)
    if count % 8 and int(data[-1]) >> count % 8:
        raise _malformed("zeros after the last bit", hex(int(data[-1])))
    return np.unpackbits(data, count=count, bitorder="little")


def _bytes_for(bits: int) -> int:
    return (bits + 7) // 8


def _expect(what: str, expected: object, found: object) -> None:
    if expected != found:
        raise _malformed(f"{what}: {expected}", found)


def _malformed(expected: str, found: object) -> MalformedFileError:
    return MalformedFileError("An undo stream is damaged, or belongs to other data", expected=expected, found=found)
