"""Merges that are more than sums on whole tensors, and back: however the work is cut, the same bytes and every file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import read_tensors
from round_trips import Listener, contents, round_trip, weights
from special_worlds import WORLDS, World
from test_merge_oracles import overwrite

from lora_cli.arithmetic import fragments
from lora_cli.checkpoint import digests
from lora_cli.surgery import budget, engine, gains, products
from lora_cli.surgery.merge import merge
from lora_cli.surgery.placing import PlanOptions
from lora_cli.surgery.unmerge import unmerge
from lora_cli.surgery.verify import verify

MIB = 1 << 20
TYPES = (torch.bfloat16, torch.float32, torch.float16, torch.float8_e5m2)
every_world = pytest.mark.parametrize("name", WORLDS)
ONE_TYPE_EACH = [(name, TYPES[at % len(TYPES)]) for at, name in enumerate(WORLDS)]
one_type_each = pytest.mark.parametrize(("name", "dtype"), ONE_TYPE_EACH, ids=str)


def trip(folder: Path, world: World, options: PlanOptions | None = None, **how: Any) -> Path:
    """There and back; returns what was merged."""
    given = how.pop("given", world.given)
    folder.mkdir(exist_ok=True)
    return round_trip(folder, world.base, world.adapters, options or world.options, given=given, **how).merged


@every_world
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_file_comes_back(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    world = WORLDS[name](tmp_path, dtype, 2)
    merged = trip(tmp_path, world, threads=1)
    assert verify(merged, world.base, world.adapters, world.options, roundtrip=True, threads=1).verified
    assert verify(merged, None, world.given, roundtrip=True, threads=1).verified


@one_type_each
@pytest.mark.parametrize("output", ["bf16", "fp32", "fp16"])
def test_in_another_type(tmp_path: Path, name: str, dtype: torch.dtype, output: str) -> None:
    world = WORLDS[name](tmp_path, dtype, 1)
    options = replace(world.options, dtype=output)
    merged = trip(tmp_path, world, options, embed=True, given=[], threads=1)
    assert verify(merged, world.base, world.adapters, options, roundtrip=True, threads=1).verified


@one_type_each
def test_one_merge_on_top_of_another(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    """They come off one by one, whatever the first made of names, sizes and the config."""
    world = WORLDS[name](tmp_path, dtype, 2)
    merged, adapters = trip(tmp_path, world, threads=1), list(world.on_top) or world.adapters
    options = PlanOptions() if world.on_top else world.options
    merge(merged, adapters, tmp_path / "twice", options, again=True, threads=1)
    assert weights(tmp_path / "twice") != weights(merged)
    unmerge(tmp_path / "twice", [*adapters, *world.befores], tmp_path / "once", threads=1)
    unmerge(tmp_path / "once", world.given, tmp_path / "never", threads=1)
    for found, before in ((tmp_path / "once", merged), (tmp_path / "never", world.base)):
        assert contents(found).items() >= contents(before).items()
        assert {*contents(found)} - {*contents(before)} == {"lora_unmerge.json"}


# How the work is cut


CUTS: Mapping[str, Mapping[str, int]] = {
    "blocks of some rows": {"BLOCK_ELEMENTS": 150},
    "blocks shorter than a row": {"BLOCK_ELEMENTS": 29},
    "blocks and cuts": {"CUT_ELEMENTS": 600, "BLOCK_ELEMENTS": 64, "GROUP_BYTES": 200},
    "tiles shorter than a row": {"TILE_ELEMENTS": 37, "TILE_COLUMNS": 16, "CUT_ELEMENTS": 4},
}


@one_type_each
@pytest.mark.parametrize("cut", CUTS)
def test_cuts_and_blocks_do_not_show(
    tmp_path: Path, name: str, dtype: torch.dtype, cut: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = WORLDS[name](tmp_path, dtype, 1)
    merge(world.base, world.adapters, tmp_path / "as it is", world.options, undo=False, threads=1)
    for module in (budget, digests, engine, fragments, gains, products):
        for size, number in CUTS[cut].items():
            if hasattr(module, size):
                monkeypatch.setattr(module, size, number)
    merged = trip(tmp_path, world, threads=1)
    assert weights(merged) == weights(tmp_path / "as it is")


@one_type_each
def test_memory_and_threads_do_not_show(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    world = WORLDS[name](tmp_path, dtype, 2)
    merged = trip(tmp_path, world, threads=1)
    ways: list[dict[str, Any]] = [{"threads": 1, "memory": 24 * MIB}, {"threads": 5, "memory": 1 << 30}]
    for number, how in enumerate(ways):
        merge(world.base, world.adapters, tmp_path / f"merged {number}", world.options, **how)
        assert contents(tmp_path / f"merged {number}") == contents(merged)
        unmerge(merged, world.given, tmp_path / f"back {number}", **how)
        assert contents(tmp_path / f"back {number}").items() >= contents(world.base).items()


@one_type_each
def test_shards_do_not_show(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    found = []
    for shards in (1, 3):
        world = WORLDS[name](tmp_path / str(shards), dtype, shards)
        merged = trip(tmp_path / str(shards), world, threads=1)
        found.append({key: bits(tensor) for key, tensor in read_tensors(merged).items()})
    assert found[0] == found[1]


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


# At weight 0


REBUILT = {"repeated", "shortened"}
"""Where an adapter is for a model of other layers, these are those of the output, changed or not."""


@one_type_each
def test_at_weight_0_nothing_changes(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    world = WORLDS[name](tmp_path, dtype, 2)
    adapters = world.adapters[:1] if name == "resized" else world.adapters  # the other fits the new size alone
    options = replace(world.options, weights=(0.0,) * len(adapters))
    result = merge(world.base, adapters, tmp_path / "merged", options, threads=1)
    assert {entry.outcome for entry in result.entries} <= {"applied", "ignored"}
    if name in REBUILT:
        before = {bits(tensor) for tensor in read_tensors(world.base).values()}
        assert {bits(tensor) for tensor in read_tensors(tmp_path / "merged").values()} <= before
        return
    found = contents(tmp_path / "merged")
    assert {file: found[file] for file in contents(world.base) if file != "README.md"} == {
        file: digest for file, digest in contents(world.base).items() if file != "README.md"
    }
    assert verify(tmp_path / "merged", world.base, adapters, options, roundtrip=True, threads=1).verified


def test_rows_stay_where_nothing_says_what_they_were(tmp_path: Path) -> None:
    """Without an undo file what was added comes off; of rows that were replaced nothing is claimed."""
    world = WORLDS["rows"](tmp_path, torch.bfloat16, 1)
    listener, key = Listener(), "model.embed_tokens.weight"
    merge(world.base, world.adapters, tmp_path / "merged", world.options, undo=False)
    merged = read_tensors(tmp_path / "merged")[key].clone()
    merged[7] *= 3  # somebody's, since
    overwrite(tmp_path / "merged", key, merged)
    result = unmerge(
        tmp_path / "merged", world.adapters, tmp_path / "back", world.options, approximate=True, progress=listener
    )
    base, back = (read_tensors(path)[key] for path in (world.base, tmp_path / "back"))
    rows = torch.zeros(33, dtype=torch.bool)
    rows[[32, 0, 7]] = True
    assert torch.equal(back[rows], merged[rows])
    assert float((back[~rows] == base[~rows]).float().mean()) > 0.9
    (proof,) = [proof for proof in result.undecided if proof.key == key]
    assert (result.exact, result.kept, proof.impossible) == (False, (key,), 0)
    assert proof.undecided >= int(rows.sum()) * 12
    assert int((back[~rows] != base[~rows]).sum()) <= proof.undecided - int(rows.sum()) * 12
    assert any(text.startswith(f"{key}: the adapter replaced it, or rows of it") for text in listener.told)


def test_rows_are_not_rounded_to_a_type_that_the_output_does_not_have(tmp_path: Path) -> None:
    """Trained in float32 and written in float32: the base's 16 bits are not between."""
    world = WORLDS["rows"](tmp_path, torch.bfloat16, 1)
    options = replace(world.options, dtype="fp32")
    merge(world.base, world.adapters, tmp_path / "merged", options, undo=False)
    held = read_tensors(world.adapters[0])
    trained = held["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"].double()
    a, b = (held[f"base_model.model.model.embed_tokens.lora_embedding_{side}"].double() for side in "AB")
    said = json.loads((world.adapters[0] / "adapter_config.json").read_text())
    expected = trained + said["lora_alpha"] / said["r"] * (b @ a).T[[32, 0, 7]]
    found = read_tensors(tmp_path / "merged")["model.embed_tokens.weight"][[32, 0, 7]].double()
    assert float((found - expected).abs().max()) < 1e-6 * float(expected.abs().max())
