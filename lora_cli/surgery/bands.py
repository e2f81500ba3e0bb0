"""Cutting the outputs of a tensor into bands that the same deltas change: mostly one, of all outputs and all deltas."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import lcm

from lora_cli.surgery.edit import Contribution


@dataclass(frozen=True, slots=True)
class Band:
    """Outputs that the same deltas change.

    Attributes:
        begin: First output.
        end: One past the last.
        terms: The deltas, each of them over all of these outputs.
        step: From one output to the next: more than 1 where deltas change outputs in turn.
    """

    begin: int
    end: int
    terms: tuple[Contribution, ...]
    step: int = 1

    @property
    def stored(self) -> range:
        """The outputs."""
        return range(self.begin, self.end, self.step)

    def within(self, outputs: slice) -> slice:
        """Which outputs of the band are among some, counted from its first; empty where none are."""
        first, last = (-((self.begin - border) // self.step) for border in (outputs.start, outputs.stop))
        count = len(self.stored)
        return slice(min(max(0, first), count), min(max(0, last), count))


def bands_of(terms: Sequence[Contribution], number: int = 0) -> list[Band]:
    """Return the bands of the outputs of matrix `number` that any of these deltas changes, in order."""
    terms = [term for term in terms if term.changes(number)]
    step = lcm(*(term.step for term in terms))
    outputs = max((term.outputs[1] for term in terms), default=0)
    bands = [band for turn in range(min(step, outputs)) for band in _in_turn(terms, turn, step)]
    return sorted(bands, key=lambda band: band.begin)


def _in_turn(terms: Sequence[Contribution], turn: int, step: int) -> Iterator[Band]:
    """The bands among outputs that lie `step` apart."""
    turns = [(term, outputs) for term in terms if (outputs := _at(term, turn, step))]
    borders = sorted({border for _, outputs in turns for border in (outputs[0], outputs[-1] + step)})
    for begin, end in pairwise(borders):
        over = tuple(term for term, outputs in turns if outputs[0] <= begin and end <= outputs[-1] + step)
        if over:
            yield Band(begin, end - step + 1, over, step if end - begin > step else 1)


def _at(term: Contribution, turn: int, step: int) -> range:
    """Those outputs of a delta of which `step` leaves `turn`."""
    begin, end = term.outputs
    # `step` is a multiple of the delta's own: of each turn it has all outputs, or none.
    first = begin + (turn - begin) % step if (turn - begin) % term.step == 0 else end
    return range(min(first, end), end, step)
