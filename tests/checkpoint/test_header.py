"""The header of a safetensors file, byte for byte: what is refused and why, what is accepted, what is written."""

from __future__ import annotations

import copy
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
from header_cases import OK, REFUSED, Refused, container, one, read, u8, upstream
from safetensors import safe_open
from safetensors.numpy import save

from lora_cli.checkpoint.dtypes import DTYPES
from lora_cli.checkpoint.header import (
    HEADER_LIMIT,
    RANK_LIMIT,
    Header,
    TensorInfo,
    parse_header,
    read_header_length,
    render_header,
)
from lora_cli.errors import LoraCliError, MalformedFileError, UsageError

U8, F32, F4 = DTYPES["U8"], DTYPES["F32"], DTYPES["F4"]


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_refused(case: Refused) -> None:
    with pytest.raises(LoraCliError) as caught:
        read(case.content)
    error = caught.value
    assert type(error) is case.error
    said = [str(part) for part in (error.message, error.tensor, error.expected, error.found, error.hint)]
    for fragment in case.fragment.split("|"):
        assert any(fragment == part or (len(fragment) > 2 and fragment in part) for part in said), (fragment, said)
    assert error.file == "m.safetensors"
    assert not error.message.endswith(".")
    assert max(map(len, said)) < 600
    assert (upstream(case.content) is not None) == case.upstream_reads_it


EMPTY = '{"dtype":"F32","shape":[0,3],"data_offsets":[%d,%d]}'
WIDEST = 2**60 - 1
"""Most bytes whose bits can be counted in 63 bits."""

ACCEPTED = {
    "R011 trailing spaces": (container(OK + "  ", b"\1"), [TensorInfo("t", U8, (1,), 0, 1)]),
    "R012 trailing newline, tab, return": (container(OK + "\n\t\r", b"\1"), [TensorInfo("t", U8, (1,), 0, 1)]),
    "R016 white space inside": (container("{ \n" + OK[1:], b"\1"), [TensorInfo("t", U8, (1,), 0, 1)]),
    "R026 F4 that fills its bytes": (one('"F4"', "[2,3]", "[0,3]", b"123"), [TensorInfo("t", F4, (2, 3), 0, 3)]),
    "R041 largest dimension": (
        one(shape=f"[{WIDEST},0]", offsets="[0,0]", data=b""),
        [TensorInfo("t", U8, (WIDEST, 0), 0, 0)],
    ),
    "R042 highest rank": (
        one(shape="[" + ",".join(["1"] * RANK_LIMIT) + "]"),
        [TensorInfo("t", U8, (1,) * RANK_LIMIT, 0, 1)],
    ),
    "R043 scalar": (one('"F32"', "[]", "[0,4]", b"1234"), [TensorInfo("t", F32, (), 0, 4)]),
    "R043 no elements": (one('"F32"', "[0]", "[0,0]", b""), [TensorInfo("t", F32, (0,), 0, 0)]),
    "R044 empty tensors share offsets with others": (
        container(
            f'{{"z":{EMPTY % (1, 1)},"t":{u8(0, 1)},"b":{EMPTY % (0, 0)},"a":{EMPTY % (0, 0)},"u":{u8(1, 3)}}}', b"123"
        ),
        [
            TensorInfo("a", F32, (0, 3), 0, 0),
            TensorInfo("b", F32, (0, 3), 0, 0),
            TensorInfo("t", U8, (1,), 0, 1),
            TensorInfo("z", F32, (0, 3), 1, 1),
            TensorInfo("u", U8, (2,), 1, 3),
        ],
    ),
    "R045 empty name": (container(f'{{"":{u8(0, 1)}}}', b"\1"), [TensorInfo("", U8, (1,), 0, 1)]),
    "R045 control characters in a name": (
        container(f'{{"\\u001b[2J\\u0000":{u8(0, 1)}}}', b"\1"),
        [TensorInfo("\x1b[2J\0", U8, (1,), 0, 1)],
    ),
    "R047 no tensors": (container("{}      "), []),
    "R047 only metadata": (container('{"__metadata__":{"format":"pt"}}'), []),
    "R049 name of 10 MB": (
        container(f'{{"{"n" * 10_000_000}":{u8(0, 1)}}}', b"\1"),
        [TensorInfo("n" * 10_000_000, U8, (1,), 0, 1)],
    ),
    "R050 unaligned": (
        container(f'{{"t":{u8(0, 1)},"f":{{"data_offsets":[1,5],"shape":[1],"dtype":"F32"}}}}', b"12345"),
        [TensorInfo("t", U8, (1,), 0, 1), TensorInfo("f", F32, (1,), 1, 5)],
    ),
    "R051 a BOOL of 2": (one('"BOOL"', data=b"\2"), [TensorInfo("t", DTYPES["BOOL"], (1,), 0, 1)]),
    "R073 names that differ in normal form": (
        container(f'{{"\u00e9":{u8(0, 1)},"e\u0301":{u8(1, 2)}}}', b"12"),
        [TensorInfo("\u00e9", U8, (1,), 0, 1), TensorInfo("e\u0301", U8, (1,), 1, 2)],
    ),
}


@pytest.mark.parametrize(("content", "tensors"), ACCEPTED.values(), ids=ACCEPTED.keys())
def test_accepted(content: bytes, tensors: list[TensorInfo]) -> None:
    header = read(content)
    assert list(header.tensors) == tensors
    data = content[header.data_start :]
    assert upstream(content) == {t.name: (t.dtype.name, t.shape, data[t.begin : t.end]) for t in tensors}
    # Written again, the file begins with the same bytes.
    assert content.startswith(header.prefix)
    assert header.file_bytes == len(content)


@pytest.mark.parametrize(
    ("text", "metadata"),
    [
        pytest.param("{}", None, id="none"),
        pytest.param('{"__metadata__":null}', None, id="R027 null"),
        pytest.param('{"__metadata__":{}}', {}, id="empty"),
        pytest.param(
            '{"__metadata\\u005f_":{"b":"1","a":"\\u0000\u00e9"}}', {"b": "1", "a": "\0\u00e9"}, id="any text"
        ),
    ],
)
def test_metadata(text: str, metadata: dict[str, str] | None, tmp_path: Path) -> None:
    assert read(container(text)).metadata == metadata
    (tmp_path / "m.safetensors").write_bytes(container(text))
    with safe_open(tmp_path / "m.safetensors", framework="np") as theirs:
        assert theirs.metadata() == metadata


def test_r006_header_over_the_limit_is_refused_by_its_length_alone() -> None:
    assert HEADER_LIMIT == 32 << 20
    assert read_header_length(HEADER_LIMIT.to_bytes(8, "little"), 1 << 50, file="x") == HEADER_LIMIT
    with pytest.raises(MalformedFileError, match="header is too long") as caught:
        read_header_length((HEADER_LIMIT + 1).to_bytes(8, "little"), 1 << 50, file="x")
    assert caught.value.found == f"{HEADER_LIMIT + 1} bytes"


def test_r007_header_exactly_at_the_limit() -> None:
    content = container(OK, b"\1")
    assert read(content, limit=len(OK)).tensors
    with pytest.raises(MalformedFileError, match="header is too long"):
        read(content, limit=len(OK) - 1)
    with pytest.raises(MalformedFileError, match="header is too long"):
        parse_header(OK.encode(), len(content), file="x", limit=len(OK) - 1)


def test_r048_the_limit_holds_many_tensors_but_not_any_number() -> None:
    entry = len('"000000":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},')
    assert 800_000 * entry > HEADER_LIMIT > 250_000 * entry * 2


def test_r053_flipped_payload_bit_leaves_the_header_alone() -> None:
    assert read(container(OK, b"\1")) == read(container(OK, b"\3"))


def test_other_formats_are_recognised_only_after_the_length_is_refused() -> None:
    length = int.from_bytes(b"\x80\2\0\0\0\0\0\0", "little")
    assert read(container(OK + " " * (length - len(OK)), b"\1")).tensors


def test_rank_limit() -> None:
    assert RANK_LIMIT == 64


def test_short_first_bytes_are_a_short_file() -> None:
    with pytest.raises(MalformedFileError, match="too short"):
        read_header_length(b"\2", 100, file="x")


def test_headers_are_values() -> None:
    fields = '{"dtype":"F32","shape":[2,3],"data_offsets":[1,25]}'
    header = read(container(f'{{"__metadata__":{{"a":"b"}},"t":{u8(0, 1)},"f":{fields}}}', bytes(25)))
    again = pickle.loads(pickle.dumps(header))  # noqa: S301 (written one line above)
    assert again == copy.deepcopy(header) == header
    assert (header.tensors[1].nbytes, header.tensors[1].elements) == (24, 6)
    with pytest.raises(AttributeError):
        header.raw = b""  # type: ignore[misc]


def test_sixty_thousand_tensors_over_two_hundred_headers_take_a_moment() -> None:
    size = 4096 * 14336 * 2
    entries = (
        f'"model.layers.{i}.mlp.experts.{i}.down_proj.weight":{{"dtype":"BF16","shape":[4096,14336],'
        f'"data_offsets":[{i * size},{(i + 1) * size}]}}'
        for i in range(300)
    )
    raw = ("{" + ",".join(entries) + "}").encode()
    file_size = 8 + len(raw) + 300 * size
    start = time.thread_time()  # of this thread: other work on the machine does not count
    for _ in range(200):
        parse_header(raw, file_size, file="x")
    assert time.thread_time() - start < 1.5


def test_rendered_bytes_are_these() -> None:
    header = render_header([("b", F32, (2, 1)), ("a\n\u00e9", U8, ()), ("c", F4, (0,))], {"z": "1", "a": "2"})
    text = (
        '{"__metadata__":{"a":"2","z":"1"},"b":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},'
        '"a\\n\u00e9":{"dtype":"U8","shape":[],"data_offsets":[8,9]},"c":{"dtype":"F4","shape":[0],"data_offsets":[9,9]}}'
    ).encode()
    assert header.raw == text + b" " * (-len(text) % 8)
    assert header.prefix == len(header.raw).to_bytes(8, "little") + header.raw
    assert header.file_bytes == header.data_start + 9


def test_rendered_empty_file() -> None:
    assert render_header([]).prefix == b"\x08\0\0\0\0\0\0\0{}      "
    assert render_header([], {}).metadata == {}


def test_rendered_bytes_are_those_of_upstream_where_it_has_a_choice() -> None:
    odd = '\x1f"\\/\x7f\u00e9\U0001f600'
    arrays = {odd: np.zeros(2, np.float32), "b": np.zeros(3, np.uint8)}
    ours = render_header([(odd, F32, (2,)), ("b", U8, (3,))], {"format": "pt"})
    assert ours.prefix + bytes(11) == save(arrays, {"format": "pt"})


@pytest.mark.parametrize(
    ("name", "fragment"),
    [
        pytest.param("__metadata__", "reserved for the metadata", id="R046 reserved"),
        pytest.param("taken", "taken by another tensor", id="taken"),
        pytest.param("\ud800", "cannot be written as UTF-8", id="no UTF-8"),
    ],
)
@pytest.mark.parametrize("metadata", [None, {"a": "b"}])
def test_names_that_cannot_be_rendered(name: str, fragment: str, metadata: dict[str, str] | None) -> None:
    with pytest.raises(UsageError, match=fragment):
        render_header([("taken", U8, (1,)), (name, U8, (1,))], metadata)


def test_what_could_not_be_read_again_is_not_rendered() -> None:
    with pytest.raises(MalformedFileError, match="does not fill its last byte"):
        render_header([("t", F4, (3,))])
    with pytest.raises(MalformedFileError, match="shape is not valid"):
        render_header([("t", U8, (1,) * (RANK_LIMIT + 1))])


def test_type_of_render_is_header() -> None:
    assert isinstance(render_header([("t", U8, (1,))]), Header)


@pytest.mark.parametrize("start", [b"# lora-cli\n\nwords", b"\xef\xbb\xbf<!-- a", b"key: value\n", b"\t\r\n plain"])
def test_text_is_called_text(start: bytes) -> None:
    with pytest.raises(MalformedFileError, match="is text, not a safetensors file") as caught:
        read_header_length(start[:16], 4000, file="README.md")
    assert "inspect" not in str(caught.value)


def test_a_length_of_any_bytes_is_not_called_text() -> None:
    for start in (b"\x7fELF\2\1\1\0", b"\x89PNG\r\n\x1a\n"):
        with pytest.raises(MalformedFileError, match="header is too long"):
            read_header_length(start, 4000, file="x")
