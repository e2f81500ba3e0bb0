"""HiRA: the weight multiplied, element by element, by one and a low-rank product (Huang et al. 2025).

In PEFT (`peft.tuners.hira`) a module has `hira_A` (rank × in) and `hira_B` (out × rank), with the kernel behind them
where it is a convolution: W' = W∘(1 + B·A), without a scale. An embedding has `hira_embedding_A` (rank × rows) and
`hira_embedding_B` (columns × rank), and its table is multiplied by 1 + (B·A)ᵀ.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from lora_cli.adapters.adapter import Target
from lora_cli.adapters.formula import Formula, GainMethod, Given, Settings, Shape, Shapes, Values
from lora_cli.adapters.tuners.tuner import Changes, Module, Tuner, flag

if TYPE_CHECKING:
    from torch import Tensor

_TABLE = ("hira_embedding_A", "hira_embedding_B")


class OneAndProduct(GainMethod):
    """One and the exact product of the factors, added in one rounding."""

    kind = "hira"
    parts = ("hira_A", "hira_B", *_TABLE)

    def problem(self, shapes: Shapes, settings: Settings, shape: Shape) -> str | None:
        """See `Method.problem`."""
        if len(shapes) != 2 or len(shape) < 2:
            return "two factors are for a matrix"
        if set(shapes) == set(_TABLE):
            a, b = shapes[_TABLE[0]], shapes[_TABLE[1]]
            fits = len(a) == len(b) == len(shape) == 2 and a[0] == b[1] and (a[1], b[0]) == shape
        else:
            a, b = shapes.get("hira_A", ()), shapes.get("hira_B", ())
            fits = (
                len(a) == len(b) == len(shape) and b == (shape[0], a[0], *[1] * len(shape[2:])) and a[1:] == shape[1:]
            )
        return None if fits else f"factors {list(a)} and {list(b)} make no {list(shape)}"

    def rank(self, shapes: Shapes, settings: Settings) -> int:
        """The rank of the product."""
        return next(found[0] for name, found in shapes.items() if name.endswith("_A"))

    def working_bytes(self, shapes: Shapes, settings: Settings, shape: Shape) -> int:
        """The factors and what they are on grids."""
        return 40 * sum(prod(of) for of in shapes.values())

    def values(self, given: Given) -> Values:
        """See `GainMethod.values`."""
        from lora_cli.arithmetic.product import Term, prepare

        if _TABLE[0] in given.tensors:
            left, right = given.tensors[_TABLE[0]].T, given.tensors[_TABLE[1]].T
        else:
            a, b = given.tensors["hira_A"], given.tensors["hira_B"]
            left, right = b.reshape(len(b), -1), a.reshape(len(a), -1)
        product = prepare([Term(left, right, 1.0)], slices=2)

        def tile(rows: Tensor, columns: slice) -> Tensor:
            return product.tile(rows, columns).add_(1.0)

        return tile


def _read(module: Module) -> Changes:
    yield Target(module.name, "weight", Formula(METHOD, module.tensors, module.unscaled()))


METHOD = OneAndProduct()

TUNER = Tuner(
    type="HIRA",
    name="HiRA",
    source="Huang et al. 2025, openreview.net/forum?id=TwJrTz9cRS",
    modules="linear layers and GPT-2's Conv1D, convolutions, embeddings",
    parts=METHOD.parts,
    needs=((METHOD.parts[:2], _TABLE),),
    read=_read,
    methods=(METHOD,),
    understood={"fan_in_fan_out": flag("layout of the base; shapes and architecture decide, this settles squares")},
    neutral={
        "r": "rank; the file shows it",
        "rank_pattern": "ranks of single modules; the file shows them",
        "hira_dropout": "acts in training only",
        "init_weights": "how the factors began",
    },
)
