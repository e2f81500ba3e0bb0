"""Factors that are taken from a weight, and whose product is then taken off it: PiSSA and OLoRA.

    PiSSA    W = U·S·Vᵀ      B = U_r·√(S_r / scale)     A = √(S_r / scale)·V_rᵀ     (Meng, Wang and Zhang 2024)
    OLoRA    W = Q·R         B = Q_r                    A = R_r                     (Büyükakyüz 2024)

scale·B·A of PiSSA is the matrix of this rank that is nearest to W; that of OLoRA is scale times the share of W in the
span of its first columns. Signs are fixed, so that a decomposition has one answer: the largest number of each column
of B is positive.

The decompositions are LAPACK's, in float64: the same from run to run on one machine with one number of threads, not
promised between machines. Nothing else depends on that, since what is left of the weight is computed from the factors
as they are stored.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lora_cli.arithmetic.decomposed import decomposed
from lora_cli.errors import NumericError, ShapeError

OVERSAMPLING = 8
"""Columns by which a randomised decomposition is wider than the rank that is wanted of it."""


def pissa(
    weight: Tensor, rank: int, scale: float, *, iterations: int = 0, test: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the factors of PiSSA.

    Args:
        weight: The matrix W, (out, in).
        rank: Rows of A, at most the smaller side of W.
        scale: What multiplies B·A, over 0.
        iterations: Power iterations of a randomised decomposition: more bring it nearer to the exact one.
        test: Normal numbers, (in, `sample_width`), for a randomised decomposition; without them it is exact.

    Returns:
        A (rank, in) and B (out, rank), in float64.

    Raises:
        ShapeError: The rank is too large, or shapes do not fit.
        NumericError: W holds NaN or infinity, or cannot be decomposed.
    """
    matrix = _checked(weight, rank)
    u, s, vh = decomposed(matrix) if test is None else _randomised(matrix, test, iterations)
    root = (s[:rank] / scale).sqrt()
    return _signed(root.unsqueeze(1) * vh[:rank], u[:, :rank] * root)


def olora(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the factors of OLoRA. No scale is in them: what is taken off W is scale·B·A.

    Args:
        weight: The matrix W, (out, in).
        rank: Rows of A, at most the smaller side of W.

    Returns:
        A (rank, in) and B (out, rank), in float64.

    Raises:
        ShapeError: The rank is too large.
        NumericError: W holds NaN or infinity.
    """
    matrix = _checked(weight, rank)
    # The first columns of Q depend on the first columns of W alone, and R is Qᵀ·W.
    q = torch.linalg.qr(matrix[:, :rank]).Q
    return _signed((q.T @ matrix).triu(), q)


def sample_width(shape: tuple[int, int], rank: int) -> int:
    """Columns of the test matrix for a randomised decomposition of a matrix of this shape."""
    return min(rank + OVERSAMPLING, *shape)


def _randomised(matrix: Tensor, test: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1: a basis of (W·Wᵀ)ⁿ·W·Ω, orthonormal at each step."""
    if len(test.shape) != 2 or test.shape[0] != matrix.shape[1] or test.shape[1] > min(matrix.shape):
        raise ShapeError("The test matrix does not fit", expected=f"({matrix.shape[1]}, …)", found=tuple(test.shape))
    basis = torch.linalg.qr(matrix @ test.to(matrix)).Q
    for _ in range(iterations):
        basis = torch.linalg.qr(matrix.T @ basis).Q
        basis = torch.linalg.qr(matrix @ basis).Q
    u, s, vh = decomposed(basis.T @ matrix)
    return basis @ u, s, vh


def _checked(weight: Tensor, rank: int) -> Tensor:
    if len(weight.shape) != 2 or not 0 < rank <= min(weight.shape):
        raise ShapeError(
            "The rank is larger than a side of the matrix that the factors are taken from",
            expected=f"at most {min(weight.shape, default=0)}",
            found=rank,
        )
    matrix = weight.detach().to(torch.float64)
    # The sum is finite exactly if all of them are, and takes no memory.
    if not math.isfinite(float(matrix.sum())):
        raise NumericError("The weight holds NaN or infinity")
    return matrix


def _signed(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Give each row of A and column of B, together, the sign that makes the column's largest number positive."""
    largest = b.gather(0, b.abs().argmax(dim=0, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(b)
    return a * signs.T, b * signs
