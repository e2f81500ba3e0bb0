"""OSF: the small singular directions of a weight are trained, the large ones kept (Nayak et al. 2025).

In PEFT (`peft.tuners.osf`) a module has `osf_svd_params.U_low` (out × l), `.S_low` (l) and `.V_low` (l × in), which
take the place of the last l terms of the base's own singular value decomposition: W' = W + U·S·V - U₀·S₀·V₀. The
second product is computed from the base here, as PEFT does it, in float64.
"""

from __future__ import annotations

from lora_cli.adapters.adapter import Target
from lora_cli.adapters.formula import Formula, Given, Settings, Shape, Shapes, SumMethod, Values
from lora_cli.adapters.tuners.tuner import Changes, Module, Tuner
from lora_cli.errors import NumericError, ShapeError


class LastTerms(SumMethod):
    """What takes the place of the last terms of a singular value decomposition."""

    kind = "osf"
    parts = ("osf_svd_params.U_low", "osf_svd_params.S_low", "osf_svd_params.V_low")
    exact = False
    reads = True

    def problem(self, shapes: Shapes, settings: Settings, shape: Shape) -> str | None:
        """See `Method.problem`."""
        u, s, v = (shapes.get(name, ()) for name in self.parts)
        last = s[0] if len(s) == 1 else -1
        fits = len(shape) == 2 and 0 <= last <= min(shape) and u == (shape[0], last) and v == (last, shape[1])
        return None if fits else f"U_low {list(u)}, S_low {list(s)} and V_low {list(v)} make no {list(shape)}"

    def rank(self, shapes: Shapes, settings: Settings) -> int:
        """How many terms."""
        return shapes[self.parts[1]][0]

    def working_bytes(self, shapes: Shapes, settings: Settings, shape: Shape) -> int:
        """A decomposition of the base, in float64, and what goes with it."""
        return 80 * (shape[0] * shape[1] + self.rank(shapes, settings) * sum(shape)) + 80 * min(shape) ** 2

    def values(self, given: Given) -> Values:
        """See `SumMethod.values`."""
        import torch

        from lora_cli.arithmetic.product import Term, prepare

        assert given.before is not None  # noqa: S101 (the method asks for it)
        weight = given.before().to(torch.float64)
        if tuple(weight.shape) != given.matrix:
            raise ShapeError("The base's weight is another", expected=given.matrix, found=tuple(weight.shape))
        if not bool(torch.isfinite(weight).all()):
            raise NumericError("The base holds NaN or infinity")
        u, s, v = (given.tensors[name].to(torch.float64) for name in self.parts)
        left, sizes, right = torch.linalg.svd(weight, full_matrices=False)
        first = len(sizes) - len(s)
        was = Term(left[:, first:] * sizes[first:], right[first:], -given.scale)
        product = prepare([Term(u * s, v, given.scale), was], slices=2)
        return product.tile


def _read(module: Module) -> Changes:
    yield Target(module.name, "weight", Formula(METHOD, module.tensors, module.unscaled()), reads=True)


METHOD = LastTerms()

TUNER = Tuner(
    type="OSF",
    name="OSF",
    source="Nayak et al. 2025, arXiv:2504.07097",
    parts=METHOD.parts,
    read=_read,
    methods=(METHOD,),
    neutral={
        "effective_rank": "how many terms are kept; the file shows it",
        "rank_pattern": "the same of single modules",
        "target_svd_config": "PEFT does not look at it",
        "init_weights": "how the terms began",
    },
)
