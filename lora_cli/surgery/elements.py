"""Stored elements against stored elements, in memory: bits, values and steps between floats.

Written for tiles that stay in a core's own cache, with buffers that the caller keeps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_cli.checkpoint.dtypes import DType

Array = NDArray[Any]


def same_bytes(one: Array, other: Array) -> bool:
    """Whether bytes are the same, eight at a time."""
    whole = one.size // 8 * 8
    return np.array_equal(one[:whole].view(np.uint64), other[:whole].view(np.uint64)) and np.array_equal(
        one[whole:], other[whole:]
    )


def unequal_elements(one: Array, other: Array, bits: int) -> int:
    """How many elements of so many bits are not the same bits."""
    if bits >= 8:
        unsigned = f"u{bits // 8}"
        return int(np.count_nonzero(one.view(unsigned) != other.view(unsigned)))
    differing: Array = one ^ other
    return int(np.unpackbits(differing, bitorder="little").reshape(-1, bits).any(axis=1).sum())


def decode(raw: Array, dtype: DType, tile: Array, scratch: Array | None = None) -> Array:
    """Stored floats as float64, exactly, in the tile; a scratch of uint32, one for each, saves new memory."""
    out: Array = tile[: raw.size * 8 // dtype.bits]
    if dtype.bits == 8:
        np.take(_table(str(dtype.torch_name)), raw, out=out, mode="clip")  # clip: other modes copy `out`
    elif dtype.name == "BF16":
        # The upper half of a float32, which numpy has.
        room = None if scratch is None else scratch[: out.size]
        wide: Array = np.left_shift(raw.view(np.uint16), 16, out=room, dtype=np.uint32)
        np.copyto(out, wide.view(np.float32))
    else:
        np.copyto(out, raw.view(f"f{dtype.bits // 8}"))
    return out


@cache
def _table(name: str) -> Array:
    """What each byte of one of torch's types means. torch converts single ones ten times slower than this is used."""
    import torch

    table: Array = torch.arange(256, dtype=torch.uint8).view(getattr(torch, name)).to(torch.float64).numpy()
    return table


def settle_specials(a: Array, b: Array, difference: Array) -> Array:
    """Make a - b zero between equal infinities and between NaN, infinite between NaN and anything else.

    Returns where neither is NaN.
    """
    one, other = np.isnan(a), np.isnan(b)
    difference[(a == b) | (one & other)] = 0.0
    difference[one ^ other] = math.inf
    return ~(one | other)


def squares(values: Array) -> float:
    """Sum of squares. Not by numpy's BLAS, which would start threads of its own in every worker."""
    return float(np.einsum("i,i->", values, values))


def finite_squares(values: Array) -> float:
    """Sum of the squares of the finite values."""
    total = squares(values)
    return total if math.isfinite(total) else squares(values[np.isfinite(values)])


def most_ulps(bits: Sequence[Array], scratch: Sequence[Array]) -> int:
    """The most steps of the stored dtype between two elements, both zeros being one place.

    What `ordered.ulp_distances` gives, in the width of the dtype and without new memory.
    """
    one, other, work = scratch
    width, magnitude = 8 * work.itemsize, np.iinfo(work.dtype).max
    for stored, place in zip(bits, (one, other), strict=True):
        sign = np.right_shift(stored, width - 1, out=work)
        np.bitwise_and(stored, magnitude, out=place)
        np.bitwise_xor(place, sign, out=place)
        np.subtract(place, sign, out=place)
    high, low = np.maximum(one, other, out=work), np.minimum(one, other, out=one)
    # The difference may not fit the signed integers; it wraps, and is right as an unsigned one.
    steps = np.subtract(high, low, out=high).view(f"u{work.itemsize}")
    return int(steps.max(initial=0))
