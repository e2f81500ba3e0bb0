"""Which tensors the checkpoints of the benchmark have: the shapes of Llama 3.2 1B, in any size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

VOCABULARY, HIDDEN, HEAD = 128256, 2048, 64

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Model:
    """What a checkpoint consists of.

    Attributes:
        tensors: Name → shape, in the order of the file.
        config: What stands in `config.json`; None if no model class has these tensors.
    """

    tensors: dict[str, Shape]
    config: dict[str, Any] | None

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return 2 * sum(math.prod(shape) for shape in self.tensors.values())

    def factors(self, rank: int) -> dict[str, Shape]:
        """Name → shape of the factors of an adapter on all projections."""
        found: dict[str, Shape] = {}
        for name, shape in self.tensors.items():
            if name.endswith("_proj.weight"):
                module = f"base_model.model.{name.removesuffix('.weight')}"
                found[f"{module}.lora_A.weight"] = (rank, shape[1])
                found[f"{module}.lora_B.weight"] = (shape[0], rank)
        return found


def llama(gigabytes: float, vocabulary: int | None = None) -> Model:
    """Choose a Llama of about this size: 2.5 GB are Llama 3.2 1B itself, other sizes have more layers or fewer.

    Small ones have a smaller vocabulary, so that it does not take more than a quarter, and the smallest are narrower.
    """
    size = gigabytes * 1e9
    hidden = HIDDEN
    while hidden > HEAD and 2 * elements(layer_shapes(hidden, 0)) > size / 2:
        hidden //= 2
    if vocabulary is None:
        vocabulary = min(VOCABULARY, max(64, int(size / 4 / (2 * hidden)) // 64 * 64))
    layers = max(1, round((size / 2 - vocabulary * hidden) / elements(layer_shapes(hidden, 0))))
    tensors: dict[str, Shape] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        tensors |= layer_shapes(hidden, layer)
    tensors["model.norm.weight"] = (hidden,)
    return Model(tensors, llama_config(hidden, layers, vocabulary))


def elements(shapes: dict[str, Shape]) -> int:
    """How many numbers these tensors have together."""
    return sum(math.prod(shape) for shape in shapes.values())


def layer_shapes(hidden: int, layer: int) -> dict[str, Shape]:
    """Name → shape of one layer."""
    inner, keys = 4 * hidden, max(HEAD, hidden // 4)
    shapes: dict[str, Shape] = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    return {f"model.layers.{layer}.{name}.weight": shape for name, shape in shapes.items()}


def llama_config(hidden: int, layers: int, vocabulary: int) -> dict[str, Any]:
    """What `config.json` says of such a model."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 0,
        "eos_token_id": 1,
        "head_dim": HEAD,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "max_position_embeddings": 131072,
        "model_type": "llama",
        "num_attention_heads": hidden // HEAD,
        "num_hidden_layers": layers,
        "num_key_value_heads": max(1, hidden // HEAD // 4),
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": vocabulary,
    }


def one_tensor(gigabytes: float) -> Model:
    """Choose a checkpoint of a single matrix of about this size."""
    columns = 4 * HIDDEN
    return Model({"model.layers.0.mlp.down_proj.weight": (max(1, round(gigabytes * 1e9 / 2 / columns)), columns)}, None)
