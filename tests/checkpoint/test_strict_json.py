"""JSON from untrusted bytes: what two readers could take differently is refused, and nothing else escapes."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lora_cli.checkpoint import strict_json
from lora_cli.checkpoint.strict_json import DEPTH_LIMIT, DIGITS_LIMIT, RepeatedKeys
from lora_cli.errors import MalformedFileError


def loads(data: bytes, *, keep_repeated: bool = False) -> Any:
    return strict_json.loads(data, file="x.json", limit=1 << 20, what="config", keep_repeated=keep_repeated)


def refusal(data: bytes, **options: bool) -> MalformedFileError:
    with pytest.raises(MalformedFileError) as caught:
        loads(data, **options)
    return caught.value


REFUSED = [
    pytest.param(b'{"a": "\xff"}', "not UTF-8 at byte 7", id="bad byte"),
    pytest.param(b'"\xed\xa0\x80"', "not UTF-8 at byte 1", id="surrogate as bytes"),
    pytest.param('{"é": "'.encode() + b"\xc3", "not UTF-8 at byte 8", id="cut inside a character"),
    pytest.param("{}".encode("utf-16"), "not UTF-8 at byte 0", id="UTF-16"),
    pytest.param(b"\xef\xbb\xbf{}", "byte order mark", id="byte order mark"),
    pytest.param(b"", "expecting value at byte 0", id="empty"),
    pytest.param(b'{"a": 1', "expecting ',' delimiter at byte 7", id="cut short"),
    pytest.param('{"é": x}'.encode(), "expecting value at byte 7", id="position in bytes, not characters"),
    pytest.param(b"{} {}", "extra data at byte 3", id="two documents"),
    pytest.param(b"{}\0", "extra data at byte 2", id="NUL at the end"),
    pytest.param(b'{"a": 1,}', "at byte 8", id="trailing comma"),
    pytest.param(b"{'a': 1}", "at byte 1", id="single quotes"),
    pytest.param(b"[01]", "at byte 2", id="leading zero"),
    pytest.param(b'["\n"]', "invalid control character at byte 2", id="raw newline in a string"),
    pytest.param(b'["\\x"]', "invalid \\escape at byte 2", id="unknown escape"),
    pytest.param(b"[NaN]", "NaN is no JSON number", id="NaN"),
    pytest.param(b"[Infinity]", "Infinity is no JSON number", id="Infinity"),
    pytest.param(b"[-Infinity]", "-Infinity is no JSON number", id="minus Infinity"),
    pytest.param(b"[1e999]", "a number out of range", id="float that overflows"),
    pytest.param(b"[0." + b"1" * 5_000 + b"]", "a number out of range", id="float of 5,000 digits"),
    pytest.param(b"[" + b"1" * 5_000 + b"]", "an integer of 5000 characters", id="integer of 5,000 digits"),
    pytest.param(b"[" * 10_000 + b"]" * 10_000, "nested more than 100 deep", id="arrays 10,000 deep"),
    pytest.param(b'{"a":' * 10_000 + b"1" + b"}" * 10_000, "nested more than 100 deep", id="objects 10,000 deep"),
    pytest.param(b"[" * 100_000, "nested more than 100 deep", id="opened 100,000 times, never closed"),
    pytest.param(b'["\\ud800"]', "half a surrogate pair at byte 2", id="first half"),
    pytest.param(b'["\\uDC00"]', "half a surrogate pair at byte 2", id="second half"),
    pytest.param(b'["\\ude00\\ud83d"]', "half a surrogate pair at byte 2", id="halves swapped"),
    pytest.param(b'["\\ud83d\\ud83d\\ude00"]', "half a surrogate pair at byte 2", id="half before a pair"),
    pytest.param(b'["\\ud83d\\\\\\ude00"]', "half a surrogate pair at byte 2", id="halves around a backslash"),
    pytest.param('["é\\\\\\ud800"]'.encode(), "half a surrogate pair at byte 6", id="half after a backslash"),
    pytest.param(b'{"a": 1, "a": 1}', "the key 'a' stands twice", id="repeated key"),
    pytest.param(b'{"a": 1, "\\u0061": 2}', "the key 'a' stands twice", id="repeated key, once escaped"),
    pytest.param(b'[[{"b": {"": 1, "c": 2, "": 3}}]]', "the key '' stands twice", id="repeated key deep inside"),
]


@pytest.mark.parametrize(("data", "fragment"), REFUSED)
@pytest.mark.parametrize("keep_repeated", [False, True])
def test_refused(data: bytes, fragment: str, keep_repeated: bool) -> None:
    if keep_repeated and "stands twice" in fragment:
        loads(data, keep_repeated=True)
        return
    error = refusal(data, keep_repeated=keep_repeated)
    assert error.message.startswith("The config is not valid JSON: ")
    assert fragment in error.message
    assert not error.message.endswith(".")
    assert error.file == "x.json"


ACCEPTED = [
    pytest.param(b" \t\r\n{ } \n", {}, id="white space around"),
    pytest.param(b'{"a": [1, -2, 0.5, true, false, null, ""]}', {"a": [1, -2, 0.5, True, False, None, ""]}, id="all"),
    pytest.param(b"[" + b"9" * DIGITS_LIMIT + b"]", [10**DIGITS_LIMIT - 1], id="longest integer"),
    pytest.param(b"[1e30]", [1e30], id="exponent"),
    pytest.param(b'["\\ud83d\\ude00\\u00e9\\n\\\\ud800"]', ["😀é\n\\ud800"], id="pairs and escaped backslashes"),
    pytest.param(b'{"' + b"[" * 500 + b'": "' + b'\\"[' * 500 + b'"}', {"[" * 500: '"[' * 500}, id="brackets in text"),
    pytest.param(b"[" + b"[]," * 500 + b"{}]", [[]] * 500 + [{}], id="many brackets, not deep"),
    pytest.param(b'[{"a": 1}, {"a": 1}]', [{"a": 1}, {"a": 1}], id="one key in two objects"),
    pytest.param(b'{"a": 1, "A": 2, "\xc3\xa9": 3, "e\xcc\x81": 4}', {"a": 1, "A": 2, "é": 3, "e\u0301": 4}, id="keys"),
]


@pytest.mark.parametrize(("data", "document"), ACCEPTED)
def test_accepted(data: bytes, document: object) -> None:
    assert loads(data) == document


def test_depth_limit_is_exact() -> None:
    for left, right in ((b"[", b"]"), (b'{"a":', b"}")):
        assert loads(left * DEPTH_LIMIT + b"1" + right * DEPTH_LIMIT)
        assert loads(b"[[]," + left * (DEPTH_LIMIT - 1) + b"1" + right * (DEPTH_LIMIT - 1) + b"]")
        assert "deep" in refusal(left * (DEPTH_LIMIT + 1) + b"1" + right * (DEPTH_LIMIT + 1)).message


def test_digits_limit_is_exact() -> None:
    assert loads(b"9" * DIGITS_LIMIT) == 10**DIGITS_LIMIT - 1
    assert "integer" in refusal(b"9" * (DIGITS_LIMIT + 1)).message


def test_integers_do_not_depend_on_the_limit_of_the_interpreter() -> None:
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        assert "integer" in refusal(b"9" * 5_000).message
    finally:
        sys.set_int_max_str_digits(before)


def test_minus_zero_is_no_integer() -> None:
    number = loads(b"-0")
    assert type(number) is float
    assert str(number) == "-0.0"


def test_size_limit_is_exact_and_comes_first() -> None:
    assert strict_json.loads(b"[1]", file="x", limit=3, what="index") == [1]
    with pytest.raises(MalformedFileError, match=r"^The index is too long") as caught:
        strict_json.loads(b"\xff" * 4, file="x", limit=3, what="index")
    assert (caught.value.expected, caught.value.found) == ("at most 3 bytes", "4 bytes")


def test_repeated_keys_can_be_kept_where_they_stand() -> None:
    document = loads(b'{"x": {"b": 1, "a": 2, "a": 3, "b": 4, "a": 5, "c": 6}, "y": {"a": 1}}', keep_repeated=True)
    assert type(document) is dict
    assert isinstance(document["x"], RepeatedKeys)
    assert document["x"] == {"b": 4, "a": 5, "c": 6}
    assert document["x"].repeated == ("b", "a")
    assert type(document["y"]) is dict


@settings(deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
        max_leaves=12,
    ),
    st.booleans(),
)
def test_reads_what_json_writes(document: object, ascii_only: bool) -> None:
    try:
        data = json.dumps(document, ensure_ascii=ascii_only).encode()
    except UnicodeEncodeError:
        return
    assert loads(data) == json.loads(data)


@settings(deadline=None)
@given(st.binary(max_size=60) | st.text(alphabet='[]{}",:\\ud8dc0-1eE.NI ntf\n', max_size=60).map(str.encode))
@example(b'"\\ud800\\')
def test_nothing_but_a_refusal_escapes(data: bytes) -> None:
    try:
        document = loads(data)
    except MalformedFileError:
        return
    assert document == json.loads(data)
    json.dumps(document, ensure_ascii=False).encode()
