"""What becomes of every tensor of the adapters, and what is wrong with it: the ledger of a plan, while it is made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from lora_cli.adapters.adapter import Adapter
from lora_cli.adapters.expert_sides import SIDES, SQUARE
from lora_cli.checkpoint.checkpoint import StoredTensor
from lora_cli.errors import LoraCliError, NamesError, ShapeError, UnsupportedError
from lora_cli.surgery.plan import LedgerEntry, Outcome

_MESSAGES: dict[type[LoraCliError], str] = {
    NamesError: "Two adapters want different things of one tensor",
    ShapeError: "Shapes of adapter and base do not fit",
    UnsupportedError: "Some targets cannot take this adapter",
}
"""Kinds of problems, the gravest first: names before shapes before the rest."""


class Accounts:
    """The ledger of each adapter, and all problems at once.

    Args:
        base: The base's label, for messages.
        adapters: The adapters.
    """

    def __init__(self, base: str, adapters: Sequence[Adapter]) -> None:
        self._base = base
        self._adapters = adapters
        self._ledgers: list[list[LedgerEntry]] = [[] for _ in adapters]
        self._problems: list[tuple[type[LoraCliError], str]] = []
        self._weighted: dict[str, None] = {}

    @property
    def ledger(self) -> tuple[LedgerEntry, ...]:
        """What became of every adapter tensor, adapter by adapter."""
        return tuple(entry for ledger in self._ledgers for entry in ledger)

    def enter(
        self, position: int, tensor: StoredTensor, outcome: Outcome, key: str | None, reason: str | None = None
    ) -> None:
        """Say what becomes of a tensor of the adapter at a position."""
        label = self._adapters[position].label
        self._ledgers[position].append(LedgerEntry(label, tensor.key, outcome, key, reason))

    def problem(self, kind: type[LoraCliError], words: str, weighted: int | None = None) -> None:
        """Say that something is wrong; `weighted` is the adapter's position where that is its weight."""
        self._problems.append((kind, words))
        if weighted is not None:
            self._weighted.setdefault(self._adapters[weighted].label)

    def problems(self, found: Iterable[tuple[type[LoraCliError], str]]) -> None:
        """Say of several things what is wrong."""
        for kind, words in found:
            self.problem(kind, words)

    def settle(self) -> None:
        """Raise one error with every problem of the gravest kind; check that nothing was left out.

        Raises:
            LoraCliError: Problems; or a tensor of which nothing was said.
        """
        for kind, message in _MESSAGES.items():
            details = [words for found, words in self._problems if found is kind]
            if details:
                said, named = _once(f"{message} ({len(details)})", details)
                hint = _hint(details, " and ".join(self._weighted))
                raise kind(said, file=self._subject(details), details=named, hint=hint)
        for adapter, ledger in zip(self._adapters, self._ledgers, strict=True):
            if len(ledger) != adapter.stored:
                found = f"{len(ledger)} of {adapter.stored} tensors"
                raise LoraCliError("The ledger of this adapter is not complete", file=adapter.label, found=found)

    def _subject(self, details: Sequence[str]) -> str:
        """Whose fault it is: the adapter's where it is alone, and any base would do as badly."""
        alone = len(self._adapters) == 1 and all(_AT_WEIGHT in words for words in details)
        return self._adapters[0].label if alone else self._base

    def went_to(self, keys: Mapping[str, str]) -> None:
        """Name the tensors that names stand for, where these turned out to be one: name → key."""
        self._ledgers = [
            [replace(entry, key=keys[entry.key]) if entry.key and entry.key in keys else entry for entry in ledger]
            for ledger in self._ledgers
        ]

    def keep_replaced(self, reason: str) -> None:
        """Say of tensors that were to be replaced or added that they are not, for that reason."""
        reasons = {"replaced": reason, "added": "not in the checkpoint"}
        self._ledgers = [
            [
                replace(entry, outcome="ignored", reason=reasons[entry.outcome]) if entry.outcome in reasons else entry
                for entry in ledger
            ]
            for ledger in self._ledgers
        ]


_AT_WEIGHT = " at weight "
"""In the words of all problems with what is taken as it is, or not at all."""


def _once(message: str, details: Sequence[str]) -> tuple[str, Sequence[str]]:
    """The message and its details; what is wrong with all of several tensors is said once, and these are named."""
    names, reasons = zip(*(words.partition(": ")[::2] for words in details), strict=True)
    if len(details) > 1 and len({*reasons}) == 1 and reasons[0]:
        return f"{message}: {reasons[0]}", names
    return message, details


_WEIGHTED = "ADAPTERS"
_HINTS = {
    "quantised": "merge into the 16-bit checkpoint that the quantised one was made from",
    "--orientation": "--orientation ba for torch.nn.Linear (out × in), ab for (in × out)",
    SQUARE: SIDES,
    "--expert-layout says": "leave out --expert-layout: shapes say which side A meets",
    _AT_WEIGHT: f"give {_WEIGHTED} --weight 1, or 0 to leave it out",
    "merge one after the other": (
        "merge one, then the other into what comes out; verify each against what it was merged into"
    ),
}
"""What to do, by what is in the words of a problem; the first that is found."""


def _hint(details: Sequence[str], weighted: str) -> str | None:
    """What to do; `weighted` are the adapters that a weight is wrong for."""
    found = next((hint for part, hint in _HINTS.items() if any(part in words for words in details)), None)
    return found and found.replace(_WEIGHTED, weighted or "them")
