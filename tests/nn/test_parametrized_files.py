"""Checkpoints of parametrized modules: the merge folds them to plain ones, exactly, and unmerging wraps them again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_cli
from lora_cli.arithmetic.product import Term
from lora_cli.nn import exact
from lora_cli.nn.parametrization import parametrize_lora

RANK, ALPHA = 3, 7.0


class Mixed(nn.Module):
    """Weights of many shapes, a square one among them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.embed = nn.Embedding(12, 6)
        self.square = nn.Linear(6, 6)
        self.conv = nn.Conv1d(6, 8, 3, padding=1)
        self.cell = nn.LSTMCell(8, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.conv(self.square(self.embed(tokens)).transpose(1, 2))
        state: tuple[Tensor, Tensor] = self.cell(x.mean(2))
        return state[0]


PLACES = {"embed": "weight", "square": "weight", "conv": "weight", "cell": "weight_hh"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_command_folds_the_keys_and_adds_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    plain, model = Mixed().to(dtype), Mixed().to(dtype)
    loras = {
        place: parametrize_lora(model.get_submodule(place), RANK, ALPHA, parameter=name)
        for place, name in PLACES.items()
    }
    with torch.no_grad():
        for lora in loras.values():
            lora.B.normal_()
    save_file(model.state_dict(), tmp_path / "wrapped.safetensors", metadata={"format": "pt"})
    options = lora_cli.PlanOptions(read=lora_cli.ReadOptions(alpha=ALPHA))
    lora_cli.merge(tmp_path / "wrapped.safetensors", [], tmp_path / "merged.safetensors", options)
    merged = load_file(tmp_path / "merged.safetensors")
    expected = {
        f"{place}.{name}": exact.added(
            plain.get_parameter(f"{place}.{name}"), [Term(loras[place].B, loras[place].A, loras[place].scale)]
        )
        for place, name in PLACES.items()
    }
    assert set(merged) == set(plain.state_dict())
    for key, tensor in plain.state_dict().items():
        assert torch.equal(merged[key], expected.get(key, tensor))
        assert (key in expected) != torch.equal(merged[key], tensor)
    plain.load_state_dict(merged, strict=True)
    tokens = torch.arange(12).view(2, 6)
    loose = 0.1 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(plain(tokens), model(tokens), rtol=loose, atol=loose)
    lora_cli.unmerge(tmp_path / "merged.safetensors", [], tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == (tmp_path / "wrapped.safetensors").read_bytes()
