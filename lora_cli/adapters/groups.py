"""Stored tensors that one conversion takes together, and where what it makes of them lies."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any, Protocol

from lora_cli.adapters.conversions import Conversion
from lora_cli.adapters.operations import STACKING, NoPlaceError, Operation, Pieces, followed, placed, stored
from lora_cli.adapters.region import Place

_SHOWN = 3


class Shaped(Protocol):
    """A tensor of which no more than the shape is asked."""

    @property
    def shape(self) -> tuple[int, ...]:
        """How long each side is."""
        ...


@dataclass
class Group:
    """The stored tensors that one converter takes together.

    Attributes:
        step: The converter.
        name: The first name of what it makes of them.
        sources: Position of a source → the keys that it found, each with its number.
    """

    step: Conversion
    name: str
    sources: defaultdict[int, list[tuple[str, int | None]]] = field(default_factory=lambda: defaultdict(list))

    @property
    def keys(self) -> list[str]:
        """All of them."""
        return [key for found in self.sources.values() for key, _ in found]

    @property
    def targets(self) -> list[str]:
        """The names of what it makes of them."""
        before, _, after = self.name.partition(self.step.targets[0])
        return [before + target + after for target in self.step.targets]

    @property
    def module(self) -> str:
        """What the first name begins with, up to the parameter."""
        return self.name.rpartition(".")[0]

    @property
    def stacks(self) -> bool:
        """Whether it makes one tensor of experts that are stored one by one."""
        return any(name in STACKING for name, _ in self.step.operations)

    @property
    def experts(self) -> int:
        """How many experts there are, by the highest number."""
        return 1 + max((n for found in self.sources.values() for _, n in found if n is not None), default=-1)

    def places(
        self, tensors: Mapping[str, Shaped], config: Mapping[str, Any], layer: Sequence[Group]
    ) -> dict[str, tuple[Place, ...]]:
        """Their places by name.

        Args:
            tensors: What is stored.
            config: The model's.
            layer: All groups of the same module.

        Raises:
            NoPlaceError: They have none.
        """
        missing = [source for number, source in enumerate(self.step.sources) if number not in self.sources]
        if missing and not self.stacks:
            raise NoPlaceError(f"the base lacks a part of it, {missing[0]}")
        if self.stacks:
            self._check_experts(max(group.experts for group in layer if group.stacks))
        given: dict[str, list[Pieces]] = {
            source: [stored(key, tuple(tensors[key].shape)) for key in self._ordered(number)]
            for number, source in enumerate(self.step.sources)
        }
        made = followed(self._operations(layer, tensors), given, self.step.targets, config)
        pieces = (made[target] for target in self.step.targets)
        return {name: placed(found) for name, found in zip(self.targets, pieces, strict=True)}

    def _ordered(self, source: int) -> list[str]:
        found = self.sources[source]
        if self.stacks:
            return [key for key, _ in sorted(found, key=lambda item: item[1] or 0)]
        return sorted((key for key, _ in found), key=_by_number)

    def _check_experts(self, experts: int) -> None:
        """Refuse a layer of which any expert is missing, or there twice.

        Raises:
            NoPlaceError: It is one; with the names of some.
        """
        lacking, lost = 0, []
        for number, source in enumerate(self.step.sources):
            there = [expert for _, expert in self.sources[number]]
            if None in there or len({*there}) < len(there):
                raise NoPlaceError(f"the base stores several tensors for one expert, {source}")
            lacking += experts - len(there)
            numbers = {*there}
            gaps = islice((n for n in count() if n not in numbers), min(_SHOWN, experts - len(there)))
            lost += [source.replace("*", str(n)) for n in gaps]
        if lacking:
            several = f" and {lacking - _SHOWN} more" if lacking > _SHOWN else ""
            words = ", ".join(name.replace("\\.", ".").removeprefix(".") for name in lost[:_SHOWN])
            raise NoPlaceError(f"the base lacks a part of it: {words}{several}")

    def _operations(self, layer: Sequence[Group], tensors: Mapping[str, Shaped]) -> list[Operation]:
        """The converter's operations, with those left out that shapes say are not to be done."""
        return [
            (name, {key: value for key, value in arguments.items() if key != "check_dims"})
            for name, arguments in self.step.operations
            if not arguments.get("check_dims") or self._is_turned(layer, tensors)
        ]

    def _is_turned(self, layer: Sequence[Group], tensors: Mapping[str, Shaped]) -> bool:
        """Whether experts lie (in × out) in a base that may have them either way; gate and down together say it.

        transformers compares each with the model, and so leaves a square one as it is.

        Raises:
            NoPlaceError: Shapes do not say it.
        """
        shapes = {g.name.rpartition(".")[2]: tuple(tensors[g.keys[0]].shape) for g in layer if len(g.keys) == 1}
        own = shapes.get(self.name.rpartition(".")[2], ())
        gate_up, down = (shapes.get(name, ()) for name in ("gate_up_proj", "down_proj"))
        if len(own) == len(gate_up) == len(down) == 3:
            usual = gate_up[1:] == (2 * down[2], down[1])
            turned = gate_up[1:] == (down[2], 2 * down[1])
            if usual or (turned and own[1] != own[2]):
                return turned
        raise NoPlaceError("shapes do not say which way round the base stores the experts of this layer")


def grouped(converters: Sequence[Conversion], names: Iterable[tuple[str, str]]) -> list[Group]:
    """Put keys together that belong to one parameter, or to several.

    Args:
        converters: Of these the first that concerns a name takes it.
        names: Keys, each with what it is called today.
    """
    groups: dict[str, Group] = {}
    for key, name in names if converters else ():
        for step in converters:
            found = step.numbered(name)
            if found is not None:
                groups.setdefault(found[0], Group(step, found[0])).sources[found[1]].append((key, found[2]))
                break
    return list(groups.values())


def _by_number(key: str) -> list[tuple[int, int, str]]:
    """In the order in which the parts of one tensor follow each other: 2 before 10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", key)]
