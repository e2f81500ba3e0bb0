"""Make a small Llama-shaped checkpoint (two shards, bf16) and a PEFT adapter for it, the same on every machine.

Usage: python scripts/make_demo.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

HIDDEN, INNER, LAYERS, VOCABULARY, HEADS, RANK, ALPHA = 256, 688, 2, 1024, 4, 8, 16


def main(folder: Path) -> None:
    """Write `base/` and `adapter/` into the folder."""
    numbers = np.random.Generator(np.random.Philox(20))
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir(parents=True)
    adapter.mkdir()
    write_base(base, numbers)
    write_adapter(adapter, numbers)


def matrix(numbers: np.random.Generator, rows: int, columns: int, spread: float) -> torch.Tensor:
    """Bell-shaped numbers by adding uniform ones, which needs no library function that differs between machines."""
    total = numbers.random((rows, columns, 4), dtype=np.float32).sum(axis=2) - np.float32(2)
    return torch.from_numpy(total * np.float32(spread * 3**0.5))


def linears() -> dict[str, tuple[int, int]]:
    """The linear layers of a block: name → (out, in)."""
    attention = {f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"}
    return {
        **attention,
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }


def write_base(folder: Path, numbers: np.random.Generator) -> None:
    """Write config, two shards and their index."""
    shards: list[dict[str, torch.Tensor]] = [{}, {}]
    shards[0]["model.embed_tokens.weight"] = matrix(numbers, VOCABULARY, HIDDEN, 0.02)
    for layer in range(LAYERS):
        shard = shards[layer * len(shards) // LAYERS]
        for name, (out, inner) in linears().items():
            shard[f"model.layers.{layer}.{name}.weight"] = matrix(numbers, out, inner, 0.03)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shard[f"model.layers.{layer}.{name}.weight"] = torch.ones(HIDDEN)
    shards[1]["model.norm.weight"] = torch.ones(HIDDEN)
    shards[1]["lm_head.weight"] = matrix(numbers, VOCABULARY, HIDDEN, 0.02)
    weight_map, total = {}, 0
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {key: tensor.to(torch.bfloat16) for key, tensor in shard.items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        total += sum(tensor.numel() * 2 for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "dtype": "bfloat16",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "max_position_embeddings": 512,
        "model_type": "llama",
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": HEADS,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": False,
        "vocab_size": VOCABULARY,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_adapter(folder: Path, numbers: np.random.Generator) -> None:
    """Write a PEFT adapter on all linear layers, its B factors as far from zero as training leaves them."""
    tensors = {}
    for layer in range(LAYERS):
        for name, (out, inner) in linears().items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{key}.lora_A.weight"] = matrix(numbers, RANK, inner, inner**-0.5)
            tensors[f"{key}.lora_B.weight"] = matrix(numbers, out, RANK, 0.005)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "base_model_name_or_path": None,
        "bias": "none",
        "lora_alpha": ALPHA,
        "peft_type": "LORA",
        "r": RANK,
        "target_modules": sorted(name.rpartition(".")[2] for name in linears()),
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
