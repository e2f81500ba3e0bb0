"""Exact undo: every bit of every block comes back, in hardly more bytes than the merge forgot."""

from __future__ import annotations

import contextlib
import hashlib
import random
import struct
import time
import zlib
from collections.abc import Iterator
from itertools import pairwise, product

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from patterns import DTYPES, awkward, from_patterns, gaussian, same_bits
from torch import Tensor

from lora_cli.arithmetic import undo
from lora_cli.arithmetic.ordered import bits_view
from lora_cli.arithmetic.preimages import Preimages
from lora_cli.arithmetic.rounding import TileKernel, overflow_limit, work_dtype
from lora_cli.arithmetic.undo import decode, encode
from lora_cli.errors import MalformedFileError, ShapeError, UnsupportedError, UsageError

every_dtype = pytest.mark.parametrize("name", reference.FORMATS)
#: Standard deviations that keep the values of a dtype among its normal numbers.
SCALE = {"float8_e4m3fn": 4.0, "float8_e5m2": 4.0}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the workers have it: a thread to a core, and none of torch's own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def merge(base: Tensor, deltas: Tensor, merged: torch.dtype) -> tuple[Tensor, Tensor]:
    """The merged values, and the deltas as the kernel rounds them."""
    kernel = TileKernel(work_dtype(base.dtype, merged), base.numel())
    exact = deltas.to(torch.float64)
    return kernel.merge(base, exact, torch.empty_like(base, dtype=merged)), kernel.delta(exact).clone()


def block(
    name: str, ratio: float, *, count: int = 20_000, out: str | None = None, pruned: float = 0.0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Gaussian base values, what they merge to, and Gaussian deltas, `ratio` times as large."""
    std = SCALE.get(name, 0.02)
    values = gaussian(seed, count, dtype=torch.float64, std=std)
    values[torch.rand(count, generator=torch.Generator().manual_seed(seed)) < pruned] = 0.0
    base = values.float().to(DTYPES[name]) if DTYPES[name].itemsize < 4 else values.to(DTYPES[name])
    deltas = gaussian(seed + 1, count, dtype=torch.float64, std=std * ratio)
    return base, *merge(base, deltas, DTYPES[out or name])


def undone(base: Tensor, merged: Tensor, delta: Tensor) -> tuple[bytes, Tensor]:
    """The stream, and what comes of it where noise was."""
    before = merged.clone(), delta.clone(), base.clone()
    stream = encode(base, merged, delta)
    out = torch.empty_like(base)
    bits_view(out).fill(0x55)
    assert decode(merged, delta, stream, out) is out
    assert all(map(same_bits, before, (merged, delta, base)))
    return stream, out


def header(stream: bytes) -> tuple[int, ...]:
    return struct.unpack_from("<HHIIIII", stream)


def exceptions(stream: bytes) -> int:
    return header(stream)[5]


def sealed(stream: bytes | bytearray) -> bytes:
    checksum = zlib.crc32(bytes(stream[28:]), zlib.crc32(bytes(stream[:24])))
    return bytes(stream[:24]) + struct.pack("<I", checksum) + bytes(stream[28:])


# Every bit comes back.


@pytest.mark.parametrize("pruned", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("ratio", [1e-4, 0.005, 0.015, 0.05, 0.15, 1.0, 10.0])
@every_dtype
def test_every_bit_comes_back(name: str, ratio: float, pruned: float) -> None:
    base, merged, delta = block(name, ratio, pruned=pruned)
    stream, out = undone(base, merged, delta)
    assert same_bits(out, base)
    assert exceptions(stream) == 0


@pytest.mark.parametrize(
    ("name", "out_name"), [pair for pair in product(reference.FORMATS, reference.FORMATS) if pair[0] != pair[1]]
)
def test_every_bit_comes_back_when_the_dtype_changes(name: str, out_name: str) -> None:
    for ratio, pruned in ((0.015, 0.0), (0.3, 0.5), (0.0, 0.1)):
        base, merged, delta = block(name, ratio, out=out_name, count=5000, pruned=pruned)
        bits_view(base)[:5] = bits_view(torch.tensor([-0.0]).to(base.dtype))
        merged, delta = merge(base, delta, DTYPES[out_name])
        stream, out = undone(base, merged, delta)
        assert same_bits(out, base)
        assert exceptions(stream) == 0


@settings(max_examples=250, deadline=None)
@given(st.data())
def test_any_pattern_and_any_delta(data: st.DataObject) -> None:
    names = st.sampled_from(sorted(DTYPES))
    name = data.draw(names)
    out_name = data.draw(st.one_of(st.just(name), names))
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    base = awkward(rng, 1, 200, DTYPES[name], data.draw(st.sampled_from([1, 8, 200])))[0]
    deltas = awkward(rng, 1, 200, DTYPES[data.draw(names)], data.draw(st.sampled_from([1, 8, 60])))[0].double()
    deltas *= data.draw(st.sampled_from([0.0, 1.0, 0.3, 2.0**-10, 2.0**-40]))
    work = work_dtype(base.dtype, DTYPES[out_name])
    fits = (base.to(work) + deltas.to(work)).abs() < overflow_limit(DTYPES[out_name])
    base, deltas = base[fits], deltas[fits]
    _, out = undone(base, *merge(base, deltas, DTYPES[out_name]))
    assert same_bits(out, base)


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
def test_all_patterns_with_coarse_deltas(name: str) -> None:
    """Deltas of few bits, as factors of rank 1 make them: ties everywhere, among subnormals too."""
    form, dtype = reference.FORMATS[name], DTYPES[name]
    patterns = [*range(form.largest_pattern + 1), *(form.sign | p for p in range(form.largest_pattern + 1))]
    base = from_patterns([patterns], dtype)[0]
    smallest = torch.finfo(dtype).smallest_normal
    for size in (smallest / 8, smallest * 1.5, 2.0**-6 * 1.25, 1.0, 3.0):
        for deltas in (torch.full(base.shape, size), base.float() * -0.5, base.float() * 2.0**-4 * 1.5):
            fits = (base.float() + deltas).abs() < overflow_limit(dtype)
            stream, out = undone(base[fits], *merge(base[fits], deltas[fits], dtype))
            assert same_bits(out, base[fits])
            assert exceptions(stream) <= (20 if base.itemsize == 1 else 0)


@every_dtype
def test_signs_of_zeros_come_back(name: str) -> None:
    base = torch.tensor([0.0, -0.0] * 500).to(DTYPES[name])
    for deltas in (torch.zeros(1000), gaussian(0, 1000), torch.full((1000,), 2.0**-149)):
        stream, out = undone(base, *merge(base, deltas, base.dtype))
        assert same_bits(out, base)
        if not deltas.any():
            assert len(stream) == 28, "what was not changed costs nothing"


@every_dtype
def test_values_near_the_limit_come_back(name: str) -> None:
    dtype = DTYPES[name]
    info = torch.finfo(dtype)
    size = torch.linspace(0.9, 1.0, 999, dtype=torch.float64) * info.max
    base = torch.cat([size, -size]).to(dtype)
    merged, delta = merge(base, -base.double() / 3, dtype)
    assert same_bits(undone(base, merged, delta)[1], base)
    grown, delta = merge((base.double() / 2).to(dtype), base.double() / 4, dtype)
    assert same_bits(undone((base.double() / 2).to(dtype), grown, delta)[1], (base.double() / 2).to(dtype))


def test_whatever_the_base_is_it_comes_back() -> None:
    """Also where it does not merge to what is there, and where it is no number: the writer proves each one."""
    _, merged, delta = block("bfloat16", 0.05, count=3000)
    base = torch.from_numpy(np.random.default_rng(0).integers(-(2**15), 2**15, 3000).astype(np.int16)).view(
        torch.bfloat16
    )
    stream, out = undone(base, merged, delta)
    assert same_bits(out, base)
    assert 2900 < exceptions(stream) <= 3000
    assert len(stream) < 3000 * 6 + 200
    base, merged, delta = block("float32", 0.05, count=70_000)
    base[7] *= 2
    base[69_000:69_100] *= 1.5
    stream, out = undone(base, merged, delta)
    assert same_bits(out, base)
    assert exceptions(stream) == 101


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 65_535, 65_536, 65_543, 140_001])
def test_blocks_of_any_length(count: int) -> None:
    for name in ("bfloat16", "float64"):
        base, merged, delta = block(name, 0.1, count=count)
        assert same_bits(undone(base, merged, delta)[1], base)


def test_shape_does_not_matter() -> None:
    base, merged, delta = block("float16", 0.1, count=600)
    flat, _ = undone(base, merged, delta)
    cube, out = undone(base.view(2, 30, 10), merged.view(2, 30, 10), delta.view(2, 30, 10))
    assert cube == flat
    assert same_bits(out.view(-1), base)
    assert same_bits(undone(base[0], merged[0], delta[0])[1], base[0])


def test_how_the_work_is_cut_does_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    base, merged, delta = block("bfloat16", 0.3, count=10_000, pruned=0.2)
    expected = encode(base, merged, delta)
    for tile, batch in ((64, 1), (100, 1000), (9999, 5000)):
        monkeypatch.setattr(undo, "_TILE", tile)
        monkeypatch.setattr(undo, "_BATCH", batch)
        stream, out = undone(base, merged, delta)
        assert stream == expected
        assert same_bits(out, base)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("cuts", [(), (0,), (1, 2, 3), (65_536,), (9_000, 9_001, 70_000)])
def test_a_block_may_come_in_runs(name: str, cuts: tuple[int, ...]) -> None:
    base, merged, delta = block(name, 0.3, count=80_000, pruned=0.2)
    base[::7919] = base.float().neg().to(base.dtype)[::7919]  # some that are exceptions
    encoder = undo.Encoder(base.dtype, merged.dtype)
    for begin, end in pairwise((0, *cuts, 80_000)):
        encoder.add(base[begin:end], merged[begin:end], delta[begin:end])
    stream = encoder.finish()
    assert stream == encode(base, merged, delta)
    assert exceptions(stream) > 5
    assert same_bits(undo.decode(merged, delta, stream, torch.empty_like(base)), base)


@pytest.mark.parametrize("density", [0.0, 0.001, 0.05, 0.0999, 0.5, 1.0])
def test_positions_of_flags(density: float) -> None:
    for count in (0, 8, 63, 64, 4096, 65_536):
        flags = np.random.default_rng(count).random(count) < density
        assert np.array_equal(undo._where(flags), np.flatnonzero(flags))


# Nothing more than what was forgotten.


def information(base: Tensor, merged: Tensor, delta: Tensor) -> float:
    """Σ log2(count) over all elements, in bits: what the merge forgot, if all preimages are alike."""
    intervals = Preimages(base.dtype, merged.dtype, 1).intervals(bits_view(merged), delta.numpy())
    return float(np.log2(intervals.spare.astype(np.float64) + 1).sum())


@pytest.mark.parametrize(("ratio", "bits"), [(0.005, 0.0164), (0.015, 0.0408), (0.05, 0.1085), (0.15, 0.2555)])
def test_streams_are_as_short_as_they_can_be(ratio: float, bits: float) -> None:
    count = 1 << 22
    base, merged, delta = block("bfloat16", ratio, count=count)
    least = information(base, merged, delta)
    stream = encode(base, merged, delta)
    assert exceptions(stream) == 0
    assert least <= 8 * len(stream) <= 1.03 * least
    assert 8 * len(stream) / count < 1.1 * bits, "the sizes that were foretold"


@pytest.mark.parametrize(
    ("name", "ratio", "more"),
    [("float16", 0.05, 1.01), ("float32", 0.05, 1.01), ("float8_e4m3fn", 0.05, 1.06), ("float64", 0.05, 1.12)],
)
def test_streams_of_other_dtypes_are_short_too(name: str, ratio: float, more: float) -> None:
    base, merged, delta = block(name, ratio, count=1 << 18)
    stream = encode(base, merged, delta)
    assert 8 * (len(stream) - 28) <= more * information(base, merged, delta)


@pytest.mark.parametrize("pruned", [0.5, 0.9])
@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_pruned_weights_cost_no_more_than_dense_ones(name: str, pruned: float) -> None:
    """Compressed with zlib, where better compressors do better."""
    dense = encode(*block(name, 0.05, count=1 << 18))
    sparse = encode(*block(name, 0.05, count=1 << 18, pruned=pruned))
    assert len(zlib.compress(sparse)) < len(zlib.compress(dense))


def test_ties_are_coded_and_not_listed() -> None:
    """Deltas of few bits tie often; each tie that was listed would cost 48 bits."""
    base = gaussian(0, 1 << 16, std=0.02).to(torch.float16)
    deltas = gaussian(1, 1 << 16, std=0.001).to(torch.float16)
    stream = encode(base, *merge(base, deltas, base.dtype))
    assert exceptions(stream) == 0
    # Intervals between two ties hold three values, which two bits exceed by a quarter.
    assert 8 * (len(stream) - 28) <= 1.12 * information(base, *merge(base, deltas, base.dtype))


# Damage, and what is not the block's.


def small() -> tuple[Tensor, Tensor, Tensor, bytes]:
    base, merged, delta = block("bfloat16", 0.5, count=400, pruned=0.2)
    base[3] = 7.0  # an exception
    return base, merged, delta, encode(base, merged, delta)


def test_truncated_and_flipped_streams_are_refused() -> None:
    base, merged, delta, stream = small()
    out = torch.empty_like(base)
    damaged = [stream[:length] for length in range(len(stream))]
    for place in range(len(stream)):
        damaged.append(stream[:place] + bytes([stream[place] ^ 1 << place % 8]) + stream[place + 1 :])
    for data in damaged:
        with pytest.raises(MalformedFileError):
            decode(merged, delta, data, out)
    assert same_bits(decode(merged, delta, stream, out), base)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32))
def test_damage_with_a_right_checksum_ends(seed: int) -> None:
    _, merged, delta, stream = small()
    rng = random.Random(seed)
    data = bytearray(stream)
    for _ in range(rng.randint(1, 5)):
        place = rng.choice([rng.randrange(28), rng.randrange(len(data))])
        data[place] = rng.choice([0, 1, 255, rng.randrange(256)])
    started = time.monotonic()
    with contextlib.suppress(MalformedFileError):
        decode(merged, delta, sealed(data), torch.empty_like(merged))
    assert time.monotonic() - started < 2


def test_streams_of_other_blocks_are_refused_where_it_shows() -> None:
    base, merged, delta, stream = small()
    out = torch.empty_like(base)
    others: Iterator[tuple[Tensor, Tensor]] = iter(
        [
            (merged, delta * 2),
            (merged, torch.zeros_like(delta)),
            (merged.flip(0), delta),
            (merged[:-1], delta[:-1]),
            (merged.to(torch.float16), delta),
        ]
    )
    for other_merged, other_delta in others:
        with pytest.raises(MalformedFileError):
            decode(other_merged, other_delta, stream, out[: other_merged.numel()])


@every_dtype
def test_values_that_are_no_numbers_do_no_harm(name: str) -> None:
    base, merged, delta = block(name, 0.5, count=400)
    stream = encode(base, merged, delta)
    bits_view(merged)[::3] = -1
    bits_view(merged)[1::7] = np.iinfo(bits_view(merged).dtype).max
    with contextlib.suppress(MalformedFileError):
        decode(merged, delta, stream, torch.empty_like(base))
    assert same_bits(undone(base, merged, delta)[1], base)


def test_refuses_what_is_no_block() -> None:
    base, merged, delta = block("bfloat16", 0.1, count=64)
    with pytest.raises(ShapeError, match="differ in shape"):
        encode(base, merged[:-1], delta)
    with pytest.raises(ShapeError, match="differ in shape"):
        decode(merged, delta, b"", base.view(8, 8))
    with pytest.raises(ShapeError, match="contiguous"):
        encode(base.view(8, 8).t(), merged.view(8, 8), delta.view(8, 8))
    with pytest.raises(UsageError, match="working type"):
        encode(base, merged, delta.double())
    with pytest.raises(UnsupportedError, match="cannot take a delta"):
        encode(base.view(torch.int16), merged, delta)


def test_refuses_a_block_whose_lengths_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    base, merged, delta = block("bfloat16", 0.1, count=64)
    monkeypatch.setattr(undo, "MAX_ELEMENTS", 63)
    with pytest.raises(ShapeError, match="too large"):
        encode(base, merged, delta)


# Golden digests: the same on every machine, and read forever.


def fixture(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers that need no library: Knuth's 64-bit linear congruential generator, its upper half."""
    state, numbers = 2026, []
    for _ in range(4000):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        numbers.append((state >> 32) - 2**31)
    values = torch.tensor(numbers, dtype=torch.float64) * 2.0**-31
    values[:2000:5] = 0.0
    values[:2000:55] = -0.0
    base = (values[:2000] * SCALE.get(name, 0.02)).float().to(DTYPES[name])
    return base, *merge(base, values[2000:] * SCALE.get(name, 0.02) / 8, base.dtype)


GOLDEN = {
    "bfloat16": "aa30950d7fe0f9ceaa5c8f56b14644ad33970a6ac23c77a4c57cba309d040717",
    "float16": "32f82d430ccc14a8ce614f3a64afd25be9688ed505c56bf4e4ced0104087d5f9",
    "float32": "2411b29ed9828474c71584420bc9f4cd077343d4de78d6b8b01912d4de42ca20",
    "float64": "509aacf5daa3f546f3140863e82e70ed70ca64069f00cb113b99ed4b25aac71b",
    "float8_e4m3fn": "6fd32853c26223aaf5d8f760fdf52089bcf5c4218227c1b327e21dbc56f2a4eb",
    "float8_e5m2": "c49e3cac741d2eff2cada7e1f19c92bae37920a876673d618b9a31abb2a57c31",
}


@every_dtype
def test_golden_digest(name: str) -> None:
    base, merged, delta = fixture(name)
    stream, out = undone(base, merged, delta)
    assert same_bits(out, base)
    assert hashlib.sha256(stream).hexdigest() == GOLDEN[name]
