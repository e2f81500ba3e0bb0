"""Words for what a tensor looks like; every phrase follows "looks like"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

Form = Literal["same", "missing", "twice", "opposite", "times", "more", "less", "extra"]

_WORDS: dict[Form, str] = {
    "twice": "applied twice",
    "opposite": "with the opposite sign",
    "times": "at {number} times its scale",
    "more": "at more than its scale",
    "less": "at less than its scale",
    "extra": "applied, though its weight is 0",
}


@dataclass(frozen=True, slots=True)
class Likeness:
    """What a tensor looks like.

    Attributes:
        words: In words, to follow "looks like".
        general: The same of several tensors alike, without counts; {times} and {ulp} stand for numbers.
        times: The number for {times}.
        doubt: How far off that may be.
        strength: How much of the whole change that was asked for is there; None where that is zero.
    """

    words: str
    general: str
    times: float | None = None
    doubt: float = 0.0
    strength: float | None = None


class State(NamedTuple):
    """What became of one adapter; the number is that of "times", and may be off by `doubt`."""

    form: Form
    number: str = ""
    doubt: float = 0.0


def elements(count: int) -> str:
    """A number of elements."""
    return "1 element" if count == 1 else f"{count:,} elements"


def percent(share: float) -> str:
    """A share, or how large something is beside something else."""
    value = 100 * max(0.0, share)
    if value < 0.1:
        return "less than 0.1 %"
    return f"{value:,.0f} %" if value >= 10 else f"{value:.2g} %"


def plain(words: str) -> Likeness:
    """The same words for one tensor and for many."""
    return Likeness(words, words)


def bare(label: str | None) -> Likeness:
    """The base, as if there had been no merge; of one adapter, or of several."""
    return plain(f"the bare base: {label or 'no adapter'} was {'not ' if label else ''}applied")


def without_changes(label: str | None) -> Likeness:
    """What an adapter holds whole, without what should have been added to it."""
    return plain(f"this merge without what {label or 'the adapters'} would have added")


def without_rows(likeness: Likeness) -> Likeness:
    """Something, but for rows that an adapter holds whole."""
    return replace(
        likeness,
        words=f"{likeness.words}, but for the rows that the adapter holds whole",
        general=f"{likeness.general}, but for the rows that the adapter holds whole",
    )


def but_for(what: str, count: int) -> Likeness:
    """Something, but for a few elements."""
    noun = "element" if count == 1 else "elements"
    return Likeness(f"{what} with {count:,} changed {noun}", f"{what} with a few changed elements")


def with_broken(likeness: Likeness, count: int) -> Likeness:
    """Something, with numbers that are none."""
    verb = "is" if count == 1 else "are"
    return Likeness(
        f"{likeness.words}, but {elements(count)} {verb} NaN or infinity",
        f"{likeness.general}, but some elements are NaN or infinity",
        likeness.times,
        likeness.doubt,
    )


def rounded(count: int, max_ulp: int | None) -> Likeness:
    """The right merge, but for roundings; without `max_ulp` where that says nothing."""
    words = "this merge, rounded in another way"
    if max_ulp is None:
        return Likeness(f"{words} in {elements(count)}", words)
    return Likeness(
        f"{words}: {elements(count)}, by at most {max_ulp} ULP (--max-ulp {max_ulp} allows that)",
        f"{words} (--max-ulp {{ulp}} allows that)",
    )


def less_exact(error: float) -> Likeness:
    """The right merge, in a narrower type or with rounded factors; the error is that of the change."""
    words = "this merge, computed less exactly"
    return Likeness(f"{words}: off by {percent(error)} of the change", words)


def another(label: str | None, share: float) -> Likeness:
    """Something that has little to do with the adapter, or the adapters."""
    words = "another adapter, or another change"
    named = f"{label} explains" if label else "these adapters explain"
    return Likeness(f"{words} ({named} {percent(share)} of it)", words)


def unstretched(label: str | None) -> Likeness:
    """The sum, without what DoRA makes of it."""
    return plain(f"this merge without the magnitudes of {label or 'the adapters'}: only B·A was added")


def other_lengths() -> Likeness:
    """Near to what DoRA makes, of which nobody can say how much of it is there."""
    return plain("this merge with other magnitudes or factors")


def composed(states: Sequence[State], labels: Sequence[str], one: str | None) -> Likeness:
    """What became of each delta on one tensor; `one` is the adapter where all are of one."""
    words = _sentence(states, labels, one)
    numbers = {state.number for state in states if state.form == "times"}
    if len(numbers) != 1:
        return plain(words)
    general = _sentence([state._replace(number="{times}") for state in states], labels, one)
    return Likeness(words, general, float(numbers.pop()), max(state.doubt for state in states))


def _sentence(states: Sequence[State], labels: Sequence[str], one: str | None) -> str:
    alike = len({state[:2] for state in states}) == 1 and states[0].form in _WORDS
    if len(states) == 1 or (alike and one):
        return f"{one or labels[0]} {_phrase(states[0])}"
    if alike:
        return f"all adapters {_phrase(states[0]).replace('its', 'their')}"
    unique = [label if labels.count(label) == 1 else f"{label} ({at})" for at, label in enumerate(labels, 1)]
    odd = [(state, label) for state, label in zip(states, unique, strict=True) if state.form != "same"]
    return f"this merge {' and '.join(_part(state, label) for state, label in odd)}"


def _part(state: State, label: str) -> str:
    if state.form == "missing":
        return f"without {label}"
    if state.form == "opposite":
        return f"{_phrase(state)} of {label}"
    return f"with {label} {_phrase(state)}"


def _phrase(state: State) -> str:
    return _WORDS[state.form].replace("{number}", state.number)
