"""The strength of a change that is there, against dense float64 arithmetic."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_cli.arithmetic.strength import SAMPLE_EVERY, SAMPLE_RUN, Strength, sampled

TYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]


def work(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype.itemsize >= 4 else torch.float32


def pair(dtype: torch.dtype, spread: float, times: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(4000, generator=generator, dtype=torch.float64).to(torch.float32).to(dtype)
    delta = (torch.randn(4000, generator=generator, dtype=torch.float64) * spread).to(work(dtype))
    delta[::5] = 0.0
    result = (base.to(torch.float64) + times * delta.to(torch.float64)).to(torch.float32).to(dtype)
    return base, result, delta


@pytest.mark.parametrize("spread", [1e-3, 0.3])
@pytest.mark.parametrize("dtype", TYPES)
def test_it_is_the_projection_on_what_was_meant(dtype: torch.dtype, spread: float) -> None:
    base, result, delta = pair(dtype, spread)
    whole, parts = Strength(), Strength()
    whole.add(base, result, delta)
    for part in (slice(0, 1300), slice(1300, 1301), slice(1301, 4000)):
        other = Strength()
        other.add(base[part], result[part], delta[part])
        parts.take(other)
    change, meant = result.to(torch.float64) - base.to(torch.float64), delta.to(torch.float64)
    expected = float(change @ meant / (meant @ meant))
    for found in (whole, parts):
        assert found.value == pytest.approx(expected, rel=1e-4)
        assert found.energy == pytest.approx(float(change @ change), rel=1e-4)
        assert found.elements == 4000
        assert found.changed == int((change != 0).sum())
        assert found.changed_fraction == found.changed / 4000


@pytest.mark.parametrize("times", [0.0, 0.5, 1.0, 2.0, -1.0])
def test_a_multiple_of_the_change_has_that_strength(times: float) -> None:
    strength = Strength()
    strength.add(*pair(torch.float64, 0.1, times))
    assert strength.value == pytest.approx(times, abs=1e-5)


@pytest.mark.parametrize("spread", [1e-30, 1e-22, 1e18])
def test_numbers_whose_squares_do_not_fit_in_float32_count_as_well(spread: float) -> None:
    delta = torch.linspace(-1, 1, 999) * spread
    strength = Strength()
    strength.add(torch.zeros(999), delta, delta)
    assert strength.value == pytest.approx(1.0)


def test_a_sign_of_zero_is_a_change_and_no_strength() -> None:
    strength = Strength()
    strength.add(torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0]), torch.tensor([0.0, 0.0]))
    assert (strength.changed, strength.value) == (1, None)
    assert (Strength().value, Strength().changed_fraction) == (None, 0.0)


# The sample

STEP = SAMPLE_RUN * SAMPLE_EVERY
Runs = list[tuple[int, int]]


def runs(offset: int, count: int) -> Runs:
    """The sample of `count` weights from `offset` on, as places in their tensor; it is checked to lie within them."""
    parts = list(sampled(offset, count))
    assert all(part.step is None and 0 <= part.start < part.stop <= count for part in parts)
    assert all(one.stop <= other.start for one, other in itertools.pairwise(parts))
    return [(offset + part.start, offset + part.stop) for part in parts]


def joined(parts: Runs) -> Runs:
    """The same places as runs that do not touch."""
    found: Runs = []
    for begin, end in parts:
        found.append((found.pop()[0] if found and found[-1][1] == begin else begin, end))
    return found


CHOSEN = [0, 9, 3, 13, 7, 1, 11, 5, 15, 8, 2, 12]
"""Which of its sixteen runs each stretch has in the sample: the fraction of its number times the golden ratio."""


def expected(total: int) -> Runs:
    """Of each sixteen runs one, as it is said."""
    begins = [number * STEP + run * SAMPLE_RUN for number, run in enumerate(CHOSEN)]
    return [(begin, min(begin + SAMPLE_RUN, total)) for begin in begins if begin < total]


def test_the_sample_is_in_step_with_nothing() -> None:
    """A change may be in the same rows of each head, and heads come powers of two apart."""
    begins = [begin // SAMPLE_RUN for begin, _ in runs(0, 4096 * STEP)]
    assert [begin % 16 for begin in begins[:12]] == CHOSEN
    for period in (2, 4, 8, 16, 32, 64, 128):
        counts = torch.bincount(torch.tensor(begins) % period, minlength=period)
        assert counts.max() <= 1.2 * counts.min() + 8


near = st.sampled_from([at * SAMPLE_RUN for at in (0, 1, 2, 15, 16, 17, 31, 32, 33, 48)])
places = st.one_of(st.integers(0, 4 * STEP), st.builds(lambda at, by: max(0, at + by), near, st.integers(-3, 3)))


@given(total=places, cuts=st.lists(places, max_size=12))
def test_the_sample_is_the_same_weights_whatever_the_pieces(total: int, cuts: list[int]) -> None:
    ends = sorted({0, total, *(cut for cut in cuts if cut < total)})
    found = [run for begin, end in itertools.pairwise(ends) for run in runs(begin, end - begin)]
    assert joined(found) == runs(0, total) == expected(total)


@given(length=st.integers(1, 5000), total=st.integers(1, 3 * STEP))
def test_the_sample_is_the_same_weights_in_pieces_of_one_length(length: int, total: int) -> None:
    length = max(length, total // 200)
    found = [run for at in range(0, total, length) for run in runs(at, min(length, total - at))]
    assert joined(found) == expected(total)


@pytest.mark.parametrize("count", [1, 2, SAMPLE_RUN - 1, SAMPLE_RUN])
def test_the_first_run_is_whole_and_so_are_short_tensors(count: int) -> None:
    assert runs(0, count) == [(0, count)]
    assert runs(0, STEP + 1)[0] == (0, SAMPLE_RUN)
    assert list(sampled(count, 0)) == []


@pytest.mark.parametrize("elements", [STEP // 2, STEP, 5 * STEP + 1, 100 * STEP - 1, 1000 * STEP + 3 * SAMPLE_RUN])
def test_a_sixteenth_of_a_long_tensor_is_looked_at(elements: int) -> None:
    seen = sum(end - begin for begin, end in runs(0, elements))
    assert abs(seen - elements / 16) <= SAMPLE_RUN
    assert sum(end - begin for begin, end in runs(0, 64 * STEP)) * 16 == 64 * STEP


@pytest.fixture(scope="module")
def whole_numbers() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Base, result and delta with 2.3 runs in the sample, such that every sum is exact in any order."""
    count = 2 * STEP + CHOSEN[2] * SAMPLE_RUN + 3 * SAMPLE_RUN // 10
    generator = torch.Generator().manual_seed(5)
    base = torch.randint(-8, 9, (count,), generator=generator).to(torch.float32)
    delta = torch.randint(-2, 3, (count,), generator=generator).to(torch.float32)
    kept = torch.randint(0, 2, (count,), generator=generator).to(torch.float32)
    return base, base + delta * kept, delta


@pytest.mark.parametrize("length", [None, 1 << 18, 99_991, SAMPLE_RUN])
def test_sampling_adds_what_is_in_the_sample(
    whole_numbers: tuple[torch.Tensor, torch.Tensor, torch.Tensor], length: int | None
) -> None:
    count = len(whole_numbers[0])
    sampling, adding = Strength(), Strength()
    for at in range(0, count, length or count):
        sampling.sample(at, *(side[at : at + (length or count)] for side in whole_numbers))
    picked = [torch.cat([side[begin:end] for begin, end in expected(count)]) for side in whole_numbers]
    adding.add(picked[0], picked[1], picked[2])
    assert sampling == adding
    assert sampling.elements == 2 * SAMPLE_RUN + 3 * SAMPLE_RUN // 10
    assert sampling.value == pytest.approx(0.5, abs=0.01)


def test_pieces_without_deltas_or_beside_the_sample_add_nothing() -> None:
    numbers = torch.ones(100)
    strength = Strength()
    strength.sample(0, numbers, numbers + 1, None)
    strength.sample(SAMPLE_RUN, numbers, numbers + 1, numbers)
    next_one = STEP + CHOSEN[1] * SAMPLE_RUN
    strength.sample(next_one - 100, numbers, numbers + 1, numbers)
    assert strength == Strength()
    strength.sample(next_one - 99, numbers, numbers + 1, numbers)
    assert (strength.elements, strength.meant) == (1, 1.0)
