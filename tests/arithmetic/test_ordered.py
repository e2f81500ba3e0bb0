"""The line of ordered integers, over all patterns where they can be counted."""

from __future__ import annotations

import math

import numpy as np
import pytest
import reference
import torch
from patterns import DTYPES, INTEGERS, from_patterns, gaussian, same_bits

from lora_cli.arithmetic import ordered
from lora_cli.errors import ShapeError, UnsupportedError

SMALL = [name for name, form in reference.FORMATS.items() if form.width <= 16]


def all_finite(name: str) -> torch.Tensor:
    """Every finite value once, in the order of the line: -largest … -0.0, +0.0 … largest."""
    largest = reference.FORMATS[name].largest_pattern
    sign = reference.FORMATS[name].sign
    line = [*(sign | p for p in range(largest, -1, -1)), *range(largest + 1)]
    return from_patterns([line], DTYPES[name])[0]


@pytest.mark.parametrize("name", reference.FORMATS)
def test_keys_are_their_own_inverse_and_zeros_stand_at_minus_one_and_zero(name: str) -> None:
    zeros = torch.tensor([-0.0, 0.0], dtype=DTYPES[name])
    assert ordered.to_ordered(ordered.bits_view(zeros)).tolist() == [-1, 0]
    width = reference.FORMATS[name].width
    patterns = np.random.default_rng(0).bytes(1 << 12)
    bits = np.frombuffer(patterns, dtype=f"int{width}")
    keys = ordered.to_ordered(bits)
    assert keys.dtype == bits.dtype
    assert np.array_equal(ordered.from_ordered(keys), bits)
    in_place = bits.copy()
    assert ordered.to_ordered(in_place, in_place) is in_place
    assert np.array_equal(in_place, keys)


@pytest.mark.parametrize("name", SMALL)
def test_keys_count_the_finite_values_in_order(name: str) -> None:
    values = all_finite(name)
    keys = ordered.to_ordered(ordered.bits_view(values))
    top = ordered.largest_key(DTYPES[name])
    assert keys.tolist() == list(range(-1 - top, top + 1))
    assert bool((values.double().diff() >= 0).all())


@pytest.mark.parametrize("name", SMALL)
def test_neighbours_step_over_the_whole_line(name: str) -> None:
    values = all_finite(name)
    lower, upper = ordered.neighbours(values)
    assert same_bits(lower[1:], values[:-1])
    assert same_bits(upper[:-1], values[1:])
    assert same_bits(lower[:1], values[:1])  # no step leads to infinity
    assert same_bits(upper[-1:], values[-1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_neighbours_of_wide_types_agree_with_numpy(dtype: torch.dtype) -> None:
    values = torch.cat([gaussian(1, 50, dtype=dtype), torch.tensor([torch.finfo(dtype).tiny, 1.0], dtype=dtype)])
    lower, upper = ordered.neighbours(values)
    infinity = np.array(math.inf, dtype=values.numpy().dtype)
    assert np.array_equal(lower.numpy(), np.nextafter(values.numpy(), -infinity))
    assert np.array_equal(upper.numpy(), np.nextafter(values.numpy(), infinity))
    single_lower, _ = ordered.neighbours(values[0])
    assert single_lower.shape == ()


def test_bits_view_shares_memory_in_every_dtype() -> None:
    for dtype in DTYPES.values():
        tensor = torch.zeros(2, 3, dtype=dtype)
        view = ordered.bits_view(tensor)
        assert view.shape == (2, 3)
        assert view.itemsize == dtype.itemsize
        view[1, 2] = 1
        assert int(tensor.view(INTEGERS[dtype.itemsize])[1, 2]) == 1
    with pytest.raises(UnsupportedError, match="cannot take a delta"):
        ordered.bits_view(torch.zeros(2, dtype=torch.int32))


def test_distance_counts_steps_and_takes_both_zeros_for_one_value() -> None:
    for name in SMALL:
        values = all_finite(name)
        zero = torch.zeros_like(values)
        half = ordered.largest_key(DTYPES[name])
        expected = [*range(half, -1, -1), *range(half + 1)]
        assert ordered.ulp_distances(values, zero).tolist() == expected
        minus_zero = torch.full_like(zero.float(), -0.0).to(zero.dtype)
        assert ordered.ulp_distances(minus_zero, values).tolist() == expected
        assert ordered.ulp_distance(values[:1], values[-1:]) == 2 * half


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distance_over_the_whole_line_does_not_wrap(dtype: torch.dtype) -> None:
    top = torch.tensor([torch.finfo(dtype).max], dtype=dtype)
    expected = 2 * reference.FORMATS[str(dtype).removeprefix("torch.")].largest_pattern
    assert ordered.ulp_distance(top, -top) == ordered.ulp_distance(-top, top) == expected


def test_distance_leaves_out_pairs_that_are_not_finite() -> None:
    a = torch.tensor([1.0, math.inf, math.nan, 2.0])
    b = torch.tensor([1.0, 1.0, 1.0, math.inf])
    assert ordered.ulp_distance(a, b) == 0
    assert ordered.ulp_distance(a[:0], b[:0]) == 0
    assert ordered.ulp_distances(a[3:], torch.tensor([torch.finfo(torch.float32).max])).tolist() != [0]
    with pytest.raises(ShapeError):
        ordered.ulp_distance(a, b[:2])
    with pytest.raises(ShapeError):
        ordered.ulp_distance(a, b.double())


@pytest.mark.parametrize("name", SMALL)
def test_ulp_is_the_step_away_from_zero(name: str) -> None:
    values = all_finite(name)
    values = values[values.numel() // 2 :].double()
    steps = values.diff()
    assert torch.equal(ordered.ulp(values[:-1], DTYPES[name]), steps)
    assert torch.equal(ordered.ulp(-values[:-1], DTYPES[name]), steps)
    assert torch.equal(ordered.ulp(values[:-1] + steps / 2, DTYPES[name]), steps)
    beyond = torch.tensor([values[-1], 2 * values[-1], math.inf, -math.inf, math.nan], dtype=torch.float64)
    assert ordered.ulp(beyond, DTYPES[name]).tolist() == [float(steps[-1])] * 5


def test_ulp_of_wide_types_agrees_with_numpy() -> None:
    for dtype in (torch.float32, torch.float64):
        info = torch.finfo(dtype)
        values = torch.tensor([0.0, info.smallest_normal, 1.0, 1.5, -2.0, info.max / 3], dtype=dtype)
        values = torch.cat([values, gaussian(3, 100, dtype=dtype), values[1:2] / 4])
        expected = np.abs(np.spacing(values.numpy())).astype(np.float64)
        assert np.array_equal(ordered.ulp(values.double(), dtype).numpy(), expected)
