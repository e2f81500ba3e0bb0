"""How much of a change is there: the share of weights that changed, and the strength along the change that was meant.

Rounding to a storage type moves every sum to the grid of that type. A change well above the grid's spacing survives
whole; one below half the spacing leaves most weights as they were. The strength that survived is the projection of what
happened on what was meant, ⟨result − base, delta⟩ / ⟨delta, delta⟩: 1 for all of it, 0 for none, 2 for twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lora_cli.arithmetic.ordered import bits_view

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


def _sums(change: Tensor, delta: Tensor) -> tuple[float, float, float]:
    return float(torch.dot(delta, delta)), float(torch.dot(change, delta)), float(torch.dot(change, change))
