"""The undo file: what a merge forgot, in one file beside its output.

It is a safetensors file under another name (servers load whatever ends in `.safetensors`), so every reader of that
format can look into it, and the strict parser of headers bounds it. Its metadata name the format with its version, and
the digest of the manifest, which has or leads to a digest or checksum of everything else. Its tensors:

    stored/KEY             a tensor of the base that the merged checkpoint lacks, as it was
    factor/N/NAME          a factor of adapter N, where it was embedded
    undo/KEY               bytes: the fragments of a tensor's cuts, one after another
    gains/KEY              what the outputs of a tensor were multiplied by
    header/FILE            bytes: the header of a file of the base, compressed
    side/NAME              bytes: a small file of the base; the older undo file among them
    manifest               bytes: the manifest, compressed
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lora_cli.arithmetic.zstd import compress, decompress
from lora_cli.checkpoint.checkpoint import Shard, StoredTensor, open_shard
from lora_cli.checkpoint.digests import bytes_digest
from lora_cli.checkpoint.dtypes import DTYPES, DType
from lora_cli.checkpoint.header import HEADER_LIMIT, Header, parse_header, render_header
from lora_cli.checkpoint.manifest import MANIFEST_LIMIT, Manifest, read_manifest, write_manifest
from lora_cli.checkpoint.source import SourceFile
from lora_cli.checkpoint.staged import StagedFile
from lora_cli.checkpoint.staging import Staging
from lora_cli.errors import MalformedFileError, UnsupportedError

UNDO_FILE = "lora_merge.undo"
FORMAT = 3
"""Version of the container, manifest and streams. All versions up to this one are read, and the first that does is
written: 2 has gains, parts of outputs and block-diagonal factors; 3 has single matrices of stacks, and formulas."""

MANIFEST = "manifest"
_FORMAT = re.compile(r"lora-cli/undo/([1-9][0-9]{0,8})")
_BYTES = DTYPES["U8"]
_FREE, _MOST_DENSE = 1 << 20, 64
"""What is packed may unpack to so many bytes, and so many times its own length: digests hardly compress."""

_DAMAGED = "The undo file is damaged"
_HINT = "get the undo file again from where the merged checkpoint came from"


def stored_part(key: str) -> str:
    """Name of the part that holds a tensor of the base."""
    return f"stored/{key}"


def factor_part(adapter: int, name: str) -> str:
    """Name of the part that holds an embedded factor."""
    return f"factor/{adapter}/{name}"


def undo_part(key: str) -> str:
    """Name of the part that holds the fragments of a tensor."""
    return f"undo/{key}"


def gains_part(key: str) -> str:
    """Name of the part that holds what the outputs of a tensor were multiplied by."""
    return f"gains/{key}"


def header_part(name: str) -> str:
    """Name of the part that holds the header of a file."""
    return f"header/{name}"


def side_part(name: str) -> str:
    """Name of the part that holds a small file."""
    return f"side/{name}"


@dataclass(frozen=True)
class UndoFile:
    """An opened undo file: its header and manifest are read, nothing else."""

    shard: Shard
    manifest: Manifest

    @cached_property
    def parts(self) -> Mapping[str, StoredTensor]:
        """Its parts by name."""
        return {info.name: StoredTensor(self.shard, info) for info in self.shard.header.tensors}

    def part(self, name: str) -> StoredTensor:
        """Return a part that the manifest speaks of.

        Raises:
            MalformedFileError: It is not there.
        """
        if name not in self.parts:
            raise MalformedFileError(_DAMAGED, file=self.shard.name, expected=f"a part {name}", hint=_HINT)
        return self.parts[name]

    def header(self, name: str, file_size: int) -> Header:
        """Return the header of a file of the base.

        Raises:
            MalformedFileError: It is damaged.
        """
        raw = self.unpacked(header_part(name), HEADER_LIMIT)
        return parse_header(raw, file_size, file=f"{name} in {self.shard.name}")

    def unpacked(self, name: str, limit: int) -> bytes:
        """Return the bytes of a part that was compressed.

        Raises:
            MalformedFileError: It is damaged, or has more than `limit` bytes.
        """
        return _unpacked(_read(self.part(name)), limit, self.shard.name)


def open_undo_file(path: Path, *, name: str | None = None) -> UndoFile:
    """Open an undo file.

    Raises:
        MalformedFileError: It is none, or damaged.
        UnsupportedError: A newer lora-cli wrote it.
    """
    shard = open_shard(path, name=name)
    metadata = shard.header.metadata or {}
    match = _FORMAT.fullmatch(metadata.get("format", ""))
    if match is None:
        raise MalformedFileError(
            "The file is no undo file", file=shard.name, expected=f"format lora-cli/undo/1 to {FORMAT}", hint=_HINT
        )
    if int(match[1]) > FORMAT:
        raise UnsupportedError(
            "The undo file was written by a newer lora-cli",
            file=shard.name,
            expected=f"format up to {FORMAT}",
            found=match[1],
            hint="update lora-cli",
        )
    place = next((StoredTensor(shard, info) for info in shard.header.tensors if info.name == MANIFEST), None)
    packed = _read(place) if place else b""
    if bytes_digest(packed) != metadata.get("manifest"):
        raise MalformedFileError(_DAMAGED, file=shard.name, expected="the manifest that its digest is of", hint=_HINT)
    return UndoFile(shard, read_manifest(_unpacked(packed, MANIFEST_LIMIT, shard.name), file=shard.name))


def _read(part: StoredTensor) -> bytes:
    if part.nbytes > MANIFEST_LIMIT:
        raise MalformedFileError(_DAMAGED, file=part.shard.name, expected=f"{part.key}: a small part", hint=_HINT)
    with part.shard.source.open() as reader:
        return reader.read(part.offset, part.nbytes)


def _unpacked(data: bytes, limit: int, file: str) -> bytes:
    """Undo `_packed`: the length goes before the compressed bytes, so that nothing expands beyond it."""
    length = int.from_bytes(data[:8], "little")
    limit = min(limit, _FREE + _MOST_DENSE * len(data))
    if len(data) < 8 or length > limit:
        raise MalformedFileError(_DAMAGED, file=file, expected=f"at most {limit} bytes", found=length, hint=_HINT)
    return decompress(data[8:], length)


def _packed(name: str, data: bytes) -> bytes:
    content = len(data).to_bytes(8, "little") + compress(data)
    # Nothing is written that would not be read.
    if len(data) > _FREE + _MOST_DENSE * len(content) or max(len(data), len(content)) > MANIFEST_LIMIT:
        raise UnsupportedError(
            "An undo file cannot hold this: it is too long, or says the same too often",
            file=name,
            found=f"{len(data)} bytes",
            hint="merge without an undo file: --no-undo",
        )
    return content


@dataclass(frozen=True, slots=True)
class Part:
    """One part that is to be written: where its bytes come from, and how many they are."""

    name: str
    size: int
    write: Callable[[StagedFile, int], None]
    dtype: DType = _BYTES
    shape: Sequence[int] | None = None


def copied(name: str, tensor: StoredTensor) -> Part:
    """A tensor that is copied as it is."""

    def write(file: StagedFile, at: int) -> None:
        with tensor.shard.source.open() as reader:
            file.copy(reader, tensor.offset, at, tensor.nbytes)

    return Part(name, tensor.nbytes, write, tensor.dtype, tensor.shape)


def copied_file(name: str, source: SourceFile) -> Part:
    """A file that is copied whole."""

    def write(file: StagedFile, at: int) -> None:
        with source.open() as reader:
            file.copy(reader, 0, at, source.size)

    return Part(name, source.size, write)


def given(name: str, data: bytes) -> Part:
    """Bytes that are at hand."""
    return Part(name, len(data), lambda file, at: file.write(at, data))


def numbers(name: str, dtype: DType, data: bytes) -> Part:
    """Numbers that are at hand, one after the other."""
    return Part(name, len(data), lambda file, at: file.write(at, data), dtype, (len(data) * 8 // dtype.bits,))


def packed(name: str, data: bytes) -> Part:
    """Bytes that are compressed.

    Raises:
        UnsupportedError: They are too many.
    """
    return given(name, _packed(name, data))


def write_undo_file(staging: Staging, name: str, parts: Sequence[Part], manifest: Manifest) -> int:
    """Write an undo file into an output, the same parts as the same bytes; returns its length.

    Raises:
        WriteError: It cannot be written.
        UnsupportedError: The manifest is too long.
    """
    content = _packed(MANIFEST, write_manifest(manifest))
    # Typed tensors first, so that they lie aligned. Sorting keeps the order otherwise.
    ordered = [*sorted(parts, key=lambda part: part.shape is None), given(MANIFEST, content)]
    header = render_header(
        [(part.name, part.dtype, (part.size,) if part.shape is None else part.shape) for part in ordered],
        {"format": f"lora-cli/undo/{manifest.format}", "manifest": bytes_digest(content)},
    )
    file = staging.create(name, header.file_bytes)
    file.write(0, header.prefix)
    places = {info.name: header.data_start + info.begin for info in header.tensors}
    for part in ordered:
        part.write(file, places[part.name])
    file.finish()
    return header.file_bytes
