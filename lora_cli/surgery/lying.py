"""How deltas lie on the tensors of a base: which way round, and on which of their outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_cli.adapters.adapter import Adapter, Delta, Target
from lora_cli.adapters.layout import Orientation, bears_witness, by_architecture, is_table, settle_square
from lora_cli.adapters.region import Place
from lora_cli.checkpoint.checkpoint import Checkpoint
from lora_cli.surgery.vocabulary import vocabulary_hint

Placed = tuple[Target, Place]
"""A target and one of the places that store it."""


@dataclass(frozen=True)
class Lying:
    """How the deltas of one adapter lie.

    Attributes:
        transposed: For each of them whether its tensor is stored (in × out); None where that is wrong or unknown.
        problems: What is wrong, in words.
        guessed: Keys of square tensors that are taken as stored (out × in) for want of any hint.
    """

    transposed: Sequence[bool | None]
    problems: Sequence[str]
    guessed: Sequence[str]


def lie(
    adapter: Adapter,
    placed: Sequence[Placed],
    shapes: Mapping[str, tuple[int, ...]],
    base: Checkpoint,
    said: Orientation | None,
) -> Lying:
    """Find how the deltas of one adapter lie.

    Args:
        adapter: The adapter.
        placed: Its targets and their places.
        shapes: Shape of every tensor of the base, as the adapter finds it.
        base: The base.
        said: `--orientation`.
    """
    return _Judge(adapter, shapes, base, said).judge(placed)


class _Judge:
    """Judges the deltas of one adapter. Used once."""

    def __init__(
        self, adapter: Adapter, shapes: Mapping[str, tuple[int, ...]], base: Checkpoint, said: Orientation | None
    ) -> None:
        self._adapter = adapter
        self._shapes = shapes
        self._base = base
        self._said = said
        self._problems: list[str] = []
        self._guessed: list[str] = []

    def judge(self, placed: Sequence[Placed]) -> Lying:
        choices = [self._fits(target.delta, place) for target, place in placed]
        lying = [
            (place.key, next(iter(fit)))
            for (target, place), fit in zip(placed, choices, strict=True)
            if len(fit) == 1 and len(target.delta.stored) > 1
        ]
        others = {fit for key, fit in lying if bears_witness(self._adapter, key, fit, self._shapes)}
        transposed = [
            self._transposed(target, place, fit, others) for (target, place), fit in zip(placed, choices, strict=True)
        ]
        return Lying(transposed, self._problems, self._guessed)

    def _fits(self, delta: Delta, place: Place) -> set[bool]:
        """The values of `transposed` with which a delta has the base's shape."""
        return {
            transposed
            for transposed in delta.stored
            if _stored_shape(delta, place, self._shapes[place.key], transposed=transposed) == self._shapes[place.key]
        }

    def _transposed(self, target: Target, place: Place, choices: set[bool], others: set[bool]) -> bool | None:
        key, adapter = place.key, self._adapter
        if not choices:
            self._problems.append(self._words(target, key))
            return None
        if len(target.delta.stored) == 1:
            return next(iter(choices))
        told = by_architecture(target, key, self._base.config)
        told = place.turned if told is None and place.turned else told
        if len(choices) == 1:
            return self._checked(target, key, next(iter(choices)), told)
        if is_table(adapter, key):
            return True
        settled = settle_square(adapter, told, others, self._said)
        if settled is None:
            self._problems.append(
                f"{key}: square, so nothing says if it is stored out × in or in × out; give --orientation ba or ab"
            )
        elif adapter.transposed_hint is None and self._said is None and told is None and len(others) != 1:
            self._guessed.append(key)
        return settled

    def _checked(self, target: Target, key: str, fit: bool, told: bool | None) -> bool | None:
        """What the shape says, unless what is said elsewhere is against it."""
        against = "the architecture" if told is not None and fit != told else None
        if fit and told is None and self._adapter.transposed_hint is False:
            against = "fan_in_fan_out"
        if against and self._said is None and self._adapter.orientation is not None:
            words = f"{self._words(target, key)}, which fits only against {against}; see --orientation"
            self._problems.append(words)
            return None
        return fit

    def _words(self, target: Target, key: str) -> str:
        shape = next(iter(target.delta.stored.values()))
        factors = ", ".join(f"{tensor.key} {list(tensor.shape)}" for tensor in target.delta.tensors)
        size = " × ".join(map(str, shape)) if len(shape) > 1 else f"{shape[0]} × 1"
        words = f"{key}: {list(self._shapes[key])} in the base, the delta is ({size}) from {factors}"
        return words + vocabulary_hint(shape[0], key, self._shapes[key])


def _stored_shape(delta: Delta, place: Place, there: tuple[int, ...], *, transposed: bool) -> tuple[int, ...]:
    """The shape of a tensor that is a place of what a delta changes; `there` says how long a stack of them is."""
    shape, rows = delta.stored[transposed], 0 if delta.stack is None else 1
    if place.matrix is not None:
        shape, rows = shape[1:], 0
    if place.region is not None:
        axis = len(shape) - 1 if transposed else rows
        shape = (*shape[:axis], place.region.of, *shape[axis + 1 :])
    return shape if place.at is None else (*there[:1], *shape)


def guessed_words(guessed: Sequence[str]) -> list[str]:
    """A warning of square tensors that are taken as stored (out × in) for want of any hint, if there are any."""
    if not guessed:
        return []
    several = f" and {len(guessed) - 1} more" if len(guessed) > 1 else ""
    return [
        f"{guessed[0]}{several}: square, and taken as stored out × in, like torch.nn.Linear; "
        "--orientation ab is for in × out, like embeddings and GPT-2"
    ]
