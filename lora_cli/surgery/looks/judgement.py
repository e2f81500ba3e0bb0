"""From the evidence of one tensor to words: what a tensor that should be a merge looks like instead.

What can be shown element by element comes first: the bare base, another merge that nearly every element agrees with,
the right merge in all but a few elements or within the last place. The rest is told by strengths along the deltas.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

from lora_cli.surgery.looks.evidence import AGREES, Evidence, Mistake, mistakes
from lora_cli.surgery.looks.phrases import (
    Likeness,
    another,
    bare,
    but_for,
    composed,
    less_exact,
    other_lengths,
    plain,
    rounded,
    unstretched,
    with_broken,
    without_changes,
    without_rows,
)
from lora_cli.surgery.looks.strengths import COARSE, named, strengths_of, whole_strength

FEW = 20
"""Of so many elements one may be changed for a tensor to be what it is but for a few changes."""

_HARDLY_ANY = 1000
"""Of so many elements one that is a little off is a fault of its own, and not of how all were computed."""

_FEW_ULPS = 2
"""Within so many units it is rounding, if everything else speaks for it."""

_SOME_ULPS = 16
"""Nobody would allow more; it is said then how large the error is beside the change."""

_REACH = 50
"""A change of so many units is known to 2 % where no element is more than one off: it is at no other scale."""

_AGAINST = 20
"""Of so many changed elements one may have moved against the change that was asked for, to be that at some scale."""


_MOSTLY = 0.9
"""Share of a change that DoRA makes which, if it is there, is of this adapter or one near to it."""

_EXACTLY = 1e-3
"""Relative error of such a change that no other magnitudes leave."""


_ON_TOP = "this merge with another change on top"


class Subject(NamedTuple):
    """Whose deltas a tensor takes.

    Attributes:
        asked: The strength asked for along each, see `evidence.asked_of`.
        labels: Of their adapters; "the adapter" where there is but one in all.
        names: What tells the deltas apart: the same, and where one adapter has several, what each of them is on.
        sole: The label, where one adapter has several deltas on the tensor, and no other has any.
        stretched: Whether deltas set lengths, so that there are no strengths to tell.
        on_base: Whether they are added to the base's own tensor, and not to one that an adapter holds whole.
        adds: Whether all are added; else they multiply what is there, or make something else of it.
    """

    asked: tuple[float, ...]
    labels: tuple[str, ...]
    names: tuple[str, ...]
    sole: str | None = None
    stretched: bool = False
    on_base: bool = True
    adds: bool = True

    @property
    def one(self) -> str | None:
        """The adapter, where there is one alone."""
        return self.labels[0] if len(set(self.labels)) == 1 else None


def judge(evidence: Evidence, subject: Subject, wrong: int, max_ulp: int | None) -> Likeness:
    """Say what a tensor looks like.

    Args:
        evidence: What was found.
        subject: Whose deltas it takes.
        wrong: How many elements differ by more than was allowed.
        max_ulp: By how much, at most.
    """
    broken, rows = evidence.broken, evidence.unlike_rows
    if broken or rows:
        wrong, max_ulp = max(0, wrong - broken - rows), None  # the worst of all is one of those
    likeness = _by_element(evidence, subject, wrong, max_ulp) or _by_strength(evidence, subject, wrong, max_ulp)
    if rows and (evidence.unlike_base or evidence.rows_moved):
        likeness = without_rows(likeness)
    if broken:
        likeness = with_broken(likeness, broken)
    return replace(likeness, strength=whole_strength(evidence, subject.asked))


def _by_element(evidence: Evidence, subject: Subject, wrong: int, max_ulp: int | None) -> Likeness | None:
    """What holds for all, or nearly all elements."""
    still = not evidence.unlike_base and not evidence.rows_moved
    if not evidence.unlike_merge and not (still and evidence.unlike_rows):
        return plain("this merge, but for signs of zeros" if wrong else "this merge")
    if not evidence.unlike_base:
        return bare(subject.one) if subject.on_base and still else without_changes(subject.one)
    unlike, number = min((count, number) for number, count in enumerate(evidence.unlike))
    if unlike * AGREES <= evidence.unlike_merge:
        return _mistaken(subject, mistakes(subject.asked, stretched=subject.stretched)[number])
    few = _few(wrong, evidence)
    if max_ulp is not None and _small(max_ulp) and (few or max_ulp * _REACH <= evidence.reach):
        return rounded(wrong, max_ulp)
    if few and wrong * _HARDLY_ANY > evidence.elements and _relative_error(evidence) <= COARSE:
        return less_exact(_relative_error(evidence))
    return but_for("this merge", wrong) if few else None


def _mistaken(subject: Subject, mistake: Mistake) -> Likeness:
    if mistake.unstretched:
        return unstretched(subject.one)
    made = zip(mistake.strengths, subject.asked, strict=True)
    return composed([named(strength, asked) for strength, asked in made], subject.names, subject.sole)


def _by_strength(evidence: Evidence, subject: Subject, wrong: int, max_ulp: int | None) -> Likeness:
    strengths = strengths_of(evidence, subject.asked)
    if strengths is None:
        return another(subject.one, 0.0)
    if len(strengths.right) < len(subject.names):
        every = ("the sum of all adapters",)
        subject = subject._replace(asked=(1.0,), labels=every, names=every, sole=None)
    # What is left of small changes is below the noise, whatever they are; but no scale moves a weight the other way.
    by_scale = evidence.against * _AGAINST <= evidence.unlike_base
    states = strengths.states(subject.asked)
    forms = {state.form for state in states}
    right = forms == {"same"} and strengths.rounding
    if subject.stretched and not right and strengths.share >= _MOSTLY:
        error = _relative_error(evidence)
        return less_exact(error) if error <= _EXACTLY else other_lengths()
    if forms == {"same"}:
        # What is made of the base, and not added, has nothing on top, however much of it another change has.
        more = plain(_ON_TOP) if subject.adds else another(subject.one, strengths.share)
        return _right_strength(evidence, strengths.rounding and by_scale, wrong, max_ulp) or more
    if {state.form for state, asked in zip(states, subject.asked, strict=True) if asked} == {"missing"}:
        few = _few(evidence.unlike_base, evidence)
        return but_for("the bare base", evidence.unlike_base) if few else another(subject.one, strengths.share)
    if not subject.stretched and strengths.explained and (by_scale or not forms & {"more", "less"}):
        return composed(states, subject.names, subject.sole)
    return another(subject.one, strengths.share)


def _right_strength(evidence: Evidence, rounding: bool, wrong: int, max_ulp: int | None) -> Likeness | None:
    """The right strengths, and yet many elements differ; None for more than rounding does."""
    if (rounding and (max_ulp is None or max_ulp <= _SOME_ULPS)) or _small(max_ulp):
        return rounded(wrong, max_ulp)
    if _relative_error(evidence) <= COARSE:
        return less_exact(_relative_error(evidence))
    return rounded(wrong, max_ulp) if rounding else None


def _small(max_ulp: int | None) -> bool:
    return max_ulp is not None and max_ulp <= _FEW_ULPS


def _few(count: int, evidence: Evidence) -> bool:
    """Whether so many changed elements are few, of all and beside those that the merge changes."""
    beside = evidence.moved // 4 if evidence.moved else count
    return count <= max(1, evidence.elements // FEW) and count <= max(1, beside)


def _relative_error(evidence: Evidence) -> float:
    """How large what is different is beside what the merge changes."""
    off, change = float(evidence.products[-1, -1]), float(evidence.products[-2, -2])
    return math.sqrt(off / change) if change else math.inf
