"""VeRA and PVeRA: ΔW = diag(b)·B · diag(d)·A, with two random matrices that all modules share, and learned vectors.

In PEFT (`peft.tuners.vera`, `peft.tuners.pvera`) a module has `…_lambda_b` (out) and `…_lambda_d` (rank); the model has
`…_A` (rank × largest in) and `…_B` (largest out × rank), of which a module takes the first columns and rows. PVeRA has
twice as many rows of A and numbers of d: the first half is of the mean, the second of a noise that merging leaves out.
There is no scale.

With `save_projection: false` the file has only the seed of A and B. PEFT draws first A, then B, in float32, from
-√6/√n to √6/√n, n being the columns of each; here the same numbers are drawn, each rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

from lora_cli.adapters.adapter import Target
from lora_cli.adapters.formula import Formula, Given, ProductMethod, Settings, Shape, Shapes
from lora_cli.adapters.tuners.draws import Uniform, is_seed
from lora_cli.adapters.tuners.parts import sizes
from lora_cli.adapters.tuners.tuner import Changes, Field, Module, Tuner, flag, whole_number

if TYPE_CHECKING:
    from torch import Tensor

    from lora_cli.arithmetic.product import Term


class Shared(ProductMethod):
    """A product of shared factors, whose rows are multiplied by a module's vectors."""

    kind = "vera"
    parts: ClassVar[tuple[str, ...]] = ("vera_lambda_b", "vera_lambda_d", "vera_A", "vera_B")
    halves = 1

    def problem(self, shapes: Shapes, settings: Settings, shape: Shape) -> str | None:
        """See `Method.problem`."""
        lambda_b, lambda_d = (shapes.get(name, ()) for name in self.parts[:2])
        if len(shape) != 2 or lambda_b != (shape[0],) or len(lambda_d) != 1 or lambda_d[0] % self.halves:
            return f"{list(lambda_b)} and {list(lambda_d)} are no vectors for {list(shape)}"
        rank = lambda_d[0] // self.halves
        a, b = self._matrices(shapes, settings)
        if len(a) != 2 or len(b) != 2 or a[0] != lambda_d[0] or b[1] != rank or a[1] < shape[1] or b[0] < shape[0]:
            return f"the shared matrices {list(a)} and {list(b)} are none for {list(shape)} at rank {rank}"
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
        a, b = self._read(given)
        a, b = a[:rank, :inner].to(torch.float64), b[:out].to(torch.float64)
        return Term(b * lambda_b.unsqueeze(1), a * lambda_d[:rank].unsqueeze(1), given.scale)

    def _matrices(self, shapes: Shapes, settings: Settings) -> tuple[Shape, Shape]:
        """Shapes of A and B."""
        return shapes.get(self.parts[2], ()), shapes.get(self.parts[3], ())

    def _read(self, given: Given) -> tuple[Tensor, Tensor]:
        """A and B."""
        return given.tensors[self.parts[2]], given.tensors[self.parts[3]]


class Drawn(Shared):
    """The same, with shared matrices that are drawn again; they are as large as the largest parameters need."""

    kind = "vera-drawn"
    parts = ("vera_lambda_b", "vera_lambda_d")
    together = True

    def among(self, settings: Settings, parameters: Sequence[Shape]) -> Settings:
        """See `Method.among`."""
        return {**settings, "inputs": max(of[-1] for of in parameters), "outputs": max(of[0] for of in parameters)}

    def problem(self, shapes: Shapes, settings: Settings, shape: Shape) -> str | None:
        """See `Method.problem`."""
        known = 0 not in sizes(settings, "inputs", "outputs") and is_seed(settings.get("seed"))
        problem = super().problem(shapes, settings, shape) if known else "the shared matrices are not known"
        (rank,) = sizes(settings, "rank")
        if problem is None and self.rank(shapes, settings) != rank:
            return f"a rank of {self.rank(shapes, settings)}, and not {rank} as the config says"
        return problem

    def working_bytes(self, shapes: Shapes, settings: Settings, shape: Shape) -> int:
        """Both matrices as they are drawn, and while they are."""
        return 16 * sum(map(math.prod, self._matrices(shapes, settings)))

    def _matrices(self, shapes: Shapes, settings: Settings) -> tuple[Shape, Shape]:
        (rows,), (inputs, outputs) = shapes[self.parts[1]], sizes(settings, "inputs", "outputs")
        return (rows, inputs), (outputs, rows // self.halves)

    def _read(self, given: Given) -> tuple[Tensor, Tensor]:
        shapes = {name: tuple(tensor.shape) for name, tensor in given.tensors.items()}
        seed = given.settings["seed"]
        assert isinstance(seed, int)  # noqa: S101 (`problem` has looked)
        return _drawn(seed, *self._matrices(shapes, given.settings))


class Halves(Shared):
    """The same, with the mean's half of what is twice as long."""

    kind = "pvera"
    parts = ("pvera_lambda_b", "pvera_lambda_d", "pvera_A", "pvera_B")
    halves = 2


class DrawnHalves(Drawn):
    """Both."""

    kind = "pvera-drawn"
    parts = ("pvera_lambda_b", "pvera_lambda_d")
    halves = 2


@lru_cache(maxsize=1)
def _drawn(seed: int, *shapes: Shape) -> tuple[Tensor, Tensor]:
    """A and B; kept, for all modules have the same."""
    import torch

    draws = Uniform(seed)
    a, b = (
        torch.from_numpy(draws.between(math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(of[1])), math.prod(of))).reshape(of)
        for of in shapes
    )
    return a, b


@dataclass(frozen=True)
class _Reader:
    """Reads modules of one of both."""

    saved: Shared
    drawn: Drawn

    def read(self, module: Module) -> Changes:
        scale = module.scale(1.0, None, False, "there is none")
        if self.saved.parts[2] in module.shared:
            shared = {name: module.shared[name] for name in self.saved.parts[2:]}
            yield Target(module.name, "weight", Formula(self.saved, {**module.tensors, **shared}, scale))
        else:
            seed = int(module.said("projection_prng_key", 0)) & 0xFFFFFFFF
            settings = {"seed": seed, "rank": int(module.said("r", 256))}
            yield Target(module.name, "weight", Formula(self.drawn, module.tensors, scale, settings))

    def problem(self, config: Mapping[str, Any], names: Collection[str]) -> str | None:
        lost = [name for name in self.saved.parts[2:] if name not in names]
        if len(lost) == 1 or (lost and config.get("save_projection", True) is not False):
            return f"The file lacks {' and '.join(lost)}, and the config does not say save_projection = false"
        return None


VERA_READER = _Reader(Shared(), Drawn())
PVERA_READER = _Reader(Halves(), DrawnHalves())

_UNDERSTOOD = {
    "r": whole_number("rank; checked against the vectors, where the file lacks the shared matrices"),
    "projection_prng_key": Field("seed of the shared matrices, where the file lacks them", "a whole number", is_seed),
    "save_projection": flag("whether the shared matrices are in the file"),
    "fan_in_fan_out": flag("layout of the base; shapes and architecture decide, this settles squares"),
}
_NEUTRAL = {
    "d_initial": "how the vectors began",
    "init_weights": "how the vectors began",
}

TUNER = Tuner(
    type="VERA",
    name="VeRA",
    source="Kopiczko, Blankevoort and Asano 2023, arXiv:2310.11454",
    modules="linear layers and GPT-2's Conv1D",
    parts=Drawn.parts,
    shared=Shared.parts[2:],
    read=VERA_READER.read,
    methods=(VERA_READER.saved, VERA_READER.drawn),
    understood=_UNDERSTOOD,
    neutral={**_NEUTRAL, "vera_dropout": "acts in training only"},
    unmergeable=VERA_READER.problem,
)

PVERA = Tuner(
    type="PVERA",
    name="PVeRA",
    source="arXiv:2512.07703",
    modules="linear layers and GPT-2's Conv1D",
    parts=DrawnHalves.parts,
    shared=Halves.parts[2:],
    read=PVERA_READER.read,
    methods=(PVERA_READER.saved, PVERA_READER.drawn),
    understood=_UNDERSTOOD,
    neutral={
        **_NEUTRAL,
        "pvera_dropout": "acts in training only",
        "sample_at_inference": "adds noise at run time; what is merged is the mean, as PEFT merges it",
        "generator_seed": "of that noise",
    },
    unmergeable=PVERA_READER.problem,
)
