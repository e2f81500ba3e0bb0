"""What a receipt keeps from happening: an adapter merged twice, files of others replaced, stale files left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import save_file
from undo_world import FIRST, RECEIPT, UNDO, World, adapter_tensors, command, contents, lora, read_undo

from lora_cli.errors import OutputExistsError, UnsafeInputError
from lora_cli.surgery.inject import inject
from lora_cli.surgery.merge import merge, plan_merge


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path).write()


# Twice the same adapter


def copied(world: World) -> Path:
    return Path(shutil.copytree(world.adapter, world.folder / "under another name"))


def resaved(world: World) -> Path:
    tensors = dict(reversed(adapter_tensors().items()))
    path = world.write_adapter("resaved", tensors)
    save_file({key: tensors[key] for key in sorted(tensors)}, path / "adapter_model.safetensors", {"by": "me"})
    return path


SAME: dict[str, Callable[[World], Path]] = {
    "itself": lambda world: world.adapter,
    "a copy": copied,
    "saved again": resaved,
    "a link": lambda world: linked(world.folder / "link", world.adapter),
}


def linked(link: Path, to: Path) -> Path:
    link.symlink_to(to)
    return link


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("find", SAME.values(), ids=SAME)
def test_an_adapter_is_not_merged_twice_unawares(world: World, find: Callable[[World], Path], stacked: bool) -> None:
    base = world.merge().merged
    if stacked:
        world.base, world.merged = base, world.folder / "twice"
        base = world.merge(world.write_adapter("b", lora("x", 6, 4, 60))).merged
    adapter = find(world)
    other = world.write_adapter("other", lora("y", 3, 5, 80))
    with world.refused(23) as caught:
        merge(base, [other, adapter], world.out)
    assert caught.value.message == "This adapter is merged into the base already"
    assert caught.value.file == adapter.name
    assert caught.value.found == f"adapter in the receipt of {base.name}"
    assert "--again" in str(caught.value.hint)
    with world.refused(23):
        plan_merge(base, [adapter])
    with world.refused(23):
        merge(base, [adapter], world.out, undo=False)
    assert command("-q", "merge", base, adapter, "-o", world.out, "--dry-run") == 23
    assert not world.out.exists()
    merge(base, [adapter], world.out, again=True)
    assert plan_merge(base, [adapter], again=True).adapters


@pytest.mark.parametrize("approximate", [False, True])
def test_what_was_taken_out_can_be_merged_again(world: World, approximate: bool) -> None:
    world.write_adapter("adapter", lora("x", 6, 4, 10))
    world.merge().unmerge(approximate=approximate)
    merge(world.out, [world.adapter], world.place / "again")
    assert "earlier" not in json.loads((world.place / "again" / RECEIPT).read_text())
    if not approximate:
        assert (world.place / "again" / FIRST).read_bytes() == (world.merged / FIRST).read_bytes()


def test_of_a_stack_only_what_was_taken_out_can_be_merged_again(world: World) -> None:
    second = world.write_adapter("second", lora("x", 6, 4, 60))
    world.merge()
    world.base, world.merged = world.merged, world.folder / "twice"
    world.merge(second).unmerge(second)
    assert plan_merge(world.out, [second]).adapters
    with world.refused(23):
        plan_merge(world.out, [world.adapter])


def test_another_adapter_is_merged(world: World) -> None:
    merged = world.merge().merged
    for name, change in {"one bit": 1.0000001, "all": -1.0}.items():
        tensors = {key: tensor * change for key, tensor in adapter_tensors().items()}
        assert plan_merge(merged, [world.write_adapter(name, tensors)]).adapters
    wider = {key: tensor.to(torch.float64) for key, tensor in adapter_tensors().items()}
    assert plan_merge(merged, [world.write_adapter("wider", wider)]).adapters


FOREIGN: dict[str, bytes] = {
    "empty": b"",
    "no JSON": b"{",
    "a list": b"[]",
    "not UTF-8": b"\xff\xfe",
    "of somebody": b'{"schema": "mine/1", "adapters": [{"digest": "x"}]}',
    "of another version": b'{"schema": "lora-cli/receipt/2", "operation": "merge"}',
    "half of ours": b'{"schema": "lora-cli/receipt/1", "operation": "merge", "adapters": 3, "earlier": [1]}',
    "odd adapters": b'{"schema": "lora-cli/receipt/1", "operation": "merge", "adapters": [1, {"digest": 1}, null]}',
    "no operation": b'{"schema": "lora-cli/receipt/1", "files": 7, "bytes": []}',
    "odd operation": b'{"schema": "lora-cli/receipt/1", "operation": ["merge"], "earlier": {"operation": "merge"}}',
    "twice a key": b'{"schema": "lora-cli/receipt/1", "schema": "x"}',
    "deep": b'{"schema": "lora-cli/receipt/1", "operation": "merge", "earlier": ' + b"[" * 5000 + b"]" * 5000 + b"}",
}


@pytest.mark.parametrize("data", FOREIGN.values(), ids=FOREIGN)
def test_a_receipt_that_is_damaged_or_of_somebody_else_is_no_obstacle(world: World, data: bytes) -> None:
    (world.base / RECEIPT).write_bytes(data)
    said = json.loads((world.merge().merged / RECEIPT).read_text())
    assert said["operation"] == "merge"
    # It comes back too, whatever it is.
    world.restored()


def test_a_link_that_leads_out_is_no_file_of_ours(world: World, tmp_path: Path) -> None:
    """What is somewhere else on this machine must not come into an undo file, nor be taken for what a run wrote."""
    secret = tmp_path / "secret"
    secret.write_text("secret " * 100)
    (world.base / RECEIPT).symlink_to(secret)
    with pytest.raises(UnsafeInputError, match=RECEIPT):
        world.merge()
    (world.base / RECEIPT).unlink()
    for name in (UNDO, "lora_wrap.json", "notes.txt"):
        (world.base / name).symlink_to(secret)
    world.merge()
    manifest, parts = read_undo(world.merged / UNDO)
    assert not [name for name in parts if name.startswith("side/lora")]
    assert sorted(manifest["left_out"]) == [UNDO, "lora_wrap.json", "notes.txt"]
    assert world.unmerge().exact
    assert {path.name for path in world.base.iterdir() if not path.is_symlink()} == contents(world.out).keys() - {
        "lora_unmerge.json"
    }


# What --force leaves


def bare(world: World) -> tuple[Path, Path]:
    return world.base / FIRST, world.write_adapter("one", lora("x", 6, 4, 90))


def test_what_was_left_alone_beside_a_name_is_not_removed(world: World) -> None:
    """Tensors may be moved; the undo file that stays is the only way back for them."""
    base, adapter = bare(world)
    out = world.place / "out.safetensors"
    merge(base, [adapter], out)
    out.rename(world.place / "elsewhere.safetensors")
    before = contents(world.place)
    with pytest.raises(OutputExistsError, match=f"out.{RECEIPT}"):
        inject(base, out, rank=1, layout="wrapped")
    assert contents(world.place) == before
    inject(base, out, rank=1, layout="wrapped", force=True)
    assert not (world.place / f"out.{UNDO}").exists()


def test_a_bare_file_that_is_replaced_without_an_undo_file_keeps_no_stale_one(world: World) -> None:
    base, adapter = bare(world)
    out = world.place / "out.safetensors"
    merge(base, [adapter], out)
    assert sorted(contents(world.place)) == [f"out.{RECEIPT}", f"out.{UNDO}", "out.safetensors"]
    (world.place / "out.txt").write_text("mine")
    (world.place / f"other.{UNDO}").write_text("mine")
    result = merge(base, [adapter], out, undo=False, force=True)
    assert sorted(contents(world.place)) == [f"other.{UNDO}", f"out.{RECEIPT}", "out.safetensors", "out.txt"]
    assert sorted(result.files) == [f"out.{RECEIPT}", "out.safetensors"]


def test_nothing_goes_but_files_of_ours_whatever_a_receipt_lists(world: World) -> None:
    base, adapter = bare(world)
    out = world.place / "out.safetensors"
    merge(base, [adapter], out)
    mine = ("out.txt", "other.lora_merge.undo", "out.lora_mine.json")
    said = json.loads((world.place / f"out.{RECEIPT}").read_text())
    tiny.write_json(world.place / f"out.{RECEIPT}", said | {"files": [*said["files"], *mine, "../base/config.json"]})
    for name in mine:
        (world.place / name).write_text("mine")
    merge(base, [adapter], out, undo=False, force=True)
    assert sorted(contents(world.place)) == sorted([f"out.{RECEIPT}", "out.safetensors", *mine])
    assert (world.base / "config.json").exists()


def test_a_receipt_of_another_kind_lets_nothing_be_replaced(world: World) -> None:
    base, adapter = bare(world)
    for out, given in ((world.place / "out.safetensors", base), (world.out, world.base)):
        merge(given, [adapter], out)
        place = world.out / RECEIPT if out == world.out else world.place / f"out.{RECEIPT}"
        said = json.loads(place.read_text())
        tiny.write_json(place, said | {"schema": "lora-cli/receipt/2"})
        with world.refused(30):
            merge(given, [adapter], out, force=True)
        # Nor does it say that an adapter was merged.
        assert plan_merge(out, [adapter]).adapters


def test_an_output_that_lacks_a_file_is_replaced_too(world: World) -> None:
    merge(world.base, [world.adapter], world.out)
    (world.out / "tokenizer.json").unlink()
    merge(world.base, [world.adapter], world.out, force=True)
    (world.out / "tokenizer.json").write_text("mine")
    with world.refused(30):
        merge(world.base, [world.adapter], world.out, force=True)


def test_an_undo_file_that_no_receipt_lists_stays(world: World) -> None:
    base, adapter = bare(world)
    out = world.place / "out.safetensors"
    merge(base, [adapter], out, undo=False)
    (world.place / f"out.{UNDO}").write_text("mine")
    for undo in (False, True):
        with world.refused(30) as caught:
            merge(base, [adapter], out, undo=undo, force=True)
        assert caught.value.file == str(world.place / f"out.{UNDO}")


@pytest.mark.parametrize("said", [{"files": 7}, {"files": ["out.lora_merge.undo", 3]}, {"bytes": {"a" * 300: 1}}])
def test_a_receipt_beside_that_makes_no_sense(world: World, said: dict[str, Any]) -> None:
    base, adapter = bare(world)
    out = world.place / "out.safetensors"
    merge(base, [adapter], out, undo=False)
    tiny.write_json(world.place / "out.lora_unmerge.json", {"schema": "lora-cli/receipt/1"} | said)
    merge(base, [adapter], out, undo=False, force=True)
    assert sorted(contents(world.place)) == [f"out.{RECEIPT}", "out.safetensors"]


def test_a_receipt_that_lists_files_of_others_lets_none_of_them_be_replaced(world: World) -> None:
    """Whoever sends a folder could list in its receipt what its new owner may put there."""
    merge(world.base, [world.adapter], world.out)
    said = json.loads((world.out / RECEIPT).read_text())
    mine = {"notes.txt": 4, "deep/thesis.tex": 4, "config.json.bak": 4}
    for name in mine:
        (world.out / name).parent.mkdir(exist_ok=True)
        (world.out / name).write_text("mine")
    tiny.write_json(world.out / RECEIPT, said | {"files": [*said["files"], *mine, "deep"]})
    with world.refused(30):
        merge(world.base, [world.adapter], world.out, force=True)


def test_a_folder_whose_receipt_makes_no_sense_is_not_replaced(world: World) -> None:
    for said in ({}, {"files": ["a" * 300], "bytes": {"a" * 300: 1}}, {"files": [["x"]], "bytes": {"\0": 1}}):
        shutil.rmtree(world.out, ignore_errors=True)
        world.out.mkdir()
        tiny.write_json(world.out / RECEIPT, {"schema": "lora-cli/receipt/1"} | said)
        with world.refused(30):
            merge(world.base, [world.adapter], world.out, force=True)


def test_force_in_a_folder_leaves_nothing_of_before(world: World) -> None:
    merge(world.base, [world.adapter], world.out)
    merge(world.base, [world.adapter], world.out, undo=False, force=True)
    assert sorted(contents(world.out)) == sorted(json.loads((world.out / RECEIPT).read_text())["files"])
    assert UNDO not in contents(world.out)
