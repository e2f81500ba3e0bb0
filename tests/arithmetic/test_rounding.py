"""One rounding at each step: against the rational reference, over all midpoints, and against fixed digests."""

from __future__ import annotations

import contextlib
import hashlib
import math
import random
import threading
from collections.abc import Callable, Iterator

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from patterns import (
    DTYPES,
    awkward,
    from_patterns,
    gaussian,
    same_bits,
    to_patterns,
    to_reference,
)
from torch import Tensor

from lora_cli.arithmetic import rounding
from lora_cli.arithmetic.ordered import bits_view
from lora_cli.arithmetic.product import Term, prepare
from lora_cli.arithmetic.rounding import TileKernel, cast, overflow_limit, slices_for, work_dtype
from lora_cli.errors import NumericError, ShapeError, UnsupportedError, UsageError

ALL = slice(None)
SMALL = [name for name, form in reference.FORMATS.items() if form.width <= 16]
every_dtype = pytest.mark.parametrize("name", reference.FORMATS)


def merged(base: Tensor, terms: list[Term], out_dtype: torch.dtype | None = None) -> Tensor:
    """The fast path, over the whole tensor at once."""
    out = torch.empty_like(base, dtype=out_dtype or base.dtype)
    work = work_dtype(base.dtype, out.dtype)
    kernel = TileKernel(work, base.numel())
    return kernel.merge(base, kernel.product(prepare(terms, slices=slices_for(work)), ALL, ALL), out)


def merge_one(base: Tensor, delta: float, out_dtype: torch.dtype | None = None) -> Tensor:
    """Add one number to all of a vector."""
    out = torch.empty_like(base, dtype=out_dtype or base.dtype)
    product = torch.full(base.shape, delta, dtype=torch.float64)
    return TileKernel(work_dtype(base.dtype, out.dtype), base.numel()).merge(base, product, out)


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


# Every rounding of the narrow formats.


def midpoints(name: str, source: torch.dtype) -> tuple[Tensor, Tensor]:
    """All midpoints between neighbours, and the numbers of `source` right below and above, with their patterns."""
    form = reference.FORMATS[name]
    values = from_patterns([list(range(form.largest_pattern + 1))], DTYPES[name])[0].to(torch.float64)
    middle = ((values[:-1] + values[1:]) / 2).to(source)
    assert torch.equal(middle.double() * 2, values[:-1] + values[1:])
    infinity = torch.tensor(math.inf, dtype=source)
    inputs = [torch.nextafter(middle, -infinity), middle, torch.nextafter(middle, infinity)]
    lower = torch.arange(form.largest_pattern)
    outputs = [lower, lower + (lower & 1), lower + 1]
    negative = [-x for x in inputs], [form.sign | y for y in outputs]
    return torch.cat([*inputs, *negative[0]]), torch.cat([*outputs, *negative[1]])


def widen(tensor: Tensor, out: Tensor) -> Tensor:
    """Merge a delta of zero: the cast of the merge kernel."""
    product = torch.zeros(tensor.shape, dtype=torch.float64)
    return TileKernel(work_dtype(tensor.dtype, out.dtype), tensor.numel()).merge(tensor, product, out)


@pytest.mark.parametrize("convert", [cast, widen])
@pytest.mark.parametrize("source", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SMALL)
def test_all_midpoints_go_to_even_and_their_neighbours_to_the_nearest(
    name: str, source: torch.dtype, convert: Callable[[Tensor, Tensor], Tensor]
) -> None:
    values, expected = midpoints(name, source)
    out = convert(values, torch.empty_like(values, dtype=DTYPES[name]))
    assert to_patterns(out.unsqueeze(0)) == [expected.tolist()]


@pytest.mark.parametrize("name", SMALL)
def test_the_sum_of_float32_rounds_all_midpoints_to_even(name: str) -> None:
    """In a merge of 16 bits the working value is a float32: make it the midpoint itself, as 0 + delta."""
    values, expected = midpoints(name, torch.float32)
    base = torch.zeros(values.shape).to(DTYPES[name])
    out = TileKernel(torch.float32, values.numel()).merge(base, values.double(), torch.empty_like(base))
    nonzero = values != 0
    assert torch.equal(torch.tensor(to_patterns(out.unsqueeze(0)))[0][nonzero], expected[nonzero].to(torch.int64))


def test_torch_alone_rounds_float64_twice() -> None:
    """Why the sticky bit is there. Should torch mend this, the test says that it can go."""
    just_above_a_tie = torch.tensor([1 + 2.0**-8 + 2.0**-50], dtype=torch.float64)
    assert float(just_above_a_tie.to(torch.bfloat16)) == 1.0
    assert float(cast(just_above_a_tie, torch.empty(1, dtype=torch.bfloat16))) == 1 + 2.0**-7


@pytest.mark.parametrize("source", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("out_name", reference.FORMATS)
def test_casts_of_any_pattern(source: str, out_name: str) -> None:
    rng = random.Random(3)
    tensor = awkward(rng, 40, 40, DTYPES[source], 12)
    tensor[tensor.abs() >= overflow_limit(DTYPES[out_name])] = 1.0
    expected = [[reference.cast_bits(p, source, out_name) for p in row] for row in to_patterns(tensor)]
    before = tensor.clone()
    assert to_patterns(cast(tensor, torch.empty_like(tensor, dtype=DTYPES[out_name]))) == expected
    assert same_bits(tensor, before)


def test_casts_keep_infinity_and_write_one_nan() -> None:
    specials = [math.inf, -math.inf, 1.0]
    nans = from_patterns([[0x7FC0_0000, 0xFFC0_1234, 0x7F80_0001]], torch.float32)[0]
    for source in (torch.float64, torch.float32):
        tensor = torch.cat([torch.tensor(specials), nans]).to(source)
        for dtype in (torch.bfloat16, torch.float16):
            out = cast(tensor, torch.empty(6, dtype=dtype))
            assert out[:3].tolist() == specials
            assert len(set(to_patterns(out[3:].unsqueeze(0))[0])) == 1
            assert bool(out[3:].isnan().all())
    with pytest.raises(NumericError, match="float8_e4m3fn"):
        cast(torch.tensor([math.inf]), torch.empty(1, dtype=torch.float8_e4m3fn))
    same = cast(nans, torch.empty_like(nans))
    assert same_bits(same, nans)


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


# Golden digests: the same on every machine.


def congruential(seed: int) -> Iterator[int]:
    """Numbers that need no library: Knuth's 64-bit linear congruential generator, its upper half."""
    while True:
        seed = (seed * 6364136223846793005 + 1442695040888963407) % 2**64
        yield seed >> 32


def fixture(name: str) -> tuple[Tensor, list[Term]]:
    numbers = congruential(2026)

    def matrix(rows: int, columns: int, exponent: int) -> Tensor:
        values = [[(next(numbers) - 2**31) * 2.0 ** (exponent - 31) for _ in range(columns)] for _ in range(rows)]
        return torch.tensor(values, dtype=torch.float64)

    base = matrix(29, 43, -3).to(torch.float32).to(DTYPES[name])
    terms = [
        Term(matrix(29, 5, -6).to(torch.float32), matrix(5, 43, -1).to(torch.float32), 2.0),
        Term(matrix(29, 3, -25).to(torch.float32), matrix(3, 43, 4).to(torch.float32), 0.1),
        Term(matrix(29, 2, 1).to(torch.bfloat16), matrix(2, 43, -5).to(torch.bfloat16), 1 / 3),
    ]
    return base, terms


GOLDEN = {
    "bfloat16": "5b5905bec8173cbddda2b55643124fc2f9d13313bc07494faa65984cd2f0d4b0",
    "float16": "2464bcd2f6d5872e94bc1b896d22b9ad314d6f2365e918709fe18c8287f4c971",
    "float32": "f94f2ca1b86eed846e121cdbcdb10ddc09cdc9c228db1f2147ddcac1d6fcddae",
    "float64": "e66f5aaf14a51d4c902a0f852aa7ac07fa0af92db2983dc1fbaacb18f81e3515",
    "float8_e4m3fn": "04dbcd6e947ae413c2f1f274ee45033210a460c5e95cddc090fd31ea8dd988b8",
    "float8_e5m2": "6564b5314be6bbbccf3ede3fd75f0f4b9e2305ce96cc1e616ec4c0854bea17ce",
}


@every_dtype
def test_golden_digest(name: str) -> None:
    base, terms = fixture(name)
    fast = hashlib.sha256(bits_view(merged(base, terms)).tobytes()).hexdigest()
    patterns = reference.merged_bits(to_patterns(base), name, to_reference(terms))
    width = reference.FORMATS[name].width // 8
    slow = hashlib.sha256(b"".join(p.to_bytes(width, "little") for row in patterns for p in row)).hexdigest()
    assert slow == GOLDEN[name]
    assert fast == GOLDEN[name]
    assert not same_bits(merged(base, terms), base)
