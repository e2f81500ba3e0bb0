"""Between tensors and the bit patterns and rationals of the reference, and matrices of awkward numbers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from fractions import Fraction

import reference
import torch
from torch import Tensor

from lora_cli.arithmetic.product import Term

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = {name: getattr(torch, name) for name in reference.FORMATS}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def from_patterns(patterns: Sequence[Sequence[int]], dtype: torch.dtype) -> Tensor:
    width = 8 * dtype.itemsize
    signed = [[p - (1 << width) if p >> (width - 1) else p for p in row] for row in patterns]
    return torch.tensor(signed, dtype=INTEGERS[dtype.itemsize]).view(dtype)


def to_patterns(tensor: Tensor) -> list[list[int]]:
    mask = (1 << 8 * tensor.itemsize) - 1
    integers: list[list[int]] = tensor.contiguous().view(INTEGERS[tensor.itemsize]).tolist()
    return [[value & mask for value in row] for row in integers]


def to_fractions(tensor: Tensor) -> list[list[Fraction]]:
    return [[Fraction(value) for value in row] for row in tensor.to(torch.float64).tolist()]


def to_reference(terms: Sequence[Term]) -> list[reference.Term]:
    return [reference.Term(to_fractions(term.b), to_fractions(term.a), term.scale) for term in terms]


def same_bits(a: Tensor, b: Tensor) -> bool:
    integers = INTEGERS[a.itemsize]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))


def awkward(rng: random.Random, rows: int, columns: int, dtype: torch.dtype, span: int) -> Tensor:
    """Finite numbers of `dtype`: any pattern up to 2^±span, and now and then zeros and subnormals."""
    form = reference.FORMATS[name_of(dtype)]
    middle = 1 - form.least_normal
    low = max(1, middle - span)
    high = min((form.largest_pattern >> form.fraction_bits) - 1, middle + span)

    def pattern() -> int:
        fraction = rng.getrandbits(form.fraction_bits)
        sign = form.sign * rng.getrandbits(1)
        kind = rng.random()
        if kind < 0.1:
            return sign
        if kind < 0.15:
            return sign | fraction
        return sign | rng.randint(low, max(low, high)) << form.fraction_bits | fraction

    return from_patterns([[pattern() for _ in range(columns)] for _ in range(rows)], dtype)


def gaussian(seed: int, *shape: int, dtype: torch.dtype = torch.float32, std: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * std).to(dtype)


def gaussian_term(seed: int, out: int, rank: int, width: int, scale: float = 0.7) -> Term:
    return Term(gaussian(seed, out, rank, std=0.1), gaussian(seed + 1, rank, width, std=0.3), scale)
