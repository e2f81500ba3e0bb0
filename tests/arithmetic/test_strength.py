"""The strength of a change that is there, against dense float64 arithmetic."""

from __future__ import annotations

import pytest
import torch

from lora_cli.arithmetic.strength import Strength

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
