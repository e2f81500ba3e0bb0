"""Results as JSON documents: values of ours to JSON values, and these to text. A plan can have millions of them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from functools import cache
from typing import Any


def rendered(value: object) -> str:
    """Return a result as a JSON document in ASCII, indented by two.

    Python's encoder is quick only without indentation, which is put in afterwards; and it takes values as they are,
    without a copy of all of them.
    """
    import msgspec

    try:
        text = json.dumps(value, default=unfolded, allow_nan=False)
    except ValueError:  # not-a-number or an infinity
        text = json.dumps(plain(value), allow_nan=False)
    try:
        return msgspec.json.format(text, indent=2)
    except msgspec.DecodeError:  # half a surrogate pair, as names of files that are no UTF-8 have them
        return json.dumps(json.loads(text), indent=2)


def plain(value: object) -> Any:
    """Turn a result into JSON values: dataclasses to objects, numbers that JSON lacks to strings."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return plain(unfolded(value))


def unfolded(value: object) -> Any:
    """Turn a value that JSON does not know into one that it knows, at its outermost level."""
    if hasattr(value, "as_dict"):
        return value.as_dict()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: getattr(value, name) for name in _fields(type(value))}
    if isinstance(value, Mapping):
        return {str(key): item for key, item in value.items()}
    return list(value) if isinstance(value, set | frozenset) else str(value)


@cache
def _fields(kind: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(kind))
