"""The engine: computes the bytes that a plan asks for, piece by piece, in buffers made once per thread.

Merging writes these bytes, verifying compares them, and neither knows how they are made. No byte depends on the size
of a piece, the number of threads or the order of work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lora_cli.adapters.inits import FreshTensor
from lora_cli.arithmetic.product import ExactProduct, prepare
from lora_cli.arithmetic.rounding import TileKernel, cast, check_flush_to_zero, slices_for, work_dtype
from lora_cli.checkpoint.checkpoint import StoredTensor
from lora_cli.checkpoint.dtypes import DType
from lora_cli.checkpoint.source import Reader, SourceFile
from lora_cli.errors import LoraCliError, NumericError
from lora_cli.surgery.budget import TILE_COLUMNS, TILE_ELEMENTS, UNIT_BYTES
from lora_cli.surgery.plan import Edit, OutputFile


def torch_dtype(dtype: DType) -> torch.dtype:
    """Torch's type for a storage type."""
    found: torch.dtype = getattr(torch, str(dtype.torch_name))
    return found


@dataclass(frozen=True, slots=True)
class Unit:
    """One piece of work: rows of a computed tensor, or a run of bytes that are copied.

    Attributes:
        file: Position of the output file in the plan.
        edit: The computed tensor, or None for a copy.
        begin: First row, or first byte within the output file.
        end: One past the last.
        source: The file that bytes are copied from.
        source_offset: Where they begin in it.
        nbytes: Output bytes.
    """

    file: int
    edit: Edit | None
    begin: int
    end: int
    source: SourceFile | None
    source_offset: int
    nbytes: int


def units_of(number: int, file: OutputFile) -> Iterator[Unit]:
    """Cut one output file into units, in byte order. The header is not among them."""
    start = file.header.data_start
    copy: tuple[SourceFile, int, int, int] | None = None  # source, its offset, begin, end
    for edit in file.edits:
        if not edit.nbytes:
            continue
        if edit.copies:
            source, begin = edit.source.shard.source, start + edit.begin
            if copy and copy[0] == source and copy[1] + copy[3] - copy[2] == edit.source.offset and copy[3] == begin:
                copy = (source, copy[1], copy[2], start + edit.end)
                continue
            yield from _copy_units(number, copy)
            copy = (source, edit.source.offset, begin, start + edit.end)
        else:
            yield from _copy_units(number, copy)
            copy = None
            yield from _row_units(number, edit)
    yield from _copy_units(number, copy)


def _copy_units(number: int, copy: tuple[SourceFile, int, int, int] | None) -> Iterator[Unit]:
    if copy is None:
        return
    source, offset, begin, end = copy
    for at in range(begin, end, UNIT_BYTES):
        stop = min(at + UNIT_BYTES, end)
        yield Unit(number, None, at, stop, source, offset + at - begin, stop - at)


def _row_units(number: int, edit: Edit) -> Iterator[Unit]:
    rows, columns = edit.matrix
    row_bytes = columns * edit.dtype.bits // 8
    # A fresh tensor is one unit: some inits must make all of it to make any of it.
    step = max(1, rows if edit.fresh is not None else UNIT_BYTES // max(1, row_bytes))
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        yield Unit(number, edit, begin, end, None, 0, (end - begin) * row_bytes)


class Piece(NamedTuple):
    """A contiguous part of a computed tensor, in buffers that the next piece overwrites.

    Attributes:
        offset: Index of its first element in the tensor.
        source: The flat elements it was made from.
        result: The flat elements of the output.
    """

    offset: int
    source: torch.Tensor
    result: torch.Tensor


Observe = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Sees one tile as it is computed: source, result, and the delta in the working type (every zero is +0.0)."""


class Workshop:
    """What one thread keeps between units: a buffer for a piece on each side, and the tile kernels."""

    def __init__(self, strip_bytes: int) -> None:
        check_flush_to_zero()
        self._input = torch.empty(strip_bytes, dtype=torch.uint8)
        self._output = torch.empty(strip_bytes, dtype=torch.uint8)
        self._kernels: dict[torch.dtype, TileKernel] = {}

    def pieces(self, edit: Edit, begin: int, end: int, observe: Observe | None = None) -> Iterator[Piece]:
        """Yield the output of rows `begin` to `end` of a computed tensor, piece by piece.

        Args:
            edit: A tensor that is computed, not copied.
            begin: First row.
            end: One past the last.
            observe: Is shown every tile that takes a delta.

        Raises:
            NumericError: Numbers that must not be merged; the message names the tensor.
            MalformedFileError: An input changed or ends early.
        """
        if edit.fresh is not None:
            yield from _made(edit, edit.fresh, begin, end)
            return
        with _named(edit.key), open_readers() as readers:
            product = self._product(edit, readers) if edit.terms else None
            reader = readers.of(edit.source)
            stored, out = torch_dtype(edit.source.dtype), torch_dtype(edit.dtype)
            width = max(stored.itemsize, out.itemsize)
            for rows, columns in _pieces(begin, end, edit.matrix[1], self._input.numel() // width):
                shape = (rows.stop - rows.start, columns.stop - columns.start)
                offset = rows.start * edit.matrix[1] + columns.start
                source = _shaped(self._input, stored, shape)
                reader.read_into(edit.source.offset + offset * stored.itemsize, raw_bytes(source))
                target = _shaped(self._output, out, shape)
                if product is None:
                    if edit.operation in ("replace", "append"):
                        _check_finite(source)
                    cast(source, target)
                else:
                    self._add(edit, product, source, target, (rows.start, columns.start), observe)
                yield Piece(offset, source.view(-1), target.view(-1))

    def _product(self, edit: Edit, readers: Readers) -> ExactProduct:
        work = work_dtype(torch_dtype(edit.source.dtype), torch_dtype(edit.dtype))
        return prepare([t.delta.term(readers.load, t.weight) for t in edit.terms], slices=slices_for(work))

    def _add(
        self,
        edit: Edit,
        product: ExactProduct,
        source: torch.Tensor,
        target: torch.Tensor,
        at: tuple[int, int],
        observe: Observe | None,
    ) -> None:
        kernel = self.kernel(source.dtype, target.dtype)
        apply = kernel.subtract if edit.operation == "subtract" else kernel.merge
        transposed = edit.terms[0].transposed
        for down, across in _tiles(source.shape):
            exact = kernel.product(product, _moved(down, at[0]), _moved(across, at[1]), transposed=transposed)
            apply(source[down, across], exact, target[down, across])
            if observe:
                observe(source[down, across], target[down, across], kernel.delta(exact))

    def kernel(self, *storages: torch.dtype) -> TileKernel:
        """The tile kernel for these storage types."""
        work = work_dtype(*storages)
        if work not in self._kernels:
            self._kernels[work] = TileKernel(work, TILE_ELEMENTS)
        return self._kernels[work]


class Readers:
    """The input files that one unit reads from, each opened once."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._open: dict[SourceFile, Reader] = {}

    def of(self, tensor: StoredTensor) -> Reader:
        """The open file that holds a tensor."""
        source = tensor.shard.source
        if source not in self._open:
            self._open[source] = self._stack.enter_context(source.open())
        return self._open[source]

    def load(self, tensor: StoredTensor) -> torch.Tensor:
        """Read a whole tensor."""
        data = torch.empty(tensor.nbytes, dtype=torch.uint8)
        if tensor.nbytes:
            self.of(tensor).read_into(tensor.offset, raw_bytes(data))
        return data.view(torch_dtype(tensor.dtype)).view(tensor.shape)


@contextmanager
def open_readers() -> Iterator[Readers]:
    """Open files as they are asked for; close them all at the end, checking that they are unchanged."""
    with ExitStack() as stack:
        yield Readers(stack)


def _made(edit: Edit, fresh: FreshTensor, begin: int, end: int) -> Iterator[Piece]:
    """The pieces of a tensor that is made from a rule: what it was made from is itself."""
    columns = edit.matrix[1]
    for offset, data in fresh.blocks(begin * columns, end * columns):
        result = torch.from_numpy(data).view(torch_dtype(edit.dtype))
        yield Piece(offset, result, result)


def _check_finite(tensor: torch.Tensor) -> None:
    """Refuse what an adapter holds whole and cannot have meant."""
    wide = tensor.to(torch.float32) if tensor.itemsize == 1 else tensor
    broken = int((~torch.isfinite(wide)).sum())
    if broken:
        raise NumericError("The adapter's tensor holds NaN or infinity", found=f"{broken} values in one piece")


def _pieces(begin: int, end: int, columns: int, elements: int) -> Iterator[tuple[slice, slice]]:
    """Cut rows `begin` to `end` into pieces that are contiguous in memory and have at most `elements` elements."""
    if columns > elements:
        for row in range(begin, end):
            for start in range(0, columns, elements):
                yield slice(row, row + 1), slice(start, min(start + elements, columns))
        return
    height = max(1, elements // max(1, columns))
    for row in range(begin, end, height):
        yield slice(row, min(row + height, end)), slice(0, columns)


def _tiles(shape: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    rows, columns = shape
    width = min(columns, TILE_COLUMNS)
    height = max(1, TILE_ELEMENTS // max(1, width))
    for left in range(0, columns, width):
        for top in range(0, rows, height):
            yield slice(top, min(top + height, rows)), slice(left, min(left + width, columns))


def _moved(part: slice, by: int) -> slice:
    return slice(part.start + by, part.stop + by)


def _shaped(buffer: torch.Tensor, dtype: torch.dtype, shape: tuple[int, int]) -> torch.Tensor:
    return buffer[: shape[0] * shape[1] * dtype.itemsize].view(dtype).view(shape)


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor, to read into or write from."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy().data)


@contextmanager
def _named(key: str) -> Iterator[None]:
    """Let errors of the arithmetic say which tensor they are about."""
    try:
        yield
    except LoraCliError as error:
        if error.tensor is None:
            error.tensor = key
        raise
