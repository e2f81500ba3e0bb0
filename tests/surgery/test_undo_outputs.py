"""Where an exact unmerge writes, what it says of small files that changed meanwhile, and what --force may replace."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from undo_world import FIRST, INDEX, RECEIPT, UNDO, World, contents, lora

from lora_cli.surgery.merge import merge
from lora_cli.surgery.unmerge import plan_unmerge

BACK = "lora_unmerge.json"


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path).write().merge()


# Small files


def replaced(path: Path, make: Callable[[Path], None]) -> None:
    path.unlink()
    make(path)


SIDES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "edited": ("config.json", lambda path: path.write_text('{"edited": true}'), "was changed since the merge"),
    "the same length": ("tokenizer.json", lambda path: path.write_text('{"version": "1.1"}'), "was changed since"),
    "removed": ("tokenizer.json", lambda path: path.unlink(), "is missing from the merged checkpoint"),
    "a folder": ("tokenizer.json", lambda path: replaced(path, Path.mkdir), "is missing from the merged checkpoint"),
    "index": (INDEX, lambda path: path.write_text(path.read_text().replace("{", '{"by": "me", ', 1)), "was changed"),
    "a link that leads out": (
        "tokenizer.json",
        lambda path: replaced(path, lambda link: link.symlink_to(path.parent.parent / "secret")),
        "is a link that leads out of it",
    ),
}


@pytest.mark.parametrize(("name", "change", "words"), SIDES.values(), ids=SIDES)
def test_a_small_file_that_changed_since_the_merge(
    tmp_path: Path, name: str, change: Callable[[Path], object], words: str
) -> None:
    world = World(tmp_path).write()
    # No tensor is added, so that the index stays as it is.
    world.merge(world.write_adapter("adapter", lora("x", 6, 4, 10)))
    (tmp_path / "secret").write_text("not to be copied")
    change(world.merged / name)
    result = world.unmerge()
    found, base = contents(world.out), contents(world.base)
    (warning,) = result.warnings
    assert warning.startswith(f"{name} {words}")
    assert "is not in the undo file" in warning
    assert not result.exact
    digests = {file.name: file.digest for file in result.files}
    assert [key for key, digest in digests.items() if digest is None] == ([name, BACK] if "was" in words else [BACK])
    receipt = json.loads(found.pop(BACK))
    assert receipt["exact"] is False
    assert name not in receipt["digests"]
    # What is still there comes along; what leads out of the folder does not.
    assert found.get(name) == ((world.merged / name).read_bytes() if "was" in words else None)
    assert {**found, name: b""} == {**base, name: b""}


def test_a_card_that_was_edited_does_not_matter(world: World) -> None:
    (world.merged / "README.md").write_text("# Mine\n")
    assert world.restored().warnings == ()


def test_files_that_came_later_stay_behind_and_are_listed(world: World) -> None:
    (world.merged / "notes.txt").write_text("mine")
    world.restored()
    assert plan_unmerge(world.merged, [world.adapter]).left_out == ("notes.txt",)


def test_a_card_that_the_merge_made_is_no_surprise(tmp_path: Path) -> None:
    world = World(tmp_path).write()
    (world.base / "README.md").unlink()
    world.merge()
    assert (world.merged / "README.md").exists()
    assert plan_unmerge(world.merged, [world.adapter]).left_out == ()
    world.restored()


def test_a_small_file_that_the_undo_file_holds_is_not_taken_from_the_merged_checkpoint(world: World) -> None:
    """The merge wrote another index, since the head came in; whatever it is now, the base's own comes back."""
    assert (world.merged / INDEX).read_bytes() != (world.base / INDEX).read_bytes()
    document = json.loads((world.merged / INDEX).read_text())
    (world.merged / INDEX).write_text(json.dumps(document, indent=7))
    assert world.restored().warnings == ()


# Places

PLACES: dict[str, Callable[[World], Path]] = {
    "merged itself": lambda world: world.merged,
    "in merged": lambda world: world.merged / "out",
    "around it": lambda world: world.folder,
    "the undo file": lambda world: world.merged / UNDO,
    "the adapter": lambda world: world.adapter,
    "in the adapter": lambda world: world.adapter / "out",
    "a folder with something": lambda world: world.base,
    "a file": lambda world: world.base / "config.json",
    "by a link": lambda world: world.folder / "link" / "out",
}


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("where", PLACES.values(), ids=PLACES)
def test_an_output_that_is_in_the_way(world: World, where: Callable[[World], Path], force: bool) -> None:
    (world.folder / "link").symlink_to(world.merged)
    with world.refused(30):
        world.unmerge(out=where(world), force=force)


def test_an_undo_file_that_lies_elsewhere_is_an_input_too(world: World) -> None:
    kept = world.folder / "kept"
    kept.mkdir()
    shutil.move(world.merged / UNDO, kept / "u")
    for out in (kept, kept / "u"):
        with world.refused(30):
            world.unmerge(out=out, undo=kept / "u", force=True)


def test_several_shards_become_no_single_file(world: World) -> None:
    with world.refused(2) as caught:
        world.unmerge(out=world.place / "out.safetensors")
    assert "2 shards" in caught.value.message


# Force


def test_force_replaces_its_own_output(world: World) -> None:
    world.unmerge()
    with world.refused(30):
        world.unmerge()
    assert world.unmerge(force=True).exact
    (world.out / "mine").touch()
    with world.refused(30):
        world.unmerge(force=True)


def test_force_replaces_an_output_that_holds_an_earlier_receipt_and_undo_file(world: World) -> None:
    first, adapter = world.base, world.adapter
    world.base, world.merged = world.merged, world.folder / "merged twice"
    world.adapter = world.write_adapter("second", lora("x", 6, 4, 70))
    world.merge()
    world.unmerge()
    assert {RECEIPT, UNDO, BACK} <= contents(world.out).keys()
    assert plan_unmerge(world.merged, [world.adapter]).warnings == ()
    world.restored(force=True)
    world.unmerge()
    # And from what came back, the first merge comes off.
    assert world.unmerge(adapter, merged=world.out, out=world.place / "first").exact
    found = contents(world.place / "first")
    assert found.pop(BACK)
    assert found == contents(first)


def bare(world: World) -> World:
    """The same with a base of one bare file, and bare files as outputs."""
    world.base = world.base / FIRST
    world.adapter = world.write_adapter("one", lora("x", 6, 4, 70))
    world.merged, world.out = world.folder / "bare.safetensors", world.place / "out.safetensors"
    return world.merge()


def twice(world: World) -> World:
    """Another merge on top of that."""
    world.base, world.merged = world.merged, world.folder / "twice.safetensors"
    world.adapter = world.write_adapter("second", lora("x", 6, 4, 80))
    return world.merge()


def names(folder: Path) -> list[str]:
    return sorted(path.name.removeprefix("out.") for path in folder.iterdir())


def test_a_bare_file_and_its_receipt(world: World) -> None:
    bare(world)
    for force in (False, True):
        result = world.unmerge(force=force)
        assert world.out.read_bytes() == world.base.read_bytes()
        assert sorted(file.name.removeprefix("out.") for file in result.files) == names(world.place)
        assert names(world.place) == [BACK, "safetensors"]
    for out in (world.merged, world.adapter / "new.safetensors", world.base):
        with world.refused(30):
            world.unmerge(out=out, force=True)


def test_what_a_replaced_bare_file_left_goes_with_it(world: World) -> None:
    """Receipt and undo file of a merge told of what was there before."""
    bare(world)
    merge(world.base, [world.adapter], world.out)
    assert names(world.place) == [RECEIPT, UNDO, "safetensors"]
    world.unmerge(force=True)
    assert names(world.place) == [BACK, "safetensors"]


def test_a_stack_of_bare_files(world: World) -> None:
    first = bare(world).adapter
    twice(world)
    for force in (False, True):
        world.unmerge(force=force)
        assert world.out.read_bytes() == world.base.read_bytes()
        assert names(world.place) == [RECEIPT, UNDO, BACK, "safetensors"]
        for name in (RECEIPT, UNDO):
            assert (world.place / f"out.{name}").read_bytes() == (world.folder / f"bare.{name}").read_bytes()
    # What came back is a merge itself, with all that taking it out needs.
    world.unmerge(first, merged=world.out, out=world.place / "deep.safetensors")
    assert (world.place / "deep.safetensors").read_bytes() == (world.folder / "base" / FIRST).read_bytes()
    # And in its place goes one that was merged once: nothing earlier is left beside it.
    world.unmerge(first, merged=world.folder / "bare.safetensors", force=True)
    assert names(world.place) == ["deep.lora_unmerge.json", "deep.safetensors", BACK, "safetensors"]


SPARED = [("unmerge", RECEIPT), ("unmerge", UNDO), ("merge", BACK), ("merge", UNDO)]


@pytest.mark.parametrize(("ours", "name"), SPARED)
def test_what_lies_beside_and_is_not_ours_is_spared(world: World, ours: str, name: str) -> None:
    """Even where the bare file itself may be replaced."""
    first = bare(world).adapter
    original, merged = world.base, world.merged
    twice(world)
    mine = world.place / f"out.{name}"
    mine.write_text("mine")
    with world.refused(30) as caught:
        world.unmerge(force=True)
    assert str(caught.value.file) == str(mine)
    mine.unlink()
    if ours == "merge":
        merge(original, [first], world.out, undo=False)
    else:
        world.unmerge(first, merged=merged)
    mine.write_text("mine")
    with world.refused(30) as caught:
        world.unmerge(force=True)
    assert str(caught.value.file) == str(mine)
    mine.unlink()
    world.unmerge(force=True)
    assert names(world.place) == [RECEIPT, UNDO, BACK, "safetensors"]


def test_force_does_not_take_away_the_undo_file_that_it_reads(world: World) -> None:
    bare(world)
    kept = world.place / "kept.safetensors"
    shutil.copy(world.merged, kept)
    with world.refused(30) as caught:
        world.unmerge(merged=kept, out=world.merged, undo=world.folder / f"bare.{UNDO}", force=True)
    assert "input" in caught.value.message
