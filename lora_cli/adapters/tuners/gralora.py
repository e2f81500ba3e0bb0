"""GraLoRA: ΔW is cut into k × k blocks, each a low-rank product of its own (Jung et al. 2025).

In PEFT (`peft.tuners.gralora`) a module has `gralora_A` (k × in/k × rank) and `gralora_B` (k × rank × out/k). The rank
is cut into k pieces: the block of outputs j and inputs n is piece n of B's matrix j times piece j of A's matrix n.
Besides there may be a usual product, `gralora_B_general` · `gralora_A_general`. The scale is alpha over both ranks
together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_cli.adapters.adapter import Target
from lora_cli.adapters.formula import Formula, Given, ProductMethod, Settings, Shape, Shapes
from lora_cli.adapters.tuners.tuner import Changes, Module, Tuner, flag, number

if TYPE_CHECKING:
    from torch import Tensor

    from lora_cli.arithmetic.product import Term

_GENERAL = ("gralora_A_general", "gralora_B_general")


class Granular(ProductMethod):
    """The products of all blocks as one, with zeros where a block is none of a factor's."""

    kind = "gralora"
    parts = ("gralora_A", "gralora_B", *_GENERAL)

    def problem(self, shapes: Shapes, settings: Settings, shape: Shape) -> str | None:
        """See `Method.problem`."""
        a, b = (shapes.get(name, ()) for name in self.parts[:2])
        if len(a) != 3 or len(b) != 3 or len(shape) != 2 or b[:2] != (a[0], a[2]) or not a[0] or a[2] % a[0]:
            return f"gralora_A {list(a)} and gralora_B {list(b)} are no factors of blocks"
        if (b[0] * b[2], a[0] * a[1]) != shape:
            return f"gralora_A {list(a)} and gralora_B {list(b)} make no {list(shape)}"
        if not set(_GENERAL).isdisjoint(shapes):
            general_a, general_b = (shapes.get(name, ()) for name in _GENERAL)
            if len(general_a) != 2 or general_a[1] != shape[1] or general_b != (shape[0], general_a[0]):
                return f"the general factors {list(general_a)} and {list(general_b)} make no {list(shape)}"
        return None

    def rank(self, shapes: Shapes, settings: Settings) -> int:
        """The ranks of all rows of blocks together, which may all be different, and that of the usual product."""
        a, general = shapes.get("gralora_A", ()), shapes.get(_GENERAL[0], ())
        return (a[0] * a[2] if len(a) == 3 else 0) + (general[0] if general else 0)

    def term(self, given: Given) -> Term:
        """See `ProductMethod.term`."""
        import torch

        from lora_cli.arithmetic.product import Term

        b, a = _blocks(*(given.tensors[name].to(torch.float64) for name in self.parts[:2]))
        if _GENERAL[0] in given.tensors:
            general_a, general_b = (given.tensors[name].to(torch.float64) for name in _GENERAL)
            b, a = torch.cat([b, general_b], dim=1), torch.cat([a, general_a], dim=0)
        return Term(b, a, given.scale)


def _blocks(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the whole matrix: a piece of the rank for each pair (n, j)."""
    count, width, rank = a.shape
    height, piece = b.shape[2], rank // count
    left = b.new_zeros((count, height, count, count, piece))
    right = a.new_zeros((count, count, piece, count, width))
    for one in range(count):
        left[one, :, :, one] = b[one].reshape(count, piece, height).permute(2, 0, 1)
        right[one, :, :, one] = a[one].T.reshape(count, piece, width)
    return left.reshape(count * height, -1), right.reshape(-1, count * width)


def _read(module: Module) -> Changes:
    ranks = [
        t.shape[at] for name, at in (("gralora_A", -1), (_GENERAL[0], 0)) if (t := module.tensors.get(name)) and t.shape
    ]
    scale = module.scale(module.said("alpha", 64), max(1, sum(ranks)), False, "alpha / (r + hybrid_r)")
    yield Target(module.name, "weight", Formula(METHOD, module.tensors, scale))


METHOD = Granular()

TUNER = Tuner(
    type="GRALORA",
    name="GraLoRA",
    source="Jung et al. 2025, arXiv:2505.20355",
    modules="linear layers and GPT-2's Conv1D",
    parts=METHOD.parts,
    needs=((METHOD.parts[:2],), (_GENERAL, ())),
    read=_read,
    methods=(METHOD,),
    understood={
        "alpha": number("numerator of the scale"),
        "fan_in_fan_out": flag("layout of the base; shapes and architecture decide, this settles squares"),
    },
    neutral={
        "r": "the file shows it",
        "hybrid_r": "the file shows it",
        "gralora_k": "the file shows it",
        "gralora_dropout": "acts in training only",
        "init_weights": "how the factors began",
    },
)
