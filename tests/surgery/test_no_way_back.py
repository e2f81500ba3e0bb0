"""Merges that no subtraction takes back: it is said before the undo file is given up, and never offered after."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_lengths_of_outputs import small
from test_turned_weights import deft, one_module
from tiny import write_base
from tuner_worlds import write_tuner

from lora_cli.errors import UnsupportedError, WrongInputError
from lora_cli.progress import Progress
from lora_cli.surgery.merge import merge, plan_merge
from lora_cli.surgery.unmerge import unmerge

NO_WAY = "only an undo file could bring the base back"
WORLDS = ("deft", "dora", "IA3", "OFT")


def world(folder: Path, kind: str) -> tuple[Path, Path]:
    if kind == "dora":
        base, adapter, _ = small(folder)
        return base, adapter
    if kind == "deft":
        return one_module(folder, "DEFT", deft("m", 12, 16))
    return write_base(folder / "base"), write_tuner(folder / "adapter", kind)


class Heard(Progress):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.mark.parametrize("kind", WORLDS)
def test_giving_up_the_undo_file_is_warned_of(tmp_path: Path, kind: str) -> None:
    base, adapter = world(tmp_path, kind)
    planned, made = Heard(), Heard()
    plan_merge(base, [adapter], undo=False, progress=planned)
    merge(base, [adapter], tmp_path / "merged", undo=False, progress=made)
    assert [NO_WAY in text for text in planned.warnings] == [True]
    assert [NO_WAY in text for text in made.warnings] == [True]
    assert not any(NO_WAY in text for text in plan_merge(base, [adapter]).warnings)


@pytest.mark.parametrize("kind", ["FOURIERFT", "LOHA"])
def test_sums_can_be_subtracted(tmp_path: Path, kind: str) -> None:
    base, adapter = world(tmp_path, kind)
    assert not merge(base, [adapter], tmp_path / "merged", undo=False).warnings
    for given in ([], [adapter]):
        with pytest.raises(WrongInputError) as caught:
            unmerge(tmp_path / "merged", given, tmp_path / "back")
        assert "--approximate" in (caught.value.hint or "")


@pytest.mark.parametrize("kind", WORLDS)
def test_subtracting_is_not_offered(tmp_path: Path, kind: str) -> None:
    base, adapter = world(tmp_path, kind)
    merge(base, [adapter], tmp_path / "merged", undo=False)
    with pytest.raises(WrongInputError, match="no undo file") as caught:
        unmerge(tmp_path / "merged", [adapter], tmp_path / "back")
    assert "--approximate" not in (caught.value.hint or "")
    if kind != "deft":  # of which the receipt alone says nothing
        with pytest.raises(WrongInputError, match="no undo file") as caught:
            unmerge(tmp_path / "merged", [], tmp_path / "back")
        assert "--approximate" not in (caught.value.hint or "")


@pytest.mark.parametrize("kind", WORLDS)
def test_the_undo_file_that_is_there_is_pointed_at(tmp_path: Path, kind: str) -> None:
    base, adapter = world(tmp_path, kind)
    merge(base, [adapter], tmp_path / "merged")
    with pytest.raises(UnsupportedError) as caught:
        unmerge(tmp_path / "merged", [adapter], tmp_path / "back", approximate=True)
    assert (caught.value.hint or "").startswith("leave out --approximate")
    (tmp_path / "merged" / "lora_merge.undo").unlink()
    with pytest.raises(UnsupportedError) as caught:
        unmerge(tmp_path / "merged", [adapter], tmp_path / "back", approximate=True)
    assert "name it with --undo" in (caught.value.hint or "")
