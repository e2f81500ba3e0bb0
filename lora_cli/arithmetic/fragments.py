"""Fragments of an undo file: the streams of a cut's blocks, packed with zstd where that gains something.

A stream begins with its head, which is worth compressing, and ends in a tail of noise (`undo.lengths`,
`residual.lengths`). The heads of many blocks are compressed as one, so that a block of dense weights costs
some ten bytes more than its tail. A fragment is a row of groups, and holds streams of one codec; one of no
blocks is empty. All is little-endian:

    group header   u4 each: blocks (1 or more), bytes of heads compressed, bytes of heads, bytes of tails,
                   CRC-32 of these four and of the heads as they are compressed
    heads          of all blocks one after another, as one zstd frame
    tails          of all blocks one after another

No table says where a stream begins: the heads themselves do. The tails are under no checksum of the group's;
streams have one of all they contain. So a fragment that was read is whole when its streams were decoded and
were as many as there are blocks: one that is cut off after a group is a shorter fragment.

Writer and reader hold one group and one block, some of it twice or thrice. No file can make a reader hold more
than a few times `MAX_STREAM_BYTES`.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator

from lora_cli.arithmetic.packing import Buffer
from lora_cli.arithmetic.zstd import compress, decompress
from lora_cli.errors import MalformedFileError, ShapeError

#: A group is closed when its streams have as many bytes.
GROUP_BYTES = 1 << 20

#: The longest stream. One of 2^18 elements has two thirds of this at worst: float64, and all are exceptions.
MAX_STREAM_BYTES = 1 << 23

#: Given a stream or the beginning of one: the bytes of its head and of its tail.
Lengths = Callable[[Buffer], tuple[int, int]]

_HEADER = struct.Struct("<IIII")
_CHECKSUM = struct.Struct("<I")
_HEADER_BYTES = _HEADER.size + _CHECKSUM.size

# No group that is written has longer heads and tails, nor longer compressed heads.
_LIMIT = 2 * MAX_STREAM_BYTES


class FragmentWriter:
    """Packs the streams of a cut, block by block, in order.

    Equal streams give equal bytes with one version of zstd. Others may compress to other bytes; each reads
    what any of them wrote.

    Args:
        lengths: What tells the head of a stream from its tail.
    """

    def __init__(self, lengths: Lengths) -> None:
        self._lengths = lengths
        self._heads: list[memoryview] = []
        self._tails: list[memoryview] = []
        self._pending = 0

    def add(self, stream: Buffer) -> bytes:
        """Take the next block's stream, and return which bytes of the fragment are ready: mostly none.

        Raises:
            MalformedFileError: It is no stream of this codec.
            ShapeError: It is too long: the block must be cut into smaller ones.
        """
        size = memoryview(stream).nbytes
        if size > MAX_STREAM_BYTES:
            raise ShapeError("The block is too large", expected=f"at most {MAX_STREAM_BYTES} bytes", found=size)
        # A copy, unless nobody can change it.
        view = memoryview(bytes(stream))
        head, tail = self._lengths(view)
        if head + tail != size:
            raise _malformed(f"a stream of {head + tail} bytes", size)
        self._heads.append(view[:head])
        self._tails.append(view[head:])
        self._pending += size
        return self.close() if self._pending >= GROUP_BYTES else b""

    def close(self) -> bytes:
        """Return the rest of the fragment, to which nothing need be added."""
        if not self._heads:
            return b""
        heads = b"".join(self._heads)
        compressed = compress(heads)
        header = _HEADER.pack(len(self._heads), len(compressed), len(heads), sum(map(len, self._tails)))
        group = b"".join((header, _CHECKSUM.pack(_checksum(header, compressed)), compressed, *self._tails))
        self._heads.clear()
        self._tails.clear()
        self._pending = 0
        return group


def read_fragment(read: Callable[[int, int], bytes], length: int, lengths: Lengths) -> Iterator[bytes]:
    """Yield the streams of a fragment, in order.

    Args:
        read: Given an offset in the fragment and a number of bytes, returns these. Nothing beyond `length`
            is asked for.
        length: How long the fragment is.
        lengths: As the writer had it.

    Raises:
        MalformedFileError: The fragment is damaged, or holds streams of another codec. Streams that came
            before that are as they were written, if they decode.
    """
    offset = 0
    while offset < length:
        if length - offset < _HEADER_BYTES:
            raise _malformed(f"a group's header of {_HEADER_BYTES} bytes", f"{length - offset} bytes")
        header = _exactly(read, offset, _HEADER_BYTES)
        blocks, compressed, heads, tails = _HEADER.unpack_from(header)
        offset += _HEADER_BYTES
        if max(compressed, heads + tails) > _LIMIT or compressed + tails > length - offset:
            room = min(_LIMIT, length - offset)
            raise _malformed(f"a group of at most {room} bytes", (compressed, heads, tails))
        body = memoryview(_exactly(read, offset, compressed + tails))
        offset += compressed + tails
        checksum = _checksum(header[: _HEADER.size], body[:compressed])
        _expect("the checksum of a group", checksum, _CHECKSUM.unpack_from(header, _HEADER.size)[0])
        yield from _streams(blocks, memoryview(decompress(body[:compressed], heads)), body[compressed:], lengths)


def _streams(blocks: int, heads: memoryview, tails: memoryview, lengths: Lengths) -> Iterator[bytes]:
    """Put the streams of a group together."""
    if not blocks:
        raise _malformed("a group of one block or more", 0)
    for _ in range(blocks):
        head, tail = lengths(heads)
        if head > len(heads) or tail > len(tails):
            raise _malformed("streams that end within their group", (head, tail))
        yield b"".join((heads[:head], tails[:tail]))
        heads, tails = heads[head:], tails[tail:]
    _expect("bytes after the last stream of a group", 0, len(heads) + len(tails))


def _exactly(read: Callable[[int, int], bytes], offset: int, count: int) -> bytes:
    data = read(offset, count)
    _expect(f"bytes at {offset} of a fragment", count, len(data))
    return data


def _checksum(header: Buffer, heads: Buffer) -> int:
    return zlib.crc32(heads, zlib.crc32(header))


def _expect(what: str, expected: object, found: object) -> None:
    if expected != found:
        raise _malformed(f"{what}: {expected}", found)


def _malformed(expected: str, found: object) -> MalformedFileError:
    return MalformedFileError("An undo file is damaged", expected=expected, found=found)
