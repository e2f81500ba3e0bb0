"""What a tensor that is not what a merge would have written has to do with that merge: a second look at those alone.

The expected tensor is made again, and with it the delta of each adapter, tile by tile. What is there is held against
other merges that a person may have made by mistake (the opposite sign, half or twice the scale, without one of the
adapters, once more on the result), rounded as a merge rounds: with changes far below the spacing of the weights, where
most of a change is lost, only that tells them apart. And the inner products of all deltas, of the expected change and
of what is different are summed up, from which `arithmetic.projection` finds any other strength.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lora_cli.arithmetic.lowrank import rounding_variance
from lora_cli.arithmetic.product import ExactProduct, prepare
from lora_cli.arithmetic.projection import inner_products
from lora_cli.arithmetic.rounding import slices_for, work_dtype
from lora_cli.checkpoint.checkpoint import StoredTensor
from lora_cli.surgery.budget import Budget
from lora_cli.surgery.compare import Part, parts
from lora_cli.surgery.edit import Edit
from lora_cli.surgery.engine import Piece, Workshop
from lora_cli.surgery.readers import Readers, open_readers, raw_bytes, torch_dtype
from lora_cli.surgery.runs import Run, runs
from lora_cli.surgery.workers import run_units

AGREES = 50
"""Another merge it is, if of so many elements that differ from the right one at most one differs from that one too."""

_ROWS = 14
"""Rows as long as a run, besides one for each delta, that looking at it takes in float64."""

_SHORTEST_RUN = 64


class Mistake(NamedTuple):
    """Another merge than the one that was asked for.

    Attributes:
        strengths: The strength at which each adapter is in it.
        again: Made from the merge, not from the base.
        unstretched: Without the lengths that DoRA gives to outputs.
    """

    strengths: tuple[float, ...]
    again: bool = False
    unstretched: bool = False


def as_one(edit: Edit) -> bool:
    """Whether the change of a tensor is looked for as a whole, and not that of each adapter.

    Only products of all matrices of a tensor are made one by one; where deltas set lengths, multiply or make something
    else of what is there, there is none alone.
    """
    return edit.stretched or edit.acts != {"product"} or any(term.at is not None for term in edit.terms)


def asked_of(edit: Edit) -> tuple[float, ...]:
    """The strength that is asked for along each delta of a tensor: 1, and 0 where the user's weight is 0.

    Of a change that is looked for as a whole there is but one.
    """
    return (1.0,) if as_one(edit) else tuple(1.0 if term.weight else 0.0 for term in edit.terms)


def mistakes(asked: tuple[float, ...], *, stretched: bool = False) -> list[Mistake]:
    """Merges that are easily made instead of the one with these strengths; of DoRA the sum alone."""
    if stretched:
        return [Mistake(asked, unstretched=True)]
    if not any(asked):
        return [Mistake(_but(asked, at, 1.0)) for at in range(len(asked))]
    twice = tuple(2 * strength for strength in asked)
    made = [Mistake(tuple(factor * strength for strength in asked)) for factor in (-1.0, 0.5, 2.0)]
    made.append(Mistake(twice, again=True))
    if len(asked) > 1:
        for at, strength in enumerate(asked):
            made += [Mistake(_but(asked, at, other)) for other in ((0.0, -1.0, 0.5, 2.0) if strength else (1.0,))]
    return made


def _but(asked: tuple[float, ...], at: int, strength: float) -> tuple[float, ...]:
    return (*asked[:at], strength, *asked[at + 1 :])


@dataclass
class Evidence:
    """Sums over the elements of one tensor; those of two parts of it are added.

    Attributes:
        elements: Elements seen.
        broken: Those that are NaN or infinity; they count nowhere else.
        unlike_rows: Those in rows that an adapter holds whole, and that are not its; such rows count nowhere else.
        rows_moved: Those in such rows that are not the base's.
        unlike_base: Those whose value is not the base's.
        unlike_merge: Those whose value is not what the merge would have written.
        moved: Those that the merge itself changes.
        against: Those that moved against the change that was asked for.
        reach: The largest change that the merge makes, in units in the last place of the larger of weight and change.
        noise: What rounding once to the type of the output is expected to do, squared.
        products: Inner products of the deltas, of the change that the merge makes, and of what was found less that.
        unlike: For each of `mistakes`, elements that are not of its value: all, or so many that it cannot be meant.
        enough: How many that are.
    """

    products: Tensor
    unlike: list[int]
    enough: int
    elements: int = 0
    broken: int = 0
    unlike_rows: int = 0
    rows_moved: int = 0
    unlike_base: int = 0
    unlike_merge: int = 0
    moved: int = 0
    against: int = 0
    reach: float = 0.0
    noise: float = 0.0

    def take(self, other: Evidence) -> None:
        """Add the sums of another part."""
        self.products = self.products + other.products
        self.unlike = [one + two for one, two in zip(self.unlike, other.unlike, strict=True)]
        for name in (
            "elements",
            "broken",
            "unlike_rows",
            "rows_moved",
            "unlike_base",
            "unlike_merge",
            "moved",
            "against",
            "noise",
        ):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.reach = max(self.reach, other.reach)


def gather(
    edits: Iterable[Edit], candidates: Mapping[str, StoredTensor], budget: Budget, advance: Callable[[int], None]
) -> dict[str, Evidence]:
    """Look once more at tensors that take deltas.

    Args:
        edits: What the merge does to them.
        candidates: What is there, of the same types and shapes.
        budget: Threads and buffer sizes.
        advance: Is told how many bytes were looked at.

    Returns:
        What was found, by key.
    """

    def work(part: Part, bench: _Bench) -> Evidence:
        return bench.look(part, candidates[part.edit.key])

    found: defaultdict[str, dict[int, Evidence]] = defaultdict(dict)
    units = (part for edit in edits for part in parts(edit))
    nbytes = sum(edit.nbytes for edit in edits)
    for part, evidence in run_units(units, work, lambda: _Bench(budget.strip_bytes), budget.threads, nbytes=nbytes):
        advance(part.edit.nbytes * (part.end - part.begin) // part.edit.matrix[0])
        found[part.edit.key][part.begin] = evidence
    return {key: _together(by_begin) for key, by_begin in found.items()}


def _together(by_begin: Mapping[int, Evidence]) -> Evidence:
    """The sums of all parts, always added in the same order."""
    first, *others = (evidence for _, evidence in sorted(by_begin.items()))
    for other in others:
        first.take(other)
    return first


class _Bench:
    """What one worker keeps: the engine's buffers, one for what was found, and rows of a run in float64."""

    def __init__(self, strip_bytes: int) -> None:
        self._workshop = Workshop(strip_bytes)
        self._found = torch.empty(strip_bytes, dtype=torch.uint8)
        self._strip_bytes = strip_bytes

    def look(self, part: Part, candidate: StoredTensor) -> Evidence:
        edit = part.edit
        asked = asked_of(edit)
        longest = max(_SHORTEST_RUN, self._strip_bytes // (8 * (len(asked) + _ROWS)))
        rows = torch.empty((len(asked) + 2, longest), dtype=torch.float64)
        evidence = Evidence(
            products=torch.zeros((len(rows), len(rows)), dtype=torch.float64),
            unlike=[0] * len(mistakes(asked, stretched=edit.stretched)),
            enough=math.prod(edit.shape) // AGREES,
        )
        with open_readers() as readers:
            products = None if as_one(edit) else _Products(edit, readers)
            matrices = (1, *edit.matrix) if products is None else edit.terms[0].matrices
            others = mistakes(asked, stretched=edit.stretched)
            reader = readers.of(candidate)
            for piece in self._workshop.pieces(edit, part.begin, part.end):
                found = self._found[: piece.result.nbytes].view(piece.result.dtype)
                reader.read_into(candidate.offset + piece.offset * found.itemsize, raw_bytes(found))
                for run in runs(piece.offset, found.numel(), matrices, longest):
                    here = rows[:, : run.place.stop - run.place.start]
                    at = run.place
                    delta, gains = (None if part is None else part[at] for part in (piece.delta, piece.gains))
                    seen = Piece(0, piece.source[at], piece.result[at], delta, gains)
                    if products is not None:
                        products.write(here, run)
                    elif seen.wanted is not None:
                        here[0] = seen.wanted
                    whole = _held_whole(edit, piece.offset + at.start, at.stop - at.start)
                    _see(evidence, here, asked, others, seen, found[at], whole)
        return evidence


class _Products:
    """The delta of each adapter alone, at the user's weight; at 1 where that is 0, so that it has a direction.

    Of a stack those of one matrix at a time.
    """

    def __init__(self, edit: Edit, readers: Readers) -> None:
        self._edit = edit
        self._readers = readers
        self._slices = slices_for(work_dtype(torch_dtype(edit.source.dtype), torch_dtype(edit.dtype)))
        self._prepared: tuple[int, list[ExactProduct]] = (-1, [])

    def write(self, rows: Tensor, run: Run) -> None:
        """Write what each of them is in a run into a row."""
        transposed = self._edit.terms[0].transposed
        for row, product in zip(rows, self._of(run.number), strict=False):
            product.tile(run.rows, run.columns, transposed=transposed, out=row.view(run.shape))

    def _of(self, index: int) -> list[ExactProduct]:
        """Those of one matrix of the stack; the last ones are kept."""
        if self._prepared[0] != index:
            load = self._readers.load
            terms = [replace(term, weight=term.weight or 1.0).term(load, index) for term in self._edit.terms]
            self._prepared = index, [prepare([term], slices=self._slices) for term in terms]
        return self._prepared[1]


def _held_whole(edit: Edit, first: int, count: int) -> Tensor | None:
    """Which of `count` elements from `first` on lie in rows that adapters hold whole; None for none."""
    spans = list(edit.held(first, count))
    if not spans:
        return None
    whole = torch.zeros(count, dtype=torch.bool)
    for span in spans:
        whole[span] = True
    return whole


def _see(
    evidence: Evidence,
    rows: Tensor,
    asked: tuple[float, ...],
    others: Sequence[Mistake],
    piece: Piece,
    found: Tensor,
    whole: Tensor | None,
) -> None:
    """Take in one run; the deltas are in the first rows, and the others are filled here."""
    deltas, moves, off = rows[:-2], rows[-2], rows[-1]
    base, merged, there = (values.to(torch.float64) for values in (piece.source, piece.result, found))
    stored_base = base if piece.source.dtype == found.dtype else piece.source.to(found.dtype).to(torch.float64)
    if whole is not None:
        evidence.unlike_rows += _count((there != merged) & whole)
        evidence.rows_moved += _count((there != stored_base) & whole)
        base, stored_base, there = (torch.where(whole, merged, values) for values in (base, stored_base, there))
        deltas[:, whole] = 0
    torch.sub(merged, base, out=moves)
    torch.sub(there, merged, out=off)
    products = inner_products(rows)
    broken = None
    if not math.isfinite(float(products[-1, -1])):
        broken = ~torch.isfinite(there)
        there = torch.where(broken, merged, there)
        torch.sub(there, merged, out=off)
        products = inner_products(rows)
        evidence.broken += _count(broken)
    unlike_base = stored_base != there
    evidence.products += products
    evidence.elements += found.numel()
    evidence.unlike_base += _count(unlike_base if broken is None else unlike_base & ~broken)
    evidence.unlike_merge += _count(off)
    evidence.moved += _count(stored_base != merged)
    evidence.against += _count((there - base).mul_(_sum(deltas, asked)) < 0)
    for number, mistake in enumerate(others):
        # Only one that hardly an element speaks against can be meant; of the others a part is enough to see.
        if evidence.unlike[number] <= evidence.enough:
            change = piece.delta if mistake.unstretched and piece.delta is not None else _sum(deltas, mistake.strengths)
            made = _again(piece, merged, _sum(deltas, asked)) if mistake.again else base + change
            evidence.unlike[number] += _count(made.to(found.dtype).to(torch.float64) != there)
    # Last, since it takes the signs away.
    _see_sizes(evidence, torch.maximum(base.abs_(), merged.abs_()), there.abs_(), moves, found.dtype)


def _again(piece: Piece, merged: Tensor, change: Tensor) -> Tensor:
    """What the same merge makes of the merge itself; of what only its change is known of, that once more."""
    onto = piece._replace(source=piece.result).wanted if piece.gains is not None else None
    return merged + (change if onto is None else onto)


def _see_sizes(evidence: Evidence, right: Tensor, there: Tensor, moves: Tensor, dtype: torch.dtype) -> None:
    """Take in how large the changes are beside the spacing of the type, at the magnitudes that were rounded."""
    variances = rounding_variance(torch.maximum(right, there), dtype)
    evidence.noise += float(variances.sum())
    # A change is at most twice the larger of what it leads from and to, so that it has hardly a larger spacing.
    evidence.reach = max(evidence.reach, math.sqrt(float((moves.square() / variances).amax()) / 12))


def _sum(deltas: Tensor, strengths: tuple[float, ...]) -> Tensor:
    """What the deltas come to at these strengths."""
    if len(strengths) == 1:
        return deltas[0] * strengths[0]
    return torch.mv(deltas.T, torch.tensor(strengths, dtype=torch.float64))


def _count(values: Tensor) -> int:
    return int(values.count_nonzero())
