"""The engine: computes the bytes that a plan asks for, piece by piece, in buffers made once per thread.

Merging writes these bytes, verifying compares them, and neither knows how they are made. No byte depends on the size
of a piece, the number of threads or the order of work.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch

from lora_cli.adapters.inits import FreshTensor
from lora_cli.arithmetic.fragments import read_fragment
from lora_cli.arithmetic.product import ExactProduct, prepare
from lora_cli.arithmetic.rounding import TileKernel, cast, check_flush_to_zero, slices_for, work_dtype
from lora_cli.arithmetic.strength import sampled
from lora_cli.checkpoint.checkpoint import StoredTensor
from lora_cli.checkpoint.digests import rows_per_cut
from lora_cli.checkpoint.dtypes import DType
from lora_cli.checkpoint.source import Reader, SourceFile
from lora_cli.errors import LoraCliError, MalformedFileError, NumericError
from lora_cli.surgery.budget import BLOCK_ELEMENTS, TILE_COLUMNS, TILE_ELEMENTS
from lora_cli.surgery.plan import MERGEABLE, Edit
from lora_cli.surgery.undo.codecs import LENGTHS, decode


def torch_dtype(dtype: DType) -> torch.dtype:
    """Torch's type for a storage type."""
    found: torch.dtype = getattr(torch, str(dtype.torch_name))
    return found


class Piece(NamedTuple):
    """A contiguous part of a tensor, in buffers that the next piece overwrites.

    Attributes:
        offset: Index of its first element in the tensor.
        source: The flat elements it was made from. Of a copied tensor these are bytes.
        result: The flat elements of the output.
        delta: What was added or taken off, in the working type, every zero +0.0; where it was asked for.
    """

    offset: int
    source: torch.Tensor
    result: torch.Tensor
    delta: torch.Tensor | None = None


Pieces = Generator[Piece, None, None]
"""Pieces as they are made; closing it closes the files that it reads."""

Wanted = Callable[[int, int], bool]
"""Whether deltas are asked for, of a piece with its first element's index in the tensor and its length."""


def every(_first: int, _count: int) -> bool:
    """All deltas."""
    return True


def none(_first: int, _count: int) -> bool:
    """No delta."""
    return False


def sample(first: int, count: int) -> bool:
    """Deltas of pieces in which a weight of the sample is (`arithmetic.strength`)."""
    return any(sampled(first, count))


class Workshop:
    """What one thread keeps between units: a buffer for a piece on each side, and the tile kernels."""

    def __init__(self, strip_bytes: int) -> None:
        check_flush_to_zero()
        self._input = torch.empty(strip_bytes, dtype=torch.uint8)
        self._output = torch.empty(strip_bytes, dtype=torch.uint8)
        self._deltas = torch.empty(0, dtype=torch.uint8)
        self._kernels: dict[torch.dtype, TileKernel] = {}

    def pieces(self, edit: Edit, begin: int, end: int, *, deltas: Wanted = none) -> Pieces:
        """Yield the output of rows `begin` to `end` of a tensor, piece by piece.

        Args:
            edit: What becomes of the tensor.
            begin: First row.
            end: One past the last.
            deltas: Which pieces are to carry the deltas of their elements.

        Raises:
            NumericError: Numbers that must not be merged; the message names the tensor.
            MalformedFileError: An input changed or ends early.
        """
        if edit.fresh is not None:
            yield from _made(edit, edit.fresh, begin, end)
            return
        with _named(edit.key), open_readers() as readers:
            if edit.copies:
                yield from self._copied(edit, begin, end, readers)
            elif edit.forgotten and edit.dtype.name not in MERGEABLE:
                yield from self._restored_bytes(edit, begin, end, readers)
            else:
                yield from self._computed(edit, begin, end, readers, deltas=deltas)

    def _copied(self, edit: Edit, begin: int, end: int, readers: Readers) -> Iterator[Piece]:
        reader, rows = readers.of(edit.source), edit.matrix[0]
        first, last = (edit.nbytes * row // rows for row in (begin, end))
        step = min(BLOCK_ELEMENTS, self._input.numel())
        for offset in range(first, last, step):
            data = self._input[: min(step, last - offset)]
            reader.read_into(edit.source.offset + offset, raw_bytes(data))
            yield Piece(offset, data, data)

    def _computed(self, edit: Edit, begin: int, end: int, readers: Readers, *, deltas: Wanted) -> Iterator[Piece]:
        product = self._product(edit, readers) if edit.terms else None
        reader = readers.of(edit.source)
        stored, out = torch_dtype(edit.source.dtype), torch_dtype(edit.dtype)
        streams = _streams(edit, begin, readers) if edit.forgotten else None
        elements = min(BLOCK_ELEMENTS, self._input.numel() // max(stored.itemsize, out.itemsize))
        for rows, columns in _pieces(begin, end, edit.matrix[1], elements):
            shape = (rows.stop - rows.start, columns.stop - columns.start)
            offset = rows.start * edit.matrix[1] + columns.start
            source = _shaped(self._input, stored, shape)
            reader.read_into(edit.source.offset + offset * stored.itemsize, raw_bytes(source))
            target = _shaped(self._output, out, shape)
            wanted = product is not None and (streams is not None or deltas(offset, source.numel()))
            delta = self._delta_buffer(work_dtype(stored, out), shape) if wanted else None
            if product is not None:
                self._apply(edit, product, source, target, (rows.start, columns.start), delta)
            elif streams is None:
                if edit.operation in ("replace", "append"):
                    _check_finite(source)
                cast(source, target)
            piece = Piece(offset, source.view(-1), target.view(-1), None if delta is None else delta.view(-1))
            if streams is not None and edit.forgotten is not None:
                decode(edit.forgotten.how, piece.source, piece.delta, _next(streams), piece.result)
            yield piece
        if streams is not None:
            _check_ended(streams)

    def _restored_bytes(self, edit: Edit, begin: int, end: int, readers: Readers) -> Iterator[Piece]:
        """Restore a tensor of a type that is no number here, as bytes."""
        assert edit.forgotten is not None  # noqa: S101 (who calls has looked)
        streams = _streams(edit, begin, readers)
        for offset, _, source, _ in self._copied(edit, begin, end, readers):
            target = self._output[: source.numel()]
            decode(edit.forgotten.how, source, None, _next(streams), target)
            yield Piece(offset, source, target)
        _check_ended(streams)

    def _delta_buffer(self, dtype: torch.dtype, shape: tuple[int, int]) -> torch.Tensor:
        needed = shape[0] * shape[1] * dtype.itemsize
        if self._deltas.numel() < needed:
            self._deltas = torch.empty(needed, dtype=torch.uint8)
        return _shaped(self._deltas, dtype, shape)

    def _product(self, edit: Edit, readers: Readers) -> ExactProduct:
        work = work_dtype(torch_dtype(edit.source.dtype), torch_dtype(edit.dtype))
        return prepare([t.delta.term(readers.load, t.weight) for t in edit.terms], slices=slices_for(work))

    def _apply(
        self,
        edit: Edit,
        product: ExactProduct,
        source: torch.Tensor,
        target: torch.Tensor,
        at: tuple[int, int],
        delta: torch.Tensor | None,
    ) -> None:
        """Add or subtract the product, tile by tile, and keep the deltas where they are wanted."""
        kernel = self.kernel(source.dtype, target.dtype)
        transposed = edit.terms[0].transposed
        for down, across in _tiles(source.shape):
            exact = kernel.product(product, _moved(down, at[0]), _moved(across, at[1]), transposed=transposed)
            if delta is not None:
                exact = kernel.delta(exact, out=delta[down, across])
            if edit.operation == "add":
                kernel.merge(source[down, across], exact, target[down, across])
            elif edit.operation == "subtract":
                kernel.subtract(source[down, across], exact, target[down, across])

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

    def load_part(self, tensor: StoredTensor, dtype: torch.dtype, first: int, count: int) -> torch.Tensor:
        """Read `count` elements of a tensor from `first` on, as `dtype`, into memory of their own."""
        data = torch.empty(count, dtype=dtype)
        self.of(tensor).read_into(tensor.offset + first * dtype.itemsize, raw_bytes(data))
        return data

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


def _streams(edit: Edit, begin: int, readers: Readers) -> Iterator[bytes]:
    """The streams of the blocks of one cut, from an undo file."""
    forgotten = edit.forgotten
    assert forgotten is not None  # noqa: S101 (who calls has looked)
    number = begin // rows_per_cut(edit.shape, edit.dtype)
    start = forgotten.stored.offset + sum(forgotten.fragments[:number])
    reader = readers.of(forgotten.stored)
    return read_fragment(
        lambda offset, count: reader.read(start + offset, count), forgotten.fragments[number], LENGTHS[forgotten.how]
    )


def _next(streams: Iterator[bytes]) -> bytes:
    stream = next(streams, None)
    if stream is None:
        raise MalformedFileError("The undo file is damaged", expected="a stream for each block", found="fewer")
    return stream


def _check_ended(streams: Iterator[bytes]) -> None:
    if next(streams, None) is not None:
        raise MalformedFileError("The undo file is damaged", expected="a stream for each block", found="more")


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
