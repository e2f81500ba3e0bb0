"""The fast path over whole tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_cli.arithmetic.product import Term, prepare
from lora_cli.arithmetic.rounding import TileKernel, slices_for, work_dtype

ALL = slice(None)


def merged(base: Tensor, terms: list[Term], out_dtype: torch.dtype | None = None) -> Tensor:
    """The fast path, over the whole tensor at once."""
    out = torch.empty_like(base, dtype=out_dtype or base.dtype)
    work = work_dtype(base.dtype, out.dtype)
    kernel = TileKernel(work, base.numel())
    return kernel.merge(base, kernel.product(prepare(terms, slices=slices_for(work)), ALL, ALL), out)


def merge_one(base: Tensor, delta: float, out_dtype: torch.dtype | None = None) -> Tensor:
    """Add one number to all of a vector."""
    out = torch.empty_like(base, dtype=out_dtype or base.dtype)
    product = torch.full(base.shape, delta, dtype=torch.float64)
    return TileKernel(work_dtype(base.dtype, out.dtype), base.numel()).merge(base, product, out)
