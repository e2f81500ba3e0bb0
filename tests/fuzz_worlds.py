"""What the fuzz targets hold files against: small checkpoints and adapters, in folders that go at the end."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np
import tiny
import torch
from safetensors.numpy import save_file

from lora_cli.checkpoint.checkpoint import Checkpoint, open_checkpoint

CORPUS: Final = Path(__file__).parent / "corpus"
UNDO_WORLD: Final = CORPUS / "undo-world"
"""A merge with two adapters into a wrapped checkpoint, frozen: its undo file has a part of every kind."""

Part = tuple[str, list[int], bytes]


@dataclass(frozen=True)
class Shape:
    """A tensor of which nothing but the shape is known."""

    shape: tuple[int, ...]


@cache
def folder(name: str) -> Path:
    """An empty folder of this name."""
    made = Path(tempfile.mkdtemp(prefix=f"{name}-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


@cache
def base() -> Checkpoint:
    """A checkpoint of two layers."""
    return open_checkpoint(tiny.write_base(folder("base"), shards=1))


@cache
def model_folder() -> Path:
    """The same, in a folder whose `config.json` is overwritten."""
    return tiny.write_base(folder("model"), shards=1)


@cache
def adapter_folder() -> Path:
    """A PEFT folder with factors of a linear layer, a bias, an embedding, rows of a table, and a whole tensor."""
    prefix = tiny.PREFIX
    tensors = tiny.adapter_tensors() | {
        f"{prefix}model.embed_tokens.lora_embedding_A": tiny.numbers(2, 20, seed=1),
        f"{prefix}model.embed_tokens.lora_embedding_B": tiny.numbers(8, 2, seed=2),
        f"{prefix}{tiny.MODULES[0]}.lora_B.bias": tiny.numbers(12, seed=3),
        f"{prefix}model.norm.bias": tiny.numbers(16, seed=4),
        f"{prefix}lm_head.weight": tiny.numbers(20, 8, seed=5),
    }
    return tiny.write_adapter(folder("adapter"), tensors)


@cache
def wrapped() -> Checkpoint:
    """A wrapped checkpoint: a linear layer, an embedding and a parametrized weight with factors beside them."""
    place = folder("wrapped")
    save_file(
        {
            "x.base.weight": tiny.numbers(6, 4, seed=1),
            "x.lora_A.weight": tiny.numbers(2, 4, seed=2),
            "x.lora_B.weight": tiny.numbers(6, 2, seed=3),
            "y.parametrizations.weight.original": tiny.numbers(3, 4, seed=4),
            "y.parametrizations.weight.0.A": tiny.numbers(2, 4, seed=5),
            "y.parametrizations.weight.0.B": tiny.numbers(3, 2, seed=6),
            "z.weight": np.ones(3, np.float32),
        },
        place / "model.safetensors",
    )
    return open_checkpoint(place)


@cache
def receipt_folder() -> Path:
    """An output of one file, as a receipt may list it."""
    place = folder("receipt")
    save_file({"x.weight": tiny.numbers(2, 3)}, place / "model.safetensors")
    (place / "config.json").write_text("{}")
    return place


@cache
def merged() -> Checkpoint:
    """The merged checkpoint that the undo files of the corpus are for."""
    return open_checkpoint(UNDO_WORLD / "merged")


@cache
def undo_parts() -> dict[str, Part]:
    """The parts of its own undo file, without the manifest."""
    data = (UNDO_WORLD / "merged" / "lora_merge.undo").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    spans = {name: said["data_offsets"] for name, said in header.items() if name not in ("__metadata__", "manifest")}
    return {
        name: (header[name]["dtype"], header[name]["shape"], data[start + begin : start + end])
        for name, (begin, end) in spans.items()
    }


@cache
def block() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A block of a merge: base and merged values in bfloat16, and the deltas between them."""
    base_values = torch.from_numpy(tiny.numbers(64, seed=1)).to(torch.bfloat16)
    delta = torch.from_numpy(tiny.numbers(64, seed=2)) / 8
    return base_values, (base_values.to(torch.float32) + delta).to(torch.bfloat16), delta
