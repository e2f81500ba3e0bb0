"""The parameters of a model by the names that its modules have, with the places of a checkpoint that hold them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from typing import Any

from lora_cli.adapters.conversions import Conversions, conversions
from lora_cli.adapters.groups import Group, Shaped, grouped
from lora_cli.adapters.operations import NoPlaceError
from lora_cli.adapters.region import Place


@dataclass(frozen=True)
class Spelling:
    """What a checkpoint holds, in names of modules.

    Attributes:
        conversions: From its names to those of modules.
        places: Name of a parameter, where it is no key → what holds it.
        apart: Name of a parameter that nothing of it can be applied to → why.
        names: Key → name of the parameter that it is; without keys that are parts of one, or several.
        otherwise: Key → name of the parameter that it is, where that is its own name but the tensor lies otherwise.
    """

    conversions: Conversions = field(default_factory=Conversions)
    places: Mapping[str, tuple[Place, ...]] = field(default_factory=dict)
    apart: Mapping[str, str] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    otherwise: Mapping[str, str] = field(default_factory=dict)


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
    otherwise: dict[str, str] = {}
    alone = dict(zip(keys, names, strict=True))
    groups = grouped(known.converters, zip(keys, names, strict=True))
    layers: defaultdict[str, list[Group]] = defaultdict(list)
    for group in groups:
        layers[group.module].append(group)
    for group in groups:
        made = [alone.pop(key) for key in group.keys]
        if made == group.targets:
            otherwise[group.keys[0]] = made[0]
            places.pop(made[0], None)
        try:
            places.update(group.places(tensors, config, layers[group.module]))
        except NoPlaceError as reason:
            apart.update(dict.fromkeys(group.targets, str(reason)))
    otherwise = {key: name for key, name in otherwise.items() if places.get(name) != (Place(key),)}
    return Spelling(known, places, apart, alone, otherwise)


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
