"""What embeddings and output heads are called, which many models hold as one tensor, and whether a config says so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

EMBEDDINGS = {"embed_tokens", "wte", "word_embeddings", "shared", "embed_in", "tok_embeddings"}
HEADS = {"lm_head", "embed_out", "decoder"}
TABLES = EMBEDDINGS | HEADS
"""Modules with a row for each entry of the vocabulary, as they are mostly called."""
_WITH_HEAD = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM", "ForPreTraining")


def may_tie(config: Mapping[str, Any]) -> bool:
    """Whether the config ties the pair, or says nothing of a model that has a head, which then is tied by default."""
    levels = [config, *(level for level in config.values() if isinstance(level, dict))]
    said = [level["tie_word_embeddings"] for level in levels if "tie_word_embeddings" in level]
    if said:
        return any(said)
    architectures = config.get("architectures")
    return isinstance(architectures, list) and str(next(iter(architectures), "")).endswith(_WITH_HEAD)
