"""Which base tensor each name of an adapter means.

The base's own keys are the only truth: a spelling counts when it turns every name of the adapter into one of them. One
rewrite is chosen for the whole adapter; a name is mapped, or it is unmapped and stands in the error with the keys
nearest to it. Underscores are never turned into dots.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from itertools import islice
from typing import Any

from lora_cli.adapters.names import First, Identity, Mapper, Prefix, Subtree
from lora_cli.adapters.region import Place, whole
from lora_cli.errors import NamesError, UsageError

Rewrite = tuple[Mapper, ...]
"""Steps from adapter spelling to base spelling; a step that does not concern a name leaves it."""

NEAREST_SHOWN = 20
CANDIDATES = 500
"""Unmapped names for which the nearest keys are looked up, and keys that each is compared with."""

_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True, slots=True)
class Unmapped:
    """A name that no base key answers to, with the nearest keys, and what the user's maps made of it if they did."""

    name: str
    nearest: tuple[str, ...]
    told: str | None = None


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
    base_keys: Iterable[str],
    *,
    maps: Sequence[Subtree] = (),
    file: str = "",
) -> Resolution:
    """Find the base key of each name.

    Args:
        names: Full parameter names in the adapter's spelling, such as `model.layers.0.q_proj.weight`.
        base_keys: Keys of the base, wrapped ones already folded.
        maps: What the user said with `--map`; these decide for the names they concern.
        file: The adapter's label, for messages.

    Raises:
        NamesError: Two rewrites fit and disagree, two names mean one key, or one name could mean two keys.
    """
    ordered = list(base_keys)
    keys = set(ordered)
    told = {name: new for name in names if (new := _told(name, maps)) is not None}
    rest = [name for name in names if name not in told]
    chosen, found = _choose(rest, keys, file)
    for name, new in told.items():
        key = _key_of(new, keys)
        if key is not None:
            found[name] = key
    _refuse_doubles(found, file)
    lost = [name for name in names if name not in found]
    described = "; ".join([*(str(leaf) for leaf in maps), _describe(chosen)])
    # The first few show what is wrong; looking for the neighbours of thousands would take minutes.
    near = {name: nearest(told.get(name, name), ordered) for name in lost[:NEAREST_SHOWN]}
    places = {name: (Place(key),) for name, key in found.items()}
    return Resolution(described, places, tuple(Unmapped(name, near.get(name, ()), told.get(name)) for name in lost))


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


def _choose(names: Sequence[str], keys: set[str], file: str) -> tuple[Rewrite, dict[str, str]]:
    """Take the rewrite that fits most names; names as they are win over any other that fits as many."""
    best: list[tuple[Rewrite, dict[str, str]]] = []
    most = -1
    sample = names[:: max(1, len(names) // 64)]
    for rewrite in _rewrites():
        if best and not _apply(rewrite, sample, keys):
            continue  # most rewrites concern none of the names; do not try them on all
        found = _apply(rewrite, names, keys)
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
                f"{_describe(rewrite)}: {name} is {key}"
                for rewrite, found in best[:2]
                for name, key in islice(found.items(), 2)
            ],
            hint="say which with --map OLD=NEW",
        )
    return best[0] if most > 0 else ((), {})


def _apply(rewrite: Rewrite, names: Sequence[str], keys: set[str]) -> dict[str, str]:
    found = {}
    for name in names:
        new = name
        for step in rewrite:
            changed = step(new)
            new = new if changed is None else changed
        key = _key_of(new, keys)
        if key is not None:
            found[name] = key
    return found


def _describe(rewrite: Rewrite) -> str:
    return ", then ".join(map(str, rewrite)) or str(Identity())


def _key_of(name: str, keys: set[str]) -> str | None:
    """The key itself; or, for bare matrices saved under their own name, the key without `.weight`."""
    bare = name.removesuffix(".weight")
    if name in keys and bare != name and bare in keys:
        raise NamesError("One name could mean two tensors of the base", tensor=name, found=f"{name} and {bare}")
    if name in keys:
        return name
    return bare if bare in keys else None


def _refuse_doubles(found: Mapping[str, str], file: str) -> None:
    seen: dict[str, str] = {}
    doubles = []
    for name, key in found.items():
        if key in seen:
            doubles.append(f"{seen[key]} and {name} are both {key}")
        seen[key] = name
    if doubles:
        raise NamesError("Two names of the adapter mean one tensor of the base", file=file, details=doubles)


def tied_to(name: str) -> str | None:
    """The name under which a checkpoint stores what a model also reaches as `name`, where that is known."""
    for alias, stored in _table()["tied"]:
        if name == alias or name.endswith(f".{alias}"):
            return name.removesuffix(alias) + str(stored)
    return None


@lru_cache(maxsize=1)
def _table() -> Mapping[str, Any]:
    import yaml

    table: Mapping[str, Any] = yaml.safe_load((resources.files("lora_cli") / "data" / "names.yaml").read_text("utf-8"))
    return table


@lru_cache(maxsize=1)
def _rewrites() -> tuple[Rewrite, ...]:
    """Every rewrite from adapter to base spelling, simplest first."""
    table = _table()
    spellings: list[Rewrite] = [(), *((m,) for m in _both_ways(table["backbones"])), *((m,) for m in _families(table))]
    rewrites = [*spellings]
    for prefix in table["wrappers"]:
        # A wrapper's prefix stands before all others: it comes off first, and goes on last.
        rewrites += [(Prefix(prefix, ""), *spelling) for spelling in spellings]
        rewrites += [(*spelling, Prefix("", prefix)) for spelling in spellings]
    return tuple(sorted(rewrites, key=len))


def _both_ways(prefixes: Iterable[str]) -> Iterator[Mapper]:
    for prefix in prefixes:
        yield Prefix(prefix, "")
        yield Prefix("", prefix)


def _families(table: Mapping[str, Any]) -> Iterator[Mapper]:
    for family in table["families"]:
        there = First(tuple(Prefix(old, new) for old, new in family["rules"]))
        yield there
        yield there.inverse
