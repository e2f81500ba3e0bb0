"""Whatever we read, safetensors reads alike; what only safetensors reads is on a list; what we write, both read."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path

import pytest
from header_cases import REFUSED, container, read, upstream
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from lora_cli.checkpoint.dtypes import DTYPES, DType
from lora_cli.checkpoint.header import HEADER_LIMIT, Header, TensorInfo, parse_header, render_header
from lora_cli.errors import LoraCliError

DATA = random.Random(7).randbytes(1 << 16)

ONLY_UPSTREAM_READS = {
    "The header does not start with '{'": "R010 white space before it",
    "A tensor stands twice in the header": "R018 the last one wins there",
    "A key stands twice in one object": "R021 inside the metadata, and R023 a superfluous field twice",
    "The entry of a tensor has a field without meaning": "R023",
    "The entry of a tensor is not an object": "an entry written as an array [dtype, shape, offsets]",
    "The dtype is not valid": 'a dtype written as an object {"U8": null}',
    "The size of the tensor overflows 64 bits": "R040, R041 a dimension of 0 before the others",
    "The shape is not valid": "R042 more than 64 dimensions",
    "The header is too long": "R007 between our limit and 100 MB",
    "The header is not valid JSON: nested more than": "R017 in a superfluous field, between 100 and 127",
}

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
names = texts.filter(lambda name: name != "__metadata__")
metadatas = st.none() | st.dictionaries(texts, texts, max_size=3)


@st.composite
def described_tensors(draw: st.DrawFn) -> tuple[str, DType, tuple[int, ...]]:
    dtype = draw(st.sampled_from(list(DTYPES.values())))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    if dtype.bits < 8:  # a multiple of four elements fills its bytes
        shape.append(4)
    return draw(names), dtype, tuple(shape)


tensor_lists = st.lists(described_tensors(), max_size=5, unique_by=lambda described: described[0])


@st.composite
def valid_files(draw: st.DrawFn) -> tuple[str, bytes]:
    """The header as text and the data of a valid file, written by no code under test."""
    entries, end = [], 0
    for name, dtype, shape in draw(tensor_lists):
        begin, end = end, end + math.prod(shape) * dtype.bits // 8
        fields = {"dtype": dtype.name, "shape": shape, "data_offsets": [begin, end]}
        entries.append((name, dict(draw(st.permutations(list(fields.items()))))))
    metadata = draw(metadatas)
    document: dict[str, object] = dict(draw(st.permutations(entries)))
    if metadata is not None:
        document["__metadata__"] = metadata
    style = draw(st.sampled_from([{"indent": 1}, {"separators": (",", ":")}, {"ensure_ascii": False}]))
    text = json.dumps(document, **style)  # type: ignore[arg-type]
    return text + " " * draw(st.integers(0, 9)), DATA[:end]


TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|\[[^\[\]"{}]*\]|-?\d+|\s+|.', re.DOTALL)
NUMBERS = ("-1", "0", "-0", "1", "2", "4", "1.0", "1e0", "01", "65", "1" * 25, "1e999", "null", "true", "NaN")
LISTS = (
    *("[]", "[1]", "[0]", "[0,0]", "[0,1]", "[0,4]", "[1,1]", "[2,0]", "[4,4]", "[0,0,0]", "[-1,-1]", "[1,[1]]"),
    *("[0.0]", "[-0]", "[true]", "[0,4294967296,4294967296]", "[4294967296,4294967296,0]", "[0,9223372036854775808]"),
    *("[0,1152921504606846975]", f"[{'1,' * 64}1]", f"[{'1,' * 63}0]", "{}", '"[1]"'),
)
STRINGS = (
    *('"U8"', '"I8"', '"F4"', '"F6_E2M3"', '"BOOL"', '"f32"', '"C128"', '""', '"\\u0000"', '"\\ud800"', '"\xe9"'),
    *('"dtype"', '"shape"', '"data_offsets"', '"data_offset\\u0073"', '"__metadata__"', '{"U8":null}', "null", "1"),
)
OTHERS = (
    *('"__metadata__":null,', '"__metadata__":{"a":"1","a":"2"},', '"x":{"x":1},', '"x":1,', '{"x":"y"}', '"t":1'),
    *('"t":["U8",[0],[0,0]],', '"x":' + "[" * 110 + "]" * 110 + ",", '"x":' + "[" * 130 + "]" * 130 + ",", "{}"),
    *("{", "}", "[", "]", ",", ":", "", " ", "\n", "\x0b", "\0", "\ufeff", "\\", "/**/", "0,", ",1"),
)


def like(token: str) -> st.SearchStrategy[str]:
    """Something that may stand for a token without breaking the JSON around it."""
    if token[0] == '"':
        return st.sampled_from(STRINGS)
    if token[0] == "[" and len(token) > 1:
        return st.sampled_from(LISTS)
    if token[0] in "-0123456789":
        return st.sampled_from(NUMBERS)
    return st.sampled_from(OTHERS).map(lambda other: token + other)


@st.composite
def damaged_files(draw: st.DrawFn) -> bytes:
    """A valid file with up to three tokens changed, an entry repeated, a byte flipped, or another length."""
    text, data = draw(valid_files())
    for _ in range(draw(st.integers(0, 3))):
        tokens: list[str] = TOKEN.findall(text)
        if draw(st.integers(0, 9)):
            place = draw(st.sampled_from([i for i, token in enumerate(tokens) if token[0] not in ":}] \n"] or [0]))
            tokens[place] = draw(like(tokens[place]))
        else:
            place = draw(st.integers(0, len(tokens) - 1))
            tokens[place] = draw(st.sampled_from(OTHERS) | st.sampled_from(tokens))
        text = "".join(tokens) or "{"
    entry = re.search(r'"[^"]*": ?\{[^{}]*\}', text)
    if entry and draw(st.integers(0, 9)) == 0:
        text = text[: entry.end()] + "," + entry[0] + text[entry.end() :]
    raw = bytearray(text.encode())
    if draw(st.integers(0, 9)) == 0:
        raw[draw(st.integers(0, len(raw) - 1))] ^= draw(st.integers(1, 255))
    length, data_length = len(raw), len(data)
    if draw(st.integers(0, 9)) == 0:
        length += draw(st.sampled_from([-1, 1]))
        data_length += draw(st.sampled_from([0, -8, -1, 1, 8]))
    return container(bytes(raw), DATA[: max(0, data_length)], length)


def assert_same_reading(ours: Header, content: bytes, path: Path) -> None:
    data = content[ours.data_start :]
    assert upstream(content) == {t.name: (t.dtype.name, t.shape, data[t.begin : t.end]) for t in ours.tensors}
    path.write_bytes(content)
    with safe_open(path, framework="np") as theirs:
        views = {name: theirs.get_slice(name) for name in theirs.keys()}  # noqa: SIM118 (it is no dict)
        found = {name: (view.get_dtype(), tuple(view.get_shape())) for name, view in views.items()}
        assert found == {t.name: (t.dtype.name, t.shape) for t in ours.tensors}
        assert theirs.metadata() == ours.metadata


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("headers") / "m.safetensors"


@settings(deadline=None)
@given(valid_files())
def test_valid_files_are_read_alike(path: Path, file: tuple[str, bytes]) -> None:
    content = container(*file)
    ours = read(content)
    assert_same_reading(ours, content, path)
    assert list(ours.tensors) == sorted(ours.tensors, key=lambda t: (t.begin, t.end, t.name))
    assert content.startswith(ours.prefix)
    assert ours.file_bytes == len(content)


@settings(deadline=None, max_examples=1000)
@given(damaged_files())
def test_damaged_files_are_read_alike_or_refused(path: Path, content: bytes) -> None:
    refusal = None
    try:
        ours = read(content)
    except LoraCliError as error:
        refusal = error.message
    if refusal is None:
        assert_same_reading(ours, content, path)
    elif upstream(content) is not None:
        assert refusal.startswith(tuple(ONLY_UPSTREAM_READS))


def test_every_difference_on_the_list_is_shown_by_a_case() -> None:
    shown = set()
    for case in REFUSED.values():
        if case.upstream_reads_it:
            with pytest.raises(LoraCliError) as caught:
                read(case.content)
            shown |= {known for known in ONLY_UPSTREAM_READS if caught.value.message.startswith(known)}
    too_long = container("{}" + " " * HEADER_LIMIT)
    assert upstream(too_long) == {}
    with pytest.raises(LoraCliError, match=r"^The header is too long"):
        read(too_long)
    assert shown | {"The header is too long"} == set(ONLY_UPSTREAM_READS)


@settings(deadline=None)
@given(tensor_lists, metadatas)
def test_rendered_headers_are_read_again(
    path: Path, tensors: list[tuple[str, DType, tuple[int, ...]]], metadata: dict[str, str] | None
) -> None:
    header = render_header(tensors, metadata)
    content = header.prefix + DATA[: header.file_bytes - header.data_start]
    assert len(content) == header.file_bytes
    assert header.data_start % 8 == 0
    assert len(header.raw) - len(header.raw.rstrip()) < 8
    assert header == parse_header(header.raw, header.file_bytes, file="x") == read(content)
    assert header == render_header(iter(tensors), metadata and dict(reversed(metadata.items())))
    assert_same_reading(header, content, path)
    by_name = {info.name: info for info in header.tensors}
    expected, end = [], 0
    for name, dtype, shape in tensors:
        begin, end = end, end + math.prod(shape) * dtype.bits // 8
        expected.append(TensorInfo(name, dtype, shape, begin, end))
    assert [by_name[name] for name, _, _ in tensors] == expected
    assert header.metadata == metadata


@settings(deadline=None)
@given(st.binary(max_size=80))
def test_nothing_but_a_refusal_escapes(content: bytes) -> None:
    for form in (content, container(content)):
        try:
            read(form)
        except LoraCliError:
            continue
        assert upstream(form) is not None
