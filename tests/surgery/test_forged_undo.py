"""Undo files that fit their checkpoint and prove nothing of an adapter: `verify --roundtrip` must not say that they do.

Without a base an undo file is taken at its word for what the base is. That an adapter is in it, it must show.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from blake3 import blake3
from msgspec.structs import replace
from undo_world import (
    LORA,
    UNDO,
    Change,
    Document,
    Parts,
    World,
    command,
    lora,
    numbers,
    read_raw,
    read_undo,
    record,
    rewrite,
    text_of,
    write_undo,
)

from lora_cli.checkpoint.manifest import Manifest, TensorRecord, read_manifest, write_manifest
from lora_cli.checkpoint.undo_file import open_undo_file
from lora_cli.errors import UnsupportedError, WrongInputError
from lora_cli.progress import Progress
from lora_cli.surgery.merge import merge
from lora_cli.surgery.placing import PlanOptions
from lora_cli.surgery.unmerge import unmerge
from lora_cli.surgery.verify import VerifyResult, verify


class Heard(Progress):
    """Keeps the warnings."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def warn(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path).write().merge()


def bare(world: World, change: Callable[[Document], object] = lambda manifest: None) -> Path:
    """The bare base, with an undo file that fits it in every digest: by it all tensors are what they were."""
    place = world.folder / "bare"
    shutil.copytree(world.base, place)
    manifest, _ = read_undo(world.merged / UNDO)
    manifest["side_files"] = []
    for file in manifest["files"]:
        data = (place / file["name"]).read_bytes()
        prefix = data[: 8 + int.from_bytes(data[:8], "little")]
        kept = [{"key": said["key"], "how": "copy", "digests": said["digests"]} for said in file["tensors"]]
        file.update(merged_header=blake3(prefix).hexdigest(), tensors=kept, appended={}, own_header=False)
    change(manifest)
    write_undo(place / UNDO, manifest, {})
    return place


def alone(merged: Path, *adapters: Path, heard: Progress | None = None) -> VerifyResult:
    return verify(merged, None, adapters, roundtrip=True, threads=1, progress=heard or Heard())


def test_the_forgery_is_sound_but_for_the_adapter(world: World) -> None:
    """What is refused below is refused for this alone."""
    place = bare(world)
    result = unmerge(place, [world.adapter], world.out, threads=1)
    assert all((world.out / file.name).read_bytes() == file.read_bytes() for file in world.base.glob("*.safetensors"))
    assert (result.tensors["copied"], result.tensors["total"]) == (5, 5)


RECORDED: dict[str, Callable[[Document], object]] = {
    "with its factors": lambda manifest: None,
    "without its factors": lambda manifest: manifest["adapters"][0].update(factors={}),
    "and says that it was carried": lambda manifest: manifest["adapters"][0].update(factors={}, held="in the base"),
}


@pytest.mark.parametrize("change", RECORDED.values(), ids=RECORDED)
def test_an_adapter_that_changed_nothing_is_not_verified(world: World, change: Callable[[Document], object]) -> None:
    """R102: the undo file records the adapter, and uses it nowhere."""
    place = bare(world, change)
    with pytest.raises(WrongInputError, match="of no tensor that an adapter changed it") as caught:
        alone(place, world.adapter)
    assert caught.value.details == ("adapter",)
    assert command("-q", "verify", place, "--adapter", world.adapter, "--roundtrip") == 23


@pytest.mark.parametrize("given", [True, False], ids=["given", "not given"])
def test_an_undo_file_without_adapters_verifies_none(world: World, given: bool) -> None:
    """R102: the undo file does not know the adapter; and one that knows none is of no merge."""
    place = bare(world, lambda manifest: manifest.update(adapters=[]))
    said = "records no adapter" if given else "of no tensor that an adapter changed it"
    with pytest.raises(WrongInputError, match=said):
        alone(place, *([world.adapter] if given else []))


def test_unmerge_takes_no_adapter_that_the_undo_file_does_not_know(world: World) -> None:
    """R102."""
    place = bare(world, lambda manifest: manifest.update(adapters=[]))
    with world.refused(23) as caught:
        unmerge(place, [world.adapter], world.out, threads=1)
    assert "records no adapter, so this one was not merged (adapter)" in str(caught.value)


def test_the_second_of_two_adapters_must_be_there_too(world: World) -> None:
    """Both are recorded, and the terms are all of the first."""
    second = world.write_adapter("second", lora("x", 6, 4, 50), modules_to_save=None)

    def change(manifest: Document, parts: Parts) -> None:
        said = {"label": "second", "factors": {}, "digest": digest(second)}
        manifest["adapters"].append(manifest["adapters"][0] | said)

    # Nothing is replaced in this merge, so that all that changed has terms.
    first = world.write_adapter("first", lora("x", 6, 4, 10), modules_to_save=None)
    shutil.rmtree(world.merged)
    world.merge(first)
    assert alone(world.merged, first).verified
    rewrite(world.merged / UNDO, change)
    with pytest.raises(WrongInputError) as caught:
        alone(world.merged, first, second)
    assert "second" in text_of(caught.value)


def digest(adapter: Path) -> str:
    """Digest of an adapter's file, as docs/undo-file.md defines it; all of its tensors are one cut."""
    whole = blake3()
    for name, (dtype, shape, data) in sorted(read_raw(adapter / "adapter_model.safetensors")[1].items()):
        whole.update(f"{name}\n{dtype} {shape} {blake3(data).hexdigest()}\n".encode())
    return whole.hexdigest()


def test_what_the_undo_file_leaves_out_is_said(world: World) -> None:
    """A merge of the first module alone, under the digest of an adapter of two."""
    both = world.write_adapter("both", lora("x", 6, 4, 10) | lora("y", 3, 5, 12), modules_to_save=None)
    one = world.write_adapter("one", lora("x", 6, 4, 10), modules_to_save=None)
    shutil.rmtree(world.merged)
    world.merge(one)
    rewrite(world.merged / UNDO, lambda manifest, _: manifest["adapters"][0].update(digest=digest(both)))
    heard = Heard()
    assert alone(world.merged, both, heard=heard).verified
    assert any("says nothing of 1 of its 2 modules, such as y.weight" in said for said in heard.said)
    heard = Heard()
    shutil.rmtree(world.merged)
    world.merge(both)
    assert alone(world.merged, both, heard=heard).verified
    assert heard.said == []


@pytest.mark.parametrize("whole", [False, True], ids=["with factors", "whole"])
def test_the_weight_zero_is_said(world: World, whole: bool) -> None:
    """A merge that changes nothing is a merge."""
    adapter = world.write_adapter("w", {f"{LORA}head.weight": numbers(3, 4, seed=14)}) if whole else world.adapter
    shutil.rmtree(world.merged)
    world.merge(adapter, options=PlanOptions(weights=(0.0,)))
    heard = Heard()
    assert alone(world.merged, adapter, heard=heard).verified
    assert any("the weight 0" in said for said in heard.said)


@pytest.mark.parametrize("rows", [20, 24], ids=["replaced", "of another shape"])
def test_what_an_adapter_holds_whole_is_enough(tmp_path: Path, rows: int) -> None:
    """It has no factors, so nothing but a residual, or a tensor that is there anew, shows that it was merged."""
    base = tiny.write_base(tmp_path / "base", config=tiny.CONFIG | {"vocab_size": 20})
    tables = ("model.embed_tokens", "lm_head")
    whole = {f"{LORA}{table}.weight": tiny.numbers(rows, 8, seed=rows) for table in tables}
    adapter = tiny.write_adapter(tmp_path / "adapter", whole, modules_to_save=["embed_tokens", "lm_head"])
    merge(base, [adapter], tmp_path / "merged", threads=1)
    assert alone(tmp_path / "merged", adapter).verified


# Names of the base's files of tensors


def renamed(name: str) -> Change:
    """The undo file of a merge into one file calls it so, and holds its header under that name."""

    def change(manifest: Document, parts: Parts) -> None:
        manifest["files"][0]["name"] = name

    return change


ODD = (
    *(".bashrc", "-rf", "lora_merge.json", "README.md", "LICENSE", "adapter_config.json", "modeling_x.py", "x.JSON"),
    *("model.safetensors.index.json", "pytorch_model.bin.", "x.pt ", "a\nb\x1b[2J", "x\u202ey", "x\x1b[2J.safetensors"),
    *("old.lora_merge.undo", "lora_wrap.json", "..safetensors", "notes.py."),
)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A merge into one bare file; the base's is called as nobody would think."""
    made = World(tmp_path_factory.mktemp("single")).write()
    base = tiny.write_base(made.folder / "one", shards=1)
    made.base, made.merged = base / "odd name", made.folder / "m.safetensors"
    (base / "model.safetensors").rename(made.base)
    made.adapter = tiny.write_adapter(made.folder / "of one")
    return made.merge()


@pytest.mark.parametrize("name", ODD)
def test_odd_names_of_weights_are_refused(single: World, name: str) -> None:
    """R139: they would steer a terminal, or be taken for something else."""
    place = single.folder / "forged.undo"
    shutil.copy(single.folder / "m.lora_merge.undo", place)
    rewrite(place, renamed(name))
    with single.refused(11) as caught:
        single.unmerge(undo=place)
    assert repr(name) in str(caught.value)


def test_a_single_file_may_have_any_name_of_its_own(single: World) -> None:
    single.unmerge(undo=single.folder / "m.lora_merge.undo")
    assert (single.out / "odd name").read_bytes() == single.base.read_bytes()
    shutil.rmtree(single.out)


def test_files_of_a_folder_are_safetensors(world: World) -> None:
    """No other file of a folder is read as weights."""
    rewrite(world.merged / UNDO, lambda manifest, _: manifest["files"][0].update(name="odd name"))
    with world.refused(11) as caught:
        world.unmerge()
    assert "'odd name'" in str(caught.value)


# Sizes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda manifest, said: said.update(terms=said["terms"] * 16385), "16384"),
        (lambda manifest, said: said.update(fragments=[0] * 65537), "65536"),
        (lambda manifest, said: said.update(digests=["0" * 64] * 65537), "65536"),
        (lambda manifest, said: said.update(source_digests=["0" * 64] * 65537), "65536"),
        (lambda manifest, said: manifest["files"][0].update(appended={"z": ["0" * 64] * 65537}), "65536"),
        (lambda manifest, said: manifest.update(left_out=["x"] * 65537), "65536"),
    ],
    ids=["terms", "fragments", "digests", "digests of the source", "digests of what was added", "left out"],
)
def test_counts_are_bounded_before_anything_is_made_of_them(
    world: World, change: Callable[[Document, Document], object], words: str
) -> None:
    """R130."""

    def forge(manifest: Document, parts: Parts) -> None:
        change(manifest, record(manifest, "x.weight"))
        manifest["tool"] = "".join(blake3(bytes([n & 255, n >> 8])).hexdigest() for n in range(4000))  # for density

    rewrite(world.merged / UNDO, forge)
    with world.refused(10) as caught, tiny.within(2):
        world.unmerge()
    assert f"length <= {words}" in text_of(caught.value)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda said, file, tensor: replace(said, left_out=("x",) * 65537), "files that stay behind"),
        (lambda said, file, tensor: within(said, replace(tensor, terms=tensor.terms * 16385)), "changes of one tensor"),
        (
            lambda said, file, tensor: within(said, replace(tensor, digests=tensor.digests * 65537)),
            "cuts of one tensor",
        ),
        (
            lambda said, file, tensor: replace(said, files=(replace(file, appended={"z": tensor.digests * 65537}),)),
            "cuts of one tensor",
        ),
    ],
    ids=["names", "terms", "cuts", "cuts of what was added"],
)
def test_nothing_is_written_that_would_not_be_read(world: World, change: Callable[..., Manifest], what: str) -> None:
    """R130."""
    said = open_undo_file(world.merged / UNDO).manifest
    assert read_manifest(write_manifest(said), file="m") == said
    tensor = next(tensor for tensor in said.tensors if tensor.terms)
    with pytest.raises(UnsupportedError, match=f"cannot hold so many {what}") as caught:
        write_manifest(change(said, said.files[0], tensor))
    assert "--no-undo" in str(caught.value)


def within(said: Manifest, tensor: TensorRecord) -> Manifest:
    return replace(said, files=(replace(said.files[0], tensors=(tensor,)),))


def test_of_many_names_some_are_said(world: World) -> None:
    rewrite(world.merged / UNDO, lambda manifest, _: manifest.update(left_out=[f"f{n}" for n in range(60000)]))
    result = world.unmerge()
    assert any("f49 and 59950 more files, which the merge did not take along" in text for text in result.warnings)
