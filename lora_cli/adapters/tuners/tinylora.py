"""TinyLoRA: ΔW = B·(Σ vᵤ·Pᵤ)·A, with a few learned numbers v that modules share (arXiv:2602.04118).

In PEFT (`peft.tuners.tinylora`) a module has `tinylora_A` (rank × in) and `tinylora_B` (out × rank), from the base's
singular vectors, and `tinylora_P` (u × rank × rank), random; of an embedding A is (rank × dim). The model has
`tinylora_v.<group>` (u) for each group of modules. Which group a module is in depends on the order of the modules in
the model, which is in no file; so only where all are in one it is known.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from lora_cli.adapters.adapter import Target
from lora_cli.adapters.formula import Formula, Given, ProductMethod, Settings, Shape, Shapes
from lora_cli.adapters.tuners.parts import numbers
from lora_cli.adapters.tuners.tuner import Changes, Module, Tuner, flag

if TYPE_CHECKING:
    from lora_cli.arithmetic.product import Term

_VECTOR = "tinylora_v"


class Tiny(ProductMethod):
    """A product of fixed factors, with a small matrix between them that few numbers make."""

    kind = "tinylora"
    parts = ("tinylora_A", "tinylora_B", "tinylora_P", _VECTOR)

    def problem(self, shapes: Shapes, settings: Settings, shape: Shape) -> str | None:
        """See `Method.problem`."""
        a, b, between, vector = (shapes.get(name) for name in self.parts)
        if a is None or len(a) != 2 or len(shape) != 2 or b != (shape[0], a[0]) or a[1] != shape[1]:
            return f"tinylora_A {a} and tinylora_B {b} make no {list(shape)}"
        if vector is None or len(vector) != 1 or between != (*vector, a[0], a[0]):
            return f"tinylora_P {between} and tinylora_v {vector} are none of rank {a[0]}"
        return None

    def rank(self, shapes: Shapes, settings: Settings) -> int:
        """Rows of A."""
        return next(iter(shapes.get("tinylora_A", ())), 0)

    def term(self, given: Given) -> Term:
        """See `ProductMethod.term`."""
        import torch

        from lora_cli.arithmetic.product import Term

        a, b, between, vector = (numbers(given, name) for name in self.parts)
        middle, left = torch.zeros_like(between.sum(0)), torch.zeros_like(b)
        for share, matrix in zip(vector.unbind(), between.unbind(), strict=True):
            middle += matrix * share
        for column, row in zip(b.unbind(1), middle.unbind(), strict=True):
            left += column.unsqueeze(1) * row
        return Term(left, a, given.scale)


def _problem(config: Mapping[str, Any], names: Collection[str]) -> str | None:
    if "tinylora_P" not in names:
        return "The file lacks tinylora_P (save_projection): train with save_projection, or merge it by PEFT"
    vectors = [name for name in names if name.startswith(f"{_VECTOR}.")]
    if len(vectors) == 1:
        return None
    return (
        f"TinyLoRA has {len(vectors)} vectors, and which module takes which depends on the order of the model's "
        "modules: train with weight_tying = 1, or merge it by PEFT"
    )


def _read(module: Module) -> Changes:
    vector = next(tensor for name, tensor in module.shared.items() if name.startswith(f"{_VECTOR}."))
    tensors = {**module.tensors, _VECTOR: vector}
    yield Target(module.name, "weight", Formula(METHOD, tensors, module.scale(1.0, None, False, "there is none")))


METHOD = Tiny()

TUNER = Tuner(
    type="TINYLORA",
    name="TinyLoRA",
    source="arXiv:2602.04118",
    modules="linear layers and GPT-2's Conv1D, embeddings",
    parts=METHOD.parts[:-1],
    shared=(_VECTOR,),
    read=_read,
    methods=(METHOD,),
    understood={"fan_in_fan_out": flag("layout of the base; shapes and architecture decide, this settles squares")},
    neutral={
        "r": "the file shows it",
        "u": "the file shows it",
        "weight_tying": "which modules share numbers; the file shows whether all do",
        "projection_seed": "what the small matrices were drawn from; they are in the file",
        "save_projection": "whether the small matrices are in the file; it shows that",
        "tinylora_dropout": "acts in training only",
        "init_v_bound": "how the numbers began",
        "init_weights": "how the numbers began",
    },
    unmergeable=_problem,
)
