"""Intervals of preimages where sums have gains: against brute force, and by their two ends where that is too much."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest
import reference
import torch
from lines import REFUSED, Keys, fitting, keys_of, line, merge_keys, stored
from patterns import DTYPES, gaussian, same_bits
from torch import Tensor

from lora_cli.arithmetic.edges import Values
from lora_cli.arithmetic.ordered import Bits, bits_view, largest_key
from lora_cli.arithmetic.preimages import Intervals, Preimages
from lora_cli.arithmetic.rounding import TileKernel, work_dtype

SMALL = [name for name, form in reference.FORMATS.items() if form.width <= 16]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the workers have it: a thread to a core, and none of torch's own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def some_gains(rng: np.random.Generator) -> list[float]:
    """Such as are usual, such as make ties, and such as leave little of anything."""
    return [
        1.0,
        *rng.normal(1, 0.02, 3),
        *rng.normal(-1, 0.3, 2),
        *2.0 ** rng.integers(-3, 4, 2),
        1.5,
        -0.75,
        1.25 * 2.0 ** rng.uniform(-9, 9),
        2.0 ** rng.uniform(-120, -20),
        -(2.0 ** rng.uniform(5, 60)),
        0.0,
        -0.0,
    ]


def some_maps(seed: int, base: torch.dtype, merged: torch.dtype, count: int) -> Iterator[tuple[float, float]]:
    """Deltas and gains in the working type: zero deltas, stored values and halves of their spacings among them."""
    rng = np.random.default_rng(seed)
    work = work_dtype(base, merged)
    for number in range(count):
        delta = torch.tensor(rng.choice([-1, 1]) * 2.0 ** rng.uniform(-12, 6), dtype=work)
        coarse = delta.to(base).to(work)
        gains = some_gains(rng)
        gain = torch.tensor(gains[number % len(gains)], dtype=work)
        yield float((delta, coarse, coarse * 1.5, coarse * 0)[number % 4]) + 0.0, float(gain)


def brute_force(base: torch.dtype, merged: torch.dtype, delta: float, gain: float) -> tuple[Tensor, Keys, Keys]:
    """All results, the first key that merges to each, and how many others do."""
    keys = line(base)
    deltas, gains = (torch.full(keys.shape, number, dtype=work_dtype(base, merged)) for number in (delta, gain))
    results = merge_keys(stored(keys, base), deltas, merged, gains)
    steps = np.diff(results)
    assert bool((steps <= 0).all() if np.signbit(gain) else (steps >= 0).all()), "the merge is monotone"
    found, start, count = np.unique(results, return_index=True, return_counts=True)
    fits = abs(found) < REFUSED
    return stored(found[fits], merged), keys[start[fits]], count[fits] - 1


def intervals_of(base: torch.dtype, merged: Tensor, deltas: Tensor, gains: Tensor) -> Intervals:
    return Preimages(base, merged.dtype, 1).intervals(bits_view(merged), deltas.numpy(), gains.numpy())


@pytest.mark.parametrize(("name", "out_name"), list(product(SMALL, SMALL)))
def test_intervals_and_survey_are_those_of_brute_force(name: str, out_name: str) -> None:
    base, merged = DTYPES[name], DTYPES[out_name]
    preimages = Preimages(base, merged, 1 << 16)
    pairs = 0
    for delta, gain in some_maps(1, base, merged, 60 if base.itemsize == 1 else 20):
        results, first, spare = brute_force(base, merged, delta, gain)
        deltas, gains = (torch.full(results.shape, number, dtype=preimages.work) for number in (delta, gain))
        found = intervals_of(base, results, deltas, gains)
        assert np.array_equal(found.first, first), (delta, gain)
        assert np.array_equal(found.spare, spare), (delta, gain)
        out = torch.empty(results.shape, dtype=base)
        flags = preimages.survey(results, deltas, out, gains)
        overlooked = ~flags & ((spare > 0) | (keys_of(out) != first))
        assert not overlooked.any(), (delta, gain)
        pairs += results.numel()
    assert pairs > 2500


WIDE = [
    (base, merged)
    for base, merged in product(reference.FORMATS, reference.FORMATS)
    if "float32" in (base, merged) or "float64" in (base, merged)
]


def wide_cases(seed: int, base: torch.dtype, merged: torch.dtype, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Base values, deltas and gains: pruned and cancelling ones, subnormal ones, ties, and every usual gain."""
    rng = np.random.default_rng(seed)
    work = work_dtype(base, merged)
    values = gaussian(seed, count, dtype=torch.float64, std=0.5)
    values[: count // 8] = 0.0
    values[: count // 16] = -0.0
    values[count // 8 : count // 6] *= torch.finfo(base).tiny
    stored_values = values.float().to(base) if base.itemsize < 4 else values.to(base)
    deltas = (stored_values.double() * torch.from_numpy(np.exp2(rng.uniform(-30, 4, count)))).to(work)
    deltas[: count // 8] = gaussian(seed + 1, count // 8, std=0.001).to(work)
    kind = torch.from_numpy(rng.integers(0, 5, count))
    deltas = torch.where(kind == 0, deltas.to(base).to(work), deltas)
    deltas = torch.where(kind == 1, -stored_values.to(work) * (1 + 2.0**-12), deltas)
    deltas = torch.where(kind == 2, torch.zeros_like(deltas), deltas) + 0.0
    gains = torch.tensor(rng.choice(some_gains(rng), count), dtype=work)
    fits, _ = fitting(stored_values, deltas, merged, gains)
    return stored_values[fits], deltas[fits], gains[fits]


@pytest.mark.parametrize(("name", "out_name"), WIDE)
def test_wide_intervals_end_where_results_change(name: str, out_name: str) -> None:
    base, merged = DTYPES[name], DTYPES[out_name]
    values, deltas, gains = wide_cases(3, base, merged, 3000)
    assert values.numel() > 2000
    results = merge_keys(values, deltas, merged, gains)
    found = intervals_of(base, stored(results, merged), deltas, gains)
    top = largest_key(base)
    first, last = found.first.astype(np.int64), (found.first + found.spare.view(found.first.dtype)).astype(np.int64)
    keys = keys_of(values)
    assert bool(((first <= keys) & (keys <= last)).all())
    assert bool(((first >= ~top) & (last <= top)).all())
    for key, inside in ((first, True), (last, True), (first - 1, False), (last + 1, False)):
        exists = (key >= ~top) & (key <= top)
        merges = merge_keys(stored(np.where(exists, key, 0), base), deltas, merged, gains) == results
        assert bool((merges == inside)[exists].all())


@pytest.mark.parametrize(("name", "out_name"), WIDE)
def test_the_survey_overlooks_hardly_anything_among_wide_dtypes(name: str, out_name: str) -> None:
    base, merged = DTYPES[name], DTYPES[out_name]
    values, deltas, gains = wide_cases(6, base, merged, 4000)
    results = stored(merge_keys(values, deltas, merged, gains), merged)
    out = torch.empty_like(values)
    flags = Preimages(base, merged, values.numel()).survey(results, deltas, out, gains)
    spare = intervals_of(base, results, deltas, gains).spare
    overlooked = ~flags & ((spare > 0) | (keys_of(out) != keys_of(values)))
    assert overlooked.sum() <= 2


@pytest.mark.parametrize("name", reference.FORMATS)
def test_candidates_are_what_taking_off_gives(name: str) -> None:
    dtype = DTYPES[name]
    values = gaussian(1, 999, dtype=torch.float32).to(dtype)
    values[:4] = torch.tensor([0.0, -0.0, 0.0, torch.finfo(dtype).max], dtype=torch.float64).to(dtype)
    kernel = TileKernel(work_dtype(dtype), 999)
    deltas = kernel.delta(gaussian(2, 999, dtype=torch.float64, std=0.3)).clone()
    deltas[:2] = 0
    gains = gaussian(3, 999, dtype=kernel.work, std=0.2) - 1
    gains[2:4] = torch.tensor([0.0, 0.25])
    out, expected = torch.empty_like(values), torch.empty_like(values)
    Preimages(dtype, dtype, 2000).survey(values, deltas, out, gains)
    assert same_bits(out, kernel.subtract(values, deltas, expected, gains))


@pytest.mark.parametrize(
    ("name", "out_name", "most"),
    [
        ("bfloat16", "bfloat16", 0.054),
        ("float16", "float16", 0.054),
        ("float32", "float32", 0.054),
        ("float64", "float64", 0.085),
        ("bfloat16", "float16", 0.004),
    ],
)
def test_the_survey_flags_few(name: str, out_name: str, most: float) -> None:
    base, merged = DTYPES[name], DTYPES[out_name]
    values = gaussian(1, 1 << 17, dtype=base, std=0.02)
    work = work_dtype(base, merged)
    deltas, gains = gaussian(2, 1 << 17, dtype=work, std=0.02 * 0.015), 1 + gaussian(3, 1 << 17, dtype=work, std=0.02)
    results = stored(merge_keys(values, deltas, merged, gains), merged)
    flags = Preimages(base, merged, 1 << 17).survey(results, deltas, torch.empty_like(values), gains)
    assert 0 < flags.mean() < most


@pytest.mark.parametrize(
    ("name", "share"), [("bfloat16", 0.002), ("float16", 0.01), ("float32", 0.01), ("float64", 0.25)]
)
def test_hardly_any_interval_needs_a_search(name: str, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    searched = 0
    search = Preimages._search

    def counted(self: Preimages, threshold: Values, *change: object) -> Bits:
        nonlocal searched
        searched += threshold.size
        return search(self, threshold, *change)  # type: ignore[arg-type]

    monkeypatch.setattr(Preimages, "_search", counted)
    dtype = DTYPES[name]
    values = gaussian(1, 1 << 16, dtype=dtype, std=0.02)
    values[::3] = 0
    work = work_dtype(dtype)
    deltas, gains = gaussian(2, 1 << 16, dtype=work, std=0.001), 1 + gaussian(3, 1 << 16, dtype=work, std=0.3)
    intervals_of(dtype, stored(merge_keys(values, deltas, dtype, gains), dtype), deltas, gains)
    assert searched < share * 2 * values.numel()


def test_a_gain_of_zero_leaves_the_sign() -> None:
    """All of a row is lost, zeros among it: what stays is on which side of minus delta each value was."""
    results = torch.tensor([0.0, -0.0, 0.0, -0.0]).to(torch.bfloat16)
    deltas, gains = torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor([0.0, 0.0, -0.0, -0.0])
    found = intervals_of(torch.bfloat16, results, deltas, gains)
    top, one = largest_key(torch.bfloat16), 0x3F80
    assert found.first.tolist() == [0, ~top, ~top, ~one]
    last = found.first.astype(np.int64) + found.spare
    assert last.tolist() == [top, -1, ~one - 1, top]


def test_results_that_nothing_merges_to_do_no_harm() -> None:
    for name, out_name in (("bfloat16", "bfloat16"), ("float8_e4m3fn", "float8_e4m3fn"), ("float64", "float64")):
        base, merged = DTYPES[name], DTYPES[out_name]
        numbers = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0, -1.0, 0.0, 3.5])
        results = numbers.to(merged)
        work = work_dtype(base, merged)
        for gain in (0.0, 1e-40, float("inf"), float("nan"), -2.0):
            deltas = torch.tensor([0.0, 1.0, -3.0, 3e38, -3e38, 0.0, 1.0], dtype=work)
            gains = torch.full((7,), gain, dtype=work)
            found = intervals_of(base, results, deltas, gains)
            top = largest_key(base)
            assert bool((found.first.astype(np.int64) >= ~top).all())
            assert bool((found.first.astype(np.int64) <= top + 1).all())
            out = torch.empty(7, dtype=base)
            Preimages(base, merged, 7).survey(results, deltas, out, gains)
            assert bool(torch.isfinite(out.double()).all())
