"""The line of ordered integers: stored floats as whole numbers in the order of their values, one step an ULP.

    key = b ^ ((b >> n-1) & MAX)

maps the signed n-bit pattern b of a float to its place: negative floats, whose patterns run backwards, are
turned round, -0.0 stands at -1 and +0.0 at 0. The map is its own inverse. Infinities and NaN lie beyond the
finite keys.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_cli.arithmetic.floats import binades, bits_dtype, fraction_bits, power_of_two
from lora_cli.errors import ShapeError

Bits = NDArray[np.signedinteger[Any]]


def bits_view(tensor: Tensor) -> Bits:
    """Return a CPU tensor's memory as signed integers of its width, in its shape.

    Writing to the view writes the tensor.

    Raises:
        UnsupportedError: The dtype cannot take a delta.
    """
    # numpy has no bfloat16 and no float8, so torch gives the integers.
    view: Bits = tensor.detach().view(bits_dtype(tensor.dtype)).numpy()
    return view


def to_ordered(bits: Bits, out: Bits | None = None) -> Bits:
    """Return the keys of bit patterns, in the same integer dtype; `out` may be `bits` itself."""
    largest = bits.dtype.type(np.iinfo(bits.dtype).max)
    sign = bits >> bits.dtype.type(8 * bits.itemsize - 1)
    sign &= largest
    keys: Bits = np.bitwise_xor(bits, sign, out=out)
    return keys


def from_ordered(keys: Bits, out: Bits | None = None) -> Bits:
    """Return the bit patterns of keys: the same map once more."""
    return to_ordered(keys, out)


def largest_key(dtype: torch.dtype) -> int:
    """Return the key of the largest finite value; that of the least is its complement, `-1 - largest_key`."""
    return int(torch.tensor(torch.finfo(dtype).max, dtype=dtype).view(bits_dtype(dtype)))


def neighbours(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return the next lower and the next higher stored value of each finite one, in its dtype.

    -0.0 and +0.0 are neighbours of each other. The least finite value is its own lower neighbour, the
    largest its own upper one: no step leads to infinity.
    """
    keys = to_ordered(bits_view(tensor))
    step = keys.dtype.type(1)
    top = keys.dtype.type(largest_key(tensor.dtype))
    # The dtype's least and largest integers are NaN patterns, so a step from a finite key cannot wrap.
    lower, upper = np.maximum(keys - step, ~top), np.minimum(keys + step, top)
    return _stored(lower, tensor.dtype), _stored(upper, tensor.dtype)


def _stored(keys: Bits, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.asarray(from_ordered(keys))).view(dtype)


def ulp_distances(a: Tensor, b: Tensor) -> NDArray[np.uint64]:
    """Return for each pair of elements how many steps of their dtype lie between them; zeros are one value.

    -0.0 and +0.0 are different bits and 0 ULP apart, so compare bits where identity is meant. From an
    infinity it is one step to the largest finite value (in float8_e4m3fn there is none); with NaN on one
    side the number means nothing.

    Args:
        a: A CPU tensor of a dtype that can take a delta.
        b: Another of the same dtype and shape.

    Raises:
        ShapeError: Shapes or dtypes differ.
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        raise ShapeError(
            "Tensors to compare differ",
            expected=f"{a.dtype} {tuple(a.shape)}",
            found=f"{b.dtype} {tuple(b.shape)}",
        )
    places = [_places(tensor) for tensor in (a, b)]
    # Two float64 may be nearly 2^64 steps apart: the difference wraps in int64 and is right as an unsigned
    # number.
    low, high = np.minimum(*places).view(np.uint64), np.maximum(*places).view(np.uint64)
    distances: NDArray[np.uint64] = high - low
    return distances


def _places(tensor: Tensor) -> NDArray[np.int64]:
    """Return keys with the negative ones moved up by one, so that both zeros stand at 0."""
    keys = to_ordered(bits_view(tensor)).astype(np.int64)
    keys += keys < 0
    return keys


def ulp_distance(a: Tensor, b: Tensor) -> int:
    """Return the largest of `ulp_distances` over the pairs that are both finite; 0 if there are none.

    Arguments and errors are as there.
    """
    distances = ulp_distances(a, b)
    finite = torch.isfinite(a.to(torch.float64)) & torch.isfinite(b.to(torch.float64))
    return int(distances.max(initial=0, where=finite.numpy()))


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the spacing of `dtype` at |x|: from the largest value not above |x| to the next.

    Args:
        x: Values in float64, on any device. Under the least normal number of `dtype` the spacing is that of
            its subnormals, above its largest number (and at infinity and NaN) that of its top binade.
        dtype: The storage dtype whose spacing is asked for.

    Returns:
        Powers of two in float64, of the shape of `x`.
    """
    lowest, highest = binades(dtype)
    exponent = torch.frexp(x).exponent - 1
    exponent = torch.where(x == 0, lowest, exponent).clamp(lowest, highest)
    exponent = torch.where(torch.isfinite(x), exponent, highest)
    return power_of_two(exponent - fraction_bits(dtype))
