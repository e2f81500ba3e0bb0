"""Small checkpoints and adapters, made with numpy alone: for tests of names, files and the command line."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
from safetensors.numpy import load_file, save_file

Array = np.ndarray[Any, np.dtype[Any]]
Tensors = Mapping[str, Array]

RANK: Final = 2
ALPHA: Final = 4
WIDTH: Final = 8
INNER: Final = {"self_attn.q_proj": 12, "mlp.up_proj": 16}
"""Linear layers of a block and their outputs; none is square, so that shapes decide how it lies."""
LAYERS: Final = 2
MODULES: Final = tuple(f"model.layers.{layer}.{name}" for layer in range(LAYERS) for name in INNER)
CONFIG: Final = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32"}
PREFIX: Final = "base_model.model."


def numbers(*shape: int, seed: int = 0) -> Array:
    """Reproducible float32 numbers around zero."""
    count = math.prod(shape)
    return np.random.Generator(np.random.Philox(seed)).standard_normal(count).astype(np.float32).reshape(shape)


def base_tensors() -> dict[str, Array]:
    """A checkpoint with what mergers meet: matrices, vectors, a buffer of integers."""
    tensors: dict[str, Array] = {"model.embed_tokens.weight": numbers(20, WIDTH, seed=1)}
    for seed, module in enumerate(MODULES, start=2):
        tensors[f"{module}.weight"] = numbers(out_of(module), WIDTH, seed=seed)
    for layer in range(LAYERS):
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = np.ones(WIDTH, np.float32)
    tensors["model.position_ids"] = np.arange(6, dtype=np.int64)
    tensors["lm_head.weight"] = numbers(20, WIDTH, seed=9)
    return tensors


def out_of(module: str) -> int:
    """Outputs of a module of the base."""
    return next(out for name, out in INNER.items() if module.endswith(name))


def factors(modules: Mapping[str, tuple[int, int]], *, rank: int = RANK, prefix: str = PREFIX) -> dict[str, Array]:
    """A (rank × in) and B (out × rank) as PEFT names them, for modules with their (out, in)."""
    tensors = {}
    for seed, (module, (out, inner)) in enumerate(modules.items(), start=20):
        tensors[f"{prefix}{module}.lora_A.weight"] = numbers(rank, inner, seed=seed)
        tensors[f"{prefix}{module}.lora_B.weight"] = numbers(out, rank, seed=-seed % 1000)
    return tensors


def adapter_tensors(*, rank: int = RANK, prefix: str = PREFIX) -> dict[str, Array]:
    """Factors for every linear layer of `base_tensors`."""
    return factors({module: (out_of(module), WIDTH) for module in MODULES}, rank=rank, prefix=prefix)


def write_base(
    folder: Path, tensors: Tensors | None = None, *, shards: int = 2, config: Mapping[str, Any] | None = None
) -> Path:
    """A folder with config and tensors: shards with an index, or one file."""
    tensors = base_tensors() if tensors is None else tensors
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", CONFIG if config is None else config)
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for number in range(shards):
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        share = {
            key: tensor for at, (key, tensor) in enumerate(tensors.items()) if at * shards // len(tensors) == number
        }
        save_file(share, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(share, name))
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    return folder


def write_adapter(folder: Path, tensors: Tensors | None = None, **config: Any) -> Path:
    """A PEFT folder; `config` adds to the fields of its config, and a field of None is written as null."""
    folder.mkdir(parents=True, exist_ok=True)
    said = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", "task_type": "CAUSAL_LM"}
    write_json(folder / "adapter_config.json", said | config)
    save_file(dict(adapter_tensors() if tensors is None else tensors), folder / "adapter_model.safetensors")
    return folder


def write_json(path: Path, document: object) -> Path:
    """A JSON file."""
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def read_tensors(path: Path) -> dict[str, Array]:
    """All tensors of a file, or of the safetensors files of a folder."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return {key: tensor for file in files for key, tensor in load_file(file).items()}


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Every path below a folder with its length and the time of its last change: what no dry run may touch."""
    return {
        path.relative_to(folder).as_posix(): (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
    }


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail, rather than hang, when something takes longer than it may; processor time, so that others do not count."""

    def late(number: int, frame: object) -> None:
        raise AssertionError(f"it took more than {seconds} s")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
