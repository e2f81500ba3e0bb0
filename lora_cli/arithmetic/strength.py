"""How much of a change is there: the share of weights that changed, and the strength along the change that was meant.

Rounding to a storage type moves every sum to the grid of that type. A change well above the grid's spacing survives
whole; one below half the spacing leaves most weights as they were. The strength that survived is the projection of what
happened on what was meant, ⟨result − base, delta⟩ / ⟨delta, delta⟩: 1 for all of it, 0 for none, 2 for twice.

A share that people read to two digits need not be summed over every weight: `sampled` names those that do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lora_cli.arithmetic.ordered import bits_view

SAMPLE_RUN = 1 << 16
SAMPLE_EVERY = 16
"""Of each stretch of sixteen runs of so many weights, one run is looked at; of the first stretch its first."""

_SPREAD = 0x9E3779B97F4A7C15
"""2^64 divided by the golden ratio: multiples of it, modulo 2^64, are spread evenly, and in step with nothing."""

_SAFE = (1e-24, 1e30)
"""Sums of float32 squares outside of these may have lost terms below the least or above the largest number."""


@dataclass
class Strength:
    """Sums over the weights of one tensor; those of two parts of it are added.

    Attributes:
        elements: Weights seen.
        changed: Weights whose bits changed.
        meant: ⟨delta, delta⟩.
        along: ⟨result − base, delta⟩.
        energy: ⟨result − base, result − base⟩.
    """

    elements: int = 0
    changed: int = 0
    meant: float = 0.0
    along: float = 0.0
    energy: float = 0.0

    def add(self, base: Tensor, result: Tensor, delta: Tensor) -> None:
        """Take in one run of weights.

        Args:
            base: The flat weights before, in their storage type.
            result: After, in theirs.
            delta: What was meant to be added, in the working type.
        """
        self.elements += base.numel()
        stored = base.to(result.dtype)
        self.changed += int(np.count_nonzero(bits_view(stored) != bits_view(result)))
        change = result.to(delta.dtype, copy=True)
        change -= base.to(delta.dtype)
        sums = _sums(change, delta)
        if not all(_SAFE[0] < value < _SAFE[1] for value in sums[::2]):
            sums = _sums(change.to(torch.float64), delta.to(torch.float64))
        self.meant += sums[0]
        self.along += sums[1]
        self.energy += sums[2]

    def sample(self, offset: int, base: Tensor, result: Tensor, delta: Tensor | None) -> None:
        """Take in those of one run of weights that are in the sample of their tensor; without deltas none is.

        Args:
            offset: Index of the first weight in its tensor.
            base: As in `add`.
            result: As in `add`.
            delta: As in `add`.
        """
        if delta is None:
            return
        for part in sampled(offset, base.numel()):
            self.add(base[part], result[part], delta[part])

    def take(self, other: Strength) -> None:
        """Add the sums of another part of the tensor."""
        self.elements += other.elements
        self.changed += other.changed
        self.meant += other.meant
        self.along += other.along
        self.energy += other.energy

    @property
    def value(self) -> float | None:
        """The strength that is there; None where nothing was meant to change."""
        return self.along / self.meant if self.meant else None

    @property
    def changed_fraction(self) -> float:
        """Share of the weights that changed."""
        return self.changed / self.elements if self.elements else 0.0


def sampled(offset: int, count: int) -> Iterator[slice]:
    """Yield which of `count` weights from `offset` of a tensor on are in the sample, as slices of these.

    The sample depends on places in the tensor alone, not on how it is cut into pieces. It is not periodic, since
    changes may be: the rows of one head or expert are alike, and those of the next come a power of two later.
    """
    step = SAMPLE_RUN * SAMPLE_EVERY
    for stretch in range(offset // step, -(-(offset + count) // step)):
        chosen = (stretch * _SPREAD % (1 << 64)) * SAMPLE_EVERY >> 64
        begin = stretch * step + chosen * SAMPLE_RUN
        first, last = max(begin, offset), min(begin + SAMPLE_RUN, offset + count)
        if first < last:
            yield slice(first - offset, last - offset)


def _sums(change: Tensor, delta: Tensor) -> tuple[float, float, float]:
    return float(torch.dot(delta, delta)), float(torch.dot(change, delta)), float(torch.dot(change, change))
