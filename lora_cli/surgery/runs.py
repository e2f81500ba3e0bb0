"""Cutting a stretch of a tensor into tiles of the matrices that its deltas see: one matrix, or a stack of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Run(NamedTuple):
    """A part of a stretch that is a tile of one matrix: whole rows, or a part of one row.

    Attributes:
        place: Where its elements are in the stretch.
        number: Which matrix of the stack it is of.
        rows: Rows of that matrix.
        columns: Columns of it.
    """

    place: slice
    number: int
    rows: slice
    columns: slice

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the tile."""
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start


def runs(offset: int, elements: int, matrices: tuple[int, int, int], longest: int) -> Iterator[Run]:
    """Cut a stretch of a tensor into runs, in order.

    Args:
        offset: Index of its first element in the tensor.
        elements: How long it is.
        matrices: (matrices, rows, columns) of the tensor.
        longest: Most elements of a run.
    """
    _, height, width = matrices
    at = 0
    while at < elements:
        row, column = divmod(offset + at, width)
        index, row = divmod(row, height)
        most = min(longest, elements - at)
        whole = min(most // width, height - row) if column == 0 else 0
        count = whole * width or min(most, width - column)
        columns = slice(0, width) if whole else slice(column, column + count)
        yield Run(slice(at, at + count), index, slice(row, row + max(1, whole)), columns)
        at += count


class Block(NamedTuple):
    """A part of a tensor as a matrix: the index of its first element, and which rows and columns it has."""

    offset: int
    rows: slice
    columns: slice

    @property
    def shape(self) -> tuple[int, int]:
        """How many rows and columns."""
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start

    @property
    def elements(self) -> int:
        """How many elements."""
        return self.shape[0] * self.shape[1]
