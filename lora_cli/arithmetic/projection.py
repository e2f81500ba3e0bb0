"""How a change lies along some directions: least squares from inner products alone, which are summed tile by tile.

With directions Δ₁ … Δₙ and a change X of the same weights, the combination Σ cᵢΔᵢ nearest to X solves G·c = p, where
Gᵢⱼ = ⟨Δᵢ, Δⱼ⟩ and pᵢ = ⟨X, Δᵢ⟩, and leaves ‖X‖² − c·p. Where X is such a combination and noise of variance σ² in each
weight, cᵢ is off by σ√(G⁻¹)ᵢᵢ on average.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_DEPENDENT = 1e-9
"""Least eigenvalue of the directions' correlations under which none of them can be told from the others."""


@dataclass(frozen=True, slots=True)
class Fit:
    """The combination of directions that is nearest to a change.

    Attributes:
        coefficients: One for each direction.
        spreads: By how much each would be off, on average, for noise of variance 1 in each weight.
        left: The squared norm of what they do not explain.
    """

    coefficients: tuple[float, ...]
    spreads: tuple[float, ...]
    left: float


def inner_products(rows: Tensor) -> Tensor:
    """Return the inner products of all pairs of rows, float64; those of two parts of the columns are added."""
    return torch.mm(rows, rows.T)


def fit(gram: Tensor, inner: Tensor, energy: float) -> Fit | None:
    """Find the combination of directions that is nearest to a change.

    Args:
        gram: ⟨Δᵢ, Δⱼ⟩, n × n in float64.
        inner: ⟨X, Δᵢ⟩.
        energy: ‖X‖².

    Returns:
        None where a direction is zero, not finite, or a combination of the others.
    """
    sizes = gram.diagonal().sqrt()
    if not sizes.numel() or not bool((torch.isfinite(sizes) & (sizes > 0)).all()) or not math.isfinite(energy):
        return None
    # Directions of very different lengths are as good as those of one.
    correlations = gram / sizes / sizes.unsqueeze(1)
    if float(torch.linalg.eigvalsh(correlations)[0]) < _DEPENDENT:
        return None
    inverse = torch.linalg.inv(correlations)
    along = inner / sizes
    coefficients = (inverse * along).sum(1)
    return Fit(
        coefficients=tuple((coefficients / sizes).tolist()),
        spreads=tuple((inverse.diagonal().sqrt() / sizes).tolist()),
        left=max(0.0, energy - float((coefficients * along).sum())),
    )
