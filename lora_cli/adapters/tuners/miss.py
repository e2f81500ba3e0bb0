"""MiSS, at first called Bone: one small matrix for all parts of the inputs (Kang and Yin 2024).

In PEFT (`peft.tuners.miss`) a module has `miss_block`; up to PEFT 0.17 it was `bone_block`, of type BONE.

- As a rule it is (rank × out): element (o, i) of the change is number (i mod rank, o).
- With `init_weights: "mini"` it is (rank × mini_r), and repeated along the outputs as well.
- With `init_weights: "bat"` it is (out/rank × rank × rank), and the change depends on the weight: of the rank × rank
  blocks of W, each block in row n becomes W + W·Mₙ + Mₙ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lora_cli.adapters.adapter import Target
from lora_cli.adapters.formula import (
    Formula,
    Given,
    MapMethod,
    Method,
    Rows,
    Settings,
    Shape,
    Shapes,
    SumMethod,
    Values,
)
from lora_cli.adapters.tuners.parts import numbers
from lora_cli.adapters.tuners.tuner import Changes, Module, Tuner, word

if TYPE_CHECKING:
    from torch import Tensor

_PART = "miss_block"


class Tiled(SumMethod):
    """A matrix that is repeated along the inputs, or both ways."""

    kind = "miss"
    parts = (_PART,)

    def problem(self, shapes: Shapes, settings: Settings, shape: Shape) -> str | None:
        """See `Method.problem`."""
        block = shapes.get(_PART, ())
        fits = len(block) == len(shape) == 2 and min(block) > 0
        if fits and settings.get("mini") is True:
            fits = shape[0] % block[1] == 0
        elif fits:
            fits = shape[0] == block[1]
        return None if fits else f"a block {list(block)} fills no {list(shape)}"

    def rank(self, shapes: Shapes, settings: Settings) -> int:
        """Rows of the block."""
        return next(iter(shapes.get(_PART, ())), 0)

    def values(self, given: Given) -> Values:
        """See `SumMethod.values`."""
        import torch

        block, places = numbers(given, _PART) * given.scale, torch.arange(given.shape[1])
        rank, width = block.shape

        def tile(rows: Tensor, columns: slice) -> Tensor:
            # Rows first: they are few, and all columns of the block as many as the module has outputs.
            return block.index_select(1, rows % width).index_select(0, places[columns] % rank).T

        return tile


class Transformed(MapMethod):
    """Blocks of the weight, each times a matrix, and that matrix once more."""

    kind = "miss-bat"
    parts = (_PART,)

    def problem(self, shapes: Shapes, settings: Settings, shape: Shape) -> str | None:
        """See `Method.problem`."""
        block = shapes.get(_PART, ())
        if len(block) != 3 or len(shape) != 2 or block[1] != block[2] or block[1] < 1:
            return f"{list(block)} are no square blocks for {list(shape)}"
        if block[0] * block[1] != shape[0] or shape[1] % block[1] or 0 in shape:
            return f"blocks {list(block)} fill no {list(shape)}"
        return None

    def rows(self, given: Given) -> Rows:
        """See `MapMethod.rows`."""
        from lora_cli.arithmetic.rowwise import multiply

        blocks = numbers(given, _PART)
        side = blocks.shape[1]

        def new(numbers_of: Tensor, old: Tensor) -> Tensor:
            found = old.clone()
            for number in (numbers_of // side).unique().tolist():
                mine = numbers_of // side == number
                parts = old[mine].reshape(-1, side)
                change = multiply(parts, blocks[number]).reshape(int(mine.sum()), -1, side)
                change += blocks[number][numbers_of[mine] % side].unsqueeze(1)
                found[mine] += change.mul_(given.scale).reshape(len(change), -1)
            return found

        return new


def _reader(part: str) -> Callable[[Module], Changes]:
    """Reads a module whose tensor is called so."""

    def read(module: Module) -> Changes:
        kind = module.said("init_weights", True)
        method: Method = BAT if kind == "bat" else METHOD
        settings = {"mini": True} if kind == "mini" else {}
        scale = module.scale(1.0, None, False, "there is none")
        yield Target(module.name, "weight", Formula(method, {_PART: module.tensors[part]}, scale, settings))

    return read


METHOD, BAT = Tiled(), Transformed()

TUNER = Tuner(
    type="MISS",
    name="MiSS",
    source="Kang and Yin 2024, arXiv:2409.15371",
    parts=(_PART,),
    read=_reader(_PART),
    methods=(METHOD, BAT),
    understood={"init_weights": word("which of three formulas it is", True, False, "bat", "mini")},
    neutral={
        "r": "the file shows it",
        "mini_r": "the file shows it",
        "miss_dropout": "acts in training only",
    },
)

BONE = Tuner(
    type="BONE",
    name="Bone",
    source="Kang and Yin 2024, arXiv:2409.15371; MiSS in PEFT since 0.18",
    parts=("bone_block",),
    read=_reader("bone_block"),
    methods=(METHOD, BAT),
    understood={"init_weights": word("which of two formulas it is", True, False, "bat")},
    neutral={"r": "the file shows it"},
)
