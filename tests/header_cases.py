"""Files that are no valid safetensors, byte for byte, with the error each must give; and how the tests read one."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Any

from safetensors import SafetensorError, deserialize

from lora_cli.checkpoint.header import HEADER_LIMIT, RANK_LIMIT, Header, parse_header, read_header_length
from lora_cli.errors import LoraCliError, MalformedFileError, UnsafeInputError, UnsupportedError

BAD, TRAP, NEWER = MalformedFileError, UnsafeInputError, UnsupportedError

_deserialize: Any = deserialize  # its stub has no types


def read(content: bytes, *, limit: int = HEADER_LIMIT) -> Header:
    """Read a header as the program does: its length first, then that many bytes."""
    length = read_header_length(content[:16], len(content), file="m.safetensors", limit=limit)
    return parse_header(content[8 : 8 + length], len(content), file="m.safetensors", limit=limit)


def container(header: str | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header.encode() if isinstance(header, str) else header
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def one(dtype: str = '"U8"', shape: str = "[1]", offsets: str = "[0,1]", data: bytes = b"\1", more: str = "") -> bytes:
    """A file of one tensor, its fields given as JSON."""
    return container(f'{{"t":{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}{more}}}}}', data)


def u8(begin: int, end: int, dtype: str = "U8") -> str:
    return f'{{"dtype":"{dtype}","shape":[{end - begin}],"data_offsets":[{begin},{end}]}}'


def upstream(content: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """What safetensors reads: dtype, shape and bytes of each tensor; None when it refuses."""
    try:
        found = _deserialize(content)
    except SafetensorError:
        return None
    return {name: (view["dtype"], tuple(view["shape"]), bytes(view["data"])) for name, view in found}


@dataclass(frozen=True)
class Refused:
    """A file, the error, what its message and fields say (parts of them, between bars), and what upstream does."""

    content: bytes
    error: type[LoraCliError]
    fragment: str
    upstream_reads_it: bool = False


OK = '{"t":' + u8(0, 1) + "}"
DEEP = "[" * 10_000 + "]" * 10_000

# fmt: off
REFUSED = {
    "R001 empty file": Refused(b"", BAD, "too short for a safetensors file|at least 10 bytes|0 bytes"),
    "R002 one byte": Refused(b"\2", BAD, "too short for a safetensors file|at least 10 bytes|1 bytes"),
    "R002 seven bytes": Refused(b"\2" + bytes(6), BAD, "at least 10 bytes|7 bytes"),
    "R002 only the length": Refused(b"\2" + bytes(7), BAD, "at least 10 bytes|8 bytes"),
    "R003 length 0": Refused(container("{}", length=0), BAD, "header is empty|at least 2 bytes|0 bytes"),
    "R003 length 1": Refused(container("{}", length=1), BAD, "header is empty|at least 2 bytes|1 bytes"),
    "R004 length larger than the file": Refused(
        container(OK, b"\1", length=1000), BAD, "ends inside its header|1008 bytes|62 bytes|946 bytes are missing"),
    "R004 length one too large": Refused(container("{}", length=3), BAD, "ends inside its header|11 bytes|10 bytes"),
    "R005 length 2^63": Refused(container("{}", length=2**63), BAD, f"header is too long|at most {HEADER_LIMIT} bytes"),
    "R005 length 2^64-1": Refused(container("{}", length=2**64 - 1), BAD, "header is too long"),
    "R008 not UTF-8": Refused(container(b'{"\xff":' + u8(0, 1).encode() + b"}", b"\1"), BAD, "not UTF-8 at byte 2"),
    "R008 surrogate as bytes": Refused(container(b'{"\xed\xa0\x80":1}'), BAD, "not UTF-8 at byte 2"),
    "R009 byte order mark": Refused(container(b"\xef\xbb\xbf" + OK.encode(), b"\1"), BAD, "byte order mark"),
    "R010 leading space": Refused(container(" " + OK, b"\1"), BAD, "does not start with '{'", True),
    "R010 leading newline": Refused(container("\n" + OK, b"\1"), BAD, "does not start with '{'", True),
    "R013 trailing NUL": Refused(container(OK + "\0", b"\1"), BAD, "extra data at byte 53"),
    "R014 truncated JSON": Refused(container(OK[:-1], b"\1"), BAD, "delimiter at byte 52"),
    "R015 array at top": Refused(container("[{}]"), BAD, "not a JSON object|an object|list"),
    "R015 string at top": Refused(container('"{}"'), BAD, "not a JSON object|an object|str"),
    "R015 number at top": Refused(container("10"), BAD, "not a JSON object|an object|int"),
    "R016 two documents": Refused(container(OK + "{}", b"\1"), BAD, "extra data at byte 53"),
    "R017 arrays 10,000 deep": Refused(container('{"t":' + DEEP + "}"), BAD, "nested more than 100 deep"),
    "R017 objects 10,000 deep": Refused(container('{"t":' * 10_000 + "1" + "}" * 10_000), BAD, "nested more than"),
    "R017 a superfluous field 110 deep": Refused(
        one(more=',"x":' + "[" * 110 + "]" * 110), BAD, "nested more than 100 deep", True),
    "R018 name twice, same offsets, other dtype": Refused(
        container(f'{{"t":{u8(0, 1)},"t":{u8(0, 1, "I8")}}}', b"\1"), TRAP, "stands twice in the header|t", True),
    "R018 name twice, once escaped": Refused(
        container(f'{{"t":{u8(0, 1)},"\\u0074":{u8(0, 1, "I8")}}}', b"\1"), TRAP, "stands twice in the header|t", True),
    "R019 name twice, other offsets": Refused(
        container(f'{{"t":{u8(0, 1)},"t":{u8(1, 2)}}}', b"\1\2"), TRAP, "stands twice in the header|t"),
    "R019 name twice beside repeated metadata": Refused(
        container(f'{{"__metadata__":{{}},"__metadata__":{{}},"t":{u8(0, 1)},"t":{u8(0, 1)}}}', b"\1"),
        TRAP, "stands twice in the header|t"),
    "R020 metadata twice": Refused(
        container('{"__metadata__":{"a":"1"},"__metadata__":{"b":"2"}}'),
        BAD, "stands twice in one object|__metadata__"),
    "R021 key twice inside the metadata": Refused(
        container('{"__metadata__":{"a":"1","b":"2","a":"3"}}'),
        BAD, "stands twice in one object|__metadata__|'a'", True),
    "R022 field twice": Refused(one(more=',"dtype":"U8"'), BAD, "stands twice in one object|t|'dtype'"),
    "R022 field twice, once escaped": Refused(one(more=',"dtyp\\u0065":"U8"'), BAD, "stands twice in one object|t"),
    "R023 extra field": Refused(
        one(more=',"note":{"x":[1]}'), BAD, "a field without meaning|t|dtype, shape, data_offsets|['note']", True),
    "R023 extra field twice": Refused(one(more=',"n":1,"n":2'), BAD, "stands twice in one object|t|'n'", True),
    "R024 no dtype": Refused(
        container('{"t":{"shape":[1],"data_offsets":[0,1]}}', b"\1"), BAD, "lacks a field|t|dtype|['shape', 'data_off"),
    "R024 no shape": Refused(
        container('{"t":{"dtype":"U8","data_offsets":[0,1]}}', b"\1"), BAD, "lacks a field|t|shape"),
    "R024 no offsets": Refused(
        container('{"t":{"dtype":"U8","shape":[1]}}', b"\1"), BAD, "lacks a field|t|data_offsets"),
    "R024 another field instead": Refused(
        container('{"t":{"dtype":"U8","shape":[1],"offsets":[0,1]}}', b"\1"), BAD, "lacks a field|t|data_offsets"),
    "R024 entry is null": Refused(container('{"t":null}'), BAD, "is not an object|t|an object|None"),
    "R024 entry is an array": Refused(container('{"t":["U8",[1],[0,1]]}', b"\1"), BAD, "is not an object|t", True),
    "R025 dtype in lower case": Refused(one('"u8"'), BAD, "dtype is not valid|t|BOOL, F4"),
    "R025 dtype of torch": Refused(one('"torch.uint8"'), BAD, "dtype is not valid|t|BOOL, F4"),
    "R025 dtype of 10,000 characters": Refused(one(f'"{"u" * 10_000}"'), BAD, "dtype is not valid|t|uuu...uuu"),
    "R025 dtype empty": Refused(one('""'), BAD, "dtype is not valid|t"),
    "R025 dtype is a list": Refused(one('["U8"]'), BAD, "dtype is not valid|t"),
    "R025 dtype is an object": Refused(one('{"U8":null}'), BAD, "dtype is not valid|t", True),
    "R025 dtype of a newer format": Refused(one('"U4"', "[2]"), NEWER, "this version does not know|t|BOOL, F4"),
    "R025 dtype of a newer format with a suffix": Refused(one('"F8_E3M4"'), NEWER, "does not know|t"),
    "R026 F4 of three elements": Refused(
        one('"F4"', "[3]", "[0,2]", b"\1\2"), BAD, "does not fill its last byte|t|4 bits an element|12 bits"),
    "R026 F6 of two elements": Refused(one('"F6_E2M3"', "[2]", "[0,2]", b"\1\2"), BAD, "does not fill its last byte|t"),
    "R026 F4 scalar": Refused(one('"F4"', "[]", "[0,1]"), BAD, "does not fill its last byte|t"),
    "R027 metadata value integer": Refused(container('{"__metadata__":{"a":1}}'), BAD, "not a string|__metadata__"),
    "R027 metadata value null": Refused(container('{"__metadata__":{"a":null}}'), BAD, "not a string|__metadata__"),
    "R027 metadata value list": Refused(container('{"__metadata__":{"a":[]}}'), BAD, "not a string|__metadata__"),
    "R027 metadata value nested": Refused(container('{"__metadata__":{"a":{}}}'), BAD, "not a string|__metadata__"),
    "R027 metadata is a list": Refused(container('{"__metadata__":["a"]}'), BAD, "not an object|__metadata__"),
    "R027 metadata is a tensor": Refused(
        container('{"__metadata__":' + u8(0, 1) + "}", b"\1"), BAD, "not a string|__metadata__"),
    "R027 half a surrogate pair": Refused(container('{"__metadata__":{"a":"\\ud800"}}'), BAD, "half a surrogate pair"),
    "R028 negative offset": Refused(one(offsets="[-1,0]"), BAD, "data offsets are not valid|t|[begin, end]"),
    "R028 float offset": Refused(one(offsets="[0.0,1]"), BAD, "data offsets are not valid|t"),
    "R028 exponent": Refused(one(offsets="[0,1e0]"), BAD, "data offsets are not valid|t"),
    "R028 string offset": Refused(one(offsets='[0,"1"]'), BAD, "data offsets are not valid|t"),
    "R028 bool offset": Refused(one(offsets="[false,true]"), BAD, "data offsets are not valid|t"),
    "R028 null offset": Refused(one(offsets="[0,null]"), BAD, "data offsets are not valid|t"),
    "R028 minus zero": Refused(one(offsets="[-0,1]"), BAD, "data offsets are not valid|t"),
    "R029 offset of 5,000 digits": Refused(one(offsets=f"[0,{'1' * 5_000}]"), BAD, "an integer of 5000 characters"),
    "R029 shape of 5,000 digits": Refused(one(shape=f"[{'1' * 5_000}]"), BAD, "an integer of 5000 characters"),
    "R029 shape of 900 digits": Refused(one(shape=f"[{'9' * 900},{'9' * 900}]"), BAD, "overflows 64 bits|t"),
    "R029 offset of 900 digits": Refused(one(offsets="[0," + "9" * 900 + "]"), BAD, "do not fit dtype and shape|t"),
    "R030 NaN": Refused(one(shape="[NaN]"), BAD, "NaN is no JSON number"),
    "R030 Infinity": Refused(one(offsets="[0,Infinity]"), BAD, "Infinity is no JSON number"),
    "R031 one offset": Refused(one(offsets="[1]"), BAD, "data offsets are not valid|t|[begin, end]"),
    "R031 three offsets": Refused(one(offsets="[0,1,1]"), BAD, "data offsets are not valid|t|[begin, end]"),
    "R031 offsets in an object": Refused(one(offsets='{"0":0,"1":1}'), BAD, "data offsets are not valid|t"),
    "R032 begin after end": Refused(one(offsets="[1,0]"), BAD, "data offsets are not valid|t|[begin, end]"),
    "R033 hole at the start": Refused(one(offsets="[1,2]", data=b"\1\2"), BAD, "belong to no tensor|t|byte 0|1"),
    "R033 hole in the middle": Refused(
        container(f'{{"t":{u8(0, 1)},"u":{u8(3, 4)}}}', b"\1234"), BAD, "belong to no tensor|u|byte 1|3"),
    "R033 empty tensor after the end": Refused(
        container(f'{{"t":{u8(0, 1)},"u":{u8(2, 2)}}}', b"\1"), BAD, "belong to no tensor|u|byte 1|2"),
    "R034 bytes after the last tensor": Refused(
        container(OK, b"\1PK\3\4"), TRAP, "Bytes follow the last tensor|1 bytes of data|5 bytes of data"),
    "R034 bytes after no tensor": Refused(container("{}", b"\1"), TRAP, "Bytes follow the last tensor|0 bytes"),
    "R035 partial overlap": Refused(
        container(f'{{"t":{u8(0, 3)},"u":{u8(2, 4)}}}', b"1234"), TRAP, "share bytes|u|byte 3|2, inside tensor 't'"),
    "R035 one inside the other": Refused(
        container(f'{{"t":{u8(0, 4)},"u":{u8(0, 2)}}}', b"1234"), TRAP, "share bytes|t|byte 2|0, inside tensor 'u'"),
    "R035 empty tensor inside another": Refused(
        container(f'{{"t":{u8(0, 2)},"u":{u8(1, 1)}}}', b"12"), TRAP, "share bytes|u|byte 2|1, inside tensor 't'"),
    "R036 two names for one span": Refused(
        container(f'{{"t":{u8(0, 2)},"u":{u8(0, 2)}}}', b"12"), TRAP, "share bytes|u|byte 2|stored once"),
    "R037 data cut short": Refused(
        container(f'{{"t":{u8(0, 9)}}}', b"123"), BAD, "ends inside its data|9 bytes|3 bytes|6 bytes are missing"),
    "R037 no data at all": Refused(container(OK), BAD, "ends inside its data|1 bytes|0 bytes|1 bytes are missing"),
    "R038 span too long": Refused(one(offsets="[0,2]", data=b"12"), BAD, "do not fit dtype and shape|t|1 bytes|2"),
    "R038 span too short": Refused(one('"F32"'), BAD, "do not fit dtype and shape|t|4 bytes|1"),
    "R039 product overflows": Refused(
        one(shape="[4294967296,4294967296]", offsets="[0,0]", data=b""), BAD, "overflows 64 bits|t"),
    "R039 product of the width overflows": Refused(
        one('"F64"', "[2305843009213693952]", "[0,0]", b""), BAD, "overflows 64 bits|t"),
    "R040 zero behind an overflow": Refused(
        one(shape="[4294967296,4294967296,0]", offsets="[0,0]", data=b""), BAD, "overflows 64 bits|t"),
    "R040 zero before an overflow": Refused(
        one(shape="[0,4294967296,4294967296]", offsets="[0,0]", data=b""), BAD, "overflows 64 bits|t", True),
    "R041 dimension 2^64": Refused(
        one(shape="[0,18446744073709551616]", offsets="[0,0]", data=b""), BAD, "overflows 64 bits|t"),
    "R041 dimension 2^63": Refused(
        one(shape="[0,9223372036854775808]", offsets="[0,0]", data=b""), BAD, "overflows 64 bits|t", True),
    "R041 dimension whose bits overflow": Refused(
        one(shape="[0,1152921504606846976]", offsets="[0,0]", data=b""), BAD, "overflows 64 bits|t", True),
    "R041 negative dimensions": Refused(one(shape="[-1,-1]"), BAD, "shape is not valid|t|whole numbers|[-1, -1]"),
    "R041 minus zero": Refused(one(shape="[-0]", offsets="[0,0]", data=b""), BAD, "shape is not valid|t"),
    "R041 bool dimension": Refused(one(shape="[true]"), BAD, "shape is not valid|t|whole numbers|[True]"),
    "R041 float dimension": Refused(one(shape="[1.0]"), BAD, "shape is not valid|t|whole numbers|[1.0]"),
    "R041 shape is a number": Refused(one(shape="1"), BAD, "shape is not valid|t"),
    "R041 shape is null": Refused(one(shape="null"), BAD, "shape is not valid|t"),
    "R042 rank 100,000": Refused(
        one(shape="[" + ",".join(["1"] * 100_000) + "]"), BAD, f"shape is not valid|t|at most {RANK_LIMIT}", True),
    "R042 rank one over the limit": Refused(
        one(shape="[" + ",".join(["1"] * (RANK_LIMIT + 1)) + "]"), BAD, "shape is not valid|t|at most", True),
    "R079 Git LFS pointer": Refused(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", BAD, "a Git LFS pointer|git lfs pull"),
    "R080 HTML page": Refused(b"<!doctype html><title>404</title>", BAD, "a web page|download the file again"),
    "R080 HTML page after white space": Refused(b"\n\n  <html><body>", BAD, "a web page|log in"),
    "R080 error message in JSON": Refused(b'{"error":"gated repo"}', BAD, "plain JSON|instead of an index"),
    "R122 pickle": Refused(pickle.dumps({"t": b"\1" * 99}, protocol=2), BAD, "a Python pickle|weights_only=True"),
    "R122 pickle with frames": Refused(pickle.dumps({"t": b"\1" * 99}, protocol=4), BAD, "a Python pickle"),
    "R123 zip archive": Refused(b"PK\3\4\0\0\x08\x08" + bytes(99), BAD, "a zip archive|weights_only=True"),
    "R123 empty zip archive": Refused(b"PK\5\6" + bytes(18), BAD, "a zip archive"),
    "a GGUF file": Refused(b"GGUF\3\0\0\0" + bytes(99), BAD, "a GGUF file"),
}
# fmt: on
