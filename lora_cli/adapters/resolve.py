"""Which base tensor each name of an adapter means.

The base's own keys are the only truth, and beside them the names that its model's modules have today: a spelling counts
when it turns every name of the adapter into one of these. One rewrite is chosen for the whole adapter; a name is
mapped, or it is unmapped and stands in the error with the keys nearest to it. Underscores are never turned into dots.
"""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from types import MappingProxyType
from typing import Any

from lora_cli.adapters.conversions import tables
from lora_cli.adapters.experts import Experts
from lora_cli.adapters.groups import Shaped
from lora_cli.adapters.names import First, Identity, Mapper, Prefix, Subtree
from lora_cli.adapters.operations import NoPlaceError
from lora_cli.adapters.region import Place, whole
from lora_cli.adapters.spelling import Spelling, spelling, writers
from lora_cli.errors import NamesError, UsageError

Rewrite = tuple[Mapper, ...]
"""Steps from adapter spelling to base spelling; a step that does not concern a name leaves it."""

NEAREST_SHOWN = 20
CANDIDATES = 500
"""Unmapped names for which the nearest keys are looked up, and keys that each is compared with."""

_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True, slots=True)
class Unmapped:
    """A name that no base key answers to.

    Attributes:
        name: The name.
        nearest: The keys that look most like it.
        told: What the user's maps made of it, if they did.
        reason: Why what the base holds of it is no place for it.
    """

    name: str
    nearest: tuple[str, ...]
    told: str | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Resolution:
    """What became of the names of one adapter.

    Attributes:
        rewrite: The common rewrite, from adapter spelling to base spelling, for people.
        places: Adapter name → where the base stores that parameter.
        unmapped: Names without a place.
    """

    rewrite: str
    places: Mapping[str, tuple[Place, ...]]
    unmapped: tuple[Unmapped, ...]

    @property
    def keys(self) -> dict[str, str]:
        """Adapter name → base key, of the parameters that the base stores as they are."""
        return {name: key for name, places in self.places.items() if (key := whole(places)) is not None}


def parse_maps(maps: Iterable[str]) -> tuple[Subtree, ...]:
    """Parse `--map OLD=NEW`: the adapter's module OLD, and all below it, is the base's NEW.

    Raises:
        UsageError: There is no `=`, or a side is empty.
    """
    leaves = []
    for text in maps:
        old, equals, new = text.partition("=")
        if not (equals and old and new):
            raise UsageError("A --map needs two names", found=text, expected="OLD=NEW")
        leaves.append(Subtree(old.removesuffix(".*"), new.removesuffix(".*")))
    return tuple(leaves)


def resolve(
    names: Sequence[str],
    base: Mapping[str, Shaped],
    *,
    config: Mapping[str, Any] = MappingProxyType({}),
    maps: Sequence[Subtree] = (),
    file: str = "",
) -> Resolution:
    """Find where the base holds each parameter.

    Args:
        names: Full parameter names in the adapter's spelling, such as `model.layers.0.q_proj.weight`.
        base: Tensors of the base by key, wrapped ones already folded.
        config: The base's `config.json`, for the names that its model's modules have.
        maps: What the user said with `--map`; these decide for the names they concern.
        file: The adapter's label, for messages.

    Raises:
        NamesError: Two rewrites fit and disagree, two names mean one key, or one name could mean two keys.
    """
    known = _Names(base, spelling(config, base))
    told = {name: new for name in names if (new := _told(name, maps)) is not None}
    rest = [name for name in names if name not in told]
    chosen, found = _choose(rest, known, file)
    by_map = known(list(told.values()))
    found |= {name: by_map[new] for name, new in told.items() if new in by_map}
    _refuse_doubles(found, file)
    lost = [name for name in names if name not in found]
    # The first few show what is wrong; looking for the neighbours of thousands would take minutes.
    near = {name: nearest(told.get(name, name), list(base)) for name in lost[:NEAREST_SHOWN]}
    unmapped = (
        Unmapped(name, near.get(name, ()), told.get(name), known.reason(told.get(name) or _rewritten(chosen, name)))
        for name in lost
    )
    described = "; ".join([*(str(leaf) for leaf in maps), _describe(chosen, found, known)])
    return Resolution(described, found, tuple(unmapped))


class _Names:
    """Every name that means a parameter of the base: its keys, today's names of modules, and older ones of these."""

    def __init__(self, base: Mapping[str, Shaped], spelled: Spelling) -> None:
        self.base = base
        self.spelled = spelled
        self._newest: dict[str, str] = {}
        self._stored: dict[str, tuple[Place, ...]] = {}
        self._experts = Experts(spelled.conversions, lambda key: tuple(base[key].shape), self._there)
        self._expert_places: dict[str, tuple[Place, ...] | None] = {}
        self._reasons: dict[str, str] = {}

    def __call__(self, names: Sequence[str]) -> dict[str, tuple[Place, ...]]:
        """Name → where it is; without those that mean nothing. Of many at once, which is quicker than one by one."""
        found = {name: places for name in names if (places := self._there(name)) is not None}
        if len(found) < len(names):
            older = [name for name in names if name not in found]
            for name, new in zip(older, self._names_now(older), strict=True):
                places = self._there(new) if new != name else None
                places = self._expert(new) if places is None else places
                if places is not None:
                    found[name] = places
        return found

    def _expert(self, name: str) -> tuple[Place, ...] | None:
        """Where an expert is that the base stores with others, or stored otherwise."""
        if name not in self._expert_places:
            places = None
            try:
                places = self._experts(name)
            except NoPlaceError as reason:
                self._reasons[name] = str(reason)
            self._expert_places[name] = places
        return self._expert_places[name]

    def _names_now(self, names: Sequence[str]) -> list[str]:
        """What modules of these names are called today."""
        new = [name for name in dict.fromkeys(names) if name not in self._newest]
        self._newest.update(zip(new, self.spelled.conversions.newest(new), strict=True))
        return [self._newest[name] for name in names]

    def _there(self, name: str) -> tuple[Place, ...] | None:
        key = _key_of(name, self.base)
        if key is not None and key not in self.spelled.otherwise:
            return self._stored.setdefault(key, (Place(key),))
        name = name if key is None else self.spelled.otherwise[key]
        key = _key_of(name, self.spelled.places) if self.spelled.places else None
        return self.spelled.places[key] if key is not None else None

    def is_stored(self, name: str) -> bool:
        """Whether it is a key of the base."""
        return _key_of(name, self.base) is not None

    def reason(self, name: str) -> str | None:
        """Why a parameter that the base holds has no place."""
        new = self._newest.get(name, name)
        reasons = (self.spelled.apart.get(parameter) for parameter in self._parameters(name, new))
        return next(filter(None, reasons), self._reasons.get(new))

    def _parameters(self, name: str, new: str) -> Iterator[str]:
        """What a name may mean in the model."""
        yield self.spelled.otherwise.get(_key_of(name, self.base) or "", new)
        yield from (part.parameter for part in self._experts.parts(new))

    def rewrites(self) -> list[Rewrite]:
        """Every rewrite from adapter to base spelling, simplest first."""
        table = writers()
        spellings = [(), *((mapper,) for mapper in [*_both_ways(table["backbones"]), *_families(table)])]
        spellings += [(mapper,) for mapper in self._into_parts()]
        rewrites: list[Rewrite] = [*spellings]
        for prefix in table["wrappers"]:
            # A wrapper's prefix stands before all others: it comes off first, and goes on last.
            rewrites += [(Prefix(prefix, ""), *steps) for steps in spellings]
            rewrites += [(*steps, Prefix("", prefix)) for steps in spellings]
        return sorted(rewrites, key=len)

    def _into_parts(self) -> Iterator[Mapper]:
        """From the names of a text model of its own to those of the same model inside this one."""
        for part in self.spelled.conversions.parts:
            if part.path and part.is_decoder and f"{part.path}." != part.prefix:
                yield Prefix(part.prefix, f"{part.path}.")
                yield Prefix("", f"{part.path}.")


def _told(name: str, maps: Sequence[Subtree]) -> str | None:
    return next((new for leaf in maps if (new := leaf(name)) is not None), None)


def nearest(name: str, keys: Sequence[str]) -> tuple[str, ...]:
    """Return up to two keys that look like `name`, sought among those with the same ending and the same numbers."""
    tail = ".".join(name.split(".")[-2:])
    numbers = _NUMBER.findall(name)
    same_end = [key for key in keys if key.endswith(tail)]
    same_numbers = [key for key in same_end if _NUMBER.findall(key) == numbers]
    candidates = (same_numbers or same_end or keys)[:CANDIDATES]
    return tuple(difflib.get_close_matches(name, candidates, n=2, cutoff=0.4))


def _choose(names: Sequence[str], known: _Names, file: str) -> tuple[Rewrite, dict[str, tuple[Place, ...]]]:
    """Take the rewrite that fits most names; names as they are win over any other that fits as many."""
    best: list[tuple[Rewrite, dict[str, tuple[Place, ...]]]] = []
    most = -1
    sample = sorted(names)[:: max(1, len(names) // 64)]  # whatever their order, the same ones
    for rewrite in known.rewrites():
        if best and not _apply(rewrite, sample, known):
            continue  # most rewrites concern none of the names; do not try them on all
        found = _apply(rewrite, names, known)
        if len(found) > most:
            most, best = len(found), []
        if len(found) == most and all(found != other for _, other in best):
            best.append((rewrite, found))
        if not rewrite and len(found) == len(names):
            break
    if most > 0 and len(best) > 1 and best[0][0]:
        raise NamesError(
            "The adapter's names fit the base in two ways",
            file=file,
            details=[
                f"{_steps(rewrite)}: {name} is {places[0].key}"
                for rewrite, found in best[:2]
                for name, places in islice(found.items(), 2)
            ],
            hint="say which with --map OLD=NEW",
        )
    return best[0] if most > 0 else ((), {})


def _apply(rewrite: Rewrite, names: Sequence[str], known: _Names) -> dict[str, tuple[Place, ...]]:
    spelled = [_rewritten(rewrite, name) for name in names]
    places = known(spelled)
    return {name: places[new] for name, new in zip(names, spelled, strict=True) if new in places}


def _rewritten(rewrite: Rewrite, name: str) -> str:
    for step in rewrite:
        changed = step(name)
        name = name if changed is None else changed
    return name


def _steps(rewrite: Rewrite) -> str:
    return ", then ".join(map(str, rewrite)) or str(Identity())


def _describe(rewrite: Rewrite, found: Iterable[str], known: _Names) -> str:
    """The rewrite for people: steps, and whether the names are those of modules, which the base stores otherwise."""
    if all(known.is_stored(_rewritten(rewrite, name)) for name in found):
        return _steps(rewrite)
    kind = known.spelled.conversions.kind
    modules = f"as the modules of {kind} are called in transformers {tables()['transformers']}"
    return ", then ".join([*map(str, rewrite), modules])


def _key_of(name: str, keys: Collection[str]) -> str | None:
    """The key itself; or, for bare matrices saved under their own name, the key without `.weight`."""
    bare = name.removesuffix(".weight")
    if name in keys and bare != name and bare in keys:
        raise NamesError("One name could mean two tensors of the base", tensor=name, found=f"{name} and {bare}")
    if name in keys:
        return name
    return bare if bare in keys else None


def _refuse_doubles(found: Mapping[str, tuple[Place, ...]], file: str) -> None:
    by_key: defaultdict[str, list[tuple[str, Place]]] = defaultdict(list)
    for name, places in found.items():
        for place in places:
            by_key[place.key].append((name, place))
    doubles = [
        f"{other} and {name} are both {key}"
        for key, several in by_key.items()
        if len(several) > 1
        for other, name in _doubles(several)
    ]
    if doubles:
        raise NamesError("Two names of the adapter mean one tensor of the base", file=file, details=doubles)


def _doubles(several: Sequence[tuple[str, Place]]) -> Iterator[tuple[str, str]]:
    """Names for the same of one tensor."""
    # By matrix: a layer may have hundreds of experts.
    seen: defaultdict[int | None, list[tuple[str, Place]]] = defaultdict(list)
    for name, place in several:
        near = [*seen.values()] if place.at is None else [seen[None], seen[place.at]]
        for others in near:
            for other, there in others:
                if there == place or there.region is None or place.region is None:
                    yield other, name
        seen[place.at].append((name, place))


def _both_ways(prefixes: Iterable[str]) -> Iterator[Mapper]:
    for prefix in prefixes:
        yield Prefix(prefix, "")
        yield Prefix("", prefix)


def _families(table: Mapping[str, Any]) -> Iterator[Mapper]:
    for family in table["families"]:
        there = First(tuple(Prefix(old, new) for old, new in family["rules"]))
        yield there
        yield there.inverse
