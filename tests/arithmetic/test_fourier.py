"""Transforms that have the same bits everywhere, held against a library's."""

from __future__ import annotations

import cmath

import pytest
import torch

from lora_cli.arithmetic.fourier import Inverse, circle

LENGTHS = [1, 2, 3, 4, 5, 7, 8, 12, 30, 64, 97, 100, 1024, 2048 - 1]


@pytest.mark.parametrize("n", LENGTHS)
def test_a_transform_is_the_librarys(n: int) -> None:
    values = torch.randn((5, n), dtype=torch.complex128, generator=torch.Generator().manual_seed(n))
    real, imaginary = Inverse(n).of(values.real.contiguous(), values.imag.contiguous())
    expected = torch.fft.ifft(values, norm="forward")
    assert (torch.complex(real, imaginary) - expected).abs().max() <= 1e-14 * n


def test_rows_do_not_see_each_other() -> None:
    transform, values = Inverse(360), torch.randn((6, 360), dtype=torch.float64)
    whole = transform.of(values, values.flip(0))
    for row in range(6):
        alone = transform.of(values[row : row + 1], values.flip(0)[row : row + 1])
        assert all(torch.equal(part[row : row + 1], one) for part, one in zip(whole, alone, strict=True))


@pytest.mark.parametrize("n", [1, 3, 8, 360, 5000])
def test_the_circle_is_round(n: int) -> None:
    cosine, sine = circle(n)
    for k in range(0, n, max(1, n // 50)):
        expected = cmath.exp(2j * cmath.pi * k / n)
        assert abs(complex(cosine[k], sine[k]) - expected) < 2**-49
