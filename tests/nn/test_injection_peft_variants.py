"""Adapters that PEFT saved, and of which LoRA layers in a live model could do only a part: they are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft_files import llama, net, saved

from lora_cli.errors import UnsupportedError
from lora_cli.nn import load_adapter

LORA: dict[str, Any] = {"target_modules": ["q_proj"]}
TIED: dict[str, Any] = {"ensure_weight_tying": True}

REFUSED: dict[str, tuple[Any, dict[str, Any], str, str]] = {
    "rows": (llama, LORA | {"trainable_token_indices": [3]}, "single rows", "model.embed_tokens.weight"),
    "layers": (
        lambda: llama(layers=2), LORA | {"layer_replication": [(0, 2), (1, 2)]}, "repeated", "layers (0, 1, 1)"
    ),
    "tied factors": (lambda: llama(tied=True), TIED | {"target_modules": ["lm_head"]}, "tied tensors as one",
                     "model.embed_tokens.weight"),
    "tied whole": (lambda: llama(tied=True), TIED | LORA | {"modules_to_save": ["embed_tokens"]},
                   "tied tensors as one", "model.embed_tokens.weight"),
    "init": (lambda: net().float(), {"target_modules": ["up_proj"], "init_lora_weights": "pissa"}, "changed its base",
             "init_lora_weights is pissa"),
    "attention": (net, {"target_modules": ["attn"]}, "two things by an adapter of attention", "attn.in_proj_weight"),
    "bias": (net, {"target_modules": ["up_proj"], "lora_bias": True}, "no bias of their own", "up_proj.bias"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_layer_does(tmp_path: Path, name: str) -> None:
    make, config, words, detail = REFUSED[name]
    saved(tmp_path / "adapter", make(), **config)
    model = make()
    before = list(model.state_dict())
    with pytest.raises(UnsupportedError, match=words) as caught:
        load_adapter(model, tmp_path / "adapter")
    assert any(detail in line for line in caught.value.details)
    assert "lora-cli merge" in str(caught.value.hint)
    assert list(model.state_dict()) == before


@pytest.mark.parametrize(
    ("config", "tied"),
    [(LORA | {"layer_replication": [(0, 2)]}, False), (LORA | TIED, True)],
    ids=["the same layers", "nothing tied"],
)
def test_what_changes_nothing_is_loaded(tmp_path: Path, config: dict[str, Any], tied: bool) -> None:
    made = saved(tmp_path / "adapter", llama(layers=2, tied=tied), **config)
    model = llama(layers=2, tied=tied)
    load_adapter(model, tmp_path / "adapter")
    ids = torch.arange(6).reshape(1, 6)
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, made.model(ids).logits, rtol=1e-6, atol=1e-6)


def test_blocks_are_loaded_expanded(tmp_path: Path) -> None:
    blocks = {"target_modules_bd_a": ["down"], "target_modules_bd_b": ["up_proj"], "nblocks": 2}
    made = saved(tmp_path / "adapter", net(), target_modules=["up_proj", "down_proj"], use_bdlora=blocks)
    model: Any = net()
    load_adapter(model, tmp_path / "adapter")
    x = torch.randn(3, 8, dtype=torch.float64)
    with torch.no_grad():
        live = made.module("down_proj")(made.module("up_proj")(x))
        assert torch.allclose(model.down_proj(model.up_proj(x)), live, rtol=1e-6, atol=1e-6)


def test_a_table_that_was_resized_is_the_base_s_own(tmp_path: Path) -> None:
    """Nothing in it was trained, so nothing is trained; a model with another table is another model."""
    made = saved(tmp_path / "adapter", llama(), save={"save_embedding_layers": True}, **LORA)
    model = llama()
    injection = load_adapter(model, tmp_path / "adapter")
    assert not injection.wholes_of("default")
    made.write({key: tensor + 1 if "lm_head" in key else tensor for key, tensor in made.tensors().items()})
    with pytest.raises(UnsupportedError, match="the model's are others") as caught:
        load_adapter(llama(), tmp_path / "adapter")
    assert caught.value.details == ("lm_head.weight",)
