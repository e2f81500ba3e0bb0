"""Tensors of a base that an adapter's config names, and of which its file holds nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from itertools import islice
from typing import Any

from lora_cli.adapters.adapter import Adapter
from lora_cli.adapters.patterns import endings
from lora_cli.surgery.plan import Plan

_COPIED = ("keep", "rename", "cast")
_CHOOSING = ("exclude_modules", "layers_to_transform", "layers_pattern")
"""Fields of a config that say which of the modules with a name are meant."""
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
_NAMED = 4


def passed_over(plan: Plan) -> Iterator[str]:
    """A warning for each adapter whose file lacks some of what its config names.

    PEFT trains every module that a list of names finds. So where an adapter changes some tensors of a base whose names
    are alike but for their numbers, and leaves others, part of its file is lost, or it was made for another base.
    Layers beyond those that the base's config counts are none that PEFT sees.
    """
    named = {position: names for position, adapter in enumerate(plan.opened) if (names := _names(adapter))}
    groups = _alike(plan) if named else {}
    for position, names in named.items():
        changed = _changed(plan, position, names)
        left: list[str] = []
        for pattern in dict.fromkeys(map(_pattern, changed)):
            numbers = [_first_number(key) for key in groups[pattern] if key in changed]
            ends = [end for end in _ends(plan.checkpoint.config) if all(number < end for number in numbers)]
            left += [
                key for key in groups[pattern] if key not in changed and all(_first_number(key) < end for end in ends)
            ]
        if left:
            more = f" and {len(left) - _NAMED:,} more" if len(left) > _NAMED else ""
            lost = "1 tensor stays as it is" if len(left) == 1 else f"{len(left):,} tensors stay as they are"
            yield (
                f"{plan.opened[position].label}: its config names modules of the base that its file holds nothing of, "
                f"and their {lost}: {', '.join(left[:_NAMED])}{more}"
            )


def _names(adapter: Adapter) -> list[str]:
    """The names in its config that each find the same modules in all layers; none where anything else has a say."""
    config = adapter.config
    if any(config.get(name) for name in _CHOOSING):
        return []
    said = [config.get(name) or [] for name in ("target_modules", "target_parameters")]
    if not all(isinstance(names, (list, tuple)) for names in said):
        return []
    return [str(name) for names in said for name in names if not any(map(str.isdecimal, str(name).split(".")))]


def _alike(plan: Plan) -> Mapping[str, list[str]]:
    """Keys of what may lack a change, by their pattern."""
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for edit in plan.edits:
        if edit.operation in _COPIED or edit.terms:
            groups[_pattern(edit.key)].append(edit.key)
    return groups


def _changed(plan: Plan, position: int, names: Collection[str]) -> Collection[str]:
    """Keys of what an adapter changes by deltas of modules that these names find, in order."""
    wanted = frozenset(names)  # a config may list a hundred thousand
    return dict.fromkeys(
        edit.key
        for edit in plan.edits
        for term in edit.terms
        if term.adapter == position
        and not (wanted.isdisjoint(endings(term.name)) and wanted.isdisjoint(endings(f"{term.name}.{term.parameter}")))
    )


def _pattern(key: str) -> str:
    """A key with * for each number in it."""
    return ".".join("*" if part.isdecimal() else part for part in key.split("."))


def _first_number(key: str) -> int:
    return next((int(part) for part in key.split(".") if part.isdecimal()), 0)


def _ends(config: Mapping[str, Any]) -> Iterator[int]:
    """How many layers the model has, or each of its models."""
    yield from (config[name] for name in _LAYERS if type(config.get(name)) is int)
    inner = (value for value in config.values() if isinstance(value, dict))
    yield from (end for level in islice(inner, 32) for end in _ends(level))
