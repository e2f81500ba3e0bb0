"""What a model's config.json has to say otherwise when its tensors change: types, ties, sizes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

_SCALED_IF_TIED = {"t5", "mt5", "umt5", "longt5", "pop2piano", "switch_transformers", "udop"}
"""T5 reads off the flag whether its decoder scales what it gives; two tensors that differ are not tied in any case."""

Repair = Callable[[dict[str, Any]], dict[str, Any]]
"""Takes one level of a config and returns what is to stand there; inner levels are repaired before it."""

_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


def repaired(config: Mapping[str, Any], *repairs: Repair) -> bytes:
    """Return the bytes of a config after repairs at each of its levels, the text model's among them."""
    for repair in repairs:
        config = _at_each_level(dict(config), repair)
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _at_each_level(config: dict[str, Any], repair: Repair) -> dict[str, Any]:
    return repair(
        {name: _at_each_level(value, repair) if isinstance(value, dict) else value for name, value in config.items()}
    )


def with_dtype(torch_name: str) -> Repair:
    """Say that weights are of another type."""

    def repair(level: dict[str, Any]) -> dict[str, Any]:
        said = {name for name in ("dtype", "torch_dtype") if isinstance(level.get(name), str)}
        return level | dict.fromkeys(said, torch_name)

    return repair


def untied(level: dict[str, Any]) -> dict[str, Any]:
    """Say that embedding and head are two tensors."""
    if level.get("model_type") in _SCALED_IF_TIED:
        return level
    # The default differs from model to model, so it stands wherever there is a vocabulary, and on top of all.
    speaks = {"tie_word_embeddings", "vocab_size", "architectures"} & level.keys()
    return level | {"tie_word_embeddings": False} if speaks else level


def with_vocabulary(before: int, after: int) -> Repair:
    """Say that the vocabulary has more or fewer entries."""

    def repair(level: dict[str, Any]) -> dict[str, Any]:
        return level | {"vocab_size": after} if level.get("vocab_size") == before else level

    return repair


def with_layers(layers: tuple[int, ...]) -> Repair:
    """Say which of its layers a model has now, one after the other.

    Args:
        layers: The former layer of each layer.
    """

    def repair(level: dict[str, Any]) -> dict[str, Any]:
        counts = {name: level[name] for name in _LAYER_COUNTS if isinstance(level.get(name), int)}
        if not counts or max(layers) >= max(counts.values()):
            return level
        before = max(counts.values())
        lists = {
            name: [value[layer] for layer in layers]
            for name, value in level.items()
            if isinstance(value, list) and len(value) == before
        }
        return level | lists | dict.fromkeys(counts, len(layers))

    return repair
