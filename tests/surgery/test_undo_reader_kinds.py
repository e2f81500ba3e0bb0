"""Undo files of merges that are more than sums on whole tensors: read by a second reader, written from the page alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from special_worlds import WORLDS
from undo_reader import restore
from undo_world import Raw, read_raw, read_undo

from lora_cli.surgery.merge import merge

E = pytest.mark.parametrize


def read_all(folder: Path) -> dict[str, Raw]:
    return {key: raw for path in sorted(folder.glob("*.safetensors")) for key, raw in read_raw(path)[1].items()}


@E("dtype", [torch.bfloat16, torch.float32, torch.float8_e5m2], ids=str)
@E("name", WORLDS)
def test_another_reader_finds_the_base(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    world = WORLDS[name](tmp_path, dtype, 2)
    merge(world.base, world.adapters, tmp_path / "merged", world.options, embed_adapter=True)
    manifest, parts = read_undo(tmp_path / "merged" / "lora_merge.undo")
    there, base = read_all(tmp_path / "merged"), read_all(world.base)

    def find(number: int, factor: str) -> Raw:
        return parts[f"factor/{number}/{factor}"]

    found = {}
    for file in manifest["files"]:
        for said in file["tensors"]:
            found[said["key"]] = restore(said, parts, there, base[said["key"]][0], find)
    assert found == {key: data for key, (_, _, data) in base.items()}
