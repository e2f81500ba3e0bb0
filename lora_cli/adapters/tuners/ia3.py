"""(IA)³: outputs of a module, or the inputs of a feedforward one, multiplied by learned numbers (Liu et al. 2022).

In PEFT (`peft.tuners.ia3`) a module has `ia3_l`: (out, 1) or (1, in), with ones behind it for a convolution's kernel.
So W' = l∘W; where outputs are multiplied the bias is, too.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lora_cli.adapters.adapter import Target
from lora_cli.adapters.formula import Formula, GainMethod, Given, Settings, Shape, Shapes, Values
from lora_cli.adapters.tuners.tuner import Changes, Field, Module, Tuner, flag

if TYPE_CHECKING:
    from torch import Tensor


class Stretch(GainMethod):
    """A gain for each output, or for each input."""

    kind = "ia3"
    parts = ("ia3_l",)

    def problem(self, shapes: Shapes, settings: Settings, shape: Shape) -> str | None:
        """See `Method.problem`."""
        found = shapes.get("ia3_l", ())
        on_inputs = settings.get("inputs") is True
        wanted = shape[1] if on_inputs and len(shape) > 1 else 0 if on_inputs else shape[0]
        if math.prod(found) != wanted or max(found, default=0) != wanted:
            return f"{math.prod(found)} numbers for {wanted} {'inputs' if on_inputs else 'outputs'}"
        return None

    def values(self, given: Given) -> Values:
        """See `GainMethod.values`."""
        import torch

        gains = given.tensors["ia3_l"].to(torch.float64).reshape(-1)
        if given.settings.get("inputs") is True:
            each = gains.repeat_interleave(math.prod(given.shape[2:]))
            return lambda rows, columns: each[columns].expand(len(rows), -1)
        width = given.matrix[1]
        return lambda rows, columns: _columns(gains[rows], len(range(width)[columns]))


def _columns(numbers: Tensor, count: int) -> Tensor:
    return numbers.unsqueeze(1).expand(-1, count)


def _read(module: Module) -> Changes:
    inputs = module.tensors["ia3_l"].shape[0] == 1
    scale = module.scale(1.0, None, False, "(IA)³ has none")
    formula = Formula(METHOD, module.tensors, scale, {"inputs": inputs})
    yield Target(module.name, "weight", formula)
    if not inputs:
        yield Target(module.name, "bias", formula, may_lack=True)


METHOD = Stretch()

TUNER = Tuner(
    type="IA3",
    name="(IA)³",
    source="Liu et al. 2022, arXiv:2205.05638",
    parts=METHOD.parts,
    read=_read,
    methods=(METHOD,),
    understood={
        "feedforward_modules": Field(
            "which modules have their inputs multiplied", "a list or a pattern", lambda v: isinstance(v, list | str)
        ),
        "fan_in_fan_out": flag("layout of the base; shapes and architecture decide, this settles squares"),
    },
    neutral={"init_ia3_weights": "how the numbers began"},
)
