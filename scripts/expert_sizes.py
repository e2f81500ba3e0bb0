"""How long a layer of many experts takes, one by one in several files, with an adapter on the model's fused parameters.

    python scripts/expert_sizes.py [--experts 96 192 384] [--hidden 2048] [--inner 768] [--memory 256] [--json]

A checkpoint in bf16 holds each expert by itself, as transformers writes Qwen3-MoE, over 4 shards; the adapter of rank
16 is one that PEFT saves for `gate_up_proj` and `down_proj` of all experts together. Each row is one merge, and one
exact unmerge, as processes of their own within `--memory`; some experts are compared with a product in float64, and
every file of the base with what comes back. `cp` copies the same files.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

RANK, ALPHA = 16, 24
SHARDS = 4
PREFIX = "model.layers.0.mlp.experts"
SAMPLE = 5
"""Experts that are compared, besides the first and the last."""


def make(folder: Path, experts: int, hidden: int, inner: int) -> tuple[Path, Path]:
    """Write base and adapter; every shard has some experts of each projection."""
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    adapter.mkdir()
    generator = torch.Generator().manual_seed(1)
    weight_map: dict[str, str] = {}
    shapes = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    for shard in range(SHARDS):
        name = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        tensors = {
            f"{PREFIX}.{expert}.{projection}.weight": _numbers(shape, 0.02, generator)
            for number, projection in enumerate(shapes)
            for expert in range(experts)
            if (expert + number) % SHARDS == shard
            for shape in [shapes[projection]]
        }
        save_file(tensors, base / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    total = experts * 3 * hidden * inner * 2
    (base / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    )
    config = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": experts}
    config |= {"hidden_size": hidden, "moe_intermediate_size": inner, "num_hidden_layers": 1}
    (base / "config.json").write_text(json.dumps(config))
    outer, nested = f"base_model.model.{PREFIX}", f"base_model.model.{PREFIX}.base_layer"
    save_file(
        {
            f"{nested}.lora_A.weight": _numbers((experts * RANK, hidden), 0.02, generator),
            f"{nested}.lora_B.weight": _numbers((2 * inner, RANK * experts), 0.02, generator),
            f"{outer}.lora_A.weight": _numbers((experts * RANK, inner), 0.02, generator),
            f"{outer}.lora_B.weight": _numbers((hidden, RANK * experts), 0.02, generator),
        },
        adapter / "adapter_model.safetensors",
    )
    said = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "peft_version": "0.21.0", "target_modules": []}
    said["target_parameters"] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    (adapter / "adapter_config.json").write_text(json.dumps(said))
    return base, adapter


def _numbers(shape: tuple[int, int], std: float, generator: torch.Generator) -> torch.Tensor:
    return (torch.randn(shape, generator=generator) * std).to(torch.bfloat16)


def check(base: Path, adapter: Path, merged: Path, experts: int) -> None:
    """Compare some experts with W + scale·B·A in float64, rounded."""
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        factors = {key: file.get_tensor(key).double() for key in file.keys()}  # noqa: SIM118 (no mapping)
    nested, outer = f"base_model.model.{PREFIX}.base_layer", f"base_model.model.{PREFIX}"
    step = max(1, experts // SAMPLE)
    for expert in sorted({*range(0, experts, step), experts - 1}):
        gate_up, down = (
            factors[f"{name}.lora_B.weight"][:, expert::experts]
            @ factors[f"{name}.lora_A.weight"][expert * RANK : (expert + 1) * RANK]
            * (ALPHA / RANK)
            for name in (nested, outer)
        )
        gate, up = gate_up.chunk(2)
        for projection, delta in {"gate_proj": gate, "up_proj": up, "down_proj": down}.items():
            key = f"{PREFIX}.{expert}.{projection}.weight"
            wanted = _read(base, key).double() + delta
            off = (_read(merged, key).double() - wanted).abs()
            if not bool((off <= wanted.abs() * 2**-8 + 1e-9).all()):
                raise SystemExit(f"wrong: {key} is not base + delta")


def _read(folder: Path, key: str) -> torch.Tensor:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    with safe_open(folder / index["weight_map"][key], "pt") as file:
        found: torch.Tensor = file.get_tensor(key)
        return found


def measure(experts: int, hidden: int, inner: int, memory: int) -> dict[str, Any]:
    """Merge and unmerge one layer; seconds, and the most memory that one process had, in bytes."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        base, adapter = make(folder, experts, hidden, inner)
        merged, back = folder / "merged", folder / "back"
        copy = _timed(["cp", "-r", str(base), str(folder / "copy")])
        shutil.rmtree(folder / "copy")
        bound = ["--memory", f"{memory}MiB"]
        merge = _timed([*_cli(), "merge", str(base), str(adapter), "-o", str(merged), *bound])
        check(base, adapter, merged, experts)
        undo = _timed([*_cli(), "unmerge", str(merged), str(adapter), "-o", str(back), *bound])
        for path in base.iterdir():
            if (back / path.name).read_bytes() != path.read_bytes():
                raise SystemExit(f"wrong: {path.name} did not come back")
        size = sum(path.stat().st_size for path in base.iterdir())
        return {
            "experts": experts,
            "bytes": size,
            "undo_bytes": (merged / "lora_merge.undo").stat().st_size,
            "cp_seconds": copy["seconds"],
            **{f"merge_{name}": value for name, value in merge.items()},
            **{f"unmerge_{name}": value for name, value in undo.items()},
        }


def _cli() -> list[str]:
    return [sys.executable, "-m", "lora_cli"]


def _timed(command: list[str]) -> dict[str, float]:
    """Run a program; seconds on the clock, and the most memory that it or a child of it had."""
    source = (
        "import json, resource, subprocess, sys, time; t = time.perf_counter();"
        "done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL);"
        "print(json.dumps([time.perf_counter() - t, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss]));"
        "sys.exit(done.returncode)"
    )
    done = subprocess.run([sys.executable, "-c", source, *command], stdout=subprocess.PIPE, text=True, check=True)
    seconds, kilobytes = json.loads(done.stdout)
    return {"seconds": seconds, "peak_bytes": kilobytes * 1024}


def _rows(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for experts in arguments.experts:
        yield measure(experts, arguments.hidden, arguments.inner, arguments.memory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, nargs="+", default=[96, 192, 384])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=768)
    parser.add_argument("--memory", type=int, default=256, help="MiB that buffers and factors may take")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = list(_rows(arguments))
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return
    print("| experts | layer | cp | merge | unmerge | peak memory | undo file |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        peak = max(row["merge_peak_bytes"], row["unmerge_peak_bytes"]) / (1 << 20)
        print(
            f"| {row['experts']} | {row['bytes'] / 1e9:.2f} GB | {row['cp_seconds']:.1f} s "
            f"| {row['merge_seconds']:.1f} s | {row['unmerge_seconds']:.1f} s | {peak:.0f} MiB "
            f"| {row['undo_bytes'] / 1e6:.1f} MB |"
        )


if __name__ == "__main__":
    main()
