"""What a merge says that it does besides adding to whole tensors: in plans, results, receipts, and of checkpoints."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from adapter_worlds import HEAD, TABLE, VOCABULARY, WORLDS, World
from tiny import MODULES, listing, read_tensors, write_json

from lora_cli.adapters.source import ReadOptions
from lora_cli.surgery.effects import ConfigChange, Effects, effects_of, recalled
from lora_cli.surgery.inspect import inspect
from lora_cli.surgery.merge import MergeResult, merge, plan_merge
from lora_cli.surgery.placing import PlanOptions

MORE = VOCABULARY + 3
EXPECTED = {
    "plain": Effects(),
    "blocks": Effects(),
    "as_one": Effects(),
    "taken": Effects(),
    "dora": Effects(lengths=len(MODULES)),
    "trained_tokens": Effects(rows={TABLE: 3}),
    "untied": Effects(untied={HEAD: TABLE}, config=(ConfigChange("tie_word_embeddings", True, False),)),
    "resized": Effects(
        resized={TABLE: (VOCABULARY, MORE), HEAD: (VOCABULARY, MORE)},
        config=(ConfigChange("vocab_size", VOCABULARY, MORE),),
    ),
    "repeated": Effects(
        layers=(0, 1, 0, 1),
        repeated=tuple(
            f"model.layers.{layer}.{name}.weight"
            for layer in (2, 3)
            for name in ("self_attn.q_proj", "mlp.up_proj", "input_layernorm")
        ),
        config=(ConfigChange("num_hidden_layers", 2, 4),),
    ),
    "parts": Effects(parts={"model.layers.1.mlp.gate_up_proj.weight": ((12, 24),)}),
}


def options(world: World) -> PlanOptions:
    return PlanOptions(read=ReadOptions(initial=(str(world.initial),) if world.initial else ()))


def merged(world: World, folder: Path) -> MergeResult:
    return merge(world.base, [world.adapter], folder / "merged", options(world))


def in_order(effects: Effects | None) -> Effects | None:
    return effects and replace(effects, repeated=tuple(sorted(effects.repeated)))


@pytest.mark.parametrize("name", WORLDS)
def test_every_effect_is_told_of_and_no_other(name: str, tmp_path: Path) -> None:
    world = WORLDS[name](tmp_path)
    expected = in_order(EXPECTED[name])
    assert in_order(effects_of(plan_merge(world.base, [world.adapter], options(world)))) == expected
    result = merged(world, tmp_path)
    assert in_order(result.effects) == expected
    receipt = json.loads((tmp_path / "merged" / "lora_merge.json").read_text())
    assert ("effects" in receipt) == bool(expected)
    found = inspect(tmp_path / "merged")
    assert (found.kind, in_order(found.effects)) == ("merged", expected)


@pytest.mark.parametrize("name", WORLDS)
def test_what_is_told_is_what_came_out(name: str, tmp_path: Path) -> None:
    """The files say it too: tensors that are new or of another shape, and fields of the config."""
    world = WORLDS[name](tmp_path)
    effects = merged(world, tmp_path).effects
    before, after = read_tensors(world.base), read_tensors(tmp_path / "merged")
    assert after.keys() - before.keys() == {*effects.untied, *effects.repeated}
    sizes = {key: (before[key].shape, after[key].shape) for key in before}
    changed = {key: (old[0], new[0]) for key, (old, new) in sizes.items() if old != new}
    assert changed == dict(effects.resized)
    for key, amount in effects.rows.items():
        assert int((before[key] != after[key]).any(axis=1).sum()) == amount
    for key, outputs in effects.parts.items():
        ((begin, end),) = outputs
        differs = (before[key] != after[key]).any(axis=1).tolist()
        assert differs == [begin <= row < end for row in range(len(differs))]
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (world.base, tmp_path / "merged"))
    expected = {ConfigChange(name, old[name], new[name]) for name in old if old[name] != new[name]}
    assert set(effects.config) == expected
    assert old.keys() == new.keys()


def test_levels_of_a_config_are_told_apart_and_a_new_field_is_none_before(tmp_path: Path) -> None:
    world = WORLDS["resized"](tmp_path)
    inner = {"vocab_size": VOCABULARY, "empty": {}, "decoder": {"dtype": "float32"}}
    config = {"vocab_size": 7, "text_config": inner}
    write_json(world.base / "config.json", config)
    planned = plan_merge(world.base, [world.adapter], PlanOptions(dtype="bf16"))
    assert effects_of(planned).config == (
        ConfigChange("text_config.vocab_size", VOCABULARY, MORE),
        ConfigChange("text_config.decoder.dtype", "float32", "bfloat16"),
    )


def test_a_flag_that_was_not_there_is_none_before(tmp_path: Path) -> None:
    world = WORLDS["untied"](tmp_path)
    config = json.loads((world.base / "config.json").read_text())
    write_json(world.base / "config.json", {"text_config": {"vocab_size": VOCABULARY}} | config)
    found = effects_of(plan_merge(world.base, [world.adapter])).config
    assert ConfigChange("text_config.tie_word_embeddings", None, False) in found


def test_one_file_has_no_config(tmp_path: Path) -> None:
    world = WORLDS["parts"](tmp_path)
    planned = plan_merge(world.base, [world.adapter], PlanOptions(dtype="bf16"), out=tmp_path / "one.safetensors")
    assert effects_of(planned).config == ()


@pytest.mark.parametrize(
    "said", [None, 3, [], {"rows": 3}, {"rows": {"a": "b"}}, {"layers": ["x"]}, {"config": [{"field": 1}]}, "rows"]
)
def test_a_receipt_that_tells_nonsense_tells_nothing(said: object, tmp_path: Path) -> None:
    assert recalled(said) is None
    merged(WORLDS["untied"](tmp_path), tmp_path)
    place = tmp_path / "merged" / "lora_merge.json"
    receipt = json.loads(place.read_text())
    write_json(place, receipt | {"effects": said})
    assert inspect(tmp_path / "merged").effects is None


@pytest.mark.parametrize("effects", EXPECTED.values(), ids=EXPECTED.keys())
def test_effects_come_back_from_json(effects: Effects) -> None:
    said: dict[str, Any] = json.loads(json.dumps(asdict(effects)))
    assert recalled(said) == effects


def test_inspecting_writes_nothing(tmp_path: Path) -> None:
    world = WORLDS["untied"](tmp_path)
    before = listing(tmp_path)
    inspect(world.adapter, base=world.base)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("name", WORLDS)
def test_a_single_file_says_what_a_config_would_have_to_say(name: str, tmp_path: Path) -> None:
    """No config.json is written beside it: without a word the vocabulary would be cut, or the head tied again."""
    world = WORLDS[name](tmp_path)
    alone = plan_merge(world.base, [world.adapter], options(world), out=tmp_path / "merged.safetensors")
    whole = plan_merge(world.base, [world.adapter], options(world), out=tmp_path / "merged")
    told = [text for text in alone.warnings if "config.json" in text]
    changes = EXPECTED[name].config
    assert len(told) == (1 if changes else 0)
    assert all(f"{change.field} {json.dumps(change.after)}" in told[0] for change in changes)
    assert not any("config.json" in text for text in whole.warnings)
