"""What a merge does to a checkpoint besides adding to whole tensors of it, read off its plan."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from lora_cli.surgery.plan import Plan

_LONGEST = 60
"""Characters of a value that are told."""


@dataclass(frozen=True, slots=True)
class ConfigChange:
    """A field of config.json that says something else.

    Attributes:
        field: Its name, with those of the levels above it.
        before: What it said; None if it was not there.
        after: What it says; None if it is not there.
    """

    field: str
    before: Any
    after: Any


@dataclass(frozen=True, slots=True)
class Effects:
    """What a merge does besides adding to whole tensors.

    Attributes:
        lengths: How many tensors have the lengths of their outputs set (DoRA).
        multiplied: How many are multiplied, element by element.
        remade: How many are made of what they were, row by row.
        rows: Key → how many of its rows are replaced, of those that stay otherwise.
        parts: Key → the outputs that deltas change where these are not all: first, and one past the last.
        untied: Name that has a tensor of its own now → the key whose tensor it was before.
        layers: The former layer of each layer, where a model's layers are repeated or left out; else None.
        repeated: Keys under which tensors of the base are stored once more, for such layers.
        resized: Key → how many rows it had, and has.
        config: What config.json says otherwise.
    """

    lengths: int = 0
    multiplied: int = 0
    remade: int = 0
    rows: Mapping[str, int] = field(default_factory=dict)
    parts: Mapping[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    untied: Mapping[str, str] = field(default_factory=dict)
    layers: tuple[int, ...] | None = None
    repeated: tuple[str, ...] = ()
    resized: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    config: tuple[ConfigChange, ...] = ()

    def __bool__(self) -> bool:
        """Whether there is any."""
        return self != Effects()


def effects_of(plan: Plan) -> Effects:
    """Say what a plan does besides adding to whole tensors."""
    parts: defaultdict[str, set[tuple[int, int]]] = defaultdict(set)
    for edit in plan.edits:
        for term in edit.terms:
            if term.part:
                parts[edit.key].add(term.part)
    added = {entry.key for entry in plan.ledger if entry.outcome == "added"} | plan.untied.keys()
    rows = {edit.key: sum(len(rows.at) for rows in edit.rows) for edit in plan.edits if edit.rows}
    displaced = ((edit, edit.displaced) for edit in plan.edits if edit.displaced)
    sizes = {edit.key: (old.shape[0], edit.shape[0]) for edit, old in displaced if old.shape != edit.shape}
    # By name, as a receipt has them.
    return Effects(
        lengths=sum(1 for edit in plan.edits if any(term.delta.magnitude for term in edit.terms)),
        multiplied=sum(1 for edit in plan.edits if "gain" in edit.acts),
        remade=sum(1 for edit in plan.edits if "map" in edit.acts),
        rows=dict(sorted(rows.items())),
        parts={key: tuple(sorted(outputs)) for key, outputs in sorted(parts.items())},
        untied=dict(sorted(plan.untied.items())),
        layers=plan.layers,
        repeated=tuple(e.key for e in plan.edits if e.operation in ("repeat", "append") and e.key not in added),
        resized=dict(sorted(sizes.items())),
        config=tuple(_config_changes(plan)),
    )


def recalled(said: object) -> Effects | None:
    """The effects that a receipt tells of; None where it tells of none that make sense."""
    try:
        return msgspec.convert(said, Effects)
    except msgspec.ValidationError:
        return None


def lasting(effects: Effects) -> Iterator[str]:
    """Say what subtracting does not take back, a phrase for each."""
    for name in effects.untied:
        yield f"{name} has a tensor of its own"
    for key, (before, after) in effects.resized.items():
        yield f"{key} has {after} rows instead of {before}"
    if effects.layers is not None:
        yield f"the layers are {', '.join(map(str, effects.layers))} of the base"
    for change in effects.config:
        yield f"config.json says {change.field} {_value(change.after)}"


def not_said(effects: Effects, config: Mapping[str, Any]) -> Iterator[str]:
    """Say where a config is not what the merge makes it, a phrase for each field."""
    found = dict(_leaves(config))
    for change in effects.config:
        # Tools write the storage type under its new name or its old one.
        level, dot, name = change.field.rpartition(".")
        spellings = ("dtype", "torch_dtype") if name in ("dtype", "torch_dtype") else (name,)
        values = [found[place] for place in (f"{level}{dot}{spelling}" for spelling in spellings) if place in found]
        if change.after not in (values or [None]):
            there = _value(values[0]) if values else "not there"
            yield f"{change.field} is {there}; this merge makes it {_value(change.after)}"


def _value(value: Any) -> str:
    """A value as JSON, cut where it is long."""
    text = json.dumps(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _config_changes(plan: Plan) -> Iterator[ConfigChange]:
    config = next((side for side in plan.side_files if side.name == "config.json"), None)
    if config is None or config.data is None:
        return
    before, after = dict(_leaves(plan.checkpoint.config)), dict(_leaves(json.loads(config.data)))
    for name in dict.fromkeys((*before, *after)):
        if before.get(name) != after.get(name) or (name in before) != (name in after):
            yield ConfigChange(name, before.get(name), after.get(name))


def _leaves(level: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in level.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value
