"""PEANuT: ΔW = scale · B·f(W), where f is a small network that sees columns of the base's weight (Zhong et al. 2024).

In PEFT (`peft.tuners.peanut`) a module has `peanut_A` (rank × out), `peanut_B` (out × rank) and, with depth,
`peanut_encoders.i` and `peanut_decoders.i` (rank × rank). For a column w of W: h = act(A·w); each encoder makes
act(E·h) of what the one before it made; each decoder makes act(D·h) + what went into the encoder at its level. So it
is a product of rank `r`, one factor of which comes from the base. The scale is `scaling`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from lora_cli.adapters.adapter import Target
from lora_cli.adapters.formula import Formula, Given, Settings, Shape, Shapes, SumMethod, Values
from lora_cli.adapters.tuners.parts import numbers
from lora_cli.adapters.tuners.tuner import Changes, Module, Tuner, number, whole_number, word

if TYPE_CHECKING:
    from torch import Tensor

_A, _B, _ENCODERS, _DECODERS = "peanut_A", "peanut_B", "peanut_encoders", "peanut_decoders"
_MOST_LEVELS = 32
_COLUMNS = 512
"""Columns of the weight that are looked at together: always the same ones, so that cuts change nothing."""

_ACTIVATIONS: Mapping[str, str] = {
    "elu": "elu",
    "gelu": "gelu",
    "leaky_relu": "leaky_relu",
    "mish": "mish",
    "relu": "relu",
    "relu6": "relu6",
    "sigmoid": "sigmoid",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}
"""Names that transformers has for what torch calls otherwise, or likewise."""


class Network(SumMethod):
    """A product, one factor of which a network makes of the base's weight."""

    kind = "peanut"
    parts = (_A, _B, *(f"{side}.{level}" for side in (_ENCODERS, _DECODERS) for level in range(_MOST_LEVELS)))
    exact = False
    reads = True

    def problem(self, shapes: Shapes, settings: Settings, shape: Shape) -> str | None:
        """See `Method.problem`."""
        a, b = shapes.get(_A, ()), shapes.get(_B, ())
        if len(shape) != 2 or len(a) != 2 or not a[0] or a[1] != shape[0] or b != (shape[0], a[0]):
            return f"{_A} {list(a)} and {_B} {list(b)} are none for {list(shape)}"
        depth = (len(shapes) - 2) // 2
        wanted = {f"{side}.{level}" for side in (_ENCODERS, _DECODERS) for level in range(depth)}
        if {*shapes} - {_A, _B} != wanted or any(shapes[name] != (a[0], a[0]) for name in wanted):
            return f"encoders and decoders are no {depth} levels of {a[0]} × {a[0]}"
        act = settings.get("act")
        return None if act in _ACTIVATIONS else f"the function {act} is not known here"

    def rank(self, shapes: Shapes, settings: Settings) -> int:
        """The rank of the product."""
        return shapes[_A][0]

    def working_bytes(self, shapes: Shapes, settings: Settings, shape: Shape) -> int:
        """The weight as stored, some of its columns on their grids, and the factors on theirs."""
        rank = self.rank(shapes, settings)
        return 8 * math.prod(shape) + 40 * (_COLUMNS * (shape[0] + 8 * rank) + 2 * rank * sum(shape))

    def values(self, given: Given) -> Values:
        """See `SumMethod.values`."""
        import torch

        from lora_cli.arithmetic.product import Term, prepare

        assert given.before is not None  # noqa: S101 (it asks for it)
        weight = given.before()
        act = getattr(torch.nn.functional, _ACTIVATIONS[str(given.settings["act"])])
        layers = {name: numbers(given, name) for name in given.tensors if name != _B}
        columns = weight.split(_COLUMNS, dim=1)
        made = [_through(part.to(torch.float64), layers, act) for part in columns]
        return prepare([Term(numbers(given, _B), torch.cat(made, dim=1), given.scale)], slices=2).tile


def _through(columns: Tensor, layers: Mapping[str, Tensor], act: Callable[[Tensor], Tensor]) -> Tensor:
    """What the network makes of some columns (out × n): rank × n."""
    from lora_cli.arithmetic.rowwise import multiply

    depth = (len(layers) - 1) // 2
    state, kept = act(multiply(layers[_A], columns)), []
    for level in range(depth):
        kept.append(state)
        state = act(multiply(layers[f"{_ENCODERS}.{level}"], state))
    for level in range(depth):
        state = act(multiply(layers[f"{_DECODERS}.{level}"], state)) + kept[depth - 1 - level]
    return state


def _read(module: Module) -> Changes:
    scale = module.scale(float(module.said("scaling", 1.0)), None, False, "scaling")
    settings = {"act": module.said("act_fn", "relu")}
    yield Target(module.name, "weight", Formula(METHOD, module.tensors, scale, settings), reads=True)


METHOD = Network()

TUNER = Tuner(
    type="PEANUT",
    name="PEANuT",
    source="Zhong et al. 2024, arXiv:2410.01870",
    parts=METHOD.parts,
    read=_read,
    needs=((METHOD.parts[:2],),),
    methods=(METHOD,),
    understood={
        "scaling": number("what multiplies the change"),
        "act_fn": word("the function between layers", *_ACTIVATIONS),
        "r": whole_number("rank; the factors show it"),
        "depth": whole_number("how many encoders and decoders there are; the file shows it"),
    },
    neutral={"init_weights": "how the factors began"},
)
