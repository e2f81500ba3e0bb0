"""Strengths along the deltas of a tensor, and what each of them means beside what the right merge shows.

Where changes are far below the spacing of the weights, the right merge itself shows less than 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lora_cli.arithmetic.projection import fit
from lora_cli.surgery.looks.evidence import Evidence
from lora_cli.surgery.looks.phrases import Form, State
from lora_cli.surgery.survival import WEAK

COARSE = 0.02
"""Relative error of a change under which it is that change, computed less exactly."""

_SURE = 6
"""Standard errors within which two strengths are the same."""

_FINEST = 5e-4
"""A strength that is off by less than this is as it should be: elsewhere scales are computed in float32."""

_WHOLE = 0.02
"""How far from 2 or -1 a strength may be to be called that."""

_NOISE = 4.0
"""How much more than what one rounding is expected to do is still rounding: other tools round more than once."""

_FORMS: dict[float, Form] = {0.0: "missing", 1.0: "extra", 2.0: "twice", -1.0: "opposite"}


@dataclass(frozen=True, slots=True)
class Strengths:
    """Strengths along each delta, or along all together where they cannot be told apart.

    Attributes:
        right: What the right merge shows.
        found: What is there.
        errors: How far apart the two may be if what is different has nothing to do with the deltas.
        blurs: How far `found` may be off if what it leaves unexplained has nothing to do with them.
        rounding: Whether nothing is left but what rounding leaves.
        explained: Whether that, or next to nothing beside the change.
        share: The share of what is there that they explain.
    """

    right: tuple[float, ...]
    found: tuple[float, ...]
    errors: tuple[float, ...]
    blurs: tuple[float, ...]
    rounding: bool
    explained: bool
    share: float

    def states(self, asked: tuple[float, ...]) -> list[State]:
        """What became of each adapter, by the strengths that were asked for."""
        each = zip(self.right, self.found, self.errors, self.blurs, asked, strict=True)
        return [_state(*values) for values in each]


def whole_strength(evidence: Evidence, asked: tuple[float, ...]) -> float | None:
    """The projection of what is there on the whole change that was asked for; None where that is zero."""
    count, wanted = len(asked), torch.tensor(asked, dtype=torch.float64)
    gram, along = evidence.products[:count, :count], evidence.products[:count, count:].sum(1)
    meant = float(wanted.dot(gram.mv(wanted)))
    return float(wanted.dot(along)) / meant if meant else None


def strengths_of(evidence: Evidence, asked: tuple[float, ...]) -> Strengths | None:
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
        return Strengths(
            right=shown.coefficients,
            found=there.coefficients,
            errors=tuple(math.sqrt(off_energy / evidence.elements) * spread for spread in there.spreads),
            blurs=tuple(math.sqrt(there.left / evidence.elements) * spread for spread in there.spreads),
            rounding=there.left <= noise,
            explained=there.left <= max(noise, COARSE**2 * (energy - there.left)),
            share=1 - there.left / energy if energy else 0.0,
        )
    return None


def named(strength: float, asked: float) -> State:
    """What a strength that is known is called beside the one that was asked for."""
    if strength == asked:
        return State("same")
    return State(_FORMS[strength]) if strength in _FORMS else State("times", f"{strength:g}")


def _state(right: float, found: float, error: float, blur: float, asked: float) -> State:
    # However noisy: what is nearer to something else is not the same.
    reach = max(abs(right), 0.1) / 4 if asked else 0.25
    nearer = abs(found - right) <= abs(found) or not asked
    if nearer and abs(found - right) <= min(max(_SURE * error, _FINEST), reach):
        return State("same")
    if abs(found) <= min(max(_SURE * blur, COARSE), reach):
        return State("missing")
    if not asked:
        return State("extra")
    return _little_left(right, found) if right < WEAK else _scaled(right, found, blur)


def _little_left(right: float, found: float) -> State:
    """What rounding leaves does not grow with the scale; only this much is told by strengths."""
    if abs(found - 2 * right) <= 0.1 * right:
        return State("twice")
    return State("opposite" if found < 0 else "more" if found > right else "less")


def _scaled(right: float, found: float, blur: float) -> State:
    scale = _scale(right, found)
    doubt = _SURE * blur + abs(1 - right) / min(1.0, scale**2)
    number = _number(scale, doubt)
    whole = float(round(scale))
    if whole in (2.0, -1.0) and (abs(scale - whole) <= _WHOLE or float(number) == whole):
        return State(_FORMS[whole])
    return State("times", number, doubt)


def _scale(right: float, found: float) -> float:
    """The scale at which so much is found.

    Where rounding takes little, it takes less by the square of the scale: found = scale·(1 - (1 - right)/scale²).
    """
    size = abs(found)
    return math.copysign((size + math.sqrt(max(0.0, size**2 + 4 * (1 - right)))) / 2, found)


def _number(scale: float, doubt: float) -> str:
    """With the digits that are sure, and one in which it differs from 1."""
    digits = min(4, max(1, math.floor(-math.log10(max(doubt, 1e-9)))))
    while digits < 4 and round(scale, digits) == 1:
        digits += 1
    return f"{round(scale, digits):g}"
