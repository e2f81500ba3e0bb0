"""Results as JSON: the same text as Python's own encoder gives, whatever is in them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cli.cli.document import plain, rendered


@dataclass(frozen=True)
class Inner:
    name: str
    shape: tuple[int, ...] = (2, 3)


@dataclass(frozen=True)
class Outer:
    inner: tuple[Inner, ...]
    by_name: Mapping[str, Inner]
    number: float = 0.5


class Own:
    def as_dict(self) -> dict[str, Any]:
        return {"inner": Inner("own"), "path": Path("a") / "b"}


OUTER = Outer((Inner("x"), Inner("é\n\\\x7f")), MappingProxyType({"k": Inner("")}))
AS_DICT = {
    "inner": [{"name": "x", "shape": [2, 3]}, {"name": "é\n\\\x7f", "shape": [2, 3]}],
    "by_name": {"k": {"name": "", "shape": [2, 3]}},
    "number": 0.5,
}
CASES: dict[str, tuple[object, Any]] = {
    "dataclasses": (OUTER, AS_DICT),
    "own": (Own(), {"inner": {"name": "own", "shape": [2, 3]}, "path": "a/b"}),
    "empty": ({"a": {}, "b": [], "c": (), "d": [[], {}]}, {"a": {}, "b": [], "c": [], "d": [[], {}]}),
    "sets": ({"a": frozenset({1})}, {"a": [1]}),
    "not finite": (
        {"a": [math.nan, math.inf, -math.inf], "b": Outer((), {}, math.nan)},
        {"a": ["nan", "inf", "-inf"], "b": {"inner": [], "by_name": {}, "number": "nan"}},
    ),
    "half a pair": ({"\udcff": OUTER}, {"\udcff": AS_DICT}),
    "half a pair, not finite": ({"\udcff": math.inf}, {"\udcff": "inf"}),
    "numbers": (
        [0, -1, 10**30, 1e300, 1e-300, -0.0, 1e16, True, None],
        [0, -1, 10**30, 1e300, 1e-300, -0.0, 1e16, True, None],
    ),
    "text in brackets": ({"[{,:}]": '"[{,:}]"'}, {"[{,:}]": '"[{,:}]"'}),
}


@pytest.mark.parametrize(("value", "expected"), CASES.values(), ids=CASES)
def test_every_value_has_one_text(value: object, expected: Any) -> None:
    text = rendered(value)
    assert text == json.dumps(expected, indent=2)
    assert text.isascii()
    assert plain(value) == expected


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None)
@given(values)
def test_what_json_knows_is_written_as_json_writes_it(value: object) -> None:
    assert rendered(value) == json.dumps(value, indent=2)
