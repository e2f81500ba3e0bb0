"""Regular expressions from files of strangers: matched in linear time, or refused.

Python's own engine can take exponential time on a pattern that was made for it; RE2 (Cox 2010, "Regular Expression
Matching in the Wild") cannot, and refuses what would need backtracking.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from lora_cli.errors import UnsupportedError

LONGEST = 2000
"""Characters of the longest pattern that is looked at."""


@lru_cache(maxsize=4096)
def untrusted(pattern: str, around: str = "{}") -> Callable[[str], bool]:
    """Compile a pattern from a file; the result says whether a name matches it from its start.

    Args:
        pattern: What the file says.
        around: What our own code puts around it.

    Raises:
        UnsupportedError: It is no regular expression, is too long, or needs backtracking.
    """
    import re2

    if len(pattern) > LONGEST:
        raise UnsupportedError("A pattern of the config is too long", found=pattern[:80])
    options = re2.Options()
    options.log_errors = False
    try:
        compiled = re2.compile(around.replace("{}", pattern), options)
    except re2.error as error:
        reason = error.args[0].decode("utf-8", "replace") if isinstance(error.args[0], bytes) else error.args[0]
        raise UnsupportedError(
            f"A pattern of the config is no regular expression that matches in linear time: {reason}",
            found=pattern[:80],
        ) from error
    return lambda name: compiled.match(name) is not None
