"""OFT: inputs of a module turned by rotations of blocks of them (Qiu et al. 2023; Qiu et al. 2025).

In PEFT (`peft.tuners.oft`) a module has `oft_R` (blocks × b(b-1)/2), the upper triangles of skew-symmetric matrices Q,
row by row; one row where all blocks share it. With R of Q, W' = W·blockdiag(R)ᵀ; the rows of an embedding's table,
which has `oft_embedding_R`, become T·blockdiag(R). R is (I - Q)(I + Q)⁻¹, or with `use_cayley_neumann` the first terms
of the series of (I + Q)(I - Q)⁻¹; before PEFT 0.18 the last of these was counted twice, as all others are. With `coft`
each Q of a larger norm than eps/√rows is first shortened to that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from math import isqrt, prod
from typing import TYPE_CHECKING, Any

from lora_cli.adapters.adapter import Target
from lora_cli.adapters.formula import Formula, Given, MapMethod, Rows, Settings, Shape, Shapes
from lora_cli.adapters.tuners.tuner import Changes, Module, Tuner, flag, number, whole_number

if TYPE_CHECKING:
    from torch import Tensor

_MOST_TERMS = 64


class BlockRotation(MapMethod):
    """Each block of inputs turned by its own rotation, or all of them by one."""

    kind = "oft"
    parts = ("oft_R", "oft_embedding_R")
    exact = True

    def problem(self, shapes: Shapes, settings: Settings, shape: Shape) -> str | None:
        """See `Method.problem`."""
        if len(shapes) != 1 or len(shape) < 2:
            return "one tensor of rotations is for a matrix"
        ((name, found),) = shapes.items()
        side = _side(found[1]) if len(found) == 2 else None
        inner = prod(shape[1:])
        if side is None or found[0] < 1:
            return f"{name} {list(found)} holds no triangles"
        if found[0] * side != inner and not (found[0] == 1 and inner % side == 0):
            return f"{found[0]} blocks of {side} for {inner} inputs"
        terms, least = settings.get("terms"), settings.get("least")
        if terms is not None and not (isinstance(terms, int) and 0 <= terms <= _MOST_TERMS):
            return f"{terms} terms of the series"
        return None if least is None or (isinstance(least, float) and least >= 0) else f"eps {least!r}"

    def unsupported(self, shapes: Shapes, settings: Settings, shape: Shape) -> str | None:
        """PEFT unfolds patches of the input with stride 1, turns them, and adds up where they overlap."""
        if prod(shape[2:]) == 1:
            return None
        return "of a kernel larger than one point OFT turns overlapping patches of the input, which no weight does"

    def working_bytes(self, shapes: Shapes, settings: Settings, shape: Shape) -> int:
        """Some matrices for each block."""
        return sum(80 * found[0] * (_side(found[1]) or 0) ** 2 for found in shapes.values())

    def rows(self, given: Given) -> Rows:
        """See `MapMethod.rows`."""
        ((name, vectors),) = given.tensors.items()
        turns = _rotations(vectors, given.settings)
        turn = turning(turns if name == "oft_embedding_R" else turns.mT)
        return lambda indices, values: turn(values)


def turning(turns: Tensor) -> Callable[[Tensor], Tensor]:
    """What multiplies each block of columns by its matrix: (n × in) by (blocks × b × b), or by one that they share."""
    from lora_cli.arithmetic.rowwise import RightFactor

    side, right = turns.shape[-1], RightFactor(turns)

    def turned(values: Tensor) -> Tensor:
        apart = values.reshape(len(values), -1, side).transpose(0, 1)
        return right.after(apart).transpose(0, 1).reshape(values.shape)

    return turned


def _rotations(vectors: Tensor, settings: Settings) -> Tensor:
    """R of each row of triangles, (blocks × b × b)."""
    from lora_cli.arithmetic.cayley import cayley, cayley_series, skew

    terms, least = settings.get("terms"), settings.get("least")
    matrices = skew(vectors, _side(vectors.shape[1]) or 1)
    if isinstance(least, float):
        matrices = _shortened(matrices, least / len(vectors) ** 0.5)
    if not isinstance(terms, int):
        return cayley(matrices)
    return cayley_series(matrices, terms, last_once=settings.get("doubled") is not True)


def _shortened(matrices: Tensor, longest: float) -> Tensor:
    import numpy as np
    import torch

    from lora_cli.arithmetic.dora import square_sums

    norms = torch.from_numpy(np.sqrt(square_sums(matrices.flatten(1)).numpy())).reshape(-1, 1, 1)
    long = norms > longest
    return torch.where(long, matrices * (longest / norms.masked_fill(~long, 1.0)), matrices)


def _side(count: int) -> int | None:
    """The side of a square whose upper triangle has so many numbers: b of b(b-1)/2."""
    side = (1 + isqrt(1 + 8 * count)) // 2
    return side if side * (side - 1) // 2 == count else None


def _read(module: Module) -> Changes:
    settings: dict[str, int | float | bool] = {}
    if module.said("use_cayley_neumann", True):
        settings["terms"] = module.said("num_cayley_neumann_terms", 5)
        settings["doubled"] = _before_018(module.config)
    if module.said("coft", False):
        settings["least"] = float(module.said("eps", 6e-5))
    yield Target(module.name, "weight", Formula(METHOD, module.tensors, module.unscaled(), settings))


def _before_018(config: Mapping[str, Any]) -> bool:
    """Whether a PEFT older than 0.18 trained it; that was the first to write its version."""
    version = re.match(r"(\d+)\.(\d+)", str(config.get("peft_version") or ""))
    return version is None or (int(version[1]), int(version[2])) < (0, 18)


METHOD = BlockRotation()

TUNER = Tuner(
    type="OFT",
    name="OFT",
    source="Qiu et al. 2023, arXiv:2306.07280; Qiu et al. 2025, arXiv:2506.19847",
    modules="linear layers, convolutions of one point, embeddings",
    parts=METHOD.parts,
    needs=(tuple((name,) for name in METHOD.parts),),
    read=_read,
    methods=(METHOD,),
    understood={
        "use_cayley_neumann": flag("rotations are made by the first terms of a series"),
        "num_cayley_neumann_terms": whole_number("how many terms"),
        "coft": flag("rotations are kept near the identity"),
        "eps": number("how near"),
        "block_share": flag("all blocks have one rotation; the file shows it"),
        "fan_in_fan_out": flag("layout of the base, which PEFT does not look at here"),
    },
    neutral={
        "r": "how many blocks; the file shows it",
        "oft_block_size": "how large blocks are; the file shows it",
        "module_dropout": "acts in training only",
        "init_weights": "how the rotations began",
    },
)
