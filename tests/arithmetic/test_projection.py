"""Least squares from inner products, against numpy's on the whole matrix."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lora_cli.arithmetic.projection import fit, inner_products


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("parts", [1, 7])
def test_coefficients_are_those_of_dense_least_squares(count: int, parts: int) -> None:
    lengths = 10.0 ** torch.linspace(-6, 6, count, dtype=torch.float64)  # some deltas are a million times others
    directions, change = normal(1, count, 300) * lengths.unsqueeze(1), normal(2, 300)
    change += (directions / lengths.unsqueeze(1)).sum(0)
    rows = torch.cat([directions, change.unsqueeze(0)])
    sums = torch.zeros((count + 1, count + 1), dtype=torch.float64)
    for part in rows.tensor_split(parts, dim=1):
        sums += inner_products(part)
    found = fit(sums[:count, :count], sums[:count, count], float(sums[count, count]))
    assert found is not None
    unit = (directions / lengths.unsqueeze(1)).numpy()
    expected, left, *_ = np.linalg.lstsq(unit.T, change.numpy(), rcond=None)
    assert np.array(found.coefficients) * lengths.numpy() == pytest.approx(expected, rel=1e-9)
    assert found.left == pytest.approx(float(left[0]), rel=1e-9)
    spreads = np.sqrt(np.diag(np.linalg.inv(unit @ unit.T)))
    assert np.array(found.spreads) * lengths.numpy() == pytest.approx(spreads, rel=1e-9)


def test_spreads_are_what_noise_does() -> None:
    """Two directions that are nearly one: their difference is badly known, and the spread says how badly."""
    one, other = normal(1, 2000), normal(2, 2000)
    directions = torch.stack([one, one + 0.1 * other])
    off = []
    for seed in range(200):
        change = directions.sum(0) + 0.3 * normal(10 + seed, 2000)
        rows = torch.cat([directions, change.unsqueeze(0)])
        sums = inner_products(rows)
        found = fit(sums[:2, :2], sums[:2, 2], float(sums[2, 2]))
        assert found is not None
        off.append((found.coefficients[0] - 1) / (0.3 * found.spreads[0]))
    assert np.std(off) == pytest.approx(1, abs=0.15)
    assert abs(np.mean(off)) < 0.25


def test_nothing_is_left_of_a_combination() -> None:
    directions = normal(1, 3, 50)
    change = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64) @ directions
    sums = inner_products(torch.cat([directions, change.unsqueeze(0)]))
    found = fit(sums[:3, :3], sums[:3, 3], float(sums[3, 3]))
    assert found is not None
    assert found.coefficients == pytest.approx((0.5, -1.0, 2.0))
    assert 0 <= found.left < 1e-12 * float(sums[3, 3])


def test_directions_that_cannot_be_told_apart() -> None:
    one, other = normal(1, 50), normal(2, 50)
    for pair in ([one, -3 * one], [one, torch.zeros_like(one)], [one, one * math.inf]):
        sums = inner_products(torch.stack(pair))
        assert fit(sums, sums[0], float(sums[0, 0])) is None
    sums = inner_products(torch.stack([one, other]))
    assert fit(sums, sums[0], math.inf) is None
    assert fit(sums, sums[0], float(sums[0, 0])) is not None
    assert fit(sums[:0, :0], sums[0, :0], 1.0) is None
