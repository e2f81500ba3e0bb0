"""Names of single experts, and of one part of all of them, for bases that store the experts of a layer otherwise.

transformers 5 holds the experts of a layer as stacks: gate and up as one, `experts.gate_up_proj`, and
`experts.down_proj`. Adapters of older releases name each expert's matrix, such as `experts.3.gate_proj`, and those of
other trainers a stack of one part, such as `experts.w1`. All of these are rows of a matrix, or of each matrix, of what
the model holds.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from lora_cli.adapters.conversions import LONGEST, Conversion, Conversions
from lora_cli.adapters.operations import STACKING, NoPlaceError
from lora_cli.adapters.region import Place, Region

There = Callable[[str], tuple[Place, ...] | None]
"""Finds a parameter by the name that it has in the model."""

_NAMED = re.compile(r"(?P<module>(?:.*\.)?experts)\.(?:(?P<number>[0-9]{1,9})\.)?(?P<part>\w+?)(?:\.weight)?")
_PARTS: Mapping[str, tuple[tuple[str, int, int], ...]] = {
    "gate_proj": (("gate_up_proj", 0, 2),),
    "up_proj": (("gate_up_proj", 1, 2), ("up_proj", 0, 1)),
    "down_proj": (("down_proj", 0, 1),),
    "w1": (("gate_up_proj", 0, 2), ("up_proj", 0, 1)),
    "w3": (("gate_up_proj", 1, 2),),
    "w2": (("down_proj", 0, 1),),
}
"""What a part of an expert is called → parameters that may hold it, and which part of how many of its rows it is."""


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of what a model holds for all experts of a layer, outputs before inputs.

    Attributes:
        parameter: Its name in the model.
        matrix: Which expert; None for all of them.
        number: Which part of the rows.
        of: How many parts there are.
    """

    parameter: str
    matrix: int | None
    number: int
    of: int


class Experts:
    """Finds single experts, and parts of all of them, in a base that stores them otherwise.

    Args:
        conversions: Those of the base.
        shapes: Shape of a stored tensor by key.
        there: Finds what holds a parameter of the model.
    """

    def __init__(self, conversions: Conversions, shapes: Callable[[str], tuple[int, ...]], there: There) -> None:
        self._conversions = conversions
        self._stacking = [step for step in conversions.converters if any(n in STACKING for n, _ in step.operations)]
        self._shapes = shapes
        self._there = there
        self._stacks: dict[str, _Stack | None] = {}

    def __call__(self, name: str) -> tuple[Place, ...] | None:
        """Where an expert lies that has this name in newer or older releases; None where it means none.

        Raises:
            NoPlaceError: It is there, and not as rows of what is stored.
        """
        for part in self.parts(name):
            stack = self._stack(part.parameter)
            if stack is not None:
                return stack.places(part)
        return None

    def parts(self, name: str) -> Iterator[Part]:
        """What a name may mean: first as the model's own conversions say it."""
        if len(name) > LONGEST or "expert" not in name:
            return
        for step in self._stacking:
            found = step.numbered(name)
            if found is not None and found[2] is not None:
                yield from self._converted(step, found[0], found[1], found[2])
                break
        match = _NAMED.fullmatch(name)
        if match is not None:
            matrix = None if match["number"] is None else int(match["number"])
            for parameter, number, of in _PARTS.get(match["part"], ()):
                yield Part(f"{match['module']}.{parameter}", matrix, number, of)

    def _converted(self, step: Conversion, name: str, source: int, number: int) -> Iterator[Part]:
        """The experts of one list are those of the targets, one after the other."""
        before, _, after = name.partition(step.targets[0])
        for target in step.targets:
            stack = self._stack(before + target + after)
            if stack is None or number < stack.count:
                yield Part(before + target + after, number, source, len(step.sources))
                return
            number -= stack.count

    def _stack(self, parameter: str) -> _Stack | None:
        if parameter not in self._stacks:
            places = self._there(parameter)
            stack = None
            if places:
                shapes = {place.key: self._shapes(place.key) for place in places}
                stack = _Stack(places, shapes, self._conversions.experts(parameter.rpartition(".")[0]))
            self._stacks[parameter] = stack if stack is not None and stack.count else None
        return self._stacks[parameter]


class _Stack:
    """A parameter that has one matrix for each expert, and what holds it.

    Args:
        places: What holds it.
        shapes: Shapes of these tensors.
        lying: How its matrices lie; see `Conversions.experts`.
    """

    def __init__(
        self, places: Sequence[Place], shapes: Mapping[str, tuple[int, ...]], lying: Collection[str] | None
    ) -> None:
        self._lying = lying
        self._shapes = shapes
        self._by_matrix: defaultdict[int | None, list[Place]] = defaultdict(list)
        self._cuts: dict[tuple[int, int], list[Place]] = {}
        for place in places:
            self._by_matrix[place.matrix].append(place)
        shape = shapes[places[0].key]
        fused = shape[0] if len(shape) == 3 else 0
        self.count = fused if places[0].matrix is None else len(self._by_matrix)

    def places(self, part: Part) -> tuple[Place, ...]:
        """Where a part of it lies.

        Raises:
            NoPlaceError: It is not rows of what is stored, or nothing says which.
        """
        if part.matrix is not None and part.matrix >= self.count:
            raise NoPlaceError(f"the base has {self.count} experts in this layer")
        if None not in self._by_matrix:
            if part.matrix is not None:
                found = self._cut(self._by_matrix[part.matrix], part)
                return tuple(Place(place.key, place.region, place.turned, None, place.at) for place in found)
            return tuple(place for places in self._by_matrix.values() for place in self._cut(places, part))
        if (part.number, part.of) not in self._cuts:
            self._cuts[part.number, part.of] = self._cut(self._by_matrix[None], part)
        cuts = self._cuts[part.number, part.of]
        return tuple(Place(place.key, place.region, place.turned, None, part.matrix) for place in cuts)

    def _cut(self, places: Sequence[Place], part: Part) -> list[Place]:
        """Where some rows of one matrix, or of each, lie."""
        if self._lying is None:
            raise NoPlaceError("the base's config does not say which model it is, and how it holds experts")
        if "inputs_first" in self._lying:
            if any(place.region for place in places):
                raise NoPlaceError("the base stores its columns")
            places = [replace(place, turned=not place.turned) for place in places]
        regions = [place.region or _all(self._outputs(place)) for place in places]
        outputs = sum(len(region.stored) for region in regions)
        if outputs % part.of:
            raise NoPlaceError(f"the base stores {outputs} rows for {part.of} parts of an expert")
        if "alternating" in self._lying:
            wanted = range(part.number, outputs, part.of)
        else:
            wanted = range(outputs)[outputs // part.of * part.number : outputs // part.of * (part.number + 1)]
        cuts = [(place, cut) for place, region in zip(places, regions, strict=True) if (cut := _cut(region, wanted))]
        alone = len(cuts) == 1
        return [
            Place(place.key, None if alone and cut.is_whole else cut, place.turned, place.matrix, place.at)
            for place, cut in cuts
        ]

    def _outputs(self, place: Place) -> int:
        shape = self._shapes[place.key]
        return shape[-1] if place.turned else shape[-2]


@lru_cache(maxsize=1024)
def _all(outputs: int) -> Region:
    return Region((0, outputs), outputs, ((0, outputs, 1),))


@lru_cache(maxsize=1024)
def _cut(region: Region, wanted: range) -> Region | None:
    # Thousands of experts have the same few regions.
    try:
        return region.cut(wanted)
    except ValueError as error:
        raise NoPlaceError("the base stores its rows in turn with those of another one") from error
