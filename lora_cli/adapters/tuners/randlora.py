"""RandLoRA: ΔW = scale · Σₙ Bₙ·diag(λₙ)·Aₙ·diag(γₙ), as many random products as make full rank (Albert et al. 2025).

In PEFT (`peft.tuners.randlora`) a module has `randlora_lambda` (rank × n) and `randlora_gamma` (n × least of out and
in), n being how often the rank goes into that; the model has `randlora_A` (rank × 1 × least) and `randlora_B`
(most × n × rank), of which a module takes the first columns and rows. Learned numbers multiply A alone, which has
rank·n rows, those of one rank together; B has as many columns, and there those of one n stand together. They are
multiplied as they stand. Of a module with more inputs than outputs it is the transpose. The scale is
randlora_alpha / r.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from lora_cli.adapters.adapter import Target
from lora_cli.adapters.formula import Formula, Given, ProductMethod, Settings, Shape, Shapes
from lora_cli.adapters.tuners.tuner import Changes, Module, Tuner, flag, number, whole_number

if TYPE_CHECKING:
    from lora_cli.arithmetic.product import Term

_SHARED = ("randlora_A", "randlora_B")


class Bases(ProductMethod):
    """A product of full rank, of shared factors with learned numbers between them."""

    kind = "randlora"
    parts = ("randlora_lambda", "randlora_gamma", *_SHARED)

    def problem(self, shapes: Shapes, settings: Settings, shape: Shape) -> str | None:
        """See `Method.problem`."""
        between, along, a, b = (shapes.get(name) for name in self.parts)
        if between is None or along is None or a is None or b is None or len(shape) != 2:
            return "a part is missing" if len(shape) == 2 else f"it is for matrices, not for {list(shape)}"
        least, most = min(shape), max(shape)
        if len(between) != 2 or along != (between[1], least):
            return f"randlora_lambda {list(between)} and randlora_gamma {list(along)} are none for {list(shape)}"
        rank, count = between
        fits_a = len(a) == 3 and a[0] == rank and a[1] in (1, count) and a[2] >= least
        if not fits_a or len(b) != 3 or b[0] < most or b[1] < count or b[2] != rank:
            return f"the shared matrices {list(a)} and {list(b)} are none for {list(shape)} at rank {rank}"
        return None

    def rank(self, shapes: Shapes, settings: Settings) -> int:
        """That of all products together."""
        found = shapes.get("randlora_lambda", ())
        return found[0] * found[1] if len(found) == 2 else 0

    def term(self, given: Given) -> Term:
        """See `ProductMethod.term`."""
        import torch

        from lora_cli.arithmetic.product import Term

        between, along = (given.tensors[name].to(torch.float64) for name in self.parts[:2])
        least, most, count = min(given.matrix), max(given.matrix), between.shape[1]
        small = given.tensors["randlora_A"][:, :count, :least].to(torch.float64)
        small = (between.unsqueeze(2) * small * along.unsqueeze(0)).flatten(end_dim=1)
        large = given.tensors["randlora_B"][:most, :count].to(torch.float64).flatten(start_dim=1)
        if least == given.matrix[1]:
            return Term(large, small, given.scale)
        return Term(small.T, large.T, given.scale)


def _missing(config: Mapping[str, Any], names: Collection[str]) -> str | None:
    lost = [name for name in _SHARED if name not in names]
    if not lost:
        return None
    return f"The file lacks {' and '.join(lost)} (save_projection): train with save_projection, or merge it by PEFT"


def _read(module: Module) -> Changes:
    shared = {name: module.shared[name] for name in _SHARED}
    scale = module.scale(module.said("randlora_alpha", 640), module.said("r", 32), False, "randlora_alpha / r")
    yield Target(module.name, "weight", Formula(METHOD, {**module.tensors, **shared}, scale))


METHOD = Bases()

TUNER = Tuner(
    type="RANDLORA",
    name="RandLoRA",
    source="Albert et al. 2025, arXiv:2502.00987",
    parts=METHOD.parts[:2],
    shared=_SHARED,
    read=_read,
    methods=(METHOD,),
    understood={
        "r": whole_number("rank of each product; the scale is randlora_alpha over it", least=1),
        "randlora_alpha": number("numerator of the scale"),
        "fan_in_fan_out": flag("layout of the base; shapes and architecture decide, this settles squares"),
    },
    neutral={
        "projection_prng_key": "what the shared matrices were drawn from; they are in the file",
        "save_projection": "whether the shared matrices are in the file; it shows that",
        "sparse": "how the shared matrices were drawn; they are in the file",
        "very_sparse": "how the shared matrices were drawn; they are in the file",
        "randlora_dropout": "acts in training only",
        "init_weights": "how the vectors began",
    },
    unmergeable=_missing,
)
