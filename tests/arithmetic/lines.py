"""Base values as keys on their line, and what merging makes of them there."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_cli.arithmetic.ordered import bits_view, from_ordered, largest_key, to_ordered
from lora_cli.arithmetic.rounding import TileKernel, overflow_limit

Keys = NDArray[np.int64]

#: Beyond the keys of any dtype: where a result is refused.
REFUSED = 1 << 62


def line(dtype: torch.dtype) -> Keys:
    """All finite keys."""
    top = largest_key(dtype)
    return np.arange(~top, top + 1)


def stored(keys: Keys, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(from_ordered(keys.astype(f"i{dtype.itemsize}"))).view(dtype)


def keys_of(tensor: Tensor) -> Keys:
    return to_ordered(bits_view(tensor)).astype(np.int64)


def fitting(base: Tensor, deltas: Tensor, merged: torch.dtype, gains: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Which base values the merge does not refuse, and on which side of them the others are."""
    sums = base.to(deltas.dtype) + deltas
    totals = sums if gains is None else sums * gains
    return totals.abs() < overflow_limit(merged), torch.where(torch.isnan(totals), sums, totals) > 0


def merge_keys(base: Tensor, deltas: Tensor, merged: torch.dtype, gains: Tensor | None = None) -> Keys:
    """What the merge kernel makes of base values, as keys; where it refuses, keys beyond all others."""
    fits, above = fitting(base, deltas, merged, gains)
    kernel = TileKernel(deltas.dtype, base.numel())
    into = torch.empty(int(fits.sum()), dtype=merged)
    out = kernel.merge(base[fits], deltas[fits].double(), into, None if gains is None else gains[fits])
    keys = np.where(above.numpy(), REFUSED, -REFUSED)
    keys[fits.numpy()] = keys_of(out)
    return keys
