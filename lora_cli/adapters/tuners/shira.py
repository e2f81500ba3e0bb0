"""SHiRA: single elements of a weight are changed, each by a number of its own (Bhardwaj et al. 2024).

In PEFT (`peft.tuners.shira`) a module has `shira_weight` (count) and `shira_indices` (2 × count), rows and columns.
"""

from __future__ import annotations

from lora_cli.adapters.adapter import Target
from lora_cli.adapters.formula import Formula, Given, Settings, Shape, Shapes, SumMethod, Values
from lora_cli.adapters.tuners.parts import numbers, places
from lora_cli.adapters.tuners.sparse import Scattered
from lora_cli.adapters.tuners.tuner import Changes, Module, Tuner, flag


class Sparse(SumMethod):
    """A number for some elements, zero for all others."""

    kind = "shira"
    parts = ("shira_weight", "shira_indices")
    indices = ("shira_indices",)

    def problem(self, shapes: Shapes, settings: Settings, shape: Shape) -> str | None:
        """See `Method.problem`."""
        weight, found = shapes.get("shira_weight", ()), shapes.get("shira_indices", ())
        if len(shape) != 2 or len(weight) != 1 or found != (2, *weight):
            return f"shira_weight {list(weight)} and shira_indices {list(found)} are no elements of {list(shape)}"
        return None

    def working_bytes(self, shapes: Shapes, settings: Settings, shape: Shape) -> int:
        """Numbers and places, in order and out of it."""
        return 3 * super().working_bytes(shapes, settings, shape)

    def values(self, given: Given) -> Values:
        """See `SumMethod.values`."""
        import torch

        out, inner = given.shape
        at = places(given, "shira_indices", torch.tensor([[out], [inner]]))
        return Scattered(at[0] * inner + at[1], numbers(given, "shira_weight") * given.scale, inner).tile


def _read(module: Module) -> Changes:
    scale = module.scale(1.0, None, False, "there is none")
    yield Target(module.name, "weight", Formula(METHOD, module.tensors, scale))


METHOD = Sparse()

TUNER = Tuner(
    type="SHIRA",
    name="SHiRA",
    source="Bhardwaj et al. 2024, arXiv:2406.13175",
    parts=METHOD.parts,
    read=_read,
    methods=(METHOD,),
    understood={"fan_in_fan_out": flag("layout of the base; shapes and architecture decide, this settles squares")},
    neutral={
        "r": "how many elements were chosen; the file shows them",
        "mask_type": "how elements were chosen; the file shows them",
        "random_seed": "how elements were chosen; the file shows them",
        "init_weights": "how the numbers began",
    },
)
