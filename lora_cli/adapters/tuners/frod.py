"""FRoD: W' = U·(S + diag(l))·Vᵀ in place of W = U·diag(|·|)·Vᵀ (`peft.tuners.frod`).

A module has `frod_lambda_l` (in) and `frod_lambda_s_values` (n). Modules of one role, which is the end of their names,
share `frod_V` (in × in), `frod_s_indices` (2 × n), the places of the numbers in S, and `frod_s_size`. U is in no file:
its columns are those of W·V⁻ᵀ, each divided by its length, rounded to float32 as PEFT keeps it. What is at one place of
S several times is summed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from lora_cli.adapters.adapter import Target
from lora_cli.adapters.formula import Formula, Given, Settings, Shape, Shapes, SumMethod, Values
from lora_cli.adapters.tuners.parts import numbers, places
from lora_cli.adapters.tuners.tuner import Changes, Module, Tuner, flag
from lora_cli.errors import NamesError

if TYPE_CHECKING:
    from torch import Tensor

_L, _S = "frod_lambda_l", "frod_lambda_s_values"
_V, _AT, _SIZE = "frod_V", "frod_s_indices", "frod_s_size"
_LEAST = 1e-12


class Rotated(SumMethod):
    """What takes the place of the weight, less the weight."""

    kind = "frod"
    parts = (_L, _S, _V, _AT, _SIZE)
    indices = (_AT, _SIZE)
    exact = False
    reads = True

    def problem(self, shapes: Shapes, settings: Settings, shape: Shape) -> str | None:
        """See `Method.problem`."""
        if len(shape) != 2:
            return f"it is for matrices, and {list(shape)} is none"
        values = shapes.get(_S, ())
        wanted = {_L: (shape[1],), _S: values, _V: (shape[1], shape[1]), _AT: (2, *values), _SIZE: (2,)}
        wrong = [f"{name} {list(shapes.get(name, ()))}" for name, of in wanted.items() if shapes.get(name) != of]
        if wrong or len(values) != 1:
            return f"{', '.join(wrong) or _S} for {shape[1]} inputs"
        return None

    def working_bytes(self, shapes: Shapes, settings: Settings, shape: Shape) -> int:
        """The weight and what is made of it, and what turns it, both some times over."""
        return 8 * (4 * shape[0] * shape[1] + 6 * shape[1] ** 2)

    def values(self, given: Given) -> Values:
        """See `SumMethod.values`."""
        import torch

        from lora_cli.arithmetic.rowwise import multiply

        assert given.before is not None  # noqa: S101 (it asks for it)
        weight, turn = given.before().to(torch.float64), numbers(given, _V)
        left = _columns(weight, turn)
        width = given.matrix[1]
        core = torch.diag(numbers(given, _L))
        at = places(given, _AT, width)
        core.index_put_((at[0], at[1]), numbers(given, _S), accumulate=True)
        right = multiply(core, turn.T.contiguous())

        def tile(rows: Tensor, columns: slice) -> Tensor:
            made = multiply(left[rows], right[:, columns])
            return made.sub_(weight[rows, columns]).mul_(given.scale)

        return tile


def _columns(weight: Tensor, turn: Tensor) -> Tensor:
    """U: the columns of W·V⁻ᵀ, each of length one, or zero where there is next to nothing."""
    import torch

    try:
        made = torch.linalg.solve(turn, weight.T).T
    except RuntimeError:  # it has no inverse
        made = weight @ torch.linalg.pinv(turn, rtol=1e-6).T
    lengths = torch.linalg.norm(made, dim=0)
    made = torch.where(lengths > _LEAST, made / lengths.clamp(min=_LEAST), 0.0)
    return made.to(torch.float32).to(torch.float64)


def _role(module: str) -> str:
    """The name under which a module shares what it shares (PEFT's `_category_from_key`)."""
    names = module.split(".")
    if len(names) == 1 or names[-2].isdigit():
        return names[-1]
    role = "_".join(names[-2:])
    return "attention_output" if role == "output_dense" and names[-3:-2] == ["attention"] else role


def _read(module: Module) -> Changes:
    role = _role(module.name)
    shared = {name: module.shared.get(f"{name}.{role}") for name in (_V, _AT, _SIZE)}
    found = {name: tensor for name, tensor in shared.items() if tensor is not None}
    if len(found) < len(shared):
        raise NamesError(
            "A module lacks what it shares with others of its role",
            tensor=module.name,
            expected=", ".join(f"base_model.{name}.{role}" for name in shared if name not in found),
        )
    formula = Formula(METHOD, {**module.tensors, **found}, module.unscaled())
    yield Target(module.name, "weight", formula, reads=True)


def _unmergeable(config: Mapping[str, Any], names: Collection[str]) -> str | None:
    if not names or any(name.startswith(_V) for name in names):
        return None
    return (
        "The file lacks the matrices that modules share (save_projection = false): they come from a decomposition of "
        "the whole base, which only PEFT makes; let it save the adapter again with save_projection = true"
    )


METHOD = Rotated()

TUNER = Tuner(
    type="FROD",
    name="FRoD",
    source="doi:10.1609/aaai.v40i31.39813",
    modules="linear layers and GPT-2's Conv1D",
    parts=(_L, _S),
    shared=(_V, _AT, _SIZE),
    read=_read,
    methods=(METHOD,),
    understood={
        "save_projection": flag("whether the file has what modules share"),
        "fan_in_fan_out": flag("layout of the base; shapes and architecture decide, this settles squares"),
    },
    neutral={
        "frod_dropout": "acts in training only",
        "init_weights": "how the numbers began",
        "progressbar": "shown while it began",
        "projection_prng_key": "how the shared matrices were made; the file has them",
        "regularization_alpha": "how the shared matrices were made; the file has them",
        "runtime_offload_base_weight": "where the base lies while it is trained",
        "sparse_rate": "how many places there are; the file shows them",
    },
    unmergeable=_unmergeable,
)
