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

    Attributes:
        key: Its key in the checkpoint.
        region: Which part; None where both are one and the same.
        turned: The checkpoint stores the other transpose of what the model holds.
    """

    key: str
    region: Region | None = None
    turned: bool = False


def whole(places: Iterable[Place]) -> str | None:
    """The key of the one tensor that is the parameter; None if there is no such tensor."""
    found = list(places)
    alone = len(found) == 1 and found[0].region is None and not found[0].turned
    return found[0].key if alone else None
