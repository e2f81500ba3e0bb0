"""Whether a PEFT file changes tied tensors as one.

With `ensure_weight_tying` PEFT ties what it adds to embedding and head, and stores it for both: factors of the head are
those of the embedding, turned and exchanged. Where it finds no tie by the names that it knows (BERT's decoder), the
config says the same, and the file holds one change: then the other tensor stays as it was, as it does in PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora_cli.adapters.adapter import Replacement, Target
from lora_cli.checkpoint.tied import TABLES


def changes_as_one(config: Mapping[str, Any], targets: Sequence[Target], wholes: Sequence[Replacement]) -> bool:
    """Whether the config ties tables, and the file holds what is done to more than one.

    Args:
        config: The config.
        targets: Deltas.
        wholes: What is held whole.
    """
    if not config.get("ensure_weight_tying"):
        return False
    tables = [target.delta for target in targets if target.delta.kind == "lora-embedding"]
    shapes = {table.shape[::-1] for table in tables}
    heads = [target.delta for target in targets if target.delta.kind == "lora" and target.delta.shape in shapes]
    if any(delta.magnitude for delta in (*tables, *heads)):
        return False  # lengths of an embedding are of its columns, those of a head of its rows
    saved = [whole for whole in wholes if not whole.of_base and _is_table(whole)]
    return len(tables) + len(heads) > 1 or len(saved) > 1


def _is_table(whole: Replacement) -> bool:
    """Whether a whole tensor is an embedding or a head, by the name of its module."""
    return not TABLES.isdisjoint(whole.name.split(".")[-2:-1])
