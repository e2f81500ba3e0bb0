"""Cutting the outputs of a tensor into bands that the same deltas change: mostly one, of all outputs and all deltas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from lora_cli.surgery.edit import Contribution


@dataclass(frozen=True, slots=True)
class Band:
    """Outputs that the same deltas change.

    Attributes:
        begin: First output.
        end: One past the last.
        terms: The deltas, each of them over all of these outputs.
    """

    begin: int
    end: int
    terms: tuple[Contribution, ...]

    def within(self, outputs: slice) -> slice:
        """Those of some outputs that are in the band; empty where none are."""
        return slice(max(self.begin, outputs.start), min(self.end, outputs.stop))


def bands_of(terms: Sequence[Contribution], number: int = 0) -> list[Band]:
    """Return the bands of the outputs of matrix `number` that any of these deltas changes, in order."""
    terms = [term for term in terms if term.changes(number)]
    borders = sorted({border for term in terms for border in term.outputs})
    bands = []
    for begin, end in pairwise(borders):
        over = tuple(term for term in terms if term.outputs[0] <= begin and end <= term.outputs[1])
        if over:
            bands.append(Band(begin, end, over))
    return bands
