"""The parameters of a model by the names that its modules have, with the places of a checkpoint that hold them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from typing import Any, Protocol

from lora_cli.adapters.conversions import Conversion, Conversions, conversions
from lora_cli.adapters.operations import EXPERTS, NoPlaceError, Pieces, followed, placed, stored
from lora_cli.adapters.region import Place


class Shaped(Protocol):
    """A tensor of which no more than the shape is asked."""

    @property
    def shape(self) -> tuple[int, ...]:
        """How long each side is."""
        ...


@dataclass(frozen=True)
class Spelling:
    """What a checkpoint holds, in names of modules.

    Attributes:
        conversions: From its names to those of modules.
        places: Name of a parameter, where it is no key → what holds it.
        apart: Name of a parameter that nothing of it can be applied to → why.
        names: Key → name of the parameter that it is; without keys that are parts of one, or several.
    """

    conversions: Conversions = field(default_factory=Conversions)
    places: Mapping[str, tuple[Place, ...]] = field(default_factory=dict)
    apart: Mapping[str, str] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)


def spelling(config: Mapping[str, Any], tensors: Mapping[str, Shaped]) -> Spelling:
    """Say how the modules of the model are called whose checkpoint this is.

    Args:
        config: Its `config.json`; of a model that the tables do not know nothing is said.
        tensors: Its tensors by key.
    """
    wrapper = wrapper_of(tensors)
    known = conversions(config)
    if not known.parts:
        return Spelling(names={key: key for key in tensors})
    keys = list(tensors)
    bare = [key.removeprefix(wrapper) for key in keys]
    known = known.for_files(bare)
    names = known.newest(bare)
    # What is only renamed; a converter's own source has this name in adapters of older releases.
    places: dict[str, tuple[Place, ...]] = {
        name: (Place(key),) for key, name in zip(keys, names, strict=True) if name != key
    }
    apart: dict[str, str] = {}
    alone = dict(zip(keys, names, strict=True))
    for group in _groups(known.converters, zip(keys, names, strict=True)):
        try:
            places.update(group.places(tensors, config))
        except NoPlaceError as reason:
            apart.update(dict.fromkeys(group.targets, str(reason)))
        for key in group.keys:
            del alone[key]
    return Spelling(known, places, apart, alone)


def wrapper_of(keys: Iterable[str]) -> str:
    """The prefix of a wrapper that stands before every one of these names; empty without one."""
    listed = list(keys)
    prefixes = (prefix for prefix in writers()["wrappers"] if all(key.startswith(prefix) for key in listed))
    return next(prefixes, "") if listed else ""


@lru_cache(maxsize=1)
def writers() -> Mapping[str, Any]:
    """How different programs spell the same module: what names.yaml says."""
    import yaml

    table: Mapping[str, Any] = yaml.safe_load((resources.files("lora_cli") / "data" / "names.yaml").read_text("utf-8"))
    return table


@dataclass
class _Group:
    """The stored tensors that one converter takes together."""

    step: Conversion
    name: str
    sources: defaultdict[int, list[str]] = field(default_factory=lambda: defaultdict(list))

    @property
    def keys(self) -> list[str]:
        """All of them."""
        return [key for found in self.sources.values() for key in found]

    @property
    def targets(self) -> list[str]:
        """The names of what it makes of them."""
        before, _, after = self.name.partition(self.step.targets[0])
        return [before + target + after for target in self.step.targets]

    def places(self, tensors: Mapping[str, Shaped], config: Mapping[str, Any]) -> dict[str, tuple[Place, ...]]:
        """Their places by name.

        Raises:
            NoPlaceError: They have none.
        """
        if any(name in EXPERTS for name, _ in self.step.operations):
            raise NoPlaceError("the base stores the experts of this layer one by one")
        missing = [source for number, source in enumerate(self.step.sources) if number not in self.sources]
        if missing:
            raise NoPlaceError(f"the base lacks a part of it, {missing[0]}")
        given: dict[str, list[Pieces]] = {
            source: [stored(key, tuple(tensors[key].shape)) for key in sorted(self.sources[number], key=_by_number)]
            for number, source in enumerate(self.step.sources)
        }
        made = followed(self.step.operations, given, self.step.targets, config)
        pieces = (made[target] for target in self.step.targets)
        return {name: placed(found) for name, found in zip(self.targets, pieces, strict=True)}


def _groups(converters: Sequence[Conversion], names: Iterable[tuple[str, str]]) -> list[_Group]:
    groups: dict[str, _Group] = {}
    for key, name in names if converters else ():
        for step in converters:
            found = step(name)
            if found is not None:
                groups.setdefault(found[0], _Group(step, found[0])).sources[found[1]].append(key)
                break
    return list(groups.values())


def _by_number(key: str) -> list[tuple[int, int, str]]:
    """In the order in which the parts of one tensor follow each other: 2 before 10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", key)]
