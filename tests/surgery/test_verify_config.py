"""Verify looks at config.json too: what a merge makes it say, it must say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from adapter_worlds import WORLDS
from tiny import write_json

from lora_cli.surgery.merge import merge
from lora_cli.surgery.placing import PlanOptions
from lora_cli.surgery.verify import Difference, verify

WRONG = {
    "untied": "tie_word_embeddings is true; this merge makes it false",
    "resized": "vocab_size is 20; this merge makes it 23",
    "repeated": "num_hidden_layers is 2; this merge makes it 4",
}


def say(folder: Path, **fields: Any) -> None:
    place = folder / "config.json"
    config = json.loads(place.read_text()) | fields
    write_json(place, {name: value for name, value in config.items() if value is not None})


@pytest.mark.parametrize("name", WRONG)
def test_the_config_of_the_base_is_not_that_of_the_merge(name: str, tmp_path: Path) -> None:
    world, merged = WORLDS[name](tmp_path), tmp_path / "merged"
    merge(world.base, [world.adapter], merged)
    say(merged, other_field="somebody's own")
    right = verify(merged, world.base, [world.adapter])
    assert right.verified
    shutil.copy(world.base / "config.json", merged)
    result = verify(merged, world.base, [world.adapter])
    assert not result.verified
    assert result.different == (Difference("config.json", "config", looks_like=WRONG[name]),)
    assert result.tensors == right.tensors == {"checked": right.tensors["checked"], "different": 0}


def test_a_field_that_is_missing_and_a_config_that_is(tmp_path: Path) -> None:
    world, merged = WORLDS["untied"](tmp_path), tmp_path / "merged"
    merge(world.base, [world.adapter], merged)
    words = "tie_word_embeddings is not there; this merge makes it false"
    say(merged, tie_word_embeddings=None)
    assert [one.looks_like for one in verify(merged, world.base, [world.adapter]).different] == [words]
    (merged / "config.json").unlink()
    assert [one.looks_like for one in verify(merged, world.base, [world.adapter]).different] == [words]


def test_levels_and_long_values(tmp_path: Path) -> None:
    world, merged = WORLDS["untied"](tmp_path), tmp_path / "merged"
    say(world.base, text_config={"vocab_size": 20, "tie_word_embeddings": True})
    merge(world.base, [world.adapter], merged)
    assert verify(merged, world.base, [world.adapter]).verified
    say(merged, text_config={"tie_word_embeddings": "x" * 5000})
    (found,) = verify(merged, world.base, [world.adapter]).different
    assert str(found.looks_like).startswith('text_config.tie_word_embeddings is "xxx')
    assert len(str(found.looks_like)) < 200


def test_a_type_under_its_other_name_is_the_same(tmp_path: Path) -> None:
    world, merged, narrow = WORLDS["plain"](tmp_path), tmp_path / "merged", PlanOptions(dtype="bf16")
    say(world.base, dtype=None, torch_dtype="float32")
    merge(world.base, [world.adapter], merged, narrow)
    say(merged, dtype="bfloat16", torch_dtype=None)
    assert verify(merged, world.base, [world.adapter], narrow).verified
    say(merged, dtype="float32")
    assert not verify(merged, world.base, [world.adapter], narrow).verified


def test_one_file_has_no_config_to_look_at(tmp_path: Path) -> None:
    world, alone = WORLDS["parts"](tmp_path), tmp_path / "alone.safetensors"
    narrow = PlanOptions(dtype="bf16")
    merge(world.base, [world.adapter], alone, narrow)
    say(world.base, dtype="float32")
    assert verify(alone, world.base, [world.adapter], narrow).verified


def test_what_tensors_look_like_is_said_all_the_same(tmp_path: Path) -> None:
    world, merged = WORLDS["plain"](tmp_path), tmp_path / "merged"
    merge(world.base, [world.adapter], merged, PlanOptions(dtype="bf16", weights=(2.0,)))
    say(merged, dtype="float32")
    result = verify(merged, world.base, [world.adapter], PlanOptions(dtype="bf16"))
    assert result.tensors["different"] == len(result.different) - 1 == 4
    assert result.looks_like is not None
