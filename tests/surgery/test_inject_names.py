"""A fresh adapter has the names that modules have in memory, where PEFT looks for them, whatever files call them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from families import FAMILIES
from models import quiet
from round_trips import Listener
from safetensors.torch import load_file, save_file

from lora_cli.errors import UnsupportedError
from lora_cli.surgery.inject import inject
from lora_cli.surgery.merge import plan_merge

OTHERWISE = ["llava", "llava-today", "llava-published", "gemma3", "qwen2-vl", "qwen2-vl-today", "vit", "vit-today"]


@pytest.mark.parametrize("name", [*OTHERWISE, "dinov2", "gpt-neox", "t5"])
def test_peft_finds_what_was_injected(name: str, tmp_path: Path) -> None:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    family, base, out = FAMILIES[name], tmp_path / "base", tmp_path / "fresh"
    with quiet(family.seed):
        family.save(base)
    result = inject(base, out, rank=3)
    with quiet(family.seed), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys")
        model = PeftModel.from_pretrained(family.load(base), out)
    layers = {path for path, module in model.named_modules() if isinstance(module, LoraLayer)}
    assert len(layers) == len(result.modules) > 4
    state, stored = model.state_dict(), load_file(out / "adapter_model.safetensors")
    assert len(stored) == 2 * len(layers)
    for key, tensor in stored.items():
        assert torch.equal(state[key.replace(".weight", ".default.weight")], tensor)
    # And the way back: a merge finds the tensors that the names came from.
    ledger = plan_merge(base, [out]).ledger
    assert {entry.outcome for entry in ledger} == {"applied"}
    assert {entry.key for entry in ledger} == {module.key for module in result.modules}


def test_targets_are_named_as_the_files_name_them(tmp_path: Path) -> None:
    """The user sees the files, so the patterns are for these, and so are the names in the result."""
    with quiet(FAMILIES["vit"].seed):
        FAMILIES["vit"].save(tmp_path / "base")
    result = inject(tmp_path / "base", tmp_path / "fresh", rank=2, targets=["layer.0.**.query"])
    assert [module.key for module in result.modules] == ["vit.encoder.layer.0.attention.attention.query.weight"]
    keys = load_file(tmp_path / "fresh" / "adapter_model.safetensors")
    assert {key.removeprefix(tiny.PREFIX).partition(".lora_")[0] for key in keys} == {"vit.layers.0.attention.q_proj"}
    # The shortest end that means no other module of the model in memory.
    config = json.loads((tmp_path / "fresh" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["layers.0.attention.q_proj"]


def test_parts_of_modules_keep_their_names_and_are_told(tmp_path: Path) -> None:
    config = {"architectures": ["Dinov2Model"], "model_type": "dinov2"}
    tensors: dict[str, tiny.Array] = {"encoder.layer.0.mlp.weights_in.weight": tiny.numbers(8, 6)}
    base = tiny.write_base(tmp_path / "base", tensors, shards=1, config=config)
    heard = Listener()
    result = inject(base, tmp_path / "fresh", rank=2, progress=heard)
    assert [module.key for module in result.modules] == list(tensors)
    (told,) = heard.told
    assert "encoder.layer.0.mlp.weights_in" in told
    assert "splits" in told
    keys = load_file(tmp_path / "fresh" / "adapter_model.safetensors")
    assert {key.removeprefix(tiny.PREFIX) for key in keys} == {
        f"encoder.layer.0.mlp.weights_in.lora_{side}.weight" for side in "AB"
    }


def test_a_name_of_thousands_of_parts_is_refused_at_once(tmp_path: Path) -> None:
    """All ends of all its beginnings would take minutes, and gigabytes."""
    path = tmp_path / "model.safetensors"
    save_file({"base." * 5000 + "weight": torch.ones(4, 4), "a.weight": torch.ones(4, 4)}, path)
    with pytest.raises(UnsupportedError, match="5001 parts"):
        inject(path, tmp_path / "out", rank=1)
