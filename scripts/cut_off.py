"""What a kill in the middle costs: a merge and an unmerge are killed when half of their files are finished, and go on.

    python scripts/cut_off.py [--megabytes 1024] [--shards 8] [--threads N]

Each run is a process of its own, killed by SIGKILL as the system's OOM killer does it. What `--resume` gives is
compared with a run that was not cut off, every file by its SHA-256.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

WIDTH, RANK = 2048, 16


def make(folder: Path, megabytes: int, shards: int) -> tuple[Path, Path]:
    """A bf16 checkpoint of square layers, half of which have factors, and the adapter."""
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    adapter.mkdir()
    generator = torch.Generator().manual_seed(1)
    layers = max(2 * shards, megabytes * 2**20 // (2 * WIDTH * WIDTH))
    weight_map: dict[str, str] = {}
    factors: dict[str, torch.Tensor] = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        tensors = {}
        for layer in range(shard, layers, shards):
            tensors[f"layers.{layer}.proj.weight"] = numbers((WIDTH, WIDTH), generator).to(torch.bfloat16)
            if layer // shards % 2:
                factors[f"base_model.model.layers.{layer}.proj.lora_A.weight"] = numbers((RANK, WIDTH), generator)
                factors[f"base_model.model.layers.{layer}.proj.lora_B.weight"] = numbers((WIDTH, RANK), generator)
        save_file(tensors, base / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (base / "config.json").write_text('{"model_type": "none"}')
    save_file(factors, adapter / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": ["proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(said))
    return base, adapter


def numbers(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator) * 0.02


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.file_digest(path.open("rb"), "sha256").hexdigest() for path in sorted(folder.iterdir())}


def finished(place: Path) -> int:
    """How many files the journal of a run says are finished."""
    return max((path.read_text().count("\n") - 1 for path in place.glob(".out.lora-cli-*/journal")), default=0)


def whole(line: list[str]) -> float:
    """Seconds of a run that nobody disturbs."""
    start = time.perf_counter()
    subprocess.run(line, check=True, capture_output=True)
    return time.perf_counter() - start


def killed(line: list[str], place: Path, after: int) -> float:
    """Kill a run once so many files are finished; returns its seconds."""
    start = time.perf_counter()
    with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while finished(place) < after:
            if process.poll() is not None:
                raise SystemExit("it ended before it could be killed: give more --megabytes")
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    return time.perf_counter() - start


@contextmanager
def workplace() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="lora-cut-off-") as folder:
        yield Path(folder)


def measure(name: str, line: list[str], place: Path, shards: int) -> Path:
    """Run a command whole, and killed and gone on with; prints a row, and returns what it wrote."""
    out = place / "out"
    line = [sys.executable, "-m", "lora_cli", *line, "-o", str(out), "-q"]
    undisturbed = whole(line)
    expected = digests(out)
    shutil.rmtree(out)
    first = killed(line, place, math.ceil(shards / 2))
    done = finished(place)
    if out.exists():
        raise SystemExit("wrong: an output is there after the kill")
    again = whole([*line, "--resume"])
    if digests(out) != expected:
        raise SystemExit("wrong: the digests are others than without a kill")
    left = [path.name for path in place.iterdir() if path.name.startswith(".")]
    if left:
        raise SystemExit(f"wrong: {left} is left")
    print(f"{name:8} {undisturbed:7.2f} s {first:10.2f} s {done:6} of {shards:2} {again:8.2f} s   same digests")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill merges and unmerges in the middle, and let them go on.")
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    more = ["--threads", str(arguments.threads)] if arguments.threads else []
    with workplace() as folder:
        base, adapter = make(folder, arguments.megabytes, arguments.shards)
        size = sum(path.stat().st_size for path in base.iterdir())
        print(f"{size / 1e9:.2f} GB in {arguments.shards} files")
        print(f"{'':8} {'whole':>9} {'killed at':>12} {'finished':>12} {'--resume':>10}")
        place = folder / "place"
        place.mkdir()
        merged = measure("merge", ["merge", str(base), str(adapter), *more], place, arguments.shards)
        merged = merged.rename(folder / "merged")
        back = measure("unmerge", ["unmerge", str(merged), str(adapter), *more], place, arguments.shards)
        names = [path.name for path in base.iterdir()]
        if any((back / name).read_bytes() != (base / name).read_bytes() for name in names):
            raise SystemExit("wrong: the base did not come back")


if __name__ == "__main__":
    main()
