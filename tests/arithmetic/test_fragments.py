"""Fragments: every stream comes back, quiet blocks cost next to nothing, and no file makes a reader work for it."""

from __future__ import annotations

import contextlib
import random
import struct
import sys
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from patterns import DTYPES, gaussian, same_bits
from torch import Tensor

from lora_cli.arithmetic import fragments, residual, undo
from lora_cli.arithmetic.fragments import (
    GROUP_BYTES,
    MAX_STREAM_BYTES,
    FragmentWriter,
    Lengths,
    read_fragment,
)
from lora_cli.arithmetic.packing import Buffer
from lora_cli.arithmetic.rounding import TileKernel, work_dtype
from lora_cli.errors import MalformedFileError, ShapeError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

Group = dict[str, int]
FIELDS = ("blocks", "compressed", "heads", "tails")


def lengths(stream: Buffer) -> tuple[int, int]:
    """A codec of nothing: how long the rest of the head is, how long the tail, and then these."""
    if len(stream) < 8:
        raise MalformedFileError("damaged")
    head, tail = struct.unpack_from("<II", stream)
    return 8 + head, tail


def stream_of(head: bytes, tail: bytes) -> bytes:
    return struct.pack("<II", len(head), len(tail)) + head + tail


def written(streams: Sequence[Buffer], codec: Lengths = lengths) -> bytes:
    writer = FragmentWriter(codec)
    return b"".join([*(writer.add(stream) for stream in streams), writer.close()])


def reading(file: bytes, length: int) -> Callable[[int, int], bytes]:
    """A file that begins with a fragment of a length, and never is asked for more than that."""

    def read(offset: int, count: int) -> bytes:
        assert offset >= 0
        assert count >= 0
        assert offset + count <= length
        return file[offset : offset + count]

    return read


def streams_of(fragment: bytes, codec: Lengths = lengths) -> list[bytes]:
    return list(read_fragment(reading(fragment, len(fragment)), len(fragment), codec))


def refused(fragment: bytes, codec: Lengths = lengths) -> MalformedFileError:
    with pytest.raises(MalformedFileError, match="damaged") as caught:
        streams_of(fragment, codec)
    return caught.value


def group(blocks: int, frame: bytes, heads: int, tails: bytes, changes: Group | None = None) -> bytes:
    """A group with a checksum that is right, whatever it says."""
    fields = dict(zip(FIELDS, (blocks, len(frame), heads, len(tails)), strict=True)) | (changes or {})
    header = struct.pack("<IIII", *fields.values())
    return header + struct.pack("<I", zlib.crc32(header + frame)) + frame + tails


def parts(fragment: bytes) -> tuple[Group, bytes, bytes]:
    """Header, frame and tails of a fragment of one group."""
    fields = dict(zip(FIELDS, struct.unpack_from("<IIII", fragment), strict=True))
    end = 20 + fields["compressed"]
    assert len(fragment) == end + fields["tails"]
    return fields, fragment[20:end], fragment[end:]


def block(dtype: torch.dtype, ratio: float, count: int, pruned: float = 0.0, seed: int = 0) -> tuple[Tensor, ...]:
    """Base, merged values and deltas, as in test_undo."""
    base = gaussian(seed, count, std=0.02)
    base[torch.rand(count, generator=torch.Generator().manual_seed(seed)) < pruned] = 0.0
    base = base.to(dtype)
    kernel = TileKernel(work_dtype(dtype, dtype), count)
    exact = gaussian(seed + 1, count, dtype=torch.float64, std=0.02 * ratio)
    return base, kernel.merge(base, exact, torch.empty_like(base)), kernel.delta(exact).clone()


def small() -> tuple[list[tuple[Tensor, ...]], bytes]:
    blocks = [block(torch.bfloat16, 0.5, count, 0.5, count) for count in (60, 1, 33)]
    blocks[2][0][5] = 7.0  # an exception
    return blocks, written([undo.encode(*one) for one in blocks], undo.lengths)


def noise(seed: int, count: int) -> bytes:
    return random.Random(seed).randbytes(count)


# What goes in comes out.


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.binary(max_size=60), st.binary(max_size=60))),
    st.sampled_from([1, 50, 200, GROUP_BYTES]),
)
def test_every_stream_comes_back_in_order(pairs: list[tuple[bytes, bytes]], size: int) -> None:
    streams = [stream_of(*pair) for pair in pairs]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fragments, "GROUP_BYTES", size)
        fragment = written(streams)
    assert streams_of(fragment) == streams
    assert (fragment == b"") == (not streams)


@pytest.mark.parametrize("name", DTYPES)
def test_blocks_of_both_codecs_come_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fragments, "GROUP_BYTES", 3000)
    blocks = [block(DTYPES[name], ratio, 1000, pruned) for ratio in (0.0, 0.05, 1.0) for pruned in (0.0, 0.9)]
    fragment = written([undo.encode(*one) for one in blocks], undo.lengths)
    for stream, (base, merged, delta) in zip(streams_of(fragment, undo.lengths), blocks, strict=True):
        assert same_bits(undo.decode(merged, delta, stream, torch.empty_like(base)), base)
    fragment = written([residual.encode(base, merged) for base, merged, _ in blocks], residual.lengths)
    for stream, (base, merged, _) in zip(streams_of(fragment, residual.lengths), blocks, strict=True):
        assert same_bits(residual.decode(merged, stream, torch.empty_like(base)), base)


def test_the_bytes_of_a_group() -> None:
    """Frozen, but for what zstd makes of the heads: old undo files could not be read."""
    streams = [stream_of(b"ab", b"cde"), stream_of(b"f", b""), stream_of(b"", b"g")]
    fragment = written(streams)
    _, compressed, _ = parts(fragment)
    assert zstd.decompress(compressed) == bytes.fromhex("0200000003000000") + b"ab" + bytes.fromhex(
        "0100000000000000"
    ) + b"f" + bytes.fromhex("0000000001000000")
    header = struct.pack("<IIII", 3, len(compressed), 27, 4)
    assert fragment == header + struct.pack("<I", zlib.crc32(header + compressed)) + compressed + b"cdeg"
    # As zstd 1.5.7 wrote it, and every version reads it.
    old = "03000000" + "24000000" + "1b000000" + "04000000" + "51e65f86" + "28b52ffd201bd90000"
    old += "0200000003000000" + "6162" + "0100000000000000" + "66" + "0000000001000000" + "63646567"
    assert streams_of(bytes.fromhex(old)) == streams


def test_groups_are_closed_when_they_are_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fragments, "GROUP_BYTES", 120)
    writer = FragmentWriter(lengths)
    stream = stream_of(b"abcd", noise(0, 28))
    ready = [writer.add(stream) for _ in range(7)]
    assert [bool(one) for one in ready] == [False, False, True, False, False, True, False]
    assert [parts(one)[0]["blocks"] for one in (ready[2], ready[5])] == [3, 3]
    last = writer.close()
    assert parts(last)[0]["blocks"] == 1
    assert writer.close() == b""
    assert streams_of(b"".join(ready) + last) == [stream] * 7


def test_equal_streams_give_equal_bytes() -> None:
    streams = [stream_of(noise(seed, 100) + bytes(5000), noise(seed, 9)) for seed in range(300)]
    assert written(streams) == written(streams)
    assert written([bytearray(one) for one in streams]) == written([memoryview(one) for one in streams])


def test_what_was_added_may_change_afterwards() -> None:
    stream = bytearray(stream_of(b"abc", b"def"))
    writer = FragmentWriter(lengths)
    writer.add(stream)
    writer.add(memoryview(stream))
    kept = bytes(stream)
    stream[:] = bytes(len(stream))
    assert streams_of(writer.close()) == [kept, kept]


# What it costs.


@pytest.mark.parametrize("ratio", [0.005, 0.05])
def test_a_dense_block_costs_some_bytes_more_than_its_indices(ratio: float) -> None:
    streams = [undo.encode(*block(torch.bfloat16, ratio, 1 << 16, seed=seed)) for seed in range(0, 32, 2)]
    fragment = written(streams, undo.lengths)
    planes = sum(undo.lengths(stream)[1] for stream in streams)
    assert planes < len(fragment) <= planes + 20 + 16 * len(streams)
    assert parts(fragment)[2] == b"".join(stream[undo.lengths(stream)[0] :] for stream in streams)


def test_what_was_not_changed_costs_nothing() -> None:
    streams = [undo.encode(*block(torch.bfloat16, 0.0, 1000)) for _ in range(128)]
    assert len(written(streams, undo.lengths)) < 20 + 60


def test_a_writer_holds_a_group_and_a_block() -> None:
    writer, longest = FragmentWriter(lengths), 0
    tracemalloc.start()
    for seed in range(200):
        longest = max(longest, len(writer.add(stream_of(noise(seed, 40_000), noise(seed, 60_000)))))
    writer.close()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert GROUP_BYTES <= longest < GROUP_BYTES + 110_000
    assert peak < 3.3 * GROUP_BYTES, "of a group that is closed, the heads are there twice and compressed"


def test_a_reader_holds_a_group() -> None:
    fragment = written([stream_of(noise(seed, 60_000), noise(seed, 40_000)) for seed in range(100)])
    tracemalloc.start()
    assert sum(1 for _ in read_fragment(reading(fragment, len(fragment)), len(fragment), lengths)) == 100
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.6 * GROUP_BYTES


def test_nothing_is_read_before_it_is_asked_for() -> None:
    asked: list[tuple[int, int]] = []
    streams = [stream_of(noise(seed, 10), noise(seed, GROUP_BYTES)) for seed in range(3)]
    fragment = written(streams)

    def read(offset: int, count: int) -> bytes:
        asked.append((offset, count))
        return reading(fragment, len(fragment))(offset, count)

    found: Iterator[bytes] = read_fragment(read, len(fragment), lengths)
    assert not asked
    assert next(found) == streams[0]
    assert sum(count for _, count in asked) == len(fragment) // 3
    assert list(found) == streams[1:]
    assert sum(count for _, count in asked) == len(fragment)


# What is not to be written.


def test_only_whole_streams_are_taken() -> None:
    stream = stream_of(b"abc", b"def")
    writer = FragmentWriter(lengths)
    for wrong in (stream[:-1], stream + b"\0", stream[:5], b""):
        with pytest.raises(MalformedFileError):
            writer.add(wrong)
    assert writer.close() == b""
    with pytest.raises(MalformedFileError):
        FragmentWriter(residual.lengths).add(undo.encode(*block(torch.bfloat16, 0.1, 10)))
    with pytest.raises(MalformedFileError):
        FragmentWriter(undo.lengths).add(residual.encode(gaussian(0, 10), None))


def test_streams_that_no_reader_would_take_are_not_written() -> None:
    writer = FragmentWriter(lengths)
    longest = stream_of(noise(0, MAX_STREAM_BYTES - 8), b"")
    with pytest.raises(ShapeError, match="too large"):
        writer.add(longest + b"\0")
    almost = stream_of(noise(0, GROUP_BYTES - 9), b"")
    assert writer.add(almost) == b""
    assert streams_of(writer.add(longest)) == [almost, longest]


def test_the_longest_stream_of_a_block_fits() -> None:
    """Float64 of which nothing is as it should be, in intervals that hold all there is."""
    count = 1 << 18
    everything = struct.pack("<HHIIIIII", 1, 0x0404, count, count, count, count, 8 * count, 0)
    assert sum(undo.lengths(everything)) < MAX_STREAM_BYTES
    assert residual.lengths(residual.encode(torch.zeros(count, dtype=torch.complex128), None))[0] < MAX_STREAM_BYTES


# Damage.


def decoded(fragment: bytes) -> None:
    blocks, _ = small()
    for stream, (base, merged, delta) in zip(streams_of(fragment, undo.lengths), blocks, strict=True):
        assert same_bits(undo.decode(merged, delta, stream, torch.empty_like(base)), base)


def test_every_flipped_bit_is_found() -> None:
    """By the reader, or by the stream whose tail it is in."""
    _, fragment = small()
    decoded(fragment)
    tails = len(fragment) - parts(fragment)[0]["tails"]
    assert tails < len(fragment)
    for place in range(8 * len(fragment)):
        damaged = bytearray(fragment)
        damaged[place // 8] ^= 1 << place % 8
        with pytest.raises(MalformedFileError):
            (streams_of if place < 8 * tails else lambda data, _: decoded(data))(bytes(damaged), undo.lengths)


def test_every_flipped_bit_of_a_residual_is_found() -> None:
    base = gaussian(0, 40).bfloat16()
    fragment = written([residual.encode(base, None), residual.encode(base, base)], residual.lengths)
    for place in range(8 * len(fragment)):
        damaged = bytearray(fragment)
        damaged[place // 8] ^= 1 << place % 8
        refused(bytes(damaged), residual.lengths)


def test_every_truncation_is_found() -> None:
    """But for one after a whole group, which is a fragment of its own."""
    first, second = (written([stream_of(noise(seed, 30), noise(seed, 20))] * 2) for seed in (0, 1))
    fragment = first + second
    for length in range(1, len(fragment)):
        if length != len(first):
            refused(fragment[:length])
            # The file goes on, with something else.
            with pytest.raises(MalformedFileError):
                list(read_fragment(reading(fragment, length), length, lengths))
        # The file is shorter than it should be.
        with pytest.raises(MalformedFileError):
            list(read_fragment(reading(fragment[:length], len(fragment)), len(fragment), lengths))
    assert len(streams_of(fragment[: len(first)])) == 2


def test_added_bytes_are_found() -> None:
    fragment = written([stream_of(b"abc", b"def")])
    for more in (b"\0", bytes(19), bytes(20), bytes(1000), b"\xff" * 20, fragment[:-1]):
        refused(fragment + more)
        refused(more + fragment)


def test_groups_say_what_they_hold() -> None:
    """Whatever the header says with a right checksum, the heads know better."""
    head = stream_of(b"abc", b"")[:-3]
    streams = [stream_of(b"abc", b"defg"), head + b"hij", stream_of(b"", b"k")]
    fields, compressed, tails = parts(written(streams))
    honest = (fields["blocks"], compressed, fields["heads"], tails)
    assert streams_of(group(*honest)) == streams
    for field, value in fields.items():
        for wrong in {0, 1, value - 1, value + 1, 2 * value, 1 << 24, (1 << 24) + 1, 1 << 31, (1 << 32) - 1} - {value}:
            started = time.monotonic()
            refused(group(*honest, {field: wrong}))
            # As above, and there are bytes enough.
            refused(group(*honest, {field: wrong}) + bytes(5000))
            assert time.monotonic() - started < 1
    for other in (tails + b"\0", tails[:-1], b""):
        refused(group(fields["blocks"], compressed, fields["heads"], other))
    refused(group(0, zstd.compress(b""), 0, b""))
    refused(group(0, b"", 0, b""))


def test_heads_that_reach_beyond_their_group_are_found() -> None:
    for lies in ((4, 3), (3, 4), (2, 3), (3, 2), (1 << 31, 3), (3, (1 << 32) - 1)):
        heads = struct.pack("<II", *lies) + b"abc"
        refused(group(1, zstd.compress(heads), len(heads), b"def"))
    heads = stream_of(b"abc", b"")
    assert streams_of(group(1, zstd.compress(heads), len(heads), b"")) == [heads]
    with pytest.raises(MalformedFileError):
        streams_of(group(2, zstd.compress(heads + heads[:7]), len(heads) + 7, b""))


def peak_of(fragment: bytes) -> tuple[int, float]:
    """Bytes and seconds that a refusal takes."""
    started = time.monotonic()
    tracemalloc.start()
    refused(fragment)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak, time.monotonic() - started


def test_bombs_do_not_go_off() -> None:
    bomb = zstd.compress(bytes(1 << 28))
    assert len(bomb) < 1 << 15
    for declared, most in ((8, 1 << 17), (1000, 1 << 17), (1 << 20, 1 << 22), (1 << 24, 1 << 26)):
        peak, seconds = peak_of(group(1, bomb, declared, b""))
        assert peak < most
        assert seconds < 2
    for declared in ((1 << 24) + 1, 1 << 28, (1 << 32) - 1):
        peak, seconds = peak_of(group(1, bomb, declared, b""))
        assert peak < 1 << 17
        assert seconds < 0.5


def test_what_is_declared_is_not_read_if_it_is_too_much() -> None:
    for changes in ({"compressed": (1 << 24) + 1}, {"tails": 1 << 24}, {"tails": 1 << 31}, {"compressed": 1 << 31}):
        asked: list[int] = []
        fragment = group(1, b"", 8, b"", changes) + bytes(1 << 25)

        def read(offset: int, count: int, fragment: bytes = fragment, asked: list[int] = asked) -> bytes:
            asked.append(count)
            return fragment[offset : offset + count]

        with pytest.raises(MalformedFileError):
            list(read_fragment(read, 1 << 40, lengths))
        assert asked == [20]


def test_frames_that_are_not_alone_or_not_whole_are_found() -> None:
    heads = stream_of(b"abcdefgh" * 40, b"")
    frame, empty = zstd.compress(heads), zstd.compress(b"")
    compressor = zstd.ZstdCompressor()
    unfinished = compressor.compress(heads, zstd.ZstdCompressor.FLUSH_BLOCK)
    assert streams_of(group(1, unfinished + compressor.flush(), len(heads), b"")) == [heads]
    skipped = struct.pack("<II", 0x184D2A50, 4) + b"more"
    assert streams_of(group(1, frame, len(heads), b"")) == [heads]
    for wrong in (
        *(frame[:length] for length in range(len(frame))),
        unfinished,
        frame + b"\0",
        frame + empty,
        frame + skipped,
        empty + frame,
        skipped + frame,
        zstd.compress(heads[:100]) + zstd.compress(heads[100:]),
        zlib.compress(heads),
        heads,
    ):
        refused(group(1, wrong, len(heads), b""))


def test_frames_that_want_a_large_window_are_refused() -> None:
    heads = stream_of(b"abc", b"")
    parameter = zstd.CompressionParameter
    for window in (10, 24, 26, 27):
        compressor = zstd.ZstdCompressor(options={parameter.window_log: window, parameter.content_size_flag: 0})
        fragment = group(1, compressor.compress(heads) + compressor.flush(), len(heads), b"")
        if window > 24:
            assert "zstd frame" in str(refused(fragment).expected)
        else:
            assert streams_of(fragment) == [heads]


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32))
def test_damage_with_a_right_checksum_ends(seed: int) -> None:
    rng = random.Random(seed)
    streams = [stream_of(bytes(rng.choices(b"ab", k=rng.randrange(60))), rng.randbytes(5)) for _ in range(6)]
    fields, frame, tails = parts(written(streams))
    compressed = bytearray(frame)
    for _ in range(rng.randint(1, 4)):
        compressed[rng.randrange(len(compressed))] = rng.choice([0, 1, 255, rng.randrange(256)])
    started = time.monotonic()
    with contextlib.suppress(MalformedFileError):
        found = streams_of(group(fields["blocks"], bytes(compressed), fields["heads"], tails))
        assert sum(map(len, found)) == fields["heads"] + fields["tails"]
    assert time.monotonic() - started < 1


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=100))
def test_noise_is_no_fragment(data: bytes) -> None:
    for codec in (lengths, undo.lengths, residual.lengths):
        with pytest.raises(MalformedFileError):
            streams_of(b"\1" + data, codec)


def test_what_the_reader_of_bytes_says_passes() -> None:
    def read(offset: int, count: int) -> bytes:
        raise OSError(offset, count)

    with pytest.raises(OSError, match="20"):
        list(read_fragment(read, 100, lengths))


# Where an undo stream is cut.


@pytest.mark.parametrize("name", DTYPES)
def test_the_head_of_an_undo_stream_ends_where_its_planes_begin(name: str) -> None:
    for ratio, pruned in ((0.0, 0.0), (0.05, 0.0), (1.0, 0.5)):
        base, merged, delta = block(DTYPES[name], ratio, 2000, pruned)
        base[:17] = 3.0
        stream = undo.encode(base, merged, delta)
        head, tail = undo.lengths(stream)
        assert head + tail == len(stream)
        _, _, _, flags, signs, exceptions, planes = struct.unpack_from("<HHIIIII", stream)
        assert tail == planes
        assert head == 28 + -(-flags // 8) + -(-signs // 8) + (4 + base.itemsize) * exceptions
        assert exceptions >= 16
        for begin in (stream[:28], memoryview(stream)[:30], bytearray(stream + b"more")):
            assert undo.lengths(begin) == (head, tail)


@pytest.mark.parametrize(
    "fields",
    [
        (0, 0x0101, 100, 1, 1, 1, 1),
        (2, 0x0101, 100, 1, 1, 1, 1),
        (1, 0x0001, 100, 1, 1, 1, 1),
        (1, 0x0701, 100, 1, 1, 1, 1),
        (1, 0x0100, 100, 1, 1, 1, 1),
        (1, 0x0107, 100, 1, 1, 1, 1),
        (1, 0x0101, (1 << 28) + 1, 1, 1, 1, 1),
        (1, 0x0101, 100, 101, 1, 1, 1),
        (1, 0x0101, 100, 1, 101, 1, 1),
        (1, 0x0101, 100, 1, 1, 101, 1),
        (1, 0x0101, 100, 1, 1, 1, 16 * 13 + 1),
        (1, 0x0501, 100, 1, 1, 1, 8 * 13 + 1),
    ],
)
def test_no_undo_stream_begins_like_this(fields: tuple[int, ...]) -> None:
    with pytest.raises(MalformedFileError, match="damaged"):
        undo.lengths(struct.pack("<HHIIIII", *fields) + bytes(4))


def test_undo_streams_begin_like_this() -> None:
    for fields, expected in (
        ((1, 0x0101, 100, 100, 100, 100, 16 * 13), (28 + 13 + 13 + 600, 16 * 13)),
        ((1, 0x0601, 100, 1, 0, 2, 8 * 13), (28 + 1 + 10, 8 * 13)),
        ((1, 0x0401, 1 << 28, 0, 9, 1, 1), (28 + 2 + 12, 1)),
    ):
        header = struct.pack("<HHIIIII", *fields) + bytes(4)
        assert undo.lengths(header) == expected
        for length in range(28):
            with pytest.raises(MalformedFileError):
                undo.lengths(header[:length])
