"""Uni-LoRA: ΔW = B·A, whose numbers are all taken from one vector, each times a fixed one (Li et al. 2025).

In PEFT (`peft.tuners.unilora`) the model has `unilora_theta_d` (length). With `save_indices` a module has
`unilora_indices_A` (rank × in) and `unilora_indices_B` (out × rank), places in that vector, and `unilora_scales_A` and
`unilora_scales_B` of the same shapes. Without, they follow from a seed and the order of the modules in the model, which
is in no file.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from lora_cli.adapters.adapter import Target
from lora_cli.adapters.formula import Formula, Given, ProductMethod, Settings, Shape, Shapes
from lora_cli.adapters.tuners.parts import numbers, places
from lora_cli.adapters.tuners.tuner import Changes, Module, Tuner, flag

if TYPE_CHECKING:
    from lora_cli.arithmetic.product import Term

_VECTOR = "unilora_theta_d"


class Gathered(ProductMethod):
    """A product of factors whose numbers are gathered from a vector."""

    kind = "unilora"
    indices = ("unilora_indices_A", "unilora_indices_B")
    parts = (*indices, "unilora_scales_A", "unilora_scales_B", _VECTOR)

    def problem(self, shapes: Shapes, settings: Settings, shape: Shape) -> str | None:
        """See `Method.problem`."""
        a, b, scales_a, scales_b, vector = (shapes.get(name, ()) for name in self.parts)
        if len(a) != 2 or len(shape) != 2 or len(vector) != 1 or 0 in vector:
            return f"a vector {list(vector)} and places {list(a)} make no {list(shape)}"
        if (scales_a, scales_b) != (a, b) or (b, a[1]) != ((shape[0], a[0]), shape[1]):
            return f"{b} and {a}, with scales {scales_b} and {scales_a}, make no {list(shape)}"
        return None

    def rank(self, shapes: Shapes, settings: Settings) -> int:
        """Rows of A."""
        return next(iter(shapes.get("unilora_indices_A", ())), 0)

    def term(self, given: Given) -> Term:
        """See `ProductMethod.term`."""
        from lora_cli.arithmetic.product import Term

        vector = numbers(given, _VECTOR)
        a, b = (
            vector[places(given, f"unilora_indices_{side}", len(vector))] * numbers(given, f"unilora_scales_{side}")
            for side in "AB"
        )
        return Term(b, a, given.scale)


def _missing(config: Mapping[str, Any], names: Collection[str]) -> str | None:
    if _VECTOR in names and "unilora_indices_A" in names:
        return None
    return (
        "The file says not which numbers go where (save_indices = false), and this depends on the order of the model's "
        "modules: train with save_indices, or merge it by PEFT"
    )


def _read(module: Module) -> Changes:
    tensors = {**module.tensors, _VECTOR: module.shared[_VECTOR]}
    yield Target(module.name, "weight", Formula(METHOD, tensors, module.scale(1.0, None, False, "there is none")))


METHOD = Gathered()

TUNER = Tuner(
    type="UNILORA",
    name="Uni-LoRA",
    source="Li et al. 2025, arXiv:2506.00799",
    modules="linear layers and GPT-2's Conv1D",
    parts=METHOD.parts[:-1],
    shared=(_VECTOR,),
    read=_read,
    methods=(METHOD,),
    understood={"fan_in_fan_out": flag("layout of the base; shapes and architecture decide, this settles squares")},
    neutral={
        "r": "the file shows it",
        "theta_d_length": "the file shows it",
        "proj_seed": "which numbers go where; the file shows it",
        "save_indices": "whether the file says which numbers go where; it shows that",
        "unilora_dropout": "acts in training only",
        "init_theta_d_bound": "how the vector began",
        "init_weights": "how the vector began",
    },
    unmergeable=_missing,
)
