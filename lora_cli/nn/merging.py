"""The exact merge of one LoRA layer, and the way back bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lora_cli.arithmetic.product import Term
from lora_cli.errors import UsageError
from lora_cli.nn import exact
from lora_cli.nn.factors import Factors
from lora_cli.nn.parameters import LoRAParameters

_WITHOUT_ADAPTERS: ContextVar[bool] = ContextVar("_WITHOUT_ADAPTERS", default=False)


@contextmanager
def states_of_bases() -> Iterator[None]:
    """Let states be taken of merged layers too, by one who leaves the adapters out."""
    token = _WITHOUT_ADAPTERS.set(True)
    try:
        yield
    finally:
        _WITHOUT_ADAPTERS.reset(token)


class Merging(nn.Module):
    """A frozen weight that can hold its active adapters, and lack what inits took off it."""

    base: nn.Module
    weight_name: ClassVar[str] = "weight"
    lora_A: Factors
    lora_B: Factors
    lora_magnitude: Factors
    settings: dict[str, LoRAParameters]
    active: dict[str, float]

    def __init__(self) -> None:
        super().__init__()
        self._scales: dict[str, float] = {}
        self._forgotten: list[exact.Forgotten] | None = None
        self._taken: dict[str, exact.Forgotten] = {}

    @property
    def base_weight(self) -> nn.Parameter:
        """The frozen weight that adapters change."""
        return cast("nn.Parameter", getattr(self.base, self.weight_name))

    def hold(self, weight: nn.Parameter) -> None:
        """Let the frozen layer hold another parameter as its weight."""
        setattr(self.base, self.weight_name, weight)

    @property
    def transposed(self) -> bool:
        """Whether that weight is stored (in × out)."""
        return False

    def _pieces(self) -> Sequence[tuple[Any, exact.Change]]:
        """The matrices that the weight consists of, by index, each with its change."""
        terms = tuple(Term(b.flatten(1), a.flatten(1), scale) for a, b, scale, _ in self._in_use())
        return [(..., exact.Change(terms, self.transposed, self._magnitude()))]

    @property
    def merged(self) -> bool:
        """Whether the frozen weight holds the adapters that were active when it was merged."""
        return self._forgotten is not None

    @torch.no_grad()
    def merge(self) -> None:
        """Put the active adapters into the frozen weight: without DoRA the bytes that `lora-cli merge` writes.

        Raises:
            UsageError: It is merged already, or no adapter is active.
            UnsupportedError: The weight's type takes no delta.
            NumericError: Numbers that must not be merged.
        """
        self._refuse_while_merged("be merged again")
        if not self.active:
            raise UsageError("No adapter is active, so there is nothing to merge")
        pieces = self._pieces()
        done = [exact.merge(self.base_weight[index], change) for index, change in pieces]
        for (index, _), (merged, _) in zip(pieces, done, strict=True):
            self.base_weight.data[index] = merged
        self._forgotten = [forgotten for _, forgotten in done]

    def check_unmergeable(self) -> None:
        """Refuse a merged weight that was changed since; change nothing."""
        for (index, _), forgotten in zip(self._pieces(), self._forgotten or (), strict=False):
            exact.check_unchanged(self.base_weight[index], forgotten)

    def check_restorable(self) -> None:
        """Refuse a weight that was changed since an init took something off it; change nothing."""
        if self._taken and not self.merged:
            exact.check_unchanged(self.base_weight, list(self._taken.values())[-1])

    @torch.no_grad()
    def unmerge(self) -> None:
        """Give the frozen weight back bit for bit, whatever became of the adapters since.

        Raises:
            UsageError: It is not merged.
            WrongInputError: The weight was changed since.
        """
        if self._forgotten is None:
            raise UsageError("The layer is not merged, so there is nothing to take out")
        indices = [index for index, _ in self._pieces()]
        parts = [exact.unmerge(self.base_weight[i], f) for i, f in zip(indices, self._forgotten, strict=True)]
        for index, part in zip(indices, parts, strict=True):
            self.base_weight.data[index] = part
        self._forgotten = None

    # Inits that change the base

    @torch.no_grad()
    def _take_off(self, name: str) -> None:
        """Take the product of the first factors off the weight, exactly, so that the layer gives what it gave."""
        term = Term(self.lora_B[name].flatten(1), self.lora_A[name].flatten(1), -self._scales[name])
        residual, self._taken[name] = exact.merge(self.base_weight, exact.Change((term,), self.transposed))
        self.base_weight.copy_(residual)

    @torch.no_grad()
    def _give_back(self, name: str) -> None:
        """Undo `_take_off`."""
        self.base_weight.copy_(exact.unmerge(self.base_weight, self._taken[name]))
        del self._taken[name]

    def restore_base(self) -> None:
        """Give the weight back what inits took off it, bit for bit. The layer then no longer gives what it gave.

        Raises:
            UsageError: The layer is merged.
            WrongInputError: The weight was changed since.
        """
        self._refuse_while_merged("get back what an init took off")
        for name in reversed(list(self._taken)):
            self._give_back(name)

    @property
    def taken_off(self) -> list[Term]:
        """What inits took off the weight, as summands (out × K) by (K × in) with the opposite scales."""
        return [term for forgotten in self._taken.values() for term in forgotten.change.terms]

    def change_of(self, name: str) -> list[Term]:
        """What an adapter adds to the weight as it was before all inits, as summands (out × K) by (K × in).

        There are two for an init that took the first factors' product off the weight: that is added back.

        Raises:
            WrongInputError: Its init took something off the weight, which was changed since.
        """
        self.check_restorable()
        term = Term(self.lora_B[name].flatten(1), self.lora_A[name].flatten(1), self.settings[name].scale.times())
        return [term, *(self._taken[name].change.terms if name in self._taken else ())]

    def _in_use(self) -> Iterator[tuple[Tensor, Tensor, float, str]]:
        """A, B and scale of each active adapter."""
        for name in self.active:
            yield self.lora_A[name], self.lora_B[name], self._scales[name], name

    def _magnitude(self) -> Tensor | None:
        return next((self.lora_magnitude[name] for name in self.active if self.settings[name].dora), None)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.merged and not _WITHOUT_ADAPTERS.get():
            raise UsageError(
                "The state of a merged layer would hold its adapter twice, in the weight and beside it",
                tensor=prefix.removesuffix(".") or None,
                hint="take_out(merged=True) or base_state() give the merged weights; unmerge() first for the others",
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _refuse_while_merged(self, what: str) -> None:
        if self.merged:
            raise UsageError(f"A merged layer cannot {what}", hint="unmerge it first")
