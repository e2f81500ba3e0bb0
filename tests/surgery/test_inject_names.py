"""A fresh adapter has the names that modules have in memory, where PEFT looks for them, whatever files call them."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import tiny
import torch
from families import FAMILIES
from models import quiet
from round_trips import Listener
from safetensors.torch import load_file

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
    result = inject(tmp_path / "base", tmp_path / "fresh", rank=2, targets=["attention.query"])
    assert [m.key for m in result.modules] == [
        f"vit.encoder.layer.{n}.attention.attention.query.weight" for n in range(2)
    ]
    keys = load_file(tmp_path / "fresh" / "adapter_model.safetensors")
    assert {key.removeprefix(tiny.PREFIX).partition(".lora_")[0] for key in keys} == {
        f"vit.layers.{n}.attention.q_proj" for n in range(2)
    }


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
