"""DeLoRA: directions of a low-rank product, and one number for how far (Bini et al. 2025).

In PEFT (`peft.tuners.delora`) a module has `delora_A` (rank × in), `delora_B` (out × rank), `delora_lambda` (1,) and
`delora_w_norm` (in,), the norms of the base's columns when the adapter was made. So
ΔW = B·diag(λ / (rank·‖Bⱼ‖·‖Aⱼ‖))·A·diag(w_norm), with no norm of a factor taken as less than 10⁻⁴.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_cli.adapters.adapter import Target
from lora_cli.adapters.formula import Formula, Given, ProductMethod, Settings, Shape, Shapes
from lora_cli.adapters.tuners.tuner import Changes, Module, Tuner

if TYPE_CHECKING:
    from torch import Tensor

    from lora_cli.arithmetic.product import Term

_LEAST_NORM = 1e-4


class Directions(ProductMethod):
    """A product of factors whose lengths do not matter."""

    kind = "delora"
    parts = ("delora_A", "delora_B", "delora_lambda", "delora_w_norm")

    def problem(self, shapes: Shapes, settings: Settings, shape: Shape) -> str | None:
        """See `Method.problem`."""
        a, b = shapes.get("delora_A", ()), shapes.get("delora_B", ())
        if len(shape) != 2 or len(a) != 2 or len(b) != 2 or a[0] < 1 or b != (shape[0], a[0]) or a[1] != shape[1]:
            return f"delora_A {list(a)} and delora_B {list(b)} make no {list(shape)}"
        far, norms = shapes.get("delora_lambda", ()), shapes.get("delora_w_norm", ())
        if far != (1,) or norms != (shape[1],):
            return f"delora_lambda {list(far)} and delora_w_norm {list(norms)} for {shape[1]} inputs"
        return None

    def rank(self, shapes: Shapes, settings: Settings) -> int:
        """The rank of the product."""
        return shapes["delora_A"][0]

    def term(self, given: Given) -> Term:
        """See `ProductMethod.term`. Each factor is made by few roundings of single numbers."""
        import torch

        from lora_cli.arithmetic.product import Term

        a, b, far, norms = (given.tensors[name].to(torch.float64) for name in self.parts)
        lengths = _norms(a) * _norms(b.T)
        return Term(b * (far / len(a) / lengths), a * norms, given.scale)


def _norms(rows: Tensor) -> Tensor:
    """The length of each row, and not less than PEFT takes."""
    import numpy as np
    import torch

    from lora_cli.arithmetic.dora import square_sums

    return torch.from_numpy(np.sqrt(square_sums(rows).numpy())).clamp_(min=_LEAST_NORM)


def _read(module: Module) -> Changes:
    scale = module.scale(1.0, None, False, "delora_lambda, in the file")
    yield Target(module.name, "weight", Formula(METHOD, module.tensors, scale))


METHOD = Directions()

TUNER = Tuner(
    type="DELORA",
    name="DeLoRA",
    source="Bini et al. 2025, arXiv:2503.18225",
    parts=METHOD.parts,
    read=_read,
    methods=(METHOD,),
    neutral={
        "r": "rank; the file shows it",
        "rank_pattern": "ranks of single modules; the file shows them",
        "delora_lambda": "how far at first; the file has what became of it",
        "lambda_pattern": "the same of single modules",
        "module_dropout": "acts in training only",
        "init_weights": "how the factors began",
    },
)
