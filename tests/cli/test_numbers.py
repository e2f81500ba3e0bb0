"""What the program says in numbers, held against the files that it read and wrote; and dry runs, which write none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_world import Call, World, call_fixture, world_fixture  # noqa: F401 (fixtures)
from safetensors import safe_open
from tiny import (
    ALPHA,
    LAYERS,
    MODULES,
    PREFIX,
    RANK,
    WIDTH,
    adapter_tensors,
    base_tensors,
    listing,
    numbers,
    out_of,
    read_tensors,
    write_adapter,
    write_base,
)

MERGES = {
    "folder": ("base", "adapter", "out", ()),
    "one shard": ("single", "adapter", "out", ()),
    "file from a folder": ("single", "adapter", "out.safetensors", ()),
    "file": ("file", "plain", "out.safetensors", ("--alpha", "4")),
    "cast": ("base", "adapter", "out", ("--dtype", "bf16")),
}
every_merge = pytest.mark.parametrize(("base", "adapter", "out", "more"), MERGES.values(), ids=MERGES.keys())


def files_of(out: Path) -> dict[str, int]:
    """Every file of an output with its length: those of a folder, or those beside a file with its stem."""
    paths = (
        [path for path in out.rglob("*") if path.is_file()] if out.is_dir() else list(out.parent.glob(f"{out.stem}.*"))
    )
    return {path.relative_to(out if out.is_dir() else out.parent).as_posix(): path.stat().st_size for path in paths}


def spans(path: Path) -> dict[str, tuple[int, int, str, list[int]]]:
    """Begin, end, type and shape of each tensor, from the header as it lies there."""
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return {
        key: (*entry["data_offsets"], entry["dtype"], entry["shape"])
        for key, entry in header.items()
        if key != "__metadata__"
    }


@every_merge
def test_a_merge_says_what_it_wrote(
    call: Call, world: World, tmp_path: Path, base: str, adapter: str, out: str, more: tuple[str, ...]
) -> None:
    line = ["merge", getattr(world, base), getattr(world, adapter), "-o", tmp_path / out, *more]
    said = call(*line, "--json").document
    written = files_of(tmp_path / out)
    assert said["out"] == str(tmp_path / out)
    assert sorted(said["files"]) == sorted(written)
    assert said["bytes_written"] == sum(written.values())
    assert said["seconds"] > 0
    assert said["peak_rss_bytes"] > 10_000_000
    assert_counts(said, len(base_tensors()), bf16=bool(more) and more[0] == "--dtype")


def assert_counts(said: dict[str, Any], total: int, *, bf16: bool) -> None:
    """Tensors of the output by what happened to them, and tensors of the adapter by what became of them."""
    edited = total - 1 if bf16 else len(MODULES)  # the integers are not cast
    assert said["tensors"] == {"total": total, "edited": edited, "copied": total - edited, "added": 0, "dropped": 0}
    assert said["ledger"] == {"applied": 2 * len(MODULES), "replaced": 0, "added": 0, "ignored": 0}
    (used,) = said["adapters"]
    scales = [entry if isinstance(entry, list) else [*entry.values()] for entry in used["scales"]]
    assert [(scale, count) for scale, _, count in scales] == [(ALPHA / RANK, len(MODULES))]


def test_the_ledger_accounts_for_every_tensor(call: Call, world: World, tmp_path: Path) -> None:
    tensors = adapter_tensors() | {
        f"{PREFIX}lm_head.weight": numbers(20, WIDTH),
        f"{PREFIX}classifier.weight": numbers(3, WIDTH),
        f"{PREFIX}model.norm.original_module.weight": numbers(3),
        f"{PREFIX}nowhere.lora_A.weight": numbers(2, 3),
        f"{PREFIX}nowhere.lora_B.weight": numbers(3, 2),
    }
    adapter = write_adapter(tmp_path / "a", tensors, modules_to_save=["lm_head", "classifier"], task_type="SEQ_CLS")
    out = tmp_path / "out"
    said = call("--json", "merge", world.base, adapter, "-o", out, "--allow-unmapped").document
    assert sorted(entry["tensor"] for entry in said["entries"]) == sorted(tensors)
    outcomes = {entry["tensor"].removeprefix(PREFIX): entry["outcome"] for entry in said["entries"]}
    assert outcomes["lm_head.weight"] == "replaced"
    assert outcomes["classifier.weight"] == "added"
    assert all(entry["reason"] for entry in said["entries"] if entry["outcome"] == "ignored")
    assert said["ledger"] == {"applied": 8, "replaced": 1, "added": 1, "ignored": 3}
    merged, before = read_tensors(out), read_tensors(world.base)
    assert set(merged) - set(before) == {"classifier.weight"}
    changed = {key for key in before if merged[key].tobytes() != before[key].tobytes()}
    assert len(changed) == said["tensors"]["edited"] == len(MODULES) + 1
    assert said["tensors"]["copied"] == len(before) - len(changed)
    assert {entry["key"] for entry in said["entries"] if entry["outcome"] in ("applied", "replaced")} == changed


@every_merge
def test_the_plan_is_what_is_then_written(
    call: Call, world: World, tmp_path: Path, base: str, adapter: str, out: str, more: tuple[str, ...]
) -> None:
    line = ["merge", getattr(world, base), getattr(world, adapter), "-o", tmp_path / out, *more]
    plan = call(*line, "--dry-run", "--json").document
    assert list(tmp_path.iterdir()) == []
    assert call(*line).code == 0
    written = {name: size for name, size in files_of(tmp_path / out).items() if "lora_merge" not in name}
    names = [out] if out.endswith(".safetensors") else [file["name"] for file in plan["files"]]
    for name, file in zip(names, plan["files"], strict=True):
        path = tmp_path / out if out.endswith(".safetensors") else tmp_path / out / name
        planned = {e["key"]: (e["begin"], e["end"], e["dtype"], e["shape"]) for e in file["edits"]}
        assert planned == spans(path)
        assert file["bytes"] == path.stat().st_size
        assert file["header_bytes"] == file["bytes"] - max(end for _, end, _, _ in planned.values())
    assert plan["bytes_to_write"] == sum(written.values())
    sides = {side["name"]: side["bytes"] for side in plan["side_files"]}
    assert sides == {name: size for name, size in written.items() if name not in names}
    assert_counts(plan, len(base_tensors()), bf16=bool(more) and more[0] == "--dtype")


DRY = {
    "merge": "merge {base} {adapter} -o {out} --dry-run",
    "merge to nowhere": "merge {base} {adapter} --dry-run",
    "unmerge": "unmerge {merged} {adapter} --approximate -o {out} --dry-run",
}


@pytest.mark.parametrize("flags", [(), ("--json",), ("-q",), ("-v",)], ids=["text", "json", "quiet", "verbose"])
@pytest.mark.parametrize("line", DRY.values(), ids=DRY.keys())
def test_a_dry_run_writes_nothing(call: Call, world: World, tmp_path: Path, line: str, flags: tuple[str, ...]) -> None:
    before = listing(world.base.parent), listing(tmp_path)
    ran = call(*world.fill(tuple(line.split()), tmp_path), *flags)
    assert ran.code == 0
    assert (listing(world.base.parent), listing(tmp_path)) == before
    if not flags:
        for word in ("nothing was written", "reads", "writes", "buffers", *(f"{module}.weight" for module in MODULES)):
            assert word in ran.out
        assert ("free disk" in ran.out) == ("{out}" in line)
    if flags == ("--json",):
        assert (ran.document["free_disk_bytes"] is None) == ("{out}" not in line)
        assert ran.document["fits"] in (True, None)


def test_a_dry_run_refuses_what_the_run_would_refuse(call: Call, world: World) -> None:
    assert call("merge", world.base, world.adapter, "-o", world.merged, "--dry-run").code == 30
    assert call("merge", world.base, world.adapter, "-o", "no/such/folder", "--dry-run").code == 2
    assert call("unmerge", world.base, world.adapter, "--dry-run").code == 23


def test_a_dry_run_says_what_the_run_would_warn_of(call: Call, world: World, tmp_path: Path) -> None:
    """A tokenizer that differs is taken or not before a byte is written, so it must be known before."""
    adapter = write_adapter(tmp_path / "a")
    (adapter / "tokenizer.json").write_text("{}")
    line = ["merge", world.base, adapter, "-o", tmp_path / "out"]
    dry, real = call(*line, "--dry-run"), call(*line)
    assert real.err.count("tokenizer.json") == 1
    assert dry.err.count("tokenizer.json") == 1
    assert "warning: " in dry.err


def test_each_warning_is_said_once(call: Call, world: World, tmp_path: Path) -> None:
    base = write_base(tmp_path / "b")
    (base / "extra.safetensors").write_bytes(b"")
    for line in (["inspect", base], ["merge", base, world.adapter, "-o", tmp_path / "out"]):
        ran = call(*line)
        told = [text for text in ran.err.splitlines() if text.startswith("warning: ") and "extra.safetensors" in text]
        assert len(told) == 1, ran.err


def test_verify_counts_tensors_and_elements(call: Call, world: World) -> None:
    line = ["verify", world.merged, "--base", world.base, "--adapter", world.adapter, "--json"]
    right = call(*line).document
    total = len(base_tensors())
    assert (right["verified"], right["tensors"], right["different"]) == (True, {"checked": total, "different": 0}, [])
    wrong = call("verify", world.base, *line[2:]).document
    merged, before = read_tensors(world.merged), read_tensors(world.base)
    assert wrong["tensors"] == {"checked": total, "different": len(MODULES)}
    assert {entry["key"]: entry["elements"] for entry in wrong["different"]} == {
        f"{module}.weight": int(np.sum(merged[f"{module}.weight"] != before[f"{module}.weight"])) for module in MODULES
    }


def test_unmerge_counts_weights_and_names_its_files(call: Call, world: World, tmp_path: Path) -> None:
    line = ["unmerge", world.merged, world.adapter, "-o", tmp_path / "out", "--approximate", "--json"]
    said = call(*line).document
    base, back = read_tensors(world.base), read_tensors(tmp_path / "out")
    assert said["exact"] is (said["undecided"] == [])
    for entry in said["undecided"]:
        assert entry["elements"] == base[entry["key"]].size == entry["exact"] + entry["undecided"] + entry["impossible"]
        assert np.sum(back[entry["key"]] != base[entry["key"]]) <= entry["undecided"]
    assert said["tensors"]["edited"] == len(MODULES)
    # The contract has `files: [{name, digest}]`; a list of names could not become that later.
    assert sorted(file["name"] for file in said["files"]) == sorted(files_of(tmp_path / "out"))


@pytest.mark.parametrize("name", ["base", "single", "file", "merged"])
def test_inspect_counts_a_checkpoint(call: Call, world: World, name: str) -> None:
    path: Path = getattr(world, name)
    said, tensors = call("--json", "inspect", path).document, base_tensors()
    shards = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    assert said["kind"] == ("merged" if name == "merged" else "checkpoint")
    assert said["parameters"] == sum(tensor.size for tensor in tensors.values())
    assert said["bytes"] == sum(shard.stat().st_size for shard in shards)
    assert said["shards"] == [shard.name for shard in shards]
    assert said["dtypes"] == {"F32": len(tensors) - 1, "I64": 1}
    found = {entry["key"]: (entry["shape"], entry["shard"]) for entry in said["tensors"]}
    for shard in shards:
        with safe_open(shard, framework="numpy") as opened:
            for key in opened.keys():  # noqa: SIM118
                assert found.pop(key) == (list(opened.get_slice(key).get_shape()), shard.name)
    assert found == {}
    assert (said["receipt"] or {}).get("operation") == ("merge" if name == "merged" else None)


@pytest.mark.parametrize("more", [(), ("--base",)])
def test_inspect_counts_an_adapter(call: Call, world: World, more: tuple[str, ...]) -> None:
    said = call("--json", "inspect", world.adapter, *more, *([world.base] if more else [])).document
    tensors = adapter_tensors()
    assert said["parameters"] == sum(tensor.size for tensor in tensors.values())
    assert said["bytes"] == (world.adapter / "adapter_model.safetensors").stat().st_size
    assert said["dtypes"] == {"F32": len(tensors)}
    for entry in said["modules"]:
        assert entry["shape"] == [out_of(entry["module"]), WIDTH]
        assert (entry["rank"], entry["alpha"], entry["scale"]) == (RANK, ALPHA, ALPHA / RANK)
        assert entry["scale_source"] == "lora_alpha / r"
        assert entry["key"] == (f"{entry['module']}.weight" if more else None)
    assert sorted(entry["module"] for entry in said["modules"]) == sorted(MODULES)
    assert len(said["modules"]) == 2 * LAYERS
