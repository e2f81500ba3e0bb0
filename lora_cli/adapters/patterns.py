"""Patterns on dotted names: what adapter configs say, and what people type.

Patterns from a file are not trusted: a regular expression whose time could explode is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lora_cli.errors import UsageError
from lora_cli.regex import untrusted


def peft_lookup(patterns: Mapping[str, Any], module: str) -> tuple[str, Any] | None:
    """Return the first entry, in dict order, that matches the module, as PEFT's `get_pattern_key` does.

    An entry that matches nothing as a pattern may still be the module's very name.

    Raises:
        UnsupportedError: A pattern is no regular expression, or could take forever.
    """
    for key, value in patterns.items():
        if untrusted(key, r"(.*\.)?({})$")(module):
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
