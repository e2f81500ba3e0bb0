"""Small adapters of other tuners than LoRA, one for each thing that a change can do, made with numpy alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from safetensors.numpy import save_file
from tiny import LAYERS, MODULES, PREFIX, WIDTH, Array, numbers, out_of, write_json

Part = Callable[[str], Mapping[str, Array]]
"""The tensors of one module, by the tuner's names."""


def loha(module: str) -> dict[str, Array]:
    out = out_of(module)
    return {
        "hada_w1_a": numbers(out, 2, seed=1) / 4,
        "hada_w1_b": numbers(2, WIDTH, seed=2) / 4,
        "hada_w2_a": numbers(out, 2, seed=3) / 4,
        "hada_w2_b": numbers(2, WIDTH, seed=4) / 4,
    }


def ia3(module: str) -> dict[str, Array]:
    return {"ia3_l": 1 + numbers(out_of(module), 1, seed=5) / 8}


def oft(module: str) -> dict[str, Array]:
    return {"oft_R.weight": numbers(WIDTH // 4, 6, seed=6) / 16}


def adalora(module: str) -> dict[str, Array]:
    out = out_of(module)
    return {
        "lora_A": numbers(2, WIDTH, seed=7) / 4,
        "lora_B": numbers(out, 2, seed=8) / 4,
        "lora_E": numbers(2, 1, seed=9) / 4,
    }


def fourierft(module: str) -> dict[str, Array]:
    return {"fourierft_spectrum": numbers(5, seed=10) / 4}


FIELDS: Final[Mapping[str, dict[str, Any]]] = {
    "ADALORA": {"init_r": 4, "lora_alpha": 8},
    "FOURIERFT": {"scaling": 30.0, "random_loc_seed": 7},
    "IA3": {"feedforward_modules": []},
    "LOHA": {"r": 2, "alpha": 6},
    "OFT": {"use_cayley_neumann": False},
}
PARTS: Final[Mapping[str, Part]] = {
    "ADALORA": adalora,
    "FOURIERFT": fourierft,
    "IA3": ia3,
    "LOHA": loha,
    "OFT": oft,
}


def tensors_of(kind: str) -> dict[str, Array]:
    """The tensors of an adapter for every linear layer of the tiny base."""
    return {f"{PREFIX}{module}.{part}": found for module in MODULES for part, found in PARTS[kind](module).items()}


def write_tuner(folder: Path, kind: str, tensors: Mapping[str, Array] | None = None, **config: Any) -> Path:
    """A PEFT folder of a tuner; `config` adds to the fields of its config."""
    folder.mkdir(parents=True, exist_ok=True)
    said = {"peft_type": kind, "bias": "none", "task_type": "CAUSAL_LM"} | FIELDS.get(kind, {})
    write_json(folder / "adapter_config.json", said | config)
    save_file(dict(tensors_of(kind) if tensors is None else tensors), folder / "adapter_model.safetensors")
    return folder


def write_norms(folder: Path) -> Path:
    """An adapter that holds norms whole."""
    made = {
        f"{PREFIX}model.layers.{layer}.input_layernorm.ln_tuning_layers.weight": np.full(WIDTH, 2, np.float32)
        for layer in range(LAYERS)
    }
    return write_tuner(folder, "LN_TUNING", made)
