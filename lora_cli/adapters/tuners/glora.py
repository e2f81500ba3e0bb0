"""GLoRA: a weight multiplied and added to, element by element, and a bias likewise (Chavan et al. 2023).

In PEFT (`peft.tuners.glora`) a module has A, B, C, D and E: W' = W + W∘A + B and b' = b + b∘D + E + W·C, with the
weight as it was. Each is a product of `Xd` and `Xu`, a vector or one number `X`, or nothing: then there are `zeros` of
its shape in the file. There is no scale.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING

from lora_cli.adapters.adapter import Target
from lora_cli.adapters.formula import Formula, Given, MapMethod, Rows, Settings, Shape, Shapes
from lora_cli.adapters.tuners.tuner import Changes, Module, Tuner
from lora_cli.errors import ShapeError

if TYPE_CHECKING:
    from torch import Tensor

_PATHS = "ABCDE"
_ZEROS = "zeros, which PEFT keeps in the place of numbers"


def _parts(paths: str, *names: str) -> tuple[str, ...]:
    return tuple(f"glora_{path}.{name}" for path in paths for name in names)


def _side(shapes: Shapes, path: str) -> tuple[int, ...] | None:
    """The shape of what a path gives, one number being (1,); () where it is nothing, None where it is nonsense."""
    x, down, up = (shapes.get(name) for name in _parts(path, "X", "Xd", "Xu"))
    if x is not None:
        return x if down is None and up is None and x and prod(x) > 0 else None
    if down is None and up is None:
        return ()
    if down is None or up is None or len(down) != 2 or len(up) != 2 or down[1] != up[0] or not down[1]:
        return None
    return down[0], up[1]


class ScaledAndShifted(MapMethod):
    """W' = W + W∘A + B."""

    kind = "glora"
    parts = _parts("AB", "X", "Xd", "Xu")
    exact = True

    def problem(self, shapes: Shapes, settings: Settings, shape: Shape) -> str | None:
        """See `Method.problem`."""
        for path in "AB":
            found = _side(shapes, path)
            if len(shape) != 2 or found is None or (found and found not in (shape, (shape[0], 1), (1,))):
                return f"glora_{path} makes no {list(shape)}"
        return None

    def rank(self, shapes: Shapes, settings: Settings) -> int:
        """The rank of the products, where there are any."""
        return max((shape[0] for name, shape in shapes.items() if name.endswith("Xu")), default=0)

    def rows(self, given: Given) -> Rows:
        """See `MapMethod.rows`."""
        gains, added = (_values(given, path) for path in "AB")

        def rows(indices: Tensor, values: Tensor) -> Tensor:
            made = values * gains(indices) + values if gains else values
            return made + added(indices) if added else made

        return rows


class BiasOfWeight(MapMethod):
    """b' = b + b∘D + E + W·C."""

    kind = "glora-bias"
    parts = (*_parts("C", "X", "Xd", "Xu"), *_parts("DE", "X"))
    exact = True
    reads = True

    def problem(self, shapes: Shapes, settings: Settings, shape: Shape) -> str | None:
        """See `Method.problem`. How many inputs there are is seen when the weight is."""
        column = _side(shapes, "C")
        if len(shape) != 1 or column is None or (column and (len(column) != 2 or column[1] != 1)):
            return "glora_C makes no column"
        wrong = [path for path in "DE" if _side(shapes, path) not in ((), shape, (1,))]
        return f"glora_{wrong[0]} makes no {list(shape)}" if wrong else None

    def rows(self, given: Given) -> Rows:
        """See `MapMethod.rows`."""
        gains, added = (_values(given, path) for path in "DE")
        column = _column(given)

        def rows(indices: Tensor, values: Tensor) -> Tensor:
            made = values * gains(indices) + values if gains else values
            made = made + added(indices) if added else made
            return made + column[indices] if column is not None else made

        return rows


def _values(given: Given, path: str) -> Callable[[Tensor], Tensor] | None:
    """What a path gives for some rows, with one column or all; None where it is nothing."""
    import torch

    from lora_cli.arithmetic.rowwise import multiply

    x, down, up = (given.tensors.get(name) for name in _parts(path, "X", "Xd", "Xu"))
    if x is not None:
        each = x.to(torch.float64).reshape(-1, 1).expand(given.shape[0], 1)
        return lambda indices: each[indices]
    if down is None or up is None:
        return None
    return lambda indices: multiply(down[indices], up)


def _column(given: Given) -> Tensor | None:
    """W·C, for every output; None where C is nothing."""
    import torch

    from lora_cli.arithmetic.rowwise import multiply

    column, down, up = (given.tensors.get(name) for name in _parts("C", "X", "Xd", "Xu"))
    if down is not None and up is not None:
        column = multiply(down, up)
    if column is None:
        return None
    assert given.before is not None  # noqa: S101 (the method asks for it)
    weight = given.before()
    if tuple(weight.shape) != (given.shape[0], len(column)):
        wanted = (given.shape[0], len(column))
        raise ShapeError("The weight beside a bias is another", expected=wanted, found=tuple(weight.shape))
    step = max(1, (1 << 20) // max(1, len(column)))
    parts = [multiply(weight[begin : begin + step], column) for begin in range(0, len(weight), step)]
    return torch.cat(parts)


def _read(module: Module) -> Changes:
    scale = module.unscaled()
    of_weight = {name: tensor for name, tensor in module.tensors.items() if name in WEIGHT.parts}
    of_bias = {name: tensor for name, tensor in module.tensors.items() if name in BIAS.parts}
    if of_weight:
        yield Target(module.name, "weight", Formula(WEIGHT, of_weight, scale))
    if of_bias:
        reads = any(name.startswith("glora_C") for name in of_bias)
        yield Target(module.name, "bias", Formula(BIAS, of_bias, scale), reads=reads)


WEIGHT, BIAS = ScaledAndShifted(), BiasOfWeight()

TUNER = Tuner(
    type="GLORA",
    name="GLoRA",
    source="Chavan et al. 2023, arXiv:2306.07967",
    modules="linear layers with their biases",
    parts=(*WEIGHT.parts, *BIAS.parts, *_parts(_PATHS, "zeros")),
    read=_read,
    needs=tuple((_parts(path, "X"), _parts(path, "Xd", "Xu"), ()) for path in "ABC"),
    methods=(WEIGHT, BIAS),
    idle=dict.fromkeys(_parts(_PATHS, "zeros"), _ZEROS),
    neutral={
        "r": "rank; the file shows it",
        "config_A_B": "what A and B are; the file shows it",
        "config_C": "what C is; the file shows it",
        "config_D_E": "what D and E are; the file shows it",
        "init_weights": "how they began",
    },
)
