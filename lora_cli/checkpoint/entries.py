"""The entries of a safetensors header: one tensor each, checked alone and then against each other."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter
from typing import TypeGuard

from lora_cli.checkpoint.dtypes import DTYPES, DType
from lora_cli.checkpoint.strict_json import RepeatedKeys
from lora_cli.errors import LoraCliError, MalformedFileError, UnsafeInputError, UnsupportedError

RANK_LIMIT = 64
"""Most dimensions of a tensor: as many as numpy takes, more than any model has, few enough to loop over."""

DOWNLOAD_AGAIN = "download the file again"

_SIZE_LIMIT = 1 << 63  # in bits, any dimension of an empty tensor included: other readers multiply in 64 bits
_DTYPE_FORM = re.compile(r"[A-Z]{1,4}[0-9]{1,3}(_[A-Z0-9]{1,16})?")
_FIELDS = ("dtype", "shape", "data_offsets")
_SHORT = reprlib.Repr()
_SHORT.maxstring = 200


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as a header describes it.

    Attributes:
        name: Its key, exactly as decoded; it may be empty or hold control characters.
        dtype: How its elements are stored.
        shape: Its dimensions; () for a scalar.
        begin: Its first byte, counted from the start of the data.
        end: The first byte after it.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return self.end - self.begin

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


byte_order = attrgetter("begin", "end", "name")
"""Sort key: tensors as they lie in the file, empty ones before the one that begins at the same byte."""


def parse_entry(name: str, entry: object, file: object) -> TensorInfo:
    """Check one entry of a header by itself.

    Raises:
        MalformedFileError: A field is missing, superfluous or wrong, or the fields contradict each other.
        UnsupportedError: The dtype is not known here.
    """
    # Types are compared by `is`: True is an instance of int, and an object with repeated keys is one of dict.
    if type(entry) is not dict or len(entry) != 3:
        raise _wrong_fields(name, entry, file)
    try:
        dtype_name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    except KeyError:
        raise _wrong_fields(name, entry, file) from None
    dtype = DTYPES.get(dtype_name) if type(dtype_name) is str else None
    if dtype is None:
        raise _wrong_dtype(name, dtype_name, file)
    if not _are_counts(shape) or len(shape) > RANK_LIMIT:
        raise malformed("The shape is not valid", file, name, f"at most {RANK_LIMIT} whole numbers", shape)
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise malformed("The data offsets are not valid", file, name, "[begin, end] in bytes", offsets)
    begin, end = offsets
    bits = math.prod(shape) * dtype.bits
    # A dimension of 0 hides the others from the product; they must be sane all the same.
    if (bits or math.prod([size for size in shape if size]) * dtype.bits) >= _SIZE_LIMIT:
        raise malformed("The size of the tensor overflows 64 bits", file, name, f"under {_SIZE_LIMIT} bits", shape)
    if (end - begin) * 8 != bits:
        raise _wrong_span(name, dtype, bits, end - begin, file)
    return TensorInfo(name, dtype, tuple(shape), begin, end)


def check_cover(tensors: Iterable[TensorInfo], data_size: int, file: object) -> None:
    """Check that tensors in byte order follow each other from the first byte of the data to the last.

    Raises:
        MalformedFileError: There is a gap, or the data end too early.
        UnsafeInputError: Tensors overlap, or bytes follow the last one.
    """
    previous, end = None, 0
    for info in tensors:
        if info.begin > end:
            raise malformed(
                "Bytes before this tensor belong to no tensor",
                file,
                info.name,
                f"a start at byte {end}",
                info.begin,
            )
        if info.begin < end and previous is not None:
            raise _overlap(previous, info, file)
        previous, end = info, info.end
    if end > data_size:
        raise truncated("The file ends inside its data", file, end, data_size)
    if end < data_size:
        raise UnsafeInputError(
            "Bytes follow the last tensor; something may hide there",
            file=file,
            expected=f"{end} bytes of data",
            found=f"{data_size} bytes of data",
            hint="get the file from a source you trust",
        )


def repeated(keys: tuple[str, ...], file: object, tensor: str | None) -> MalformedFileError:
    """Return the error for an object that repeats keys, `tensor` being the entry that it is."""
    return MalformedFileError(
        "A key stands twice in one object",
        file=file,
        tensor=tensor,
        found=", ".join(map(_SHORT.repr, keys[:8])),
    )


def malformed(message: str, file: object, tensor: str, expected: object, found: object) -> MalformedFileError:
    """Return the error for an entry, with whatever was found in a bounded length."""
    return MalformedFileError(message, file=file, tensor=tensor, expected=expected, found=_SHORT.repr(found))


def truncated(message: str, file: object, expected: int, found: int) -> MalformedFileError:
    """Return the error for a file that is shorter than it says."""
    return MalformedFileError(
        message,
        file=file,
        expected=f"{expected} bytes",
        found=f"{found} bytes",
        hint=f"{expected - found} bytes are missing: {DOWNLOAD_AGAIN}",
    )


def _are_counts(values: object) -> TypeGuard[list[int]]:
    if type(values) is not list:
        return False
    for value in values:  # noqa: SIM110 (two or three of them, a million times: a generator takes twice as long)
        if type(value) is not int or value < 0:
            return False
    return True


def _wrong_fields(name: str, entry: object, file: object) -> MalformedFileError:
    if isinstance(entry, RepeatedKeys):
        return repeated(entry.repeated, file, name)
    if not isinstance(entry, dict):
        return malformed("The entry of a tensor is not an object", file, name, "an object", entry)
    missing = [field for field in _FIELDS if field not in entry]
    if missing:
        return malformed("The entry of a tensor lacks a field", file, name, ", ".join(missing), list(entry))
    extra = [field for field in entry if field not in _FIELDS]
    return malformed("The entry of a tensor has a field without meaning", file, name, ", ".join(_FIELDS), extra)


def _wrong_dtype(name: str, found: object, file: object) -> LoraCliError:
    if isinstance(found, str) and _DTYPE_FORM.fullmatch(found):
        return UnsupportedError(
            "The tensor has a dtype that this version does not know",
            file=file,
            tensor=name,
            expected=", ".join(DTYPES),
            found=found,
        )
    return malformed("The dtype is not valid", file, name, ", ".join(DTYPES), found)


def _wrong_span(name: str, dtype: DType, bits: int, found: int, file: object) -> MalformedFileError:
    if bits % 8:
        rule = f"a whole number of bytes, at {dtype.bits} bits an element"
        return malformed("The tensor does not fill its last byte", file, name, rule, f"{bits} bits")
    return malformed("The data offsets do not fit dtype and shape", file, name, f"{bits // 8} bytes", found)


def _overlap(first: TensorInfo, second: TensorInfo, file: object) -> UnsafeInputError:
    same = (first.begin, first.end) == (second.begin, second.end)
    return UnsafeInputError(
        "Two tensors share bytes",
        file=file,
        tensor=second.name,
        expected=f"a start at byte {first.end}",
        found=f"{second.begin}, inside tensor {_SHORT.repr(first.name)}",
        hint="save the file again with shared tensors stored once" if same else None,
    )
