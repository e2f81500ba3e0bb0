"""R176: the same merge gives the same bytes in every process: tensors, undo file and receipt."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import save_file

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp8": torch.float8_e4m3fn}
SHAPES = {"wide": (130, 2311), "tall": (2600, 129), "square": (517, 517)}
RANK = 16

GOLDEN = {
    "model-00001-of-00002.safetensors": "639758fc108e6b2d170b8f0d73bd1b62982d7880fb658db4441627e16399393d",
    "model-00002-of-00002.safetensors": "a7bc5821ad4112d7aadce2c71ad1008842ca176c5e8c2f14e4e3a95861d5e4f9",
}
"""sha256 of the merged files, on every machine and with every version."""

PLAIN = {"LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "0"}
PROCESSES: dict[str, tuple[dict[str, str], list[str], int]] = {
    "one thread, little memory": (PLAIN, ["--threads", "1", "--memory", "16MiB"], 0o022),
    "many threads, much memory": (PLAIN, ["--threads", "8", "--memory", "4GiB"], 0o022),
    "the slowest kernels": (
        {**PLAIN, "ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "1"},
        ["--threads", "2"],
        0o022,
    ),
    "another machine's habits": (
        {
            "LC_ALL": "tr_TR.UTF-8",
            "PYTHONHASHSEED": "4321",
            "TZ": "Pacific/Kiritimati",
            "OMP_NUM_THREADS": "7",
            "MKL_NUM_THREADS": "5",
            "ATEN_CPU_CAPABILITY": "avx2",
            "USER": "somebody",
        },
        ["--threads", "3"],
        0o077,
    ),
    "as many threads as anybody has": (PLAIN, ["--threads", "64", "--memory", "1GiB"], 0o022),
    "threads that share nothing": ({**PLAIN, "MKL_DYNAMIC": "FALSE"}, ["--threads", "5", "--memory", "64MiB"], 0o002),
}


def numbers(seed: int, shape: tuple[int, int], spread: float) -> torch.Tensor:
    """Bell-shaped numbers that are the same on every machine."""
    total = np.random.Generator(np.random.Philox(seed)).random((*shape, 4), dtype=np.float32).sum(axis=2)
    return torch.from_numpy((total - np.float32(2)) * np.float32(spread))


def write_shards(folder: Path, shards: list[dict[str, torch.Tensor]]) -> None:
    folder.mkdir()
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    tiny.write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    tiny.write_json(folder / "config.json", {"model_type": "none"})


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base of two shards and many types, and two adapters."""
    folder = tmp_path_factory.mktemp("job")
    shards: list[dict[str, torch.Tensor]] = [{}, {}]
    for number, (name, dtype) in enumerate(TYPES.items()):
        for place, (kind, shape) in enumerate(SHAPES.items()):
            weights = numbers(10 * number + place, shape, 0.05 if name != "fp8" else 1.0)
            weights[:: 7 + place] = 0.0
            shards[number // 2][f"{name}.{kind}.weight"] = weights.to(dtype)
    shards[0]["untouched"] = numbers(99, (300, 300), 1.0).to(torch.bfloat16)
    write_shards(folder / "base", shards)
    for adapter in ("one", "two"):
        factors = {}
        for number, name in enumerate(TYPES):
            for place, (kind, (out, inner)) in enumerate(SHAPES.items()):
                seed = 1000 * (1 + len(adapter)) + 10 * number + place + ord(adapter[0])
                factors[f"{name}.{kind}.lora_A.weight"] = numbers(seed, (RANK, inner), 0.05)
                factors[f"{name}.{kind}.lora_B.weight"] = numbers(seed + 500, (out, RANK), 0.02)
        tiny.write_adapter(folder / adapter, {}, r=RANK, lora_alpha=24)
        save_file(factors, folder / adapter / "adapter_model.safetensors")
    return folder


def merged(job: Path, out: Path, env: dict[str, str], options: list[str], umask: int) -> dict[str, str]:
    """Merge in a process of its own, from another folder; sha256 of every file of the output."""
    place = out.parent / "somewhere"
    place.mkdir()
    base, adapters = os.path.relpath(job / "base", place), [str(job / "one"), os.path.relpath(job / "two", place)]
    line = [sys.executable, "-m", "lora_cli", "merge", base, *adapters, "-o", str(out), "--weight", "0.75"]
    line += ["--weight", "-0.5", "-q", *options]
    keep = {name: os.environ[name] for name in ("PATH", "HOME", "PYTHONPATH") if name in os.environ}
    subprocess.run(line, cwd=place, env={**keep, **env}, check=True, umask=umask, timeout=120)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir())}


@pytest.fixture(scope="module")
def expected(job: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return merged(job, tmp_path_factory.mktemp("expected") / "out", PLAIN, [], 0o022)


@pytest.mark.parametrize("name", PROCESSES)
def test_no_byte_depends_on_the_process(job: Path, expected: dict[str, str], tmp_path: Path, name: str) -> None:
    assert merged(job, tmp_path / "out", *PROCESSES[name]) == expected


def test_the_merged_files_are_what_they_always_were(expected: dict[str, str]) -> None:
    assert {name: expected[name] for name in GOLDEN} == GOLDEN
    assert {"lora_merge.undo", "lora_merge.json", "README.md"} <= expected.keys()
