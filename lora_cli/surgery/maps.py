"""New rows of old ones, for tuners that rotate, mix or rescale what is there: whole rows, and whole groups of them."""

from __future__ import annotations

import torch

from lora_cli.adapters.formula import Formula, Rows
from lora_cli.errors import NumericError
from lora_cli.surgery.before import before
from lora_cli.surgery.edit import Contribution, Edit
from lora_cli.surgery.readers import Readers, torch_dtype


class RowMaps:
    """The new rows of one tensor, in float64; those of the last groups are kept.

    Args:
        edit: The tensor. Its deltas are maps, and none of them meets another.
        readers: Read it and them.
    """

    def __init__(self, edit: Edit, readers: Readers) -> None:
        self._edit = edit
        self._readers = readers
        self._maps: list[tuple[Contribution, Rows, int]] = []
        for term in edit.terms:
            assert isinstance(term.delta, Formula)  # noqa: S101 (who calls has looked at `acts`)
            rows = term.delta.rows(readers.load, term.weight, before(term, readers))
            self._maps.append((term, rows, term.delta.group))
        self._first, self._made = 0, torch.empty((0, 0), dtype=torch.float64)

    def rows(self, wanted: slice) -> torch.Tensor:
        """Return some rows of the tensor as they become.

        Raises:
            NumericError: What is there, or what comes out, is no number.
        """
        if not self._first <= wanted.start < wanted.stop <= self._first + len(self._made):
            self._make(wanted)
        return self._made[wanted.start - self._first : wanted.stop - self._first]

    def _make(self, wanted: slice) -> None:
        edit = self._edit
        first, last = self._groups_of(wanted)
        columns, dtype = edit.matrix[1], torch_dtype(edit.source.dtype)
        stored = self._readers.load_part(edit.source, dtype, first * columns, (last - first) * columns)
        old = stored.to(torch.float64).view(last - first, columns)
        _check(old, "The base holds NaN or infinity")
        new = old.clone()
        for term, rows, _ in self._maps:
            changed = term.changed(first, last)
            if changed:
                place = slice(changed.start - first, changed.stop - first, changed.step)
                new[place] = rows(torch.tensor(term.rows(changed)), old[place])
        _check(new, "What an adapter makes of the base is no finite number")
        self._first, self._made = first, new

    def _groups_of(self, wanted: slice) -> tuple[int, int]:
        """First of the rows that some rows depend on, and one past the last; groups begin where a map's outputs do."""
        first, last = wanted.start, wanted.stop
        for term, _, group in self._maps:
            begin, end = term.outputs
            if begin < wanted.stop and wanted.start < end:
                size = group * term.step
                first = min(first, begin + (max(wanted.start, begin) - begin) // size * size)
                last = max(last, min(end, begin - (begin - min(wanted.stop, end)) // size * size))
        return first, last


def _check(values: torch.Tensor, words: str) -> None:
    broken = int((~torch.isfinite(values)).sum())
    if broken:
        raise NumericError(words, found=f"{broken} values in some rows")
