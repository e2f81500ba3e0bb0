"""C3A: ΔW is made of circulant blocks, one vector in each row, turned by one from row to row (Chen et al. 2024).

In PEFT (`peft.tuners.c3a`) a module has `c3a_kernel` (out/b × in/b × b): element (i, j) of a block is number
(j - i) mod b of its vector. PEFT multiplies by Fourier transforms, and divides by the inputs of the module.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_cli.adapters.adapter import Target
from lora_cli.adapters.formula import Formula, Given, Settings, Shape, Shapes, SumMethod, Values
from lora_cli.adapters.tuners.parts import numbers
from lora_cli.adapters.tuners.tuner import Changes, Module, Tuner

if TYPE_CHECKING:
    from torch import Tensor


class Circulant(SumMethod):
    """Each element is one of the vectors' numbers."""

    kind = "c3a"
    parts = ("c3a_kernel",)

    def problem(self, shapes: Shapes, settings: Settings, shape: Shape) -> str | None:
        """See `Method.problem`."""
        kernel = shapes.get("c3a_kernel", ())
        if len(kernel) != 3 or 0 in kernel or (kernel[0] * kernel[2], kernel[1] * kernel[2]) != shape:
            return f"c3a_kernel {list(kernel)} makes no {list(shape)}"
        return None

    def values(self, given: Given) -> Values:
        """See `SumMethod.values`."""
        import torch

        kernel, places = numbers(given, "c3a_kernel"), torch.arange(given.shape[1])
        block, scale = kernel.shape[2], given.scale / given.shape[1]

        def tile(rows: Tensor, columns: slice) -> Tensor:
            down, across = rows.unsqueeze(1), places[columns].unsqueeze(0)
            return kernel[down // block, across // block, (across - down) % block] * scale

        return tile


def _read(module: Module) -> Changes:
    scale = module.scale(1.0, None, False, "there is none")
    yield Target(module.name, "weight", Formula(METHOD, module.tensors, scale))


METHOD = Circulant()

TUNER = Tuner(
    type="C3A",
    name="C3A",
    source="Chen et al. 2024, arXiv:2407.19342",
    parts=METHOD.parts,
    read=_read,
    methods=(METHOD,),
    neutral={
        "block_size": "the file shows it",
        "block_size_pattern": "the file shows it",
        "init_weights": "how the vectors began",
    },
)
