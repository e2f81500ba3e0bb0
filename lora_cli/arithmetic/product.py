"""The product `Σ scale·B·A`, with the same bits in any order, blocking, layout, thread count and device.

A floating GEMM rounds its partial sums, so its bits depend on how the work was cut. Here the factors are
rounded instead, each row of B and each column of A to a grid so coarse that every product and every partial
sum is a whole number of one unit, and at most 2^53 of them. float64 then returns the exact sum whatever the
order.

Source: Ozaki, Ogita, Oishi and Rump 2012, "Error-free transformations of matrix multiplication by using
fast routines of matrix multiplication and its applications", Numerical Algorithms 59. New here is the
balancing of the columns of B against the rows of A, without which a small term stacked with a large one
would be lost.

How far the result is from the true sum. Let K be the number of columns of B, p = grid_bits(K), and β and α
the largest magnitudes in a row of B and in a column of A after the scale was folded in and the factors were
balanced.

- One grid. With 2^(e-1) ≤ β < 2^e the grid's unit is 2^(e-p), so an entry moves by at most d = 2^(e-p-1) ≤
  2^-p·β, and the rounded entries are at most β̂. The sum is exact, hence off by at most K·(d·α +
  β̂·2^-p·α). If β < 2^(e-1)·(1+2^-p) then β̂ ≤ β; else d ≤ 2^-p·β/(1+2^-p) and β̂ ≤ β + d. Either way d +
  2^-p·β̂ ≤ 2^(1-p)·β, so the sum is off by at most **K·2^(1-p)·β·α**.
- Two grids. What the first left, at most 2^(e-p-1), is rounded to multiples of 2^(e-2p-1). The two parts
  together are off by at most 2^(-2p-1)·β, which costs K·2^(-2p)·β·α as above; lo·lo, which is left out, is
  at most K·2^(-2p)·β·α. The three products are exact, their two additions round: **K·(2^(1-2p) +
  2^-52)·β·α** and terms of order 2^(-52-p).
- Folding the scale in rounds each entry of B once: K·2^-53·β·α more, or where that result is subnormal
  2^-1075 for each entry of A.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lora_cli.arithmetic.grids import Factor, balance, check_range, cut, grid_bits, largest
from lora_cli.errors import NumericError, ShapeError

__all__ = ["ExactProduct", "Term", "grid_bits", "prepare"]


@dataclass(frozen=True)
class Term:
    """One low-rank change, `scale · b · a`.

    Attributes:
        b: The left factor, out × K_i, of any float dtype. A bias is its column, with a 1 × 1 one as `a`.
        a: The right factor, K_i × in, of any float dtype.
        scale: What multiplies the product. The opposite scale gives the opposite product, bit for bit.
    """

    b: Tensor
    a: Tensor
    scale: float


class ExactProduct:
    """`Σ scale·B·A` of one target, out × in, ready to be computed tile by tile. Threads may share it.

    Attributes:
        shape: (out, in).
        rank: K, the ranks of all terms together.
        slices: How many grids each factor is cut into.
    """

    def __init__(self, left: Factor, right: Factor, floor: float) -> None:
        self._left = left
        self._right = right
        self._floor = floor
        self.shape = (left.hi.shape[0], right.hi.shape[1])
        self.rank = left.hi.shape[1]
        self.slices: Literal[1, 2] = 1 if left.lo is None else 2

    def tile(
        self,
        rows: slice | Tensor,
        columns: slice | Tensor,
        *,
        transposed: bool = False,
        out: Tensor | None = None,
        scratch: Tensor | None = None,
    ) -> Tensor:
        """Return rows × columns of the product, in float64.

        With one slice of each factor the exact sum of the rounded factors' products; with two, hi·hi plus
        hi·lo plus lo·hi (B's part first), three exact sums added in this order.

        Args:
            rows: Rows of the result, in a run or by their indices.
            columns: Columns of the result, likewise.
            transposed: Take rows and columns of the (in, out) matrix, as Conv1D and embeddings store it.
            out: Where the result goes, float64 and of its shape.
            scratch: Of the same shape and dtype, used with two slices. With both given nothing is allocated.

        Returns:
            `out`, or a new contiguous tensor.

        Raises:
            ShapeError: `out` or `scratch` has another shape.
        """
        b_rows, a_columns = (columns, rows) if transposed else (rows, columns)
        left, right = self._left.hi[b_rows], self._right.hi[:, a_columns]
        shape = (left.shape[0], right.shape[1])
        out = _buffer(out, shape[::-1] if transposed else shape, left.device)
        _multiply(left, right, transposed, out)
        if self._left.lo is not None and self._right.lo is not None:
            scratch = _buffer(scratch, tuple(out.shape), left.device)
            _multiply(left, self._right.lo[:, a_columns], transposed, scratch)
            torch.add(out, scratch, out=out)
            _multiply(self._left.lo[b_rows], right, transposed, scratch)
            torch.add(out, scratch, out=out)
        return out

    def error_bound(self, rows: slice, columns: slice) -> Tensor:
        """Return how far each element may be from the true Σ scale·B·A, for rows × columns of (out, in).

        With β and α the balanced maxima of the element's row of B and column of A and p = grid_bits(K):
        K·β·α·(2^(1-p) + 2^-52) for one slice and K·β·α·(2^(1-2p) + 2^-51) for two. The module's docstring
        derives them; the second summand covers the folded scale, the final additions and the rounding of
        the bound itself.
        """
        bits = grid_bits(self.rank)
        share = 2.0 ** (1 - bits) + 2.0**-52 if self.slices == 1 else 2.0 ** (1 - 2 * bits) + 2.0**-51
        beta = self._left.largest[rows].unsqueeze(1)
        alpha = self._right.largest[columns].unsqueeze(0)
        return beta * alpha * (share * self.rank) + self._floor


def prepare(terms: Sequence[Term], *, slices: Literal[1, 2]) -> ExactProduct:
    """Stack, scale, balance and round the factors of one target.

    The result does not depend on the order of terms, nor on the order of the columns of B and rows of A.

    Args:
        terms: The changes of one target, all of one shape, on one device.
        slices: Grids of each factor: one is enough for a float32 delta, two for a float64 one.

    Returns:
        The product, from which any tile can be taken.

    Raises:
        ShapeError: There are no terms, or their shapes do not fit together.
        NumericError: A factor or scale holds NaN or infinity, scaling overflows, or the magnitudes leave no
            room for exact sums (far outside of what float32 holds).
    """
    _check_shapes(terms)
    left = _stack([term.b for term in terms], dim=1)
    right = _stack([term.a for term in terms], dim=0)
    _fold_scales(left, terms)
    # Scaled below the least normal double, an entry of B is off by up to 2^-1075, times an entry of A.
    columns_of_b, rows_of_a = largest(left, 0), largest(right, 1)
    _check_finite(terms, columns_of_b, rows_of_a)
    floor = 2.0**-1074 * (1.0 + left.shape[1] * float(largest(rows_of_a, 0)))
    balance(left, right, columns_of_b, rows_of_a)
    bits = grid_bits(left.shape[1])
    in_rows, in_columns = largest(left, 1), largest(right, 0)
    check_range(in_rows, in_columns, left.shape[1], slices)
    return ExactProduct(
        cut(left, in_rows.unsqueeze(1), bits, slices),
        cut(right, in_columns.unsqueeze(0), bits, slices),
        floor,
    )


def _check_shapes(terms: Sequence[Term]) -> None:
    if not terms:
        raise ShapeError("A product needs at least one term")
    for term in terms:
        shapes = f"{tuple(term.b.shape)} · {tuple(term.a.shape)}"
        if term.b.dim() != 2 or term.a.dim() != 2 or term.b.shape[1] != term.a.shape[0]:
            raise ShapeError("The factors do not fit together", expected="(out, K) · (K, in)", found=shapes)
        shape, first = (term.b.shape[0], term.a.shape[1]), (terms[0].b.shape[0], terms[0].a.shape[1])
        if shape != first:
            raise ShapeError("Terms of one target differ in shape", expected=first, found=shape)


def _check_finite(terms: Sequence[Term], columns_of_b: Tensor, rows_of_a: Tensor) -> None:
    """Refuse NaN and infinity, which maxima pass on; only then look where they come from."""
    if bool(torch.isfinite(columns_of_b).all()) and bool(torch.isfinite(rows_of_a).all()):
        return
    for term in terms:
        if not math.isfinite(term.scale):
            raise NumericError("A scale is not a finite number", found=term.scale)
        for name, factor in (("B", term.b), ("A", term.a)):
            bad = int((~torch.isfinite(factor.detach().to(torch.float64))).sum())
            if bad:
                raise NumericError(
                    f"The factor {name} holds NaN or infinity", found=f"{bad} of {factor.numel()} values"
                )
    raise NumericError("B overflows when it is scaled", found=f"scales {', '.join(str(term.scale) for term in terms)}")


def _stack(factors: Sequence[Tensor], dim: int) -> Tensor:
    """Return the factors side by side along K, exactly, in float64 and in memory of their own."""
    return torch.cat([factor.detach().to(torch.float64) for factor in factors], dim)


def _fold_scales(left: Tensor, terms: Sequence[Term]) -> None:
    """Multiply each term's columns of B by its scale, in place: one rounding an element."""
    start = 0
    for term in terms:
        end = start + term.b.shape[1]
        left[:, start:end].mul_(term.scale)
        start = end


def _multiply(left: Tensor, right: Tensor, transposed: bool, out: Tensor) -> None:
    if transposed:
        torch.mm(right.t(), left.t(), out=out)
    else:
        torch.mm(left, right, out=out)


def _buffer(given: Tensor | None, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the buffer given, if it fits: `mm` would silently reallocate one that does not."""
    if given is None:
        return torch.empty(shape, dtype=torch.float64, device=device)
    if tuple(given.shape) != shape or given.dtype != torch.float64:
        raise ShapeError(
            "The buffer does not fit the tile",
            expected=f"float64 {shape}",
            found=f"{given.dtype} {tuple(given.shape)}",
        )
    return given
