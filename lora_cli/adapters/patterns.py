"""Patterns on dotted names: what adapter configs say, and what people type.

Patterns from a file are not trusted: a regular expression whose time could explode is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lora_cli.errors import UnsupportedError, UsageError

_LONGEST = 2000
_MOST_STEPS = 20_000_000
"""Steps that matching may take at worst: about a fifth of a second."""

_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\)[*+{]|[*+?{]", re.DOTALL)


@dataclass(frozen=True, slots=True)
class _PeftPattern:
    """A compiled pattern, and what its worst case depends on."""

    pattern: re.Pattern[str]
    repeats: int
    options: int

    def matches(self, module: str) -> bool:
        # Each repeat may start anywhere in the name, each optional part may be there or not. PEFT adds one of both.
        if len(module) ** (self.repeats + 1) * 2 ** (self.options + 1) > _MOST_STEPS:
            raise UnsupportedError(
                "A pattern of the config could take forever to match", found=self.pattern.pattern[:80], tensor=module
            )
        return self.pattern.match(module) is not None


@lru_cache(maxsize=4096)
def _peft_pattern(key: str) -> _PeftPattern:
    """Compile a pattern as PEFT does; refuse groups that repeat, whose time no simple bound holds."""
    tokens = [match[0] for match in _TOKEN.finditer(key)]
    if len(key) > _LONGEST or any(token[0] == ")" for token in tokens):
        raise UnsupportedError("A pattern of the config could take forever to match", found=key[:80])
    try:
        pattern = re.compile(rf"(.*\.)?({key})$")
    except (re.error, OverflowError) as error:
        raise UnsupportedError(f"A pattern of the config is no regular expression: {error}", found=key[:80]) from error
    return _PeftPattern(pattern, sum(map(tokens.count, "*+{")), tokens.count("?"))


def peft_lookup(patterns: Mapping[str, Any], module: str) -> tuple[str, Any] | None:
    """Return the first entry, in dict order, that matches the module, as PEFT's `get_pattern_key` does.

    An entry that matches nothing as a pattern may still be the module's very name.

    Raises:
        UnsupportedError: A pattern is no regular expression, or could take forever.
    """
    for key, value in patterns.items():
        if _peft_pattern(key).matches(module):
            return key, value
    return (module, patterns[module]) if module in patterns else None


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
