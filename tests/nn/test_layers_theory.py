"""What derivations say of LoRA layers: variance by rank, the bound on the rank, sizes, and DoRA's decomposition."""

from __future__ import annotations

import math

import pytest
import torch
from layer_world import CASES, RANK, base_of, dressed, inputs_of, is_close
from torch import Tensor, nn

from lora_cli.nn.adapter_layer import LoRAAdapter
from lora_cli.nn.parameters import LoRAParameters
from lora_cli.nn.wrap import wrap

F64 = torch.float64


def spread(rank: int, *, rslora: bool, inputs: int = 256) -> float:
    """The variance of what an adapter adds, with factors and inputs of variance 1 and alpha 1."""
    numbers = torch.Generator().manual_seed(rank)
    adapter = LoRAAdapter(inputs, 512, rank=rank, alpha=1.0, rslora=rslora)
    for factor in adapter.parameters():
        factor.data = torch.randn(factor.shape, generator=numbers)
    found: Tensor = adapter(torch.randn(512, inputs, generator=numbers))
    return float(found.detach().var())


@pytest.mark.parametrize("rank", [2, 16, 64])
def test_the_variance_of_an_adapter_falls_with_its_rank_unless_it_is_stabilised(rank: int) -> None:
    """Var Δh = s²·r·k: with s = 1/r it is k/r, with s = 1/√r it is k, whatever the rank."""
    assert spread(rank, rslora=False) == pytest.approx(256 / rank, rel=0.2)
    assert spread(rank, rslora=True) == pytest.approx(256, rel=0.2)


@pytest.mark.parametrize("kind", ["linear", "gpt2", "embedding", "conv2d", "conv3d"])
def test_a_change_has_the_rank_of_its_factors(kind: str) -> None:
    layer = dressed(CASES[kind], F64)
    change = (layer.weight - layer.base_weight).detach()
    assert int(torch.linalg.matrix_rank(change.flatten(1))) == RANK < min(change.flatten(1).shape)


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("linear", RANK * (6 + 5)),
        ("embedding", RANK * (9 + 5)),
        ("conv2d", RANK * (4 * 3 * 2 + 5)),
        ("grouped", 3 * RANK * (6 + 5)),
        ("attention", RANK * (6 + 18) + RANK * (6 + 6)),
    ],
)
def test_how_many_numbers_are_trained(kind: str, count: int) -> None:
    """r·(in + out), which for tables is r·(entries + dim) and for kernels r·(in·k + out); DoRA has out more."""
    layer = wrap(base_of(CASES[kind]), rank=RANK)
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == count
    magnitudes = {"grouped": 3 * 5, "attention": 18 + 6}.get(kind, 5)
    layer = wrap(base_of(CASES[kind]), rank=RANK, dora=True)
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == count + magnitudes


def test_factors_are_where_the_layer_is_and_of_its_type() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        layer = wrap(nn.Linear(6, 5, device="meta", dtype=dtype), rank=2)
        assert layer.lora_B.weight.shape == (5, 2)
        assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", dtype)}


@pytest.mark.parametrize("rslora", [False, True])
def test_the_scale_of_parameters(rslora: bool) -> None:
    assert LoRAParameters(rslora=rslora) == LoRAParameters(rank=8, alpha=None, dropout=0.0, rslora=rslora, dora=False)
    assert LoRAParameters(rank=8, alpha=8, rslora=rslora).scale.times() == (math.sqrt(8) if rslora else 1.0)
    assert LoRAParameters(rank=4, rslora=rslora).scale.times() == (2.0 if rslora else 1.0)


# DoRA


def test_dora_written_from_scratch() -> None:
    """m ⊙ (W + s·B·A) / (‖W + s·B·A‖ + 10⁻⁸), row by row; that last number, which is not in the paper, apart."""
    layer = dressed(CASES["linear without bias"], F64, dora=True)
    (x,) = inputs_of(CASES["linear without bias"], F64)
    adapted = layer.base.weight + 4.0 / RANK * (layer.lora_B.weight @ layer.lora_A.weight)
    column_norm = torch.norm(adapted, dim=1, keepdim=True)
    final = layer.lora_magnitude.weight.unsqueeze(1) * adapted / (column_norm + 1e-8)
    assert is_close(layer(x), x @ final.T, 1e-7)
    assert is_close(torch.norm(layer.weight, dim=1), layer.lora_magnitude.weight.abs(), 1e-13)
    direction = adapted / column_norm
    assert is_close(layer.weight, layer.lora_magnitude.weight.unsqueeze(1) * direction, 1e-13)


def test_magnitudes_begin_as_the_lengths_of_the_rows() -> None:
    layer = wrap(base_of(CASES["linear"], F64), rank=2, dora=True)
    assert is_close(layer.lora_magnitude.weight, torch.norm(base_of(CASES["linear"], F64).weight, dim=1), 1e-14)
    assert is_close(layer.weight, layer.base_weight, 1e-15)
