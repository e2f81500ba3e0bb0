"""Intervals of preimages: against brute force over all base values, and by their two ends where those are too many."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np
import pytest
import reference
import torch
from lines import REFUSED, Keys, keys_of, line, merge_keys, stored
from patterns import DTYPES, from_patterns, gaussian, same_bits
from torch import Tensor

from lora_cli.arithmetic.edges import Values, by_pattern, edges_of, values_at
from lora_cli.arithmetic.ordered import Bits, bits_view, largest_key
from lora_cli.arithmetic.preimages import Intervals, Preimages
from lora_cli.arithmetic.rounding import TileKernel, cast, overflow_limit, work_dtype

SMALL = [name for name, form in reference.FORMATS.items() if form.width <= 16]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the workers have it: a thread to a core, and none of torch's own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def some_deltas(seed: int, base: torch.dtype, merged: torch.dtype, count: int) -> Iterator[float]:
    """Zero, deltas of any size, and such as make ties: multiples of spacings and of half of them."""
    rng = np.random.default_rng(seed)
    work = work_dtype(base, merged)
    low = math.log2(torch.finfo(base).tiny) - 12
    high = math.log2(min(torch.finfo(base).max, torch.finfo(merged).max, torch.finfo(torch.float32).max / 4))
    yield 0.0
    for number in range(count):
        size = torch.tensor(rng.choice([-1, 1]) * 2.0 ** rng.uniform(low, high), dtype=work)
        coarse = size.to(base).to(work)
        delta = (size, coarse, coarse * 1.5, coarse * (1 + 2.0**-12))[number % 4]
        yield float(delta) + 0.0


def brute_force(base: torch.dtype, merged: torch.dtype, delta: float) -> tuple[Tensor, Keys, Keys]:
    """All results of a delta, the first key that merges to each, and how many others do."""
    keys = line(base)
    deltas = torch.full(keys.shape, delta, dtype=work_dtype(base, merged))
    results = merge_keys(stored(keys, base), deltas, merged)
    assert bool((np.diff(results) >= 0).all()), "the merge is monotone"
    found, start, count = np.unique(results, return_index=True, return_counts=True)
    fits = abs(found) < REFUSED
    return stored(found[fits], merged), keys[start[fits]], count[fits] - 1


def intervals_of(base: torch.dtype, merged: Tensor, deltas: Tensor) -> Intervals:
    return Preimages(base, merged.dtype, 1).intervals(bits_view(merged), deltas.numpy())


# Intervals.


@pytest.mark.parametrize(("name", "out_name"), list(product(SMALL, SMALL)))
def test_intervals_are_those_of_brute_force(name: str, out_name: str) -> None:
    base, merged = DTYPES[name], DTYPES[out_name]
    pairs = 0
    for delta in some_deltas(1, base, merged, 80 if base.itemsize == 1 else 40):
        results, first, spare = brute_force(base, merged, delta)
        deltas = torch.full(results.shape, delta, dtype=work_dtype(base, merged))
        found = intervals_of(base, results, deltas)
        assert np.array_equal(found.first, first), delta
        assert np.array_equal(found.spare, spare), delta
        pairs += results.numel()
    assert pairs > 4000


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_intervals_are_those_of_the_rational_reference(name: str) -> None:
    dtype, form = DTYPES[name], reference.FORMATS[name]
    patterns = [*(form.sign | p for p in range(form.largest_pattern, -1, -1)), *range(form.largest_pattern + 1)]
    for delta in some_deltas(2, dtype, dtype, 20):
        results: dict[int, list[int]] = {}
        for key, pattern in zip(line(dtype).tolist(), patterns, strict=True):
            try:
                total = reference.rounded(reference.decode(pattern, name) + Fraction(delta), "float32")
                results.setdefault(reference.encode(total, name) if delta else pattern, []).append(key)
            except reference.TooLargeError:
                continue
        merged = from_patterns([list(results)], dtype)[0]
        found = intervals_of(dtype, merged, torch.full(merged.shape, delta))
        assert found.first.tolist() == [keys[0] for keys in results.values()]
        assert found.spare.tolist() == [len(keys) - 1 for keys in results.values()]


WIDE = [
    (base, merged)
    for base, merged in product(reference.FORMATS, reference.FORMATS)
    if "float32" in (base, merged) or "float64" in (base, merged)
]


def wide_cases(seed: int, base: torch.dtype, merged: torch.dtype, count: int) -> tuple[Tensor, Tensor]:
    """Base values and deltas of every size, pruned ones, cancelling ones, subnormal ones, and ties."""
    rng = np.random.default_rng(seed)
    work = work_dtype(base, merged)
    low, high = math.log2(torch.finfo(base).tiny), math.log2(min(torch.finfo(base).max, torch.finfo(merged).max))
    size = np.exp2(rng.uniform(max(low, -300), min(high, 300) - 2, count)) * rng.choice([-1, 1], count)
    numbers = np.where(rng.random(count) < 0.3, size, rng.standard_normal(count) * 0.02)
    numbers[: count // 8] = 0.0
    numbers[: count // 16] = -0.0
    numbers[count // 8 : count // 6] = rng.standard_normal(count // 6 - count // 8) * torch.finfo(base).tiny
    values = torch.from_numpy(numbers).to(base)
    deltas = values.to(torch.float64) * torch.from_numpy(np.exp2(rng.uniform(-30, 10, count)))
    deltas = deltas.clamp(-(2.0 ** (high - 2)), 2.0 ** (high - 2)).to(work)
    deltas[: count // 8] = gaussian(seed, count // 8, std=0.001).to(work)
    kind = torch.from_numpy(rng.integers(0, 4, count))
    deltas = torch.where(kind == 0, deltas.to(base).to(work), deltas)
    deltas = torch.where(kind == 1, -values.to(work) * (1 + 2.0**-12), deltas) + 0.0
    # Whatever a narrow output refuses is of no use here.
    fits = (values.to(work) + deltas).abs() < overflow_limit(merged)
    return values[fits], deltas[fits]


@pytest.mark.parametrize(("name", "out_name"), WIDE)
def test_wide_intervals_end_where_results_change(name: str, out_name: str) -> None:
    base, merged = DTYPES[name], DTYPES[out_name]
    values, deltas = wide_cases(3, base, merged, 3000)
    results = merge_keys(values, deltas, merged)
    found = intervals_of(base, stored(results, merged), deltas)
    top = largest_key(base)
    first, last = found.first.astype(np.int64), (found.first + found.spare.view(found.first.dtype)).astype(np.int64)
    keys = keys_of(values)
    assert bool(((first <= keys) & (keys <= last)).all())
    assert bool(((first >= ~top) & (last <= top)).all())
    for key, inside in ((first, True), (last, True), (first - 1, False), (last + 1, False)):
        exists = (key >= ~top) & (key <= top)
        merges = merge_keys(stored(np.where(exists, key, 0), base), deltas, merged) == results
        assert bool((merges == inside)[exists].all())
    for offset in (-40, -3, -2, -1, 1, 2, 3, 40):
        key = np.clip(keys, -top + 50, top - 50) + offset
        merges = merge_keys(stored(key, base), deltas, merged) == results
        assert np.array_equal(merges, (first <= key) & (key <= last))


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32", "float64"])
def test_counts_fill_the_widest_integers(name: str) -> None:
    """Nearly every double is lost in a sum that is much larger: more than int64 can count."""
    dtype = DTYPES[name]
    even = torch.tensor([torch.finfo(dtype).max / 3 * 2], dtype=dtype)
    bits_view(even)[0] &= ~1
    spacing = stored(keys_of(even) + 1, dtype).double() - even.double()
    half = keys_of((spacing / 2).to(dtype))
    found = intervals_of(dtype, even, even.to(work_dtype(dtype)))
    assert found.first == ~half
    assert int(found.spare[0]) == 2 * int(half[0]) + 1
    assert int(found.spare[0]) > 2 ** (8 * dtype.itemsize - 1)


def test_sums_from_464_on_do_not_become_448() -> None:
    """Conversions to float8_e4m3fn saturate, and 448 is even: neither makes 464 a preimage."""
    largest = torch.tensor([448.0]).to(torch.float8_e4m3fn)
    found = intervals_of(torch.float8_e4m3fn, largest, torch.tensor([400.0]))
    reach = stored(found.first.astype(np.int64) + found.spare.astype(np.int64), torch.float8_e4m3fn)
    assert float(reach) == 60.0  # the next, 64, would be 464
    found = intervals_of(torch.float8_e4m3fn, largest, torch.tensor([16.0]))
    assert keys_of(largest)[0] == found.first[0] + found.spare[0] + 1  # 432 and some below, not 448 + 16


@pytest.mark.parametrize("name", reference.FORMATS)
def test_where_nothing_is_added_zeros_keep_their_signs(name: str) -> None:
    dtype = DTYPES[name]
    values = torch.tensor([-0.0, 0.0, 1.0, -2.0]).to(dtype)
    found = intervals_of(dtype, values, torch.zeros(4, dtype=work_dtype(dtype)))
    assert np.array_equal(found.first, keys_of(values))
    assert found.spare.tolist() == [0, 0, 0, 0]
    # From a wider dtype there are others on either side.
    found = intervals_of(torch.float64, values[:2], torch.zeros(2, dtype=torch.float64))
    assert int(found.first[0]) + int(found.spare[0]) == -1
    assert int(found.first[1]) == 0


def test_results_that_nothing_merges_to_do_no_harm() -> None:
    for name, out_name in (("bfloat16", "bfloat16"), ("float8_e4m3fn", "float8_e4m3fn"), ("float64", "float64")):
        base, merged = DTYPES[name], DTYPES[out_name]
        results = torch.tensor([math.nan, math.inf, -math.inf, 1.0, -1.0]).to(merged)
        deltas = torch.tensor([0.0, 1.0, -3.0, 3e38, -3e38], dtype=work_dtype(base, merged))
        found = intervals_of(base, results, deltas)
        top = largest_key(base)
        assert bool((found.first.astype(np.int64) >= ~top).all())
        assert bool((found.first.astype(np.int64) <= top + 1).all())
        Preimages(base, merged, 5).survey(results, deltas, torch.empty(5, dtype=base))


def test_a_result_that_nothing_merges_to_needs_no_index() -> None:
    """Around 1024 bfloat16 values lie 8 apart, so that no sum with 1024 is a half."""
    found = intervals_of(torch.bfloat16, torch.tensor([0.5]).to(torch.bfloat16), torch.tensor([1024.0]))
    assert found.spare.tolist() == [0]


@pytest.mark.parametrize(
    ("name", "share"), [("bfloat16", 0.002), ("float16", 0.01), ("float32", 0.01), ("float64", 0.5)]
)
def test_hardly_any_interval_needs_a_search(name: str, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    searched = 0
    search = Preimages._search

    def counted(self: Preimages, threshold: Values, change: Any) -> Bits:
        nonlocal searched
        searched += threshold.size
        return search(self, threshold, change)

    monkeypatch.setattr(Preimages, "_search", counted)
    dtype = DTYPES[name]
    values = gaussian(1, 1 << 16, dtype=dtype, std=0.02)
    values[::3] = 0
    deltas = gaussian(2, 1 << 16, dtype=work_dtype(dtype), std=0.001)
    intervals_of(dtype, stored(merge_keys(values, deltas, dtype), dtype), deltas)
    assert searched < share * 2 * values.numel()


# Edges.


@pytest.mark.parametrize("work", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SMALL)
def test_casts_change_at_the_edges_of_every_value(name: str, work: torch.dtype) -> None:
    dtype = DTYPES[name]
    values = stored(line(dtype), dtype)
    least, beyond = (torch.from_numpy(edge) for edge in edges_of(bits_view(values), dtype, work))
    infinity = torch.tensor(math.inf, dtype=work)
    not_zero = values != 0
    for sums in (least, torch.nextafter(beyond, -infinity)):
        # -0.0 begins below -0.0, and a difference of -0.0 never comes from a sum.
        assert same_bits(cast(sums, torch.empty_like(values))[not_zero], values[not_zero])
    assert torch.equal(beyond[:-1], least[1:]), "each begins where the one below ends"
    assert float(beyond[-1]) == overflow_limit(dtype)
    assert float(torch.nextafter(least[0], -infinity)) == -overflow_limit(dtype)


def test_edges_of_float32_are_midpoints_in_float64() -> None:
    values = torch.tensor([1.0, 1.0 + 2.0**-23, -1.0, torch.finfo(torch.float32).max, 2.0**-149, 0.0, -0.0])
    least, beyond = edges_of(bits_view(values), torch.float32, torch.float64)
    limit = overflow_limit(torch.float32)

    def up(value: float) -> float:
        return math.nextafter(value, math.inf)

    assert least.tolist() == [
        1 - 2.0**-25,
        up(1 + 2.0**-24),
        -(1 + 2.0**-24),
        up(limit - 2.0**104),
        up(2.0**-150),
        0.0,
        -(2.0**-150),
    ]
    assert beyond.tolist() == [
        up(1 + 2.0**-24),
        1 + 3 * 2.0**-24,
        up(-1 + 2.0**-25),
        limit,
        3 * 2.0**-150,
        up(2.0**-150),
        0.0,
    ]


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_the_table_of_bytes_holds_their_values(name: str) -> None:
    values = stored(line(DTYPES[name]), DTYPES[name])
    table = by_pattern(DTYPES[name], torch.float32)
    assert np.array_equal(table[bits_view(values).view(np.uint8)], values.float().numpy())
    beyond = np.array([largest_key(DTYPES[name]) + 1, -largest_key(DTYPES[name]) - 2], np.int8)
    assert values_at(beyond, DTYPES[name], torch.float32).tolist() == [math.inf, -math.inf]


# The survey.


@pytest.mark.parametrize(("name", "out_name"), list(product(SMALL, SMALL)))
def test_the_survey_overlooks_nothing_but_ties_of_subnormals_in_bytes(name: str, out_name: str) -> None:
    base, merged = DTYPES[name], DTYPES[out_name]
    preimages = Preimages(base, merged, 1 << 16)
    for delta in some_deltas(5, base, merged, 24 if base.itemsize == 1 else 12):
        results, first, spare = brute_force(base, merged, delta)
        out = torch.empty(results.shape, dtype=base)
        deltas = torch.full(results.shape, delta, dtype=preimages.work)
        flags = preimages.survey(results, deltas, out)
        overlooked = ~flags & ((spare > 0) | (keys_of(out) != first))
        if base == merged and base.itemsize == 1:
            overlooked &= (out.float().abs() > torch.finfo(base).smallest_normal).numpy()
        assert not overlooked.any(), delta


@pytest.mark.parametrize(("name", "out_name"), WIDE)
def test_the_survey_overlooks_hardly_anything_among_wide_dtypes(name: str, out_name: str) -> None:
    base, merged = DTYPES[name], DTYPES[out_name]
    values, deltas = wide_cases(6, base, merged, 4000)
    results = stored(merge_keys(values, deltas, merged), merged)
    out = torch.empty_like(values)
    flags = Preimages(base, merged, values.numel()).survey(results, deltas, out)
    overlooked = ~flags & ((intervals_of(base, results, deltas).spare > 0) | (keys_of(out) != keys_of(values)))
    assert overlooked.sum() <= 2


@pytest.mark.parametrize("name", reference.FORMATS)
def test_candidates_are_what_subtracting_gives(name: str) -> None:
    dtype = DTYPES[name]
    values = gaussian(1, 999, dtype=dtype)
    values[:2] = torch.tensor([0.0, -0.0]).to(dtype)
    kernel = TileKernel(work_dtype(dtype), 999)
    deltas = kernel.delta(gaussian(2, 999, dtype=torch.float64, std=0.3)).clone()
    deltas[:2] = 0
    out, expected = torch.empty_like(values), torch.empty_like(values)
    Preimages(dtype, dtype, 2000).survey(values, deltas, out)
    assert same_bits(out, kernel.subtract(values, deltas, expected))


def test_candidates_are_rounded_once() -> None:
    """From float64 to bfloat16 by way of float32 a number just above a tie would go to the even side."""
    merged, delta = torch.tensor([1 + 2.0**-8]), torch.tensor([-(2.0**-50)], dtype=torch.float64)
    out = torch.empty(1, dtype=torch.bfloat16)
    Preimages(torch.bfloat16, torch.float32, 1).survey(merged, delta, out)
    assert float(out) == 1 + 2.0**-7


@pytest.mark.parametrize("name", reference.FORMATS)
def test_candidates_stay_finite(name: str) -> None:
    dtype = DTYPES[name]
    info = torch.finfo(dtype)
    values = torch.tensor([info.max, info.min], dtype=torch.float64).to(dtype)
    out = torch.empty_like(values)
    Preimages(dtype, dtype, 2).survey(values, -values.to(work_dtype(dtype)), out)
    assert same_bits(out, values)


@pytest.mark.parametrize(
    ("name", "out_name", "most"),
    [
        ("bfloat16", "bfloat16", 0.042),
        ("float16", "float16", 0.04),
        ("float32", "float32", 0.036),
        ("float64", "float64", 0.07),
        ("bfloat16", "float32", 0.0002),
        ("bfloat16", "float16", 0.01),
    ],
)
def test_the_survey_flags_few(name: str, out_name: str, most: float) -> None:
    base, merged = DTYPES[name], DTYPES[out_name]
    values = gaussian(1, 1 << 17, dtype=base, std=0.02)
    deltas = gaussian(2, 1 << 17, dtype=work_dtype(base, merged), std=0.02 * 0.015)
    results = stored(merge_keys(values, deltas, merged), merged)
    flags = Preimages(base, merged, 1 << 17).survey(results, deltas, torch.empty_like(values))
    assert 0 < flags.mean() < most
