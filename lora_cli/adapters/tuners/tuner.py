"""What a tuner is here: the names of its tensors in a PEFT file, the fields of its config, and what it does."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from lora_cli.adapters.adapter import HAS_NONE, Replacement, RowReplacement, Scale, Target
from lora_cli.adapters.formula import Method
from lora_cli.adapters.patterns import PeftPatterns
from lora_cli.checkpoint.checkpoint import StoredTensor
from lora_cli.errors import SAVE_AGAIN, ShapeError, UsageError


@dataclass(frozen=True)
class Module:
    """One module of an adapter's file.

    Attributes:
        name: Its name in the trained model.
        tensors: Its tensors, by the tuner's names for them.
        config: The adapter's config, with its types checked.
        shared: Tensors that belong to the whole model, likewise; behind such a name may stand a further one.
        scale: Makes the scale of a change: numerator, divisor (None for none), whether by its square root, and where
            that is said. It knows what the user said instead, by `--scale` or `--alpha`.
        patterns: Gives the entries of a field of patterns, which are made ready once for all modules.
    """

    name: str
    tensors: Mapping[str, StoredTensor]
    config: Mapping[str, Any]
    shared: Mapping[str, StoredTensor]
    scale: Callable[[float, int | None, bool, str], Scale]
    patterns: Callable[[str], PeftPatterns]

    def said(self, field_name: str, default: Any, patterns: str | None = None) -> Any:
        """What the config says: the first entry of the field `patterns` that matches the module, else the field."""
        found = self.patterns(patterns).first(self.name) if patterns else None
        if found is not None:
            return found[1]
        value = self.config.get(field_name)
        return default if value is None else value

    def rank(self, factors: int | None) -> int:
        """The rank that the config says, which must be that of the factors, where these have one.

        Raises:
            ShapeError: They have another.
        """
        rank = int(self.said("r", 8, "rank_pattern"))
        if factors not in (None, rank) or rank < 1:
            raise ShapeError(
                "The factors have another rank than the config says",
                tensor=self.name,
                expected=rank,
                found=factors,
                hint=SAVE_AGAIN,
            )
        return rank

    def unscaled(self) -> Scale:
        """The scale of a change that has none.

        Raises:
            UsageError: The user gave one.
        """
        scale = self.scale(1.0, None, False, HAS_NONE)
        if scale.source.startswith("--"):
            raise UsageError("This tuner has no scale", tensor=self.name, hint=f"leave out {scale.source}")
        return scale


Changes = Iterator[Target | Replacement | RowReplacement]

Need = tuple[tuple[str, ...], ...]
"""Sets of parts of a module, one of which must be there whole; the empty one where there may be none of them."""


@dataclass(frozen=True)
class Tuner:
    """A PEFT type whose change of the weights is known.

    Attributes:
        type: The `peft_type` in configs.
        name: What people call it.
        source: Who described it, where.
        parts: Names of tensors after a module's name, without the adapter's own name and `.weight`.
        read: What the tensors of one module change.
        modules: What it is for, in words.
        methods: Every method that `read` may use.
        shared: Names of tensors of the whole model.
        idle: Those of the parts that change nothing: name → why.
        understood: Fields of the config that `read` looks at: name → what it says, with the test of its type.
        neutral: Fields that change nothing that is in the file: name → why.
        refused: Fields that change what cannot be done: name → why.
        unmergeable: Says why a file with this config and tensors of these names cannot be merged; None where it can.
        whole: Whether it holds parameters whole, instead of or beside changes.
        needs: Which of the parts a module must have; unless it is given, each that is not idle.
    """

    type: str
    name: str
    source: str
    parts: tuple[str, ...]
    read: Callable[[Module], Changes]
    modules: str = "linear layers"
    methods: tuple[Method, ...] = ()
    shared: tuple[str, ...] = ()
    idle: Mapping[str, str] = field(default_factory=dict)
    understood: Mapping[str, Field] = field(default_factory=dict)
    neutral: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    unmergeable: Callable[[Mapping[str, Any], Collection[str]], str | None] = lambda config, names: None
    whole: bool = False
    needs: tuple[Need, ...] | None = None

    def lacks(self, found: Collection[str]) -> str | None:
        """Say in words which parts a module lacks that has these; None where it has what it needs."""
        every: tuple[Need, ...] = tuple(((part,),) for part in self.parts if part not in self.idle)
        for sets in every if self.needs is None else self.needs:
            begun = [parts for parts in sets if not set(found).isdisjoint(parts)]
            if not begun and () not in sets:
                return ", or ".join(map(" and ".join, sets))
            if begun and not any(set(found).issuperset(parts) for parts in begun):
                return " and ".join(part for part in begun[0] if part not in found)
        return None


@dataclass(frozen=True)
class Field:
    """A field of a config that is understood.

    Attributes:
        says: What it says.
        type: In words, for errors.
        fits: Whether a value is of that type; null always is.
    """

    says: str
    type: str
    fits: Callable[[object], bool]


def number(says: str) -> Field:
    """A field that is a finite number."""
    return Field(says, "a number", _is_number)


def whole_number(says: str, least: int | None = None) -> Field:
    """A field that is a whole number, and maybe not below another."""
    words = "a whole number" if least is None else f"a whole number from {least} on"
    return Field(says, words, lambda value: _is_whole(value) and (least is None or value >= least))


def flag(says: str) -> Field:
    """A field that is true or false."""
    return Field(says, "true or false", lambda value: isinstance(value, bool))


def word(says: str, *words: str | bool) -> Field:
    """A field that is one of some words."""
    named = ", ".join(map(str, words))
    return Field(says, f"one of {named}", lambda value: any(value is w or value == w for w in words))


def pattern(says: str, of: Field) -> Field:
    """A field that maps patterns of names to values of another."""
    return Field(
        says, f"an object of values, each {of.type}", lambda v: isinstance(v, dict) and all(map(of.fits, v.values()))
    )


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 31


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e30 < value < 1e30
