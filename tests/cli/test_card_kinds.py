"""What the card of a merged checkpoint says of merges that do more than add to weights."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from adapter_worlds import HEAD, TABLE, VOCABULARY, WORLDS
from cli_world import Call, call_fixture  # noqa: F401 (fixture)
from huggingface_hub import metadata_load
from tiny import WIDTH, adapter_tensors, numbers, write_adapter

WORDS = {
    "plain": [],
    "dora": [],
    "trained_tokens": [f"3 rows of `{TABLE}` are the adapter's"],
    "untied": [f"`{HEAD}` is a tensor of its own; in the base it is `{TABLE}`"],
    "as_one": [],
    "resized": [f"`{key}` has {VOCABULARY + 3} rows; in the base it has {VOCABULARY}" for key in (TABLE, HEAD)],
    "repeated": ["its 4 layers are these of the base: 0, 1, 0, 1"],
    "parts": [],
    "taken": [],
    "blocks": [],
}


def card_of(name: str, folder: Path, call: Call, *flags: object) -> str:
    world = WORLDS[name](folder)
    ran = call("-q", "merge", world.base, world.adapter, "-o", folder / "merged", *world.flags, *flags)
    assert ran.code == 0, ran.err
    return (folder / "merged" / "README.md").read_text()


@pytest.mark.parametrize("name", WORLDS)
def test_what_a_merge_did_besides_is_told(name: str, tmp_path: Path, call: Call) -> None:
    card = card_of(name, tmp_path, call)
    _, found, besides = card.partition("Besides:\n\n")
    assert bool(found) == bool(WORDS[name])
    assert set(besides.split("\n\n", maxsplit=1)[0].splitlines() if found else ()) == {f"- {w}" for w in WORDS[name]}
    kind = "DoRA" if name == "dora" else "LoRA"
    assert re.findall(r"^- `adapter`: (\w+), weight 1, scale 2", card, re.MULTILINE) == [kind]


def test_one_row_is_one(tmp_path: Path, call: Call) -> None:
    world = WORLDS["trained_tokens"](tmp_path)
    key = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    adapter = write_adapter(tmp_path / "b", adapter_tensors() | {key: numbers(1, WIDTH)}, trainable_token_indices=[5])
    assert call("-q", "merge", world.base, adapter, "-o", tmp_path / "merged").code == 0
    assert f"- 1 row of `{TABLE}` is the adapter's\n" in (tmp_path / "merged" / "README.md").read_text()


def commands(card: str, **places: object) -> list[list[str]]:
    """The command lines of a card, with paths in the places of its capitals."""
    lines = re.findall(r"`lora-cli ([^`]*)`", card)
    return [[str(places.get(word, word)) for word in line.split()] for line in lines]


@pytest.mark.parametrize("undo", [True, False])
def test_the_commands_of_a_card_work_where_an_init_changed_the_base(undo: bool, tmp_path: Path, call: Call) -> None:
    card = card_of("taken", tmp_path, call, *([] if undo else ["--no-undo"]))
    assert card.count("\n- `") == 1, "the beginning of an adapter is none of those that went in"
    assert "its init (pissa) took its first factors off the base" in card
    places = {"BASE": tmp_path / "base", "ADAPTER": tmp_path / "adapter", "INITIAL": tmp_path / "begun"}
    merge, verify, *unmerge = commands(card, **places, **{".": tmp_path / "merged"})
    assert call("-q", *merge, "-o", tmp_path / "again").code == 0
    for file in (tmp_path / "merged").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    assert call("-q", *verify).code == 0
    assert len(unmerge) == undo
    for line in unmerge:
        assert call("-q", *line[:-1], tmp_path / "back").code == 0


def test_the_beginning_of_an_adapter_is_no_model_that_went_in(tmp_path: Path, call: Call) -> None:
    """Found in the Hub's cache, both have names there."""
    world = WORLDS["taken"](tmp_path)
    places = []
    for folder in (world.adapter, world.initial):
        assert folder is not None
        place = tmp_path / "hub" / f"models--owner--{folder.name}" / "snapshots" / ("0" * 40)
        place.parent.mkdir(parents=True)
        places.append(folder.rename(place))
    out = tmp_path / "merged"
    assert call("-q", "merge", world.base, places[0], "--initial", places[1], "-o", out).code == 0
    metadata = metadata_load(out / "README.md")
    assert metadata is not None
    assert metadata["base_model"] == ["base", "owner/adapter"]
