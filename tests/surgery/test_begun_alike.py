"""Adapters that began from the same factors: only what was trained counts as merged twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from adapter_worlds import WORLDS
from tiny import adapter_tensors, read_tensors, write_adapter

from lora_cli.adapters.source import ReadOptions
from lora_cli.errors import WrongInputError
from lora_cli.surgery.merge import merge
from lora_cli.surgery.placing import PlanOptions
from lora_cli.surgery.unmerge import unmerge
from lora_cli.surgery.verify import verify


class Two:
    """Two adapters with one beginning."""

    def __init__(self, folder: Path) -> None:
        world = WORLDS["taken"](folder)
        more = {key: tensor * 3 for key, tensor in adapter_tensors().items()}
        self.base, self.begun = world.base, str(world.initial)
        self.one, self.two = world.adapter, write_adapter(folder / "two", more, init_lora_weights="pissa")

    def options(self, count: int) -> PlanOptions:
        return PlanOptions(read=ReadOptions(initial=(self.begun,) * count))


@pytest.fixture(name="both")
def both_fixture(tmp_path: Path) -> Two:
    return Two(tmp_path)


def same(one: Path, other: Path) -> bool:
    left, right = read_tensors(one), read_tensors(other)
    return left.keys() == right.keys() and all(left[key].tobytes() == right[key].tobytes() for key in left)


@pytest.mark.parametrize("embed", [False, True])
def test_in_one_merge(both: Two, tmp_path: Path, embed: bool) -> None:
    pair, merged = [both.one, both.two], tmp_path / "merged"
    merge(both.base, pair, merged, both.options(2), embed_adapter=embed)
    assert verify(merged, both.base, pair, both.options(2), roundtrip=True).verified
    unmerge(merged, [] if embed else [*pair, both.begun], tmp_path / "back")
    assert same(tmp_path / "back", both.base)
    with pytest.raises(WrongInputError, match="This adapter is given twice"):
        merge(both.base, [both.one, both.one], tmp_path / "twice", both.options(2))


def test_one_after_the_other(both: Two, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    merge(both.base, [both.one], first, both.options(1))
    merge(first, [both.two], second, both.options(1))
    receipt = json.loads((second / "lora_merge.json").read_text())
    assert [said["label"] for said in receipt["earlier"]] == ["adapter"]
    assert [said.get("role") for said in receipt["adapters"]] == [None, "beginning"]
    for adapter in (both.one, both.two):
        with pytest.raises(WrongInputError, match="merged into the base already"):
            merge(second, [adapter], tmp_path / "third", both.options(1))
    unmerge(second, [both.two, both.begun], tmp_path / "back")
    assert same(tmp_path / "back", first)


def test_a_first_adapter_can_be_merged_for_its_own_sake(both: Two, tmp_path: Path) -> None:
    """What is taken off elsewhere was never merged."""
    merge(both.base, [both.one, both.begun], tmp_path / "merged", both.options(1))
    with pytest.raises(WrongInputError, match="This adapter is given twice"):
        merge(both.base, [both.begun, both.begun], tmp_path / "twice")
