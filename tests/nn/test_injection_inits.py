"""Inits of live models: the numbers of files, and factors that are taken from the weights, exactly."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_cli
from lora_cli.arithmetic.product import Term
from lora_cli.errors import ShapeError, UnsupportedError
from lora_cli.nn import GroupedLinear, Injection, LoRAConfig, exact, inject, wrap
from lora_cli.nn.layer import LoRALayer

PRINCIPAL = ("pissa", "pissa_niter_8", "olora")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(23, 10)
        self.up_proj = nn.Linear(10, 17)
        self.conv = nn.Conv1d(17, 9, 3, padding=1)
        self.attn = nn.MultiheadAttention(9, 3, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv(self.up_proj(self.table(ids)).tanh().mT).mT
        found: Tensor = self.attn(x, x, x)[0]
        return found


EVERYTHING = ("table", "up_proj", "conv", "attn")


def net() -> Net:
    torch.manual_seed(3)
    return Net().requires_grad_(False)


def ids() -> Tensor:
    return torch.arange(14).view(2, 7)


def trained(injection: Injection) -> None:
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)


def bits(state: dict[str, Tensor]) -> dict[str, bytes]:
    return {key: tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for key, tensor in state.items()}


@pytest.mark.parametrize("init", PRINCIPAL)
@pytest.mark.parametrize("rslora", [False, True])
def test_the_weight_less_the_product_of_its_factors(init: str, rslora: bool) -> None:
    model = net()
    before, expected = {key: tensor.clone() for key, tensor in model.state_dict().items()}, model(ids())
    injection = inject(model, LoRAConfig(rank=4, alpha=6, targets=EVERYTHING, init=init, rslora=rslora))
    assert torch.allclose(model(ids()), expected, atol=1e-5)
    base = injection.base_state()
    for name, layer in injection.layers.items():
        key = next(key for key in before if key.startswith(f"{name}.") and "weight" in key)
        assert not torch.equal(base[key], before[key])
        scale = layer.settings["default"].scale.times()
        product = scale * layer.product(layer.lora_A["default"].double(), layer.lora_B["default"].double())
        # Both roundings are of the sums alone, so one unit of the larger summand bounds the error.
        unit = 2.0**-23 * torch.maximum(before[key].abs(), base[key].abs())
        assert bool(((base[key].double() + product - before[key].double()).abs() <= unit).all())
    trained(injection)
    injection.take_out()
    assert bits(model.state_dict()) == bits(before)


def test_pissa_takes_the_largest_directions_and_olora_those_of_the_first_columns() -> None:
    weight = torch.randn(12, 8, dtype=torch.float64)
    s = torch.linalg.svdvals(weight)
    for init, size in (("pissa", float((s[3:] ** 2).sum() ** 0.5)), ("olora", None)):
        layer = nn.Linear(8, 12, bias=False, dtype=torch.float64)
        layer.load_state_dict({"weight": weight})
        inject(nn.ModuleDict({"up": layer}), rank=3, alpha=3, init=init)
        if size is not None:
            assert float(torch.linalg.matrix_norm(layer.weight)) == pytest.approx(size, rel=1e-6)
        else:
            q = torch.linalg.qr(weight[:, :3]).Q
            assert torch.allclose(layer.weight, weight - q @ q.T @ weight, atol=1e-6)


@pytest.mark.parametrize("init", PRINCIPAL)
def test_live_models_and_files_take_the_same_factors(init: str, tmp_path: Path) -> None:
    model = net()
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    fields: dict[str, Any] = {"rank": 4, "alpha": 6, "targets": ("up_proj", "conv"), "init": init, "seed": 9}
    lora_cli.inject(tmp_path / "base.safetensors", tmp_path / "files", base_out=tmp_path / "rest.safetensors", **fields)
    injection = inject(model, LoRAConfig(**fields))
    found = load_file(tmp_path / "files" / "adapter_model.safetensors")
    for name, layer in injection.layers.items():
        for side, factors in (("A", layer.lora_A), ("B", layer.lora_B)):
            assert torch.equal(factors["default"], found[f"base_model.model.{name}.lora_{side}.weight"])
    assert bits(load_file(tmp_path / "rest.safetensors")) == bits(injection.base_state())


@pytest.mark.parametrize("init", ["kaiming", *PRINCIPAL])
@pytest.mark.parametrize("rslora", [False, True])
def test_what_is_saved_fits_the_base_as_it_was(init: str, rslora: bool, tmp_path: Path) -> None:
    model = net()
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    targets = ("table", "up_proj", "conv")
    injection = inject(model, LoRAConfig(rank=4, alpha=6, targets=targets, init=init, rslora=rslora))
    injection.save(tmp_path / "untrained")
    lora_cli.merge(tmp_path / "base.safetensors", [tmp_path / "untrained"], tmp_path / "same.safetensors")
    assert (tmp_path / "same.safetensors").read_bytes() == (tmp_path / "base.safetensors").read_bytes()
    trained(injection)
    expected = model(ids())
    injection.save(tmp_path / "adapter")
    lora_cli.merge(tmp_path / "base.safetensors", [tmp_path / "adapter"], tmp_path / "merged.safetensors")
    plain = net()
    assert not torch.allclose(plain(ids()), expected, atol=1e-2)
    plain.load_state_dict(load_file(tmp_path / "merged.safetensors"))
    assert torch.allclose(plain(ids()), expected, atol=1e-4)


def test_embeddings_begin_as_wide_as_other_layers() -> None:
    """What is looked up in A is as large as what a product with it gives, whatever the vocabulary."""
    model = nn.ModuleDict({"table": nn.Embedding(5000, 16), "up": nn.Linear(64, 16)})
    layers = inject(model, rank=9, targets=("table", "up")).layers
    for name, bound in (("table", 1 / 3), ("up", 1 / 8)):
        largest = float(layers[name].lora_A["default"].detach().abs().max())
        assert 0.98 * bound < largest <= bound


def test_a_rank_that_a_weight_does_not_have() -> None:
    model = net()
    before = bits(model.state_dict())
    with pytest.raises(ShapeError, match="rank is larger"):
        inject(model, rank=11, targets=("up_proj", "attn"), init="pissa")
    assert bits(model.state_dict()) == before
    assert not any(isinstance(module, LoRALayer) for module in model.modules())
    with pytest.raises(UnsupportedError, match="not for a stack"):
        inject(nn.ModuleDict({"experts": GroupedLinear(2, 4, 4)}), rank=1, targets=("experts",), init="olora")


def test_layers_made_by_hand_do_not_begin_alike() -> None:
    torch.manual_seed(0)
    one, other = (wrap(nn.Linear(6, 6), rank=2) for _ in range(2))
    assert not torch.equal(one.lora_A["default"], other.lora_A["default"])
    torch.manual_seed(0)
    again = wrap(nn.Linear(6, 6), rank=2)
    assert torch.equal(one.lora_A["default"], again.lora_A["default"])


def test_subtracting_is_adding_the_opposite() -> None:
    weight, b, a = torch.randn(6, 5), torch.randn(6, 2), torch.randn(2, 5)
    added = exact.added(weight, [Term(b, a, -0.5)])
    assert torch.equal(added, exact.subtracted(weight, [Term(b, a, 0.5)]))
