"""BEFT: b' = b + c, biases alone are trained (arXiv:2509.15974).

In PEFT (`peft.tuners.beft`) a module has `beft_bias` (1 × out), which is added to its bias. A module without one cannot
take it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_cli.adapters.adapter import Target
from lora_cli.adapters.formula import Formula, Given, ProductMethod, Settings, Shape, Shapes
from lora_cli.adapters.tuners.tuner import Changes, Module, Tuner

if TYPE_CHECKING:
    from lora_cli.arithmetic.product import Term


class Shift(ProductMethod):
    """A vector that is added, as a column times one."""

    kind = "beft"
    parts = ("beft_bias",)

    def problem(self, shapes: Shapes, settings: Settings, shape: Shape) -> str | None:
        """See `Method.problem`."""
        found = shapes.get("beft_bias", ())
        return (
            None if len(shape) == 1 and found == (1, *shape) else f"beft_bias {list(found)} is none for {list(shape)}"
        )

    def rank(self, shapes: Shapes, settings: Settings) -> int:
        """It is one column."""
        return 1

    def term(self, given: Given) -> Term:
        """See `ProductMethod.term`."""
        from lora_cli.arithmetic.product import Term

        vector = given.tensors["beft_bias"]
        return Term(vector.T, vector.new_ones((1, 1)), given.scale)


def _read(module: Module) -> Changes:
    scale = module.scale(1.0, None, False, "there is none")
    yield Target(module.name, "bias", Formula(METHOD, module.tensors, scale))


METHOD = Shift()

TUNER = Tuner(
    type="BEFT",
    name="BEFT",
    source="arXiv:2509.15974",
    modules="biases",
    parts=METHOD.parts,
    read=_read,
    methods=(METHOD,),
    neutral={"init_weights": "how the numbers began"},
)
