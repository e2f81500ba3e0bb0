"""Settling what an adapter's tensors leave open: shapes and layouts that only the parameter in the base tells."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lora_cli.adapters.adapter import Adapter, Delta, Parameter, Target
from lora_cli.adapters.conversions import architecture
from lora_cli.adapters.expert_deltas import LowRankExperts, OpenExperts
from lora_cli.adapters.expert_layout import Side
from lora_cli.adapters.formula import Formula
from lora_cli.adapters.layout import Orientation, by_architecture, settle_square
from lora_cli.adapters.region import Place
from lora_cli.errors import LoraCliError, ShapeError, UnsupportedError
from lora_cli.surgery.lying import Placed
from lora_cli.surgery.plan import LayoutUse


@dataclass
class Settled:
    """The targets of an adapter, each with its places, and nothing left open.

    Attributes:
        placed: Targets with their places; without those of which something is wrong.
        problems: What is wrong, in words.
        layouts: How factors of stacks are read, in words, and of how many of them.
        surprises: What a person should look at in that.
        guessed: Keys of square tensors that formulas are for, taken as stored (out × in) for want of any hint.
        said: `--orientation`.
    """

    placed: list[Placed] = field(default_factory=list)
    problems: list[tuple[type[LoraCliError], str]] = field(default_factory=list)
    layouts: Counter[str] = field(default_factory=Counter)
    surprises: list[str] = field(default_factory=list)
    guessed: list[str] = field(default_factory=list)
    said: Orientation | None = None

    @property
    def uses(self) -> tuple[LayoutUse, ...]:
        """How factors of stacks are read, for a plan."""
        return tuple(LayoutUse(words, count) for words, count in self.layouts.items())

    def note(self, target: Target, delta: Delta) -> None:
        """Keep what is to be told of a delta."""
        if isinstance(delta, LowRankExperts):
            self.layouts[delta.words] += 1
            self.surprises += [f"{target.name}: {delta.surprise}"] if delta.surprise else []


def settle(
    adapter: Adapter,
    places: Mapping[str, Sequence[Place]],
    shapes: Mapping[str, tuple[int, ...]],
    base_config: Mapping[str, Any],
    said: Orientation | None = None,
) -> Settled:
    """Tell every delta of an adapter of the parameter that it is for.

    Args:
        adapter: The adapter.
        places: Where the base stores each parameter, by the adapter's name for it.
        shapes: Shape of every tensor of the base, as the adapter finds it.
        base_config: The base's `config.json`.
        said: `--orientation`.
    """
    settled = Settled(said=said)
    sides = _sides(adapter, places, shapes, base_config)
    for target in _together(adapter, places, shapes, base_config, settled):
        found = places.get(target.name, ())
        delta: Delta | None = target.delta
        if found and not target.delta.stored:
            told = _as_others(target, sides, base_config)
            delta = _settled(adapter, told, found, shapes, base_config, settled)
        if delta is not None:
            now = target if delta is target.delta else replace(target, delta=delta)
            if found:
                settled.note(target, delta)
            settled.placed += [(now, place) for place in found]
    return settled


def _together(
    adapter: Adapter,
    places: Mapping[str, Sequence[Place]],
    shapes: Mapping[str, tuple[int, ...]],
    base_config: Mapping[str, Any],
    settled: Settled,
) -> Sequence[Target]:
    """The targets, with those told of all others that depend on these."""
    asking = [t for t in adapter.targets if isinstance(t.delta, Formula) and t.delta.method.together]
    lost = [target.name for target in asking if not places.get(target.name)]
    if lost:
        words = "the base lacks it, and what is made for the others depends on its shape"
        settled.problems += [(UnsupportedError, f"{name}: {words}") for name in lost]
        return [target for target in adapter.targets if target not in asking]
    if not asking:
        return adapter.targets
    parameters = [
        _parameter(adapter, target, places[target.name], shapes, base_config, settled.said).shape for target in asking
    ]
    told = {t.name: t.delta.among(parameters) for t in asking if isinstance(t.delta, Formula)}
    return [replace(target, delta=told.get(target.name, target.delta)) for target in adapter.targets]


_Sides = Mapping[Hashable, dict[Side, str]]
"""By the rule of their writer, the sides that A meets of stacks whose shapes say it, each with the name of one."""


def _sides(
    adapter: Adapter,
    places: Mapping[str, Sequence[Place]],
    shapes: Mapping[str, tuple[int, ...]],
    base_config: Mapping[str, Any],
) -> _Sides:
    found: defaultdict[Hashable, dict[Side, str]] = defaultdict(dict)
    for target in adapter.targets:
        delta = target.delta
        if isinstance(delta, OpenExperts) and places.get(target.name):
            side = delta.side_on(_parameter(adapter, target, places[target.name], shapes, base_config))
            if side is not None:
                found[delta.rule(base_config)].setdefault(side, target.name)
    return found


def _as_others(target: Target, sides: _Sides, base_config: Mapping[str, Any]) -> Target:
    """The target, told of the side that is met of others, where shapes say the same of all of them."""
    delta = target.delta
    known = list(sides.get(delta.rule(base_config), {}).items()) if isinstance(delta, OpenExperts) else []
    if not isinstance(delta, OpenExperts) or len(known) != 1:
        return target
    return replace(target, delta=replace(delta, told=replace(delta.told, others=known[0])))


def _settled(
    adapter: Adapter,
    target: Target,
    places: Sequence[Place],
    shapes: Mapping[str, tuple[int, ...]],
    base_config: Mapping[str, Any],
    settled: Settled,
) -> Delta | None:
    key = places[0].key
    parameter = _parameter(adapter, target, places, shapes, base_config, settled.said)
    matrix = len(parameter.shape) == 2 and not parameter.stack
    if isinstance(target.delta, Formula) and matrix and not any(place.region or place.turned for place in places):
        return _lying(adapter, target, parameter, key, settled)
    return _on(target, parameter, key, shapes[key], settled)


def _lying(adapter: Adapter, target: Target, parameter: Parameter, key: str, settled: Settled) -> Delta | None:
    """A formula for a matrix that may be stored either way: as it is said, or as its shape allows."""
    told = by_architecture(target, key, parameter.base_config)
    ways = [parameter]
    stored = parameter.shape[::-1] if parameter.transposed else parameter.shape
    if len({*stored}) > 1:
        ways.append(replace(parameter, shape=parameter.shape[::-1], transposed=not parameter.transposed))
    elif told is None and settled.said is None and adapter.transposed_hint is None:
        settled.guessed += [key] if architecture(parameter.base_config) is None else []
    fitting = [way for way in ways if _fits(target.delta, way)]
    return _on(target, (fitting or ways)[0], key, stored, settled)


def _fits(delta: Delta, parameter: Parameter) -> bool:
    try:
        delta.on(parameter)
    except ShapeError:
        return False
    except UnsupportedError:
        return True  # which is said later
    return True


def _on(target: Target, parameter: Parameter, key: str, stored: tuple[int, ...], settled: Settled) -> Delta | None:
    try:
        return target.delta.on(parameter)
    except LoraCliError as error:
        if isinstance(error, UnsupportedError):  # shapes have nothing to do with it
            settled.problems.append((type(error), f"{key}: {error.message}"))
            return None
        # The reason first: what a long line loses is its end.
        factors = ", ".join(f"{tensor.key} {list(tensor.shape)}" for tensor in target.delta.tensors)
        words = f"{key}: {error.message}; base {list(stored)}, adapter {factors}"
        settled.problems.append((type(error), words))
        return None


def _parameter(
    adapter: Adapter,
    target: Target,
    places: Sequence[Place],
    shapes: Mapping[str, tuple[int, ...]],
    base_config: Mapping[str, Any],
    said: Orientation | None = None,
) -> Parameter:
    """What a base tells of a parameter that lies in these places."""
    first = places[0]
    shape = shapes[first.key]
    if first.at is not None:
        shape = shape[1:]
    stack = first.matrix is not None or (len(shape) == 3 and target.delta.stack is not None)
    transposed = first.turned
    if not stack and len(shape) == 2 and not isinstance(target.delta, OpenExperts):
        told = by_architecture(target, first.key, base_config)
        transposed = transposed or bool(settle_square(adapter, told, set(), said))
    if transposed:
        shape = (*shape[:-2], shape[-1], shape[-2]) if len(shape) > 1 else shape
    outputs = sum(
        len(place.region.stored) for place in places if place.region is not None and place.matrix == first.matrix
    )
    if outputs:
        axis = len(shape) - 2 if stack and first.matrix is None else 0
        shape = (*shape[:axis], outputs, *shape[axis + 1 :])
    if first.matrix is not None:
        shape = (1 + max(place.matrix or 0 for place in places), *shape)
    return Parameter(shape, transposed, stack, base_config)


def matrices_in(stored: tuple[int, ...], delta: Delta, place: Place) -> int | None:
    """How many matrices a tensor of the base is a stack of, where a delta takes it as one."""
    if place.at is not None:
        return stored[0]
    return delta.stack if place.matrix is None else None
