"""(IA)³: outputs of a module, or the inputs of a feedforward one, multiplied by learned numbers (Liu et al. 2022).

In PEFT (`peft.tuners.ia3`) a module has `ia3_l`: (out, 1), or (1, in) of a feedforward module. A convolution has
(1, out, 1…) or (1, in, 1…), so that only the config tells them apart. So W' = l∘W, where each group of a convolution
has its own inputs; where outputs are multiplied the bias is, too.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from lora_cli.adapters.adapter import Target
from lora_cli.adapters.formula import Formula, GainMethod, Given, Settings, Shape, Shapes, Values
from lora_cli.adapters.source import CONFIG_FILE
from lora_cli.adapters.tuners.tuner import Changes, Field, Module, Tuner, flag
from lora_cli.errors import MalformedFileError
from lora_cli.regex import untrusted

if TYPE_CHECKING:
    from torch import Tensor


class Stretch(GainMethod):
    """A gain for each output, or for each input."""

    kind = "ia3"
    parts = ("ia3_l",)

    def problem(self, shapes: Shapes, settings: Settings, shape: Shape) -> str | None:
        """See `Method.problem`."""
        found = shapes.get("ia3_l", ())
        count = prod(found)
        if not shape or not count or max(found, default=0) != count:
            return f"ia3_l {list(found)} is no row of numbers"
        if settings.get("inputs") is not True:
            return None if count == shape[0] else f"{count} numbers for {shape[0]} outputs"
        inner = shape[1] if len(shape) > 1 else 0
        if not inner or count % inner or (count != inner and (len(shape) < 3 or shape[0] % (count // inner))):
            return f"{count} numbers for {inner} inputs"
        return None

    def values(self, given: Given) -> Values:
        """See `GainMethod.values`."""
        import torch

        gains = given.tensors["ia3_l"].to(torch.float64).reshape(-1)
        if given.settings.get("inputs") is not True:
            width = given.matrix[1]
            return lambda rows, columns: gains[rows].unsqueeze(1).expand(-1, len(range(width)[columns]))
        groups = gains.reshape(-1, given.shape[1])
        outputs, kernel = given.shape[0] // len(groups), prod(given.shape[2:])

        def tile(rows: Tensor, columns: slice) -> Tensor:
            inputs = torch.arange(given.matrix[1])[columns] // kernel
            return groups[(rows // outputs).unsqueeze(1), inputs.unsqueeze(0)]

        return tile


def _read(module: Module) -> Changes:
    shape = module.tensors["ia3_l"].shape
    told = _feedforward(module) if len(shape) != 2 or shape[0] == shape[1] else shape[0] == 1
    formula = Formula(METHOD, module.tensors, module.unscaled(), {"inputs": told})
    yield Target(module.name, "weight", formula)
    if not told:
        yield Target(module.name, "bias", formula, may_lack=True)


def _feedforward(module: Module) -> bool:
    """Whether the config lists a module: by an ending of its name, whatever stands before, or by a pattern of it."""
    said = module.config.get("feedforward_modules")
    if said is None:
        raise MalformedFileError(
            "The config does not say which modules have their inputs multiplied",
            tensor=module.name,
            expected="feedforward_modules in the config",
        )
    if isinstance(said, str):
        return untrusted(said, "(?:{})$", file=CONFIG_FILE, field="feedforward_modules")(module.name)
    return any(module.name.endswith(ending) for ending in said)


METHOD = Stretch()

TUNER = Tuner(
    type="IA3",
    name="(IA)³",
    source="Liu et al. 2022, arXiv:2205.05638",
    modules="linear layers and GPT-2's Conv1D, convolutions; biases with outputs",
    parts=METHOD.parts,
    read=_read,
    methods=(METHOD,),
    understood={
        "feedforward_modules": Field(
            "which modules have their inputs multiplied",
            "a list of names or a pattern",
            lambda v: isinstance(v, str) or (isinstance(v, list) and all(isinstance(name, str) for name in v)),
        ),
        "fan_in_fan_out": flag("layout of the base; shapes and architecture decide, this settles squares"),
    },
    neutral={"init_ia3_weights": "how the numbers began"},
)
