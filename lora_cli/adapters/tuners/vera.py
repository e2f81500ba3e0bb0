"""VeRA and PVeRA: ΔW = diag(b)·B · diag(d)·A, with two random matrices that all modules share, and learned vectors.

In PEFT (`peft.tuners.vera`, `peft.tuners.pvera`) a module has `…_lambda_b` (out) and `…_lambda_d` (rank); the model has
`…_A` (rank × largest in) and `…_B` (largest out × rank), of which a module takes the first columns and rows. PVeRA has
twice as many rows of A and numbers of d: the first half is of the mean, the second of a noise that merging leaves out.
There is no scale.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_cli.adapters.adapter import Target
from lora_cli.adapters.formula import Formula, Given, Method, ProductMethod, Settings, Shape, Shapes
from lora_cli.adapters.tuners.tuner import Changes, Module, Tuner, flag

if TYPE_CHECKING:
    from lora_cli.arithmetic.product import Term


class Shared(ProductMethod):
    """A product of shared factors, whose rows are multiplied by a module's vectors."""

    kind = "vera"
    parts = ("vera_lambda_b", "vera_lambda_d", "vera_A", "vera_B")
    halves = 1

    def problem(self, shapes: Shapes, settings: Settings, shape: Shape) -> str | None:
        """See `Method.problem`."""
        lambda_b, lambda_d, a, b = (shapes.get(name) for name in self.parts)
        if lambda_b is None or lambda_d is None or a is None or b is None:
            return "a vector or a shared matrix is missing"
        if len(shape) != 2 or lambda_b != (shape[0],) or len(lambda_d) != 1 or len(a) != 2 or len(b) != 2:
            return f"{list(lambda_b)} and {list(lambda_d)} are no vectors for {list(shape)}"
        rank = lambda_d[0] // self.halves
        if (
            rank * self.halves != lambda_d[0]
            or a[0] != lambda_d[0]
            or b[1] != rank
            or a[1] < shape[1]
            or b[0] < shape[0]
        ):
            return f"the shared matrices {list(a)} and {list(b)} are too small for {list(shape)} at rank {rank}"
        return None

    def rank(self, shapes: Shapes, settings: Settings) -> int:
        """Length of the vector between the matrices."""
        found = shapes.get(self.parts[1])
        return found[0] // self.halves if found else 0

    def term(self, given: Given) -> Term:
        """See `ProductMethod.term`."""
        import torch

        from lora_cli.arithmetic.product import Term

        lambda_b, lambda_d = (given.tensors[name].to(torch.float64) for name in self.parts[:2])
        (out, inner), rank = given.matrix, len(lambda_d) // self.halves
        a = given.tensors[self.parts[2]][:rank, :inner].to(torch.float64)
        b = given.tensors[self.parts[3]][:out].to(torch.float64)
        return Term(b * lambda_b.unsqueeze(1), a * lambda_d[:rank].unsqueeze(1), given.scale)


class Halves(Shared):
    """The same, with the mean's half of what is twice as long."""

    kind = "pvera"
    parts = ("pvera_lambda_b", "pvera_lambda_d", "pvera_A", "pvera_B")
    halves = 2


@dataclass(frozen=True)
class _Reader:
    """Reads one of both."""

    method: Method

    def read(self, module: Module) -> Changes:
        scale = module.scale(1.0, None, False, "there is none")
        shared = {name: module.shared[name] for name in self.method.parts[2:] if name in module.shared}
        yield Target(module.name, "weight", Formula(self.method, {**module.tensors, **shared}, scale))

    def missing(self, config: Mapping[str, Any], names: Collection[str]) -> str | None:
        lost = [name for name in self.method.parts[2:] if name not in names]
        if not lost:
            return None
        return f"The file lacks {' and '.join(lost)} (save_projection): train with save_projection, or merge it by PEFT"


METHOD, HALVES = Shared(), Halves()

_UNDERSTOOD = {"fan_in_fan_out": flag("layout of the base; shapes and architecture decide, this settles squares")}
_NEUTRAL = {
    "r": "the file shows it",
    "projection_prng_key": "what the shared matrices were drawn from; they are in the file",
    "save_projection": "whether the shared matrices are in the file; it shows that",
    "d_initial": "how the vectors began",
    "init_weights": "how the vectors began",
}

TUNER = Tuner(
    type="VERA",
    name="VeRA",
    source="Kopiczko, Blankevoort and Asano 2023, arXiv:2310.11454",
    parts=METHOD.parts[:2],
    shared=METHOD.parts[2:],
    read=_Reader(METHOD).read,
    methods=(METHOD,),
    understood=_UNDERSTOOD,
    neutral={**_NEUTRAL, "vera_dropout": "acts in training only"},
    unmergeable=_Reader(METHOD).missing,
)

PVERA = Tuner(
    type="PVERA",
    name="PVeRA",
    source="Fillioux et al. 2025, arXiv:2512.07703",
    parts=HALVES.parts[:2],
    shared=HALVES.parts[2:],
    read=_Reader(HALVES).read,
    methods=(HALVES,),
    understood=_UNDERSTOOD,
    neutral={
        **_NEUTRAL,
        "pvera_dropout": "acts in training only",
        "sample_at_inference": "adds noise at run time; what is merged is the mean, as PEFT merges it",
        "generator_seed": "of that noise",
    },
    unmergeable=_Reader(HALVES).missing,
)
