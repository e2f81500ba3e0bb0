"""Digests of tensors and files: BLAKE3 over cuts that depend on type and shape alone, so that threads can share them.

A tensor of up to 2^25 elements has one digest, the plain BLAKE3 of its bytes; a larger one is cut by rows and has one
for each cut. The digest of a safetensors file is the BLAKE3 of what stands before the data and of these digests, in
byte order; the digest of any other file is the BLAKE3 of its bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from blake3 import blake3

from lora_cli.checkpoint.checkpoint import Shard, StoredTensor
from lora_cli.checkpoint.dtypes import DType
from lora_cli.checkpoint.header import Header
from lora_cli.checkpoint.source import Reader, SourceFile, look_at

CUT_ELEMENTS = 1 << 25
"""Most elements of a cut. Part of every digest: never to be changed."""

_STRIP = 1 << 20


def rows_per_cut(shape: Sequence[int], dtype: DType) -> int:
    """Rows (steps of the first axis) in one cut of a tensor; rows of half bytes cannot be told apart."""
    rows = shape[0] if shape else 1
    columns = math.prod(shape) // rows if rows else 0
    return max(1, rows if dtype.bits % 8 else CUT_ELEMENTS // max(1, columns))


def cuts(tensor: StoredTensor) -> Iterator[tuple[int, int]]:
    """Yield first byte and one past the last of each cut, within the tensor."""
    if not tensor.nbytes:
        return
    rows = tensor.shape[0] if tensor.shape else 1
    step = rows_per_cut(tensor.shape, tensor.dtype)
    for begin in range(0, rows, step):
        yield tensor.nbytes * begin // rows, tensor.nbytes * min(begin + step, rows) // rows


def tensor_digests(tensor: StoredTensor, reader: Reader) -> tuple[str, ...]:
    """Return the digest of each cut of a tensor."""
    return tuple(span_digest(reader, tensor.offset + begin, end - begin) for begin, end in cuts(tensor))


def tensor_content(tensor: StoredTensor, reader: Reader) -> str:
    """Return what a tensor is, but for its name: type, shape and the digest of each cut. Part of undo files."""
    return " ".join([tensor.dtype.name, str(list(tensor.shape)), *tensor_digests(tensor, reader)])


def span_digest(reader: Reader, offset: int, length: int) -> str:
    """Return the digest of a span of a file."""
    digest = blake3()
    buffer = memoryview(bytearray(min(_STRIP, length)))
    for at in range(0, length, _STRIP):
        part = buffer[: min(_STRIP, length - at)]
        reader.read_into(offset + at, part)
        digest.update(part)
    return digest.hexdigest()


def bytes_digest(data: bytes | memoryview) -> str:
    """Return the digest of bytes."""
    return blake3(data).hexdigest()


def path_digest(place: Path | SourceFile) -> str:
    """Return the digest of a file that holds no tensors."""
    source = place if isinstance(place, SourceFile) else look_at(place)
    with source.open() as reader:
        return span_digest(reader, 0, source.size)


def file_digest(header: Header, tensors: Iterable[str]) -> str:
    """Return the digest of a safetensors file from those of its cuts, in byte order."""
    digest = blake3(blake3(header.prefix).digest())
    for cut in tensors:
        digest.update(bytes.fromhex(cut))
    return digest.hexdigest()


def shard_digest(shard: Shard) -> str:
    """Return the digest of a safetensors file, reading all of it."""
    with shard.source.open() as reader:
        tensors = (StoredTensor(shard, info) for info in shard.header.tensors)
        return file_digest(shard.header, (cut for tensor in tensors for cut in tensor_digests(tensor, reader)))
