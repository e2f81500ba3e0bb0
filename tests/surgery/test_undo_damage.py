"""Damaged undo files, and files that are none: they are refused, or the very base comes out, never anything else."""

from __future__ import annotations

import os
import pickle
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from undo_world import (
    LORA,
    UNDO,
    World,
    contents,
    lora,
    numbers,
    read_raw,
    read_undo,
    rewrite,
    span_of,
    write_raw,
    write_undo,
)

from lora_cli.adapters.source import ReadOptions
from lora_cli.checkpoint.undo_file import open_undo_file
from lora_cli.errors import LoraCliError, MalformedFileError
from lora_cli.surgery.placing import PlanOptions
from lora_cli.surgery.unmerge import UnmergeResult, unmerge

REFUSALS = {10, 11, 12, 23}


class Damage:
    """An undo file that is spoilt again and again, and what comes of it."""

    def __init__(self, world: World, *given: Path) -> None:
        self.world, self.given = world, given
        self.good = (world.merged / UNDO).read_bytes()
        self.base = contents(world.base)
        self.file = world.folder / "spoilt"
        self.came_of_it: Counter[int] = Counter()

    def try_bytes(self, data: bytes) -> int:
        """Unmerge with these bytes as the undo file; returns 0 where the base came out, or how it was refused."""
        self.file.write_bytes(data)
        code = self._outcome()
        self.came_of_it[code] += 1
        return code

    def _outcome(self) -> int:
        try:
            open_undo_file(self.file)  # most end here, and nothing else need be read for these
            result = unmerge(self.world.merged, self.given, self.world.out, undo=self.file, threads=1)
        except LoraCliError as caught:
            error = caught
        else:
            return self._restored(result)
        assert error.exit_code in REFUSALS, str(error)
        assert error.message
        assert list(self.world.place.iterdir()) == []
        return error.exit_code

    def _restored(self, result: UnmergeResult) -> int:
        out = self.world.out
        found = contents(out)
        assert found.pop("lora_unmerge.json")
        assert found == self.base
        assert result.exact
        shutil.rmtree(out)
        return 0

    def try_bits(self, bits: Iterable[int]) -> None:
        """Flip one bit after another."""
        for bit in bits:
            data = bytearray(self.good)
            data[bit // 8] ^= 1 << bit % 8
            self.try_bytes(bytes(data))

    def bits_of(self, *parts: str) -> list[int]:
        """The bits of these parts."""
        spans = [span_of(self.world.merged / UNDO, part) for part in parts]
        return [bit for span in spans for bit in range(8 * span.start, 8 * span.stop)]


def with_everything(folder: Path) -> Damage:
    """A stack of merges whose undo file has a part of every kind."""
    world = World(folder)
    tensors = {
        "x.base.weight": numbers(3, 4, seed=1, dtype=torch.bfloat16),
        "head.weight": numbers(2, 3, seed=3),
        "y.weight": numbers(5, 4, seed=7),
    }
    tensors |= {key.removeprefix(LORA): tensor for key, tensor in lora("x", 3, 4, 20).items()}
    base = world.write_base(folder / "first", tensors)
    (base / "lora_merge.undo").write_bytes(b"an older undo file")
    (base / "lora_merge.json").write_text('{"schema": "an older receipt"}')
    world.base = base
    adapter = world.write_adapter("adapter", lora("x", 3, 4, 10) | {f"{LORA}head.weight": numbers(2, 3, seed=5)})
    magnitudes = {f"{LORA}y.lora_magnitude_vector": numbers(5, seed=8)}
    lengths = world.write_adapter("lengths", lora("y", 5, 4, 30) | magnitudes, use_dora=True)
    world.merge(adapter, lengths, options=PlanOptions(read=ReadOptions(scale=2.0)), embed_adapter=True)
    return Damage(world)


@pytest.fixture(scope="module")
def damage(tmp_path_factory: pytest.TempPathFactory) -> Damage:
    return with_everything(tmp_path_factory.mktemp("damage"))


KINDS = ("stored/", "factor/", "undo/head", "undo/x", "undo/y", "gains/", "header/", "side/")


def test_it_has_a_part_of_every_kind_and_is_whole(damage: Damage) -> None:
    names = read_undo(damage.world.merged / UNDO)[1].keys()
    assert all(any(name.startswith(kind) for kind in KINDS) for name in names)
    assert all(any(name.startswith(kind) for name in names) for kind in KINDS)
    assert damage.try_bytes(damage.good) == 0


EVERY = pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.slow)])
"""Steps of five bits come to each bit of a byte."""


@EVERY
@pytest.mark.parametrize("kind", KINDS)
def test_any_bit_of_a_part(damage: Damage, kind: str, step: int) -> None:
    """R103: Some bits of a zstd frame mean nothing; with all others it is refused."""
    names = [name for name in read_undo(damage.world.merged / UNDO)[1] if name.startswith(kind)]
    damage.came_of_it.clear()
    bits = damage.bits_of(*names)[::step]
    damage.try_bits(bits)
    assert damage.came_of_it.total() == len(bits)
    assert damage.came_of_it[0] <= (len(bits) // 50 if kind in ("header/", "side/") else 0)


@EVERY
def test_any_bit_of_its_header(damage: Damage, step: int) -> None:
    damage.came_of_it.clear()
    higher = 8 * damage.good.index(b"lora-cli/undo/2") + 8 * len("lora-cli/undo/")  # what says 3 is read, too
    damage.try_bits(bit for bit in range(0, 8 * (8 + int.from_bytes(damage.good[:8], "little")), step) if bit != higher)
    assert damage.came_of_it[0] == 0
    assert damage.try_bytes(damage.good.replace(b"lora-cli/undo/2", b"lora-cli/undo/3")) == 0


def test_bits_all_over_the_manifest(damage: Damage) -> None:
    damage.came_of_it.clear()
    damage.try_bits(damage.bits_of("manifest")[::13])
    assert set(damage.came_of_it) == {10}


def test_any_length(damage: Damage) -> None:
    """Cut off, or longer than it was."""
    lengths = {*range(40), *range(40, len(damage.good), 37), *range(len(damage.good) - 9, len(damage.good))}
    for length in sorted(lengths):
        assert damage.try_bytes(damage.good[:length]) == 10
    for more in (b"\0", b" ", b"more" * 1000, damage.good):
        assert damage.try_bytes(damage.good + more) == 11
        assert damage.try_bytes(more + damage.good) in (10, 11)


def test_runs_of_bytes_that_are_lost_repeated_or_blank(damage: Damage) -> None:
    good = damage.good
    damage.came_of_it.clear()
    for at in range(0, len(good) - 64, 61):
        cut, run = good[:at], good[at : at + 64]
        for data in (cut + good[at + 16 :], cut + run + good[at:], cut + bytes(64) + good[at + 64 :]):
            damage.try_bytes(data)
    assert damage.came_of_it[0] == 0


# Files that are none


def as_model(folder: Path) -> Path:
    save_file({"x": torch.ones(3)}, folder / "u", {"format": "pt"})
    return folder / "u"


def as_bytes(data: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / "u").write_bytes(data)
        return folder / "u"

    return write


def as_folder(folder: Path) -> Path:
    (folder / "u").mkdir()
    return folder / "u"


def as_pipe(folder: Path) -> Path:
    os.mkfifo(folder / "u")
    return folder / "u"


NONE: dict[str, tuple[int, str, Callable[[Path], Path]]] = {
    "a checkpoint": (10, "no undo file", as_model),
    "a receipt": (10, "plain JSON", lambda folder: folder.parent / "merged" / "lora_merge.json"),
    "text": (10, "is text", as_bytes(b"what the merge forgot\n")),
    "a pickle": (10, "pickle", as_bytes(pickle.dumps({"manifest": 1}, protocol=4))),
    "zeros": (10, "empty", as_bytes(bytes(1000))),
    "nothing": (10, "too short", as_bytes(b"")),
    "a folder": (10, "folder", as_folder),
    "a pipe": (11, "regular file", as_pipe),
    "a device": (11, "regular file", lambda _: Path("/dev/zero")),
    "not there": (2, "not exist", lambda folder: folder / "u"),
}


@pytest.mark.parametrize(("code", "words", "make"), NONE.values(), ids=NONE)
def test_what_is_no_undo_file(tmp_path: Path, code: int, words: str, make: Callable[[Path], Path]) -> None:
    world = World(tmp_path).write().merge()
    (tmp_path / "other").mkdir()
    place = make(tmp_path / "other")
    with world.refused(code) as caught:
        world.unmerge(undo=place)
    assert words in str(caught.value)
    assert caught.value.file == place.name


def test_a_folder_in_the_place_of_the_undo_file_is_said(tmp_path: Path) -> None:
    world = World(tmp_path).write().merge()
    shutil.move(world.merged / UNDO, tmp_path / "moved")
    as_folder(world.merged)
    (world.merged / UNDO).mkdir()
    with world.refused(10):
        world.unmerge()


# Versions

FORMATS = {"lora-cli/undo/4": 12, "lora-cli/undo/999999999": 12, "lora-cli/undo/0": 10, "lora-cli/undo/01": 10}
FORMATS |= {"lora-cli/undo/1 ": 10, "lora-cli/undo/1\n": 10, "lora-cli/undo/-1": 10, "lora-cli/undo/1.0": 10}
FORMATS |= {
    "lora-cli/undo/\u0661": 10,
    "lora-cli/undo/": 10,
    "LORA-CLI/UNDO/1": 10,
    "": 10,
    "lora-cli/undo/9999999999": 10,
}


@pytest.mark.parametrize(("name", "code"), FORMATS.items(), ids=map(ascii, FORMATS))
def test_the_version_of_the_format(damage: Damage, name: str, code: int) -> None:
    """R178: a newer one is refused by name, and is no damage."""
    manifest, parts = read_undo(damage.world.merged / UNDO)
    write_undo(damage.file, manifest, parts, format=name)
    with damage.world.refused(code) as caught:
        damage.world.unmerge(given=False, undo=damage.file)
    assert ("newer" in caught.value.message) == (code == 12)
    assert ("update lora-cli" in str(caught.value.hint)) == (code == 12)


@pytest.mark.parametrize("version", [0, 2, -1, 10**6])
def test_the_version_of_the_arithmetic(damage: Damage, version: int) -> None:
    shutil.copy(damage.world.merged / UNDO, damage.file)
    rewrite(damage.file, lambda manifest, _: manifest.update(arithmetic=version))
    with damage.world.refused(12) as caught:
        damage.world.unmerge(given=False, undo=damage.file)
    assert (caught.value.found, caught.value.expected) == (str(version), "1")


def test_metadata_that_are_missing(damage: Damage) -> None:
    metadata, parts = read_raw(damage.world.merged / UNDO)
    for name in ("format", "manifest"):
        write_raw(damage.file, {key: said for key, said in metadata.items() if key != name}, parts)
        with damage.world.refused(10):
            damage.world.unmerge(given=False, undo=damage.file)
    write_raw(damage.file, metadata, {name: part for name, part in parts.items() if name != "manifest"})
    with damage.world.refused(10):
        damage.world.unmerge(given=False, undo=damage.file)
    write_raw(damage.file, metadata | {"note": "of somebody"}, parts)
    assert damage.world.unmerge(given=False, undo=damage.file).exact
    shutil.rmtree(damage.world.out)


def test_it_is_read_while_it_changes(tmp_path: Path) -> None:
    world = World(tmp_path).write().merge(embed_adapter=True)
    with pytest.raises(MalformedFileError, match="changed while it was read"):
        world.unmerge(given=False, on_plan=lambda _: os.utime(world.merged / UNDO, (1, 1)))
    assert list(world.place.iterdir()) == []
