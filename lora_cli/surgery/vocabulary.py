"""Tensors that have a row for each token, and what becomes of them where the vocabulary has other entries now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lora_cli.checkpoint.tied import TABLES

_MORE = {"proj_out", "predictions", "vocab_projector", "generator_lm_head", "final_logits_bias"}
"""What heads and their biases are called besides, in models that transformers has."""


def is_vocabulary(key: str) -> bool:
    """Whether a tensor has a row for each token, by what its module, or itself, is called."""
    module, _, parameter = key.rpartition(".")
    return not (TABLES | _MORE).isdisjoint((module.rpartition(".")[2], parameter))


def vocabulary_hint(rows: int, key: str, shape: tuple[int, ...]) -> str:
    """Words for a table that has another number of rows than an adapter's."""
    if not is_vocabulary(key) or not shape:
        return ""
    return (
        f"; the vocabulary differs ({rows} rows in the adapter, {shape[0]} in the base): take the base that the "
        "adapter was trained on"
    )


def may_resize(key: str, before: int, after: int, config: Mapping[str, Any]) -> bool:
    """Whether a tensor may get another number of rows: a table of as many as the config says that there are tokens."""
    sizes = set(_sizes(config))
    return after > 0 and is_vocabulary(key) and (not sizes or before in sizes)


def _sizes(config: Mapping[str, Any]) -> Iterator[int]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _sizes(value)
        elif name.endswith("vocab_size") and isinstance(value, int):
            yield value


def other_sizes(resized: Mapping[str, tuple[int, int]], shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """Say where a vocabulary would be of two sizes: tables, heads and their biases have to be resized together.

    Args:
        resized: Key → how many rows it had, and has.
        shapes: Every tensor's shape as it will be.
    """
    for before in dict.fromkeys(before for before, _ in resized.values()):
        after = {new for old, new in resized.values() if old == before}
        left = [key for key, shape in shapes.items() if before in shape and is_vocabulary(key)]
        if left or len(after) > 1:
            sizes = ", ".join(map(str, sorted(after)))
            words = f"{', '.join(resized)}: {sizes} rows in the adapter, and {', '.join(left)} has {before}"
            yield f"{words}; the vocabulary would be of two sizes"
