"""How adapters that do more than add to weights are shown, and what they do: within eighty columns, and as JSON."""

from __future__ import annotations

import json
import re
from itertools import takewhile
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from adapter_worlds import HEAD, REFUSED, TABLE, WORLDS, World, table_factors
from cli_world import ROOT, Call, Ran, call_fixture  # noqa: F401 (fixture)
from tiny import MODULES, PREFIX, adapter_tensors, factors, numbers, read_tensors, write_adapter, write_base

from lora_cli.cli import effects
from lora_cli.cli.text import few, spans
from lora_cli.surgery.effects import ConfigChange, Effects

TOLD = {
    "plain": [],
    "blocks": [],
    "as_one": [],
    "taken": [],
    "dora": ["DoRA lengths of outputs are set in 4 tensors"],
    "trained_tokens": [f"rows 3 of {TABLE}"],
    "untied": [f"untied {HEAD} from {TABLE}", "config tie_word_embeddings from true to false"],
    "resized": [f"resized from 20 to 23 rows: {HEAD}, {TABLE}", "config vocab_size from 20 to 23"],
    "repeated": ["layers 4, formerly 0-1, 0-1; 6 tensors stored once more", "config num_hidden_layers from 2 to 4"],
    "parts": ["parts model.layers.1.mlp.gate_up_proj.weight [12:24]"],
}
"""Lines that say what a merge does besides adding to whole tensors."""

ALONE = {
    "plain": [],
    "parts": [],
    "resized": ["whole 2 (the base's own, as the adapter was trained on it)"],
    "dora": ["kind DoRA"],
    "blocks": ["modules 2 linear layers, 2 layers with a block-diagonal A"],
    "as_one": [
        "tied of two tied tensors both get what one gets (ensure_weight_tying)",
        "modules 1 linear layer, 1 embedding",
    ],
    "taken": ["init pissa changed the base: a merge needs --initial, or that base"],
    "trained_tokens": [f"rows 3 of {TABLE}: 3, 1, 19"],
    "untied": ["modules 1 embedding"],
    "repeated": ["layers 4: the stored 0-1, 0-1"],
}
"""Lines that say what an adapter is, beside those of every adapter."""

USUAL = re.compile(r"(format|kind LoRA$|made for|parameters|types|scale|base) ?")


def rows_of(text: str) -> list[str]:
    """The rows of names and what is said of them before the table, a line for each; fails where one is too long."""
    assert max(map(len, text.splitlines())) <= 80
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)
    found: list[str] = []
    for line in takewhile(bool, text.splitlines()):
        if re.match(r"  \S+(?: \S+)?  ", line):
            found.append(" ".join(line.split()))
        elif line.startswith("      ") and found:
            found[-1] += f" {line.strip()}"
    return found


def told(ran: Ran) -> list[str]:
    """What is said of effects."""
    names = ("DoRA", "rows", "parts", "resized", "untied", "layers", "config")
    return [row for row in rows_of(ran.out) if row.split()[0] in names]


def merge_of(world: World, folder: Path) -> list[object]:
    return ["merge", world.base, world.adapter, "-o", folder / "merged", *world.flags]


@pytest.mark.parametrize("name", WORLDS)
def test_a_merge_says_what_it_does_before_and_after(name: str, tmp_path: Path, call: Call) -> None:
    world = WORLDS[name](tmp_path)
    line = merge_of(world, tmp_path)
    assert sorted(told(call(*line, "--dry-run"))) == sorted(TOLD[name])
    done = call(*line)
    assert sorted(told(done)) == sorted(TOLD[name])
    assert sorted(told(Ran(0, re.sub("(?m)^warning: .*\n", "", done.err), ""))) == sorted(TOLD[name])
    assert sorted(told(call("inspect", tmp_path / "merged"))) == sorted(TOLD[name])
    for folder in ("merged", "base"):
        assert max(map(len, call("diff", world.base, tmp_path / folder).out.splitlines())) <= 80


@pytest.mark.parametrize("name", WORLDS)
def test_an_adapter_says_what_it_is(name: str, tmp_path: Path, call: Call) -> None:
    world = WORLDS[name](tmp_path)
    alone = rows_of(call("inspect", world.adapter).out)
    assert [row for row in alone if not USUAL.match(row)] == ALONE[name]
    on_base = rows_of(call("inspect", world.adapter, "--base", world.base).out)
    besides = [row for row in TOLD[name] if row.split()[0] in ("parts", "resized", "untied", "config")]
    assert sorted(set(on_base) - set(alone)) == sorted([*besides, *(row for row in on_base if row.startswith("base "))])


@pytest.mark.parametrize("word", REFUSED)
def test_what_cannot_be_merged_says_why_and_exits_with_0(word: str, tmp_path: Path, call: Call) -> None:
    ran = call("inspect", write_adapter(tmp_path / "a", **REFUSED[word]))
    assert (ran.code, ran.err) == (0, "")
    (row,) = (row for row in rows_of(ran.out) if row.startswith("no merge "))
    assert word in row
    assert "scale 2 = lora_alpha / r, 4 modules" in rows_of(ran.out)


def test_names_of_an_adapter_cannot_steer_the_terminal(tmp_path: Path, call: Call) -> None:
    made = adapter_tensors() | {f"{PREFIX}\x1b[2Jx.token_adapter.trainable_tokens_delta": numbers(2, 8)}
    adapter = write_adapter(tmp_path / "a", made, trainable_token_indices=[1, 2], not_known="\x1b[31m")
    out = call("inspect", adapter).out
    assert "\x1b" not in out
    assert r"\x1b[2Jx.weight" in out


def test_an_adapter_that_is_not_understood_is_a_list_of_tensors(tmp_path: Path, call: Call) -> None:
    adapter = write_adapter(tmp_path / "a", {f"{PREFIX}x.poly_lora_A": numbers(2, 3)}, peft_type="POLY")
    out = call("inspect", adapter).out
    assert "kind POLY" in rows_of(out)
    (said,) = (row for row in rows_of(out) if row.startswith("no merge "))
    assert said.startswith("no merge Adapters of this type cannot be merged: it mixes factors by the task")
    assert re.search(r"^base_model\.model\.x\.poly_lora_A +F32 +2×3 *$", out, re.MULTILINE)


def test_what_the_base_lacks_is_named(tmp_path: Path, call: Call) -> None:
    world = WORLDS["plain"](tmp_path)
    made = adapter_tensors() | {f"{PREFIX}other.lora_{side}.weight": numbers(2, 2) for side in "AB"}
    found = rows_of(call("inspect", write_adapter(tmp_path / "b", made), "--base", world.base).out)
    assert {"base 4 of 5 names found", "not found other"} <= set(found)


def test_places_that_are_not_plain_are_told_below_the_table(tmp_path: Path, call: Call) -> None:
    world = WORLDS["parts"](tmp_path)
    adapter = write_adapter(tmp_path / "a", read_tensors(world.adapter) | table_factors())
    table, _, below = call("inspect", adapter, "--base", world.base).out.rpartition("\n\n")
    assert "base key" not in table
    assert re.search(r"^model\.layers\.1\.mlp\.up_proj +2 +4 +2 +12×8 +F32 *$", table, re.MULTILINE)
    gate = "model.layers.1.mlp.gate_up_proj.weight [12:24]"
    assert " ".join(below.split()) == f"model.layers.1.mlp.up_proj goes to {gate}", "its own name is not said again"
    plain = WORLDS["plain"](tmp_path / "p")
    assert "goes to" not in call("inspect", plain.adapter, "--base", plain.base).out


def test_many_places_have_a_column_and_what_they_begin_with_is_said_once(tmp_path: Path, call: Call) -> None:
    names = [f"blocks.{number}.attention.q" for number in range(6)]
    base, adapter = tmp_path / "base", tmp_path / "a"
    write_base(base, {f"text_model.encoder.{name}.weight": numbers(8, 8) for name in names})
    made = factors(dict.fromkeys(names, (8, 8)))
    out = call("inspect", write_adapter(adapter, made), "--base", base, "--map", "blocks=text_model.encoder.blocks").out
    assert max(map(len, out.splitlines())) <= 80
    assert re.search(r"^5\.attention\.q +2 +4 +2 +8×8 +F32 +5\.attention\.q\.weight *$", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (MODULES[0], "Shapes of adapter and base do not fit (1): "),
        ("x.q", "Nothing in this adapter matches the base: "),
    ],
)
def test_a_base_that_does_not_fit_is_a_reason_and_the_table_is_there(
    module: str, reason: str, tmp_path: Path, call: Call
) -> None:
    world = WORLDS["plain"](tmp_path)
    ran = call("inspect", write_adapter(tmp_path / "b", factors({module: (7, 5)})), "--base", world.base)
    assert ran.code == 0
    (row,) = (row for row in rows_of(ran.out) if row.startswith("no merge "))
    assert row.startswith(f"no merge into base: {reason}")
    assert re.search(rf"^{re.escape(module)} .* 7×5 ", ran.out, re.MULTILINE)
    assert "names found" not in ran.out


def test_what_was_before_training_is_named(tmp_path: Path, call: Call) -> None:
    world = WORLDS["taken"](tmp_path)
    words = "pissa: begun (as it was before training) was taken off the base"
    assert f"init {words}" in rows_of(call("inspect", world.adapter, *world.flags).out)
    spectra = {
        (): "spectrum with what pissa took off the base; --initial takes that off again",
        tuple(world.flags): "spectrum of what a merge adds, after begun (as it was before training) is taken off",
    }
    for flags, words in spectra.items():
        assert words in rows_of(call("inspect", world.adapter, "--spectrum", *flags).out)
    plain = WORLDS["plain"](tmp_path / "p")
    assert not [row for row in rows_of(call("inspect", plain.adapter, "--spectrum").out) if row.startswith("spectrum ")]


def test_adapter_tensors_with_one_fate_are_one_row(tmp_path: Path, call: Call) -> None:
    world = WORLDS["plain"](tmp_path)
    more = {f"{PREFIX}{name}.lora_velora_embed": numbers(4) for name in MODULES}
    adapter = write_adapter(tmp_path / "b", adapter_tensors() | more)
    reason = "how activations were kept in training"
    assert f"left out 4 tensors: {reason}" in rows_of(call("inspect", adapter).out)
    (row,) = (r for r in rows_of(call("merge", world.base, adapter, "--dry-run").out) if r.startswith("ignored "))
    assert row.endswith(f"… and 2 more ({reason})")


def test_edits_are_told_apart_in_a_plan(tmp_path: Path, call: Call) -> None:
    edits = {"dora": "add (DoRA)", "trained_tokens": "3 rows", "parts": "add to parts", "resized": "replace"}
    for name, words in edits.items():
        world = WORLDS[name](tmp_path / name)
        out = call("merge", world.base, world.adapter, "--dry-run").out
        assert re.search(rf"  {re.escape(words)}  ", out), (name, out)


def test_tables_that_come_back_are_not_dropped(tmp_path: Path, call: Call) -> None:
    world, merged = WORLDS["resized"](tmp_path), tmp_path / "merged"
    call("merge", world.base, world.adapter, "-o", merged)
    assert "tensors 4 tensors change, 5 copied" in rows_of(call("unmerge", merged, world.adapter, "--dry-run").out)


# JSON


@pytest.mark.parametrize("name", WORLDS)
def test_documents_keep_to_their_schemas(name: str, tmp_path: Path, call: Call) -> None:
    world = WORLDS[name](tmp_path)
    lines: dict[str, list[list[object]]] = {
        "merge": [merge_of(world, tmp_path)],
        "inspect": [
            ["inspect", world.adapter, "--spectrum", "--base", world.base, *world.flags],
            ["inspect", tmp_path / "merged"],
        ],
        "diff": [["diff", world.base, tmp_path / "merged"], ["diff", world.adapter, world.adapter]],
        "verify": [["verify", tmp_path / "merged", "--base", world.base, "--adapter", world.adapter, *world.flags]],
    }
    found: dict[str, Any] = {}
    for command, several in lines.items():
        schema = json.loads((ROOT / "docs" / "schemas" / f"{command}.json").read_text("utf-8"))
        for line in several:
            found[command] = call(*line, "--json").document
            jsonschema.Draft202012Validator(schema).validate(found[command])
    planned = call(*merge_of(world, tmp_path), "--force", "--dry-run", "--json").document
    assert planned["effects"] == found["merge"]["effects"]
    assert found["verify"]["verified"]


# Words


def test_spans() -> None:
    assert spans([]) == ""
    assert spans([3]) == "3"
    assert spans([0, 1, 2, 1, 5, 6, 4]) == "0-2, 1, 5-6, 4"


def test_few() -> None:
    assert few([1, 2, 3], 3) == "1, 2, 3"
    assert few(iter("abcd"), 2) == "a, b … and 2 more"


def test_values_of_a_config_are_cut_and_fields_that_come_and_go_are_told() -> None:
    changes = (
        ConfigChange("a", None, {"x": 1}),
        ConfigChange("b", 2, None),
        ConfigChange("c", ["long"] * 20, ["ü"]),
        ConfigChange("d", 0, False),
    )
    said = [dict(effects.rows(Effects(config=(change,))))["config"] for change in changes]
    assert said == [
        'a is {"x": 1}',
        "b is gone",
        'c from ["long", "long", "long"… to ["ü"]',
        "d from 0 to false",
    ]
    assert dict(effects.rows(Effects(config=changes)))["config"].endswith("… and 2 more")
    assert list(effects.rows(None)) == []
