"""Patterns on dotted names: what adapter configs say, and what people type.

Patterns from a file are not trusted: a regular expression whose time could explode is refused.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from lora_cli.errors import UsageError
from lora_cli.regex import untrusted


class PeftPatterns:
    """A `rank_pattern` or `alpha_pattern`: the first entry, in dict order, that matches a module counts.

    Each entry is a regular expression, as in PEFT's `get_pattern_key`. Most are plain names, of which there may be one
    for every module: those are looked up by the module's own endings instead of one after the other.
    """

    def __init__(self, patterns: Mapping[str, Any]) -> None:
        self._patterns = patterns
        self._keys = list(patterns)
        self._regular = [(place, key) for place, key in enumerate(self._keys) if not _PLAIN.fullmatch(key)]
        # A dot that is not escaped stands for any character: names are compared with those places blanked.
        self._names: dict[tuple[tuple[int, ...], str], int] = {}
        self._blanks: defaultdict[int, set[tuple[int, ...]]] = defaultdict(set)
        for place, key in enumerate(self._keys):
            if _PLAIN.fullmatch(key):
                name = key.replace("\\.", "\0")
                blanks = tuple(at for at, character in enumerate(name) if character == ".")
                self._names.setdefault((blanks, _blanked(name.replace("\0", "."), blanks)), place)
                self._blanks[len(name)].add(blanks)

    def first(self, module: str) -> tuple[str, Any] | None:
        """Return the entry for a module. One that matches nothing as a pattern may still be the module's very name.

        Raises:
            UnsupportedError: A pattern is no regular expression that matches in linear time.
        """
        place = min(self._plain_places(module), default=len(self._keys))
        for other, key in self._regular:
            if other < place and untrusted(key, _AROUND)(module):
                place = other
                break
        if place < len(self._keys):
            return self._keys[place], self._patterns[self._keys[place]]
        return (module, self._patterns[module]) if module in self._patterns else None

    def all(self, module: str) -> list[Any]:
        """Return the values of all entries that match a module, in dict order."""
        regular = [place for place, key in self._regular if untrusted(key, _AROUND)(module)]
        return [self._patterns[self._keys[place]] for place in sorted({*self._plain_places(module), *regular})]

    def _plain_places(self, module: str) -> list[int]:
        endings = [module, *(module[match.end() :] for match in re.finditer(r"\.", module))]
        candidates = ((blanks, _blanked(end, blanks)) for end in endings for blanks in self._blanks.get(len(end), ()))
        return [self._names[candidate] for candidate in candidates if candidate in self._names]


_AROUND = r"(.*\.)?({})$"
"""What PEFT puts around an entry: it matches a module's name, or the end of it after a dot."""

_PLAIN = re.compile(r"(?:\w|-|\\?\.)+", re.ASCII)
"""An entry that is a dotted name, its dots escaped or not."""


def _blanked(name: str, blanks: Iterable[int]) -> str:
    characters = list(name)
    for at in blanks:
        characters[at] = " "
    return "".join(characters)


def peft_lookup(patterns: Mapping[str, Any], module: str) -> tuple[str, Any] | None:
    """Return the first entry of `patterns` that matches one module; see `PeftPatterns`."""
    return PeftPatterns(patterns).first(module)


def compile_user_pattern(pattern: str) -> re.Pattern[str]:
    """Compile what a person typed: a glob on dotted names, or a regular expression after `re:`.

    A glob is matched against whole names, or against their end after a dot: `q_proj` and `layers.0.*.q_proj` both find
    `model.layers.0.self_attn.q_proj`. `*` stays within a name's part, `**` crosses dots.

    Raises:
        UsageError: The regular expression is broken.
    """
    if not pattern.startswith("re:"):
        return re.compile(rf"(?:.*\.)?{_glob_body(pattern)}\Z", re.DOTALL)
    try:
        return re.compile(rf"(?:{pattern[3:]})\Z")
    except re.error as error:
        raise UsageError(f"The pattern is no regular expression: {error}", found=pattern) from error


def _glob_body(pattern: str) -> str:
    parts = re.split(r"(\*\*|\*|\?)", pattern)
    meaning = {"**": ".*", "*": r"[^.]*", "?": r"[^.]"}
    return "".join(meaning.get(part, re.escape(part)) for part in parts)


def matches_any(patterns: Iterable[re.Pattern[str]], name: str) -> bool:
    """Whether any of the compiled patterns matches the name."""
    return any(pattern.match(name) for pattern in patterns)
