"""HRA: inputs of a module reflected at some planes, one after the other (Yuan et al. 2024).

In PEFT (`peft.tuners.hra`) a module has `hra_u` (in × r), whose columns are normals u of the planes, of any length. So
W' = W·H₁·…·Hᵣ with H = I - 2·u·uᵀ/(uᵀ·u). With `apply_GS` the normals are first made orthogonal to each other, by Gram
and Schmidt in their order, and W' = W·(I - 2·V·Vᵀ).

All reflections are made at once, as `arithmetic.reflections` says.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from lora_cli.adapters.adapter import Target
from lora_cli.adapters.formula import Formula, Given, MapMethod, Rows, Settings, Shape, Shapes
from lora_cli.adapters.tuners.tuner import Changes, Module, Tuner, flag
from lora_cli.errors import NumericError

if TYPE_CHECKING:
    from torch import Tensor

_PARALLEL = 2.0**-44
"""What is left of a normal that the others span, as a share of it."""


class Reflections(MapMethod):
    """Householder's reflections of the inputs."""

    kind = "hra"
    parts = ("hra_u",)
    exact = True

    def problem(self, shapes: Shapes, settings: Settings, shape: Shape) -> str | None:
        """See `Method.problem`."""
        found = shapes.get("hra_u", ())
        if len(found) != 2 or min(found) < 1 or len(shape) < 2 or found[0] != prod(shape[1:]):
            return f"hra_u {list(found)} for {prod(shape[1:])} inputs"
        if settings.get("orthogonal") is True and found[1] > found[0]:
            return f"{found[1]} normals in {found[0]} dimensions cannot be orthogonal"
        return None

    def rank(self, shapes: Shapes, settings: Settings) -> int:
        """How many reflections."""
        return shapes["hra_u"][1]

    def working_bytes(self, shapes: Shapes, settings: Settings, shape: Shape) -> int:
        """Normals, copies of them on grids, and products of each with each."""
        inner, rank = shapes["hra_u"]
        return 80 * (inner * rank + rank * rank)

    def rows(self, given: Given) -> Rows:
        """See `MapMethod.rows`."""
        import torch

        from lora_cli.arithmetic.reflections import triangle
        from lora_cli.arithmetic.rowwise import RightFactor, dots, multiply

        normals = given.tensors["hra_u"].to(torch.float64)
        lengths = normals.abs().amax(0)
        if bool((lengths == 0).any()):
            raise NumericError("A reflection has no direction: its normal is zero")
        normals = normals / lengths
        if given.settings.get("orthogonal") is True:
            normals = _orthogonal(normals)
            back = normals.T * 2.0
        else:
            back = multiply(triangle(normals, 2.0 / dots(normals.T, normals.T)), normals.T)
        there, again = RightFactor(normals), RightFactor(back)
        return lambda indices, values: values - again.after(there.after(values))


def _orthogonal(normals: Tensor) -> Tensor:
    """Orthogonal normals of length one, by Gram and Schmidt as PEFT does it: one taken off after the other."""
    import numpy as np
    import torch

    from lora_cli.arithmetic.rowwise import dots

    made: list[Tensor] = []
    for number, given in enumerate(normals.T):
        rest = given.unsqueeze(0)
        before = float(dots(rest, rest))
        for other in made:
            rest = rest - other * dots(other, rest)
        square = float(dots(rest, rest))
        if square <= before * _PARALLEL**2:
            raise NumericError("A reflection has no direction of its own: the others span its normal", found=number)
        made.append(rest / float(np.sqrt(square)))
    return torch.cat(made).T.contiguous()


def _read(module: Module) -> Changes:
    settings = {"orthogonal": True} if module.said("apply_GS", False) else {}
    yield Target(module.name, "weight", Formula(METHOD, module.tensors, module.unscaled(), settings))


METHOD = Reflections()

TUNER = Tuner(
    type="HRA",
    name="HRA",
    source="Yuan, Liu and Xu 2024, arXiv:2405.17484",
    modules="linear layers, convolutions",
    parts=METHOD.parts,
    read=_read,
    methods=(METHOD,),
    understood={"apply_GS": flag("normals are made orthogonal first")},
    neutral={"r": "how many reflections; the file shows it", "init_weights": "how the normals began"},
)
