"""Cosines and sines with the same bits on every machine: elementwise IEEE operations, each a pass of its own.

The angle is brought to |r| ≤ π/4 by taking off k·π/2 in three parts, of which the first two have so few bits that their
products with k are exact (Cody and Waite 1980, "Software Manual for the Elementary Functions"). Then the Taylor series
of both are summed from their last term. Results are within 2^-51 for angles up to 2^20; beyond they lose a bit for
each doubling.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# π/2 as a sum: 31 bits, 32 bits, and the rest.
_PARTS = (
    float.fromhex("0x1.921fb54400000p+0"),
    float.fromhex("0x1.0b4611a600000p-34"),
    float.fromhex("0x1.3198a2e037073p-69"),
)
_TERMS = 9


def cosine_and_sine(angles: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cosine and the sine of each angle, in float64.

    Args:
        angles: Of any float dtype and shape, finite.
    """
    values = angles.to(torch.float64)
    quarters = (values * (2.0 / math.pi)).round_()
    rest = values
    for part in _PARTS:
        rest = rest - quarters * part
    square = rest * rest
    cosine = _series(square, [(-1.0) ** n / math.factorial(2 * n) for n in range(_TERMS)])
    sine = _series(square, [(-1.0) ** n / math.factorial(2 * n + 1) for n in range(_TERMS)]) * rest
    turn = torch.remainder(quarters, 4.0)
    swapped = (turn == 1.0) | (turn == 3.0)
    first, second = torch.where(swapped, sine, cosine), torch.where(swapped, cosine, sine)
    first = torch.where((turn == 1.0) | (turn == 2.0), -first, first)
    return first, torch.where(turn >= 2.0, -second, second)


def _series(square: Tensor, factors: list[float]) -> Tensor:
    total = torch.full_like(square, factors[-1])
    for factor in reversed(factors[:-1]):
        total = total * square
        total = total + factor
    return total
