"""Make checkpoints and adapters of any size in little memory.

All numbers come from one block of bell-shaped ones, read in a ring from another place for every tensor: a file is
written as fast as the disk takes it, and the same on each run.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from shapes import Model, Shape, elements

BLOCK = 1 << 22
SPREAD = 0.02
"""Standard deviation of the weights."""
CHANGE = 0.015
"""Standard deviation of what an adapter adds, as a share of that of the weights."""
SCALE = 2
"""lora_alpha / r"""
SHARD = 2_500_000_000
ONES = 0x3F80
"""1.0 in bfloat16."""

Chunks = Iterator[NDArray[Any]]


def make_once(folder: Path, wanted: dict[str, Any], make: Callable[[Path], None]) -> None:
    """Make a folder, unless it is there and its stamp says that it was made with the same parameters.

    The stamp lies beside the folder: what is in a checkpoint's folder is copied and listed by whoever reads it.
    """
    stamp, making = folder.with_name(f"{folder.name}.stamp.json"), folder.with_name(f"{folder.name}.making")
    if folder.is_dir() and stamp.is_file() and json.loads(stamp.read_text("utf-8")) == wanted:
        return
    stamp.unlink(missing_ok=True)
    for old in (folder, making):
        if old.exists():
            shutil.rmtree(old)
    make(making)
    making.rename(folder)
    write_json(stamp, wanted)


class Noise:
    """Bell-shaped numbers without end, from one block of them."""

    def __init__(self, seed: int) -> None:
        self.wide = np.random.default_rng(seed).standard_normal(BLOCK, dtype=np.float32)
        bits = (self.wide * np.float32(SPREAD)).view(np.uint32)
        self.half = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)

    def ring(self, block: NDArray[Any], number: int, count: int) -> Chunks:
        """Yield `count` elements of the block for the tensor of this number; every time round starts elsewhere."""
        turn = 0
        while count:
            start = (number * 1009 + turn) * 2654435761 % BLOCK
            for piece in (block[start:], block[:start]):
                yield piece[:count]
                count -= min(count, len(piece))
            turn += 1

    def weights(self, number: int, shape: Shape) -> Chunks:
        """Yield a tensor of a checkpoint; a norm is all ones."""
        if len(shape) == 1:
            return iter([np.full(shape, ONES, np.uint16)])
        return self.ring(self.half, number, math.prod(shape))

    def factors(self, number: int, shape: Shape, spread: float) -> Chunks:
        """Yield a factor of an adapter."""
        return (piece * np.float32(spread) for piece in self.ring(self.wide, number, math.prod(shape)))


def write_base(folder: Path, model: Model, seed: int = 0, shard: int = SHARD) -> None:
    """Write a checkpoint as Hugging Face names its files: one, or shards with an index."""
    folder.mkdir(parents=True)
    noise, parts = Noise(seed), split(model.tensors, shard)
    weight_map: dict[str, str] = {}
    numbers = {key: at for at, key in enumerate(model.tensors)}
    for number, part in enumerate(parts, start=1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors" if len(parts) > 1 else "model.safetensors"
        weight_map |= dict.fromkeys(part, name)
        write_file(folder / name, part, "BF16", lambda key, shape: noise.weights(numbers[key], shape))
    if len(parts) > 1:
        index = {"metadata": {"total_size": model.bytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / "model.safetensors.index.json", index)
    if model.config:
        write_json(folder / "config.json", model.config)


def split(tensors: dict[str, Shape], limit: int) -> list[dict[str, Shape]]:
    """Cut the tensors into shards of at most `limit` bytes; a larger tensor has one of its own."""
    parts: list[dict[str, Shape]] = [{}]
    for name, shape in tensors.items():
        if parts[-1] and 2 * elements(parts[-1] | {name: shape}) > limit:
            parts.append({})
        parts[-1][name] = shape
    return parts


def write_adapter(folder: Path, model: Model, rank: int, seed: int = 0) -> None:
    """Write a PEFT adapter on all projections of a model, as strong as training makes them."""
    folder.mkdir(parents=True)
    noise, factors = Noise(seed + 1), model.factors(rank)
    numbers = {key: at for at, key in enumerate(factors)}

    def chunks(key: str, shape: Shape) -> Chunks:
        inner = factors[key.replace("lora_B", "lora_A")][1]
        strength = CHANGE * SPREAD / SCALE * (inner / rank) ** 0.5
        return noise.factors(numbers[key], shape, strength if "lora_B" in key else inner**-0.5)

    write_file(folder / "adapter_model.safetensors", factors, "F32", chunks)
    config = {
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": SCALE * rank,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted({key.split(".lora_")[0].rpartition(".")[2] for key in factors}),
        "task_type": "CAUSAL_LM",
        "use_rslora": False,
    }
    write_json(folder / "adapter_config.json", config)


def write_file(path: Path, tensors: dict[str, Shape], dtype: str, chunks: Callable[[str, Shape], Chunks]) -> None:
    """Write a safetensors file without ever holding a whole tensor."""
    width, end = {"BF16": 2, "F32": 4}[dtype], 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, shape in tensors.items():
        begin, end = end, end + width * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in tensors.items():
            for chunk in chunks(name, shape):
                file.write(chunk.data)


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")
