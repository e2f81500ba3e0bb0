"""The header of a safetensors file: read strictly, kept as it is, written always the same way.

A file is 8 bytes (the length of the header, little-endian), the header in JSON, and the data of all tensors
without a gap. The upstream reader lets some things pass that surgery must not: two entries of one name, of
which a scanner may see the first and a loader the last; fields without meaning, in which something may
hide; white space before the header. Here they are errors. Whatever is accepted here, upstream accepts with
the same meaning.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_cli.checkpoint import strict_json
from lora_cli.checkpoint.dtypes import DType
from lora_cli.checkpoint.entries import (
    DOWNLOAD_AGAIN,
    RANK_LIMIT,
    TensorInfo,
    byte_order,
    check_cover,
    malformed,
    parse_entry,
    repeated,
    truncated,
)
from lora_cli.checkpoint.strict_json import RepeatedKeys
from lora_cli.errors import LoraCliError, MalformedFileError, UnsafeInputError, UsageError

__all__ = [
    "HEADER_LIMIT",
    "METADATA_KEY",
    "RANK_LIMIT",
    "Header",
    "TensorInfo",
    "parse_header",
    "read_header_length",
    "render_header",
]

HEADER_LIMIT = 32 << 20
"""Longest header that is read. Parsing takes about 13 bytes of memory for each of
its bytes (one made to harm, up to 50): the 100 MB that upstream allows would take more than a gigabyte.
This holds a quarter of a million tensors with long names."""

METADATA_KEY = "__metadata__"

_SMALLEST_FILE = 10  # the 8 bytes of the length, and "{}"

_CONVERT = "convert it with torch.load(..., weights_only=True) and safetensors.torch.save_file"
_OTHER_FORMATS = (
    (re.compile(rb"version "), "a Git LFS pointer", "fetch the weights with: git lfs pull"),
    (re.compile(rb"\s*<[!?a-zA-Z]"), "a web page", f"log in if the model is gated, then {DOWNLOAD_AGAIN}"),
    (re.compile(rb"PK(\x03\x04|\x05\x06)"), "a zip archive", f"if torch.save wrote it, {_CONVERT}"),
    (re.compile(rb"\x80[\x02-\x05]"), "a Python pickle", _CONVERT),
    (re.compile(rb"GGUF"), "a GGUF file", "take the safetensors files of the same model"),
    (re.compile(rb'\{\s*"'), "plain JSON", "give the weights instead of an index or config"),
    (re.compile(rb"(\xef\xbb\xbf)?[\t\n\r -~]{5,}"), "text", "name a safetensors file, or a folder that holds some"),
)
"""What else is found under the name, by the first 8 bytes; as a length all of them are absurd."""


@dataclass(frozen=True, slots=True)
class Header:
    """A whole header; it can be written again byte for byte.

    Attributes:
        raw: The JSON as it stands in the file, with its padding, without the 8 bytes of the length.
        tensors: All tensors by (begin, end, name); together they cover the data without a gap.
        metadata: The file's own notes; None when there are none.
    """

    raw: bytes
    tensors: tuple[TensorInfo, ...]
    metadata: Mapping[str, str] | None

    @property
    def data_start(self) -> int:
        """Where the data begin in the file."""
        return 8 + len(self.raw)

    @property
    def file_bytes(self) -> int:
        """Length of the whole file."""
        return self.data_start + (self.tensors[-1].end if self.tensors else 0)

    @property
    def prefix(self) -> bytes:
        """Everything that stands before the data."""
        return len(self.raw).to_bytes(8, "little") + self.raw


def read_header_length(first8: bytes, file_size: int, *, file: object, limit: int = HEADER_LIMIT) -> int:
    """Return the length of the header, as the first 8 bytes of a file give it.

    Args:
        first8: The first 8 bytes or more (a short file: all it has); where they belong to another format, the
            message says so.
        file_size: Length of the whole file.
        file: What messages call the file.
        limit: Longest header to accept.

    Raises:
        MalformedFileError: The file is too short, the length is impossible, or this is another format.
    """
    if file_size < _SMALLEST_FILE or len(first8) < 8:
        raise MalformedFileError(
            "The file is too short for a safetensors file",
            file=file,
            expected=f"at least {_SMALLEST_FILE} bytes",
            found=f"{file_size} bytes",
            hint=DOWNLOAD_AGAIN,
        )
    length = int.from_bytes(first8[:8], "little")
    if 2 <= length <= min(file_size - 8, limit):
        return length
    for form, what, hint in _OTHER_FORMATS:
        if form.match(first8):
            raise MalformedFileError(f"The file is {what}, not a safetensors file", file=file, hint=hint)
    if length < 2:
        raise MalformedFileError("The header is empty", file=file, expected="at least 2 bytes", found=f"{length} bytes")
    if length > limit:
        raise MalformedFileError(
            "The header is too long", file=file, expected=f"at most {limit} bytes", found=f"{length} bytes"
        )
    raise truncated("The file ends inside its header", file, 8 + length, file_size)


def parse_header(raw: bytes, file_size: int, *, file: object, limit: int = HEADER_LIMIT) -> Header:
    """Parse the JSON of a header and hold it against the size of its file.

    Args:
        raw: The header without the 8 bytes of its length.
        file_size: Length of the whole file, those 8 bytes included.
        file: What messages call the file.
        limit: Longest header to parse.

    Raises:
        MalformedFileError: It is no valid header, or the file is not as long as it says.
        UnsafeInputError: It could be read in two ways, or leaves bytes where something can hide.
        UnsupportedError: A tensor has a dtype that is not known here.
    """
    document = strict_json.loads(raw, file=file, limit=limit, what="header", keep_repeated=True)
    if not isinstance(document, dict):
        raise MalformedFileError(
            "The header is not a JSON object", file=file, expected="an object", found=type(document).__name__
        )
    if raw[:1] != b"{":
        raise MalformedFileError(
            "The header does not start with '{'",
            file=file,
            found=repr(raw[:1])[1:],
            hint="load and save the file with safetensors: white space may only follow the header",
        )
    if isinstance(document, RepeatedKeys):
        raise _repeated_names(document.repeated, file)
    metadata = _metadata(document.pop(METADATA_KEY, None), file)
    tensors = [parse_entry(name, entry, file) for name, entry in document.items()]
    tensors.sort(key=byte_order)
    check_cover(tensors, file_size - 8 - len(raw), file)
    return Header(raw, tuple(tensors), metadata)


def render_header(
    tensors: Iterable[tuple[str, DType, Sequence[int]]], metadata: Mapping[str, str] | None = None
) -> Header:
    """Make the header of a new file: the same input gives the same bytes, always.

    Tensors lie one after another in the order given; metadata keys are sorted; spaces pad the header to a
    multiple of 8, so that the data begin aligned.

    Args:
        tensors: Name, dtype and shape of each.
        metadata: Notes for `__metadata__`; None leaves it out.

    Raises:
        UsageError: A name is taken, is reserved for the metadata, or cannot be written as UTF-8.
        MalformedFileError: The result would be no valid header: it is too long, or a tensor does not fill its
            bytes.
    """
    document: dict[str, Any] = {METADATA_KEY: None if metadata is None else dict(sorted(metadata.items()))}
    end = 0
    for name, dtype, shape in tensors:
        if name in document:
            reason = "is reserved for the metadata" if name == METADATA_KEY else "is taken by another tensor"
            raise UsageError(f"The name of a new tensor {reason}", tensor=name)
        begin, end = end, end + math.prod(shape) * dtype.bits // 8
        document[name] = {"dtype": dtype.name, "shape": list(shape), "data_offsets": [begin, end]}
    if metadata is None:
        del document[METADATA_KEY]
    try:
        raw = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise UsageError("A name or note cannot be written as UTF-8", found=ascii(error.object[error.start])) from None
    raw += b" " * (-len(raw) % 8)
    return parse_header(raw, 8 + len(raw) + end, file="the new header")


def _metadata(metadata: object, file: object) -> dict[str, str] | None:
    if metadata is None:  # `null` means the same as nothing, also upstream
        return None
    if isinstance(metadata, RepeatedKeys):
        raise repeated(metadata.repeated, file, METADATA_KEY)
    if not isinstance(metadata, dict):
        raise malformed("The metadata is not an object", file, METADATA_KEY, "an object of strings", metadata)
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise malformed("A metadata value is not a string", file, METADATA_KEY, "a string", {key: value})
    return metadata


def _repeated_names(names: tuple[str, ...], file: object) -> LoraCliError:
    """A repeated tensor name is a trap: two readers see two models; repeated metadata is merely broken."""
    tensors = [name for name in names if name != METADATA_KEY]
    if not tensors:
        return repeated(names, file, METADATA_KEY)
    return UnsafeInputError(
        "A tensor stands twice in the header, so that two readers may see two models",
        file=file,
        tensor=tensors[0],
        details=map(ascii, tensors[1:]),
        hint="get the file from a source you trust",
    )
