"""Undo files of merges that are more than sums, for a second reader that was written from their page alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from special_worlds import WORLDS, World
from undo_reader import restore
from undo_world import Raw, read_raw, read_undo

from lora_cli.surgery.merge import merge
from lora_cli.surgery.placing import PlanOptions

BF16, F32, E5M2 = torch.bfloat16, torch.float32, torch.float8_e5m2
CASES = [("dora", BF16, "keep"), ("fused", F32, "keep"), ("fused", E5M2, "keep"), ("rotary", BF16, "fp32")]
CASES += [("parts", F32, "bf16"), ("parts", torch.float16, "keep"), ("lengthened head", E5M2, "fp16")]
CASES += [(name, BF16, "keep") for name in ("rows", "resized", "repeated", "shortened", "initial")]


def read_all(folder: Path) -> dict[str, Raw]:
    return {key: raw for path in sorted(folder.glob("*.safetensors")) for key, raw in read_raw(path)[1].items()}


@pytest.mark.parametrize(("name", "dtype", "output"), CASES, ids=str)
def test_another_reader_finds_the_base(tmp_path: Path, name: str, dtype: torch.dtype, output: str) -> None:
    assert_read_again(WORLDS[name](tmp_path, dtype, 2), output, tmp_path)


def assert_read_again(world: World, output: str, folder: Path) -> set[str]:
    """Merge, and see that the other reader gets every byte; returns the kinds of what was merged."""
    options = PlanOptions(world.options.weights, output, read=world.options.read)
    merge(world.base, world.adapters, folder / "merged", options, embed_adapter=True, threads=1)
    manifest, parts = read_undo(folder / "merged" / "lora_merge.undo")
    there, base = read_all(folder / "merged"), read_all(world.base)

    def find(number: int, factor: str) -> Raw:
        return parts[f"factor/{number}/{factor}"]

    records = [said for file in manifest["files"] for said in file["tensors"]]
    found = {said["key"]: restore(said, parts, there, base[said["key"]][0], find) for said in records}
    assert found == {key: data for key, (_, _, data) in base.items()}
    return {term["kind"] for said in records for term in said.get("terms", ())}
