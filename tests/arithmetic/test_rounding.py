"""One rounding at each step: against the rational reference, over all midpoints, and against fixed digests."""

from __future__ import annotations

import contextlib
import math
import random
import threading
from collections.abc import Iterator

import pytest
import reference
import torch
from fast import ALL, merge_one, merged
from hypothesis import given, settings
from hypothesis import strategies as st
from patterns import (
    DTYPES,
    awkward,
    gaussian,
    same_bits,
    to_patterns,
    to_reference,
)

from lora_cli.arithmetic import rounding
from lora_cli.arithmetic.ordered import bits_view
from lora_cli.arithmetic.product import Term, prepare
from lora_cli.arithmetic.rounding import TileKernel, cast, overflow_limit, slices_for, work_dtype
from lora_cli.errors import NumericError, ShapeError, UnsupportedError, UsageError

SMALL = [name for name, form in reference.FORMATS.items() if form.width <= 16]
every_dtype = pytest.mark.parametrize("name", reference.FORMATS)


def test_working_types() -> None:
    assert set(rounding.MERGEABLE) == set(DTYPES.values())
    narrow, wide = (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2), torch.float32
    assert work_dtype(*narrow) == torch.float32
    assert {work_dtype(dtype, wide) for dtype in narrow} == {torch.float64}
    assert work_dtype(torch.float64, torch.bfloat16) == torch.float64
    assert (slices_for(torch.float32), slices_for(torch.float64)) == (1, 2)
    with pytest.raises(UnsupportedError):
        work_dtype(torch.bfloat16, torch.int8)


@every_dtype
def test_overflow_begins_half_a_spacing_above_the_largest(name: str) -> None:
    expected = reference.limit(name)
    assert overflow_limit(DTYPES[name]) == (math.inf if name == "float64" else expected)


# Against the reference.


@settings(max_examples=250, deadline=None)
@given(st.data())
def test_equals_the_reference(data: st.DataObject) -> None:
    names = st.sampled_from(sorted(DTYPES))
    name = data.draw(names)
    out_name = data.draw(st.one_of(st.just(name), names))
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    out, width = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 7))
    span = data.draw(st.sampled_from([0, 2, 10, 60]))
    base = awkward(rng, out, width, DTYPES[name], data.draw(st.sampled_from([1, 8, 200])))
    terms = []
    for rank in data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)):
        factor = DTYPES[data.draw(st.sampled_from(["bfloat16", "float16", "float32", "float8_e5m2"]))]
        scale = data.draw(st.sampled_from([1.0, -0.5, 0.1, 2.0**-10, 2.0**-60, 3e4, 0.0]))
        terms.append(Term(awkward(rng, out, rank, factor, span), awkward(rng, rank, width, factor, span), scale))
    try:
        expected = reference.merged_bits(to_patterns(base), name, to_reference(terms), out_name)
    except reference.TooLargeError:
        with pytest.raises(NumericError, match="do not fit"):
            merged(base, terms, DTYPES[out_name])
    else:
        assert to_patterns(merged(base, terms, DTYPES[out_name])) == expected


@every_dtype
def test_zero_deltas_leave_every_bit_alone(name: str) -> None:
    base = awkward(random.Random(1), 31, 33, DTYPES[name], 200)
    base[0, :2] = torch.tensor([0.0, -0.0]).to(base.dtype)
    for zero in (0.0, -0.0):
        assert same_bits(merge_one(base, zero), base)
    fresh = Term(torch.zeros(31, 4), gaussian(0, 4, 33), -1.0)
    assert same_bits(merged(base, [fresh]), base)


@pytest.mark.parametrize("name", SMALL)
def test_a_delta_that_the_working_type_takes_for_zero_is_zero(name: str) -> None:
    zeros = torch.tensor([[0.0, -0.0]]).to(DTYPES[name])
    for delta in (2.0**-150, -(2.0**-150), 1e-300):
        assert same_bits(merge_one(zeros, delta), zeros)
    # One that it does not take for zero is added, and its sum rounds to zero with its own sign.
    assert same_bits(merge_one(zeros, 2.0**-149), torch.zeros_like(zeros))
    assert same_bits(merge_one(zeros, -(2.0**-149)), torch.full((1, 2), -0.0).to(DTYPES[name]))


@every_dtype
def test_what_cancels_is_plus_zero(name: str) -> None:
    halves = torch.full((3,), 0.5).to(DTYPES[name])
    assert same_bits(merge_one(halves, -0.5), torch.zeros_like(halves))


@pytest.mark.parametrize("out_name", reference.FORMATS)
@every_dtype
def test_zero_deltas_cast_when_the_dtype_changes(name: str, out_name: str) -> None:
    base = awkward(random.Random(2), 9, 9, DTYPES[name], 3)
    base[0, :2] = torch.tensor([0.0, -0.0]).to(base.dtype)
    expected = [[reference.cast_bits(p, name, out_name) for p in row] for row in to_patterns(base)]
    assert to_patterns(merge_one(base, -0.0, DTYPES[out_name])) == expected
    assert to_patterns(cast(base, torch.empty_like(base, dtype=DTYPES[out_name]))) == expected


# Overflow.


@pytest.mark.parametrize("name", [name for name in reference.FORMATS if name != "float64"])
@pytest.mark.parametrize("sign", [1, -1])
def test_overflow_is_found_on_the_working_value(name: str, sign: int) -> None:
    dtype = DTYPES[name]
    limit = overflow_limit(dtype)
    source = torch.float64 if name == "float32" else torch.float32
    last = torch.nextafter(torch.tensor([limit], dtype=source), torch.zeros(1, dtype=source)) * sign
    zero = torch.zeros(1).to(dtype)
    largest = torch.finfo(dtype).max
    assert cast(last, torch.empty(1, dtype=dtype)).double().abs().item() == largest
    assert merge_one(zero, float(last)).double().abs().item() == largest
    with pytest.raises(NumericError, match="do not fit in " + name):
        merge_one(zero, sign * limit)
    with pytest.raises(NumericError, match="do not fit in " + name):
        cast(torch.tensor([limit * sign], dtype=source), torch.empty(1, dtype=dtype))


def test_overflow_of_wider_types() -> None:
    with pytest.raises(NumericError, match="float64"):
        merge_one(torch.tensor([1.5e308], dtype=torch.float64), 1.5e308)
    with pytest.raises(NumericError, match="bfloat16"):
        merge_one(torch.zeros(1, dtype=torch.bfloat16), 1e39)
    with pytest.raises(NumericError, match="float16"):
        merge_one(torch.full((1,), 3e38, dtype=torch.bfloat16), 0.0, torch.float16)


@every_dtype
def test_says_whether_the_base_or_the_sum_is_at_fault(name: str) -> None:
    base = torch.ones(3, 4).to(DTYPES[name])
    bits_view(base)[1, 1] = -1  # all ones is NaN in every format
    with pytest.raises(NumericError, match="holds NaN or infinity") as caught:
        merge_one(base, 0.25)
    assert caught.value.found == "1 values in one tile"
    with pytest.raises(NumericError, match="do not fit") as caught:
        merge_one(torch.ones(3, 4).to(DTYPES[name]), math.inf)
    assert caught.value.found == "inf (12 of them in one tile)"


# The kernel.


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("transposed", [False, True])
def test_tiles_of_any_shape_give_the_same_bytes(name: str, transposed: bool) -> None:
    terms = [Term(gaussian(0, 23, 5), gaussian(1, 5, 19), 0.01)]
    base = gaussian(2, 23, 19, dtype=DTYPES[name])
    expected = merged(base, terms)
    work = work_dtype(base.dtype)
    product = prepare(terms, slices=slices_for(work))
    stored = base.t().contiguous() if transposed else base
    rows, columns = stored.shape
    kernel = TileKernel(work, stored.numel())
    for height, width in ((h, w) for h in (1, 2, 7, 16, 23) for w in (1, 3, 8, 19, 23)):
        out = torch.empty_like(stored)
        for top in range(0, rows, height):
            for left in range(0, columns, width):
                at = slice(top, top + height), slice(left, left + width)
                kernel.merge(stored[at], kernel.product(product, *at, transposed=transposed), out[at])
        assert same_bits(out.t() if transposed else out, expected)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["bfloat16", "float32"])
def test_threads_do_not_show(name: str) -> None:
    terms = [Term(gaussian(0, 515, 16), gaussian(1, 16, 513), 0.01)]
    base = gaussian(2, 515, 513, dtype=DTYPES[name])
    with threads(2):
        on_two = merged(base, terms)
    with threads(1):
        assert same_bits(merged(base, terms), on_two)


@every_dtype
def test_subtracting_is_merging_the_opposite(name: str) -> None:
    base = gaussian(0, 8, 9, dtype=DTYPES[name])
    base[0, :2] = torch.tensor([0.0, -0.0]).to(base.dtype)
    work = work_dtype(base.dtype)
    kernel = TileKernel(work, base.numel())
    b, a = gaussian(1, 8, 3), gaussian(2, 3, 9)
    b[0] = 0
    product = prepare([Term(b, a, 0.1)], slices=slices_for(work))
    out = kernel.subtract(base, kernel.product(product, ALL, ALL), torch.empty_like(base))
    assert same_bits(out, merged(base, [Term(b, a, -0.1)]))
    assert same_bits(out[0], base[0])


def test_delta_has_no_signed_zero_and_leaves_the_product_alone() -> None:
    product = torch.tensor([[0.0, -0.0, 1e-60, -1e-60, 0.1]], dtype=torch.float64)
    for work in (torch.float32, torch.float64):
        delta = TileKernel(work, 5).delta(product)
        assert delta.dtype == work
        assert torch.equal(delta, product.to(work))
        assert not bool(delta[0, :3].signbit().any())
    assert product[0].tolist() == [0.0, -0.0, 1e-60, -1e-60, 0.1]


def test_inputs_stay_as_they_are_and_out_may_be_the_base() -> None:
    for dtype, out_dtype in ((torch.float64, torch.bfloat16), (torch.float32, torch.float32)):
        base = gaussian(0, 4, 5, dtype=dtype)
        product = gaussian(1, 4, 5, dtype=torch.float64)
        before = base.clone(), product.clone()
        kernel = TileKernel(torch.float64, 20)
        out = kernel.merge(base, product, torch.empty_like(base, dtype=out_dtype))
        assert same_bits(base, before[0])
        assert same_bits(product, before[1])
        if dtype == out_dtype:
            assert same_bits(kernel.merge(base, product, base), out)


def test_an_empty_tile_is_merged() -> None:
    empty = torch.empty(0, 5, dtype=torch.bfloat16)
    assert merged(empty, [Term(torch.zeros(0, 2), torch.zeros(2, 5), 1.0)]).shape == (0, 5)


def test_refuses_tiles_that_do_not_fit() -> None:
    kernel = TileKernel(torch.float32, 6)
    base = torch.zeros(2, 4, dtype=torch.bfloat16)
    with pytest.raises(ShapeError, match="larger than the buffers"):
        kernel.merge(base, torch.zeros(2, 4, dtype=torch.float64), base)
    with pytest.raises(ShapeError, match="differ in shape"):  # a bias and its column must not be broadcast
        kernel.merge(base[0], torch.zeros(4, 1, dtype=torch.float64), base[0])
    with pytest.raises(UsageError, match="another type"):
        kernel.merge(base[:, :2].float(), torch.zeros(2, 2, dtype=torch.float64), base[:, :2].float())


def test_flushed_subnormals_are_refused() -> None:
    """R111: arithmetic that takes subnormals for zeros."""
    rounding.check_flush_to_zero()
    caught: list[NumericError] = []
    supported: list[bool] = []

    def flushing() -> None:
        # The setting belongs to the thread, and ends with it.
        supported.append(torch.set_flush_denormal(True))
        try:
            rounding.check_flush_to_zero()
        except NumericError as error:
            caught.append(error)

    thread = threading.Thread(target=flushing)
    thread.start()
    thread.join()
    rounding.check_flush_to_zero()
    assert bool(caught) == supported[0]
    if not caught:
        pytest.skip("this processor cannot flush")
    assert caught[0].hint is not None
    assert "set_flush_denormal" in caught[0].hint
