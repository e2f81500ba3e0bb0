"""The exponential function with the same bits on every machine: elementwise IEEE operations, each a pass of its own.

x is brought to |r| ≤ ln 2 / 2 by taking off k·ln 2 in two parts, of which the first has so few bits that its product
with k is exact (Cody and Waite 1980, "Software Manual for the Elementary Functions"). Then the Taylor series is summed
from its last term. Results are within 2^-51 of themselves.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lora_cli.arithmetic.floats import power_of_two

# ln 2 as a sum: 33 bits, and the rest.
_PARTS = (float.fromhex("0x1.62e42fee00000p-1"), float.fromhex("0x1.a39ef35793c76p-33"))
_LEAST = -700.0
_TERMS = 14


def exponential(values: Tensor) -> Tensor:
    """Return e to each number, in float64; 0 for what is below -700.

    Args:
        values: Of any float dtype and shape, at most 700. Minus infinity may be among them.
    """
    wide = values.to(torch.float64)
    near = wide.clamp(min=_LEAST)
    halvings = (near * (1.0 / math.log(2.0))).round_()
    rest = near - halvings * _PARTS[0]
    rest = rest - halvings * _PARTS[1]
    total = torch.full_like(rest, 1.0 / math.factorial(_TERMS - 1))
    for power in reversed(range(_TERMS - 1)):
        total = total * rest
        total = total + 1.0 / math.factorial(power)
    total = total * power_of_two(halvings)
    return torch.where(wide < _LEAST, torch.zeros_like(total), total)
