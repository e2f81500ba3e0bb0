"""Patterns on dotted names: what adapter configs say, and what people type.

Patterns from a file are not trusted: a regular expression whose time could explode is refused.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lora_cli.errors import UnsupportedError, UsageError
from lora_cli.regex import MOST, Matches, linear, untrusted


class PeftPatterns:
    """A `rank_pattern` or `alpha_pattern`: the first entry, in dict order, that matches a module counts.

    Each entry is a regular expression, as in PEFT's `get_pattern_key`. Most are plain names, of which there may be one
    for every module: those are looked up by the module's own endings instead of one after the other.

    Args:
        patterns: The entries.
        file: The file that has them, for messages.
        field: What they are called there.

    Raises:
        UnsupportedError: There are so many that trying them would take long.
    """

    def __init__(self, patterns: Mapping[str, Any], *, file: str | None = None, field: str | None = None) -> None:
        self._patterns = patterns
        self._file, self._field = file, field
        self._keys = list(patterns)
        self._endings, self._wholes = _Names(), _Names()
        self._regular: list[tuple[int, str]] = []
        self._compiled: dict[str, Matches] = {}
        self._first: dict[str, int] = {}
        for place, key in enumerate(self._keys):
            name = key.removeprefix("^")
            if _PLAIN.fullmatch(name):
                # After what stands around it, `^` is the start of the whole name.
                (self._endings if name == key else self._wholes).add(name, place)
            else:
                self._regular.append((place, key))
        tried = max(len(self._regular), self._endings.tried, self._wholes.tried)
        if tried > MOST:
            raise UnsupportedError(
                "There are too many patterns to try them all on every module",
                file=file,
                tensor=field,
                expected=f"at most {MOST} that are no plain names",
                found=tried,
            )

    def __len__(self) -> int:
        return len(self._keys)

    def first(self, module: str) -> tuple[str, Any] | None:
        """Return the entry for a module. One that matches nothing as a pattern may still be the module's very name.

        Raises:
            UnsupportedError: A pattern is no regular expression that matches in linear time.
        """
        if not self._keys:
            return None  # most configs have none, and there may be tens of thousands of modules
        place = self._first.get(module)
        if place is None:
            place = self._first[module] = self._first_place(module)
        if place < len(self._keys):
            return self._keys[place], self._patterns[self._keys[place]]
        return (module, self._patterns[module]) if module in self._patterns else None

    def _first_place(self, module: str) -> int:
        place = min(self._plain_places(module), default=len(self._keys))
        regular = (other for other, key in self._regular if other > place or self._matches(key, module))
        return min(place, next(regular, place))

    def all(self, module: str) -> list[Any]:
        """Return the values of all entries that match a module, in dict order."""
        regular = [place for place, key in self._regular if self._matches(key, module)]
        return [self._patterns[self._keys[place]] for place in sorted({*self._plain_places(module), *regular})]

    def _matches(self, key: str, module: str) -> bool:
        if key not in self._compiled:
            self._compiled[key] = untrusted(key, _AROUND, file=self._file, field=self._field)
        return self._compiled[key](module)

    def _plain_places(self, module: str) -> list[int]:
        places = list(self._wholes.places(module))
        if self._endings:
            places += [place for end in endings(module) for place in self._endings.places(end)]
        return places


class _Names:
    """Entries that are names. A dot that is not escaped stands for any character: it is blanked where it is."""

    def __init__(self) -> None:
        self._places: dict[tuple[tuple[int, ...], str], int] = {}
        self._blanks: defaultdict[int, set[tuple[int, ...]]] = defaultdict(set)

    def __len__(self) -> int:
        return len(self._places)

    @property
    def tried(self) -> int:
        """How many ways of blanking are tried at most: in real files, few for any length."""
        return max(map(len, self._blanks.values()), default=0)

    def add(self, entry: str, place: int) -> None:
        """Take up an entry that stands at this place."""
        name = entry.replace("\\.", "\0")
        blanks = tuple(at for at, character in enumerate(name) if character == ".")
        self._places.setdefault((blanks, _blanked(name.replace("\0", "."), blanks)), place)
        self._blanks[len(name)].add(blanks)

    def places(self, text: str) -> Iterator[int]:
        """Where the entries stand that match the whole text."""
        for blanks in self._blanks.get(len(text), ()):
            place = self._places.get((blanks, _blanked(text, blanks)))
            if place is not None:
                yield place


_AROUND = r"(.*\.)?({})$"
"""What PEFT puts around an entry: it matches a module's name, or the end of it after a dot."""

_PLAIN = re.compile(r"(?:\w|-|\\?\.)+", re.ASCII)
"""An entry that is a dotted name, its dots escaped or not."""


def _blanked(name: str, blanks: Iterable[int]) -> str:
    characters = list(name)
    for at in blanks:
        characters[at] = " "
    return "".join(characters)


def endings(name: str) -> Iterator[str]:
    """A dotted name, and what is left of it after each of its dots: what a list of names may call it."""
    yield name
    yield from (name[at + 1 :] for at, character in enumerate(name) if character == ".")


def peft_lookup(patterns: Mapping[str, Any], module: str) -> tuple[str, Any] | None:
    """Return the first entry of `patterns` that matches one module; see `PeftPatterns`."""
    return PeftPatterns(patterns).first(module)


def compile_user_pattern(pattern: str) -> Matches:
    """Compile what a person typed: a glob on dotted names, or a regular expression after `re:`.

    A glob is matched against whole names, or against their end after a dot: `q_proj` and `layers.0.*.q_proj` both find
    `model.layers.0.self_attn.q_proj`. `*` stays within a name's part, `**` crosses dots. What a person types may look
    around or back, which only Python's own engine does; everything else takes linear time.

    Raises:
        UsageError: The regular expression is broken, or the glob far too long.
    """
    body = body_of(pattern)
    try:
        re.compile(body)  # what stands around it must not be in the words of an error
        backtracking = re.compile(rf"(?:{body})\Z")
    except (re.error, RecursionError, OverflowError) as error:
        raise UsageError(f"The pattern is no regular expression: {error}", found=pattern[:200]) from error
    try:
        return linear(body, TO_THE_END)
    except ValueError as error:
        if not pattern.startswith("re:"):
            raise UsageError(f"The pattern cannot be used: {error}", found=pattern[:200]) from error
        return lambda name: backtracking.match(name) is not None


TO_THE_END = r"(?:{})\z"
"""What is put around a pattern that stands for whole names."""


def body_of(pattern: str) -> str:
    """The regular expression that a pattern of a person stands for."""
    return pattern[3:] if pattern.startswith("re:") else rf"(?s:(?:.*\.)?{_glob_body(pattern)})"


def _glob_body(pattern: str) -> str:
    parts = re.split(r"(\*\*|\*|\?)", pattern)
    meaning = {"**": ".*", "*": r"[^.]*", "?": r"[^.]"}
    return "".join(meaning.get(part, re.escape(part)) for part in parts)


def matches_any(patterns: Iterable[Matches], name: str) -> bool:
    """Whether any of the compiled patterns matches the name."""
    return any(matches(name) for matches in patterns)
