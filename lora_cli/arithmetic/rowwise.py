"""Products of matrices of which each row is what it would be alone, with the same bits on every machine.

What a tuner makes of a weight, it makes row by row; and rows come in blocks that are cut one way in a merge and another
way when it is verified. `product` balances its factors against each other, so that all rows have a say in each. Here
every row of the left factor and every column of the right one is rounded to two grids under its own maximum: again all
products and sums are whole numbers of one unit, and exact in any order.

With β the largest magnitude in a row, α that in a column and p = grid_bits(K) the result is off by at most
K·(2^(1-2p) + 2^-51)·β·α, as `product` derives for two grids.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_cli.arithmetic.grids import check_range, cut, grid_bits, largest
from lora_cli.errors import ShapeError

#: What is smaller counts as zero, so that no grid under it is finer than float64 can hold.
_LEAST = 2.0**-480


class RightFactor:
    """A right factor on its grids, for one left factor after another.

    Args:
        right: (… × K × m), of any float dtype; numbers below 2^-480 count as zero.
    """

    def __init__(self, right: Tensor) -> None:
        values = _lifted(right)
        self._inner = values.shape[-2]
        self._columns = largest(values, -2)
        self._factor = cut(values, self._columns.unsqueeze(-2), grid_bits(self._inner), 2)
        self._dimensions = right.dim()

    def after(self, left: Tensor) -> Tensor:
        """Return left · right in float64.

        Args:
            left: (… × n × K), as many dimensions, of which those in front may be one on either side.

        Raises:
            ShapeError: The factors do not fit together.
            NumericError: The product may exceed the largest double.
        """
        if left.dim() != self._dimensions or left.shape[-1] != self._inner:
            raise ShapeError(
                "The factors do not fit together", expected=f"(…, n, {self._inner})", found=tuple(left.shape)
            )
        values = _lifted(left)
        rows = largest(values, -1)
        check_range(rows.flatten(), self._columns.flatten(), self._inner, 2)
        one, two = cut(values, rows.unsqueeze(-1), grid_bits(self._inner), 2), self._factor
        assert one.lo is not None  # noqa: S101 (two grids were asked for)
        assert two.lo is not None  # noqa: S101 (likewise)
        result = one.hi @ two.hi
        result += one.hi @ two.lo
        result += one.lo @ two.hi
        return result


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """Return left · right in float64; see `RightFactor`."""
    return RightFactor(right).after(left)


def dots(one: Tensor, other: Tensor) -> Tensor:
    """Return the product of each row of one with the same row of the other: (n × K) and (n × K) make (n,)."""
    return multiply(one.unsqueeze(-2), other.unsqueeze(-1)).reshape(-1)


def _lifted(matrix: Tensor) -> Tensor:
    """A copy in float64, without numbers that are too small."""
    values = matrix.detach().to(torch.float64, copy=True)
    return values.masked_fill_(values.abs() < _LEAST, 0.0)
