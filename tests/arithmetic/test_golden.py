"""Golden digests: a merge's bytes, the same on every machine."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import pytest
import reference
import torch
from fast import merged
from patterns import DTYPES, same_bits, to_patterns, to_reference
from torch import Tensor

from lora_cli.arithmetic.ordered import bits_view
from lora_cli.arithmetic.product import Term

every_dtype = pytest.mark.parametrize("name", reference.FORMATS)


def congruential(seed: int) -> Iterator[int]:
    """Numbers that need no library: Knuth's 64-bit linear congruential generator, its upper half."""
    while True:
        seed = (seed * 6364136223846793005 + 1442695040888963407) % 2**64
        yield seed >> 32


def fixture(name: str) -> tuple[Tensor, list[Term]]:
    numbers = congruential(2026)

    def matrix(rows: int, columns: int, exponent: int) -> Tensor:
        values = [[(next(numbers) - 2**31) * 2.0 ** (exponent - 31) for _ in range(columns)] for _ in range(rows)]
        return torch.tensor(values, dtype=torch.float64)

    base = matrix(29, 43, -3).to(torch.float32).to(DTYPES[name])
    terms = [
        Term(matrix(29, 5, -6).to(torch.float32), matrix(5, 43, -1).to(torch.float32), 2.0),
        Term(matrix(29, 3, -25).to(torch.float32), matrix(3, 43, 4).to(torch.float32), 0.1),
        Term(matrix(29, 2, 1).to(torch.bfloat16), matrix(2, 43, -5).to(torch.bfloat16), 1 / 3),
    ]
    return base, terms


GOLDEN = {
    "bfloat16": "5b5905bec8173cbddda2b55643124fc2f9d13313bc07494faa65984cd2f0d4b0",
    "float16": "2464bcd2f6d5872e94bc1b896d22b9ad314d6f2365e918709fe18c8287f4c971",
    "float32": "f94f2ca1b86eed846e121cdbcdb10ddc09cdc9c228db1f2147ddcac1d6fcddae",
    "float64": "e66f5aaf14a51d4c902a0f852aa7ac07fa0af92db2983dc1fbaacb18f81e3515",
    "float8_e4m3fn": "04dbcd6e947ae413c2f1f274ee45033210a460c5e95cddc090fd31ea8dd988b8",
    "float8_e5m2": "6564b5314be6bbbccf3ede3fd75f0f4b9e2305ce96cc1e616ec4c0854bea17ce",
}


@every_dtype
def test_golden_digest(name: str) -> None:
    base, terms = fixture(name)
    fast = hashlib.sha256(bits_view(merged(base, terms)).tobytes()).hexdigest()
    patterns = reference.merged_bits(to_patterns(base), name, to_reference(terms))
    width = reference.FORMATS[name].width // 8
    slow = hashlib.sha256(b"".join(p.to_bytes(width, "little") for row in patterns for p in row)).hexdigest()
    assert slow == GOLDEN[name]
    assert fast == GOLDEN[name]
    assert not same_bits(merged(base, terms), base)
