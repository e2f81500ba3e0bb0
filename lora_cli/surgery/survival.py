"""What of each module's change survived rounding: watched while a merge is made, or verified."""

from __future__ import annotations

import threading
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_cli.arithmetic.strength import Strength
    from lora_cli.surgery.engine import Pieces, Unit

WEAK = 0.9
"""Strength under which a person should know."""


@dataclass(frozen=True)
class Survival:
    """What survived of the change of one tensor.

    Attributes:
        key: The tensor.
        changed_fraction: Share of its weights that changed.
        strength: How much of the change is there, along the change itself: 1 is all of it. None where the change is
            zero.
    """

    key: str
    changed_fraction: float
    strength: float | None


class Survivals:
    """Gathers what survived, from any thread."""

    def __init__(self) -> None:

        self._sums: defaultdict[str, dict[int, Strength]] = defaultdict(dict)
        self._lock = threading.Lock()

    def watch(self, unit: Unit, pieces: Pieces) -> Pieces:
        """Pass the pieces of a unit on, and take in those that carry a delta."""
        from lora_cli.arithmetic.strength import Strength

        sums = Strength()
        for piece in pieces:
            if piece.delta is not None:
                sums.add(piece.source, piece.result, piece.delta)
            yield piece
        if unit.edit is not None and sums.elements:
            self.take(unit.edit.key, unit.begin, sums)

    def take(self, key: str, begin: int, sums: Strength) -> None:
        """Take in the sums of the part of a tensor that begins at a row."""
        with self._lock:
            self._sums[key][begin] = sums

    def report(self) -> tuple[Survival, ...]:
        """What survived, by key."""
        from lora_cli.arithmetic.strength import Strength

        found = []
        for key, parts in sorted(self._sums.items()):
            whole = Strength()
            for begin in sorted(parts):  # sums in one order are the same sums
                whole.take(parts[begin])
            found.append(Survival(key, whole.changed_fraction, whole.value))
        return tuple(found)


def warnings_of(survivals: tuple[Survival, ...]) -> list[str]:
    """What a person should know: one line for all modules of which much was lost."""
    weak = sorted((s.strength, s.key) for s in survivals if s.strength is not None and s.strength < WEAK)
    if not weak:
        return []
    strength, key = weak[0]
    return [
        f"rounding took much of the change: in {len(weak)} of {len(survivals)} tensors less than {WEAK:.0%} of the "
        f"adapter's strength is left (least: {key}, {strength:.0%}); --dtype fp32 keeps all of it"
    ]
