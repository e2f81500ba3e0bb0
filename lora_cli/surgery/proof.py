"""Proving which weights an approximate unmerge recovers exactly.

A merge with a fixed delta never changes the order of values, so the base values that merge to one result lie side by
side. A candidate is proved when it merges to what is there and neither of its neighbours does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lora_cli.arithmetic.floats import BITS
from lora_cli.arithmetic.ordered import neighbours
from lora_cli.progress import Progress
from lora_cli.surgery.budget import Budget
from lora_cli.surgery.edit import Edit
from lora_cli.surgery.engine import Workshop
from lora_cli.surgery.plan import Plan
from lora_cli.surgery.repacking import in_order
from lora_cli.surgery.units import Unit, units_of
from lora_cli.surgery.workers import run_units


@dataclass
class Count:
    """Weights of a tensor: all of them, those that are proved, and those that no base value merges to."""

    elements: int = 0
    exact: int = 0
    impossible: int = 0

    @property
    def undecided(self) -> int:
        """Weights that several base values merge to."""
        return self.elements - self.exact - self.impossible


def prove(plan: Plan, budget: Budget, progress: Progress) -> Iterator[tuple[str, Count]]:
    """Count, for each tensor that an unmerge computes, the weights that are proved, in plan order."""
    edits = [edit for edit in plan.edits if edit.terms]
    progress.begin("prove", sum(edit.nbytes for edit in edits))
    counts: defaultdict[str, Count] = defaultdict(Count)

    def work(unit: Unit, workshop: Workshop) -> Count:
        edit = unit.edit
        assert edit is not None  # noqa: S101 (filtered above)
        return _count(edit, unit, workshop) if edit.terms else Count()

    nbytes = sum(edit.nbytes for edit in edits)
    with in_order(plan) as ready:
        units = (unit for number, file in enumerate(ready.files) for unit in units_of(number, file) if unit.edit)
        for unit, count in run_units(units, work, lambda: Workshop(budget.strip_bytes), budget.threads, nbytes=nbytes):
            if unit.edit and unit.edit.terms:
                progress.advance(unit.nbytes)
                total = counts[unit.edit.key]
                total.elements += count.elements
                total.exact += count.exact
                total.impossible += count.impossible
    yield from ((edit.key, counts[edit.key]) for edit in edits)


def _count(edit: Edit, unit: Unit, workshop: Workshop) -> Count:
    count = Count()
    for piece in workshop.pieces(edit, unit.begin, unit.end):
        merged, candidate, delta = piece.source, piece.result, piece.delta
        assert delta is not None  # noqa: S101 (asked for)
        below, above = neighbours(candidate)
        low, hit, high = (_bits(_merged(value, delta)) == _bits(merged) for value in (below, candidate, above))
        # At the ends of the line a value is its own neighbour, which proves nothing against it.
        low &= _bits(below) != _bits(candidate)
        high &= _bits(above) != _bits(candidate)
        for span in edit.held(piece.offset, merged.numel()):
            hit[span] = low[span] = True  # rows that were replaced: they may have been anything
        count.elements += merged.numel()
        count.exact += int((hit & ~low & ~high).sum())
        count.impossible += int((~(low | hit | high)).sum())
    return count


def _merged(value: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """What merging would make of a value; `TileKernel.merge` without its check, since neighbours may overflow.

    `0 - delta` has no negative zero, so that subtracting it leaves a value's own bits where the delta is zero.
    """
    return (value.to(delta.dtype) - (0.0 - delta)).to(value.dtype)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(BITS[tensor.dtype])
