"""zstd, bounded: nothing expands beyond what it was said to be."""

from __future__ import annotations

import sys

from lora_cli.errors import MalformedFileError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

Buffer = bytes | bytearray | memoryview

# Level 1: pruned weights' heads are as short at all levels, and residuals at higher ones up to 5 % longer,
# since short matches cost more than the entropy of their bytes. It is also the fastest. Whoever writes a frame has a
# checksum of his own, and zstd's would miss some bits of the frame's header.
_COMPRESSION: dict[int, int] = {
    zstd.CompressionParameter.compression_level: 1,
    zstd.CompressionParameter.checksum_flag: 0,
}
# A frame that wants a longer window is refused before memory for it is taken.
_DECOMPRESSION: dict[int, int] = {zstd.DecompressionParameter.window_log_max: 25}


def compress(data: Buffer) -> bytes:
    """Return a frame that holds `data`: the same bytes for the same data with one version of zstd."""
    return zstd.compress(data, options=_COMPRESSION)


def decompress(frame: Buffer, size: int) -> bytes:
    """Return what a frame holds, which is `size` bytes; no more than one byte beyond is made.

    Raises:
        MalformedFileError: It is no frame, or holds another number of bytes.
    """
    decompressor = zstd.ZstdDecompressor(options=_DECOMPRESSION)
    try:
        found = decompressor.decompress(frame, size + 1)
    except zstd.ZstdError as error:
        raise _malformed("a zstd frame", error) from error
    whole = decompressor.eof and not decompressor.unused_data
    if len(found) != size or not whole:
        raise _malformed(f"a zstd frame of {size} bytes", f"{len(found)} bytes" if whole else "another")
    return found


def _malformed(expected: str, found: object) -> MalformedFileError:
    return MalformedFileError("Compressed bytes of an undo file are damaged", expected=expected, found=found)
