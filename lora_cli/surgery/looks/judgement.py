"""From the evidence of one tensor to words: what a tensor that should be a merge looks like instead.

What can be shown element by element comes first: the bare base, another merge that nearly every element agrees with,
the right merge in all but a few elements or within the last place. The rest is told by strengths along the deltas.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

from lora_cli.surgery.looks.evidence import AGREES, Evidence, mistakes
from lora_cli.surgery.looks.phrases import (
    Likeness,
    another,
    bare,
    but_for,
    composed,
    less_exact,
    plain,
    rounded,
    with_broken,
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


class Subject(NamedTuple):
    """Whose deltas a tensor takes.

    Attributes:
        asked: The strength asked for along each, see `evidence.asked_of`.
        labels: Of their adapters; "the adapter" where there is but one in all.
    """

    asked: tuple[float, ...]
    labels: tuple[str, ...]

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
    broken = evidence.broken
    if broken:
        wrong, max_ulp = max(0, wrong - broken), None  # the worst of all is one of those
    likeness = _by_element(evidence, subject, wrong, max_ulp) or _by_strength(evidence, subject, wrong, max_ulp)
    if broken:
        likeness = with_broken(likeness, broken)
    return replace(likeness, strength=whole_strength(evidence, subject.asked))


def _by_element(evidence: Evidence, subject: Subject, wrong: int, max_ulp: int | None) -> Likeness | None:
    """What holds for all, or nearly all elements."""
    if not evidence.unlike_merge:
        return plain("this merge, but for signs of zeros" if wrong else "this merge")
    if not evidence.unlike_base:
        return bare(subject.one)
    unlike, number = min((count, number) for number, count in enumerate(evidence.unlike))
    if unlike * AGREES <= evidence.unlike_merge:
        made = zip(mistakes(subject.asked)[number].strengths, subject.asked, strict=True)
        return composed([named(strength, asked) for strength, asked in made], subject.labels)
    few = _few(wrong, evidence)
    if max_ulp is not None and _small(max_ulp) and (few or max_ulp * _REACH <= evidence.reach):
        return rounded(wrong, max_ulp)
    if few and wrong * _HARDLY_ANY > evidence.elements and _relative_error(evidence) <= COARSE:
        return less_exact(_relative_error(evidence))
    return but_for("this merge", wrong) if few else None


def _by_strength(evidence: Evidence, subject: Subject, wrong: int, max_ulp: int | None) -> Likeness:
    strengths = strengths_of(evidence, subject.asked)
    if strengths is None:
        return another(subject.one, 0.0)
    if len(strengths.right) < len(subject.labels):
        subject = Subject((1.0,), ("the sum of all adapters",))
    # What is left of small changes is below the noise, whatever they are; but no scale moves a weight the other way.
    by_scale = evidence.against * _AGAINST <= evidence.unlike_base
    states = strengths.states(subject.asked)
    forms = {state.form for state in states}
    if forms == {"same"}:
        return _right_strength(evidence, strengths.rounding and by_scale, wrong, max_ulp)
    if {state.form for state, asked in zip(states, subject.asked, strict=True) if asked} == {"missing"}:
        few = _few(evidence.unlike_base, evidence)
        return but_for("the bare base", evidence.unlike_base) if few else another(subject.one, strengths.share)
    if strengths.explained and (by_scale or not forms & {"more", "less"}):
        return composed(states, subject.labels)
    return another(subject.one, strengths.share)


def _right_strength(evidence: Evidence, rounding: bool, wrong: int, max_ulp: int | None) -> Likeness:
    """The right strengths, and yet many elements differ."""
    if (rounding and (max_ulp is None or max_ulp <= _SOME_ULPS)) or _small(max_ulp):
        return rounded(wrong, max_ulp)
    if _relative_error(evidence) <= COARSE:
        return less_exact(_relative_error(evidence))
    return rounded(wrong, max_ulp) if rounding else plain("this merge with another change on top")


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
