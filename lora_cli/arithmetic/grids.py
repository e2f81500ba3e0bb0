"""Factors on grids: balanced against each other, then rounded so coarsely that their products add up exactly.

`product.py` says why, and how far that is from the factors given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lora_cli.arithmetic.floats import power_of_two
from lora_cli.errors import NumericError

#: No shift beyond this: 2^±1000 is a normal double, and no balance needs more.
_FURTHEST_SHIFT = 1000
#: Units of a factor are at least this power of two, so that what balancing pushes under 2^-1022 rounds to
#: zero anyway.
_LEAST_FACTOR_UNIT = -1020
#: Units of a product are at least the least double.
_LEAST_PRODUCT_UNIT = -1074
#: Sums stay below this power of two.
_LARGEST_SUM = 1023


@dataclass(frozen=True)
class Factor:
    """A factor on its grids, and the largest magnitudes that its rows (B) or columns (A) had before."""

    hi: Tensor
    lo: Tensor | None
    largest: Tensor


def grid_bits(k: int) -> int:
    """Return floor((53 - ceil(log2 k)) / 2): with so many bits to an entry, k products add up exactly."""
    return (53 - max(k - 1, 0).bit_length()) // 2


def largest(matrix: Tensor, dim: int) -> Tensor:
    """Return the largest magnitude along `dim`; zero where there is nothing."""
    if matrix.shape[dim] == 0:
        return matrix.sum(dim)
    return torch.maximum(matrix.amax(dim), matrix.amin(dim).neg_())


def _exponent(magnitude: Tensor) -> Tensor:
    """Return e with 2^(e-1) ≤ magnitude < 2^e, and 0 for zero."""
    return torch.frexp(magnitude).exponent


def balance(left: Tensor, right: Tensor, columns_of_b: Tensor, rows_of_a: Tensor) -> None:
    """Move powers of two between column k of B and row k of A until their maxima are alike, in place.

    An odd difference of exponents leaves B the larger one; that is decided in these roles, so that a
    transposed layout gets the same numbers. Where either is all zero both become zero: they add nothing,
    and must not widen a grid.
    """
    shift = (_exponent(columns_of_b) - _exponent(rows_of_a)).div(2, rounding_mode="floor")
    shift.clamp_(-_FURTHEST_SHIFT, _FURTHEST_SHIFT)
    alive = ((columns_of_b > 0) & (rows_of_a > 0)).to(torch.float64)
    left.mul_((power_of_two(-shift) * alive).unsqueeze(0))
    right.mul_((power_of_two(shift) * alive).unsqueeze(1))


def check_range(in_rows: Tensor, in_columns: Tensor, rank: int, slices: Literal[1, 2]) -> None:
    """Refuse magnitudes whose finest unit or largest sum float64 cannot hold."""
    rows, columns = _exponent(in_rows[in_rows > 0]), _exponent(in_columns[in_columns > 0])
    if rows.numel() == 0 or columns.numel() == 0:
        return
    bits = grid_bits(rank)
    finest = bits if slices == 1 else 2 * bits + 1
    least = (int(rows.min()), int(columns.min()))
    if min(least) - finest < _LEAST_FACTOR_UNIT or sum(least) - bits - finest < _LEAST_PRODUCT_UNIT:
        raise NumericError(
            "The factors are too small for an exact product",
            found=f"rows of B below 2^{least[0]} and columns of A below 2^{least[1]}, once balanced",
        )
    if int(rows.max()) + int(columns.max()) + (rank - 1).bit_length() > _LARGEST_SUM:
        raise NumericError("The product of the factors may exceed the largest double")


def cut(matrix: Tensor, maxima: Tensor, bits: int, slices: Literal[1, 2]) -> Factor:
    """Round a balanced factor, which is used up, to grids of `bits` under the maxima of its rows or columns."""
    exponent = _exponent(maxima)
    hi = _on_grid(matrix, exponent - bits)
    lo = _on_grid(matrix.sub_(hi), exponent - (2 * bits + 1)) if slices == 2 else None
    return Factor(hi, lo, maxima.flatten())


def _on_grid(matrix: Tensor, unit: Tensor) -> Tensor:
    """Round to the nearest multiples of 2^unit, ties to even; all steps but the rounding are exact."""
    return matrix.mul(power_of_two(-unit)).round_().mul_(power_of_two(unit))
