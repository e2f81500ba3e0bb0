"""The lengths of DoRA's rows: sums whose every bit is defined, however a matrix is cut and stored."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise

import pytest
import reference
import torch
from patterns import gaussian, same_bits, to_fractions
from torch import Tensor

from lora_cli.arithmetic import dora
from lora_cli.arithmetic.dora import GROUP, RUN, SquareSums, gains, square_sums, total
from lora_cli.errors import NumericError, ShapeError, UsageError

WORKING = (torch.float32, torch.float64)
WIDTHS = (1, 2, 63, 64, 65, 130, 1000, GROUP - 1, GROUP, GROUP + 1, 2 * GROUP + 70)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def defined(row: list[float]) -> float:
    """The definition, number by number."""
    result = 0.0
    for group in range(0, len(row), GROUP):
        of_group = 0.0
        for start in range(group, min(group + GROUP, len(row)), RUN):
            squares = [x * x for x in row[start : start + RUN]]
            squares += [0.0] * (RUN - len(squares))
            while len(squares) > 1:
                half = len(squares) // 2
                squares = [low + high for low, high in zip(squares[:half], squares[half:], strict=True)]
            of_group += squares[0]
        result += of_group
    return result


def in_strips(values: Tensor, cuts: list[int]) -> Tensor:
    """The sums of (out × in), from strips of inputs that end at `cuts`."""
    sums = SquareSums(values.shape[0])
    for start, end in pairwise([0, *cuts, values.shape[1]]):
        sums.add(values[:, start:end].T)
    return total(sums.groups())


@pytest.mark.parametrize("work", WORKING, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_sums_are_those_of_the_definition(width: int, work: torch.dtype) -> None:
    values = gaussian(width, 3, width, dtype=work)
    assert square_sums(values).tolist() == [defined(row) for row in values.double().tolist()]


@pytest.mark.parametrize("width", WIDTHS)
def test_sums_are_near_to_the_true_ones(width: int) -> None:
    values = gaussian(1, 4, width) * torch.tensor([[1e-20], [1.0], [0.02], [1e18]])
    # At most this many additions lie on a number's way, and its square is rounded once.
    additions = 1 + 6 + 64 + -(-width // GROUP)
    for row, found in zip(values.double().tolist(), square_sums(values).tolist(), strict=True):
        true = math.fsum(x * x for x in row)
        assert abs(found - true) <= additions * 2.0**-53 * true


@pytest.mark.parametrize("outputs", [1, 3, 1023, 1025, 2500])
@pytest.mark.parametrize("work", WORKING, ids=str)
def test_layout_strips_and_ranges_do_not_show(outputs: int, work: torch.dtype) -> None:
    values = gaussian(outputs, outputs, 200 if outputs > 3 else 3 * GROUP + 200, dtype=work)
    expected = square_sums(values)
    turned = values.T.contiguous()
    assert same_bits(square_sums(turned.T), expected)
    for height in (RUN, 2 * RUN, 3 * RUN, GROUP, GROUP + RUN):
        cuts = list(range(height, values.shape[1], height))
        assert same_bits(in_strips(values, cuts), expected)
        assert same_bits(in_strips(turned.T, cuts), expected)
    parts = [values[start:end] for start, end in pairwise((0, outputs // 3, outputs // 2, outputs))]
    assert same_bits(torch.cat([square_sums(part) for part in parts]), expected)
    assert same_bits(torch.cat([square_sums(part.T.contiguous().T) for part in parts]), expected)


def test_how_many_are_folded_at_once_does_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    values = gaussian(1, 70, 5000)
    expected = square_sums(values)
    for lanes in (32, 64, 96, 1 << 14):
        monkeypatch.setattr(dora, "_LANES", lanes)
        assert same_bits(square_sums(values), expected)
        assert same_bits(square_sums(values.T.contiguous().T), expected)


@pytest.mark.usefixtures("threads")
def test_threads_do_not_show() -> None:
    values = gaussian(1, 300, 2 * GROUP)
    found = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        found.append(square_sums(values))
    assert same_bits(found[0], found[1])
    assert same_bits(found[0], found[2])


def test_groups_may_be_summed_apart() -> None:
    values = gaussian(1, 5, 3 * GROUP + 100)
    groups = []
    for start in range(0, values.shape[1], GROUP):
        sums = SquareSums(5)
        sums.add(values[:, start : start + GROUP].T)
        groups.append(sums.groups())
    assert [part.shape for part in groups] == [(1, 5)] * 4
    assert same_bits(total(torch.cat(groups)), square_sums(values))


def test_of_nothing_the_sum_is_zero() -> None:
    assert square_sums(torch.empty(3, 0)).tolist() == [0.0] * 3
    assert square_sums(torch.empty(0, 3)).tolist() == []
    assert SquareSums(2).groups().shape == (0, 2)


def test_sums_keep_what_they_gave() -> None:
    sums = SquareSums(1)
    sums.add(torch.ones(RUN, 1))
    before = sums.groups()
    sums.add(torch.ones(1, 1))
    assert before.tolist() == [[64.0]]
    assert sums.groups().tolist() == [[65.0]]


def test_strips_must_fit() -> None:
    sums = SquareSums(3)
    with pytest.raises(ShapeError, match="other outputs"):
        sums.add(torch.ones(64, 4))
    with pytest.raises(ShapeError, match="other outputs"):
        sums.add(torch.ones(3))
    sums.add(torch.ones(65, 3))
    with pytest.raises(UsageError, match="ended within a run"):
        sums.add(torch.ones(64, 3))


def test_golden_digest() -> None:
    """The same on every machine, from Knuth's 64-bit linear congruential generator."""
    state, numbers = 2026, []
    for _ in range(2 * (GROUP + 99)):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        numbers.append(((state >> 32) - 2**31) * 2.0**-31)
    sums = square_sums(torch.tensor(numbers).view(2, -1))
    found = gains(torch.tensor([1.5, -0.25]), sums, torch.float32)
    digests = [hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:16] for tensor in (sums, found)]
    assert digests == ["4a542ad79c49f95f", "c7bac7f1377e8c53"]


# Gains.


def test_gains_are_rounded_once_from_a_quotient_of_doubles() -> None:
    sums = gaussian(1, 500, dtype=torch.float64).square() * 1000
    magnitude = gaussian(2, 500)
    for work in WORKING:
        name = str(work).removeprefix("torch.")
        quotients = [Fraction(m / math.sqrt(s)) for m, s in zip(magnitude.tolist(), sums.tolist(), strict=True)]
        expected = [reference.rounded(quotient, name) for quotient in quotients]
        assert to_fractions(gains(magnitude, sums, work)[None])[0] == expected


def test_magnitudes_may_be_anything_finite() -> None:
    magnitude = torch.tensor([0.0, -0.0, -3.0, 1e-40, 3e38], dtype=torch.float32)
    found = gains(magnitude.requires_grad_(), torch.tensor([4.0] * 5, dtype=torch.float64), torch.float64)
    assert found.tolist() == [0.0, 0.0, -1.5, magnitude[3].item() / 2, magnitude[4].item() / 2]
    assert torch.signbit(found).tolist() == [False, True, True, False, False]
    assert not found.requires_grad


def test_refuses_what_has_no_gain() -> None:
    ones = torch.ones(3, dtype=torch.float64)
    with pytest.raises(ShapeError, match="one magnitude for each output"):
        gains(torch.ones(2), ones, torch.float32)
    for value in (math.nan, math.inf):
        with pytest.raises(NumericError, match="magnitudes hold NaN or infinity"):
            gains(torch.tensor([1.0, value, 1.0]), ones, torch.float32)
    zeros = square_sums(torch.tensor([[1.0, 2.0], [0.0, -0.0], [0.0, 0.0]]))
    with pytest.raises(NumericError, match="no direction") as caught:
        gains(torch.ones(3), zeros, torch.float32)
    assert caught.value.found == "2 such rows, first 1"
    for value in (math.nan, math.inf, 1e200):
        sums = square_sums(torch.tensor([[1.0, 2.0], [3.0, 4.0], [0.0, value]], dtype=torch.float64))
        with pytest.raises(NumericError, match="no finite length") as caught:
            gains(torch.ones(3), sums, torch.float32)
        assert caught.value.found == "1 such rows, first 2"
