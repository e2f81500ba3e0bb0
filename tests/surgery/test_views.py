"""Which names layers have, where a model repeats them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from special_worlds import repeated

from lora_cli.checkpoint.checkpoint import StoredTensor, open_checkpoint
from lora_cli.errors import NamesError
from lora_cli.surgery.merge import merge
from lora_cli.surgery.views import views_of


def stored(folder: Path, *keys: str) -> dict[str, StoredTensor]:
    save_file({key: torch.zeros(1) for key in keys}, folder / "f.safetensors")
    return dict(open_checkpoint(folder / "f.safetensors").tensors)


@pytest.mark.parametrize("number", ["00", "01", "9" * 5000, "1234567890", "٠"])
def test_what_is_no_number_of_a_layer_is_left(tmp_path: Path, number: str) -> None:
    tensors = stored(tmp_path, "layers.0.w", "layers.1.w", f"layers.{number}.w")
    views = views_of(tensors, {}, (0, 1, 0), file="f")
    assert {name: tensor.key for name, tensor in views.tensors.items()} == {
        "layers.0.w": "layers.0.w",
        "layers.1.w": "layers.1.w",
        "layers.2.w": "layers.0.w",
        f"layers.{number}.w": f"layers.{number}.w",
    }
    assert views.stored == 2


def test_layers_that_are_not_repeated_are_not_counted(tmp_path: Path) -> None:
    assert views_of(stored(tmp_path, "layers.0.w", "layers.1.w"), {}, None, file="f").stored == 0


def test_no_layer_at_all(tmp_path: Path) -> None:
    with pytest.raises(NamesError, match="nothing tells which"):
        views_of(stored(tmp_path, "layers.00.w"), {}, (0, 0), file="f")


CONFIGS: dict[str, tuple[dict[str, object], str]] = {
    "numbers": (
        {"num_hidden_layers": 3, "mlp_only_layers": [1]},
        "lists numbers of them as they were: mlp_only_layers",
    ),
    "another count": ({"num_hidden_layers": 2}, "names no such number; set it to 5"),
    "all is said anew": ({"num_hidden_layers": 3, "layer_types": ["a", "b", "c"]}, ""),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_a_config_says_of_layers_that_stays_as_it_was(tmp_path: Path, name: str) -> None:
    said, words = CONFIGS[name]
    world = repeated(tmp_path, torch.float32, 1)
    config = json.loads((world.base / "config.json").read_text())
    (world.base / "config.json").write_text(json.dumps(config | said))
    found = [warning for warning in merge(world.base, world.adapters, tmp_path / "out").warnings if "became" in warning]
    assert found == ([f"base: 3 layers became 5, and config.json {words}"] if words else [])
