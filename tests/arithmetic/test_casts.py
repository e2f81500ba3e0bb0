"""Every rounding to the narrow formats, over all midpoints, and casts of tensors that take no delta."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import reference
import torch
from patterns import DTYPES, awkward, from_patterns, same_bits, to_patterns
from torch import Tensor

from lora_cli.arithmetic.rounding import TileKernel, cast, overflow_limit, work_dtype
from lora_cli.errors import NumericError

SMALL = [name for name, form in reference.FORMATS.items() if form.width <= 16]


def midpoints(name: str, source: torch.dtype) -> tuple[Tensor, Tensor]:
    """All midpoints between neighbours, and the numbers of `source` right below and above, with their patterns."""
    form = reference.FORMATS[name]
    values = from_patterns([list(range(form.largest_pattern + 1))], DTYPES[name])[0].to(torch.float64)
    middle = ((values[:-1] + values[1:]) / 2).to(source)
    assert torch.equal(middle.double() * 2, values[:-1] + values[1:])
    infinity = torch.tensor(math.inf, dtype=source)
    inputs = [torch.nextafter(middle, -infinity), middle, torch.nextafter(middle, infinity)]
    lower = torch.arange(form.largest_pattern)
    outputs = [lower, lower + (lower & 1), lower + 1]
    negative = [-x for x in inputs], [form.sign | y for y in outputs]
    return torch.cat([*inputs, *negative[0]]), torch.cat([*outputs, *negative[1]])


def widen(tensor: Tensor, out: Tensor) -> Tensor:
    """Merge a delta of zero: the cast of the merge kernel."""
    product = torch.zeros(tensor.shape, dtype=torch.float64)
    return TileKernel(work_dtype(tensor.dtype, out.dtype), tensor.numel()).merge(tensor, product, out)


@pytest.mark.parametrize("convert", [cast, widen])
@pytest.mark.parametrize("source", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SMALL)
def test_all_midpoints_go_to_even_and_their_neighbours_to_the_nearest(
    name: str, source: torch.dtype, convert: Callable[[Tensor, Tensor], Tensor]
) -> None:
    values, expected = midpoints(name, source)
    out = convert(values, torch.empty_like(values, dtype=DTYPES[name]))
    assert to_patterns(out.unsqueeze(0)) == [expected.tolist()]


@pytest.mark.parametrize("name", SMALL)
def test_the_sum_of_float32_rounds_all_midpoints_to_even(name: str) -> None:
    """In a merge of 16 bits the working value is a float32: make it the midpoint itself, as 0 + delta."""
    values, expected = midpoints(name, torch.float32)
    base = torch.zeros(values.shape).to(DTYPES[name])
    out = TileKernel(torch.float32, values.numel()).merge(base, values.double(), torch.empty_like(base))
    nonzero = values != 0
    assert torch.equal(torch.tensor(to_patterns(out.unsqueeze(0)))[0][nonzero], expected[nonzero].to(torch.int64))


def test_torch_alone_rounds_float64_twice() -> None:
    """Why the sticky bit is there. Should torch mend this, the test says that it can go."""
    just_above_a_tie = torch.tensor([1 + 2.0**-8 + 2.0**-50], dtype=torch.float64)
    assert float(just_above_a_tie.to(torch.bfloat16)) == 1.0
    assert float(cast(just_above_a_tie, torch.empty(1, dtype=torch.bfloat16))) == 1 + 2.0**-7


@pytest.mark.parametrize("source", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("out_name", reference.FORMATS)
def test_casts_of_any_pattern(source: str, out_name: str) -> None:
    rng = random.Random(3)
    tensor = awkward(rng, 40, 40, DTYPES[source], 12)
    tensor[tensor.abs() >= overflow_limit(DTYPES[out_name])] = 1.0
    expected = [[reference.cast_bits(p, source, out_name) for p in row] for row in to_patterns(tensor)]
    before = tensor.clone()
    assert to_patterns(cast(tensor, torch.empty_like(tensor, dtype=DTYPES[out_name]))) == expected
    assert same_bits(tensor, before)


def test_casts_keep_infinity_and_write_one_nan() -> None:
    specials = [math.inf, -math.inf, 1.0]
    nans = from_patterns([[0x7FC0_0000, 0xFFC0_1234, 0x7F80_0001]], torch.float32)[0]
    for source in (torch.float64, torch.float32):
        tensor = torch.cat([torch.tensor(specials), nans]).to(source)
        for dtype in (torch.bfloat16, torch.float16):
            out = cast(tensor, torch.empty(6, dtype=dtype))
            assert out[:3].tolist() == specials
            assert len(set(to_patterns(out[3:].unsqueeze(0))[0])) == 1
            assert bool(out[3:].isnan().all())
    with pytest.raises(NumericError, match="float8_e4m3fn"):
        cast(torch.tensor([math.inf]), torch.empty(1, dtype=torch.float8_e4m3fn))
    same = cast(nans, torch.empty_like(nans))
    assert same_bits(same, nans)
