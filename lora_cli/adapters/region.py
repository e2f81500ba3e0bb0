"""Where a parameter of a model lies in a checkpoint that stores it otherwise: whole, or in rows of other tensors.

A model may hold a query, a key and a value that its checkpoint stores as one tensor, or the other way round, or in
another order of rows. In words of a module, whatever way its matrix is stored: some of its outputs are elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

Run = tuple[int, int, int]
"""Rows by (start, stop, step), as `range` counts them."""


@dataclass(frozen=True, slots=True)
class Region:
    """Outputs of a stored tensor that are outputs of a parameter.

    Attributes:
        outputs: First output of the stored tensor, and one past the last.
        of: How many outputs the stored tensor has.
        rows: Which outputs of the parameter these are, one after the other, as runs.
    """

    outputs: tuple[int, int]
    of: int
    rows: tuple[Run, ...]

    def __post_init__(self) -> None:
        begin, end = self.outputs
        if not 0 <= begin < end <= self.of or sum(map(len, self._ranges())) != end - begin:
            raise ValueError("the rows of a region are not as many as its outputs")

    def _ranges(self) -> Iterator[range]:
        return (range(*run) for run in self.rows)

    def indices(self) -> list[int]:
        """The parameter's outputs, one for each output of the region."""
        return [row for run in self._ranges() for row in run]


@dataclass(frozen=True, slots=True)
class Place:
    """One stored tensor that holds a parameter, or a part of it.

    Either side may be a stack of matrices, one for each expert of a layer. A region is then one of each matrix.

    Attributes:
        key: Its key in the checkpoint.
        region: Which outputs; None where both have the same.
        turned: The checkpoint stores the other transpose of what the model holds.
        matrix: Which matrix of the parameter, a stack, the stored tensor is; None for all, or where there is one.
        at: Which matrix of the stored tensor, a stack, the parameter is; None likewise.
    """

    key: str
    region: Region | None = None
    turned: bool = False
    matrix: int | None = None
    at: int | None = None


def whole(places: Iterable[Place]) -> str | None:
    """The key of the one tensor that is the parameter; None if there is no such tensor."""
    found = list(places)
    return found[0].key if found and found == [Place(found[0].key)] else None
