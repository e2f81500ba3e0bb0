"""DEFT: what a weight does to some directions of its outputs is taken away, and something else put there.

In PEFT (`peft.tuners.deft`) a module has `deft_P` (out × r) and `deft_R` (r × in), and W' = W + Q·(s·R - P⁺ᵀ·W). With
`relu` Q is P, and P⁺ is P where that is positive and zero elsewhere; with `qr` both are the orthogonal factor of P. The
scale s is alpha / r, or 1 without an alpha; it is R's alone. PaRa (`para`) is the same without R.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from lora_cli.adapters.adapter import Target
from lora_cli.adapters.formula import Formula, Given, Settings, Shape, Shapes, SumMethod, Values
from lora_cli.adapters.tuners.tuner import Changes, Module, Tuner, flag, number, word
from lora_cli.errors import ShapeError

if TYPE_CHECKING:
    from torch import Tensor

_ROWS = 256
"""Rows of the base that are summed at once: part of the result's definition."""


class Exchange(SumMethod):
    """A low-rank product, of which one factor is computed from the base."""

    kind = "deft"
    parts = ("deft_P", "deft_R")
    reads = True

    def problem(self, shapes: Shapes, settings: Settings, shape: Shape) -> str | None:
        """See `Method.problem`."""
        p, r = shapes.get("deft_P", ()), shapes.get("deft_R")
        if len(shape) != 2 or len(p) != 2 or p[0] != shape[0] or p[1] < 1:
            return f"deft_P {list(p)} for {list(shape)}"
        if (r is None) != (settings.get("para") is True) or (r is not None and r != (p[1], shape[1])):
            return f"deft_R {None if r is None else list(r)} for {list(shape)}"
        if settings.get("by") not in ("relu", "qr") or (settings["by"] == "qr" and p[1] > p[0]):
            return f"{settings.get('by')} of deft_P {list(p)}"
        return None if isinstance(settings.get("injection", 1.0), float) else "a scale that is no number"

    def rank(self, shapes: Shapes, settings: Settings) -> int:
        """How many directions."""
        return shapes["deft_P"][1]

    def working_bytes(self, shapes: Shapes, settings: Settings, shape: Shape) -> int:
        """Both factors, on grids, and rows of the base."""
        return 80 * shapes["deft_P"][1] * sum(shape) + 80 * _ROWS * prod(shape[1:])

    def values(self, given: Given) -> Values:
        """See `SumMethod.values`."""
        import torch

        from lora_cli.arithmetic.product import Term, prepare
        from lora_cli.arithmetic.reflections import orthogonal_factor

        directions = given.tensors["deft_P"].to(torch.float64)
        if given.settings["by"] == "qr":
            left = right = orthogonal_factor(directions)
        else:
            left, right = directions, directions.clamp(min=0.0)
        put = -_seen_along(right, given)
        if "deft_R" in given.tensors:
            injection = given.settings.get("injection", 1.0)
            assert isinstance(injection, float)  # noqa: S101 (`problem` has looked)
            put += given.tensors["deft_R"].to(torch.float64) * injection
        product = prepare([Term(left, put, given.scale)], slices=2)
        return product.tile


def _seen_along(directions: Tensor, given: Given) -> Tensor:
    """Dᵀ·W, (r × in), some rows of W after the other."""
    import torch

    from lora_cli.arithmetic.rowwise import multiply

    assert given.before is not None  # noqa: S101 (the method asks for it)
    weight = given.before()
    if tuple(weight.shape) != given.matrix:
        raise ShapeError("The base's weight is another", expected=given.matrix, found=tuple(weight.shape))
    total = torch.zeros((directions.shape[1], weight.shape[1]), dtype=torch.float64)
    for begin in range(0, len(weight), _ROWS):
        total += multiply(directions[begin : begin + _ROWS].T, weight[begin : begin + _ROWS])
    return total


def _read(module: Module) -> Changes:
    settings: dict[str, str | float | bool] = {"by": module.said("decomposition_method", "relu")}
    alpha, rank = module.said("alpha", None), module.tensors["deft_P"].shape[-1] if "deft_P" in module.tensors else 0
    if alpha and rank:
        settings["injection"] = alpha / rank
    if module.said("para", False):
        settings["para"] = True
    formula = Formula(METHOD, module.tensors, module.unscaled(), settings)
    yield Target(module.name, "weight", formula, reads=True)


METHOD = Exchange()

TUNER = Tuner(
    type="DEFT",
    name="DEFT",
    source="PEFT 0.21, peft.tuners.deft",
    modules="linear layers and GPT-2's Conv1D",
    parts=METHOD.parts,
    needs=((("deft_P",),),),
    read=_read,
    methods=(METHOD,),
    understood={
        "alpha": number("numerator of R's scale"),
        "decomposition_method": word("how the directions are made of P", "relu", "qr"),
        "para": flag("nothing is put where something was taken away"),
        "fan_in_fan_out": flag("layout of the base; shapes and architecture decide, this settles squares"),
    },
    neutral={
        "r": "how many directions; the file shows it",
        "init_scale": "how R began",
        "deft_dropout": "acts in training only",
        "init_weights": "how P and R began",
    },
)
