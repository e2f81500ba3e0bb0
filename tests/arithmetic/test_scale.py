"""The scale is the exact rational, rounded once."""

from __future__ import annotations

import math
import subprocess
import sys
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cli.arithmetic.scale import exact_scale
from lora_cli.errors import NumericError, ShapeError

finite = st.floats(allow_nan=False, allow_infinity=False)
moderate = st.floats(-1e60, 1e60)
ranks = st.integers(1, 1 << 20)


@settings(deadline=None)
@given(finite, ranks, moderate)
def test_is_the_rational_rounded_once(alpha: float, rank: int, weight: float) -> None:
    exact = Fraction(weight) * Fraction(alpha) / rank
    try:
        expected = float(exact)
    except OverflowError:
        with pytest.raises(NumericError):
            exact_scale(alpha, rank, weight=weight)
    else:
        assert exact_scale(alpha, rank, weight=weight) == expected


@settings(deadline=None)
@given(moderate, ranks, moderate, st.booleans())
def test_a_weight_is_as_good_as_an_alpha(alpha: float, rank: int, weight: float, rslora: bool) -> None:
    together = exact_scale(Fraction(alpha) * Fraction(weight), rank, rslora=rslora)
    assert exact_scale(alpha, rank, weight=weight, rslora=rslora).hex() == together.hex()


def test_rounding_weight_times_alpha_over_rank_step_by_step_would_differ() -> None:
    assert exact_scale(16, 5, weight=0.1) != 0.1 * (16 / 5)
    assert exact_scale(16, 2, rslora=True) != 16 / math.sqrt(2)


def assert_nearest_root(value: float, product: Fraction, rank: int) -> None:
    """Compare the squares of product/√rank and of the midpoints around `value`."""
    square = product**2 / rank
    assert value == 0 or (value > 0) == (product > 0)
    magnitude = Fraction(abs(value))
    below, above = Fraction(math.nextafter(abs(value), 0.0)), Fraction(math.nextafter(abs(value), math.inf))
    even = int(abs(value) / math.ulp(value)) % 2 == 0
    low, high = (below + magnitude) / 2, (magnitude + above) / 2
    assert low**2 <= square <= high**2
    if square in (low**2, high**2) and value:
        assert even


@settings(deadline=None)
@given(st.floats(-1e150, 1e150), ranks, st.floats(-1e150, 1e150))
def test_rslora_is_the_nearest_double(alpha: float, rank: int, weight: float) -> None:
    value = exact_scale(alpha, rank, weight=weight, rslora=True)
    assert_nearest_root(value, Fraction(alpha) * Fraction(weight), rank)


@pytest.mark.parametrize(
    ("alpha", "rank"),
    [
        *((alpha, rank) for alpha in (16, -16, 1, 0.1, 1e308, 2.0**-1074, 3 * 2.0**-1073) for rank in (1, 2, 3, 7)),
        (16, 16),
        (-8, 64),
        (2.0**-1074, 4),  # exactly half of the least double: a tie, to even
        (3 * 2.0**-1074, 4),  # one and a half: a tie again
        (3 * 2.0**-1074, 5),
    ],
)
def test_rslora_at_the_edges(alpha: float, rank: int) -> None:
    assert_nearest_root(exact_scale(alpha, rank, rslora=True), Fraction(alpha), rank)


def test_rslora_of_a_perfect_square_is_exact() -> None:
    for root in range(1, 200):
        assert exact_scale(3 * root, root * root, rslora=True) == 3.0
        assert exact_scale(1, root * root, rslora=True) == 1 / root


def test_rslora_ties_go_to_even_and_a_little_more_goes_up() -> None:
    tie = Fraction(2**53 + 1)
    assert exact_scale(tie * 3, 9, rslora=True) == 2.0**53
    assert exact_scale(tie * 3 + Fraction(1, 2**200), 9, rslora=True) == 2.0**53 + 2
    assert exact_scale((tie + 2) * 3 - Fraction(1, 2**200), 9, rslora=True) == 2.0**53 + 2


def test_zero_and_huge_rationals() -> None:
    assert exact_scale(0, 8).hex() == exact_scale(-0.0, 8, rslora=True).hex() == (0.0).hex()
    assert exact_scale(10**400, 10**395) == 10**5
    assert exact_scale(10**400, 10**790, rslora=True) == 10**5


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    ("alpha", "weight"), [(math.nan, 1), (math.inf, 1), (1, -math.inf), (1, math.nan), (1e308, 1e10)]
)
def test_refuses_what_is_not_finite(alpha: float, weight: float, rslora: bool) -> None:
    with pytest.raises(NumericError):
        exact_scale(alpha, 4, weight=weight, rslora=rslora)


@pytest.mark.parametrize("rank", [0, -1])
def test_refuses_a_rank_that_is_not_positive(rank: int) -> None:
    with pytest.raises(ShapeError):
        exact_scale(16, rank)


def test_does_not_load_torch() -> None:
    code = "import sys, lora_cli.arithmetic.scale; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
