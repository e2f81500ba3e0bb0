"""What one adapter of one layer is like."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lora_cli.adapters.adapter import Scale
from lora_cli.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class LoRAParameters:
    """Rank, strength and the rest of an adapter.

    Attributes:
        rank: Rows of A and columns of B.
        alpha: Numerator of the scale; the rank unless given.
        dropout: Probability with which numbers on the way into the adapter are left out in training.
        rslora: Divide alpha by the square root of the rank instead of the rank (Kalajdzievski 2023).
        dora: Learn the length of each output's weights apart from their direction (Liu et al. 2024).
        dtype: Type of the factors; that of the layer unless given.

    Raises:
        UsageError: A value that makes no sense; names it.
    """

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank <= 0:
            raise UsageError("rank makes no sense", tensor="rank", expected="a whole number over 0", found=self.rank)
        if self.alpha is not None and not self.alpha > 0:
            raise UsageError("alpha makes no sense", tensor="alpha", expected="a number over 0", found=self.alpha)
        if not 0 <= self.dropout < 1:
            raise UsageError("dropout makes no sense", tensor="dropout", expected="0 to under 1", found=self.dropout)

    @property
    def scale(self) -> Scale:
        """What multiplies the product of the factors."""
        return Scale(float(self.rank if self.alpha is None else self.alpha), self.rank, self.rslora, "parameters")
