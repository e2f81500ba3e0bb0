"""What a model's config.json has to say otherwise when its tensors change: types, ties, sizes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_SCALED_IF_TIED = {"t5", "mt5", "umt5", "longt5", "pop2piano", "switch_transformers", "udop"}
"""T5 reads off the flag whether its decoder scales what it gives; two tensors that differ are not tied in any case."""

Repair = Callable[[dict[str, Any]], dict[str, Any]]
"""Takes one level of a config and returns what is to stand there; inner levels are repaired before it."""

_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_OF_EACH = re.compile(
    r"(?!mtp_)(.*layer_types|.*layers_block_type|.*_per_layer|no_rope_layers|layer_rope_theta|attention_layers"
    r"|attn_layers|attention_window|block_configs|moe_layer_freq|hybrid_layer_pattern|intermediate_size"
    r"|activation_sparsity_pattern)"
)
"""Fields that models of transformers have with an entry for each layer; those of `mtp_` are of layers behind them."""

_NUMBERS = re.compile(r"layers|idx|layer_i[dn]")
_IN_SHORT = "attention_types"


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
    if str(level.get("model_type")) in _SCALED_IF_TIED:
        return level
    # The default differs from model to model, so it stands wherever there is a vocabulary, and on top of all.
    speaks = {"tie_word_embeddings", "vocab_size", "architectures"} & level.keys()
    return level | {"tie_word_embeddings": False} if speaks else level


def with_vocabulary(before: int, after: int) -> Repair:
    """Say that the vocabulary has more or fewer entries: `vocab_size`, and such as Marian's `decoder_vocab_size`."""

    def repair(level: dict[str, Any]) -> dict[str, Any]:
        return level | {name: after for name, said in level.items() if name.endswith("vocab_size") and said == before}

    return repair


def with_layers(layers: tuple[int, ...], stored: int) -> Repair:
    """Say which of its layers a model has now, one after the other; levels of a config for other models are left.

    Args:
        layers: The former layer of each layer.
        stored: How many layers there were.
    """

    def repair(level: dict[str, Any]) -> dict[str, Any]:
        counts = _counts(level, stored)
        if not counts:
            return level
        level = level | {name: [level[name][at] for at in layers] for name in level if _of_each(name, level, stored)}
        if (kinds := _expanded(level.get(_IN_SHORT), stored)) is not None:
            level[_IN_SHORT] = [[[kinds[at] for at in layers], 1]]
        return level | dict.fromkeys(counts, len(layers))

    return repair


def counts_layers(config: Mapping[str, Any], stored: int) -> bool:
    """Whether a level of a config says that there are so many layers."""
    return any(_counts(level, stored) for _, level in _levels(config))


def numbered_layers(config: Mapping[str, Any], stored: int) -> list[str]:
    """The fields that list numbers of layers, which are others where layers repeat, and which `with_layers` leaves.

    Args:
        config: The config before it.
        stored: How many layers there are; other levels are not looked at.

    Returns:
        Names with those of their levels: `text_config.mlp_only_layers`.
    """
    return [
        f"{prefix}{name}"
        for prefix, level in _levels(config)
        if _counts(level, stored)
        for name, said in level.items()
        if _NUMBERS.search(name) and _are_numbers(said) and not _of_each(name, level, stored)
    ]


def _levels(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield prefix, config
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _levels(value, f"{prefix}{name}.")


def _counts(level: Mapping[str, Any], stored: int) -> list[str]:
    """The fields that say that there are so many layers."""
    return [name for name in _LAYER_COUNTS if type(level.get(name)) is int and level[name] == stored]


def _of_each(name: str, level: Mapping[str, Any], stored: int) -> bool:
    """Whether a field says something of each layer."""
    said = level[name]
    return _OF_EACH.fullmatch(name) is not None and isinstance(said, list) and len(said) == stored


def _are_numbers(said: object) -> bool:
    return isinstance(said, list) and bool(said) and all(type(number) is int for number in said)


def _expanded(said: object, stored: int) -> list[Any] | None:
    """The kind of each layer that GPT-Neo's `[[[kind, …], times], …]` means, if it means so many."""
    kinds: list[Any] = []
    for run in said if isinstance(said, list) else ():
        match run:
            case [list(names), int(times)] if 0 <= times * len(names) <= stored:
                kinds += names * times
            case _:
                return None
    return kinds if len(kinds) == stored else None
