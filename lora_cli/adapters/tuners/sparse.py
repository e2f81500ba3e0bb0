"""Numbers at single places of a matrix: what several tuners train, and what some transform afterwards."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_cli.errors import NumericError

if TYPE_CHECKING:
    from torch import Tensor


class Scattered:
    """A matrix of zeros but for some numbers.

    Args:
        places: Where each number is, row · width + column, in int64; each within the matrix.
        numbers: The numbers, in float64.
        width: Columns of the matrix.

    Raises:
        NumericError: A place is there twice.
    """

    def __init__(self, places: Tensor, numbers: Tensor, width: int) -> None:
        import torch

        places, order = torch.sort(places)
        twice = int((places[1:] == places[:-1]).sum())
        if twice:
            raise NumericError("A place of the matrix is there twice", found=f"{twice} times")
        self._rows, self._columns, self._numbers = places // width, places % width, numbers[order]

    def tile(self, rows: Tensor, columns: slice) -> Tensor:
        """Return rows (by their indices, none twice) × columns of the matrix, in float64."""
        import torch

        made = torch.zeros((len(rows), columns.stop - columns.start), dtype=torch.float64)
        if made.numel() == 0:
            return made
        least, most = int(rows.min()), int(rows.max())
        first, last = torch.searchsorted(self._rows, torch.tensor([least, most + 1])).tolist()
        position = torch.full((most - least + 1,), -1)
        position[rows - least] = torch.arange(len(rows))
        at, across = position[self._rows[first:last] - least], self._columns[first:last] - columns.start
        wanted = (at >= 0) & (across >= 0) & (across < made.shape[1])
        made[at[wanted], across[wanted]] = self._numbers[first:last][wanted]
        return made
