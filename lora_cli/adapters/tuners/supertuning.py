"""Supertuning: single weights are changed, and maybe a product of low rank is added to all (`Super` and `Supra`).

In PEFT (`peft.tuners.supertuning`) a module has `supertuning_values` (n) and `supertuning_indices` (n), places in the
flat weight, each once; with `r` there are `supertuning_lora_A` (rank × in) and `supertuning_lora_B` (out × rank)
besides, times lora_alpha / r. With `save_precomputed_indices = false` the places are those of the base's n largest
weights, or its smallest ones, in their order.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from lora_cli.adapters.adapter import Target
from lora_cli.adapters.formula import Formula, Given, Setting, Settings, Shape, Shapes, SumMethod, Values
from lora_cli.adapters.tuners.parts import numbers, places
from lora_cli.adapters.tuners.sparse import Scattered
from lora_cli.adapters.tuners.tuner import Changes, Module, Tuner, flag, number, whole_number
from lora_cli.errors import NumericError

if TYPE_CHECKING:
    from torch import Tensor

_A, _B = "supertuning_lora_A", "supertuning_lora_B"


class Sparse(SumMethod):
    """Numbers at single places, and a product; they meet in one rounding."""

    kind = "supertuning"
    parts: ClassVar[tuple[str, ...]] = ("supertuning_values", "supertuning_indices", _A, _B)
    indices: ClassVar[tuple[str, ...]] = ("supertuning_indices",)

    def problem(self, shapes: Shapes, settings: Settings, shape: Shape) -> str | None:
        """See `Method.problem`."""
        values, at = shapes.get("supertuning_values", ()), shapes.get("supertuning_indices", ())
        return f"{list(at)} places for {list(values)} values" if at != values else _problem(shapes, settings, shape)

    def rank(self, shapes: Shapes, settings: Settings) -> int:
        """The rank of the product, if there is one."""
        return shapes[_A][0] if _A in shapes else 0

    def working_bytes(self, shapes: Shapes, settings: Settings, shape: Shape) -> int:
        """The numbers, sorted by place, and the factors on their grids."""
        return 100 * shapes["supertuning_values"][0] + 40 * self.rank(shapes, settings) * sum(shape)

    def values(self, given: Given) -> Values:
        """See `SumMethod.values`."""
        from lora_cli.arithmetic.product import Term, prepare

        sparse = Scattered(self._places(given), numbers(given, "supertuning_values") * given.scale, given.matrix[1])
        if _A not in given.tensors:
            return sparse.tile
        a, b, alpha = given.tensors[_A], given.tensors[_B], given.settings["alpha"]
        assert isinstance(alpha, int | float)  # noqa: S101 (`problem` has looked)
        product = prepare([Term(b, a, given.scale * alpha / a.shape[0])], slices=2)

        def tile(rows: Tensor, columns: slice) -> Tensor:
            return product.tile(rows, columns).add_(sparse.tile(rows, columns))

        return tile

    def _places(self, given: Given) -> Tensor:
        return places(given, "supertuning_indices", math.prod(given.matrix))


class Outermost(Sparse):
    """The same, at the places where the base has its largest or smallest weights."""

    kind = "supertuning-outermost"
    parts = ("supertuning_values", _A, _B)
    indices = ()
    reads = True

    def problem(self, shapes: Shapes, settings: Settings, shape: Shape) -> str | None:
        """See `Method.problem`."""
        largest = isinstance(settings.get("largest"), bool)
        return _problem(shapes, settings, shape) if largest else "nothing says which end of the weights it is"

    def working_bytes(self, shapes: Shapes, settings: Settings, shape: Shape) -> int:
        """And the weights, which are sorted."""
        return super().working_bytes(shapes, settings, shape) + 24 * math.prod(shape)

    def _places(self, given: Given) -> Tensor:
        import torch

        assert given.before is not None  # noqa: S101 (it asks for it)
        sizes = given.before().to(torch.float64).abs().reshape(-1)
        count = given.tensors["supertuning_values"].numel()
        # One more: the first that was not chosen must not be as large as the last that was.
        found = torch.topk(sizes, min(count + 1, len(sizes)), largest=bool(given.settings["largest"]))
        alike = int((found.values[1:] == found.values[:-1]).sum())
        if alike:
            raise NumericError(
                "The base has weights of the same size, and only the PEFT that trained the adapter knows which of them "
                "it chose",
                found=f"{alike} pairs",
                hint="let PEFT save the adapter again with save_precomputed_indices = true",
            )
        return found.indices[:count]


def _problem(shapes: Shapes, settings: Settings, shape: Shape) -> str | None:
    """What is wrong apart from places."""
    values = shapes.get("supertuning_values", ())
    if len(shape) != 2 or len(values) != 1 or not 0 < values[0] <= math.prod(shape):
        return f"{list(values)} values are none at single places of {list(shape)}"
    a, b = shapes.get(_A), shapes.get(_B)
    if a is None and b is None:
        return None
    if a is None or b is None or len(a) != 2 or a[1] != shape[1] or b != (shape[0], a[0]) or not a[0]:
        return f"{_A} {a} and {_B} {b} make no {list(shape)}"
    alpha = settings.get("alpha")
    said = isinstance(alpha, int | float) and not isinstance(alpha, bool) and abs(alpha) < 1e30
    return None if said else "their alpha is no number"


def _read(module: Module) -> Changes:
    settings: dict[str, Setting] = {}
    if _A in module.tensors:
        settings["alpha"] = module.said("lora_alpha", 2 * module.tensors[_A].shape[0])
    method = METHOD
    if "supertuning_indices" not in module.tensors:
        method = OUTERMOST
        settings["largest"] = bool(module.said("select_top", True))
    formula = Formula(method, module.tensors, module.unscaled(), settings)
    yield Target(module.name, "weight", formula, reads=method.reads)


METHOD = Sparse()
OUTERMOST = Outermost()

TUNER = Tuner(
    type="SUPERTUNING",
    name="Supertuning",
    source="arXiv:2607.09287",
    parts=METHOD.parts,
    read=_read,
    needs=((("supertuning_values",),), ((_A, _B), ())),
    methods=(METHOD, OUTERMOST),
    understood={
        "r": whole_number("rank of the product; the factors show it"),
        "lora_alpha": number("numerator of the product's scale"),
        "save_precomputed_indices": flag("whether the file has the places"),
        "select_top": flag("which end of the base's weights was trained, where the file lacks the places"),
    },
    neutral={
        "sparsity": "chose how many weights were trained",
        "lora_dropout": "acts in training only",
        "init_weights": "how the numbers began",
    },
)
