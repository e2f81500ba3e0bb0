"""LoHa: ΔW = scale · (A₁·B₁) ∘ (A₂·B₂), the elementwise product of two low-rank products (Hyeon-Woo et al. 2021).

In PEFT (`peft.tuners.loha`) a module has `hada_w1_a` (out × rank), `hada_w1_b` (rank × in) and the same with `w2`. Of a
convolution in Tucker form there are `hada_t1` and `hada_t2` (rank, rank, k…) besides; then `w_a` are (rank × out), and
each of the two tensors is Σᵢⱼ t[i, j, …]·a[i, out]·b[j, in]. The scale is alpha / rank.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lora_cli.adapters.adapter import Target
from lora_cli.adapters.formula import Formula, Given, Settings, Shape, Shapes, SumMethod, Values
from lora_cli.adapters.tuners.tucker import is_core, kernel
from lora_cli.adapters.tuners.tuner import Changes, Module, Tuner, number, pattern, whole_number

if TYPE_CHECKING:
    from torch import Tensor

    from lora_cli.arithmetic.product import ExactProduct

_SIDES = (("hada_w1_a", "hada_w1_b", "hada_t1"), ("hada_w2_a", "hada_w2_b", "hada_t2"))


class Hadamard(SumMethod):
    """The elementwise product of two products, each of which is exact on its grid; they meet in one rounding."""

    kind = "loha"
    parts = ("hada_w1_a", "hada_w1_b", "hada_t1", "hada_w2_a", "hada_w2_b", "hada_t2")

    def problem(self, shapes: Shapes, settings: Settings, shape: Shape) -> str | None:
        """See `Method.problem`."""
        for names in _SIDES:
            a, b, t = (shapes.get(name) for name in names)
            if a is None or b is None or len(a) != 2 or len(b) != 2 or len(shape) < 2:
                return f"{names[0]} and {names[1]} are no pair of factors"
            if t is None:
                fits = a == (shape[0], b[0]) and b[1] == math.prod(shape[1:])
            else:
                fits = a == (b[0], shape[0]) and b[1] == shape[1] and is_core(t, b[0], shape[2:])
            if not fits:
                return f"{names[0]} {list(a)} and {names[1]} {list(b)} make no {list(shape)}"
        return None

    def rank(self, shapes: Shapes, settings: Settings) -> int:
        """The rank of each of the two products."""
        return shapes["hada_w1_b"][0]

    def working_bytes(self, shapes: Shapes, settings: Settings, shape: Shape) -> int:
        """Both products' factors, those of a kernel expanded."""
        return sum(40 * shapes[b][0] * (shape[0] + math.prod(shape[1:])) for _, b, _ in _SIDES if b in shapes)

    def values(self, given: Given) -> Values:
        """See `SumMethod.values`."""
        left, right = (_side(given, *names) for names in _SIDES)

        def tile(rows: Tensor, columns: slice) -> Tensor:
            first, second = left.tile(rows, columns), right.tile(rows, columns)
            return first.mul_(second).mul_(given.scale)

        return tile


def _side(given: Given, a: str, b: str, t: str) -> ExactProduct:
    """One of the two products, over the kernel as a matrix."""
    from lora_cli.arithmetic.product import Term, prepare

    left, right = given.tensors[a], given.tensors[b]
    if t in given.tensors:
        left, right = left.T, kernel(given.tensors[t], right)
    return prepare([Term(left, right, 1.0)], slices=2)


def _read(module: Module) -> Changes:
    factor = module.tensors.get("hada_w1_b")
    rank = module.rank(factor.shape[0] if factor and factor.shape else None)
    alpha = module.said("alpha", 8, "alpha_pattern")
    yield Target(module.name, "weight", Formula(METHOD, module.tensors, module.scale(alpha, rank, False, "alpha / r")))


METHOD = Hadamard()

TUNER = Tuner(
    type="LOHA",
    name="LoHa",
    source="Hyeon-Woo, Ye-Bin and Oh 2021, arXiv:2108.06098",
    modules="linear layers, convolutions",
    parts=METHOD.parts,
    needs=tuple(((name,),) for side in _SIDES for name in side[:2]),
    read=_read,
    methods=(METHOD,),
    understood={
        "r": whole_number("rank; the scale is alpha over it"),
        "alpha": number("numerator of the scale"),
        "rank_pattern": pattern("ranks of single modules", whole_number("")),
        "alpha_pattern": pattern("alphas of single modules", number("")),
    },
    neutral={
        "rank_dropout": "acts in training only",
        "module_dropout": "acts in training only",
        "use_effective_conv2d": "the file shows whether kernels are in Tucker form",
        "init_weights": "how the factors began",
    },
)
