"""AdaLoRA: ΔW = scale · B·(E∘A), with a number for each rank; the least are taken away (Zhang et al. 2023).

In PEFT (`peft.tuners.adalora`) a module has `lora_A` (rank × in), `lora_B` (out × rank) and `lora_E` (rank × 1); of a
module that lost all its ranks they are empty. The scale is lora_alpha / (init_r + 1e-5), however many ranks are left;
a lora_alpha that is not above zero counts as init_r.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lora_cli.adapters.adapter import Target
from lora_cli.adapters.formula import Formula, Given, ProductMethod, Settings, Shape, Shapes, as_matrix
from lora_cli.adapters.tuners.tuner import Changes, Module, Tuner, flag, number, whole_number

if TYPE_CHECKING:
    from lora_cli.arithmetic.product import Term

_MORE = 1e-5
"""What PEFT adds to the rank that it divides by."""


class Weighted(ProductMethod):
    """B times A, whose rows are multiplied by E."""

    kind = "adalora"
    parts = ("lora_A", "lora_B", "lora_E")

    def problem(self, shapes: Shapes, settings: Settings, shape: Shape) -> str | None:
        """See `Method.problem`."""
        a, b, e = (shapes.get(name) for name in self.parts)
        out, inner = as_matrix(shape)
        if a is None or len(shape) < 2 or a[1:] != (inner,) or b != (out, a[0]) or e != (a[0], 1):
            return f"lora_A {a}, lora_B {b} and lora_E {e} make no {list(shape)}"
        return None

    def rank(self, shapes: Shapes, settings: Settings) -> int:
        """The ranks that are left."""
        return shapes["lora_E"][0] if shapes.get("lora_E") else 0

    def term(self, given: Given) -> Term:
        """See `ProductMethod.term`."""
        import torch

        from lora_cli.arithmetic.product import Term

        a, b, e = (given.tensors[name].to(torch.float64) for name in self.parts)
        return Term(b, a * e, given.scale)


def _read(module: Module) -> Changes:
    rank, alpha = int(module.said("init_r", 12)), module.said("lora_alpha", 8)
    source = "lora_alpha / (init_r + 1e-5)"
    scale = module.scale((alpha if alpha > 0 else rank) / (rank + _MORE), None, False, source)
    if scale.source == source:
        scale = replace(scale, said=float(alpha))
    yield Target(module.name, "weight", Formula(METHOD, module.tensors, scale))


METHOD = Weighted()

TUNER = Tuner(
    type="ADALORA",
    name="AdaLoRA",
    source="Zhang et al. 2023, arXiv:2303.10512",
    modules="linear layers and GPT-2's Conv1D, convolutions",
    parts=METHOD.parts,
    read=_read,
    methods=(METHOD,),
    understood={
        "init_r": whole_number("rank that training began with; the scale is lora_alpha over it", least=1),
        "lora_alpha": number("numerator of the scale"),
        "fan_in_fan_out": flag("layout of the base; shapes and architecture decide, this settles squares"),
    },
    neutral={
        "r": "AdaLoRA does not look at it",
        "use_rslora": "AdaLoRA does not look at it",
        "alpha_pattern": "AdaLoRA does not look at it",
        "rank_pattern": "which ranks are left; the file holds these alone, or has zeros for the others",
        "target_r": "when ranks were taken away",
        "tinit": "when ranks were taken away",
        "tfinal": "when ranks were taken away",
        "deltaT": "when ranks were taken away",
        "total_step": "when ranks were taken away",
        "beta1": "which ranks were taken away",
        "beta2": "which ranks were taken away",
        "orth_reg_weight": "acts in training only",
    },
)
