"""The engine: computes the bytes that a plan asks for, piece by piece, in buffers made once per worker.

Merging writes these bytes, verifying compares them, and neither knows how they are made. No byte depends on the size
of a piece, the number of workers or the order of work.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from lora_cli.adapters.inits import FreshTensor
from lora_cli.arithmetic.fragments import read_fragment
from lora_cli.arithmetic.rounding import TileKernel, cast, check_flush_to_zero, work_dtype
from lora_cli.checkpoint.digests import rows_per_cut
from lora_cli.errors import LoraCliError, MalformedFileError, NumericError
from lora_cli.surgery.broken import broken_tensor
from lora_cli.surgery.budget import BLOCK_ELEMENTS, TILE_ELEMENTS
from lora_cli.surgery.edit import MERGEABLE, Edit
from lora_cli.surgery.gains import Gains
from lora_cli.surgery.maps import RowMaps
from lora_cli.surgery.products import Products, typed
from lora_cli.surgery.readers import Readers, open_readers, raw_bytes, torch_dtype
from lora_cli.surgery.rows import check_finite, lay_rows
from lora_cli.surgery.runs import Block
from lora_cli.surgery.undo.codecs import LENGTHS, Summand, decode


class Piece(NamedTuple):
    """A contiguous part of a tensor, in buffers that the next piece overwrites.

    Attributes:
        offset: Index of its first element in the tensor.
        source: The flat elements it was made from. Of a copied tensor these are bytes.
        result: The flat elements of the output.
        delta: What was added or taken off, in the working type, every zero +0.0; of tensors that take deltas.
        gains: What the sum was multiplied by, of each element, where it was.
        ends_block: Whether a block ends with it. No piece is longer than a block.
    """

    offset: int
    source: torch.Tensor
    result: torch.Tensor
    delta: torch.Tensor | None = None
    gains: torch.Tensor | None = None
    ends_block: bool = True

    @property
    def wanted(self) -> torch.Tensor | None:
        """The change before it was rounded: what was added; with gains all that they make of the sum but the source."""
        if self.delta is None or self.gains is None:
            return self.delta
        source = self.source.to(self.delta.dtype)
        return (source + self.delta) * self.gains - source


Pieces = Generator[Piece, None, None]
"""Pieces as they are made; closing it closes the files that it reads."""


class Workshop:
    """What one worker keeps between units: a buffer for a piece on each side, and the tile kernels."""

    def __init__(self, strip_bytes: int) -> None:
        check_flush_to_zero()
        self._input = torch.empty(strip_bytes, dtype=torch.uint8)
        self._output = torch.empty(strip_bytes, dtype=torch.uint8)
        self._kernels: dict[torch.dtype, TileKernel] = {}
        self._products = Products()
        self._gains = Gains(self._products)

    def pieces(self, edit: Edit, begin: int, end: int) -> Pieces:
        """Yield the output of rows `begin` to `end` of a tensor, piece by piece.

        Args:
            edit: What becomes of the tensor.
            begin: First row.
            end: One past the last.

        Raises:
            NumericError: Numbers that must not be merged; the message names the tensor.
            MalformedFileError: An input changed or ends early.
        """
        if edit.fresh is not None:
            yield from _made(edit, edit.fresh, begin, end)
            return
        with _named(edit.key), open_readers() as readers, _explained(edit, readers):
            if edit.copies:
                yield from self._copied(edit, begin, end, readers)
            elif edit.forgotten and edit.dtype.name not in MERGEABLE:
                yield from self._restored_bytes(edit, begin, end, readers)
            elif edit.forgotten:
                yield from self._restored(edit, begin, end, readers)
            elif "map" in edit.acts:
                yield from self._mapped(edit, begin, end, readers)
            elif edit.terms:
                yield from self._changed(edit, begin, end, readers)
            else:
                yield from self._cast(edit, begin, end, readers)

    def _copied(self, edit: Edit, begin: int, end: int, readers: Readers) -> Iterator[Piece]:
        reader, rows = readers.of(edit.source), edit.matrix[0]
        first, last = (edit.nbytes * row // rows for row in (begin, end))
        step = min(BLOCK_ELEMENTS, self._input.numel())
        for offset in range(first, last, step):
            data = self._input[: min(step, last - offset)]
            reader.read_into(edit.source.offset + offset, raw_bytes(data))
            yield Piece(offset, data, data)

    def _changed(self, edit: Edit, begin: int, end: int, readers: Readers) -> Iterator[Piece]:
        """Add or subtract deltas: block by block these, and then tile by tile, all of it while it is in the cache."""
        stored, out = torch_dtype(edit.source.dtype), torch_dtype(edit.dtype)
        kernel, reader = self.kernel(stored, out), readers.of(edit.source)
        step = kernel.subtract if edit.operation == "subtract" else kernel.merge
        for block in self._blocks(edit, begin, end):
            gains = self._gains.of(edit, block, kernel, readers)
            deltas = self._products.delta(edit, block, kernel, readers)
            for first in range(0, block.elements, TILE_ELEMENTS):
                last = min(first + TILE_ELEMENTS, block.elements)
                source, result = typed(self._input, stored, last - first), typed(self._output, out, last - first)
                reader.read_into(edit.source.offset + (block.offset + first) * stored.itemsize, raw_bytes(source))
                delta, gain = deltas[first:last], None if gains is None else gains[first:last]
                step(source, delta, result, gain)
                lay_rows(edit, block.offset + first, source, result, readers, delta)
                yield Piece(block.offset + first, source, result, delta, gain, last == block.elements)

    def _mapped(self, edit: Edit, begin: int, end: int, readers: Readers) -> Iterator[Piece]:
        """Make new rows of old ones, and cut these into blocks."""
        stored, out = torch_dtype(edit.source.dtype), torch_dtype(edit.dtype)
        work, reader, maps = work_dtype(stored, out), readers.of(edit.source), RowMaps(edit, readers)
        for block in self._blocks(edit, begin, end):
            source = typed(self._input, stored, block.elements)
            reader.read_into(edit.source.offset + block.offset * stored.itemsize, raw_bytes(source))
            rows = maps.rows(block.rows)[:, block.columns].reshape(-1)
            result = cast(rows, typed(self._output, out, block.elements))
            delta = (rows - source.to(torch.float64)).to(work) + 0.0
            lay_rows(edit, block.offset, source, result, readers, delta)
            yield Piece(block.offset, source, result, delta)

    def _cast(self, edit: Edit, begin: int, end: int, readers: Readers) -> Iterator[Piece]:
        stored, out = torch_dtype(edit.source.dtype), torch_dtype(edit.dtype)
        reader = readers.of(edit.source)
        for block in self._blocks(edit, begin, end):
            source = typed(self._input, stored, block.elements)
            reader.read_into(edit.source.offset + block.offset * stored.itemsize, raw_bytes(source))
            if edit.displaced is not None or edit.operation == "append":
                check_finite(source)
            result = cast(source, typed(self._output, out, block.elements))
            lay_rows(edit, block.offset, source, result, readers)
            yield Piece(block.offset, source, result)

    def _restored(self, edit: Edit, begin: int, end: int, readers: Readers) -> Iterator[Piece]:
        """Take deltas off and look up what rounding forgot, in whole blocks."""
        assert edit.forgotten is not None  # noqa: S101 (who calls has looked)
        stored, out = torch_dtype(edit.source.dtype), torch_dtype(edit.dtype)
        kernel, reader, streams = self.kernel(stored, out), readers.of(edit.source), _streams(edit, begin, readers)
        for block in self._blocks(edit, begin, end):
            source = typed(self._input, stored, block.elements)
            reader.read_into(edit.source.offset + block.offset * stored.itemsize, raw_bytes(source))
            gains = self._gains.of(edit, block, kernel, readers)
            delta = self._products.delta(edit, block, kernel, readers) if edit.terms else None
            result, change = typed(self._output, out, block.elements), Summand(delta, gains)
            decode(edit.forgotten.how, source, change, _next(streams), result)
            yield Piece(block.offset, source, result, delta, gains)
        _check_ended(streams)

    def _restored_bytes(self, edit: Edit, begin: int, end: int, readers: Readers) -> Iterator[Piece]:
        """Restore a tensor of a type that is no number here, as bytes."""
        assert edit.forgotten is not None  # noqa: S101 (who calls has looked)
        streams = _streams(edit, begin, readers)
        for piece in self._copied(edit, begin, end, readers):
            target = self._output[: piece.source.numel()]
            decode(edit.forgotten.how, piece.source, Summand(), _next(streams), target)
            yield Piece(piece.offset, piece.source, target)
        _check_ended(streams)

    def _blocks(self, edit: Edit, begin: int, end: int) -> Iterator[Block]:
        """Cut rows into blocks that are contiguous in memory and fit the buffers."""
        width = max(torch_dtype(edit.source.dtype).itemsize, torch_dtype(edit.dtype).itemsize)
        elements, columns = min(BLOCK_ELEMENTS, self._input.numel() // width), edit.matrix[1]
        if columns > elements:
            for row in range(begin, end):
                for start in range(0, columns, elements):
                    stop = min(start + elements, columns)
                    yield Block(row * columns + start, slice(row, row + 1), slice(start, stop))
            return
        height = max(1, elements // max(1, columns))
        for row in range(begin, end, height):
            yield Block(row * columns, slice(row, min(row + height, end)), slice(0, columns))

    def kernel(self, *storages: torch.dtype) -> TileKernel:
        """The tile kernel for these storage types."""
        work = work_dtype(*storages)
        if work not in self._kernels:
            self._kernels[work] = TileKernel(work, TILE_ELEMENTS)
        return self._kernels[work]


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


@contextmanager
def _named(key: str) -> Iterator[None]:
    """Let errors of the arithmetic say which tensor they are about."""
    try:
        yield
    except LoraCliError as error:
        if error.tensor is None:
            error.tensor = key
        raise


@contextmanager
def _explained(edit: Edit, readers: Readers) -> Iterator[None]:
    """Let errors of the arithmetic name the tensor of an adapter whose numbers are none."""
    try:
        yield
    except NumericError as error:
        broken = broken_tensor(edit, readers)
        if broken is None:
            raise
        raise broken from error
