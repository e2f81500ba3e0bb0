"""What of each module's change survived rounding: watched while a merge is made, or verified.

It is measured on a sample of each tensor's weights (`arithmetic.strength`), the same in every run.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_cli.arithmetic.strength import Strength
    from lora_cli.checkpoint.staged import Span
    from lora_cli.surgery.engine import Pieces
    from lora_cli.surgery.units import Unit

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

    Both are of the sample; up to 2^16 weights it is all of them.
    """

    key: str
    changed_fraction: float
    strength: float | None


class Survivals:
    """Gathers what survived, in any order."""

    def __init__(self) -> None:
        self._sums: defaultdict[str, dict[int, Strength]] = defaultdict(dict)

    @property
    def kind(self) -> type[Strength]:
        """What is found in a unit."""
        from lora_cli.arithmetic.strength import Strength

        return Strength

    def digest(self, number: int) -> str:
        """Nothing: it sees only what changes."""
        return ""

    def gathered(self, number: int) -> tuple[tuple[Span, ...], str]:
        """Nothing: sums are small."""
        return (), ""

    def watch(self, unit: Unit, pieces: Pieces, found: list[Strength]) -> Pieces:
        """Pass the pieces of a unit on; what survived in those that carry a delta is found at their end."""
        from lora_cli.arithmetic.strength import Strength

        sums = Strength()
        for piece in pieces:
            sums.sample(piece.offset, piece.source, piece.result, piece.wanted)
            yield piece
        if sums.elements:
            found.append(sums)

    def take(self, unit: Unit, found: Strength) -> None:
        """Keep what was found in a unit."""
        if unit.edit is not None:
            self.add(unit.edit.key, unit.begin, found)

    def add(self, key: str, begin: int, sums: Strength) -> None:
        """Take in the sums of the part of a tensor that begins at a row."""
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
