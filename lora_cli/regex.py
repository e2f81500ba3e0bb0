"""Regular expressions from files of strangers: matched in linear time, or refused.

Python's own engine can take exponential time on a pattern that was made for it; RE2 (Cox 2010, "Regular Expression
Matching in the Wild") cannot, and refuses what would need backtracking.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache

from lora_cli.errors import UnsupportedError

LONGEST = 2000
"""Characters of the longest pattern that is looked at."""

MOST = 250
"""Patterns of one field that are tried one after the other on every name; people write a few dozen."""

Matches = Callable[[str], bool]
"""Whether a name matches, from its start."""

_OTHERWISE = re.compile(r"\{,\d|\[\[:")
"""What RE2 takes, and takes for something else than Python does: {,3} and [[:alpha:]]."""


@lru_cache(maxsize=4096)
def untrusted(pattern: str, around: str = "{}", *, file: str | None = None, field: str | None = None) -> Matches:
    """Compile a pattern from a file; the result says whether a name matches it from its start.

    Args:
        pattern: What the file says.
        around: What our own code puts around it.
        file: The file, for messages.
        field: Which of its fields says it.

    Raises:
        UnsupportedError: It is no regular expression, is too long, or needs backtracking.
    """
    if len(pattern) > LONGEST:
        raise UnsupportedError(
            "A pattern is too long",
            file=file,
            tensor=field,
            expected=f"at most {LONGEST} characters",
            found=f"{len(pattern)}, which begin with {pattern[:40]}",
        )
    try:
        return linear(pattern, around)
    except ValueError as error:
        raise UnsupportedError(
            f"A pattern is no regular expression that matches in linear time: {error}",
            file=file,
            tensor=field,
            found=pattern[:80],
            hint="say it without lookaround, back-references and large repetitions",
        ) from error


def linear(pattern: str, around: str = "{}") -> Matches:
    """Compile a pattern for the engine that matches in linear time.

    Raises:
        ValueError: It does not take the pattern, or takes it for something else than Python would; says why.
    """
    import re2

    if different := _OTHERWISE.search(pattern):
        raise ValueError(f"{different[0]} does not mean the same everywhere")
    options = re2.Options()
    options.log_errors = False
    try:
        compiled = re2.compile(around.replace("{}", pattern), options)
    except re2.error as error:
        reason = error.args[0]
        words = reason.decode("utf-8", "replace") if isinstance(reason, bytes) else str(reason)
        raise ValueError(words[:100]) from error  # the engine repeats the whole pattern
    return lambda name: compiled.match(name) is not None
