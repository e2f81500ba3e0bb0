"""From the evidence of one tensor to words: what a tensor that should be a merge looks like instead.

What can be shown element by element comes first: the bare base, or another merge that nearly every element agrees with.
The rest is told by strengths along the deltas (`arithmetic.projection`), each held against what the right merge itself
shows: where changes are far below the spacing of the weights, that is less than 1 too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch

from lora_cli.arithmetic.projection import fit
from lora_cli.surgery.evidence import Evidence, mistakes
from lora_cli.surgery.survival import WEAK

_SURE = 6
"""Standard errors within which two strengths are the same."""

_FINEST = 5e-4
"""A strength that is off by less than this is as it should be: scales are computed in float32 elsewhere."""

_AGREES = 50
"""Another merge it is, if of so many elements that differ from the right one at most one differs from that one too."""

_FEW = 100
"""Of so many elements one may be changed for a tensor to be what it is but for a few changes."""

_COARSE = 0.02
"""Relative error of a change under which it is that change, computed less exactly."""

_AGAINST = 20
"""Of so many changed elements one may have moved against the change that was asked for, to be that at another scale."""

_FEW_ULPS = 2
_NOISE = 4.0
"""How much more than the expected noise of rounding is still noise; other tools round more than once."""

Form = Literal["same", "missing", "twice", "opposite", "times", "more", "less", "extra"]

_WORDS: dict[Form, str] = {
    "twice": "applied twice",
    "opposite": "with the opposite sign",
    "times": "at {number} times its scale",
    "more": "at more than its scale",
    "less": "at less than its scale",
    "extra": "applied, though its weight is 0",
}
_SAID: dict[float, Form] = {0.0: "missing", 1.0: "extra", 2.0: "twice", -1.0: "opposite"}


@dataclass(frozen=True, slots=True)
class Likeness:
    """What a tensor looks like.

    Attributes:
        words: In words, to follow "looks like".
        general: The same of several tensors alike, without counts; {times} and {ulp} stand for numbers.
        times: The number for {times}.
        strength: How much of the whole change that was asked for is there; None where that is zero.
    """

    words: str
    general: str
    times: float | None = None
    strength: float | None = None


class Subject(NamedTuple):
    """Whose deltas a tensor takes.

    Attributes:
        asked: The strength asked for along each, see `evidence.directions`.
        labels: Of their adapters; "the adapter" where there is but one in all.
    """

    asked: tuple[float, ...]
    labels: tuple[str, ...]

    @property
    def one(self) -> str | None:
        """The adapter, where there is one alone."""
        return self.labels[0] if len(set(self.labels)) == 1 else None


class _State(NamedTuple):
    """What became of one adapter; the number is that of "times"."""

    form: Form
    number: str = ""


@dataclass(frozen=True, slots=True)
class _Strengths:
    """Strengths along each delta, or along all together where they cannot be told apart.

    Attributes:
        right: What the right merge shows.
        found: What is there.
        errors: How far apart the two may be if what is different has nothing to do with the deltas.
        blurs: How far `found` may be off if what it leaves unexplained has nothing to do with them.
        explained: Whether nothing is left but rounding.
        share: The share of what is there that they explain.
    """

    right: tuple[float, ...]
    found: tuple[float, ...]
    errors: tuple[float, ...]
    blurs: tuple[float, ...]
    explained: bool
    share: float


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
        max_ulp = None
    likeness = _judged(evidence, subject, max(0, wrong - broken), max_ulp)
    if broken:
        verb = "is" if broken == 1 else "are"
        likeness = Likeness(
            f"{likeness.words}, but {elements(broken)} {verb} NaN or infinity",
            f"{likeness.general}, but some elements are NaN or infinity",
            likeness.times,
        )
    return replace(likeness, strength=_strength(evidence, subject.asked))


def _judged(evidence: Evidence, subject: Subject, wrong: int, max_ulp: int | None) -> Likeness:
    if not evidence.unlike_merge:
        signs = ", but for signs of zeros" if wrong else ""
        return Likeness(f"this merge{signs}", f"this merge{signs}")
    if not evidence.unlike_base:
        return bare(subject.one)
    unlike, number = min((count, number) for number, count in enumerate(evidence.unlike))
    if unlike * _AGREES <= evidence.unlike_merge:
        made = zip(mistakes(subject.asked)[number].strengths, subject.asked, strict=True)
        return _composed([_said(strength, asked) for strength, asked in made], subject.labels)
    if _few(wrong, evidence):
        return _rounded(wrong, max_ulp) if _small(max_ulp) else but_for("this merge", wrong)
    strengths = _strengths(evidence, subject.asked)
    if strengths is None:
        return _another(subject, 0.0)
    if len(strengths.right) < len(subject.labels):
        subject = Subject((1.0,), ("the sum of all adapters",))
    states = _states(strengths, subject.asked)
    if all(state.form == "same" for state in states):
        return _nearly_right(evidence, strengths, wrong, max_ulp)
    if {state.form for state, asked in zip(states, subject.asked, strict=True) if asked} == {"missing"}:
        few = _few(evidence.unlike_base, evidence)
        return but_for("the bare base", evidence.unlike_base) if few else _another(subject, strengths.share)
    # What is left of small changes is less than the noise, whatever they are; but no scale moves a weight the other way.
    by_scale = evidence.against * _AGAINST <= evidence.unlike_base
    if strengths.explained and (by_scale or not {"more", "less"} & {state.form for state in states}):
        return _composed(states, subject.labels)
    return _another(subject, strengths.share)


# Phrases


def elements(count: int) -> str:
    """A number of elements."""
    return "1 element" if count == 1 else f"{count:,} elements"


def bare(label: str | None) -> Likeness:
    """The base, as if there had been no merge; of one adapter, or of several."""
    words = f"the bare base: {label} was not applied" if label else "the bare base: no adapter was applied"
    return Likeness(words, words)


def but_for(what: str, count: int) -> Likeness:
    """Something, but for a few elements."""
    noun = "element" if count == 1 else "elements"
    return Likeness(f"{what} with {count:,} changed {noun}", f"{what} with a few changed elements")


def _rounded(wrong: int, max_ulp: int | None) -> Likeness:
    words = "this merge, rounded in another way"
    if max_ulp is None:
        return Likeness(f"{words} in {elements(wrong)}", words)
    most = max(1, max_ulp)
    return Likeness(
        f"{words}: {elements(wrong)}, by at most {most} ULP (--max-ulp {most} allows that)",
        f"{words} (--max-ulp {{ulp}} allows that)",
    )


def _another(subject: Subject, share: float) -> Likeness:
    words = "another adapter, or another change"
    named = f"{subject.one} explains" if subject.one else "these adapters explain"
    return Likeness(f"{words} ({named} {_percent(share)} of it)", words)


def _nearly_right(evidence: Evidence, strengths: _Strengths, wrong: int, max_ulp: int | None) -> Likeness:
    """The right strengths, and yet many elements differ."""
    if strengths.explained or _small(max_ulp):
        return _rounded(wrong, max_ulp)
    off, change = float(evidence.products[-1, -1]), float(evidence.products[-2, -2])
    if off <= _COARSE**2 * change:
        words = "this merge, computed less exactly"
        return Likeness(f"{words}: off by {_percent(math.sqrt(off / change))} of the change", words)
    words = "this merge with another change on top"
    return Likeness(words, words)


def _composed(states: Sequence[_State], labels: Sequence[str]) -> Likeness:
    """What became of all adapters."""
    words = _sentence(states, labels)
    numbers = {state.number for state in states if state.form == "times"}
    if len(numbers) != 1:
        return Likeness(words, words)
    general = _sentence([state._replace(number="{times}") for state in states], labels)
    return Likeness(words, general, float(numbers.pop()))


def _sentence(states: Sequence[_State], labels: Sequence[str]) -> str:
    if len(states) == 1:
        return f"{labels[0]} {_phrase(states[0])}"
    if len(set(states)) == 1 and states[0].form != "missing":
        return f"all adapters {_phrase(states[0]).replace('its', 'their')}"
    unique = [label if labels.count(label) == 1 else f"{label} ({at})" for at, label in enumerate(labels, 1)]
    odd = [(state, label) for state, label in zip(states, unique, strict=True) if state.form != "same"]
    return f"this merge {' and '.join(_part(state, label) for state, label in odd)}"


def _part(state: _State, label: str) -> str:
    if state.form == "missing":
        return f"without {label}"
    if state.form == "opposite":
        return f"{_phrase(state)} of {label}"
    return f"with {label} {_phrase(state)}"


def _phrase(state: _State) -> str:
    return _WORDS[state.form].replace("{number}", state.number)


def _percent(share: float) -> str:
    percent = 100 * max(0.0, min(1.0, share))
    return f"{percent:.2g} %" if percent >= 0.1 else "less than 0.1 %"


# Numbers


def _few(count: int, evidence: Evidence) -> bool:
    """Whether so many changed elements are few, of all and beside those that the merge changes."""
    beside = evidence.moved // 4 if evidence.moved else count
    return count <= max(1, evidence.elements // _FEW) and count <= max(1, beside)


def _small(max_ulp: int | None) -> bool:
    return max_ulp is not None and max_ulp <= _FEW_ULPS


def _strength(evidence: Evidence, asked: tuple[float, ...]) -> float | None:
    """The projection of what is there on the whole change that was asked for."""
    count, wanted = len(asked), torch.tensor(asked, dtype=torch.float64)
    gram, along = evidence.products[:count, :count], evidence.products[:count, count:].sum(1)
    meant = float(wanted.dot(gram.mv(wanted)))
    return float(wanted.dot(along)) / meant if meant else None


def _strengths(evidence: Evidence, asked: tuple[float, ...]) -> _Strengths | None:
    """Strengths along each delta; None where no delta has a direction."""
    count = len(asked)
    for chosen in (torch.eye(count, dtype=torch.float64), torch.tensor([asked], dtype=torch.float64)):
        gram = chosen.mm(evidence.products[:count, :count]).mm(chosen.T)
        right, off = chosen.mm(evidence.products[:count, count:]).T
        right_energy, cross, off_energy = (float(evidence.products[a, b]) for a, b in ((-2, -2), (-2, -1), (-1, -1)))
        energy = right_energy + 2 * cross + off_energy
        shown, there = fit(gram, right, right_energy), fit(gram, right + off, energy)
        if shown is None or there is None:
            continue
        noise = _NOISE * max(evidence.noise, shown.left) + 1e-12 * energy
        explained = there.left <= max(noise, _COARSE**2 * (energy - there.left))
        return _Strengths(
            right=shown.coefficients,
            found=there.coefficients,
            errors=tuple(math.sqrt(off_energy / evidence.elements) * spread for spread in there.spreads),
            blurs=tuple(math.sqrt(there.left / evidence.elements) * spread for spread in there.spreads),
            explained=explained,
            share=1 - there.left / energy if energy else 0.0,
        )
    return None


def _states(strengths: _Strengths, asked: tuple[float, ...]) -> list[_State]:
    each = zip(strengths.right, strengths.found, strengths.errors, strengths.blurs, asked, strict=True)
    return [_state(*values) for values in each]


def _state(right: float, found: float, error: float, blur: float, asked: float) -> _State:
    """What became of one adapter: `right` is its strength in the right merge, `found` what is there."""
    # However noisy: no strength is another one that is nearer to a third.
    reach = max(abs(right), 0.1) / 4 if asked else 0.25
    if abs(found - right) <= min(max(_SURE * error, _FINEST), reach):
        return _State("same")
    if abs(found) <= min(max(_SURE * blur, _COARSE), reach):
        return _State("missing")
    if not asked:
        return _State("extra")
    if right < WEAK:
        # What rounding leaves does not grow with the scale: other numbers than these tell only the side of 1.
        known = [times for times in (2.0, -1.0) if abs(found - times * right) <= 0.1 * right]
        return _State(_SAID[known[0]] if known else "more" if found > right else "less")
    number = _number(_scale(right, found), blur + (1 - right) / 10)
    return _State(_SAID[float(number)]) if float(number) in (2.0, -1.0) else _State("times", number)


def _scale(right: float, found: float) -> float:
    """The scale at which this much is found.

    Of little that rounding takes, it takes less by the square of the scale: found = scale·(1 - (1 - right)/scale²).
    """
    size = abs(found)
    return math.copysign((size + math.sqrt(max(0.0, size**2 + 4 * (1 - right)))) / 2, found)


def _said(strength: float, asked: float) -> _State:
    """What a strength is called beside the one that was asked for."""
    if strength == asked:
        return _State("same")
    return _State(_SAID[strength]) if strength in _SAID else _State("times", f"{strength:g}")


def _number(times: float, blur: float) -> str:
    """With the digits that are sure, and one in which it differs from 1."""
    digits = min(4, max(1, math.floor(-math.log10(max(_SURE * blur, 1e-9)))))
    while digits < 4 and round(times, digits) == 1:
        digits += 1
    return f"{round(times, digits):g}"
