"""What inspect, diff and plans say of adapters of other tuners than LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import MODULES, PREFIX, WIDTH, out_of, write_adapter, write_base
from tuner_worlds import PARTS, tensors_of, write_norms, write_tuner

from lora_cli.errors import NamesError, UnsupportedError
from lora_cli.surgery.diff import diff
from lora_cli.surgery.effects import effects_of
from lora_cli.surgery.inspect import inspect
from lora_cli.surgery.inspection import PlaceInfo
from lora_cli.surgery.merge import merge, plan_merge
from lora_cli.surgery.verify import verify

ACTS = {"ADALORA": "product", "FOURIERFT": "sum", "IA3": "gain", "LOHA": "sum", "OFT": "map"}
RANKS = {"ADALORA": 2, "FOURIERFT": None, "IA3": None, "LOHA": 2, "OFT": None}
SCALES = {"ADALORA": 8 / (4 + 1e-5), "FOURIERFT": 30.0, "IA3": None, "LOHA": 3.0, "OFT": None}
NAMES = sorted(MODULES)  # as safetensors writes them
ONE = NAMES[0]


@pytest.mark.parametrize("kind", PARTS)
def test_an_adapter_is_told_by_what_it_does(kind: str, tmp_path: Path) -> None:
    alone = inspect(write_tuner(tmp_path / "a", kind))
    assert [one.module for one in alone.modules] == NAMES  # nothing tells of biases
    one = alone.modules[0]
    assert (one.acts, one.rank, one.shape) == (ACTS[kind], RANKS[kind], None)
    assert one.undo == ("residual" if kind == "OFT" else "preimages")
    assert one.alpha == {"ADALORA": 8, "LOHA": 6}.get(kind)
    assert one.parts == {name.removesuffix(".weight"): found.shape for name, found in PARTS[kind](ONE).items()}
    assert one.scale == (None if SCALES[kind] is None else pytest.approx(SCALES[kind], rel=1e-7))
    assert (alone.refused, alone.effects) == ((), None)


@pytest.mark.parametrize("kind", PARTS)
def test_a_base_tells_shapes_and_places(kind: str, tmp_path: Path) -> None:
    found = inspect(write_tuner(tmp_path / "a", kind), base=write_base(tmp_path / "base"))
    assert [one.module for one in found.modules] == NAMES  # the base has no biases
    for one in found.modules:
        assert (one.shape, one.places) == ((out_of(one.module), WIDTH), (PlaceInfo(f"{one.module}.weight"),))


def test_norms_are_whole_tensors(tmp_path: Path) -> None:
    found = inspect(write_norms(tmp_path / "a"))
    assert {(one.shape, one.acts, one.undo, one.rank) for one in found.modules} == {((WIDTH,), None, None, None)}
    assert found.adapter_kind == "LN tuning"


def test_fields_that_no_merge_does_are_told_and_the_rest_is_shown(tmp_path: Path) -> None:
    found = inspect(write_tuner(tmp_path / "a", "LOHA", not_known=3))
    assert len(found.modules) == len(MODULES)
    (said,) = found.refused
    assert said.startswith("not_known = 3: ")


def test_a_part_that_is_missing_is_found_when_the_file_is_read(tmp_path: Path) -> None:
    made = {key: tensor for key, tensor in tensors_of("LOHA").items() if key != f"{PREFIX}{ONE}.hada_w1_b"}
    with pytest.raises(NamesError, match="A module lacks a tensor") as caught:
        inspect(write_tuner(tmp_path / "a", "LOHA", made))
    assert caught.value.details == (f"{ONE} has no hada_w1_b",)


@pytest.mark.parametrize("kind", PARTS)
def test_singular_values_are_of_factors(kind: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="LoRA's factors") as caught:
        inspect(write_tuner(tmp_path / "a", kind), spectrum=True)
    assert (caught.value.details, (caught.value.found or "").endswith(" modules")) == ((), True)


# Differences


@pytest.mark.parametrize("kind", PARTS)
def test_parts_are_compared_one_by_one(kind: str, tmp_path: Path) -> None:
    one = write_tuner(tmp_path / "a", kind)
    same = diff(one, write_tuner(tmp_path / "b", kind))
    assert (same.same, same.unchanged) == (True, len(tensors_of(kind)))
    name, tensor = next(iter(tensors_of(kind).items()))
    other = diff(one, write_tuner(tmp_path / "c", kind, tensors_of(kind) | {name: tensor + np.float32(0.5)}))
    (changed,) = other.changed
    assert (changed.key, changed.what) == (name.removeprefix(PREFIX).removesuffix(".weight"), "values")
    assert changed.max_abs == pytest.approx(0.5)
    assert diff(one, tmp_path / "c", only=MODULES[1]).same


@pytest.mark.parametrize(
    ("kind", "config", "setting"),
    [
        ("LOHA", {"alpha": 8}, ("scale", "3.0", "4.0")),
        ("FOURIERFT", {"random_loc_seed": 8}, ("seed", "7", "8")),
        ("FOURIERFT", {"alpha_pattern": {}}, None),
    ],
)
def test_the_same_parts_may_mean_another_thing(
    kind: str, config: dict[str, Any], setting: tuple[str, str, str] | None, tmp_path: Path
) -> None:
    found = diff(write_tuner(tmp_path / "a", kind), write_tuner(tmp_path / "b", kind, **config))
    said = {(change.key, change.what, change.before, change.after) for change in found.changed}
    expected = {(f"{module}.weight.{setting[0]}", "setting", *setting[1:]) for module in MODULES} if setting else set()
    assert said == expected


def test_tuners_differ(tmp_path: Path) -> None:
    found = diff(write_adapter(tmp_path / "a"), write_tuner(tmp_path / "b", "LOHA"))
    assert [(change.key, change.before, change.after) for change in found.changed] == [("peft_type", "LoRA", "LoHa")]
    assert found.only_in_a == tuple(sorted(f"{module}.weight" for module in MODULES))
    assert len(found.only_in_b) == len(tensors_of("LOHA"))


# Plans and results


@pytest.mark.parametrize("kind", PARTS)
def test_effects_say_what_is_no_sum(kind: str, tmp_path: Path) -> None:
    base, adapter = write_base(tmp_path / "base"), write_tuner(tmp_path / "a", kind)
    planned = plan_merge(base, [adapter])
    effects, count = effects_of(planned), len(MODULES)
    assert (effects.multiplied, effects.remade) == (count * (kind == "IA3"), count * (kind == "OFT"))
    (use,) = planned.adapters
    assert [scale.scale for scale in use.scales] == ([] if SCALES[kind] is None else [pytest.approx(SCALES[kind])])
    terms = [term for edit in planned.edits for term in edit.as_dict()["terms"]]
    assert {(term["rank"], term["scale"] is None) for term in terms} == {(RANKS[kind], SCALES[kind] is None)}


@pytest.mark.parametrize("kind", PARTS)
def test_verify_says_that_the_base_is_there(kind: str, tmp_path: Path) -> None:
    base, adapter = write_base(tmp_path / "base"), write_tuner(tmp_path / "a", kind)
    merge(base, [adapter], tmp_path / "merged")
    assert verify(tmp_path / "merged", base, [adapter], roundtrip=True).verified
    bare = verify(base, base, [adapter])
    assert not bare.verified
    assert {one.key for one in bare.different} == {f"{module}.weight" for module in MODULES}


@pytest.mark.parametrize(("kind", "tags"), [("LOHA", {"merge", "lora-cli"}), ("IA3", {"merge", "lora-cli"})])
def test_the_card_names_the_tuner(kind: str, tags: set[str], tmp_path: Path) -> None:
    merge(write_base(tmp_path / "base"), [write_tuner(tmp_path / "a", kind)], tmp_path / "merged")
    card = (tmp_path / "merged" / "README.md").read_text("utf-8")
    (said,) = (line for line in card.splitlines() if line.startswith("- `a`: "))
    assert said == {"LOHA": "- `a`: LoHa, weight 1, scale 3", "IA3": "- `a`: (IA)³, weight 1"}[kind]
    assert {line.removeprefix("- ") for line in card.split("---")[1].splitlines() if line.startswith("- ")} >= tags
    assert "- lora\n" not in card
    assert ("multiplied, each by its own number" in card) == (kind == "IA3")
