"""Low-rank algebra: what a sum of thin products is like, and how many directions of a matrix stand above rounding.

A sum `Σ scale·B·A` of thin products is never formed: with its terms stacked along K and `B = Q₁R₁`, `Aᵀ = Q₂R₂`, it has
the singular values of the small `R₁·R₂ᵀ`. Where K is larger than a side of the sum, the sum is smaller than its
factors; then it is formed, a few of K at a time. A large matrix that exists only as row tiles is looked at through a
few random probes (Halko, Martinsson and Tropp 2011, "Finding structure with randomness", SIAM Review 53(2)).

All of this measures and decides no byte of an output: it is float64 through BLAS and LAPACK, the same from run to run
on one thread of one machine, and not bit-exact between machines.

Where noise ends. A stored value was rounded by up to half a unit in the last place u; spread evenly over that unit the
error has variance u²/12. The largest singular value of an m × n matrix of independent errors of variance σ² is about
σ(√m + √n): its limit by Marchenko and Pastur 1967 (Bai and Yin 1993), a bound of its mean for Gaussian entries at any
size (Gordon; Vershynin 2012, "Introduction to the non-asymptotic analysis of random matrices", theorem 5.32). Units
differ from weight to weight, and so do variances vᵢⱼ: the edge is then maxᵢ √(Σⱼ vᵢⱼ) + maxⱼ √(Σᵢ vᵢⱼ), the same
number where all are equal (Bandeira and van Handel 2016, Annals of Probability 44(4), up to lower-order terms).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_cli.arithmetic.decomposed import values_of
from lora_cli.arithmetic.product import Term
from lora_cli.errors import NumericError, ShapeError

SAFETY = 2.0
"""How many edges of noise count as noise. Errors are not quite even over a unit, nor quite independent: where two tools
round one matrix, half of the elements may be a whole unit off (u²/2 each, against the u²/6 of two roundings)."""

FIRST_PROBES, MOST_PROBES = 32, 256
OVERSAMPLING = 8
"""Probes beyond the rank that are needed before it is believed (Halko et al. ask for 5 to 10)."""

_MOST_ITERATIONS, _SETTLED = 6, 0.01
_ROUNDING = 1e-12  # of sums of squares
_SEED = 20110217
_TILE_ELEMENTS = 1 << 18
_BAND_ELEMENTS = 1 << 21
_EXPONENT_BITS = 0x7FF << 52

Tiles = Callable[[], Iterator[Tensor]]
"""Begins a pass over a matrix: yields its rows from top to bottom as float64 tiles, which may share one buffer."""


def stacked(terms: Sequence[Term]) -> tuple[Tensor, Tensor]:
    """Return (out × K) and (K × in) in float64 whose product is `Σ scale·B·A`.

    Raises:
        ShapeError: There are no terms, or they do not fit together.
        NumericError: A factor or scale holds NaN or infinity.
    """
    _check_fit(terms)
    left = torch.cat([term.b.to(torch.float64) * term.scale for term in terms], dim=1)
    right = torch.cat([term.a.to(torch.float64) for term in terms])
    _check_finite(left, right)
    return left, right


def _check_fit(terms: Sequence[Term]) -> None:
    shapes = {(term.b.shape[0], term.a.shape[1]) for term in terms}
    if len(shapes) != 1 or any(term.b.shape[1] != term.a.shape[0] for term in terms):
        found = ", ".join(f"{tuple(term.b.shape)} · {tuple(term.a.shape)}" for term in terms)
        raise ShapeError("The terms of a sum do not fit together", expected="(out, K) · (K, in)", found=found)


def _check_finite(*factors: Tensor) -> None:
    if not all(bool(torch.isfinite(factor).all()) for factor in factors):
        raise NumericError("A factor or its scale holds NaN or infinity, or overflows")


def singular_values(terms: Sequence[Term]) -> Tensor:
    """Return the singular values of `Σ scale·B·A`, largest first; at most as many as the smallest of out, in and K.

    Off by a few float64 roundings of ‖B‖·‖A‖, which is much where like products cancel. Errors are `stacked`'s, and a
    NumericError where the product overflows.
    """
    return values_of(_core(terms))


def frobenius_norm(terms: Sequence[Term]) -> float:
    """Return ‖Σ scale·B·A‖_F, as exact as `singular_values`; an `inner_product` would lose half of the digits."""
    return float(torch.linalg.matrix_norm(_core(terms)))


def inner_product(one: Sequence[Term], other: Sequence[Term]) -> float:
    """Return Σᵢⱼ XᵢⱼYᵢⱼ of two sums X and Y of one shape, as Σ (B₁ᵀB₂)∘(A₁A₂ᵀ). Errors are those of `stacked`."""
    (left, right), (other_left, other_right) = stacked(one), stacked(other)
    if left.shape[0] != other_left.shape[0] or right.shape[1] != other_right.shape[1]:
        raise ShapeError("Only matrices of one shape have an inner product")
    return float(((left.T @ other_left) * (right @ other_right.T)).sum())


def largest_magnitude(terms: Sequence[Term]) -> float:
    """Return the largest |element| of `Σ scale·B·A`, a few rows at a time. Errors are those of `stacked`."""
    if _is_deep(terms):
        return float(_summed(terms).abs().amax())
    left, right = stacked(terms)
    height = max(1, _TILE_ELEMENTS // max(1, right.shape[1]))
    buffer = torch.empty((min(height, left.shape[0]), right.shape[1]), dtype=torch.float64)
    largest = 0.0
    for top in range(0, left.shape[0], height):
        rows = left[top : top + height]
        tile = torch.mm(rows, right, out=buffer[: rows.shape[0]])
        largest = max(largest, float(tile.amax()), -float(tile.amin()))
    return largest


def _core(terms: Sequence[Term]) -> Tensor:
    """Return a matrix with the singular values of a sum that is no larger than the sum, nor than K × K.

    Raises:
        NumericError: Its elements overflow.
    """
    if _is_deep(terms):
        core = _summed(terms)
    else:
        _check_fit(terms)
        left = _triangle([(term.b, term.scale) for term in terms])
        core = left @ _triangle([(term.a.T, 1.0) for term in terms]).T
    if not bool(torch.isfinite(core).all()):
        raise NumericError("The product overflows")
    return core


def _is_deep(terms: Sequence[Term]) -> bool:
    """Whether K is larger than a side of the sum, which then has fewer elements than the factors."""
    sides = [side for term in terms for side in (term.b.shape[0], term.a.shape[1])]
    return sum(term.a.shape[0] for term in terms) > min(sides, default=0)


def _summed(terms: Sequence[Term]) -> Tensor:
    """Return the sum itself, adding up a few columns of B and rows of A at a time. Errors are those of `stacked`."""
    _check_fit(terms)
    total = torch.zeros((terms[0].b.shape[0], terms[0].a.shape[1]), dtype=torch.float64)
    depth = max(1, _BAND_ELEMENTS // max(1, *total.shape))
    for term in terms:
        for left, right in zip(term.b.split(depth, dim=1), term.a.split(depth), strict=True):
            b, a = left.to(torch.float64) * term.scale, right.to(torch.float64)
            _check_finite(b, a)
            total.addmm_(b, a)
    return total


def _triangle(factors: Sequence[tuple[Tensor, float]]) -> Tensor:
    """Return R of the QR decomposition of factors times their scales, side by side.

    Of the rows of large ones a few at a time join the triangle of those before (Demmel, Grigori, Hoemmen and Langou
    2012, "Communication-optimal parallel and sequential QR and LU factorizations", SIAM J. Sci. Comput. 34(1)).
    """
    columns = sum(factor.shape[1] for factor, _ in factors)
    height = max(2 * columns, _BAND_ELEMENTS // max(1, columns))
    triangle = torch.empty((0, columns), dtype=torch.float64)
    for parts in zip(*(factor.split(height) for factor, _ in factors), strict=True):
        scaled = zip(parts, factors, strict=True)
        rows = torch.cat([part.to(torch.float64) * scale for part, (_, scale) in scaled], dim=1)
        _check_finite(rows)
        triangle = torch.linalg.qr(torch.cat([triangle, rows]), mode="r").R
    return triangle


def rounding_variance(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return u²/12 for each finite float64 value, u being the spacing of `dtype` at its magnitude.

    The spacing is that of `ordered.ulp`, by one mask instead of many passes.
    """
    info = torch.finfo(dtype)
    binade = (values.view(torch.int64) & _EXPONENT_BITS).view(torch.float64)
    return binade.clamp_(min=info.smallest_normal).mul_(info.eps / math.sqrt(12)).square_()


class Noise:
    """The variances of a matrix of independent errors, taken up tile by tile in O(columns) memory.

    Attributes:
        energy: Their sum, the mean of ‖·‖_F².
    """

    def __init__(self, columns: int) -> None:
        self.energy = 0.0
        self._columns = torch.zeros(columns, dtype=torch.float64)
        self._largest_row = 0.0

    def add(self, variances: Tensor) -> None:
        """Take up the variances of some whole rows."""
        if variances.numel():
            rows = variances.sum(1)
            self._columns += variances.sum(0)
            self._largest_row = max(self._largest_row, float(rows.amax()))
            self.energy += float(rows.sum())

    @property
    def edge(self) -> float:
        """The largest singular value that pure noise is expected to have, without a safety factor."""
        return math.sqrt(self._largest_row) + math.sqrt(float(self._columns.amax()))


def product_edge(terms: Sequence[Term]) -> float:
    """Return the edge of the noise that the rounding of factors, in the dtypes they have, leaves in `Σ scale·B·A`.

    With errors E and F the product is off by E·A + B·F, hence no singular value by more than ‖E‖·‖A‖ + ‖B‖·‖F‖.
    """
    return sum(
        abs(term.scale)
        * (_edge(term.b) * _largest_singular_value(term.a) + _largest_singular_value(term.b) * _edge(term.a))
        for term in terms
    )


def _edge(factor: Tensor) -> float:
    noise = Noise(factor.shape[1])
    noise.add(rounding_variance(factor.to(torch.float64), factor.dtype))
    return noise.edge


def _largest_singular_value(factor: Tensor) -> float:
    tall = factor if factor.shape[0] >= factor.shape[1] else factor.T
    values = values_of(_triangle([(tall, 1.0)]))
    return float(values[0]) if values.numel() else 0.0


@dataclass(frozen=True, slots=True)
class Spectrum:
    """The upper end of a matrix's singular values.

    Attributes:
        values: The largest ones, descending.
        rank: How many of them are above the edge.
        energy: The share of ‖·‖_F² that those have.
        complete: Whether that is all: no other is above the edge, and what is left over is no more than noise.
    """

    values: Tensor
    rank: int
    energy: float
    complete: bool

    def low_rank(self, shape: tuple[int, ...]) -> bool:
        """Whether that is all, not nothing, and factors of that rank are smaller than a matrix of this shape."""
        return self.complete and 0 < self.rank * sum(shape) < math.prod(shape)


def look_above(
    values: Tensor, edge: float, squares: float | None = None, *, noise: float = math.inf, complete: bool = True
) -> Spectrum:
    """Count the singular values above `edge`; `squares` is ‖·‖_F² if these are not all, `noise` what it may have."""
    rank, squares = int((values > edge).sum()), float(values.square().sum()) if squares is None else squares
    above = float(values[:rank].square().sum())
    complete = complete and squares - above <= noise + _ROUNDING * squares
    return Spectrum(values, rank, min(1.0, above / squares) if squares else 0.0, complete)


def spectrum(shape: tuple[int, int], tiles: Tiles, noise: Noise) -> Spectrum:
    """Find how many singular values of a matrix that is read in passes are above its noise, and their share of it.

    Two passes for each power iteration: `M·Ω` with Gaussian probes Ω, then `MᵀQ` with Q an orthonormal basis of that,
    whose singular values approach those of M from below. Iterations go on until nothing that is left over could be
    above the edge, or until the values above it have settled. When all probes find something there are twice as many,
    up to `MOST_PROBES`, unless what is left over needs more directions than that. A matrix with a side of at most
    `MOST_PROBES` is gathered and taken apart exactly. The probes have a fixed seed.

    Args:
        shape: (rows, columns); `spectrum_bytes` says how much memory that takes.
        tiles: Begins a pass; called up to 12 times for each number of probes.
        noise: What M's rounding is expected to be; `SAFETY` times its edge is where directions count.
    """
    edge, energy = SAFETY * noise.edge, SAFETY**2 * noise.energy
    if min(shape) <= MOST_PROBES:
        values = values_of(_gathered(shape, tiles))
        return look_above(values, _visible(edge, values, shape), noise=energy)
    probes = FIRST_PROBES
    while True:
        values, squares = _probed(shape, tiles, probes, edge)
        edge = _visible(edge, values, shape)
        if int((values > edge).sum()) + OVERSAMPLING <= probes:
            return look_above(values, edge, squares, noise=energy)
        # A direction that was missed is hardly larger than the middle one of those found; so many there are at least.
        left_over = squares - float(values.square().sum()) - energy
        if probes == MOST_PROBES or probes + left_over / float(values[probes // 2]) ** 2 > MOST_PROBES:
            return look_above(values, edge, squares, complete=False)
        probes = min(2 * probes, MOST_PROBES)


def spectrum_bytes(shape: tuple[int, int]) -> int:
    """Bytes that `spectrum` needs at most, its tiles apart: O((out + in)·probes), or a thin matrix and its copy."""
    return 8 * 3 * sum(shape) * min(MOST_PROBES, *shape)


def _probed(shape: tuple[int, int], tiles: Tiles, probes: int, edge: float) -> tuple[Tensor, float]:
    """Return the singular values that so many probes find, and ‖M‖_F²."""
    generator = torch.Generator().manual_seed(_SEED)
    right = torch.randn((shape[1], probes), generator=generator, dtype=torch.float64)
    values, squares = torch.empty(0, dtype=torch.float64), 0.0
    for _ in range(_MOST_ITERATIONS):
        before = values
        left, squares = _times(tiles, right, shape[0])
        left = torch.linalg.qr(left).Q
        right, triangle = torch.linalg.qr(_transposed_times(tiles, left, shape[1]))
        values = values_of(triangle)
        if _settled(values, before, squares, _visible(edge, values, shape)):
            break
    return values, squares


def _visible(edge: float, values: Tensor, shape: tuple[int, int]) -> float:
    """The edge, or what float64's own rounding hides, as `numpy.linalg.matrix_rank` has it."""
    return max(edge, float(values[0]) * max(shape) * torch.finfo(torch.float64).eps)


def _settled(values: Tensor, before: Tensor, squares: float, edge: float) -> bool:
    if squares * (1 - _ROUNDING) - float(values.square().sum()) <= edge**2:
        return True
    rank = int((values > edge).sum())
    if not before.numel() or rank + OVERSAMPLING > values.numel():
        return before.numel() > 0  # more probes are needed, not better ones
    growth = values[: rank + 1] / before[: rank + 1]
    # The largest value below the edge may be that of a direction which noise still hides.
    return float(values[rank] * growth[rank]) <= edge and bool((growth[:rank] < 1 + _SETTLED).all())


def _times(tiles: Tiles, right: Tensor, rows: int) -> tuple[Tensor, float]:
    """Return M·right and ‖M‖_F², in one pass."""
    result = torch.empty((rows, right.shape[1]), dtype=torch.float64)
    squares = 0.0
    for place, tile in _placed(tiles):
        torch.mm(tile, right, out=result[place])
        squares += float(torch.dot(tile.reshape(-1), tile.reshape(-1)))
    return result, squares


def _transposed_times(tiles: Tiles, left: Tensor, columns: int) -> Tensor:
    """Return Mᵀ·left, in one pass."""
    result = torch.zeros((columns, left.shape[1]), dtype=torch.float64)
    for place, tile in _placed(tiles):
        result.addmm_(tile.T, left[place])
    return result


def _gathered(shape: tuple[int, int], tiles: Tiles) -> Tensor:
    whole = torch.empty(shape, dtype=torch.float64)
    for place, tile in _placed(tiles):
        whole[place] = tile
    return whole


def _placed(tiles: Tiles) -> Iterator[tuple[slice, Tensor]]:
    top = 0
    for tile in tiles():
        yield slice(top, top + tile.shape[0]), tile
        top += tile.shape[0]
