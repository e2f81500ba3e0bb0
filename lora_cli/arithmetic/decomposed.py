"""Singular values by LAPACK, whose algorithm need not converge: then there is an answer in our own words."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from lora_cli.errors import NumericError

T = TypeVar("T")


def decomposed(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, S and Vᵀ of a finite matrix, no more of them than its smaller side, the largest values first.

    Raises:
        NumericError: The algorithm does not converge.
    """
    u, s, vh = _attempt(lambda: torch.linalg.svd(matrix, full_matrices=False))
    return u, s, vh


def values_of(matrix: Tensor) -> Tensor:
    """Return the singular values of a finite matrix, the largest first.

    Raises:
        NumericError: The algorithm does not converge.
    """
    values: Tensor = _attempt(lambda: torch.linalg.svdvals(matrix))
    return values


def _attempt(compute: Callable[[], T]) -> T:
    try:
        return compute()
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise NumericError("The singular values of a matrix cannot be computed: LAPACK does not converge") from error
