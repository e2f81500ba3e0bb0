"""Discrete Fourier transforms with the same bits on every machine.

A library's transform may add in another order on another processor, and its sines differ in the last place. Here both
are made of single additions, multiplications and divisions of float64, which IEEE 754 defines to the last bit.

Sources: Stockham's ordering of the transform of Cooley and Tukey (1965, "An Algorithm for the Machine Calculation of
Complex Fourier Series", Mathematics of Computation 19), as in Van Loan (1992, "Computational Frameworks for the Fast
Fourier Transform", section 1.7), for any length; a factor p of it costs p operations for each element.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from lora_cli.arithmetic.sines import cosine_and_sine

Complex = tuple[Tensor, Tensor]
"""Real and imaginary parts."""


@lru_cache(maxsize=8)
def circle(n: int) -> Complex:
    """Return cosine and sine of 2πk/n for k from 0 to n - 1, each within 2^-50."""
    return cosine_and_sine(torch.arange(n, dtype=torch.float64) / n * (2 * math.pi))


class Inverse:
    """Σₖ x[k]·exp(2πi·jk/n) for j from 0 to n - 1, without the division by n.

    Args:
        n: The length.
    """

    def __init__(self, n: int) -> None:
        self._cosine, self._sine = circle(n)
        self._steps: list[tuple[int, Complex]] = []
        rest = n
        for factor in _factors(n):
            # exp(2πi·jt / rest) for j under rest / factor and t under factor.
            turns = torch.arange(rest // factor).unsqueeze(1) * torch.arange(factor) * (n // rest)
            self._steps.append((factor, self._roots(turns)))
            rest //= factor

    def of(self, real: Tensor, imaginary: Tensor) -> Complex:
        """Transform the rows of a matrix (rows × n), each alone."""
        rows, n = real.shape
        done, rest = 1, n
        for factor, twiddles in self._steps:
            rest //= factor
            real, imaginary = (part.view(rows, factor, rest, done) for part in (real, imaginary))
            summed = self._pairs(real, imaginary) if factor == 2 else self._sums(real, imaginary, factor)
            turned = [_times(*value, *(part[:, t, None] for part in twiddles)) for t, value in enumerate(summed)]
            real, imaginary = (torch.stack(part, dim=2).view(rows, n) for part in zip(*turned, strict=True))
            done *= factor
        return real, imaginary

    @staticmethod
    def _pairs(real: Tensor, imaginary: Tensor) -> list[Complex]:
        (a, b), (c, d) = real.unbind(1), imaginary.unbind(1)
        return [(a + b, c + d), (a - b, c - d)]

    def _sums(self, real: Tensor, imaginary: Tensor, factor: int) -> list[Complex]:
        """The transform of length `factor`, by its definition, in the order of its terms."""
        step = len(self._cosine) // factor
        found = []
        for t in range(factor):
            total: Complex = (real[:, 0], imaginary[:, 0])
            for q in range(1, factor):
                at = q * t % factor * step
                root = self._cosine[at], self._sine[at]
                more = _times(real[:, q], imaginary[:, q], *root)
                total = total[0] + more[0], total[1] + more[1]
            found.append(total)
        return found

    def _roots(self, turns: Tensor) -> Complex:
        turns = turns % len(self._cosine)
        return self._cosine[turns], self._sine[turns]


def _times(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Complex:
    """(a + bi)·(c + di), each product and each sum rounded apart."""
    return a * c - b * d, a * d + b * c


def _factors(n: int) -> list[int]:
    """Prime factors, the smallest first."""
    found, factor = [], 2
    while factor * factor <= n:
        while n % factor == 0:
            found.append(factor)
            n //= factor
        factor += 1
    return found + ([n] if n > 1 else [])
