"""How long headers alone take on the largest checkpoints: sparse files of a terabyte, and tens of thousands of pairs.

    python scripts/plan_sizes.py [--json] [--keep FOLDER] [--only dense|experts]

Two bases of 200 shards with an adapter of rank 16 for all their linear layers, made of headers and holes:

    dense    Llama-405B's shapes and 30 further layers, 1.0 TB in bf16: 882 pairs
    experts  77 layers of 256 experts: 59,909 tensors, 59,675 pairs

Each row is a whole process: seconds on the clock, seconds of CPU (user and system), most memory that it had. A folder
of its own is kept with --keep, else everything is made in a temporary one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

RANK = 16
SHARDS = 200

Shapes = dict[str, tuple[int, ...]]
"""Tensor → its shape, in the order of the files."""


def dense_shapes(layers: int = 126, further: int = 30) -> tuple[Shapes, list[str]]:
    """Llama-405B: its tensors with those of further layers, and the modules of the first ones that are adapted."""
    hidden, inner, narrow, words = 16384, 53248, 1024, 128256
    linears = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (narrow, hidden),
        "self_attn.v_proj": (narrow, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    shapes: Shapes = {"model.embed_tokens.weight": (words, hidden)}
    for layer in range(layers + further):
        shapes |= _layer(f"model.layers.{layer}", linears, hidden)
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (words, hidden)}
    return shapes, [f"model.layers.{layer}.{name}" for layer in range(layers) for name in linears]


def expert_shapes(layers: int = 77, experts: int = 256) -> tuple[Shapes, list[str]]:
    """Fine-grained experts: their tensors, and the modules that are adapted: all linear ones but the router."""
    hidden, inner, words = 7168, 2048, 129280
    linears: dict[str, tuple[int, int]] = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    for expert in ("shared_experts", *(f"experts.{number}" for number in range(experts))):
        linears |= {f"mlp.{expert}.{name}_proj": (inner, hidden) for name in ("gate", "up")}
        linears[f"mlp.{expert}.down_proj"] = (hidden, inner)
    shapes: Shapes = {"model.embed_tokens.weight": (words, hidden)}
    for layer in range(layers):
        shapes |= _layer(f"model.layers.{layer}", linears, hidden)
        shapes[f"model.layers.{layer}.mlp.gate.weight"] = (experts, hidden)
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (words, hidden)}
    return shapes, [f"model.layers.{layer}.{name}" for layer in range(layers) for name in linears]


def _layer(name: str, linears: Mapping[str, tuple[int, int]], hidden: int) -> Shapes:
    shapes: Shapes = {f"{name}.{linear}.weight": shape for linear, shape in linears.items()}
    return shapes | {f"{name}.{norm}.weight": (hidden,) for norm in ("input_layernorm", "post_attention_layernorm")}


def write_base(folder: Path, shapes: Shapes, shards: int = SHARDS) -> None:
    """Write a checkpoint of shards of about one size, bf16, with its index and config: headers, and holes for data."""
    folder.mkdir(parents=True)
    total = sum(map(_length, shapes.values()))
    parts: list[Shapes] = [{} for _ in range(shards)]
    done = 0
    for name, shape in shapes.items():
        parts[done * shards // total][name] = shape
        done += _length(shape)
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        file = f"model-{number:05d}-of-{shards:05d}.safetensors"
        write_hole(folder / file, part)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(config))


def write_adapter(folder: Path, shapes: Shapes, modules: Iterable[str]) -> None:
    """Write a PEFT adapter for these modules, its factors a hole."""
    folder.mkdir(parents=True)
    factors: Shapes = {}
    for module in modules:
        rows, columns = shapes[f"{module}.weight"]
        factors[f"base_model.model.{module}.lora_A.weight"] = (RANK, columns)
        factors[f"base_model.model.{module}.lora_B.weight"] = (rows, RANK)
    write_hole(folder / "adapter_model.safetensors", factors)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def write_hole(path: Path, shapes: Shapes) -> None:
    """Write a safetensors file of bf16 zeros that take no place on the disk."""
    document, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + _length(shape)
        document[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    header = json.dumps(document, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)


def _length(shape: tuple[int, ...]) -> int:
    return 2 * math.prod(shape)


WORLDS = {"dense": dense_shapes, "experts": expert_shapes}


def make(folder: Path, kind: str) -> tuple[Path, Path]:
    """Write the base and the adapter of one kind, where they are not there yet."""
    shapes, modules = WORLDS[kind]()
    base, adapter = folder / kind / "base", folder / kind / "adapter"
    if not adapter.exists():
        write_base(base, shapes)
        write_adapter(adapter, shapes, modules)
    return base, adapter


def environment(*folders: str) -> dict[str, str]:
    """The environment for a process of its own: this checkout, and folders of it, to import from; no network."""
    root = Path(__file__).resolve().parent.parent
    places = os.pathsep.join(str(root / folder) for folder in ("", *folders))
    return {**os.environ, "PYTHONPATH": places, "HF_HUB_OFFLINE": "1"}


def measure(*arguments: object) -> dict[str, Any]:
    """Run `lora-cli` as a process of its own; seconds, CPU seconds, peak memory and bytes on stdout."""
    with tempfile.TemporaryFile() as out:
        begin = time.monotonic()
        line = [sys.executable, "-m", "lora_cli", *map(str, arguments)]
        to_file = [(os.POSIX_SPAWN_DUP2, out.fileno(), 1)]
        process = os.posix_spawn(sys.executable, line, environment(), file_actions=to_file)
        _, status, used = os.wait4(process, 0)
        seconds = time.monotonic() - begin
        said = os.fstat(out.fileno()).st_size
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"failed: lora-cli {' '.join(line[3:])}")
    return {
        "seconds": round(seconds, 2),
        "cpu": round(used.ru_utime + used.ru_stime, 2),
        "peak_rss_bytes": used.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "stdout_bytes": said,
    }


def commands(base: Path, adapter: Path, out: Path) -> Iterator[tuple[str, list[object]]]:
    """What is measured: how it is called in the table, and its arguments."""
    merge: list[object] = ["merge", base, adapter, "-o", out, "--dry-run"]
    yield "merge --dry-run", merge
    yield "merge --dry-run --json", [*merge, "--json"]
    yield "merge --dry-run --json --no-undo", [*merge, "--json", "--no-undo"]
    yield "inspect BASE", ["inspect", base]
    yield "inspect BASE --json", ["inspect", base, "--json"]
    yield "inspect ADAPTER", ["inspect", adapter]
    yield "inspect ADAPTER --base BASE --json", ["inspect", adapter, "--base", base, "--json"]


def rows_of(folder: Path, kinds: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Measure every command on every kind, and the start of the program itself."""
    yield {"files": "", "command": "--help", **measure("--help")}
    for kind in kinds:
        base, adapter = make(folder, kind)
        for name, arguments in commands(base, adapter, folder / "out"):
            yield {"files": kind, "command": name, **measure(*arguments)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where the files are made, and stay")
    parser.add_argument("--only", choices=WORLDS, help="one kind of checkpoint")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    kinds = [arguments.only] if arguments.only else list(WORLDS)
    with contextlib.ExitStack() as stack:
        folder = arguments.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        rows = rows_of(folder, kinds)
        if arguments.json:
            print(json.dumps(list(rows), indent=2))
            return
        print("| files | command | seconds | CPU | peak memory | stdout |\n|---|---|---|---|---|---|")
        for row in rows:
            sizes = f"{row['peak_rss_bytes'] / 1e6:.0f} MB | {row['stdout_bytes'] / 1e6:.1f} MB"
            print(f"| {row['files']} | `{row['command']}` | {row['seconds']:.2f} | {row['cpu']:.2f} | {sizes} |")


if __name__ == "__main__":
    main()
