"""What the other rooms ask of floating formats: their integer twins, their spacing, exact powers of two."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lora_cli.errors import UnsupportedError

#: Storage dtypes that can take a delta, each with the signed integer dtype of the same width.
BITS: dict[torch.dtype, torch.dtype] = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
    torch.float8_e4m3fn: torch.int8,
    torch.float8_e5m2: torch.int8,
}


def bits_dtype(storage: torch.dtype) -> torch.dtype:
    """Return the signed integer dtype as wide as `storage`.

    Raises:
        UnsupportedError: `storage` is no dtype that can take a delta.
    """
    if storage not in BITS:
        raise UnsupportedError(
            "This dtype cannot take a delta",
            expected=", ".join(dtype_name(dtype) for dtype in BITS),
            found=dtype_name(storage),
        )
    return BITS[storage]


def dtype_name(dtype: torch.dtype) -> str:
    """Return the dtype's name as people write it, without `torch.`."""
    return str(dtype).removeprefix("torch.")


def fraction_bits(dtype: torch.dtype) -> int:
    """Return how many bits stand after the leading one (23 for float32)."""
    return -_exponent(torch.finfo(dtype).eps)


def binades(dtype: torch.dtype) -> tuple[int, int]:
    """Return (e, f): normal numbers of `dtype` have magnitudes from 2^e up to, but not including, 2^(f+1)."""
    info = torch.finfo(dtype)
    return _exponent(info.smallest_normal), _exponent(info.max)


def _exponent(value: float) -> int:
    """Return floor(log2(value)) of a positive normal double."""
    return math.frexp(value)[1] - 1


def power_of_two(exponent: Tensor) -> Tensor:
    """Return 2^exponent in float64, exactly, for exponents from -1074 to 1023.

    The bit pattern is written out: `pow` and `ldexp` go through a logarithm on some devices, and overflow
    on the way on others.
    """
    n = exponent.to(torch.int64)
    normal = (n + 1023) << 52
    subnormal = torch.ones_like(n) << (n + 1074).clamp(0, 51)
    return torch.where(n >= -1022, normal, subnormal).view(torch.float64)
