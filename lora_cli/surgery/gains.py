"""What the elements of a tensor are multiplied by.

DoRA multiplies outputs by what is computed from base and deltas for a merge, and kept for its undo. Of other tuners a
formula of the adapter alone says it for each element.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lora_cli.adapters.formula import Values
from lora_cli.arithmetic import dora
from lora_cli.arithmetic.rounding import TileKernel
from lora_cli.surgery.budget import BLOCK_ELEMENTS
from lora_cli.surgery.edit import Contribution, Edit
from lora_cli.surgery.products import Products, typed
from lora_cli.surgery.readers import Readers, raw_bytes, torch_dtype
from lora_cli.surgery.runs import Block


class Gains:
    """The gains of the outputs of one tensor after another, those of the last outputs kept.

    A norm is over all inputs of an output. Where a base stores outputs as rows it is found when their block comes;
    where it stores them as columns the whole tensor is read for it first, once by each worker.
    """

    def __init__(self, products: Products) -> None:
        self._products = products
        self._input = torch.empty(0, dtype=torch.uint8)
        self._last: tuple[Edit, slice, torch.Tensor] | None = None
        self._formulas: tuple[Edit, list[tuple[Contribution, Values]]] | None = None

    def of(self, edit: Edit, block: Block, kernel: TileKernel, readers: Readers) -> torch.Tensor | None:
        """Return the gain of each element of a block, flat; None for a tensor that has none.

        Uses the buffer of deltas.
        """
        if "gain" in edit.acts:
            return self._by_formula(edit, block, kernel, readers)
        if edit.gains is None and not edit.stretched:
            return None
        transposed, (rows, columns) = edit.terms[0].transposed, block.shape
        outputs = slice(0, edit.matrix[1]) if transposed else block.rows
        gains = self._of_outputs(edit, outputs, kernel, readers)
        return gains[block.columns].repeat(rows) if transposed else gains.repeat_interleave(columns)

    def _by_formula(self, edit: Edit, block: Block, kernel: TileKernel, readers: Readers) -> torch.Tensor:
        """The gains that formulas give; ones where there is none."""
        if self._formulas is None or self._formulas[0] is not edit:
            terms = [term for term in edit.terms if not term.adds]
            self._formulas = edit, [(term, term.values(readers.load)) for term in terms]
        gains = torch.ones(block.shape, dtype=torch.float64)
        transposed = edit.terms[0].transposed
        outputs, inputs = (block.columns, block.rows) if transposed else (block.rows, block.columns)
        for term, values in self._formulas[1]:
            changed = term.changed(outputs.start, outputs.stop)
            if changed:
                part = values(torch.tensor(term.rows(changed)), inputs)
                view = gains.T if transposed else gains
                view[_within(changed, outputs.start)] = part
        return gains.view(-1).to(kernel.work)

    def _of_outputs(self, edit: Edit, outputs: slice, kernel: TileKernel, readers: Readers) -> torch.Tensor:
        if self._last is None or self._last[0] is not edit or self._last[1] != outputs:
            if edit.gains is not None:
                gains = readers.load_part(edit.gains, kernel.work, outputs.start, outputs.stop - outputs.start)
            else:
                gains = self._found(edit, outputs, kernel, readers)
            self._last = edit, outputs, gains
        return self._last[2]

    def _found(self, edit: Edit, outputs: slice, kernel: TileKernel, readers: Readers) -> torch.Tensor:
        """Compute gains from the norms of base and deltas together."""
        found = torch.ones(outputs.stop - outputs.start, dtype=kernel.work)
        widest = max(1, BLOCK_ELEMENTS // dora.RUN)
        for begin in range(outputs.start, outputs.stop, widest):
            end = min(begin + widest, outputs.stop)
            sums = self._square_sums(edit, slice(begin, end), kernel, readers)
            for term in (term for term in edit.terms if term.delta.magnitude):
                changed = term.changed(begin, end)
                if changed:
                    lengths = _magnitudes(term, readers)[torch.tensor(term.rows(changed))]
                    gains = dora.gains(lengths, sums[_within(changed, begin)], kernel.work)
                    found[_within(changed, outputs.start)] = gains
        return found

    def _square_sums(self, edit: Edit, outputs: slice, kernel: TileKernel, readers: Readers) -> torch.Tensor:
        sums = dora.SquareSums(outputs.stop - outputs.start)
        transposed = edit.terms[0].transposed
        for block in _strips(edit, outputs, transposed=transposed):
            values = self._read(edit, block, readers).to(kernel.work, copy=True)
            values += self._products.delta(edit, block, kernel, readers)
            matrix = values.view(block.shape)
            sums.add(matrix if transposed else matrix.T)
        return dora.total(sums.groups())

    def _read(self, edit: Edit, block: Block, readers: Readers) -> torch.Tensor:
        """The base's elements of a block, flat, whose rows may lie apart from each other."""
        stored, reader = torch_dtype(edit.source.dtype), readers.of(edit.source)
        if self._input.numel() < block.elements * stored.itemsize:
            self._input = torch.empty(block.elements * stored.itemsize, dtype=torch.uint8)
        data = typed(self._input, stored, block.elements)
        rows, columns = block.shape
        whole = columns == edit.matrix[1]
        for number in range(1 if whole else rows):
            part = data if whole else data[number * columns : (number + 1) * columns]
            at = block.offset + number * edit.matrix[1]
            reader.read_into(edit.source.offset + at * stored.itemsize, raw_bytes(part))
        return data


def _magnitudes(term: Contribution, readers: Readers) -> torch.Tensor:
    """One magnitude for each output of a delta."""
    assert term.delta.magnitude is not None  # noqa: S101 (DoRA is alone on its outputs)
    return readers.load(term.delta.magnitude).reshape(-1)


def _within(outputs: range, first: int) -> slice:
    """Outputs, counted from some first one."""
    return slice(outputs.start - first, outputs.stop - first, outputs.step)


def _strips(edit: Edit, outputs: slice, *, transposed: bool) -> Iterator[Block]:
    """Cut some outputs into blocks of all of them and whole runs of inputs."""
    rows, columns = edit.matrix
    inputs = rows if transposed else columns
    step = max(1, BLOCK_ELEMENTS // (outputs.stop - outputs.start) // dora.RUN) * dora.RUN
    for begin in range(0, inputs, step):
        strip = slice(begin, min(begin + step, inputs))
        down, across = (strip, outputs) if transposed else (outputs, strip)
        yield Block(down.start * columns + across.start, down, across)
