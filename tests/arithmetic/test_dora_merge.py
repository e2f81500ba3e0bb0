"""Merging with gains: round_storage(round_work(g · round_work(w + delta))), against the rational reference."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lines import line, stored
from patterns import DTYPES, awkward, gaussian, same_bits, to_fractions, to_patterns
from torch import Tensor

from lora_cli.arithmetic.ordered import bits_view
from lora_cli.arithmetic.rounding import TileKernel, overflow_limit, work_dtype
from lora_cli.errors import NumericError, ShapeError, UsageError

every_dtype = pytest.mark.parametrize("name", reference.FORMATS)
SMALL = [name for name, form in reference.FORMATS.items() if form.width <= 16]


def merged(base: Tensor, product: Tensor, gains: Tensor, out: torch.dtype | None = None) -> Tensor:
    into = torch.empty_like(base, dtype=out or base.dtype)
    kernel = TileKernel(work_dtype(base.dtype, into.dtype), base.numel())
    return kernel.merge(base, product.to(torch.float64), into, gains.to(kernel.work))


def signed(value: Fraction, name: str, *, negative: bool) -> int:
    """The pattern of a value; of zero, with a sign."""
    return reference.encode(value, name) | (reference.FORMATS[name].sign if negative else 0)


def expected_bits(pattern: int, name: str, product: Fraction, gain: Fraction, gain_sign: bool, out_name: str) -> int:
    """What becomes of one element, step by step."""
    work = reference.working(name, out_name)
    delta = reference.rounded(product, work)
    exact = reference.decode(pattern, name) + delta
    negative = exact < 0 or (delta == 0 and bool(pattern & reference.FORMATS[name].sign))
    result = reference.rounded(gain * reference.rounded(exact, work), work)
    return signed(result, out_name, negative=negative != gain_sign)


@settings(max_examples=250, deadline=None)
@given(st.data())
def test_equals_the_reference(data: st.DataObject) -> None:
    names = st.sampled_from(sorted(DTYPES))
    name = data.draw(names)
    out_name = data.draw(st.one_of(st.just(name), names))
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    work = work_dtype(DTYPES[name], DTYPES[out_name])
    base = awkward(rng, 1, 30, DTYPES[name], data.draw(st.sampled_from([1, 8, 200])))
    product = awkward(rng, 1, 30, DTYPES[data.draw(names)], data.draw(st.sampled_from([1, 8, 60]))).double()
    product *= data.draw(st.sampled_from([0.0, 1.0, 0.3, 2.0**-10, 2.0**-60]))
    gains = awkward(rng, 1, 30, work, data.draw(st.sampled_from([0, 1, 8, 140])))
    rows = (to_patterns(base), to_fractions(product), to_fractions(gains), torch.signbit(gains).tolist())
    elements = list(zip(*(row[0] for row in rows), strict=True))
    try:
        expected = [[expected_bits(p, name, d, g, s, out_name) for p, d, g, s in elements]]
    except reference.TooLargeError:
        with pytest.raises(NumericError, match="do not fit"):
            merged(base, product, gains, DTYPES[out_name])
    else:
        assert to_patterns(merged(base, product, gains, DTYPES[out_name])) == expected


@pytest.mark.parametrize("name", SMALL)
def test_every_value_equals_the_reference(name: str) -> None:
    base = stored(line(DTYPES[name]), DTYPES[name])[:: 1 if DTYPES[name].itemsize == 1 else 41][None]
    for product, near in ((0.0, 1.5), (0.0, -1.0), (0.375, 0.98), (-(2.0**-9), -0.3), (1.0, 2.0**-130), (0.0, 0.0)):
        gain = float(torch.tensor(near))
        fits = ((base.float() + product) * gain).abs() < overflow_limit(base.dtype)
        base_ = base[fits][None]
        found = merged(base_, torch.full(base_.shape, product), torch.full(base_.shape, gain))
        expected = [
            expected_bits(p, name, Fraction(product), Fraction(gain), math.copysign(1, gain) < 0, name)
            for p in to_patterns(base_)[0]
        ]
        assert to_patterns(found)[0] == expected


@pytest.mark.parametrize("out_name", reference.FORMATS)
@every_dtype
def test_a_gain_of_one_changes_nothing(name: str, out_name: str) -> None:
    base = awkward(random.Random(1), 30, 30, DTYPES[name], 3)
    base[0, :2] = torch.tensor([0.0, -0.0]).to(base.dtype)
    product = gaussian(0, 30, 30, dtype=torch.float64)
    product[::2] = 0.0
    plain = torch.empty_like(base, dtype=DTYPES[out_name])
    kernel = TileKernel(work_dtype(base.dtype, plain.dtype), base.numel())
    kernel.merge(base, product, plain)
    assert same_bits(merged(base, product, torch.ones(1), plain.dtype), plain)


@every_dtype
def test_gains_of_rows_columns_and_elements_are_the_same(name: str) -> None:
    base, product = gaussian(0, 7, 9).to(DTYPES[name]), gaussian(1, 7, 9, dtype=torch.float64, std=0.1)
    rows, columns = gaussian(2, 7, 1), gaussian(3, 1, 9)
    for gains in (rows, columns, columns[0]):
        each = merged(base, product, gains.expand(7, 9).contiguous())
        assert same_bits(merged(base, product, gains), each)
        flat = merged(base.flatten(), product.flatten(), gains.expand(7, 9).flatten())
        assert same_bits(flat, each.flatten())


@every_dtype
def test_the_opposite_gain_gives_the_opposite(name: str) -> None:
    base, product = gaussian(0, 500).to(DTYPES[name]), gaussian(1, 500, dtype=torch.float64)
    base[:2] = torch.tensor([0.0, -0.0]).to(base.dtype)
    product[:2] = 0.0
    gains = gaussian(2, 500)
    found, opposite = merged(base, product, gains), merged(base, product, -gains)
    assert bool((bits_view(found) ^ bits_view(opposite) == np.iinfo(bits_view(found).dtype).min).all())


def test_inputs_are_left_alone() -> None:
    base, product, gains = gaussian(0, 50), gaussian(1, 50, dtype=torch.float64), gaussian(2, 50, dtype=torch.float64)
    before = [tensor.clone() for tensor in (base, product, gains)]
    kernel = TileKernel(torch.float64, 50)
    for step in (kernel.merge, kernel.subtract):
        step(base, product, torch.empty_like(base), gains)
        assert all(map(same_bits, before, (base, product, gains)))


# What is refused.


@every_dtype
def test_says_whether_the_base_or_the_result_is_at_fault(name: str) -> None:
    dtype = DTYPES[name]
    base, zeros = torch.ones(3).to(dtype), torch.zeros(3)
    largest = torch.finfo(dtype).max
    for gain in (largest * 1.5, -largest * 1.5) if dtype != torch.float64 else (math.inf, -math.inf):
        with pytest.raises(NumericError, match="do not fit in " + name):
            merged(base, zeros, torch.tensor([1.0, gain, 1.0], dtype=torch.float64))
    bits_view(base)[1] = -1  # all ones is NaN in every format
    for gain in (1.0, 0.0):
        with pytest.raises(NumericError, match="holds NaN or infinity"):
            merged(base, zeros, torch.tensor(gain))


def test_sums_that_overflow_are_refused_whatever_the_gain() -> None:
    base = torch.full((2,), 3e38, dtype=torch.bfloat16)
    for gain in (1e-30, 0.0):
        with pytest.raises(NumericError, match="do not fit"):
            merged(base, torch.full((2,), 3e38), torch.full((2,), gain))
    assert merged(base, torch.full((2,), 1e37), torch.full((2,), 0.5)).float().max() < 2e38
    with pytest.raises(NumericError, match="do not fit"):
        merged(base, torch.zeros(2), torch.full((2,), math.nan))


def test_refuses_gains_that_do_not_fit() -> None:
    base, product = torch.ones(4, 6), torch.zeros(4, 6, dtype=torch.float64)
    kernel = TileKernel(torch.float64, 24)
    for shape in ((4,), (6, 1), (1, 4, 6), (2, 6)):
        for step in (kernel.merge, kernel.subtract):
            with pytest.raises(ShapeError, match="gains do not fit"):
                step(base, product, torch.empty_like(base), torch.ones(shape, dtype=torch.float64))
    with pytest.raises(UsageError, match="gains are not in the working type"):
        kernel.merge(base, product, torch.empty_like(base), torch.ones(4, 6))


# Taking off again.


@every_dtype
def test_taking_off_is_the_opposite_within_rounding(name: str) -> None:
    base = gaussian(0, 2000).to(DTYPES[name])
    kernel = TileKernel(work_dtype(base.dtype), 2000)
    product, gains = (
        gaussian(1, 2000, dtype=torch.float64, std=0.01),
        gaussian(2, 2000, dtype=kernel.work, std=0.02) - 1,
    )
    there = kernel.merge(base, product, torch.empty_like(base), gains)
    back = kernel.subtract(there, product, torch.empty_like(base), gains)
    values = base.double().abs()
    error = (back.double() - base.double()).abs()
    assert bool((error <= 1.2 * torch.finfo(base.dtype).eps * (values + 0.05)).all())
    ones = torch.ones(1, dtype=kernel.work)
    assert same_bits(
        kernel.subtract(there, product, torch.empty_like(base), ones), kernel.subtract(there, product, back)
    )


@every_dtype
def test_what_is_taken_off_stays_finite(name: str) -> None:
    dtype = DTYPES[name]
    info = torch.finfo(dtype)
    values = torch.tensor([info.max, info.min, 0.0, -0.0, 1.0], dtype=torch.float64).to(dtype)
    kernel = TileKernel(work_dtype(dtype), 5)
    gains = torch.tensor([0.5, 0.5, 0.0, -0.0, 0.0], dtype=kernel.work)
    found = kernel.subtract(values, torch.zeros(5, dtype=torch.float64), torch.empty_like(values), gains)
    assert found.double().tolist() == [info.max, info.min, 0.0, 0.0, info.max]
    bits_view(values)[4] = -1
    with pytest.raises(NumericError, match="holds NaN or infinity"):
        kernel.subtract(values, torch.zeros(5, dtype=torch.float64), torch.empty_like(values), gains)
