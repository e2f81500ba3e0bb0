"""Cayley's transform: rotations from skew-symmetric matrices, with the same bits on every machine.

(I - Q)(I + Q)⁻¹ is orthogonal for every skew-symmetric Q (Cayley 1846). It is 2·(I + Q)⁻¹ - I. I + Q is never singular,
nor is any block in its corner, nor what remains when such a block is eliminated: so it is inverted by halves, without
a search for pivots, and each step is an exact product or an elementwise operation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_cli.arithmetic.rowwise import multiply

#: Matrices of at most so many rows are inverted column by column.
_SMALL = 16


def skew(vectors: Tensor, size: int) -> Tensor:
    """Return the skew-symmetric matrices whose upper triangles, row by row, are given.

    Args:
        vectors: (blocks × b(b-1)/2).
        size: b.

    Returns:
        (blocks × b × b) in float64.
    """
    made = torch.zeros((vectors.shape[0], size, size), dtype=torch.float64)
    rows, columns = torch.triu_indices(size, size, 1)
    values = vectors.to(torch.float64)
    made[:, rows, columns] = values
    made[:, columns, rows] = -values
    return made


def cayley(matrices: Tensor) -> Tensor:
    """Return (I - Q)(I + Q)⁻¹ of skew-symmetric matrices, (blocks × b × b) in float64."""
    eye = torch.eye(matrices.shape[-1], dtype=torch.float64)
    return _inverse(matrices + eye).mul_(2.0) - eye


def cayley_series(matrices: Tensor, terms: int, *, last_once: bool) -> Tensor:
    """Return the first terms of (I + Q)(I - Q)⁻¹ = I + 2Q + 2Q² + ….

    Args:
        matrices: (blocks × b × b) in float64.
        terms: How many, the identity among them.
        last_once: The last power, from the third on, is added once instead of twice. So does PEFT from 0.18 on; there
            three terms are as good as four.
    """
    eye = torch.eye(matrices.shape[-1], dtype=torch.float64)
    total = eye.expand(matrices.shape).clone()
    last = terms - 1 if terms < 3 or not last_once else max(terms, 4) - 1
    power = matrices
    for number in range(1, last + 1):
        power = matrices if number == 1 else multiply(power, matrices)
        total += power if last_once and number == last and number > 1 else power * 2.0
    return total


def _inverse(matrices: Tensor) -> Tensor:
    """Invert (blocks × b × b) matrices whose symmetric part is positive definite, by halves."""
    size = matrices.shape[-1]
    if size <= _SMALL:
        return _eliminated(matrices)
    half = size // 2
    a, b = matrices[:, :half, :half], matrices[:, :half, half:]
    c, d = matrices[:, half:, :half], matrices[:, half:, half:]
    a_inverse = _inverse(a)
    c_a = multiply(c, a_inverse)
    rest = _inverse(d - multiply(c_a, b))
    a_b = multiply(a_inverse, b)
    lower = multiply(rest, c_a).neg_()
    upper = torch.cat([a_inverse - multiply(a_b, lower), multiply(a_b, rest).neg_()], -1)
    return torch.cat([upper, torch.cat([lower, rest], -1)], -2)


def _eliminated(matrices: Tensor) -> Tensor:
    """Invert small matrices by Gauss and Jordan; product and difference are passes of their own."""
    work = matrices.clone()
    size = work.shape[-1]
    for number in range(size):
        pivot = work[:, number, number].clone()
        row, column = work[:, number].clone(), work[:, :, number].clone()
        row[:, number], column[:, number] = 1.0, 0.0
        row /= pivot.unsqueeze(-1)
        work[:, :, number] = 0.0
        work -= column.unsqueeze(-1) * row.unsqueeze(-2)
        work[:, number] = row
    return work
