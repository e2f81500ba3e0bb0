"""From the exact product to stored bytes, with one rounding at each step that a reader can name.

    delta  = round_work(exact product)
    merged = the base's own bits                             where delta is ±0
             round_storage( round_work( work(w) + delta ) )  elsewhere

A gain g, which DoRA has, multiplies what would be rounded to storage, zeros that keep their signs among it; so a gain
of 1 changes nothing:

    merged = round_storage( round_work( g · round_work( work(w) + delta ) ) )

The working type is float32 for storage of at most 16 bits and float64 for wider; the wider of input and
output decides. Only elementwise IEEE operations are used, each written as a pass of its own: fused ones
(`addcmul`, `add(alpha=)`) round differently from one machine to the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from lora_cli.arithmetic.floats import BITS, binades, bits_dtype, dtype_name, fraction_bits
from lora_cli.arithmetic.product import ExactProduct
from lora_cli.errors import NumericError, ShapeError, UsageError

_Operation = Callable[..., Tensor]

#: Storage dtypes that can take a delta.
MERGEABLE: tuple[torch.dtype, ...] = tuple(BITS)

# A double's fraction without the 14 bits, the last of them sticky, that stay on the way to 16 bits or fewer.
_DROPPED = 38
_DROPPED_MASK = (1 << _DROPPED) - 1


@cache
def work_dtype(*storages: torch.dtype) -> torch.dtype:
    """Return the type in which deltas are added: float32 if all storages have at most 16 bits, else float64.

    Raises:
        UnsupportedError: A storage is not one of `MERGEABLE`.
    """
    return torch.float64 if any(bits_dtype(dtype).itemsize > 2 for dtype in storages) else torch.float32


def slices_for(work: torch.dtype) -> Literal[1, 2]:
    """Return how many grids each factor needs for a delta in `work`: one for float32, two for float64."""
    return 1 if work == torch.float32 else 2


@cache
def overflow_limit(dtype: torch.dtype) -> float:
    """Return the magnitude from which values are refused: the largest finite one and half a spacing above it.

    It is infinite for float64. For float8_e4m3fn it is 464, from which on conversions saturate at 448
    without a sign.
    """
    half_spacing = math.ldexp(1.0, binades(dtype)[1] - fraction_bits(dtype) - 1)
    return torch.finfo(dtype).max + half_spacing


def check_flush_to_zero(device: torch.device | str = "cpu") -> None:
    """Refuse to compute in a thread that takes subnormal numbers for zero. Ask in each thread that adds.

    Raises:
        NumericError: Subnormal operands or results are flushed to zero.
    """
    for dtype in (torch.float32, torch.float64):
        normal = torch.full((64,), torch.finfo(dtype).smallest_normal, dtype=dtype, device=device)
        half = normal * 0.5
        if not bool((half * 2.0 == normal).all()):
            raise NumericError(
                f"This thread flushes subnormal {dtype_name(dtype)} numbers to zero, which changes sums",
                hint="Call torch.set_flush_denormal(False), and load no library built with -ffast-math",
            )


class TileKernel:
    """Merges tiles in buffers that are allocated once. One for each worker thread.

    A tile may have any shape of at most `elements` elements. All methods leave their inputs alone, unless
    `out` is one.

    Args:
        work: The working type, see `work_dtype`.
        elements: The most elements that a tile will have.
        device: Where the tiles are.
    """

    def __init__(self, work: torch.dtype, elements: int, device: torch.device | str = "cpu") -> None:
        self.work = work
        self.elements = elements
        self._buffers = tuple(
            torch.empty(elements, dtype=dtype, device=device) for dtype in (torch.float64, work, work)
        )
        self._zero = torch.zeros((), dtype=work, device=device)
        self._shape: tuple[int, ...] = (elements,)
        self._product, self._addend, self._total = self._buffers

    def product(self, exact: ExactProduct, rows: slice, columns: slice, *, transposed: bool = False) -> Tensor:
        """Return `exact.tile(...)` in this kernel's buffer, which the next call overwrites."""
        height, width = exact.shape[::-1] if transposed else exact.shape
        self._take_shape((len(range(*rows.indices(height))), len(range(*columns.indices(width)))))
        # The sum's buffer is free until the product is there, and of its dtype wherever two slices are due.
        scratch = self._total if exact.slices == 2 and self.work == torch.float64 else None
        return exact.tile(rows, columns, transposed=transposed, out=self._product, scratch=scratch)

    def delta(self, product: Tensor, out: Tensor | None = None) -> Tensor:
        """Return round_work(product), every zero as +0.0, in `out` or a buffer that the next call overwrites."""
        return self._signed(product, torch.add, out)

    def merge(self, base: Tensor, product: Tensor, out: Tensor, gains: Tensor | None = None) -> Tensor:
        """Add the product to the base, multiply by the gains, and round into `out`.

        Args:
            base: The tile of the base, in its storage dtype.
            product: The exact product's tile, float64, of the same shape; or its delta, in the working type.
            out: Where the merged tile goes, in the storage dtype of the output.
            gains: What each sum is multiplied by, in the working type: of the tile's shape, or one that is
                broadcast to it.

        Returns:
            `out`.

        Raises:
            NumericError: The base holds NaN or infinity, or a result does not fit in the output's dtype.
        """
        # Where delta is ±0 the base's own bits must stay, but -0.0 + 0.0 is +0.0. So subtract the negative:
        # 0 - delta makes +0.0 of either zero, and w - (+0.0) is w, its sign included. (IEEE 754, 6.3.)
        addend = self._signed(product, torch.sub)
        total = self._taken(base, addend, out, gains)
        torch.sub(total, addend, out=total)
        if gains is not None:
            torch.mul(total, gains, out=total)
        if not _all_below(total, overflow_limit(out.dtype)):
            raise _overflow(base, total, out.dtype)
        return self._rounded(total, out)

    def subtract(self, merged: Tensor, product: Tensor, out: Tensor, gains: Tensor | None = None) -> Tensor:
        """Divide by the gains and take the product off again, approximately: what rounding took does not come back.

        The opposite of `merge`; arguments and result are as there. A result beyond the largest value of the dtype
        becomes that value: rounding in the merge can have carried a weight that far. What a gain of 0 made 0 stays 0.

        Raises:
            NumericError: The merged tile holds NaN or infinity.
        """
        addend = self.delta(product)
        total = self._taken(merged, addend, out, gains)
        if gains is not None:
            torch.div(total, gains, out=total)
        torch.sub(total, addend, out=total)
        if not _all_below(total, overflow_limit(out.dtype)):
            if not bool(torch.isfinite(merged.to(torch.float64)).all()):
                raise _overflow(merged, total, out.dtype)
            bounded(total, out.dtype)
        return self._rounded(total, out)

    def _signed(self, product: Tensor, operation: _Operation, out: Tensor | None = None) -> Tensor:
        """Return zero plus or minus round_work(product): no zero of the result has a sign."""
        self._take_shape(tuple(product.shape))
        rounded = product if product.dtype == self.work else self._addend.copy_(product)
        return operation(self._zero, rounded, out=self._addend if out is None else out)

    def _taken(self, stored: Tensor, addend: Tensor, out: Tensor, gains: Tensor | None) -> Tensor:
        """Return the stored tile in the working type, in the buffer for sums."""
        self._check_tiles(stored, addend, out, gains)
        return self._total.copy_(stored)

    def _rounded(self, total: Tensor, out: Tensor) -> Tensor:
        """Round sums that fit, which are used up, into `out`."""
        if self.work == torch.float64 and out.dtype.itemsize <= 2:
            _make_sticky(total, self._addend)
        return out.copy_(total)

    def _check_tiles(self, stored: Tensor, addend: Tensor, out: Tensor, gains: Tensor | None) -> None:
        if self.work != work_dtype(stored.dtype, out.dtype):
            raise UsageError("The kernel adds in another type than this tile needs", found=dtype_name(self.work))
        if not stored.shape == addend.shape == out.shape:
            shapes = " and ".join(str(tuple(tensor.shape)) for tensor in (addend, out))
            raise ShapeError("The tiles differ in shape", expected=tuple(stored.shape), found=shapes)
        if gains is not None:
            _check_gains(gains, stored.shape, self.work)

    def _take_shape(self, shape: tuple[int, ...]) -> None:
        """Cut the buffers to a shape; mostly it is the one of the tile before."""
        if shape == self._shape:
            return
        elements = math.prod(shape)
        if elements > self.elements:
            raise ShapeError("The tile is larger than the buffers", expected=self.elements, found=elements)
        self._product, self._addend, self._total = (buffer[:elements].view(shape) for buffer in self._buffers)
        self._shape = shape


def _check_gains(gains: Tensor, shape: Sequence[int], work: torch.dtype) -> None:
    if gains.dtype != work:
        expected = dtype_name(work)
        raise UsageError("The gains are not in the working type", expected=expected, found=dtype_name(gains.dtype))
    sizes = zip(gains.shape[::-1], shape[::-1], strict=False)
    if gains.dim() > len(shape) or any(size not in (1, whole) for size, whole in sizes):
        raise ShapeError("The gains do not fit the tile", expected=tuple(shape), found=tuple(gains.shape))


def bounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Make of values, in place, what `dtype` can hold: of larger ones its largest, of NaN 0."""
    largest = torch.finfo(dtype).max
    return values.nan_to_num_(0.0).clamp_(-largest, largest)


def cast(source: Tensor, out: Tensor) -> Tensor:
    """Convert a tile that takes no delta into `out`, with one rounding. NaN and infinity stay what they are.

    Args:
        source: A tile in any floating dtype.
        out: Where it goes, in the storage dtype of the output.

    Returns:
        `out`.

    Raises:
        NumericError: A finite value, or an infinity where the output's dtype has none, does not fit.
    """
    wide = source if source.dtype.itemsize > 1 else source.to(torch.float32)
    if wide.dtype == torch.float64 and out.dtype.itemsize <= 2:
        wide = wide.clone()
        _make_sticky(wide, torch.empty_like(wide))
    out.copy_(wide)
    if source.dtype != out.dtype and not _all_below(wide, overflow_limit(out.dtype)):
        _settle_specials(wide, out)
    return out


def _settle_specials(wide: Tensor, out: Tensor) -> None:
    """Refuse what overflowed, and give every NaN the one pattern, which devices choose differently."""
    nan = torch.isnan(wide)
    has_infinity = out.dtype != torch.float8_e4m3fn
    lost = (wide.abs() >= overflow_limit(out.dtype)) & (torch.isfinite(wide) if has_infinity else ~nan)
    if bool(lost.any()):
        raise _too_large(wide[lost], out.dtype)
    pattern = int(torch.tensor(math.nan, dtype=out.dtype).view(bits_dtype(out.dtype)))
    out.view(bits_dtype(out.dtype)).masked_fill_(nan, pattern)


def _all_below(values: Tensor, limit: float) -> bool:
    """Return whether all magnitudes are below `limit`; NaN is not."""
    if values.numel() == 0:
        return True
    # Two reductions, since `abs` would need memory; a maximum passes NaN on, and NaN fails both comparisons.
    return float(values.amax()) < limit and float(values.amin()) > -limit


def _make_sticky(values: Tensor, scratch: Tensor) -> None:
    """Round float64 values to odd in place, so that the way over float32 to 16 bits or fewer rounds once.

    torch converts float64 to bfloat16, float16 and float8 by way of float32, and rounds twice. A value of
    15 bits, of which the last says "and a little more", passes float32 unchanged (or lies under half the
    least subnormal of every narrower type) and rounds as the full one would. Source: Boldo and Melquiond
    2008, "Emulation of a FMA and correctly rounded sums: proved algorithms using rounding to odd", IEEE
    Transactions on Computers 57(4).
    """
    bits, low = values.view(torch.int64), scratch.view(torch.int64)
    torch.bitwise_and(bits, _DROPPED_MASK, out=low)
    low.add_(_DROPPED_MASK)  # carries into the lowest kept bit unless all dropped bits are zero
    bits.bitwise_or_(low).bitwise_and_(~_DROPPED_MASK)


def _overflow(stored: Tensor, total: Tensor, dtype: torch.dtype) -> NumericError:
    """Say why a tile's check failed: the tile itself, or the sum."""
    broken = int((~torch.isfinite(stored.to(torch.float64))).sum())
    if broken:
        return NumericError("The tensor holds NaN or infinity", found=f"{broken} values in one tile")
    return _too_large(total[~(total.abs() < overflow_limit(dtype))], dtype)


def _too_large(values: Tensor, dtype: torch.dtype) -> NumericError:
    return NumericError(
        f"Values do not fit in {dtype_name(dtype)}",
        expected=f"magnitudes up to {torch.finfo(dtype).max:g}",
        found=f"{float(values.flatten()[0])!r} ({values.numel()} of them in one tile)",
    )
