"""A small base and an adapter for it, of each kind that does more than add to whole tensors; made with numpy alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from tiny import (
    CONFIG,
    LAYERS,
    MODULES,
    PREFIX,
    RANK,
    WIDTH,
    Array,
    adapter_tensors,
    base_tensors,
    factors,
    numbers,
    write_base,
)
from tiny import write_adapter as write

VOCABULARY: Final = 20
TABLE: Final = "model.embed_tokens.weight"
HEAD: Final = "lm_head.weight"
LLAMA: Final = CONFIG | {"vocab_size": VOCABULARY, "num_hidden_layers": LAYERS, "tie_word_embeddings": False}
TIED: Final = LLAMA | {"tie_word_embeddings": True}
FUSED: Final = {"architectures": ["HrmTextForCausalLM"], "model_type": "hrm_text"}
"""A model whose gate and up projections are stored as one tensor, the gate's outputs first."""


@dataclass(frozen=True)
class World:
    """A base and an adapter.

    Attributes:
        base: A folder.
        adapter: A PEFT folder.
        initial: The adapter as it was before training, where its init changed the base.
    """

    base: Path
    adapter: Path
    initial: Path | None = None

    @property
    def flags(self) -> list[str]:
        """What a merge has to be told besides."""
        return ["--initial", str(self.initial)] if self.initial else []


def untied_base(folder: Path, **config: Any) -> Path:
    return write_base(folder / "base", config=LLAMA | config)


def tied_base(folder: Path) -> Path:
    tensors = {key: tensor for key, tensor in base_tensors().items() if key != HEAD}
    return write_base(folder / "base", tensors, config=TIED)


def table_factors(module: str = "model.embed_tokens", entries: int = VOCABULARY) -> dict[str, Array]:
    a, b = f"{PREFIX}{module}.lora_embedding_A", f"{PREFIX}{module}.lora_embedding_B"
    return {a: numbers(RANK, entries, seed=70), b: numbers(WIDTH, RANK, seed=71)}


def tokens(count: int, module: str = "model.embed_tokens") -> dict[str, Array]:
    return {f"{PREFIX}{module}.token_adapter.trainable_tokens_delta": numbers(count, WIDTH, seed=72)}


def lengths(tensors: Mapping[str, Array]) -> dict[str, Array]:
    """Magnitudes for every pair of factors."""
    return {
        key.replace("lora_B.weight", "lora_magnitude_vector"): np.abs(numbers(len(b), seed=at)) + 1
        for at, (key, b) in enumerate(tensors.items())
        if "lora_B" in key
    }


def plain(folder: Path) -> World:
    return World(untied_base(folder), write(folder / "adapter"))


def dora(folder: Path) -> World:
    made = adapter_tensors()
    return World(untied_base(folder), write(folder / "adapter", made | lengths(made), use_dora=True))


def trained_tokens(folder: Path) -> World:
    made = adapter_tensors() | tokens(3)
    return World(untied_base(folder), write(folder / "adapter", made, trainable_token_indices=[3, 1, 19]))


def untied(folder: Path) -> World:
    """An embedding is changed that is the head too, which stays as it was."""
    return World(tied_base(folder), write(folder / "adapter", table_factors()))


def as_one(folder: Path) -> World:
    """Embedding and head are one tensor and stay one: the head's factors are the embedding's, turned and exchanged."""
    a, b = table_factors().values()
    head = {f"{PREFIX}lm_head.lora_A.weight": b.T.copy(), f"{PREFIX}lm_head.lora_B.weight": a.T.copy()}
    return World(tied_base(folder), write(folder / "adapter", table_factors() | head, ensure_weight_tying=True))


def resized(folder: Path) -> World:
    """Tables with three more rows, stored whole; the first rows are the base's own."""
    tables = {
        f"{PREFIX}{key}": np.concatenate([base_tensors()[key], numbers(3, WIDTH, seed=at)])
        for at, key in enumerate((TABLE, HEAD), 80)
    }
    return World(untied_base(folder), write(folder / "adapter", adapter_tensors() | tables))


def repeated(folder: Path) -> World:
    """Layers 0, 1, 0, 1 of a model of two, with factors for the last one."""
    made = factors({"model.layers.3.mlp.up_proj": (16, WIDTH)})
    return World(untied_base(folder), write(folder / "adapter", made, layer_replication=[[0, 2], [0, 2]]))


def parts(folder: Path) -> World:
    """A layer that is the second half of a stored tensor."""
    tensors = {f"model.layers.{layer}.mlp.gate_up_proj.weight": numbers(24, WIDTH, seed=layer) for layer in range(2)}
    base = write_base(folder / "base", tensors | {TABLE: numbers(VOCABULARY, WIDTH)}, shards=1, config=FUSED)
    return World(base, write(folder / "adapter", factors({"model.layers.1.mlp.up_proj": (12, WIDTH)})))


def taken(folder: Path) -> World:
    """An init that took its first factors off the base."""
    first = {key: tensor[::-1].copy() for key, tensor in adapter_tensors().items()}
    trained = write(folder / "adapter", init_lora_weights="pissa")
    return World(untied_base(folder), trained, write(folder / "begun", first, init_lora_weights=True))


def blocks(folder: Path) -> World:
    """A factor of which only blocks on the diagonal are stored."""
    made = factors(dict.fromkeys(MODULES[::2], (12, WIDTH)) | dict.fromkeys(MODULES[1::2], (16, WIDTH)))
    for module in MODULES[::2]:
        key = f"{PREFIX}{module}.lora_A.weight"
        made[key] = np.ascontiguousarray(made[key][:, : WIDTH // 2])
    said = {"target_modules_bd_a": ["q_proj"], "target_modules_bd_b": [], "nblocks": 2, "match_strict": False}
    return World(untied_base(folder), write(folder / "adapter", made, use_bdlora=said))


WORLDS: Final[Mapping[str, Callable[[Path], World]]] = {
    function.__name__: function
    for function in (plain, dora, trained_tokens, untied, as_one, resized, repeated, parts, taken, blocks)
}
"""Every kind by its name."""

REFUSED: Final[Mapping[str, Mapping[str, Any]]] = {
    "alora_invocation_tokens": {"alora_invocation_tokens": [3, 4]},
    "arrow_config": {"arrow_config": {"top_k": 2}},
    "use_qalora": {"use_qalora": True},
    "kasa_config": {"kasa_config": {"beta": 0.1}},
    "LoftQ": {"init_lora_weights": "loftq"},
    "not_known": {"not_known": 1},
}
"""Fields of a config that no merge does, by a word of the reason."""
