"""What a config says after layers were repeated, or a vocabulary got other entries."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lora_cli.checkpoint.repairs import counts_layers, numbered_layers, repaired, with_layers, with_vocabulary

LAYERS = (0, 1, 0, 1, 1)


def layered(config: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(repaired(config, with_layers(LAYERS, 2)))
    return found


@pytest.mark.parametrize(
    "name",
    ["layer_types", "mlp_layer_types", "layers_block_type", "attention_layers", "num_key_value_heads_per_layer"],
)
def test_what_is_said_of_each_layer_is_said_of_its_repetitions(name: str) -> None:
    found = layered({"num_hidden_layers": 2, name: ["a", "b"]})
    assert found == {"num_hidden_layers": 5, name: ["a", "b", "a", "b", "b"]}


def test_lists_that_happen_to_be_as_long_are_left() -> None:
    other = {"architectures": ["A", "B"], "eos_token_id": [7, 8], "mtp_layer_types": ["x", "y"], "layer_types": ["a"]}
    assert layered({"n_layer": 2} | other) == {"n_layer": 5} | other


def test_levels_of_other_models_are_left() -> None:
    vision = {"num_hidden_layers": 3, "layer_types": ["a", "b", "c"], "depth": 2}
    config = {"text_config": {"num_hidden_layers": 2}, "vision_config": vision, "audio_config": {"num_layers": True}}
    assert layered(config) == config | {"text_config": {"num_hidden_layers": 5}}


def test_kinds_of_attention_that_are_said_in_short() -> None:
    """GPT-Neo says them twice, and refuses a count that does not agree (transformers' `GPTNeoConfig`)."""
    from transformers import GPTNeoConfig

    before = GPTNeoConfig(num_layers=2, attention_types=[[["global", "local"], 1]]).to_dict()
    config = {name: before[name] for name in ("num_layers", "attention_types", "attention_layers")}
    after = GPTNeoConfig(**layered(config))
    assert after.attention_layers == ["global", "local", "global", "local", "local"]
    for odd in ([], [[["global", "local"], 3]], [["global"]], [[7, 2]], [["global", "local"], 1], "ab"):
        assert layered({"num_layers": 2, "attention_types": odd}) == {"num_layers": 5, "attention_types": odd}
    assert layered({"num_layers": 2, "attention_types": [[["a"], 1 << 60]]})["num_layers"] == 5


def test_fields_that_list_numbers_of_layers_are_named() -> None:
    text = {"num_hidden_layers": 2, "mlp_only_layers": [1], "full_attn_idxs": [0, 1], "no_rope_layers": [1, 0]}
    none = {"moe_layers": [], "layer_types": ["a", "b"], "eos_token_id": [1], "drop_layers": [True], "keep_layers": 2}
    config = {"text_config": text | none, "vision_config": {"num_hidden_layers": 4, "out_layers": [1]}}
    assert numbered_layers(config, 2) == ["text_config.mlp_only_layers", "text_config.full_attn_idxs"]
    assert numbered_layers(config["text_config"] | {"no_rope_layers": [1]}, 2)[-1] == "no_rope_layers"
    assert not numbered_layers({}, 2)


def test_whether_a_config_counts_the_stored_layers() -> None:
    config = {"text_config": {"n_layers": 3}, "num_layers": True}
    assert [counts_layers(config, stored) for stored in (1, 2, 3)] == [False, False, True]


def test_every_size_of_a_vocabulary_is_repaired() -> None:
    config = {"vocab_size": 9, "decoder_vocab_size": 9, "d_model": 9, "text": {"vocab_size": 8, "out_vocab_size": 9}}
    assert json.loads(repaired(config, with_vocabulary(9, 11))) == {
        "vocab_size": 11,
        "decoder_vocab_size": 11,
        "d_model": 9,
        "text": {"vocab_size": 8, "out_vocab_size": 11},
    }
