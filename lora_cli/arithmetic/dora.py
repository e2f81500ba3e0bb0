"""Weight-decomposed adaptation, DoRA (Liu et al. 2024): W' = g·(W + Δ) with one g = m / ‖W + Δ‖ for each output.

W + Δ is what a plain merge would round, in the working type. A norm is the square root of a sum of squares over the
inputs of one output, whose order is fixed: blocks of inputs are folded by halves in float64, and the blocks' sums are
added one after the other. numpy's root is correctly rounded; torch's is not. So g, rounded once to the working type,
is the same on every machine, and so is the product with it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lora_cli.errors import NumericError, ShapeError

BLOCK = 1 << 12
"""Inputs whose squares are folded together: part of the result's definition."""


def square_sums(values: Tensor) -> Tensor:
    """Return the sum of squares of each row, in float64, the same bits on every machine.

    Args:
        values: (out × in), W + Δ in the working type.
    """
    total = torch.zeros(values.shape[0], dtype=torch.float64)
    for start in range(0, values.shape[1], BLOCK):
        block = values[:, start : start + BLOCK].to(torch.float64)
        total += _folded(block * block)
    return total


def _folded(lanes: Tensor) -> Tensor:
    """Add the upper half of the columns to the lower one until one is left. Uses up `lanes`."""
    count = lanes.shape[1]
    while count > 1:
        half = (count + 1) // 2
        lanes[:, : count - half] += lanes[:, half:count]
        count = half
    return lanes[:, 0]


def gains(magnitude: Tensor, sums: Tensor, work: torch.dtype) -> Tensor:
    """Return g = m / ‖W + Δ‖ of each output, rounded once to the working type.

    Args:
        magnitude: m, one number of any sign for each output.
        sums: What `square_sums` gives.
        work: The working type.

    Raises:
        ShapeError: Not one magnitude for each output.
        NumericError: A magnitude is not finite, or an output has no direction: all its weights are zero.
    """
    if magnitude.shape != sums.shape:
        raise ShapeError("There is not one magnitude for each output", expected=len(sums), found=tuple(magnitude.shape))
    if not bool(torch.isfinite(magnitude.to(torch.float64)).all()):
        raise NumericError("The magnitudes hold NaN or infinity")
    norms = torch.from_numpy(np.sqrt(sums.numpy()))
    empty = torch.nonzero(norms == 0)
    if len(empty):
        raise NumericError(
            "A row has no direction that a magnitude could stretch",
            found=f"{len(empty)} rows of zeros, first {int(empty[0])}",
        )
    return (magnitude.detach().cpu().to(torch.float64) / norms).to(work)
