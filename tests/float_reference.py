"""The float64 reference of a merge, and how far from it a merged tensor may lie.

Written from the algebra alone and independent of `lora_cli`, so that the two can disagree. A merged element
is

    round_storage(round_work(w + round_work(s·B·A)))

and so lies within half an ULP of storage, two half ULPs of the working type and the product's own bound of
the exact `w + s·B·A`. No tolerance is picked by hand: every part of the bound is derived where it is
computed.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[np.float64]

CHUNK_ROWS: Final = 256
"""Rows compared at once: the reference and its bounds are several float64 copies of what is compared."""

_FORMATS: Final = {  # significant bits (the hidden one included), exponent of the smallest normal number
    torch.bfloat16: (8, -126),
    torch.float16: (11, -14),
    torch.float32: (24, -126),
    torch.float64: (53, -1022),
}


@dataclass(frozen=True)
class Term:
    """One low-rank change of one tensor: `scale · b · a`, transposed when the base stores (in, out)."""

    b: torch.Tensor
    a: torch.Tensor
    scale: float
    transposed: bool = False

    def factors(self) -> tuple[Array, Array]:
        """Left (rows × rank) and right (rank × columns) in the base's layout, the scale folded into `b`."""
        b, a = self.scale * to_float64(self.b), to_float64(self.a)
        return (a.T, b.T) if self.transposed else (b, a)

    @classmethod
    def of_vector(cls, vector: torch.Tensor, scale: float) -> "Term":
        """The change `scale · vector` of a bias: a product of rank one with a column of height one."""
        return cls(b=vector.reshape(-1, 1), a=torch.ones(1, 1), scale=scale)


def to_float64(tensor: torch.Tensor) -> Array:
    """Exact from every stored float dtype; numpy itself knows no bfloat16."""
    return np.asarray(tensor.detach().to(torch.float64).numpy())


def stacked(terms: Sequence[Term]) -> tuple[Array, Array]:
    """All terms of one target as one product: their sum is the product of the stacked factors."""
    lefts, rights = zip(*(term.factors() for term in terms), strict=True)
    return np.concatenate(lefts, axis=1), np.concatenate(rights, axis=0)


def delta(terms: Sequence[Term]) -> Array:
    """`Σ scale · B·A` in float64, in the layout of the base."""
    left, right = stacked(terms)
    return np.asarray(left @ right)


def reference(base: torch.Tensor, terms: Sequence[Term]) -> Array:
    """`w + Σ scale · B·A` in float64, in the shape of the base."""
    return np.asarray(to_float64(base) + delta(terms).reshape(base.shape))


def ulp(values: Array, dtype: torch.dtype) -> Array:
    """Distance between neighbours of `dtype` in the binade of each value; the smallest one in subnormals."""
    bits, smallest_exponent = _FORMATS[dtype]
    _, exponent = np.frexp(values)  # value = m · 2^exponent with ½ ≤ m < 1, hence the − 1
    exponent = np.where(values == 0, smallest_exponent, exponent - 1)
    return np.asarray(np.ldexp(1.0, np.maximum(exponent, smallest_exponent) - (bits - 1)))


def working_type(*dtypes: torch.dtype) -> torch.dtype:
    """float32 when all is stored in 16 bits or fewer, else float64: the wider of input and output decides."""
    return torch.float32 if all(dtype.itemsize <= 2 for dtype in dtypes) else torch.float64


def balance(left: Array, right: Array) -> tuple[Array, Array]:
    """Column k of `left` and row k of `right` given like maxima by inverse powers of two; exact."""
    columns, rows = np.abs(left).max(axis=0), np.abs(right).max(axis=1)
    both = (columns > 0) & (rows > 0)  # a zero factor has no exponent to share
    ratio = np.where(both, rows, 1.0) / np.where(both, columns, 1.0)
    shift = np.rint(np.log2(ratio) / 2).astype(np.int64)
    return np.ldexp(left, shift), np.ldexp(right, -shift[:, None])


def product_bound(left: Array, right: Array, slices: int) -> Array:
    """How far the exact product of rounded factors may be from the product, per element.

    Rounding a row with maximum m to p bits moves an entry by at most 2^−p·m, so one slice of both factors
    moves the sum of K products by at most K·2^(1−p)·m_row·m_column. With two slices each factor is off by
    2^−2p·m, and lo·lo, at most 2^−2p·m·m, is left out: 3·K·2^−2p·m·m; adding the three parts rounds twice
    in float64.

    Which of two neighbouring powers of two balances a pair is the implementation's choice; it moves one
    maximum by a factor of two at most, hence the 2 in front.
    """
    left, right = balance(left, right)
    rank = left.shape[1]
    bits = (53 - math.ceil(math.log2(rank))) // 2
    share = 2.0 ** (1 - bits) if slices == 1 else 3 * 2.0 ** (-2 * bits) + 2 * 2.0**-53
    rows, columns = np.abs(left).max(axis=1), np.abs(right).max(axis=0)
    return np.asarray(2 * rank * share * np.outer(rows, columns))


def assert_within_bound(
    merged: torch.Tensor,
    base: torch.Tensor,
    terms: Sequence[Term],
    *,
    key: str = "tensor",
    float32_product: bool = False,
) -> float:
    """Every element of `merged` is base + terms, rounded as it must be. Returns the largest error/bound seen.

    `float32_product` is for PEFT, which multiplies, scales and (over a float32 base) adds in float32: a sum
    of K products in any order is off by at most γ·|B||A| with γ = K·2^−24 (Higham, §3.1), and scaling it
    rounds once more.
    """
    assert merged.shape == base.shape, f"{key}: shape {tuple(merged.shape)}, base has {tuple(base.shape)}"
    worst = 0.0
    for rows, error, bound in _errors_and_bounds(merged, base, terms, float32_product):
        share = error / bound
        at = np.unravel_index(int(np.argmax(share)), share.shape)  # NaN counts as the largest
        worst = max(worst, float(share[at]))
        out = int((~(share <= 1.0)).sum())
        assert out == 0, (
            f"{key}: {out} of {share.size} elements of rows {rows.start}–{rows.stop} are out of bound; worst at "
            f"row {rows.start + int(at[0])}, column {int(at[1])}: off by {error[at]:.3e}, bound {bound[at]:.3e}"
        )
    return worst


def _errors_and_bounds(
    merged: torch.Tensor, base: torch.Tensor, terms: Sequence[Term], float32_product: bool
) -> Iterator[tuple[slice, Array, Array]]:
    left, right = stacked(terms)
    height, width, rank = left.shape[0], right.shape[1], left.shape[1]
    work = working_type(merged.dtype, base.dtype)
    product = product_bound(left, right, slices=1 if work is torch.float32 else 2)
    # Float64 itself rounds K products, K − 1 sums, the folded scale and the sum with w.
    unit = (rank + 2) * (2.0**-53 + (2.0**-24 if float32_product else 0.0))
    merged, base = merged.reshape(height, width), base.reshape(height, width)
    for start in range(0, height, CHUNK_ROWS):
        rows = slice(start, min(start + CHUNK_ROWS, height))
        change = left[rows] @ right
        expected = to_float64(base[rows]) + change
        error = np.abs(to_float64(merged[rows]) - expected)
        roundings = ulp(expected, merged.dtype) + ulp(expected, work) + ulp(change, work)
        yield rows, error, roundings / 2 + product[rows] + unit * (np.abs(left[rows]) @ np.abs(right))


# Wrong merges made from the right ingredients: a comparison that lets one of them pass compares nothing.


def _stored(base: torch.Tensor, values: Array) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(base.dtype).reshape(base.shape)


def _with_change(base: torch.Tensor, change: Array) -> torch.Tensor:
    return _stored(base, to_float64(base) + change.reshape(base.shape))


def honest(base: torch.Tensor, terms: Sequence[Term]) -> torch.Tensor:
    """The right merge, for comparison: what every sabotage would be without its fault."""
    return _with_change(base, delta(terms))


def transposed(base: torch.Tensor, terms: Sequence[Term]) -> torch.Tensor:
    """Delta of the other orientation; where the tensor is not square, its elements in that order."""
    return _with_change(base, delta(terms).T)


def half_scaled(base: torch.Tensor, terms: Sequence[Term]) -> torch.Tensor:
    """As if alpha had been read as half of what it is."""
    return _with_change(base, delta(terms) / 2)


def applied_twice(base: torch.Tensor, terms: Sequence[Term]) -> torch.Tensor:
    """The adapter merged into what it was already merged into."""
    return _with_change(base, 2 * delta(terms))


def rows_shifted(base: torch.Tensor, terms: Sequence[Term]) -> torch.Tensor:
    """Each row gets the delta of the row above: norms and spectrum are right, places are not."""
    change = delta(terms)
    # A tensor of one row has no row above: shift its columns instead.
    return _with_change(base, np.roll(change, 1, axis=0 if len(change) > 1 else 1))


def not_merged(base: torch.Tensor, terms: Sequence[Term]) -> torch.Tensor:
    """The base itself, presented as merged."""
    del terms
    return base.clone()


def tail_left_out(base: torch.Tensor, terms: Sequence[Term]) -> torch.Tensor:
    """All but the last row merged, as a loop over tiles that forgets the odd tail would."""
    change = delta(terms)
    change[-1] = 0
    return _with_change(base, change)


def one_element_off(base: torch.Tensor, terms: Sequence[Term]) -> torch.Tensor:
    """One element in the middle two ULPs away: the smallest fault that two roundings cannot explain."""
    values = to_float64(honest(base, terms)).reshape(-1)
    middle = values.size // 2
    values[middle] += 2 * ulp(values, base.dtype)[middle]
    return _stored(base, values)


SABOTAGES: Final[tuple[Callable[[torch.Tensor, Sequence[Term]], torch.Tensor], ...]] = (
    transposed,
    half_scaled,
    applied_twice,
    rows_shifted,
    not_merged,
    tail_left_out,
    one_element_off,
)
"""Each takes (base, terms). `transposed` is no fault of a vector or of a matrix with one row or column."""
