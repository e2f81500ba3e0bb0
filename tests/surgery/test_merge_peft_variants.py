"""PEFT's own merges of block-diagonal factors and of attention, held against those of files, and taken out again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import quiet
from peft_files import Saved, net, saved
from round_trips import Trip, round_trip
from safetensors.torch import load_file, save_file
from undo_reader import restore
from undo_world import Raw, read_raw, read_undo

from lora_cli.errors import ShapeError
from lora_cli.surgery.merge import plan_merge

BLOCKS: dict[str, Any] = {
    "target_modules": ["up_proj", "down_proj"],
    "use_bdlora": {"target_modules_bd_a": ["down"], "target_modules_bd_b": ["up_proj"], "nblocks": 2},
}
ATTENTION: dict[str, Any] = {"target_modules": ["attn", "self_attn"], "lora_bias": True}


def trip_of(folder: Path, dtype: torch.dtype, config: dict[str, Any]) -> tuple[Saved, Trip]:
    """There and back from files, of an adapter that was trained in float64."""
    made = saved(folder / "adapter", net(), **config)
    made.write({key: tensor.float() for key, tensor in made.tensors().items()})
    (folder / "base").mkdir()
    base = {key: tensor.to(dtype) for key, tensor in made.before.items()}
    save_file(base, folder / "base" / "model.safetensors", {"format": "pt"})
    (folder / "base" / "config.json").write_text("{}")
    return made, round_trip(folder, folder / "base", [made.folder])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", [BLOCKS, ATTENTION], ids=["blocks", "attention"])
def test_as_peft_merges(tmp_path: Path, dtype: torch.dtype, config: dict[str, Any]) -> None:
    made, trip = trip_of(tmp_path, dtype, config)
    with quiet():
        expected = made.model.float().double().merge_and_unload().state_dict()
    found = load_file(trip.merged / "model.safetensors")
    assert found.keys() == expected.keys()
    changed = {key for key, tensor in found.items() if not torch.equal(tensor, made.before[key].to(dtype))}
    if config is BLOCKS:
        assert changed == {"up_proj.weight", "down_proj.weight"}
    else:
        names = ("in_proj_weight", "out_proj.weight", "out_proj.bias")
        assert changed == {f"{module}.{name}" for module in ("attn", "encoder.self_attn") for name in names}
    for key, tensor in expected.items():
        scale = tensor.abs() + made.before[key].abs() + (tensor - made.before[key]).abs()
        assert bool(((found[key].double() - tensor).abs() <= scale * torch.finfo(dtype).eps).all()), key


def test_another_reader_of_undo_files_expands_blocks(tmp_path: Path) -> None:
    made, trip = trip_of(tmp_path, torch.bfloat16, BLOCKS)
    manifest, parts = read_undo(next(trip.merged.glob("*.undo")))
    there = read_raw(trip.merged / "model.safetensors")[1]
    base = read_raw(tmp_path / "base" / "model.safetensors")[1]
    factors = read_raw(made.folder / "adapter_model.safetensors")[1]

    def find(number: int, name: str) -> Raw:
        assert number == 0
        return factors[name]

    (file,) = manifest["files"]
    kinds = set()
    for said in file["tensors"]:
        dtype, _, data = base[said["key"]]
        assert restore(said, parts, there, dtype, find) == data
        kinds |= {(term["kind"], term["blocks"]) for term in said.get("terms", ())}
    assert kinds == {("lora-blocks-a", 2), ("lora-blocks-b", 2)}


def test_blocks_that_the_base_does_not_have(tmp_path: Path) -> None:
    """Shapes of the file alone cannot tell A with blocks from A without; those of the base do."""
    made, _ = trip_of(tmp_path, torch.float32, BLOCKS)
    made.write(use_bdlora=BLOCKS["use_bdlora"] | {"target_modules_bd_a": None, "match_strict": False})
    with pytest.raises(ShapeError) as caught:
        plan_merge(tmp_path / "base", [made.folder])
    assert any("down_proj.weight: [8, 12] in the base" in line for line in caught.value.details)
