"""An adapter without a frozen layer."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from layer_world import is_close
from safetensors.torch import load_file, save_file
from torch import nn

import lora_cli
from lora_cli.errors import UsageError
from lora_cli.nn.adapter_layer import LoRAAdapter
from lora_cli.nn.starts import Start
from lora_cli.nn.wrap import wrap


def taught(adapter: LoRAAdapter) -> LoRAAdapter:
    nn.init.normal_(adapter.lora_B.weight)
    return adapter


def test_it_computes_alpha_over_rank_times_b_a_x() -> None:
    adapter = LoRAAdapter(3, 2, rank=1, alpha=16.0)
    adapter.lora_A.weight.data.copy_(torch.tensor([[1.0, 2.0, 0.0]]))
    adapter.lora_B.weight.data.copy_(torch.tensor([[3.0], [-1.0]]))
    assert adapter(torch.tensor([1.0, 1.0, 9.0])).tolist() == [144.0, -48.0]
    assert adapter.weight.tolist() == [[48.0, 96.0, 0.0], [-16.0, -32.0, 0.0]]
    assert adapter.output_size == 2


def test_it_adds_nothing_at_first_and_has_the_usual_sizes() -> None:
    adapter = LoRAAdapter(768, 5)
    assert adapter.lora_A.weight.shape == (8, 768)
    assert adapter.settings.scale.times() == 2.0
    assert not adapter(torch.randn(4, 7, 768)).any()
    assert adapter.lora_A.weight.any()
    assert adapter(torch.randn(4, 7, 768)).shape == (4, 7, 5)


def test_beside_a_frozen_layer_it_is_a_lora_layer() -> None:
    base = nn.Linear(6, 5)
    start = Start(module="X", seed=4)
    layer = wrap(base)
    adapter = taught(LoRAAdapter(6, 5, rank=3, alpha=2.0, rslora=True, start=start))
    layer.add_adapter("default", adapter.settings, start=start)
    assert torch.equal(layer.lora_A.weight, adapter.lora_A.weight)
    layer.lora_B.weight.data.copy_(adapter.lora_B.weight)
    x = torch.randn(4, 6)
    assert torch.equal(layer.delta(x), adapter(x))
    assert is_close(layer.weight, base.weight + adapter.weight, 1e-6)


def test_both_factors_are_trained() -> None:
    adapter = taught(LoRAAdapter(4, 3, rank=2))
    x = torch.randn(5, 4)
    adapter(x).square().sum().backward()
    a, b = (factor.weight.detach().clone().requires_grad_(True) for factor in (adapter.lora_A, adapter.lora_B))
    (x @ a.T @ b.T * 8.0).square().sum().backward()
    assert is_close(adapter.lora_A.weight.grad, a.grad, 1e-5)
    assert is_close(adapter.lora_B.weight.grad, b.grad, 1e-5)


def test_it_takes_its_input_size_from_the_first_input() -> None:
    start = Start(seed=1)
    adapter = LoRAAdapter(None, 3, rank=2, start=start)
    assert adapter.input_size is None
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    nn.init.normal_(adapter.lora_B.weight)
    adapter(torch.randn(5, 4)).square().sum().backward()
    assert adapter.input_size == 4
    assert torch.equal(adapter.lora_A.weight, LoRAAdapter(4, 3, rank=2, start=start).lora_A.weight)
    before = adapter.lora_A.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(adapter.lora_A.weight, before)  # an optimizer made before knows it


def test_it_takes_its_input_size_from_a_state() -> None:
    told = taught(LoRAAdapter(4, 3, rank=2))
    adapter = nn.Sequential(LoRAAdapter(None, 3, rank=2))
    adapter.load_state_dict(nn.Sequential(told).state_dict())
    x = torch.randn(5, 4)
    assert torch.equal(adapter(x), told(x))
    with pytest.raises(RuntimeError, match="size mismatch"):
        LoRAAdapter(None, 3, rank=4).load_state_dict(told.state_dict())


def test_copies_before_and_after_the_first_input_begin_alike() -> None:
    adapter = taught(LoRAAdapter(None, 3))
    x = torch.randn(5, 4)
    twins = [copy.deepcopy(adapter), pickle.loads(pickle.dumps(adapter))]  # noqa: S301 # what was pickled here
    twins[0].double()
    assert twins[0](x.double()).dtype == torch.float64
    assert torch.equal(twins[1](x), adapter(x))
    assert torch.equal(copy.deepcopy(adapter)(x), adapter(x))


def test_it_begins_anew() -> None:
    adapter = taught(LoRAAdapter(4, 3))
    before = adapter.lora_A.weight.detach().clone()
    adapter.reset_parameters()
    assert not adapter.lora_B.weight.any()
    assert not torch.equal(adapter.lora_A.weight, before)
    lazy = LoRAAdapter(None, 3)
    lazy.reset_parameters(Start(seed=5))
    lazy(torch.zeros(2, 4))
    assert torch.equal(lazy.lora_A.weight, LoRAAdapter(4, 3, start=Start(seed=5)).lora_A.weight)


def test_types_and_dropout() -> None:
    adapter = taught(LoRAAdapter(4, 3, dropout=0.5, dtype=torch.bfloat16))
    assert adapter.lora_A.weight.dtype == adapter.lora_B.weight.dtype == torch.bfloat16
    x = torch.ones(64, 4)
    assert adapter(x).dtype == torch.float32
    assert len(adapter(x).unique(dim=0)) > 1
    assert len(adapter.eval()(x).unique(dim=0)) == 1
    with pytest.raises(UsageError, match="rank makes no sense"):
        LoRAAdapter(4, 3, rank=0)


def test_its_state_is_an_adapter_for_merging_files(tmp_path: Path) -> None:
    adapter, weight = taught(LoRAAdapter(6, 5, alpha=3.0)), torch.randn(5, 6)
    save_file({"X.weight": weight}, tmp_path / "base.safetensors")
    save_file({f"X.{key}": tensor for key, tensor in adapter.state_dict().items()}, tmp_path / "adapter.safetensors")
    options = lora_cli.PlanOptions(read=lora_cli.ReadOptions(alpha=3.0))
    files = (tmp_path / "base.safetensors", [tmp_path / "adapter.safetensors"], tmp_path / "merged.safetensors")
    lora_cli.merge(*files, options)
    assert is_close(load_file(tmp_path / "merged.safetensors")["X.weight"], weight + adapter.weight, 1e-6)
