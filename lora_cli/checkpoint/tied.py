"""Recognising tensors that a model uses twice though its checkpoint stores them once: embedding and output head."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lora_cli.checkpoint.checkpoint import Checkpoint

EMBEDDINGS = {"embed_tokens", "wte", "word_embeddings", "shared", "embed_in", "tok_embeddings"}
HEADS = {"lm_head", "embed_out", "decoder"}
TABLES = EMBEDDINGS | HEADS
"""Modules with a row for each entry of the vocabulary, as they are mostly called."""
_WITH_HEAD = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM", "ForPreTraining")


def tie_of(checkpoint: Checkpoint, key: str, keys: Iterable[str]) -> str | None:
    """Say what else the model uses `key` for, where the checkpoint stores the pair only once; None for other tensors.

    Args:
        checkpoint: The base.
        key: A tensor that an adapter changes, replaces or adds.
        keys: All keys of the base.
    """
    module, _, parameter = key.rpartition(".")
    role = module.rpartition(".")[2]
    if parameter != "weight" or role not in TABLES or not may_tie(checkpoint.config):
        return None
    partners = HEADS if role in EMBEDDINGS else EMBEDDINGS
    modules = {other.rpartition(".")[0].rpartition(".")[2] for other in keys if other.endswith(".weight")}
    stored_twice = bool(modules & partners) and role in modules
    return None if stored_twice else f"{'head' if role in EMBEDDINGS else 'embedding'} and {role} are one tensor"


def may_tie(config: Mapping[str, Any]) -> bool:
    """Whether the config ties the pair, or says nothing of a model that has a head, which then is tied by default."""
    levels = [config, *(level for level in config.values() if isinstance(level, dict))]
    said = [level["tie_word_embeddings"] for level in levels if "tie_word_embeddings" in level]
    if said:
        return any(said)
    architectures = config.get("architectures")
    return isinstance(architectures, list) and str(next(iter(architectures), "")).endswith(_WITH_HEAD)
