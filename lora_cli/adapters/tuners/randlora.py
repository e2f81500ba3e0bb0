"""RandLoRA: ΔW = scale · Σₙ Bₙ·diag(λₙ)·Aₙ·diag(γₙ), as many random products as make full rank (Albert et al. 2025).

In PEFT (`peft.tuners.randlora`) a module has `randlora_lambda` (rank × n) and `randlora_gamma` (n × least of out and
in), n being how often the rank goes into that; the model has `randlora_A` (rank × 1 × least) and `randlora_B`
(most × n × rank), of which a module takes the first columns and rows. Learned numbers multiply A alone, which has
rank·n rows, those of one rank together; B has as many columns, and there those of one n stand together. They are
multiplied as they stand. Of a module with more inputs than outputs it is the transpose. The scale is
randlora_alpha / r.

With `save_projection: false` the file has only the seed of A and B, and they are drawn again as PEFT does: dense ones
in bfloat16, sparse ones of -1, 0 and 1, each divided by its standard deviation, a sum in an order that torch chooses.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

from lora_cli.adapters.adapter import Target
from lora_cli.adapters.formula import Formula, Given, ProductMethod, Setting, Settings, Shape, Shapes
from lora_cli.adapters.tuners.draws import is_seed
from lora_cli.adapters.tuners.parts import sizes
from lora_cli.adapters.tuners.tuner import Changes, Field, Module, Tuner, flag, number, whole_number

if TYPE_CHECKING:
    from torch import Tensor

    from lora_cli.arithmetic.product import Term

_SHARED = ("randlora_A", "randlora_B")
_KINDS = ("very_sparse", "sparse", "dense")


class Bases(ProductMethod):
    """A product of full rank, of shared factors with learned numbers between them."""

    kind = "randlora"
    parts: ClassVar[tuple[str, ...]] = ("randlora_lambda", "randlora_gamma", *_SHARED)

    def problem(self, shapes: Shapes, settings: Settings, shape: Shape) -> str | None:
        """See `Method.problem`."""
        between, along = (shapes.get(name, ()) for name in self.parts[:2])
        if len(shape) != 2 or len(between) != 2 or 0 in between or along != (between[1], min(shape)):
            return f"randlora_lambda {list(between)} and randlora_gamma {list(along)} are none for {list(shape)}"
        (rank, count), least, most = between, min(shape), max(shape)
        a, b = self._matrices(shapes, settings)
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
        a, b = self._read(given)
        small = a[:, :count, :least].to(torch.float64)
        small = (between.unsqueeze(2) * small * along.unsqueeze(0)).flatten(end_dim=1)
        large = b[:most, :count].to(torch.float64).flatten(start_dim=1)
        if least == given.matrix[1]:
            return Term(large, small, given.scale)
        return Term(small.T, large.T, given.scale)

    def _matrices(self, shapes: Shapes, settings: Settings) -> tuple[Shape, Shape]:
        """Shapes of A and B."""
        return shapes.get(_SHARED[0], ()), shapes.get(_SHARED[1], ())

    def _read(self, given: Given) -> tuple[Tensor, Tensor]:
        """A and B."""
        return given.tensors[_SHARED[0]], given.tensors[_SHARED[1]]


class Drawn(Bases):
    """The same, with shared matrices that are drawn again; they are as large as the largest parameters need."""

    kind = "randlora-drawn"
    parts = ("randlora_lambda", "randlora_gamma")
    exact = False
    together = True

    def among(self, settings: Settings, parameters: Sequence[Shape]) -> Settings:
        """See `Method.among`."""
        inputs, outputs = max(of[-1] for of in parameters), max(of[0] for of in parameters)
        return {**settings, "least": min(inputs, outputs), "most": max(inputs, outputs)}

    def problem(self, shapes: Shapes, settings: Settings, shape: Shape) -> str | None:
        """See `Method.problem`."""
        rank, *known = sizes(settings, "rank", "least", "most")
        if 0 in known or not is_seed(settings.get("seed")) or settings.get("kind") not in _KINDS:
            return "the shared matrices are not known"
        problem = super().problem(shapes, settings, shape)
        if problem is None and shapes["randlora_lambda"][0] != rank:
            return f"a rank of {shapes['randlora_lambda'][0]}, and not {rank} as the config says"
        return problem

    def working_bytes(self, shapes: Shapes, settings: Settings, shape: Shape) -> int:
        """Both matrices as they are drawn, and while they are."""
        return 16 * sum(map(math.prod, self._matrices(shapes, settings)))

    def _matrices(self, shapes: Shapes, settings: Settings) -> tuple[Shape, Shape]:
        rank, (least, most) = shapes["randlora_lambda"][0], sizes(settings, "least", "most")
        return (rank, 1, least), (most, -(-least // rank), rank)

    def _read(self, given: Given) -> tuple[Tensor, Tensor]:
        shapes = {name: tuple(tensor.shape) for name, tensor in given.tensors.items()}
        matrices = self._matrices(shapes, given.settings)
        seed = given.settings["seed"]
        assert isinstance(seed, int)  # noqa: S101 (`problem` has looked)
        return _drawn(str(given.settings["kind"]), seed, *matrices)


@lru_cache(maxsize=1)
def _drawn(kind: str, seed: int, of_a: Shape, of_b: Shape) -> tuple[Tensor, Tensor]:
    """A and B; kept, for all modules have the same."""
    import torch

    state = torch.Generator().manual_seed(seed)

    def dense(shape: Shape) -> Tensor:
        empty = torch.empty(shape, dtype=torch.bfloat16)
        return torch.nn.init.kaiming_uniform_(empty, a=math.sqrt(5), generator=state)

    def sparse(shape: Shape) -> Tensor:
        drawn = torch.rand(shape, generator=state, dtype=torch.float32)
        share = 1 / (2 * (3 if kind == "sparse" else math.sqrt(of_a[2])))
        return (drawn > 1 - share).to(torch.float32) - (drawn < share).to(torch.float32)

    if kind == "dense":
        most, count, rank = of_b
        a, b = dense(of_a), torch.cat([dense((most, 1, rank)) for _ in range(count)], dim=1)
    else:
        a, b = sparse(of_a), sparse(of_b)
    return a / a.std(), b / b.std()


def _problem(config: Mapping[str, Any], names: Collection[str]) -> str | None:
    lost = [name for name in _SHARED if name not in names]
    if len(lost) == 1 or (lost and config.get("save_projection", True) is not False):
        return f"The file lacks {' and '.join(lost)}, and the config does not say save_projection = false"
    return None


def _read(module: Module) -> Changes:
    scale = module.scale(module.said("randlora_alpha", 640), module.said("r", 32), False, "randlora_alpha / r")
    if _SHARED[0] in module.shared:
        shared = {name: module.shared[name] for name in _SHARED}
        formula = Formula(METHOD, {**module.tensors, **shared}, scale)
    else:
        kind = next((kind for kind in _KINDS[:-1] if module.said(kind, False)), "dense")
        seed = int(module.said("projection_prng_key", 0)) & 0xFFFFFFFF
        settings: dict[str, Setting] = {"seed": seed, "kind": kind, "rank": module.said("r", 32)}
        formula = Formula(DRAWN, module.tensors, scale, settings)
    yield Target(module.name, "weight", formula)


METHOD, DRAWN = Bases(), Drawn()

TUNER = Tuner(
    type="RANDLORA",
    name="RandLoRA",
    source="Albert et al. 2025, arXiv:2502.00987",
    modules="linear layers and GPT-2's Conv1D",
    parts=DRAWN.parts,
    shared=_SHARED,
    read=_read,
    methods=(METHOD, DRAWN),
    understood={
        "r": whole_number("rank of each product; the scale is randlora_alpha over it", least=1),
        "randlora_alpha": number("numerator of the scale"),
        "projection_prng_key": Field("seed of the shared matrices, if the file lacks them", "a whole number", is_seed),
        "save_projection": flag("whether the shared matrices are in the file"),
        "sparse": flag("how they are drawn"),
        "very_sparse": flag("how they are drawn"),
        "fan_in_fan_out": flag("layout of the base; shapes and architecture decide, this settles squares"),
    },
    neutral={
        "randlora_dropout": "acts in training only",
        "init_weights": "how the vectors began",
    },
    unmergeable=_problem,
)
