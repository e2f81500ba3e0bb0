"""Patterns on dotted names: what adapter configs say, and what people type.

Patterns from a file are not trusted: a regular expression whose time could explode is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from lora_cli.errors import UnsupportedError, UsageError

_LONGEST = 2000
# A group that repeats and is itself repeated: (x+)+, (a|b*)*, (\w+\s?){2,}. Such patterns can take exponential time.
_NESTED_REPEAT = re.compile(r"\([^()]*[*+}][^()]*\)\s*[*+{]")


@lru_cache(maxsize=4096)
def _peft_pattern(key: str) -> re.Pattern[str]:
    if len(key) > _LONGEST or _NESTED_REPEAT.search(key):
        raise UnsupportedError("A pattern of the config could take forever to match", found=key[:80])
    try:
        return re.compile(rf"(.*\.)?({key})$")
    except re.error as error:
        raise UnsupportedError(f"A pattern of the config is no regular expression: {error}", found=key) from error


def peft_lookup(patterns: Mapping[str, Any], module: str) -> tuple[str, Any] | None:
    """Return the first entry, in dict order, that matches the module, as PEFT's `get_pattern_key` does."""
    for key, value in patterns.items():
        if _peft_pattern(key).match(module):
            return key, value
    return None


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
