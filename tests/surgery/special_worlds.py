"""Merges that are more than sums on whole tensors: lengths, parts of tensors, rows, ties, sizes, layers, inits.

Small, awkward in shape, and made of numbers alone. `WORLDS` names them; each can be made in any type and in any number
of shards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from round_trips import gaussian, lora, write_adapter, write_base

from lora_cli.adapters.source import ReadOptions
from lora_cli.surgery.placing import PlanOptions

Tensors = dict[str, torch.Tensor]

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 33}
TIED = LLAMA | {"tie_word_embeddings": True}


@dataclass(frozen=True)
class World:
    """Inputs of a merge.

    Attributes:
        base: The checkpoint.
        adapters: What is merged.
        options: How.
        befores: Adapters as they were before training, which unmerging needs too.
        on_top: An adapter that fits what comes out, where these do not fit it once more.
    """

    base: Path
    adapters: list[Path]
    options: PlanOptions = field(default_factory=PlanOptions)
    befores: tuple[Path, ...] = ()
    on_top: tuple[Path, ...] = ()

    @property
    def given(self) -> list[Path]:
        """What unmerging needs."""
        return [*self.adapters, *self.befores]


Build = Callable[[Path, torch.dtype, int], World]


def table(seed: int, module: str, entries: int, dim: int, std: float = 0.1) -> Tensors:
    """Factors of an embedding."""
    a, b = f"{module}.lora_embedding_A", f"{module}.lora_embedding_B"
    return {a: gaussian(seed, 4, entries), b: gaussian(seed + 1, dim, 4, std=std / 2)}


def kernel(seed: int, module: str, *shape: int, std: float = 0.1) -> Tensors:
    """Factors of a convolution."""
    a, b = gaussian(seed, 4, *shape[1:]), gaussian(seed + 1, shape[0], 4, *(1 for _ in shape[2:]), std=std / 2)
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}


def lengths(seed: int, module: str, outputs: int, near: float, *shape: int) -> Tensors:
    """Magnitudes of DoRA: mostly near those of rows of this length, one of them negative, one zero, one large."""
    found = near * (1 + gaussian(seed, outputs, std=0.05))
    found[:3] = torch.tensor([-near, 0.0, 3 * near])
    return {f"{module}.lora_magnitude_vector": found.view(shape or (outputs,))}


# Worlds


def dora(folder: Path, dtype: torch.dtype, shards: int) -> World:
    """Lengths of outputs that are rows, columns and kernels; beside them a plain adapter on what is left."""
    shapes = {"x": (37, 45), "h.0.attn.c_attn": (25, 37), "emb": (131, 9), "conv": (6, 3, 2, 2)}
    shapes |= {"wide": (3, 803), "y": (40, 20), "h.1.attn.c_attn": (2, 301)}
    tensors: dict[str, Any] = {
        f"{key}.weight": gaussian(n, *shape, dtype=dtype) for n, (key, shape) in enumerate(shapes.items())
    }
    tensors |= {"x.bias": gaussian(8, 37, dtype=dtype), "ids": ("I16", [5], bytes(range(10)))}
    factors = lora(100, "x", 37, 45) | lora(110, "h.0.attn.c_attn", 37, 25) | lora(115, "wide", 3, 803)
    factors |= lora(117, "h.1.attn.c_attn", 301, 2)
    factors |= table(120, "emb", 131, 9) | kernel(130, "conv", 6, 3, 2, 2)
    factors |= {"x.lora_B.bias": gaussian(11, 37)}
    sizes = {"x": (37, 45), "h.0.attn.c_attn": (37, 25), "wide": (3, 803), "h.1.attn.c_attn": (301, 2)}
    for at, (module, (outputs, inputs)) in enumerate(sizes.items(), 140):
        factors |= lengths(at, module, outputs, inputs**0.5)
    factors |= lengths(150, "emb", 9, 131**0.5, 1, 9) | lengths(151, "conv", 6, 12**0.5, 1, 6, 1, 1)
    base = write_base(folder / "base", tensors, shards, model_type="gpt2")
    one = write_adapter(folder / "one", factors, use_dora=True, lora_bias=True)
    two = write_adapter(folder / "two", lora(160, "y", 40, 20), r=4)
    return World(base, [one, two], PlanOptions(weights=(1.0, 0.7)))


def fused(folder: Path, dtype: torch.dtype, shards: int) -> World:
    """A query, a key and a value that are stored as one: changed by one adapter, by two, by none, by its own name."""
    tensors: Tensors = {}
    for layer in range(3):
        stored = f"encoder.layers.{layer}.attn"
        tensors |= {f"{stored}.Wqkv.weight": gaussian(layer, 36, 14, dtype=dtype)}
        tensors |= {f"{stored}.Wqkv.bias": gaussian(10 + layer, 36, dtype=dtype)}
        tensors |= {f"{stored}.out_proj.weight": gaussian(20 + layer, 14, 12, dtype=dtype)}
    parts = {name: f"layers.{{}}.self_attn.{name}_proj" for name in "qkv"}
    one: Tensors = {}
    for at, (layer, names) in enumerate({0: "qkv", 1: "qv", 2: "k"}.items()):
        for name in names:
            one |= lora(100 + 20 * at + 2 * ord(name), parts[name].format(layer), 12, 14)
    one |= {"layers.0.self_attn.q_proj.lora_B.bias": gaussian(5, 12)} | lora(1, "layers.1.self_attn.o_proj", 14, 12)
    two = lora(200, parts["q"].format(0), 12, 14) | lora(210, parts["k"].format(1), 12, 14)
    lengthened = lora(300, parts["v"].format(2), 12, 14) | lengths(310, parts["v"].format(2), 12, 14**0.5)
    base = write_base(folder / "base", tensors, shards, architectures=["NomicBertModel"], model_type="nomic_bert")
    adapters = [
        write_adapter(folder / "one", one, lora_bias=True),
        write_adapter(folder / "two", two),
        write_adapter(folder / "three", lengthened, use_dora=True),
        write_adapter(folder / "four", lora(400, "encoder.layers.0.attn.Wqkv", 36, 14)),
    ]
    return World(base, adapters, PlanOptions(weights=(1.0, -0.6, 1.0, 1.7)))


def rotary(folder: Path, dtype: torch.dtype, shards: int) -> World:
    """Rows of a fused tensor in another order than the module has them."""
    kind = {"architectures": ["GradiumPhononTTSForConditionalGeneration"], "model_type": "gradium_phonon_tts"}
    stored, name = "flow_lm.transformer.layers.0.self_attn.in_proj.weight", "model.layers.0.self_attn"
    tensors = {stored: gaussian(1, 48, 10, dtype=dtype), "flow_lm.out_norm.weight": gaussian(2, 10, dtype=dtype)}
    tensors["flow_lm.emb_mean"] = gaussian(3, 7, dtype=dtype)
    factors = lora(10, f"{name}.q_proj", 16, 10) | lora(20, f"{name}.v_proj", 16, 10)
    more = lora(30, f"{name}.k_proj", 16, 10) | lengths(40, f"{name}.k_proj", 16, 10**0.5)
    base = write_base(folder / "base", tensors, shards, num_attention_heads=4, **kind)
    one, two = write_adapter(folder / "one", factors), write_adapter(folder / "two", more, use_dora=True)
    return World(base, [one, two])


def parts(folder: Path, dtype: torch.dtype, shards: int) -> World:
    """A module that is stored as two tensors: a change, its lengths, and what takes the place of all of it."""
    kind = {"architectures": ["MiniMaxM3SparseForConditionalGeneration"], "model_type": "minimax_m3_vl"}
    tensors: Tensors = {}
    for layer in range(3):
        for at, name in enumerate(("gate", "up")):
            key = f"language_model.model.layers.{layer}.mlp.{name}_proj.weight"
            tensors[key] = gaussian(10 * layer + at, 21, 10, dtype=dtype)
    name = "model.language_model.layers.{}.mlp.gate_up_proj"
    factors = lora(50, name.format(0), 42, 10) | lengths(60, name.format(0), 42, 10**0.5)
    plain = lora(70, name.format(1), 42, 10) | {f"{name.format(2)}.weight": gaussian(80, 42, 10)}
    base = write_base(folder / "base", tensors, shards, **kind)
    one = write_adapter(folder / "one", factors, use_dora=True)
    two = write_adapter(folder / "two", plain, modules_to_save=["layers.2.mlp.gate_up_proj"])
    return World(base, [one, two])


def llama(dtype: torch.dtype, *, head: bool, layers: int = 3) -> Tensors:
    """A language model without the parts that nobody adapts."""
    tensors = {"model.embed_tokens.weight": gaussian(1, 33, 12, dtype=dtype)}
    for layer in range(layers):
        tensors[f"model.layers.{layer}.self_attn.q_proj.weight"] = gaussian(10 + layer, 16, 12, dtype=dtype)
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = gaussian(20 + layer, 12, dtype=dtype)
    tensors["model.norm.weight"] = gaussian(2, 12, dtype=dtype)
    return tensors | ({"lm_head.weight": gaussian(3, 33, 12, dtype=dtype)} if head else {})


def queries(seed: int, *layers: int) -> Tensors:
    found: Tensors = {}
    for layer in layers:
        found |= lora(seed + 2 * layer, f"model.layers.{layer}.self_attn.q_proj", 16, 12)
    return found


def rows(folder: Path, dtype: torch.dtype, shards: int) -> World:
    """Tokens that were trained: on a table to which the same adapter adds, beside a head that another one changes."""
    base = write_base(folder / "base", llama(dtype, head=True), shards, **LLAMA)
    held = {"model.embed_tokens.token_adapter.trainable_tokens_delta": gaussian(30, 3, 12)}
    held = held | queries(40, 1) | table(50, "model.embed_tokens", 33, 12)
    one = write_adapter(folder / "one", held, trainable_token_indices={"embed_tokens": [32, 0, 7]}, bias="none")
    two = write_adapter(folder / "two", lora(60, "lm_head", 33, 12))
    return World(base, [one, two], PlanOptions(weights=(1.0, 0.7)))


def untied(folder: Path, dtype: torch.dtype, shards: int) -> World:
    """One tensor of two names, of which an adapter changes one."""
    base = write_base(folder / "base", llama(dtype, head=False), shards, **TIED)
    return World(base, [write_adapter(folder / "one", lora(30, "lm_head", 33, 12) | queries(40, 0))])


def lengthened_head(folder: Path, dtype: torch.dtype, shards: int) -> World:
    """One tensor of two names, which two adapters change in two ways, one of them with lengths."""
    base = write_base(folder / "base", llama(dtype, head=False), shards, **TIED)
    head = lora(30, "lm_head", 33, 12) | lengths(40, "lm_head", 33, 12**0.5)
    one = write_adapter(folder / "one", head, use_dora=True)
    return World(base, [one, write_adapter(folder / "two", table(50, "model.embed_tokens", 33, 12))])


def as_one(folder: Path, dtype: torch.dtype, shards: int) -> World:
    """One tensor of two names, which stays one."""
    base = write_base(folder / "base", llama(dtype, head=False), shards, **TIED)
    change = table(50, "model.embed_tokens", 33, 12)
    return World(base, [write_adapter(folder / "one", change, ensure_weight_tying=True)])


def resized(folder: Path, dtype: torch.dtype, shards: int) -> World:
    """A vocabulary that was made longer, and a change on top of it."""
    base = write_base(folder / "base", llama(dtype, head=True), shards, **LLAMA)
    held = {"model.embed_tokens.weight": gaussian(30, 40, 12), "lm_head.weight": gaussian(31, 40, 12)}
    one = write_adapter(folder / "one", held | queries(40, 2), modules_to_save=["embed_tokens", "lm_head"])
    return World(base, [one, write_adapter(folder / "two", lora(50, "lm_head", 40, 12))])


def repeated(folder: Path, dtype: torch.dtype, shards: int) -> World:
    """Layers 0, 0, 2, 1, 2 of three: all of them have changes of their own, but one; so that names change places."""
    base = write_base(folder / "base", llama(dtype, head=True), shards, num_hidden_layers=3, **LLAMA)
    runs = {"layer_replication": [[0, 1], [0, 1], [2, 3], [1, 3]]}
    one = write_adapter(folder / "one", queries(40, 0, 1, 2, 3), **runs)
    name = "model.layers.4.self_attn.q_proj"
    two = lora(60, name, 16, 12) | lengths(70, name, 16, 12**0.5)
    return World(base, [one, write_adapter(folder / "two", two, use_dora=True, **runs)])


def shortened(folder: Path, dtype: torch.dtype, shards: int) -> World:
    """Layers 0 and 2 of three; one goes."""
    base = write_base(folder / "base", llama(dtype, head=True), shards, num_hidden_layers=3, **LLAMA)
    one = write_adapter(folder / "one", queries(40, 1), layer_replication=[[0, 1], [2, 3]])
    return World(base, [one], on_top=(write_adapter(folder / "two", queries(60, 0, 1)),))


def initial(folder: Path, dtype: torch.dtype, shards: int) -> World:
    """An adapter whose first factors were taken off its base."""
    base = write_base(folder / "base", llama(dtype, head=True), shards, **LLAMA)
    one = write_adapter(folder / "one", queries(40, 0, 2), init_lora_weights="pissa")
    before = write_adapter(folder / "before", queries(50, 0, 2), init_lora_weights="pissa")
    read = ReadOptions(initial=(str(before),))
    return World(base, [one], PlanOptions(weights=(0.7,), read=read), (before,))


WORLDS: Mapping[str, Build] = {
    "dora": dora,
    "fused": fused,
    "rotary": rotary,
    "parts": parts,
    "rows": rows,
    "untied": untied,
    "lengthened head": lengthened_head,
    "as one": as_one,
    "resized": resized,
    "repeated": repeated,
    "shortened": shortened,
    "initial": initial,
}
