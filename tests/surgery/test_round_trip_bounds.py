"""Merge, and unmerge with the undo file: however the work is cut, the same bytes, in the memory that was allowed."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from round_trips import as_raw, contents, digest_of, gaussian, lora, round_trip, weights, write_adapter, write_base

from lora_cli.arithmetic import fragments, residual, undo
from lora_cli.checkpoint import digests
from lora_cli.checkpoint.undo_file import open_undo_file, undo_part
from lora_cli.errors import UsageError
from lora_cli.surgery import budget, engine, filling
from lora_cli.surgery.merge import merge
from lora_cli.surgery.placing import PlanOptions
from lora_cli.surgery.unmerge import unmerge
from lora_cli.surgery.workers import run_units

Patch = pytest.MonkeyPatch

SHAPES = {"x": (37, 45), "c_attn": (25, 37), "wide": (3, 803), "tall": (131, 1), "row": (1, 301)}
MIB = 1 << 20


class World:
    """A base of awkward shapes in three shards: tensors that are changed, replaced, cast, copied and taken along."""

    def __init__(self, folder: Path, dtype: torch.dtype, output: str = "keep") -> None:
        tensors: dict[str, Any] = {
            f"{key}.weight": gaussian(n, *shape, dtype=dtype) for n, (key, shape) in enumerate(SHAPES.items())
        }
        numbers = np.arange(495, dtype="<u1").tobytes()
        tensors |= {"x.bias": gaussian(7, 37, dtype=dtype), "copied": gaussian(8, 60, 7, dtype=dtype)}
        tensors |= {"whole.weight": gaussian(9, 40, 33, dtype=dtype), "whole.ids": ("U8", [99, 5], numbers)}
        tensors |= {
            "n": ("I16", [50, 3], bytes(300)),
            "scalar": ("C64", [], b"76543210"),
            "packed": ("F4", [4, 3], b"654321"),
        }
        factors: dict[str, Any] = lora(100, "x", 37, 45) | lora(110, "c_attn", 37, 25) | lora(120, "wide", 3, 803)
        factors |= {"whole.weight": gaussian(10, 40, 33), "whole.ids": ("U8", [99, 5], numbers[::-1])}
        factors |= {"x.lora_B.bias": gaussian(11, 37), "head.weight": gaussian(12, 50, 9)}
        more = lora(130, "x", 37, 45, rank=9) | lora(140, "tall", 131, 1, rank=9, std=5)
        more |= lora(150, "row", 1, 301, rank=9)
        self.base = write_base(folder / "base", tensors, 3, model_type="gpt2")
        config = {"modules_to_save": ["whole", "head"], "lora_bias": True}
        self.adapters = [write_adapter(folder / "one", factors, **config), write_adapter(folder / "two", more, r=9)]
        self.options = PlanOptions(weights=(1.0, 1.7), dtype=output)


@pytest.fixture(scope="module", params=["bfloat16-keep", "float32-fp16", "float64-keep", "float8_e5m2-keep"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    name, _, output = request.param.partition("-")
    return World(tmp_path_factory.mktemp("world"), getattr(torch, name), output)


def resize(patch: Patch, **sizes: int) -> None:
    for module in (budget, digests, engine, fragments):
        for name, size in sizes.items():
            if hasattr(module, name):
                patch.setattr(module, name, size)


CUTS = {
    "as they are": {},
    "blocks of some rows": {"BLOCK_ELEMENTS": 150},
    "blocks shorter than a row": {"BLOCK_ELEMENTS": 29},
    "cuts of some rows": {"CUT_ELEMENTS": 500},
    "cuts of one row": {"CUT_ELEMENTS": 4, "BLOCK_ELEMENTS": 1000},
    "cuts of blocks": {"CUT_ELEMENTS": 600, "BLOCK_ELEMENTS": 64, "GROUP_BYTES": 200},
    "a group for each block": {"BLOCK_ELEMENTS": 300, "GROUP_BYTES": 1},
}
"""Sizes that are constants otherwise; that of a group is no part of the format."""
WAYS: list[dict[str, Any]] = [{"threads": 1, "memory": 24 * MIB}, {"threads": 5, "memory": 1 << 30}]


@pytest.mark.parametrize("cut", CUTS)
def test_cuts_and_blocks_of_any_size(world: World, tmp_path: Path, cut: str, monkeypatch: Patch) -> None:
    resize(monkeypatch, **CUTS[cut])
    trip = round_trip(tmp_path, world.base, world.adapters, world.options, threads=2)
    said = json.loads((trip.merged / "lora_merge.json").read_text())
    size = CUTS[cut].get("CUT_ELEMENTS", 1 << 25)
    for folder, found in ((trip.merged, said["digests"]), (world.base, said["base"]["digests"])):
        assert found.items() >= {name: digest_of(folder / name, size) for name in weights(folder)}.items()
    for number, how in enumerate(WAYS):
        again, back = tmp_path / f"merged {number}", tmp_path / f"back {number}"
        merge(world.base, world.adapters, again, world.options, **how)
        assert contents(again) == contents(trip.merged)
        unmerge(trip.merged, world.adapters, back, **how)
        assert contents(back) == contents(trip.back)


HOW: list[dict[str, Any]] = [{"threads": number} for number in (1, 2, 3, 8)]
HOW += [{"threads": 4, "memory": size * MIB} for size in (18, 64, 1024)]


@pytest.mark.parametrize("how", HOW, ids=str)
def test_undo_file_and_receipt_have_the_same_bytes(world: World, tmp_path: Path, how: Any, monkeypatch: Patch) -> None:
    def shuffled(units: Iterable[Any], *others: Any, **named: Any) -> Iterator[Any]:
        every = list(units)
        return run_units(random.Random(str(how)).sample(every, len(every)), *others, **named)

    for name, options in (("1", {}), ("2", how)):
        (tmp_path / name).mkdir()
        merge(world.base, world.adapters, tmp_path / name / "merged", world.options, embed_adapter=True, **options)
        unmerge(tmp_path / name / "merged", [], tmp_path / name / "back", **options)
        monkeypatch.setattr(filling, "run_units", shuffled)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


@pytest.mark.parametrize(("dtype", "tight"), [(torch.bfloat16, 12), (torch.float32, 14), (torch.float64, 20)])
def test_blocks_do_not_depend_on_memory(tmp_path: Path, dtype: torch.dtype, tight: int) -> None:
    """Pieces may be longer where there is room for them; blocks may not: they are part of the format."""
    tensors: dict[str, Any] = {"x.weight": gaussian(1, 600, 1000, dtype=dtype)}
    tensors["whole.ids"] = "U8", [900, 1000], bytes(900000)
    factors: dict[str, Any] = lora(2, "x", 600, 1000, std=1)
    factors["whole.ids"] = "U8", [900, 1000], np.random.default_rng(1).bytes(900000)
    base = write_base(tmp_path / "base", tensors)
    adapter = write_adapter(tmp_path / "adapter", factors, modules_to_save=["whole"])
    trip = round_trip(tmp_path / "tight", base, [adapter], threads=1, memory=tight * MIB)
    merge(base, [adapter], tmp_path / "roomy", threads=1, memory=1 << 30)
    assert contents(trip.merged) == contents(tmp_path / "roomy")
    # 262 rows of 1000 are the most that 2^18 elements hold; copied bytes have no rows.
    assert blocks_in(trip.merged, "x.weight", undo.lengths) == 3
    assert blocks_in(trip.merged, "whole.ids", residual.lengths) == 4


def blocks_in(merged: Path, key: str, lengths: fragments.Lengths) -> int:
    part = open_undo_file(merged / "lora_merge.undo").part(undo_part(key))
    with part.shard.source.open() as reader:
        read = fragments.read_fragment(lambda at, size: reader.read(part.offset + at, size), part.nbytes, lengths)
        return len(list(read))


SCRIPT = """
import contextlib, json, pathlib, re, sys
from lora_cli.surgery.merge import merge
from lora_cli.surgery.placing import PlanOptions
from lora_cli.surgery.unmerge import unmerge

peaks, proc = [], pathlib.Path("/proc/self")
for base, adapter, merged, back, output, how in json.loads(sys.argv[1]):
    for work in (
        lambda: merge(base, [adapter], merged, PlanOptions(dtype=output), **how),
        lambda: unmerge(merged, [adapter], back, **how),
    ):
        with contextlib.suppress(OSError):
            proc.joinpath("clear_refs").write_text("5")  # the peak so far is forgotten
        work()
        found = re.search("VmHWM: *\\t *([0-9]+)", proc.joinpath("status").read_text()) if proc.exists() else None
        peaks.append(int(found[1]) if found else 0)
print(json.dumps(peaks))
"""


def in_a_process(jobs: list[list[Any]], **environment: str) -> list[int]:
    """Peak memory of a process in each merge and each unmerge, in KiB; 0 where the system does not tell."""
    command = [sys.executable, "-c", SCRIPT, json.dumps(jobs)]
    done = subprocess.run(command, env=os.environ | environment, check=True, capture_output=True, text=True)
    peaks: list[int] = json.loads(done.stdout)
    return peaks


def test_undo_files_are_the_same_in_every_process(tmp_path: Path) -> None:
    world = World(tmp_path, torch.bfloat16)
    for seed in ("1", "2"):
        (tmp_path / seed).mkdir()
        places = [str(tmp_path / seed / name) for name in ("merged", "back")]
        in_a_process([[str(world.base), str(world.adapters[0]), *places, "keep", {}]], PYTHONHASHSEED=seed)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


COLUMNS = 4000


def write_large(folder: Path, rows: int, dtype: torch.dtype, output: str, std: float) -> list[Any]:
    """A job for `in_a_process`: one tensor in a file of its own, and an adapter for it."""
    base = folder / f"{rows}.safetensors"
    kind, _, raw = as_raw(gaussian(1, 250, COLUMNS, dtype=dtype))
    entry = {"dtype": kind, "shape": [rows, COLUMNS], "data_offsets": [0, dtype.itemsize * rows * COLUMNS]}
    header = json.dumps({"x.weight": entry}).encode()
    with base.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for _ in range(rows // 250):
            file.write(raw)
    adapter = write_adapter(folder / f"adapter {rows}", lora(1, "x", rows, COLUMNS, std=std))
    out = [str(folder / f"{name} {rows}.safetensors") for name in ("merged", "back")]
    return [str(base), str(adapter), *out, output, {"threads": 1, "memory": 16 * MIB}]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere peaks are those of the whole process")
@pytest.mark.parametrize(
    ("dtype", "output", "rows", "mib"),
    [
        (torch.bfloat16, "keep", 2500, 4),  # in all 80 MB, which is more than one cut
        (torch.float32, "bf16", 750, 8),  # half of the tensor goes into the undo file
    ],
)
def test_memory_does_not_grow_with_a_tensor(
    tmp_path: Path, dtype: torch.dtype, output: str, rows: int, mib: int
) -> None:
    jobs = [write_large(tmp_path, times * rows, dtype, output, 0.05) for times in (1, 2, 4)]
    _, _, *small, more, again = in_a_process(jobs)
    assert more - small[0] < mib * 1024
    assert again - small[1] < mib * 1024
    for base, _, _, back, *_ in jobs:
        assert list(contents(Path(base)).values()) == list(contents(Path(back)).values())
    shutil.rmtree(tmp_path)


def test_a_budget_that_cannot_hold_a_block_is_refused(world: World, tmp_path: Path) -> None:
    merge(world.base, world.adapters, tmp_path / "merged", world.options)
    with pytest.raises(UsageError, match="too small"):
        merge(world.base, world.adapters, tmp_path / "no", world.options, memory=6 * MIB)
    with pytest.raises(UsageError, match="too small"):
        unmerge(tmp_path / "merged", world.adapters, tmp_path / "no", memory=6 * MIB)
    merge(world.base, world.adapters, tmp_path / "less", world.options, memory=6 * MIB, undo=False)
    assert not (tmp_path / "no").exists()
