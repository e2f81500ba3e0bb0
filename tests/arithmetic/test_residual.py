"""Residuals: every bit of every dtype comes back, near candidates leave zeros, and damage is named."""

from __future__ import annotations

import random
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from patterns import DTYPES, gaussian
from torch import Tensor

from lora_cli.arithmetic import residual
from lora_cli.arithmetic.ordered import bits_view, from_ordered, to_ordered
from lora_cli.arithmetic.packing import Buffer
from lora_cli.arithmetic.residual import HEADER_BYTES, decode, encode, lengths
from lora_cli.errors import MalformedFileError, ShapeError

NAMES = [
    *DTYPES,
    *("float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2"),
    *("bool", "uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
    *("complex32", "complex64", "complex128"),
]
EVERY = {name: getattr(torch, name) for name in NAMES if hasattr(torch, name)}
every_dtype = pytest.mark.parametrize("name", EVERY)


def tensor_of(data: bytes, dtype: torch.dtype) -> Tensor:
    if not data:
        return torch.empty(0, dtype=torch.uint8).view(dtype)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype)


def bytes_of(tensor: Tensor) -> bytes:
    return bytes(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())


def undone(base: Tensor, candidate: Tensor | None) -> Tensor:
    """What comes back, where noise was."""
    before = bytes_of(base), candidate is None or bytes_of(candidate)
    stream = encode(base, candidate)
    assert len(stream) == HEADER_BYTES + base.nbytes
    out = tensor_of(b"\x55" * base.nbytes, base.dtype).view(base.shape)
    assert decode(candidate, stream, out) is out
    assert before == (bytes_of(base), candidate is None or bytes_of(candidate))
    return out


def plainly(base: bytes, candidate: bytes, width: int, floats: bool) -> bytes:
    """The stream by its description, one integer at a time."""
    bits = 8 * width

    def place(data: bytes, at: int) -> int:
        number = int.from_bytes(data[at : at + width], "little")
        return number ^ (1 << bits - 1) - 1 if floats and number >> bits - 1 else number

    folded = []
    for at in range(0, len(base), width):
        difference = (place(base, at) - place(candidate, at)) % (1 << bits)
        signed = difference - (difference >> bits - 1 << bits)
        folded.append(2 * signed if signed >= 0 else -2 * signed - 1)
    planes = bytes(number >> 8 * plane & 255 for plane in range(width) for number in folded)
    header = struct.pack("<HBBI", 1, width, floats, len(folded))
    return header + struct.pack("<I", zlib.crc32(header + planes)) + planes


def sealed(stream: bytes | bytearray) -> bytes:
    """The stream with a checksum that is right."""
    checksum = zlib.crc32(bytes(stream[12:]), zlib.crc32(bytes(stream[:8])))
    return bytes(stream[:8]) + struct.pack("<I", checksum) + bytes(stream[12:])


def small() -> tuple[Tensor, Tensor, bytes]:
    base, candidate = torch.tensor([1.0, -0.0, 2.0]).bfloat16(), torch.tensor([1.0, 0.0, -2.0]).bfloat16()
    return base, candidate, encode(base, candidate)


# What goes in comes out.


@every_dtype
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_pattern_and_any_candidate(name: str, data: st.DataObject) -> None:
    dtype = EVERY[name]
    count = data.draw(st.integers(0, 20))
    patterns = st.one_of(
        st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize),
        st.sampled_from([b"\0", b"\xff", b"\x80", b"\x7f"]).map(lambda byte: byte * count * dtype.itemsize),
    )
    base, candidate = data.draw(patterns), data.draw(patterns)
    width, floats = min(8, dtype.itemsize), name in DTYPES
    for known in (candidate, None):
        near = None if known is None else tensor_of(known, dtype)
        assert bytes_of(undone(tensor_of(base, dtype), near)) == base
        assert encode(tensor_of(base, dtype), near) == plainly(base, known or bytes(len(base)), width, floats)


@pytest.mark.parametrize("name", [name for name, dtype in EVERY.items() if dtype.itemsize == 1])
def test_all_pairs_of_bytes(name: str) -> None:
    both = np.indices((256, 256), np.uint8).reshape(2, -1)
    base, candidate = (tensor_of(side.tobytes(), EVERY[name]) for side in both)
    assert bytes_of(undone(base, candidate)) == bytes_of(base)


def test_large_blocks_of_noise() -> None:
    noise = random.Random(0)
    for dtype in (torch.bfloat16, torch.float64, torch.bool, torch.complex64):
        base, candidate = (tensor_of(noise.randbytes(200_003 * dtype.itemsize), dtype) for _ in range(2))
        assert bytes_of(undone(base, candidate)) == bytes_of(base)


def test_the_bytes_of_version_1() -> None:
    """Frozen. If this fails, old undo files cannot be read: write a new version instead."""
    # Differences 0, -1 (to -0.0 from +0.0) and 0x8001, which is -0x7fff.
    base, candidate, stream = small()
    assert stream.hex() == "0100" + "02" + "01" + "03000000" + "aa6a58ee" + "0001fd" + "0000ff"
    # Magnitude and sign: 1.0, -1.0, a NaN and the same with its sign.
    values = tensor_of(bytes.fromhex("803f80bf817f81ff"), torch.bfloat16)
    assert encode(values, None).hex() == "0100" + "02" + "01" + "04000000" + "a4a1e503" + "00010203" + "7f7fffff"
    numbers = torch.tensor([5, -3, 70_000], dtype=torch.int32)
    parts = ("0100", "04", "00", "03000000", "f661df10", "0104ff", "0000ff", "000000", "000000")
    less = numbers + torch.tensor([1, -2, 2**15], dtype=torch.int32)
    assert encode(numbers, less).hex() == "".join(parts)
    for whole, near in ((base, candidate), (values, None), (numbers, less)):
        assert bytes_of(undone(whole, near)) == bytes_of(whole)


def test_near_candidates_leave_zeros() -> None:
    for name, dtype in DTYPES.items():
        base = gaussian(0, 5000).to(dtype)
        keys = to_ordered(bits_view(base))
        moved = keys + np.random.default_rng(0).integers(-3, 4, keys.size).astype(keys.dtype)
        candidate = torch.from_numpy(from_ordered(moved)).view(dtype)
        content = np.frombuffer(encode(base, candidate), np.uint8)[HEADER_BYTES:]
        assert content[:5000].max() == 6, name
        assert not content[5000:].any(), name
        assert not any(encode(base, base)[HEADER_BYTES:])


def test_shape_does_not_matter() -> None:
    base, candidate = gaussian(0, 600), gaussian(1, 600)
    flat = encode(base, candidate)
    assert encode(base.view(2, 30, 10), candidate.view(2, 30, 10)) == flat
    out = decode(candidate.view(20, 30), flat, torch.empty(20, 30))
    assert torch.equal(out.view(-1), base)
    assert bytes_of(undone(base[0], candidate[0])) == bytes_of(base[0])
    assert bytes_of(undone(base[:0], None)) == b""


def test_the_candidate_may_become_the_base() -> None:
    for name in ("bfloat16", "int64"):
        base, candidate = (tensor_of(random.Random(seed).randbytes(800), EVERY[name]) for seed in (0, 1))
        stream = encode(base, candidate)
        assert bytes_of(decode(candidate, stream, candidate)) == bytes_of(base)


def test_parameters_are_tensors_too() -> None:
    base = torch.nn.Parameter(gaussian(0, 10))
    assert bytes_of(decode(base, encode(base, base), torch.empty(10))) == bytes_of(base.detach())


def test_reads_any_buffer() -> None:
    base, candidate, stream = small()
    kinds: list[type[Buffer]] = [bytes, bytearray, memoryview]
    for kind in kinds:
        assert bytes_of(decode(candidate, kind(stream), torch.empty_like(base))) == bytes_of(base)
        assert lengths(kind(stream)) == (len(stream), 0)


# Damage, and what is not the block's.


def refused(stream: bytes, like: Tensor, candidate: Tensor | None) -> MalformedFileError:
    out = torch.zeros_like(like)
    with pytest.raises(MalformedFileError, match="damaged") as caught:
        decode(candidate, stream, out)
    assert not any(bytes_of(out))
    return caught.value


def test_every_truncation_and_every_added_byte_is_found() -> None:
    base, candidate, stream = small()
    for length in range(len(stream)):
        refused(stream[:length], base, candidate)
        refused(sealed(stream[:length].ljust(12, b"\0")), base, candidate)
    refused(sealed(stream + b"\0"), base, candidate)


def test_every_flipped_bit_is_found() -> None:
    base, candidate, stream = small()
    for place in range(8 * len(stream)):
        damaged = bytearray(stream)
        damaged[place // 8] ^= 1 << place % 8
        refused(bytes(damaged), base, candidate)


def test_a_wrong_header_is_found_without_the_checksum() -> None:
    base, candidate, stream = small()
    for place in range(8 * 8):
        damaged = bytearray(stream)
        damaged[place // 8] ^= 1 << place % 8
        refused(sealed(damaged), base, candidate)


def test_other_blocks_are_refused() -> None:
    base, candidate, stream = small()
    assert "width, line and count" in str(refused(stream, base.view(torch.int16), None).expected)
    refused(stream, base.view(torch.uint8), None)
    refused(stream, base[:2], candidate[:2])
    refused(encode(base, candidate), base.float(), None)
    refused(encode(gaussian(0, 6).to(torch.float8_e5m2), None), base, None)
    assert refused(b"\2" + stream[1:], base, candidate).found == "2"


def test_lengths_ask_the_header_alone() -> None:
    stream = small()[2]
    assert lengths(stream[:12]) == lengths(stream + b"more") == (18, 0)
    whole = struct.pack("<HBBII", 1, 8, 0, 1 << 28, 0)
    assert lengths(whole) == (12 + (1 << 31), 0)
    for header in (
        b"",
        stream[:11],
        struct.pack("<HBBII", 0, 2, 1, 3, 0),
        struct.pack("<HBBII", 2, 2, 1, 3, 0),
        struct.pack("<HBBII", 1, 0, 1, 3, 0),
        struct.pack("<HBBII", 1, 3, 1, 3, 0),
        struct.pack("<HBBII", 1, 16, 1, 3, 0),
        struct.pack("<HBBII", 1, 2, 2, 3, 0),
        struct.pack("<HBBII", 1, 2, 1, (1 << 28) + 1, 0),
    ):
        with pytest.raises(MalformedFileError):
            lengths(header)


def test_blocks_that_are_none_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    base = gaussian(0, 6, 4)
    stream = encode(base, None)
    for other in (base.view(4, 6), base[:5], base.to(torch.float64), base.view(torch.int32)):
        with pytest.raises(ShapeError, match="differ"):
            encode(base, other)
        with pytest.raises(ShapeError, match="differ"):
            decode(other, stream, base.clone())
    for turned, candidate in ((base.T, None), (base.T, base.T.contiguous()), (base.T.contiguous(), base.T)):
        with pytest.raises(ShapeError, match="contiguous"):
            encode(turned, candidate)
        with pytest.raises(ShapeError, match="contiguous"):
            decode(candidate, stream, turned)
    monkeypatch.setattr(residual, "MAX_ELEMENTS", 23)
    encode(base.view(-1)[:23], None)
    for large in (base, gaussian(0, 12).to(torch.complex128)):
        with pytest.raises(ShapeError, match="too large"):
            encode(large, None)
