"""PEFT's own merges of embeddings and convolutions, held against those of files."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import gaussian, read
from round_trips import contents, round_trip
from safetensors.torch import load_file, save_file
from torch import nn

from lora_cli.errors import ShapeError, UnsupportedError
from lora_cli.surgery.merge import merge, plan_merge
from lora_cli.surgery.placing import PlanOptions
from lora_cli.surgery.verify import verify

TARGETS = ["emb", "wpe", "one", "two", "three", "small", "lin"]


class Model(nn.Module):
    """Tables, one of them square, convolutions of every size, and a matrix between them."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(40, 12)
        self.wpe = nn.Embedding(12, 12)
        self.one = nn.Conv1d(6, 8, 3)
        self.two = nn.Conv2d(6, 8, (3, 2))
        self.three = nn.Conv3d(4, 8, (2, 3, 2))
        self.small = nn.Conv2d(6, 8, 1)
        self.lin = nn.Linear(12, 10)
        self.norm = nn.LayerNorm(12)
        for number, parameter in enumerate(self.parameters()):
            parameter.data = gaussian(number, *parameter.shape)


@pytest.fixture
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def made(folder: Path, dtype: torch.dtype, **config: Any) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """A base, an adapter that PEFT saved, and PEFT's merge of them."""
    from peft import LoraConfig, PeftModel, get_peft_model

    base = folder / "base"
    base.mkdir()
    save_file(Model().to(dtype).state_dict(), base / "model.safetensors", {"format": "pt"})
    (base / "config.json").write_text("{}")
    said: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "init_lora_weights": False}
    torch.manual_seed(0)
    model = get_peft_model(Model().to(dtype), LoraConfig(**(said | config)))
    model.save_pretrained(folder / "adapter")
    loaded = PeftModel.from_pretrained(Model().to(dtype), folder / "adapter")
    merged: dict[str, torch.Tensor] = dict(loaded.merge_and_unload().state_dict())
    return base, folder / "adapter", merged


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "config",
    [{}, {"use_rslora": True, "rank_pattern": {"emb": 2}, "alpha_pattern": {"two": 3}}, {"lora_bias": True}],
    ids=["plain", "patterns", "lora_bias"],
)
def test_as_peft_merges(tmp_path: Path, dtype: torch.dtype, config: dict[str, Any]) -> None:
    if config.get("lora_bias"):
        config = config | {"target_modules": ["one", "two", "lin"]}  # PEFT gives embeddings none
    base, adapter, expected = made(tmp_path, dtype, **config)
    trip = round_trip(tmp_path, base, [adapter])
    found, before = read(trip.merged), load_file(base / "model.safetensors")
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        # PEFT rounds the change to the type before it adds it, and computes it in float32 at best.
        change = (tensor.double() - before[key].double()).abs().max()
        limit = (tensor.double().abs() + 4 * change) * torch.finfo(dtype).eps
        assert bool(((found[key].double() - tensor.double()).abs() <= limit).all()), key
        targeted = key.split(".")[0] in config.get("target_modules", TARGETS) and key.endswith("weight")
        assert bool((found[key] != before[key]).any()) == (targeted or (bool(config.get("lora_bias")) and change > 0))
    checked = verify(trip.merged, base, [adapter], roundtrip=True)
    assert checked.verified
    assert not verify(trip.merged, base, [adapter], PlanOptions(weights=(0.5,))).verified


def told(adapter: Path, change: dict[str, torch.Tensor]) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file(load_file(file) | change, file)


@pytest.mark.usefixtures("quiet")
def test_a_table_that_was_saved_with_its_factors(tmp_path: Path) -> None:
    base, adapter, expected = made(tmp_path, torch.float32, target_modules=["emb"])
    table = load_file(base / "model.safetensors")["emb.weight"]
    told(adapter, {"base_model.model.emb.base_layer.weight": table})
    trip = round_trip(tmp_path, base, [adapter])
    found = read(trip.merged)["emb.weight"]
    assert torch.allclose(found, expected["emb.weight"], rtol=1e-6, atol=1e-6)
    assert trip.there.ledger == {"applied": 2, "replaced": 1, "added": 0, "ignored": 0}
    # Changed in training as well: then that is what the factors are added to.
    told(adapter, {"base_model.model.emb.base_layer.weight": table + 1})
    merge(base, [adapter], tmp_path / "changed", undo=False)
    assert torch.allclose(read(tmp_path / "changed")["emb.weight"], expected["emb.weight"] + 1, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("quiet")
def test_the_base_s_own_table_stands_at_any_weight(tmp_path: Path) -> None:
    base, adapter, expected = made(tmp_path, torch.float32, target_modules=["emb"])
    table = load_file(base / "model.safetensors")["emb.weight"]
    told(adapter, {"base_model.model.emb.base_layer.weight": table})
    result = merge(base, [adapter], tmp_path / "out", PlanOptions(weights=(0.5,)))
    assert result.ledger == {"applied": 2, "replaced": 0, "added": 0, "ignored": 1}
    half = (table + expected["emb.weight"]) / 2
    assert torch.allclose(read(tmp_path / "out")["emb.weight"], half, rtol=1e-6, atol=1e-6)
    told(adapter, {"base_model.model.emb.base_layer.weight": table + 1})
    with pytest.raises(UnsupportedError) as caught:
        plan_merge(base, [adapter], PlanOptions(weights=(0.5,)))
    assert "cannot be taken at weight 0.5" in caught.value.details[0]


@pytest.mark.usefixtures("quiet")
def test_a_convolution_in_groups_is_refused_as_peft_refuses_it(tmp_path: Path) -> None:
    """PEFT's A sees the inputs of all groups, which no kernel of the base does."""
    from peft import LoraConfig, get_peft_model

    model = nn.Sequential(nn.Conv2d(6, 8, 3, groups=2))
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base" / "model.safetensors")
    get_peft_model(model, LoraConfig(r=4, target_modules=["0"])).save_pretrained(tmp_path / "adapter")
    before = contents(tmp_path)
    with pytest.raises(ShapeError) as caught:
        merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    assert "2 groups" in caught.value.details[0]
    assert contents(tmp_path) == before
