"""Exact undo where sums have gains: every bit comes back, in hardly more bytes than the merge forgot."""

from __future__ import annotations

import contextlib
import hashlib
import random
import struct
from collections.abc import Callable, Iterator
from itertools import pairwise, product

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lines import fitting, line, stored
from patterns import DTYPES, awkward, gaussian, same_bits
from torch import Tensor

from lora_cli.arithmetic import undo
from lora_cli.arithmetic.edges import Flags, Values
from lora_cli.arithmetic.ordered import Bits, bits_view
from lora_cli.arithmetic.preimages import Intervals, Preimages
from lora_cli.arithmetic.rounding import TileKernel, work_dtype
from lora_cli.arithmetic.undo import decode, encode
from lora_cli.errors import MalformedFileError, ShapeError, UsageError

every_dtype = pytest.mark.parametrize("name", reference.FORMATS)
#: Standard deviations that keep the values of a dtype among its normal numbers.
SCALE = {"float8_e4m3fn": 4.0, "float8_e5m2": 4.0}

Block = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the workers have it: a thread to a core, and none of torch's own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def merge(base: Tensor, deltas: Tensor, gains: Tensor, merged: torch.dtype) -> Block:
    """The base, the merged values, and deltas and gains in the working type."""
    work = work_dtype(base.dtype, merged)
    kernel = TileKernel(work, base.numel())
    exact, gains = deltas.to(torch.float64), gains.to(work)
    return (
        base,
        kernel.merge(base, exact, torch.empty_like(base, dtype=merged), gains),
        kernel.delta(exact).clone(),
        gains,
    )


def block(name: str, ratio: float, *, count: int = 20_000, out: str | None = None, pruned: float = 0.0) -> Block:
    """Gaussian base values, Gaussian deltas `ratio` times as large, gains near to 1, one for each 100."""
    std = SCALE.get(name, 0.02)
    values = gaussian(0, count, dtype=torch.float64, std=std)
    values[torch.rand(count, generator=torch.Generator().manual_seed(0)) < pruned] = 0.0
    base = values.float().to(DTYPES[name]) if DTYPES[name].itemsize < 4 else values.to(DTYPES[name])
    deltas = gaussian(1, count, dtype=torch.float64, std=std * ratio)
    gains = 1 + gaussian(2, count // 100 + 1, dtype=torch.float64, std=0.02).repeat_interleave(100)[:count]
    return merge(base, deltas, gains, DTYPES[out or name])


def undone(base: Tensor, merged: Tensor, delta: Tensor, gains: Tensor) -> tuple[bytes, Tensor]:
    """The stream, and what comes of it where noise was."""
    before = merged.clone(), delta.clone(), base.clone(), gains.clone()
    stream = encode(base, merged, delta, gains)
    out = torch.empty_like(base)
    bits_view(out).fill(0x55)
    assert decode(merged, delta, stream, out, gains) is out
    assert all(map(same_bits, before, (merged, delta, base, gains)))
    return stream, out


def exceptions(stream: bytes) -> int:
    return int(struct.unpack_from("<HHIIIII", stream)[5])


# Every bit comes back.


@pytest.mark.parametrize("pruned", [0.0, 0.5])
@pytest.mark.parametrize("ratio", [1e-4, 0.015, 0.05, 1.0, 10.0])
@every_dtype
def test_every_bit_comes_back(name: str, ratio: float, pruned: float) -> None:
    base, *rest = block(name, ratio, pruned=pruned, count=10_000)
    stream, out = undone(base, *rest)
    assert same_bits(out, base)
    assert exceptions(stream) == 0


@pytest.mark.parametrize(
    ("name", "out_name"), [pair for pair in product(reference.FORMATS, reference.FORMATS) if pair[0] != pair[1]]
)
def test_every_bit_comes_back_when_the_dtype_changes(name: str, out_name: str) -> None:
    for ratio, pruned in ((0.015, 0.0), (0.3, 0.5), (0.0, 0.1)):
        base, *rest = block(name, ratio, out=out_name, count=3000, pruned=pruned)
        stream, out = undone(base, *rest)
        assert same_bits(out, base)
        assert exceptions(stream) == 0


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_pattern_any_delta_and_any_gain(data: st.DataObject) -> None:
    names = st.sampled_from(sorted(DTYPES))
    name = data.draw(names)
    out_name = data.draw(st.one_of(st.just(name), names))
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    work = work_dtype(DTYPES[name], DTYPES[out_name])
    base = awkward(rng, 1, 200, DTYPES[name], data.draw(st.sampled_from([1, 8, 200])))[0]
    deltas = awkward(rng, 1, 200, DTYPES[data.draw(names)], data.draw(st.sampled_from([1, 8, 60])))[0].double()
    deltas *= data.draw(st.sampled_from([0.0, 1.0, 0.3, 2.0**-10, 2.0**-40]))
    gains = awkward(rng, 1, 200, DTYPES[data.draw(names)], data.draw(st.sampled_from([0, 1, 8, 100])))[0].to(work)
    fits, _ = fitting(base, deltas.to(work), DTYPES[out_name], gains)
    base, *rest = merge(base[fits], deltas[fits], gains[fits], DTYPES[out_name])
    assert same_bits(undone(base, *rest)[1], base)


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
def test_all_patterns_come_back_from_any_gain(name: str) -> None:
    """Ties everywhere, among subnormals too; rows that are turned, shrunk to nothing, or were never changed."""
    dtype = DTYPES[name]
    every = stored(line(dtype), dtype)
    smallest = torch.finfo(dtype).smallest_normal
    for delta in (0.0, smallest * 1.5, 2.0**-6 * 1.25, 3.0):
        for gain in (1.0, -1.0, 0.98, -1.375, 0.5, 2.0, 1e-3, 1e-30, 1e-44, 300.0, 0.0, -0.0):
            deltas, gains = torch.full(every.shape, delta), torch.full(every.shape, gain)
            fits, _ = fitting(every, deltas, dtype, gains)
            base, *rest = merge(every[fits], deltas[fits], gains[fits], dtype)
            stream, out = undone(base, *rest)
            assert same_bits(out, base)
            assert exceptions(stream) == 0


@every_dtype
def test_where_nothing_is_added_at_gain_one_nothing_is_stored(name: str) -> None:
    base = torch.cat([torch.tensor([0.0, -0.0]), gaussian(0, 998)]).to(DTYPES[name])
    base, *rest = merge(base, torch.zeros(1000), torch.ones(1000), base.dtype)
    stream, out = undone(base, *rest)
    assert same_bits(out, base)
    assert same_bits(rest[0], base)
    assert len(stream) == 28


def test_whatever_the_base_is_it_comes_back() -> None:
    """Also where it does not merge to what is there, and where it is no number: the writer proves each one."""
    _, *rest = block("bfloat16", 0.05, count=3000)
    patterns = np.random.default_rng(0).integers(-(2**15), 2**15, 3000).astype(np.int16)
    base = torch.from_numpy(patterns).view(torch.bfloat16)
    stream, out = undone(base, *rest)
    assert same_bits(out, base)
    assert 2900 < exceptions(stream) <= 3000


def flags_nothing(flags: Flags) -> Flags:
    return np.zeros_like(flags)


def flags_at_random(flags: Flags) -> Flags:
    return np.random.default_rng(flags.size).random(flags.size) < 0.5


@pytest.mark.parametrize("rule", [flags_nothing, flags_at_random])
@every_dtype
def test_a_survey_that_errs_costs_bytes_and_no_bits(
    name: str, rule: Callable[[Flags], Flags], monkeypatch: pytest.MonkeyPatch
) -> None:
    survey = Preimages.survey
    monkeypatch.setattr(Preimages, "survey", lambda self, *tile: rule(survey(self, *tile)))
    base, *rest = block(name, 0.3)
    stream, out = undone(base, *rest)
    assert same_bits(out, base)
    assert exceptions(stream) > 100


@every_dtype
def test_intervals_that_err_cost_bytes_and_no_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    intervals = Preimages.intervals

    def shorter(self: Preimages, merged: Bits, delta: Values, gains: Values | None = None) -> Intervals:
        first, spare = intervals(self, merged, delta, gains)
        return Intervals(first, (spare >> 1).view(spare.dtype))

    monkeypatch.setattr(Preimages, "intervals", shorter)
    base, *rest = block(name, 0.3)
    stream, out = undone(base, *rest)
    assert same_bits(out, base)
    assert exceptions(stream) > 100


def test_how_the_work_is_cut_does_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    base, *rest = block("bfloat16", 0.3, count=10_000, pruned=0.2)
    expected = encode(base, *rest)
    for tile, batch in ((64, 1), (100, 1000), (9999, 5000)):
        monkeypatch.setattr(undo, "_TILE", tile)
        monkeypatch.setattr(undo, "_BATCH", batch)
        stream, out = undone(base, *rest)
        assert stream == expected
        assert same_bits(out, base)


@pytest.mark.parametrize("cuts", [(), (0,), (1, 2, 3), (65_536,), (9_000, 9_001, 70_000)])
@every_dtype
def test_a_block_may_come_in_runs(name: str, cuts: tuple[int, ...]) -> None:
    base, *rest = block(name, 0.3, count=80_000)
    encoder = undo.Encoder(base.dtype, base.dtype)
    for begin, end in pairwise((0, *cuts, 80_000)):
        encoder.add(base[begin:end], *(part[begin:end] for part in rest))
    assert encoder.finish() == encode(base, *rest)


@pytest.mark.parametrize("count", [0, 1, 9, 65_543])
def test_blocks_of_any_length(count: int) -> None:
    for name in ("bfloat16", "float64"):
        base, *rest = block(name, 0.1, count=count)
        assert same_bits(undone(base, *rest)[1], base)


# Nothing more than what was forgotten.


def information(base: Tensor, merged: Tensor, delta: Tensor, gains: Tensor) -> float:
    """Σ log2(count) over all elements, in bits: what the merge forgot, if all preimages are alike."""
    intervals = Preimages(base.dtype, merged.dtype, 1).intervals(bits_view(merged), delta.numpy(), gains.numpy())
    return float(np.log2(intervals.spare.astype(np.float64) + 1).sum())


@pytest.mark.parametrize(("ratio", "bits"), [(0.0, 0.028), (0.005, 0.04), (0.015, 0.062), (0.05, 0.129), (0.15, 0.28)])
def test_streams_are_as_short_as_they_can_be(ratio: float, bits: float) -> None:
    count = 1 << 20
    base, *rest = block("bfloat16", ratio, count=count)
    least = information(base, *rest)
    stream = encode(base, *rest)
    assert exceptions(stream) == 0
    assert least <= 8 * len(stream) <= 1.03 * least
    assert 0.9 * bits < 8 * len(stream) / count < bits, "the sizes that were measured"


@pytest.mark.parametrize(
    ("name", "more"),
    [("float16", 1.03), ("float32", 1.03), ("float8_e4m3fn", 1.06), ("float8_e5m2", 1.07), ("float64", 1.12)],
)
def test_streams_of_other_dtypes_are_short_too(name: str, more: float) -> None:
    base, *rest = block(name, 0.05, count=1 << 18)
    assert 8 * (len(encode(base, *rest)) - 28) <= more * information(base, *rest)


# What is not the block's.


def test_streams_of_other_gains_are_refused_where_it_shows() -> None:
    base, merged, delta, gains = block("bfloat16", 0.5, count=4000)
    stream = encode(base, merged, delta, gains)
    for others in (None, -gains, gains * 1.1, torch.zeros_like(gains)):
        with pytest.raises(MalformedFileError):
            decode(merged, delta, stream, torch.empty_like(base), others)


@every_dtype
def test_values_that_are_no_numbers_do_no_harm(name: str) -> None:
    base, merged, delta, gains = block(name, 0.5, count=400)
    stream = encode(base, merged, delta, gains)
    bits_view(merged)[::3] = -1
    bits_view(merged)[1::7] = np.iinfo(bits_view(merged).dtype).max
    gains[::5] = torch.tensor([float("nan"), float("inf"), 0.0, -float("inf")]).repeat(20)
    with contextlib.suppress(MalformedFileError):
        decode(merged, delta, stream, torch.empty_like(base), gains)
    assert same_bits(undone(base, merged, delta, gains)[1], base)


def test_refuses_gains_that_are_not_the_blocks() -> None:
    base, merged, delta, gains = block("bfloat16", 0.1, count=64)
    with pytest.raises(ShapeError, match="differ in shape"):
        encode(base, merged, delta, gains[:-1])
    with pytest.raises(ShapeError, match="differ in shape"):
        decode(merged, delta, b"", torch.empty_like(base), gains[:1])
    with pytest.raises(ShapeError, match="contiguous"):
        encode(base, merged, delta, gains[:1].expand(64))
    with pytest.raises(UsageError, match="gains are not in the working type"):
        encode(base, merged, delta, gains.double())
    encoder = undo.Encoder(base.dtype, merged.dtype)
    encoder.add(base, merged, delta, gains)
    with pytest.raises(UsageError, match="a gain for each of its elements, or for none"):
        encoder.add(base, merged, delta)


# Golden digests: the same on every machine, and read forever.


def fixture(name: str) -> Block:
    """Numbers that need no library: Knuth's 64-bit linear congruential generator, its upper half."""
    state, numbers = 2026, []
    for _ in range(4020):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        numbers.append((state >> 32) - 2**31)
    values = torch.tensor(numbers, dtype=torch.float64) * 2.0**-31
    values[:2000:5] = 0.0
    values[:2000:55] = -0.0
    gains = (1 + values[4000:] * 0.25).float()
    gains[:4] = torch.tensor([-1.125, 0.0, 1.0, 2.0**-140])
    base = (values[:2000] * SCALE.get(name, 0.02)).float().to(DTYPES[name])
    return merge(base, values[2000:4000] * SCALE.get(name, 0.02) / 8, gains.repeat_interleave(100), base.dtype)


GOLDEN = {
    "bfloat16": "b14f4eee956e63a369111a9c5b1337a0c9b54b9b96eb68704b8c44116a84c69e",
    "float16": "73e43f915515234cb4a642435f7115a43c5a8ede61e71d743db6681fc157866d",
    "float32": "6ffb22752af03a764e08532c8646b9161635a5f58fc4b20bb3d74eb0492fad4e",
    "float64": "dda4eba5fcfda422b4bc00509611d7a2c898b46fc668f7cf80e5b85e3b983fd7",
    "float8_e4m3fn": "e77e58d0af7df5e147120e5b55137409789741a9bf06e8e2f0d1b8861e95dd85",
    "float8_e5m2": "57b4ad1f8d6cc20f177de91b4e5215594cb9153a8439d4ad991c7a345f2c74da",
}


@every_dtype
def test_golden_digest(name: str) -> None:
    base, *rest = fixture(name)
    stream, out = undone(base, *rest)
    assert same_bits(out, base)
    assert exceptions(stream) == 0
    assert hashlib.sha256(stream).hexdigest() == GOLDEN[name]
