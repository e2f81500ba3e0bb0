"""JSON for bytes that nobody vouches for: headers, index files, configs.

Python's parser keeps the last of two equal keys, reads `NaN`, gives up on long integers with a ValueError
and on deep nesting with a RecursionError, and lets half a surrogate pair into a string. Two readers of one
file must never see two things, and a broken file must never look like a fault of the program: here each of
these is a MalformedFileError.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from typing import Any, NoReturn

from lora_cli.errors import MalformedFileError

DIGITS_LIMIT = 1_000
"""Longest number. Real configs hold 10^30 as an integer; much longer ones take quadratic time."""

DEPTH_LIMIT = 100
"""Deepest nesting: a limit of our own, lest the verdict depend on how deep the caller's stack already is."""

_MAYBE_HALF_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")
# Text as far as every \ud800…\udbff is followed by its other half.
_PAIRED_TEXT = re.compile(r"(?:[^\\]++|\\[^u]|\\u(?![dD][89a-fA-F])|\\u[dD][89abAB]..\\u[dD][c-fC-F]..)*+", re.DOTALL)


class RepeatedKeys(dict[str, Any]):
    """An object in which some key stands more than once; it holds the last value of each key.

    Attributes:
        repeated: The keys that stand more than once, in the order of their first appearance.
    """

    __slots__ = ("repeated",)
    repeated: tuple[str, ...]


def loads(data: bytes, *, file: object, limit: int, what: str, keep_repeated: bool = False) -> Any:
    """Parse one JSON document.

    `-0` is read as the float −0.0, as upstream does, so that it is nowhere taken for an integer.

    Args:
        data: The document: UTF-8 without a byte order mark.
        file: The file it comes from, for messages.
        limit: Most bytes that are parsed; each takes about 13 bytes of memory, or 50 in one made to harm.
        what: What messages call the document, such as "header".
        keep_repeated: Give back an object with repeated keys as RepeatedKeys instead of refusing it, for
            callers to whom it matters where it stands. Every other object is a plain dict.

    Raises:
        MalformedFileError: The document is too long or too deep, not UTF-8, not JSON, or it repeats a key.
    """
    if len(data) > limit:
        raise MalformedFileError(
            f"The {what} is too long",
            file=file,
            expected=f"at most {limit} bytes",
            found=f"{len(data)} bytes",
        )
    try:
        text = _decode(data)
        document = _parse(text, keep_repeated=keep_repeated)
        _check_depth(document)
        if _MAYBE_HALF_PAIR.search(data):
            _check_pairs(text)
    except _RefusedError as refusal:
        raise MalformedFileError(f"The {what} is not valid JSON: {refusal}", file=file) from None
    return document


class _RefusedError(Exception):
    """Why, to be continued by the caller who knows the file."""


def _decode(data: bytes) -> str:
    if data.startswith(b"\xef\xbb\xbf"):
        raise _RefusedError("it starts with a byte order mark")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise _RefusedError(f"not UTF-8 at byte {error.start}") from None


def _parse(text: str, *, keep_repeated: bool) -> Any:
    # A decoder of its own for each call: its memory of keys is not meant to be shared between threads.
    decoder = json.JSONDecoder(
        object_pairs_hook=_keep_repeated if keep_repeated else _refuse_repeated,
        parse_int=_integer,
        parse_float=_float,
        parse_constant=_refuse_constant,
    )
    try:
        return decoder.decode(text)
    except json.JSONDecodeError as error:
        why = error.msg.rstrip(": ").removesuffix(" at")
        position = len(text[: error.pos].encode())
        raise _RefusedError(f"{why[:1].lower()}{why[1:]} at byte {position}") from None
    except RecursionError:
        raise _RefusedError(_TOO_DEEP) from None


def _keep_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) == len(pairs):
        return document
    marked = RepeatedKeys(document)
    marked.repeated = tuple(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
    return marked


def _refuse_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = _keep_repeated(pairs)
    if isinstance(document, RepeatedKeys):
        raise _RefusedError(f"the key {document.repeated[0][:200]!a} stands twice in one object")
    return document


def _integer(digits: str) -> int | float:
    if len(digits) > DIGITS_LIMIT:
        raise _RefusedError(f"an integer of {len(digits)} characters")
    return int(digits) if digits != "-0" else -0.0


def _float(digits: str) -> float:
    number = float(digits) if len(digits) <= DIGITS_LIMIT else math.inf
    if math.isinf(number):
        raise _RefusedError("a number out of range")
    return number


def _refuse_constant(name: str) -> NoReturn:
    raise _RefusedError(f"{name} is no JSON number")


_NESTING = (dict, list)
_TOO_DEEP = f"nested more than {DEPTH_LIMIT} deep"


def _check_depth(document: object) -> None:
    """Refuse deep nesting, by taking away one outermost level after another."""
    level = [document] if isinstance(document, _NESTING) else []
    for _ in range(DEPTH_LIMIT):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, _NESTING)
        ]
        if not level:
            return
    raise _RefusedError(_TOO_DEEP)


def _check_pairs(text: str) -> None:
    """Refuse half a surrogate pair in valid JSON: it is no character, and no other reader takes it."""
    paired = _PAIRED_TEXT.match(text)
    end = paired.end() if paired else 0
    if end < len(text):
        raise _RefusedError(f"half a surrogate pair at byte {len(text[:end].encode())}")
