"""Householder's reflections, several at once, with the same bits on every machine.

A product of reflections I - τ·u·uᵀ is I - U·T·Uᵀ with a triangular T (Schreiber and Van Loan 1989, "A storage-efficient
WY representation for products of Householder transformations").
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lora_cli.arithmetic.rowwise import dots, multiply


def triangle(normals: Tensor, factors: Tensor) -> Tensor:
    """Return T of (I - τ₁·u₁·u₁ᵀ)·…·(I - τᵣ·uᵣ·uᵣᵀ) = I - U·T·Uᵀ, (r × r) in float64.

    Args:
        normals: U, (n × r).
        factors: τ, (r,).
    """
    products = multiply(normals.T, normals)
    made = torch.zeros_like(products)
    for number in range(len(products)):
        made[number, number] = factors[number]
        if number:
            before = multiply(made[:number, :number], products[:number, number : number + 1])
            made[:number, number] = before.reshape(-1) * -factors[number]
    return made


def orthogonal_factor(matrix: Tensor) -> Tensor:
    """Return Q of matrix = Q·R, (n × r) in float64, with the signs that LAPACK gives its columns.

    A reflection brings each column to the opposite sign of its first number; a column that has no other is left alone.

    Args:
        matrix: (n × r) of any float dtype, with r ≤ n.
    """
    work = matrix.to(torch.float64, copy=True)
    size, rank = work.shape
    normals, factors = torch.zeros((size, rank), dtype=torch.float64), torch.zeros(rank, dtype=torch.float64)
    for number in range(rank):
        column = work[number:, number : number + 1]
        normals[number, number] = 1.0
        if not bool(column[1:].any()):
            continue
        first = float(column[0])
        end = -math.copysign(math.sqrt(float(dots(column.T, column.T))), first)
        factors[number] = (end - first) / end
        normals[number + 1 :, number] = column[1:, 0] / (first - end)
        normal = normals[number:, number : number + 1]
        share = multiply(normal.T, work[number:]) * factors[number]
        work[number:] -= normal * share
    made = -multiply(normals, multiply(triangle(normals, factors), normals[:rank].T))
    made += torch.eye(size, rank, dtype=torch.float64)
    return made
