"""Kernels of convolutions in Tucker form, as LyCORIS makes them: a core and two factors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lora_cli.adapters.formula import Shape

if TYPE_CHECKING:
    from torch import Tensor


def is_core(core: Shape, rank: int, kernel: Shape) -> bool:
    """Whether a tensor is (rank, rank, k…). Behind a kernel of one dimension PEFT puts a 1."""
    behind = (1,) if len(kernel) == 1 and len(core) == 4 else ()
    return len(kernel) > 0 and core == (rank, rank, *kernel, *behind)


def kernel(core: Tensor, b: Tensor) -> Tensor:
    """Σⱼ t[i, j, …]·b[j, in] as (rank × in·k…): an exact product for each place of the kernel, rounded once."""
    import torch

    from lora_cli.arithmetic.product import Term, prepare

    rank, places = core.shape[0], math.prod(core.shape[2:])
    every = slice(None)
    flat = core.reshape(rank, rank, places)
    made = [prepare([Term(flat[:, :, k], b, 1.0)], slices=2).tile(every, every) for k in range(places)]
    return torch.stack(made, dim=2).reshape(rank, -1)
