"""Where a parameter of a model lies in a checkpoint that stores it otherwise: whole, or in rows of other tensors.

A model may hold a query, a key and a value that its checkpoint stores as one tensor, or the other way round, or in
another order of rows. In words of a module, whatever way its matrix is stored: some of its outputs are elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
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
        step: From one output of the stored tensor to the next: 2 where those of two parameters take turns.
    """

    outputs: tuple[int, int]
    of: int
    rows: tuple[Run, ...]
    step: int = 1

    def __post_init__(self) -> None:
        begin, end = self.outputs
        inside = 0 <= begin < end <= self.of and self.step > 0
        if not inside or sum(map(len, self._ranges())) != len(self.stored):
            raise ValueError("the rows of a region are not as many as its outputs")

    @property
    def stored(self) -> range:
        """Which outputs of the stored tensor."""
        return range(*self.outputs, self.step)

    def _ranges(self) -> Iterator[range]:
        return (range(*run) for run in self.rows)

    def indices(self) -> list[int]:
        """The parameter's outputs, one for each output of the region."""
        return [row for run in self._ranges() for row in run]

    @property
    def is_whole(self) -> bool:
        """Whether both have the same outputs in the same order."""
        return (self.outputs, self.step, self.rows) == ((0, self.of), 1, ((0, self.of, 1),))

    def cut(self, wanted: range) -> Region | None:
        """Where some outputs of the parameter lie, as if these alone were a parameter; None where none of them do.

        Raises:
            ValueError: They do not lie at equal distances.
        """
        pairs = [(at, wanted.index(row)) for at, row in zip(self.stored, self.indices(), strict=True) if row in wanted]
        if not pairs:
            return None
        stored = runs_of([at for at, _ in pairs])
        if len(stored) > 1:
            raise ValueError("the outputs of a part do not lie at equal distances")
        begin, end, step = stored[0]
        return Region((begin, end), self.of, runs_of([row for _, row in pairs]), step)


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


def runs_of(numbers: Sequence[int]) -> tuple[Run, ...]:
    """Numbers as runs with equal steps forward, each as long as it can be."""
    runs: list[Run] = []
    first = 0
    while first < len(numbers):
        step = numbers[first + 1] - numbers[first] if first + 1 < len(numbers) else 1
        last = first + 1
        while step > 0 and last < len(numbers) and numbers[last] - numbers[last - 1] == step:
            last += 1
        runs.append((numbers[first], numbers[last - 1] + 1, max(step, 1)))
        first = last
    return tuple(runs)


def whole(places: Iterable[Place]) -> str | None:
    """The key of the one tensor that is the parameter; None if there is no such tensor."""
    found = list(places)
    return found[0].key if found and found == [Place(found[0].key)] else None
