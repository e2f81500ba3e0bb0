"""LoKr: ΔW = scale · W₁ ⊗ W₂, the Kronecker product of two matrices, each whole or low-rank (Yeh et al. 2023).

In PEFT (`peft.tuners.lokr`) a module has `lokr_w1` (l × m) or its factors `lokr_w1_a` (l × rank), `lokr_w1_b`
(rank × m), and `lokr_w2` (k, n, and a kernel's dimensions) or `lokr_w2_a` (k × rank), `lokr_w2_b` (rank × n·…), or in
Tucker form `lokr_t2` with (rank × k) and (rank × n). The parameter has l·k outputs and m·n inputs. Output i is row
i div k of W₁ and row i mod k of W₂, and so for inputs. Where `lokr_w2` has three dimensions, a kernel of one, PEFT
multiplies it with a W₁ that has one dimension more in front: there i mod l and i div l. The scale is alpha / rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from lora_cli.adapters.adapter import Target
from lora_cli.adapters.formula import Formula, Given, Settings, Shape, Shapes, SumMethod, Values
from lora_cli.adapters.tuners.parts import numbers
from lora_cli.adapters.tuners.tucker import is_core, kernel
from lora_cli.adapters.tuners.tuner import Changes, Module, Tuner, number, pattern, whole_number

if TYPE_CHECKING:
    from torch import Tensor

    Part = Callable[[Tensor, Tensor], Tensor]
    """Some rows × some columns of a matrix."""


class Kronecker(SumMethod):
    """The Kronecker product: each element is one of W₁ times one of W₂."""

    kind = "lokr"
    parts = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")

    def problem(self, shapes: Shapes, settings: Settings, shape: Shape) -> str | None:
        """See `Method.problem`."""
        if len(shape) < 2 or 0 in shape:
            return f"no Kronecker product is {list(shape)}"
        first, second = _sizes(shapes, shape)
        if first is None or second is None:
            return f"the tensors of {'lokr_w1' if first is None else 'lokr_w2'} make no matrix"
        made = (first[0] * second[0], first[1] * second[1])
        if made != (shape[0], math.prod(shape[1:])):
            return f"{list(first)} and {list(second)} make {list(made)}, and no {list(shape)}"
        return None

    def rank(self, shapes: Shapes, settings: Settings) -> int:
        """The rank of the factors, if there are any."""
        return max((shapes[name][0] for name in ("lokr_w1_b", "lokr_w2_b") if shapes.get(name)), default=0)

    def working_bytes(self, shapes: Shapes, settings: Settings, shape: Shape) -> int:
        """All tensors in float64, and those of a product on its grids; factors of a kernel in Tucker form expanded."""
        expanded = 40 * math.prod(shape[2:]) * math.prod(shapes["lokr_w2_b"]) if "lokr_t2" in shapes else 0
        return expanded + 40 * sum(math.prod(of) for of in shapes.values())

    def values(self, given: Given) -> Values:
        """See `SumMethod.values`."""
        import torch

        shapes = {name: tuple(tensor.shape) for name, tensor in given.tensors.items()}
        first, second = _part(given, "lokr_w1"), _part(given, "lokr_w2")
        above, below = _sizes(shapes, given.shape)
        assert above is not None  # noqa: S101 (`problem` has looked)
        assert below is not None  # noqa: S101 (likewise)
        dealt, places = len(shapes.get("lokr_w2", ())) == 3, torch.arange(given.matrix[1])

        def tile(rows: Tensor, columns: slice) -> Tensor:
            at = places[columns]
            if dealt:
                taps = given.shape[2]
                one = first(rows % above[0], at // taps % above[1])
                other = second(rows // above[0], at // (above[1] * taps) * taps + at % taps)
            else:
                one, other = first(rows // below[0], at // below[1]), second(rows % below[0], at % below[1])
            return one.mul_(other).mul_(given.scale)

        return tile


def _sizes(shapes: Shapes, shape: Shape) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
    """(rows, columns) of W₁ and of W₂; None for what is no matrix."""
    return _matrix(shapes, "lokr_w1", ()), _matrix(shapes, "lokr_w2", shape[2:])


def _matrix(shapes: Shapes, name: str, kernel_shape: Shape) -> tuple[int, int] | None:
    """(rows, columns) of W₁ or W₂, its columns with the places of a kernel; None if the tensors are no matrix."""
    whole, a, b = (shapes.get(f"{name}{end}") for end in ("", "_a", "_b"))
    core = shapes.get("lokr_t2") if name == "lokr_w2" else None
    if whole is not None:
        fits = a is None and b is None and core is None and len(whole) >= 2 and whole[2:] == kernel_shape
        return (whole[0], math.prod(whole[1:])) if fits else None
    if a is None or b is None or len(a) != 2 or len(b) != 2:
        return None
    if core is not None:
        return (a[1], b[1] * math.prod(kernel_shape)) if a[0] == b[0] and is_core(core, b[0], kernel_shape) else None
    return (a[0], b[1]) if a[1] == b[0] else None


def _part(given: Given, name: str) -> Part:
    """Some rows × some columns of W₁ or W₂, each number the same wherever it is asked for."""
    from lora_cli.arithmetic.product import Term, prepare

    if name in given.tensors:
        whole = numbers(given, name)
        matrix = whole.reshape(whole.shape[0], -1)
        return lambda rows, columns: matrix.index_select(0, rows).index_select(1, columns)
    left, right = given.tensors[f"{name}_a"], given.tensors[f"{name}_b"]
    if name == "lokr_w2" and "lokr_t2" in given.tensors:
        left, right = left.T, kernel(given.tensors["lokr_t2"], right)
    return prepare([Term(left, right, 1.0)], slices=2).tile


def _read(module: Module) -> Changes:
    factors = {t.shape[0] for name in ("lokr_w1_b", "lokr_w2_b") if (t := module.tensors.get(name)) and t.shape}
    rank = module.rank(next(iter(factors), None))
    alpha = module.said("alpha", 8, "alpha_pattern")
    yield Target(module.name, "weight", Formula(METHOD, module.tensors, module.scale(alpha, rank, False, "alpha / r")))


METHOD = Kronecker()

TUNER = Tuner(
    type="LOKR",
    name="LoKr",
    source="Yeh et al. 2023, arXiv:2309.14859",
    modules="linear layers, convolutions",
    parts=METHOD.parts,
    needs=tuple(((name,), (f"{name}_a", f"{name}_b")) for name in ("lokr_w1", "lokr_w2")),
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
        "rank_dropout_scale": "acts in training only",
        "module_dropout": "acts in training only",
        "use_effective_conv2d": "the file shows whether kernels are in Tucker form",
        "decompose_both": "the file shows which matrices are low-rank",
        "decompose_factor": "the file shows the matrices' shapes",
        "init_weights": "how the factors began",
    },
)
