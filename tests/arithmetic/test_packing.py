"""Undo streams: every index comes back, in as many bits as promised, and damage is named, never decoded."""

from __future__ import annotations

import struct
import time
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lora_cli.arithmetic import packing
from lora_cli.arithmetic.ordered import Bits
from lora_cli.arithmetic.packing import (
    Choices,
    Exceptions,
    decode_choices,
    encode_choices,
    read_stream,
    write_stream,
)
from lora_cli.arithmetic.preimages import Intervals
from lora_cli.errors import MalformedFileError

KIND = 0x0101
INT16 = np.dtype(np.int16)
Header = dict[str, int]
FIELDS = ("version", "kind", "elements", "flags", "signs", "exceptions", "planes")


def some_intervals(seed: int, width: int, count: int) -> tuple[Bits, Intervals]:
    """Intervals anywhere on the line, of any length, many of them around zero, and a key in each."""
    rng = np.random.default_rng(seed)
    top = (1 << 8 * width - 1) - 2
    ends = [sorted(int(rng.integers(~top, top, endpoint=True)) for _ in range(2)) for _ in range(count)]
    first, last = np.array(ends, f"i{width}").reshape(count, 2).T
    last = np.where(rng.random(count) < 0.5, first, last)
    around = rng.random(count) < 0.3
    reach = rng.integers(0, min(top, 100), count)
    first, last = np.where(around, -1 - reach, first), np.where(around, reach // 2, last)
    first, last = first.astype(f"i{width}"), last.astype(f"i{width}")
    spare = (last - first).view(f"u{width}")
    keys = [
        int(a) + int(rng.integers(0, int(b), dtype=np.uint64, endpoint=True)) for a, b in zip(first, spare, strict=True)
    ]
    zero = (first <= 0) & (last >= 0) & (rng.random(count) < 0.5)
    return np.where(zero, 0, np.array(keys, dtype=f"i{width}")), Intervals(first, spare)


def nothing() -> Exceptions:
    return Exceptions(np.empty(0, np.int64), np.empty(0, np.int16))


def small() -> tuple[Bits, Intervals]:
    """One interval of each sort: alone, two, five, the zeros, around zero (twice a zero), at zero's edge."""
    first = np.array([7, -9, 100, -1, -3, -3, -3, 0], np.int16)
    spare = np.array([0, 1, 4, 1, 6, 6, 6, 1], np.uint16)
    return np.array([7, -8, 104, -1, 0, -1, 3, 1], np.int16), Intervals(first, spare)


def small_stream() -> bytes:
    keys, intervals = small()
    exceptions = Exceptions(np.array([3, 70]), np.array([-1, 0x1234], np.int16))
    return write_stream(KIND, 100, encode_choices(keys, intervals), exceptions)


def sealed(stream: bytes | bytearray) -> bytes:
    """The stream with a checksum that is right."""
    checksum = zlib.crc32(bytes(stream[28:]), zlib.crc32(bytes(stream[:24])))
    return bytes(stream[:24]) + struct.pack("<I", checksum) + bytes(stream[28:])


def header_of(stream: bytes) -> Header:
    return dict(zip(FIELDS, struct.unpack_from("<HHIIIII", stream), strict=True))


def with_header(stream: bytes, **changes: int) -> bytes:
    header = header_of(stream) | changes
    return sealed(struct.pack("<HHIIIII", *header.values()) + stream[24:])


def read_small(stream: packing.Buffer) -> tuple[NDArray[Any], Exceptions]:
    choices, exceptions = read_stream(stream, KIND, 100, INT16)
    return decode_choices(choices, small()[1]), exceptions


# What goes in comes out.


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1, 2, 4, 8]), st.integers(0, 70))
def test_every_key_comes_back(seed: int, width: int, count: int) -> None:
    keys, intervals = some_intervals(seed, width, count)
    before = intervals.first.copy(), intervals.spare.copy(), keys.copy()
    decoded = decode_choices(encode_choices(keys, intervals), intervals)
    assert decoded.dtype == keys.dtype
    assert np.array_equal(decoded, keys)
    assert all(map(np.array_equal, before, (*intervals, keys)))


def test_the_bytes_of_version_1() -> None:
    """Frozen. If this fails, old undo files cannot be read: write a new version instead."""
    keys, intervals = small()
    choices = encode_choices(keys, intervals)
    assert (choices.questions, choices.zeros) == (3, 3)
    assert choices.flags.tolist() == [0b011]
    assert choices.signs.tolist() == [0b101]  # the pair's -0.0, +0.0, -0.0
    # Indices 1, 4 (three bits), 6 (three bits) and 1 of the elements 1, 2, 6 and 7.
    assert choices.planes.tolist() == [0b1001, 0b10, 0b11]
    stream = small_stream()
    assert stream.hex() == (
        "01000101" + "64000000" + "03000000" + "03000000" + "02000000" + "03000000" + stream[24:28].hex()
        + "03" + "05" + "03000000" + "46000000" + "ffff" + "3412" + "090203"
    )  # fmt: skip
    assert sealed(stream) == stream
    decoded, exceptions = read_small(stream)
    assert decoded.tolist() == keys.tolist()
    assert exceptions.positions.tolist() == [3, 70]
    assert exceptions.patterns.tolist() == [-1, 0x1234]


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_an_index_takes_as_many_bits_as_its_interval_needs(width: int) -> None:
    count = 24
    for bits in range(1, 8 * width):
        # All within the negative values, where no zero is near.
        first = np.full(count, -(1 << 8 * width - 1) + 1, f"i{width}")
        for spare in (1 << bits - 1, (1 << bits) - 1):
            intervals = Intervals(first, np.full(count, min(spare, (1 << 8 * width - 1) - 4), f"u{width}"))
            choices = encode_choices(first + first.dtype.type(1), intervals)
            assert choices.planes.size * 8 == bits * count
            assert choices.questions == choices.zeros == 0


def test_zeros_cost_runs_of_equal_bits() -> None:
    """A pruned tensor: wide intervals around zero, and nearly all of the elements are +0.0."""
    count = 80_000
    first = np.random.default_rng(0).integers(-9000, -1, count).astype(np.int16)
    intervals = Intervals(first, (-2 * first).astype(np.uint16))
    keys = np.zeros(count, np.int16)
    keys[::10_000] = first[::10_000]
    stream = write_stream(KIND, count, encode_choices(keys, intervals), nothing())
    assert len(stream) < 2 * count / 8 + 28 + 40
    assert len(zlib.compress(stream)) < 200


def test_nothing_at_all() -> None:
    intervals = Intervals(np.empty(0, np.int64), np.empty(0, np.uint64))
    stream = write_stream(KIND, 0, encode_choices(np.empty(0, np.int64), intervals), nothing())
    assert len(stream) == packing.HEADER_BYTES == 28
    choices, exceptions = read_stream(stream, KIND, 0, np.dtype(np.int64))
    assert decode_choices(choices, intervals).size == 0
    assert exceptions.positions.size == 0


def test_reads_any_buffer() -> None:
    for buffer in (bytes, bytearray, memoryview):
        assert read_small(buffer(small_stream()))[0].tolist() == small()[0].tolist()


# Damage.


def test_every_truncation_and_every_added_byte_is_found() -> None:
    stream = small_stream()
    for length in range(len(stream)):
        with pytest.raises(MalformedFileError, match="damaged"):
            read_small(stream[:length])
    with pytest.raises(MalformedFileError):
        read_small(stream + b"\0")


def test_every_flipped_bit_is_found() -> None:
    stream = small_stream()
    for place in range(8 * len(stream)):
        damaged = bytearray(stream)
        damaged[place // 8] ^= 1 << place % 8
        with pytest.raises(MalformedFileError):
            read_small(bytes(damaged))


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("flip", [1, 2, 0x8000, 1 << 31])
def test_a_wrong_header_is_found_without_the_checksum(field: str, flip: int) -> None:
    stream = small_stream()
    value = header_of(stream)[field]
    started = time.monotonic()
    with pytest.raises(MalformedFileError):
        read_small(with_header(stream, **{field: value ^ (flip if field in FIELDS[2:] else flip & 0xFFFF or 4)}))
    assert time.monotonic() - started < 1, "nothing is allocated because a header says so"


def test_headers_whose_lengths_add_up_are_checked_against_the_intervals() -> None:
    """Bytes moved from one part to the next, so that only what they mean can tell."""
    stream = small_stream()
    for changes in (
        {"flags": 4},
        {"flags": 2},
        {"signs": 4},
        {"signs": 2},
        {"flags": 9, "planes": 2},
        {"flags": 0, "planes": 4},
        {"signs": 0, "planes": 4},
        {"exceptions": 1, "planes": 9},
        {"exceptions": 0, "planes": 15},
    ):
        with pytest.raises(MalformedFileError):
            read_small(with_header(stream, **changes))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (28, 0b1011),  # a fourth flag
        (28, 0b111),  # more flags set than there are signs
        (28, 0b001),
        (29, 0b1101),  # a fourth sign
        (-3, 0b11001),  # a fifth bit in a plane of four
        (-1, 0b111),
    ],
)
def test_bits_beyond_the_last_are_found(place: int, value: int) -> None:
    stream = bytearray(small_stream())
    stream[place] = value
    with pytest.raises(MalformedFileError):
        read_small(sealed(stream))


def test_values_outside_of_their_intervals_are_found() -> None:
    stream = bytearray(small_stream())
    stream[-2] |= 1  # the second bit of the interval of five: index 6
    with pytest.raises(MalformedFileError) as caught:
        read_small(sealed(stream))
    assert caught.value.expected == "values outside of their intervals: 0"
    # The zeros of an interval that begins at +0.0 do not include -0.0.
    intervals = Intervals(np.array([0], np.int16), np.array([9], np.uint16))
    minus = encode_choices(np.array([-1], np.int16), Intervals(np.array([-1], np.int16), np.array([9], np.uint16)))
    with pytest.raises(MalformedFileError):
        decode_choices(minus, intervals)


@pytest.mark.parametrize("positions", [(70, 3), (3, 3), (3, 100), (3, 2**32 - 1)])
def test_exceptions_are_in_order_and_within_the_block(positions: tuple[int, int]) -> None:
    stream = bytearray(small_stream())
    stream[30:38] = struct.pack("<II", *positions)
    with pytest.raises(MalformedFileError):
        read_small(sealed(stream))


def test_other_blocks_and_versions_are_refused() -> None:
    stream = small_stream()
    for kind, elements in ((KIND + 1, 100), (KIND, 101)):
        with pytest.raises(MalformedFileError):
            read_stream(stream, kind, elements, INT16)
    with pytest.raises(MalformedFileError):
        read_stream(stream, KIND, 100, np.dtype(np.int32))
    with pytest.raises(MalformedFileError) as caught:
        read_small(with_header(stream, version=2))
    assert caught.value.found == "2"


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32), st.data())
def test_noise_with_a_right_checksum_decodes_within_its_intervals_or_not_at_all(seed: int, data: st.DataObject) -> None:
    width = data.draw(st.sampled_from([1, 2, 4, 8]))
    keys, intervals = some_intervals(seed, width, 30)
    pattern = intervals.first.dtype
    stream = bytearray(write_stream(KIND, 30, encode_choices(keys, intervals), nothing()))
    for _ in range(data.draw(st.integers(1, 4))):
        stream[data.draw(st.integers(0, len(stream) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        choices, exceptions = read_stream(sealed(stream), KIND, 30, pattern)
        decoded = decode_choices(choices, intervals)
    except MalformedFileError:
        return
    index = (decoded - intervals.first).view(intervals.spare.dtype)
    assert bool((index <= intervals.spare).all())
    assert exceptions.positions.size <= 30


def test_choices_of_other_intervals_are_refused() -> None:
    keys, intervals = small()
    choices = encode_choices(keys, intervals)
    wider = Intervals(intervals.first, intervals.spare * np.uint16(2))
    with pytest.raises(MalformedFileError):
        decode_choices(choices, wider)
    empty = np.empty(0, np.uint8)
    with pytest.raises(MalformedFileError):
        decode_choices(Choices(0, 0, empty, empty, empty), intervals)
