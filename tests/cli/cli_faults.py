"""Everything that can be wrong with a command line and its inputs, with the exit code that says so."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cli_world import World
from safetensors.numpy import save_file
from tiny import MODULES, PREFIX, Tensors, adapter_tensors, base_tensors, numbers, write_adapter, write_base, write_json

Arguments = Callable[[World, Path], list[object]]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@dataclass(frozen=True)
class Fault:
    """One thing that is refused.

    Attributes:
        exit: The exit code.
        code: The `code` of the error in JSON.
        arguments: Makes what it needs in a folder, and returns the command line.
        words: What the message must say, in pieces separated by bars.
    """

    exit: int
    code: str
    arguments: Arguments
    words: str


def merge(*more: object) -> Arguments:
    """Merge the world's inputs with more options."""
    return lambda w, f: ["merge", w.base, w.adapter, "-o", f / "out", *more]


def line(*parts: str) -> Arguments:
    """A command line by the names of inputs; whatever is none of them stands for itself."""
    return lambda w, f: [getattr(w, part, f / "out" if part == "OUT" else part) for part in parts]


def files(
    *more: str,
    base: Tensors | None = None,
    base_config: dict[str, Any] | None = None,
    factors: Tensors | None = None,
    bare: bool = False,
    **config: Any,
) -> Arguments:
    """Merge a base and an adapter that are written for the case."""

    def build(world: World, folder: Path) -> list[object]:
        own = base is not None or base_config is not None
        checkpoint = write_base(folder / "b", base, shards=1 if bare else 2, config=base_config) if own else world.base
        if bare:
            save_file(dict(factors or {}), folder / "a.safetensors")
            return ["merge", checkpoint, folder / "a.safetensors", "--scale", "1", "-o", folder / "out", *more]
        adapter = write_adapter(folder / "a", factors, **config)
        return ["merge", checkpoint, adapter, "-o", folder / "out", *more]

    return build


def spoiled(change: Callable[[Path], object]) -> Arguments:
    """Merge into a copy of the base with something done to it."""

    def build(world: World, folder: Path) -> list[object]:
        shutil.copytree(world.base, folder / "b")
        change(folder / "b")
        return ["merge", folder / "b", world.adapter, "-o", folder / "out"]

    return build


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def piped(world: World, folder: Path) -> list[object]:
    os.mkfifo(folder / "pipe.safetensors")
    return ["inspect", folder / "pipe.safetensors"]


def pickled(world: World, folder: Path) -> list[object]:
    (folder / "a").mkdir()
    (folder / "a" / "adapter_model.bin").write_bytes(b"x")
    return ["merge", world.base, folder / "a", "-o", folder / "out"]


def two_heads(world: World, folder: Path) -> list[object]:
    heads = [adapter_tensors() | {f"{PREFIX}lm_head.weight": numbers(20, 8, seed=seed)} for seed in (1, 2)]
    both = [write_adapter(folder / f"a{n}", head, modules_to_save=["lm_head"]) for n, head in enumerate(heads)]
    return ["merge", world.base, *both, "-o", folder / "out"]


def existing(kind: str) -> Arguments:
    def build(world: World, folder: Path) -> list[object]:
        out = folder / "out"
        if kind == "link":
            out.symlink_to(world.base)
        else:
            (out / "x" if kind == "folder" else out).parent.mkdir(exist_ok=True)
            (out / "x" if kind == "folder" else out).touch()
        return ["merge", world.base, world.adapter, "-o", out]

    return build


def changed(key: str, value: np.ndarray[Any, Any]) -> dict[str, Any]:
    return adapter_tensors() | {f"{PREFIX}{MODULES[0]}.{key}": value}


def renamed(old: str, new: str) -> dict[str, Any]:
    return {key.replace(old, new): tensor for key, tensor in adapter_tensors().items()}


def climbing(folder: Path) -> None:
    write_json(folder / "model.safetensors.index.json", {"weight_map": {"a": "../x.safetensors"}})


Q = MODULES[0]
BASE, FACTORS = base_tensors(), adapter_tensors()
NAN, HUGE = np.full((12, 2), np.nan, np.float32), np.full((12, 2), 1e30, np.float32)
HALF = {key: tensor.astype(np.float16) if tensor.dtype == np.float32 else tensor for key, tensor in BASE.items()}
TWICE = BASE | {key.replace("model.", "transformer."): tensor for key, tensor in BASE.items()}
SQUARE = {f"x.lora_{side}.weight": numbers(2, 2) for side in "AB"}
HEAD = FACTORS | {f"{PREFIX}lm_head.weight": numbers(20, 8)}
ORPHAN = {key: tensor for key, tensor in FACTORS.items() if "1.mlp.up_proj.lora_B" not in key}
FP8 = {"quantization_config": {"quant_method": "fp8"}}
FIRST = "model-00001-of-00002.safetensors"

TABLE: dict[tuple[int, str], dict[str, tuple[Arguments, str]]] = {
    (2, "usage"): {
        "no such option": (merge("--bogus"), "No such option|--bogus|merge --help"),
        "no such command": (line("bogus"), "No such command|bogus"),
        "argument missing": (line("merge"), "Missing argument|BASE"),
        "option without value": (line("merge", "base", "adapter", "--weight"), "--weight"),
        "path not found": (line("inspect", "no/such/path"), "not found|no/such/path"),
        "spectrum of a checkpoint": (line("inspect", "base", "--spectrum"), "Only factors have a spectrum|base|diff"),
        "adapter not found": (line("merge", "base", "no/such/path", "-o", "OUT"), "not found|no/such/path"),
        "no output": (line("merge", "base", "adapter"), "No output|-o"),
        "no adapter": (line("merge", "base", "-o", "OUT"), "No adapter"),
        "adapter first": (line("merge", "adapter", "base", "-o", "OUT"), "is an adapter, not a checkpoint"),
        "no scale": (line("merge", "base", "plain", "-o", "OUT"), "how strong|--alpha|--scale"),
        "shards to file": (line("merge", "base", "adapter", "-o", "x.safetensors"), "2 shards|folder"),
        "no folder for output": (line("merge", "base", "adapter", "-o", "no/such/folder"), "not exist|no/such"),
        "empty folder": (lambda w, f: ["inspect", f], "no safetensors checkpoint"),
        "weight is text": (merge("--weight", "1,5"), "--weight"),
        "weight nan": (merge("--weight", "nan"), "weight|finite|nan"),
        "weights do not match": (
            merge("--weight", "1", "--weight", "2"),
            "--weight once per adapter|found 2|expected 1",
        ),
        "alpha and scale": (merge("--alpha", "1", "--scale", "2"), "--alpha and --scale"),
        "alpha inf": (merge("--alpha", "inf"), "--alpha|finite|inf"),
        "memory nonsense": (merge("--memory", "lots"), "--memory|lots|256MiB"),
        "memory too small": (merge("--memory", "1KB"), "memory|--memory"),
        "threads": (merge("--threads", "0"), "--threads"),
        "max-ulp": (line("verify", "merged", "--base", "base", "--adapter", "adapter", "--max-ulp", "-1"), "--max-ulp"),
        "dtype": (merge("--dtype", "int8"), "--dtype|int8|keep"),
        "map": (merge("--map", "old"), "--map|old|OLD=NEW"),
        "verify without base": (line("verify", "merged", "--adapter", "adapter"), "--base"),
        "verify without adapter": (line("verify", "merged", "--base", "base"), "No adapter|--adapter"),
        "unmerge without adapter": (line("unmerge", "merged", "--approximate", "-o", "OUT"), "adapter|--approximate"),
    },
    (10, "malformed-file"): {
        "LFS pointer": (spoiled(lambda b: (b / FIRST).write_text(POINTER)), f"{FIRST}|LFS pointer|git lfs pull"),
        "cut off": (spoiled(lambda b: cut(b / FIRST)), f"{FIRST}|7 bytes are missing|download"),
        "shard missing": (spoiled(lambda b: (b / FIRST).unlink()), f"1 of 2 shards|{FIRST}"),
        "index": (spoiled(lambda b: next(b.glob("*.index.json")).write_text("{}")), "index.json|no weight_map"),
        "config of the adapter": (files(r="eight"), "adapter_config.json|r|eight"),
        "config of the base": (spoiled(lambda b: (b / "config.json").write_text("[")), "config.json|JSON"),
    },
    (11, "unsafe-input"): {
        "pickle": (pickled, "pickled|adapter_model.bin|weights_only=True"),
        "pipe": (piped, "Not a regular file|pipe.safetensors"),
        "device": (line("inspect", "/dev/zero"), "Not a regular file|zero"),
        "climbing index": (spoiled(climbing), "index.json|../x.safetensors"),
    },
    (12, "unsupported"): {
        "DoRA": (files(use_dora=True), "adapter_config.json|DoRA|magnitudes"),
        "QA-LoRA": (files(use_qalora=True), "use_qalora = True|QA-LoRA|--ignore-field"),
        "unknown field": (files(new_trick=3), "new_trick = 3|unknown|--ignore-field"),
        "another tuner": (files(peft_type="PREFIX_TUNING"), "PREFIX_TUNING"),
        "quantised": (files(base_config=FP8), "quantised|fp8|16-bit"),
        "integers": (files(base=BASE | {f"{Q}.weight": np.ones((12, 8), np.int32)}), f"I32|{Q}.weight"),
        "several adapters": (
            files(factors=FACTORS | {f"{PREFIX}{Q}.lora_A.b.weight": numbers(2, 2)}),
            "several adapters|b",
        ),
        "half a head": (files("--weight", "0.5", factors=HEAD, modules_to_save=["lm_head"]), "lm_head.weight|0.5"),
    },
    (20, "names"): {
        "unmapped": (
            files(factors=renamed("q_proj", "qq_proj")),
            "2 names|qq_proj|nearest: |q_proj|--map|--allow-unmapped",
        ),
        "nothing fits": (files(factors=renamed("layers", "blocks")), "Nothing in this adapter|--map"),
        "orphan": (files(factors=ORPHAN), "no partner|has no B"),
        "two ways": (files(base=TWICE, factors=renamed("model.model.", "model.")), "two ways|--map"),
        "two heads": (two_heads, "lm_head.weight|a1"),
    },
    (21, "shape"): {
        "shape": (files(factors=changed("lora_A.weight", numbers(2, 7))), f"{Q}.weight|[12, 8]|12 × 7"),
        "rank": (files(factors=changed("lora_A.weight", numbers(3, 8))), f"{Q}|[3, 8]"),
        "rank of the config": (files(r=4), "rank 2|r says 4"),
        "square": (files(base={"x.weight": numbers(2, 2)}, base_config={}, factors=SQUARE, bare=True), "--orientation"),
    },
    (22, "numeric"): {
        "nan": (files(factors=changed("lora_B.weight", NAN)), f"{Q}.weight"),
        "spectrum of nan": (
            lambda w, f: ["inspect", write_adapter(f / "a", changed("lora_B.weight", NAN)), "--spectrum"],
            f"{PREFIX}{Q}.lora_B.weight|24 of 24 values",
        ),
        "overflow": (files(base=HALF, factors=changed("lora_B.weight", HUGE)), f"{Q}.weight"),
        "scale": (merge("--alpha", "1e308", "--weight", "1e10"), "scale"),
    },
    (23, "wrong-input"): {
        "no undo file": (line("unmerge", "base", "adapter", "-o", "OUT"), "no undo file|--approximate"),
    },
    (30, "output-exists"): {
        "folder": (existing("folder"), "exists already|out|-o"),
        "file": (existing("file"), "file stands|out"),
        "link": (existing("link"), "out"),
        "base": (line("merge", "base", "adapter", "-o", "base"), "input|base"),
        "adapter": (line("merge", "base", "adapter", "-o", "adapter"), "input|adapter"),
        "in an input": (lambda w, f: ["merge", w.base, w.adapter, "-o", w.base / "out"], "input|base"),
    },
}
FAULTS: dict[str, Fault] = {
    f"{exit_code} {name}": Fault(exit_code, code, *case)
    for (exit_code, code), cases in TABLE.items()
    for name, case in cases.items()
}
