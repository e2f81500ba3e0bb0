"""Small PEFT folders with factors of experts, and what is made of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file

from lora_cli.adapters.adapter import Adapter, Parameter, Target
from lora_cli.adapters.expert_layout import ExpertLayout
from lora_cli.adapters.formats import open_adapter
from lora_cli.adapters.source import ReadOptions
from lora_cli.surgery.readers import open_readers

Tensors = Mapping[str, torch.Tensor]

EXPERTS: Final = 5
RANK: Final = 3
OUT, IN = 7, 4
PLAIN: Final = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "peft_version": "0.21.2"}
M: Final = "model.layers.0.mlp.experts"
BOTH: Final = ["experts.gate_up_proj", "experts.down_proj"]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def written(folder: Path, tensors: Tensors, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    named = {f"base_model.model.{key}": value.contiguous() for key, value in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(PLAIN | config))
    return folder


def read(folder: Path, tensors: Tensors, layout: str | None = None, **config: Any) -> Adapter:
    options = ReadOptions(expert_layout=ExpertLayout.parse(layout) if layout else ExpertLayout())
    return open_adapter(written(folder, tensors, **config), options)


def pair(name: str, a: tuple[int, ...], b: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {f"{name}.lora_A.weight": random(*a, seed=1), f"{name}.lora_B.weight": random(*b, seed=2)}


def on(target: Target, *shape: int, transposed: bool = False, **config: Any) -> Any:
    return target.delta.on(Parameter(shape, transposed, len(shape) == 3, config))


def product(delta: Any, index: int = 0) -> torch.Tensor:
    with open_readers() as readers:
        term = delta.term(readers.load, 1.0, index)
    result: torch.Tensor = term.b @ term.a * term.scale
    return result


def products(delta: Any) -> torch.Tensor:
    return torch.stack([product(delta, index) for index in range(delta.stack)])
