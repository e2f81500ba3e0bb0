"""VB-LoRA: ΔW = B·A, whose pieces are mixed of the vectors of one bank (Li, Han and Ji 2024).

In PEFT (`peft.tuners.vblora`) the model has `vblora_vector_bank` (vectors × length). A module has `vblora_logits_A`
(rank × in/length × vectors) and `vblora_logits_B` (out/length × rank × vectors): each piece of a row of A, and of a
column of B, is the sum of the vectors with the largest logits, as many as `topk` says, weighted by the softmax of
these. Or only that is in the file: `…_topk_indices`, and `…_topk_weights` without the last, which is the rest to 1.
There is no scale. Of equal logits the first counts; PEFT takes what `torch.topk` takes on its device, and no file says
which that was. So a merge warns where the last vector that counts and the next one have the same logit.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from lora_cli.adapters.adapter import Target
from lora_cli.adapters.formula import Formula, Given, ProductMethod, Settings, Shape, Shapes
from lora_cli.adapters.tuners.parts import numbers, places
from lora_cli.adapters.tuners.tuner import Changes, Module, Tuner, flag, whole_number
from lora_cli.errors import NumericError

if TYPE_CHECKING:
    from torch import Tensor

    from lora_cli.arithmetic.product import Term

_BANK = "vblora_vector_bank"
_SIDES = ("vblora_logits_A", "vblora_logits_B")
_TIED = (
    "logits are equal at the end of the topk largest, of which the first count here and any in PEFT, by its device; "
    "let PEFT save the adapter again with save_only_topk_weights = true, where it was trained"
)


class Mixed(ProductMethod):
    """A product whose factors are mixed of vectors."""

    kind = "vblora"
    indices = tuple(f"{side}_topk_indices" for side in _SIDES)
    parts = (*_SIDES, *indices, *(f"{side}_topk_weights" for side in _SIDES), _BANK)
    doubted = _SIDES

    def problem(self, shapes: Shapes, settings: Settings, shape: Shape) -> str | None:
        """See `Method.problem`."""
        bank = shapes.get(_BANK, ())
        if len(bank) != 2 or 0 in bank or len(shape) != 2:
            return f"a bank {list(bank)} makes no {list(shape)}"
        a, b = (_mixture(shapes, side, bank[0], settings.get("topk")) for side in _SIDES)
        if a is None or b is None:
            return f"the tensors of {_SIDES[0] if a is None else _SIDES[1]} say no mixture of {bank[0]} vectors"
        if (b[0] * bank[1], a[1] * bank[1]) != shape or a[0] != b[1]:
            return f"{list(b)} and {list(a)} pieces of {bank[1]} make no {list(shape)}"
        return None

    def rank(self, shapes: Shapes, settings: Settings) -> int:
        """Rows of A."""
        found = next((shapes[name] for name in (_SIDES[0], self.indices[0]) if name in shapes), ())
        return found[0] if found else 0

    def working_bytes(self, shapes: Shapes, settings: Settings, shape: Shape) -> int:
        """All tensors in float64 with their order, and the factors."""
        return super().working_bytes(shapes, settings, shape) * 2 + 48 * self.rank(shapes, settings) * sum(shape)

    def doubt(self, tensors: Mapping[str, Tensor], settings: Settings) -> str | None:
        """See `Method.doubt`: the last logit that counts, and the next one."""
        count = int(settings.get("topk", 0))  # type: ignore[arg-type]  # `problem` has looked
        largest = [of.topk(count + 1, dim=-1).values for of in tensors.values() if of.shape[-1] > count]
        return _TIED if any(bool((of[..., -1] == of[..., -2]).any()) for of in largest) else None

    def term(self, given: Given) -> Term:
        """See `ProductMethod.term`."""
        from lora_cli.arithmetic.product import Term

        bank = numbers(given, _BANK)
        a, b = (_mixed(given, side, bank) for side in _SIDES)
        return Term(b.transpose(1, 2).reshape(-1, b.shape[1]), a.reshape(a.shape[0], -1), given.scale)


def _mixture(shapes: Shapes, side: str, vectors: int, topk: object) -> tuple[int, int] | None:
    """How many pieces there are in each direction; None if the tensors say no mixture."""
    logits, indices, weights = (shapes.get(f"{side}{end}") for end in ("", "_topk_indices", "_topk_weights"))
    if logits is not None:
        whole = isinstance(topk, int) and not isinstance(topk, bool) and 0 < topk <= vectors
        fits = whole and indices is None and weights is None and len(logits) == 3 and logits[2] == vectors
        return (logits[0], logits[1]) if fits else None
    if indices is None or weights is None or len(indices) != 3 or not 0 < indices[2] <= vectors:
        return None
    return (indices[0], indices[1]) if weights == (*indices[:2], indices[2] - 1) else None


def _mixed(given: Given, side: str, bank: Tensor) -> Tensor:
    """The pieces of one factor, (…, length of a vector): sums in the order of the weights."""
    weights, chosen = _weights(given, side, len(bank))
    total = weights[..., 0, None] * bank[chosen[..., 0]]
    for number in range(1, weights.shape[-1]):
        total += weights[..., number, None] * bank[chosen[..., number]]
    return total


def _weights(given: Given, side: str, vectors: int) -> tuple[Tensor, Tensor]:
    """The weights of the chosen vectors, and which these are."""
    import torch

    if side not in given.tensors:
        first = numbers(given, f"{side}_topk_weights")
        rest = torch.ones_like(first[..., :1]) if first.shape[-1] else first.new_ones((*first.shape[:-1], 1))
        for number in range(first.shape[-1]):
            rest = rest - first[..., number, None]
        return torch.cat([first, rest], dim=-1), places(given, f"{side}_topk_indices", vectors)
    logits = given.tensors[side].to(torch.float64)
    ordered = logits.sort(dim=-1, descending=True, stable=True)
    count = int(given.settings["topk"])  # type: ignore[arg-type]  # `problem` has looked
    largest, chosen = ordered.values[..., :count], ordered.indices[..., :count]
    if bool((largest[..., 0].isinf() | logits.isnan().any(dim=-1)).any()):
        raise NumericError(f"{side} holds NaN, or no finite number to choose by")
    return _softmax(largest), chosen


def _softmax(logits: Tensor) -> Tensor:
    """Of numbers that fall; added from the first on."""
    from lora_cli.arithmetic.exponential import exponential

    powers = exponential(logits - logits[..., :1])
    total = powers[..., 0]
    for number in range(1, powers.shape[-1]):
        total = total + powers[..., number]
    return powers / total.unsqueeze(-1)


def _missing(config: Mapping[str, Any], names: Collection[str]) -> str | None:
    return None if _BANK in names else f"The file lacks {_BANK}, which all its factors are mixed of"


def _read(module: Module) -> Changes:
    tensors = {**module.tensors, _BANK: module.shared[_BANK]}
    settings = {"topk": int(module.said("topk", 2))} if any(side in module.tensors for side in _SIDES) else {}
    yield Target(
        module.name, "weight", Formula(METHOD, tensors, module.scale(1.0, None, False, "there is none"), settings)
    )


METHOD = Mixed()

TUNER = Tuner(
    type="VBLORA",
    name="VB-LoRA",
    source="Li, Han and Ji 2024, arXiv:2405.15179",
    modules="linear layers and GPT-2's Conv1D",
    parts=METHOD.parts[:-1],
    shared=(_BANK,),
    needs=tuple(((side,), (f"{side}_topk_indices", f"{side}_topk_weights")) for side in _SIDES),
    read=_read,
    methods=(METHOD,),
    understood={
        "topk": whole_number("how many vectors make a piece", least=1),
        "fan_in_fan_out": flag("layout of the base; shapes and architecture decide, this settles squares"),
    },
    neutral={
        "r": "the file shows it",
        "num_vectors": "the file shows it",
        "vector_length": "the file shows it",
        "save_only_topk_weights": "the file shows whether it holds logits or weights",
        "vblora_dropout": "acts in training only",
        "init_vector_bank_bound": "how the vectors began",
        "init_logits_std": "how the logits began",
    },
    unmergeable=_missing,
)
