"""The number that multiplies `B·A`, computed exactly and rounded once. Does not import torch."""

from __future__ import annotations

import math
from fractions import Fraction

from lora_cli.errors import NumericError, ShapeError

# A root with this many bits ends below the last bit of a double and its half, so one sticky bit decides a
# tie.
_ROOT_BITS = 64


def exact_scale(alpha: float | Fraction, rank: int, *, weight: float | Fraction = 1.0, rslora: bool = False) -> float:
    """Return `weight·alpha/rank`, or `weight·alpha/√rank` for rsLoRA, rounded once to the nearest double.

    All operands are taken as the exact rationals that they are, so a weight of w equals an alpha of alpha·w
    bit for bit. Source: Hu et al. 2021 (LoRA) for alpha/rank, Kalajdzievski 2023 (rsLoRA) for alpha/√rank.

    Args:
        alpha: The adapter's alpha; it may be zero, negative or a fraction.
        rank: The rank of the factors, at least 1.
        weight: The user's weight of this adapter.
        rslora: Divide by the square root of the rank.

    Returns:
        The scale; ties go to even, and what is smaller than half the least double becomes zero.

    Raises:
        ShapeError: The rank is not positive.
        NumericError: An operand is NaN or infinite, or the scale exceeds the largest double.
    """
    if rank <= 0:
        raise ShapeError("The rank must be positive", expected="at least 1", found=rank)
    product = _rational(weight, "weight") * _rational(alpha, "alpha")
    try:
        return _over_root(product, rank) if rslora else float(product / rank)
    except OverflowError:
        raise NumericError("The scale is larger than any double", found=f"{product}/{rank}"[:80]) from None


def _rational(value: float | Fraction, name: str) -> Fraction:
    # Only a float can be infinite; math.isfinite would overflow on an integer that no double holds.
    if isinstance(value, float) and not math.isfinite(value):
        raise NumericError(f"The {name} is not a finite number", found=value)
    return Fraction(value)


def _over_root(product: Fraction, rank: int) -> float:
    """Return product/√rank correctly rounded: the integer root of product²/rank with a sticky bit."""
    top = product.numerator**2
    bottom = product.denominator**2 * rank
    # Scale the square by 4^shift, so that its root has at least _ROOT_BITS bits before the point.
    shift = _ROOT_BITS + (bottom.bit_length() - top.bit_length() + 1) // 2
    top <<= max(2 * shift, 0)
    bottom <<= max(-2 * shift, 0)
    root = math.isqrt(top // bottom)
    sticky = root * root * bottom != top
    # Integer division rounds correctly, subnormal results included; the sticky bit only tells it "a little
    # more".
    magnitude = Fraction(2 * root + sticky) / Fraction(2) ** (shift + 1)
    return float(-magnitude if product < 0 else magnitude)
