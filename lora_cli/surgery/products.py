"""The deltas of blocks: exact products of the factors that stand in a plan, and what formulas add to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from lora_cli.arithmetic.product import Term, prepare
from lora_cli.arithmetic.rounding import TileKernel, slices_for, work_dtype
from lora_cli.surgery.bands import Band, bands_of
from lora_cli.surgery.before import before
from lora_cli.surgery.budget import TILE_COLUMNS, TILE_ELEMENTS
from lora_cli.surgery.edit import Edit
from lora_cli.surgery.readers import Readers, torch_dtype
from lora_cli.surgery.runs import Block, Run, runs


class Products:
    """What one worker keeps of deltas between blocks: those of the last matrix, and a buffer."""

    def __init__(self) -> None:
        self._deltas = torch.empty(0, dtype=torch.uint8)
        self._prepared: _Matrix | None = None

    def delta(self, edit: Edit, block: Block, kernel: TileKernel, readers: Readers) -> torch.Tensor:
        """The flat deltas of a block, in strips narrow enough for the columns of A to stay in the cache."""
        nbytes = block.elements * kernel.work.itemsize
        if self._deltas.numel() < nbytes:
            self._deltas = torch.empty(nbytes, dtype=torch.uint8)
        delta = typed(self._deltas, kernel.work, block.elements)
        for run in _runs(edit, block):
            matrix = delta[run.place].view(run.shape)
            prepared = self._matrix(edit, run.number)
            if not prepared.whole:
                matrix.zero_()
            for band in prepared.bands:
                _add_band(prepared.summands(band, readers), band, run, matrix, kernel, edit.terms[0].transposed)
        return delta

    def _matrix(self, edit: Edit, number: int) -> _Matrix:
        """What is kept of a matrix for its next block and cut: preparing wide factors takes as long as a cut."""
        if self._prepared is None or self._prepared.edit is not edit or self._prepared.number != number:
            self._prepared = None  # never two matrices in memory
            self._prepared = _Matrix(edit, number)
        return self._prepared


class _Matrix:
    """The deltas on one matrix of a tensor.

    Attributes:
        edit: The tensor.
        number: Which of its matrices.
        bands: The bands of outputs that deltas are added to.
        whole: Whether these leave out no output.
    """

    def __init__(self, edit: Edit, number: int) -> None:
        self.edit = edit
        self.number = number
        self.bands = bands_of([term for term in edit.terms if term.adds], number)
        first = edit.terms[0]
        outputs = first.matrices[2 if first.transposed else 1]
        self.whole = sum(len(band.stored) for band in self.bands) == outputs
        self._summands: dict[int, _Summands] = {}

    def summands(self, band: Band, readers: Readers) -> _Summands:
        """What is added to the outputs of a band, with its factors read."""
        if band.begin not in self._summands:
            self._summands[band.begin] = _Summands(self.edit, self.number, band, readers)
        return self._summands[band.begin]


class _Summands:
    """What is added to the outputs of one band of a matrix: a product of all factors, and what formulas give."""

    def __init__(self, edit: Edit, number: int, band: Band, readers: Readers) -> None:
        self._band = band
        work = work_dtype(torch_dtype(edit.source.dtype), torch_dtype(edit.dtype))
        terms = [term.term(readers.load, number) for term in band.terms if term.delta.acts == "product"]
        terms = [Term(term.b[band.begin : band.end : band.step], term.a, term.scale) for term in terms]
        self._product = prepare(terms, slices=slices_for(work)) if terms else None
        sums = [term for term in band.terms if term.delta.acts == "sum"]
        self._formulas = [(term, term.values(readers.load, before(term, readers))) for term in sums]

    def tile(self, rows: slice, columns: slice, kernel: TileKernel, *, transposed: bool) -> torch.Tensor:
        """Their sum for rows × columns of the stored matrix, counted from the band's first output, in float64.

        It does not depend on the order of adapters: a product does not, nor does the sum of two; three and more are
        added from the smallest to the largest.
        """
        outputs, inputs = (columns, rows) if transposed else (rows, columns)
        found = []
        if self._product is not None:
            found.append(kernel.product(self._product, rows, columns, transposed=transposed))
        for term, values in self._formulas:
            tile = values(torch.tensor(term.rows(self._band.stored[outputs])), inputs)
            found.append(tile.T if transposed else tile)
        if len(found) == 1:
            return found[0]
        ordered = torch.stack(found).sort(dim=0).values
        total = ordered[0]
        for summand in ordered[1:]:
            total += summand
        return total


def _add_band(
    summands: _Summands, band: Band, run: Run, matrix: torch.Tensor, kernel: TileKernel, transposed: bool
) -> None:
    """Write the deltas of some outputs into the part of a block that has them."""
    outputs, inputs = (run.columns, run.rows) if transposed else (run.rows, run.columns)
    ours = band.within(outputs)
    lying = band.stored[ours]
    if not lying or inputs.start >= inputs.stop:
        return
    place = slice(lying.start - outputs.start, lying.stop - outputs.start, lying.step)
    part = matrix[:, place] if transposed else matrix[place]
    rows, columns = (inputs, ours) if transposed else (ours, inputs)
    for down, across in _tiles(part.shape):
        tile = summands.tile(_moved(down, rows.start), _moved(across, columns.start), kernel, transposed=transposed)
        kernel.delta(tile, out=part[down, across])


def _runs(edit: Edit, block: Block) -> Iterator[Run]:
    """The block itself, or of a stack its parts in each matrix."""
    if edit.terms[0].count is None:
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
