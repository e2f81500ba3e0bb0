"""Merging a matrix with DoRA in memory: how it is cut and stored does not show, and undoing it takes few bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lora_cli.arithmetic.product import Term
from lora_cli.nn import exact
from lora_cli.nn.exact import Change, merge, unmerge

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)


def normal(seed: int, *shape: int, std: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std


def matrix_and_change(dtype: torch.dtype, out: int = 90, width: int = 200) -> tuple[Tensor, Change]:
    """A matrix (out × in), and what DoRA makes of it: some rows grow, some shrink, one is turned and one is nothing."""
    weight = normal(0, out, width).to(dtype)
    magnitude = weight.float().norm(dim=1) * (1 + normal(1, out, std=0.02))
    magnitude[:2] = torch.tensor([0.0, -3.0])
    return weight, Change((Term(normal(2, out, 3, std=0.05), normal(3, 3, width), 0.5),), magnitude=magnitude)


def bits(tensor: Tensor) -> list[int]:
    return tensor.contiguous().view(torch.uint8).flatten().tolist()


@pytest.mark.parametrize("elements", [1, 1000, 200 * 64, 1 << 18])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_and_layout_do_not_show(dtype: torch.dtype, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, change = matrix_and_change(dtype)
    expected, _ = merge(weight, change)
    monkeypatch.setattr(exact, "BLOCK_ELEMENTS", elements)
    for turned in (False, True):
        stored = weight.T.contiguous() if turned else weight
        merged, forgotten = merge(stored, replace(change, transposed=turned))
        assert bits(merged.T if turned else merged) == bits(expected)
        assert bits(unmerge(merged, forgotten)) == bits(stored)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_get_their_magnitudes_for_lengths(dtype: torch.dtype) -> None:
    weight, change = matrix_and_change(dtype)
    assert change.magnitude is not None
    merged, _ = merge(weight, change)
    lengths = merged.double().norm(dim=1)
    assert torch.allclose(lengths, change.magnitude.abs().double(), rtol=2 * torch.finfo(dtype).eps)
    plain = weight.double() + 0.5 * (change.terms[0].b.double() @ change.terms[0].a.double())
    cosines = (merged.double() * plain).sum(1) / (lengths * plain.norm(dim=1))
    assert bool((cosines[2:] > 0.99).all())
    assert float(cosines[1]) < -0.99


@pytest.mark.parametrize(("dtype", "bits_each"), [(torch.bfloat16, 0.2), (torch.float16, 0.2), (torch.float32, 0.2)])
def test_what_undoes_a_merge_is_short(dtype: torch.dtype, bits_each: float) -> None:
    weight, change = matrix_and_change(dtype, 300, 400)
    assert change.magnitude is not None
    change.magnitude[0] = 20.0
    _, forgotten = merge(weight, change)
    assert 8 * sum(map(len, forgotten.streams)) < bits_each * weight.numel()
