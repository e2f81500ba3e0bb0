"""Weight-decomposed adaptation, DoRA (Liu et al. 2024): W' = g·(W + Δ) with one g = m / ‖W + Δ‖ for each output.

W + Δ is what a plain merge would round, in the working type. A norm is the square root of a sum of squares over the
inputs of one output. Its order is fixed, and such that matrices may arrive in strips, stored either way round:

    run      RUN inputs, the last one filled up with zeros: their squares are folded by halves, the upper half
             added to the lower one until one number is left
    group    GROUP inputs, the last one perhaps fewer: the sums of its runs, added one after the other
    output   the sums of its groups, added one after the other

all in float64, which holds the square of a float32 exactly. numpy's root is correctly rounded; torch's is not. So g,
rounded once to the working type, is the same on every machine, and so is the product with it.
"""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_cli.errors import NumericError, ShapeError, UsageError

RUN = 64
"""Inputs whose squares are folded together: part of the result's definition."""

GROUP = 64 * RUN
"""Inputs whose sum is a number of its own: part of the result's definition."""

Sums = NDArray[np.floating[Any]]

# Runs that are folded at once: with their squares they fill half a megabyte.
_LANES = 1 << 10


class SquareSums:
    """Sums of squares of some outputs, over inputs that arrive strip by strip.

    The first strip begins where a group does. Outputs do not meet, so that a range of them can be summed apart from
    the others. The results do not depend on how the inputs are cut, nor on how the strips lie in memory.

    Args:
        outputs: How many there are.
    """

    def __init__(self, outputs: int) -> None:
        self._outputs = outputs
        self._inputs = 0
        self._groups: list[Sums] = []
        self._lanes: Sums = np.empty(RUN * _LANES)

    def add(self, strip: Tensor) -> None:
        """Take the next inputs.

        Args:
            strip: (inputs × outputs), W + Δ in the working type, with any strides. The inputs are a multiple of `RUN`,
                but for the last strip.

        Raises:
            ShapeError: The strip has other outputs.
            UsageError: The strip before it ended within a run.
        """
        if strip.dim() != 2 or strip.shape[1] != self._outputs:
            raise ShapeError("The strip has other outputs", expected=self._outputs, found=tuple(strip.shape))
        if self._inputs % RUN:
            raise UsageError("Another strip follows one that ended within a run", found=f"{self._inputs} inputs")
        first, self._inputs = self._inputs // RUN, self._inputs + len(strip)
        while len(self._groups) * GROUP < self._inputs:
            self._groups.append(np.zeros(self._outputs))
        values: Sums = strip.detach().numpy()
        width = min(self._outputs or 1, _width(strip))
        height = _LANES // width * RUN
        with np.errstate(over="ignore", invalid="ignore"):
            for left, top in product(range(0, self._outputs, width), range(0, len(values), height)):
                outputs = slice(left, left + width)
                runs = self._folded(values[top : top + height, outputs])
                for number, run in enumerate(runs, first + top // RUN):
                    self._groups[number * RUN // GROUP][outputs] += run

    def groups(self) -> Tensor:
        """Return the sum of each group, in order, (groups × outputs) in float64."""
        return torch.from_numpy(np.array(self._groups).reshape(len(self._groups), self._outputs))

    def _folded(self, values: Sums) -> Sums:
        """Return the sums of runs, (runs × outputs), in a buffer that the next call overwrites."""
        whole, rest = divmod(len(values), RUN)
        shape = (RUN, whole + (rest > 0), values.shape[1])
        lanes: Sums = self._lanes[: math.prod(shape)].reshape(shape)
        lanes[:, :whole] = values[: whole * RUN].reshape(whole, RUN, shape[2]).transpose(1, 0, 2)
        if rest:
            lanes[:rest, whole] = values[whole * RUN :]
            lanes[rest:, whole] = 0
        lanes *= lanes
        half = RUN // 2
        while half:
            lanes[:half] += lanes[half : 2 * half]
            half //= 2
        sums: Sums = lanes[0]
        return sums


def _width(strip: Tensor) -> int:
    """Return how many outputs are best summed at once: few where each lies by itself, and has many inputs."""
    if strip.stride(0) != 1:
        return _LANES
    return _LANES // min(-(-len(strip) // RUN), _LANES // 32) if len(strip) else 1


def total(groups: Tensor) -> Tensor:
    """Return the sum of squares of each output, in float64.

    Args:
        groups: (groups × outputs), what `SquareSums.groups` gives, of all inputs in their order.
    """
    sums = torch.zeros(groups.shape[1], dtype=torch.float64)
    for group in groups:
        sums += group
    return sums


def square_sums(values: Tensor) -> Tensor:
    """Return the sum of squares of each row, in float64, the same bits on every machine.

    Args:
        values: (out × in), W + Δ in the working type, with any strides.
    """
    sums = SquareSums(values.shape[0])
    sums.add(values.T)
    return total(sums.groups())


def gains(magnitude: Tensor, sums: Tensor, work: torch.dtype) -> Tensor:
    """Return g = m / ‖W + Δ‖ of each output, rounded once to the working type.

    Args:
        magnitude: m, one number of any sign for each output.
        sums: What `square_sums` gives.
        work: The working type.

    Raises:
        ShapeError: Not one magnitude for each output.
        NumericError: A magnitude is not finite, a row has no finite length, or no direction: all its weights are zero.
    """
    if magnitude.shape != sums.shape:
        raise ShapeError("There is not one magnitude for each output", expected=len(sums), found=tuple(magnitude.shape))
    if not bool(torch.isfinite(magnitude.to(torch.float64)).all()):
        raise NumericError("The magnitudes hold NaN or infinity")
    norms = torch.from_numpy(np.sqrt(sums.numpy()))
    _refuse(~torch.isfinite(norms), "A row has no finite length: it holds NaN, infinity or numbers too large to square")
    _refuse(norms == 0, "A row has no direction that a magnitude could stretch: it holds zeros")
    return (magnitude.detach().cpu().to(torch.float64) / norms).to(work)


def _refuse(rows: Tensor, why: str) -> None:
    numbers = torch.nonzero(rows)
    if len(numbers):
        raise NumericError(why, found=f"{len(numbers)} such rows, first {int(numbers[0])}")
