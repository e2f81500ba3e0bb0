"""The deltas of blocks: exact products of the factors that stand in a plan, prepared once for each matrix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from lora_cli.arithmetic.product import ExactProduct, Term, prepare
from lora_cli.arithmetic.rounding import TileKernel, slices_for, work_dtype
from lora_cli.surgery.bands import Band, bands_of, covered
from lora_cli.surgery.budget import TILE_COLUMNS, TILE_ELEMENTS
from lora_cli.surgery.edit import Edit
from lora_cli.surgery.readers import Readers, torch_dtype
from lora_cli.surgery.runs import Block, Run, runs


class Products:
    """What one worker keeps of products between blocks: those of the last matrix, and a buffer for deltas."""

    def __init__(self) -> None:
        self._deltas = torch.empty(0, dtype=torch.uint8)
        self._prepared: tuple[Edit, int, dict[int, ExactProduct]] | None = None

    def delta(self, edit: Edit, block: Block, kernel: TileKernel, readers: Readers) -> torch.Tensor:
        """The flat deltas of a block, in strips narrow enough for the columns of A to stay in the cache."""
        nbytes = block.elements * kernel.work.itemsize
        if self._deltas.numel() < nbytes:
            self._deltas = torch.empty(nbytes, dtype=torch.uint8)
        delta = typed(self._deltas, kernel.work, block.elements)
        bands = bands_of(edit.terms)
        if not covered(bands, edit.terms[0]):
            delta.zero_()
        for run in _runs(edit, block):
            matrix = delta[run.place].view(run.shape)
            for band in bands:
                self._add_band(edit, band, run, matrix, readers, kernel)
        return delta

    def _add_band(
        self, edit: Edit, band: Band, run: Run, matrix: torch.Tensor, readers: Readers, kernel: TileKernel
    ) -> None:
        """Write the deltas of some outputs into the part of a block that has them."""
        transposed = edit.terms[0].transposed
        rows, columns = (run.rows, band.within(run.columns)) if transposed else (band.within(run.rows), run.columns)
        if rows.start >= rows.stop or columns.start >= columns.stop:
            return
        part = matrix[_moved(rows, -run.rows.start), _moved(columns, -run.columns.start)]
        product = self._product(edit, run.number, band, readers)
        rows, columns = (rows, _moved(columns, -band.begin)) if transposed else (_moved(rows, -band.begin), columns)
        for down, across in _tiles(part.shape):
            tile = product, _moved(down, rows.start), _moved(across, columns.start)
            kernel.delta(kernel.product(*tile, transposed=transposed), out=part[down, across])

    def _product(self, edit: Edit, index: int, band: Band, readers: Readers) -> ExactProduct:
        """The products of a matrix, kept for its next block and cut: preparing wide factors takes as long as a cut."""
        if self._prepared is None or self._prepared[0] is not edit or self._prepared[1] != index:
            self._prepared = None  # never those of two matrices in memory
            self._prepared = edit, index, {}
        products = self._prepared[2]
        if band.begin not in products:
            work = work_dtype(torch_dtype(edit.source.dtype), torch_dtype(edit.dtype))
            terms = [term.term(readers.load, index) for term in band.terms]
            terms = [Term(term.b[band.begin : band.end], term.a, term.scale) for term in terms]
            products[band.begin] = prepare(terms, slices=slices_for(work))
        return products[band.begin]


def _runs(edit: Edit, block: Block) -> Iterator[Run]:
    """The block itself, or of a stack its parts in each matrix."""
    if edit.terms[0].delta.stack is None:
        yield Run(slice(0, block.elements), 0, block.rows, block.columns)
        return
    yield from runs(block.offset, block.elements, edit.terms[0].matrices, block.elements)


def _tiles(shape: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    rows, columns = shape
    width = min(columns, TILE_COLUMNS)
    height = max(1, TILE_ELEMENTS // max(1, width))
    for left in range(0, columns, width):
        for top in range(0, rows, height):
            yield slice(top, min(top + height, rows)), slice(left, min(left + width, columns))


def _moved(part: slice, by: int) -> slice:
    return slice(part.start + by, part.stop + by)


def typed(buffer: torch.Tensor, dtype: torch.dtype, elements: int) -> torch.Tensor:
    """Take the beginning of a buffer of bytes as so many elements."""
    return buffer[: elements * dtype.itemsize].view(dtype)
