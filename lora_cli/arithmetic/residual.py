"""Exact undo of tensors that are no map per element: how far each value lies from one that is known.

Replaced tensors and rotated ones have no preimages to choose from. What is stored instead is the difference
to a candidate, a tensor that the reader has or computes too: the merged values, or a base that was rotated
back. Whatever the candidate is, every bit comes back; the nearer it is, the more zeros for a compressor.

Floats are told apart on the line of ordered integers (`ordered`), so that neighbours differ by one, at zero
and at powers of two too. Elements of all other dtypes are integers of their width as they are, and those
wider than eight bytes several of these. The difference is taken modulo 2^n and folded: 0, -1, 1, -2, ... to
0, 1, 2, 3, ..., small whatever its sign. Without a candidate the places on the line are folded themselves,
as if the candidate were zeros; of a float that leaves its magnitude, and the sign as the lowest bit.

A stream is little-endian, and all of it is worth compressing:

    header         version (u2), bytes of an integer and line (u1 each; 1 for floats, else 0), then u4:
                   integers, CRC-32 of all else
    byte planes    the lowest byte of each folded difference, then the second of each, up to the highest

Streams of this version are read forever.
"""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_cli.arithmetic.floats import BITS, dtype_name
from lora_cli.arithmetic.ordered import Bits, from_ordered, to_ordered
from lora_cli.arithmetic.packing import MAX_ELEMENTS, Buffer
from lora_cli.errors import MalformedFileError, ShapeError

VERSION = 1

_HEADER = struct.Struct("<HBBI")
_CHECKSUM = struct.Struct("<I")
HEADER_BYTES = _HEADER.size + _CHECKSUM.size

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

#: Places on a line of integers modulo 2^n, and their differences.
Places = NDArray[np.unsignedinteger[Any]]


def encode(base: Tensor, candidate: Tensor | None) -> bytes:
    """Return what decoding needs to make the base's bits from the candidate's.

    Args:
        base: A contiguous block of a CPU tensor, of any shape and dtype.
        candidate: What the reader will have, of the same dtype and shape; None if it has nothing alike.

    Returns:
        A stream as described above. Equal arguments give equal bytes on every machine.

    Raises:
        ShapeError: The two differ in dtype or shape, one is not contiguous, or the block is too large.
    """
    _check(base, candidate)
    difference = _places(base)
    if candidate is not None:
        difference = difference - _places(candidate)
    folded = _folded(difference)
    planes = np.empty((folded.itemsize, folded.size), np.uint8)
    for number, plane in enumerate(planes):
        # The cast keeps the lowest byte, whatever the machine's order of bytes.
        np.right_shift(folded, 8 * number, out=plane, casting="unsafe")
    header = _HEADER.pack(VERSION, *_kind(base), folded.size)
    return b"".join((header, _CHECKSUM.pack(_checksum(header, planes.data)), planes.data))


def decode(candidate: Tensor | None, stream: Buffer, out: Tensor) -> Tensor:
    """Write the base's own bits into `out`.

    Args:
        candidate: The candidate, bit for bit as it was encoded; None if there was none.
        stream: What `encode` returned.
        out: Where the base goes, of its dtype and shape; contiguous. It may be the candidate itself.

    Returns:
        `out`. It is the base if the candidate is the one that was encoded: that it is not cannot be seen
        here.

    Raises:
        MalformedFileError: The stream is damaged, or belongs to a block of another size or dtype. `out` is
            as it was.
        ShapeError: As in `encode`.
    """
    _check(out, candidate)
    bits = _bits(out)
    view = memoryview(stream).cast("B")
    _expect("width, line and count of integers", (*_kind(out), bits.size), _declared(view))
    _expect("its length", HEADER_BYTES + bits.nbytes, len(view))
    checksum = _checksum(view[: _HEADER.size], view[HEADER_BYTES:])
    _expect("the checksum", checksum, _CHECKSUM.unpack_from(view, _HEADER.size)[0])
    planes = np.frombuffer(view, np.uint8, offset=HEADER_BYTES).reshape(bits.itemsize, bits.size)
    places = planes[-1].astype(f"u{bits.itemsize}")
    for plane in planes[-2::-1]:
        places <<= 8
        places |= plane
    places = _unfolded(places)
    if candidate is not None:
        places += _places(candidate)
    found = places.view(bits.dtype)
    bits[:] = from_ordered(found, found) if out.dtype in BITS else found
    return out


def lengths(stream: Buffer) -> tuple[int, int]:
    """Return how many bytes of a stream are worth compressing, and how many are not: 0.

    Args:
        stream: A stream, or anything that begins with its header.

    Raises:
        MalformedFileError: No stream begins like this.
    """
    width, _, count = _declared(memoryview(stream).cast("B"))
    return HEADER_BYTES + width * count, 0


def _check(base: Tensor, candidate: Tensor | None) -> None:
    if candidate is not None and (base.dtype, base.shape) != (candidate.dtype, candidate.shape):
        expected, found = (f"{dtype_name(tensor.dtype)} {tuple(tensor.shape)}" for tensor in (base, candidate))
        raise ShapeError("The tensors of a block differ", expected=expected, found=found)
    if not (base.is_contiguous() and (candidate is None or candidate.is_contiguous())):
        raise ShapeError("The tensors of a block must be contiguous")
    if base.nbytes > MAX_ELEMENTS * _kind(base)[0]:
        raise ShapeError("The block is too large", expected=f"at most {MAX_ELEMENTS}", found=base.numel())


def _kind(tensor: Tensor) -> tuple[int, int]:
    """Return how wide the integers are that stand for a tensor's elements, and on which line they lie."""
    return min(tensor.itemsize, max(_INTEGERS)), int(tensor.dtype in BITS)


def _bits(tensor: Tensor) -> Bits:
    """Return a tensor's memory as integers in a row; writing to them writes the tensor."""
    integers: Bits = tensor.view(-1).view(_INTEGERS[_kind(tensor)[0]]).numpy()
    return integers


def _places(tensor: Tensor) -> Places:
    bits = _bits(tensor)
    places: Places = (to_ordered(bits) if tensor.dtype in BITS else bits).view(f"u{bits.itemsize}")
    return places


def _folded(difference: Places) -> Places:
    """Return 2d for differences d from 0 on, and -2d - 1 for those below."""
    folded: Places = np.left_shift(difference, 1)
    folded ^= _stretched(np.right_shift(difference, 8 * difference.itemsize - 1))
    return folded


def _unfolded(folded: Places) -> Places:
    difference: Places = np.right_shift(folded, 1)
    difference ^= _stretched(np.bitwise_and(folded, 1))
    return difference


def _stretched(bits: Places) -> Places:
    """Overwrite each 1 by the integer whose bits are all set, and return them."""
    stretched: Places = np.negative(bits, out=bits)
    return stretched


def _declared(view: memoryview) -> tuple[int, int, int]:
    """Return width, line and count of the integers, as a header says."""
    if len(view) < HEADER_BYTES:
        raise _malformed(f"a residual's header of {HEADER_BYTES} bytes", f"{len(view)} bytes")
    version, width, line, count = _HEADER.unpack_from(view)
    _expect("the version", VERSION, version)
    if width not in _INTEGERS or line > 1 or count > MAX_ELEMENTS:
        raise _malformed("the header of a residual", (width, line, count))
    return width, line, count


def _checksum(header: Buffer, content: Buffer) -> int:
    return zlib.crc32(content, zlib.crc32(header))


def _expect(what: str, expected: object, found: object) -> None:
    if expected != found:
        raise _malformed(f"{what}: {expected}", found)


def _malformed(expected: str, found: object) -> MalformedFileError:
    return MalformedFileError(
        "A residual of an undo file is damaged, or belongs to other data", expected=expected, found=found
    )
