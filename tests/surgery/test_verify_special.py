"""What verify says of merges that are more than sums on whole tensors: right ones pass, and wrong ones are named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import read_tensors
from round_trips import write_adapter, write_base
from safetensors.torch import save_file
from special_worlds import LLAMA, WORLDS, World, dora, llama, queries, rows
from test_merge_oracles import overwrite
from undo_world import command, flip_tensor, read_raw, read_undo, rewrite, shard_of

from lora_cli.adapters.source import ReadOptions
from lora_cli.arithmetic.ordered import neighbours
from lora_cli.errors import MalformedFileError, UnsupportedError
from lora_cli.surgery.merge import merge
from lora_cli.surgery.placing import PlanOptions
from lora_cli.surgery.verify import VerifyResult, verify

BF16 = torch.bfloat16
every_world = pytest.mark.parametrize("name", WORLDS)


def merged_of(folder: Path, world: World, name: str = "merged", *adapters: Path) -> Path:
    merge(world.base, adapters or world.adapters, folder / name, world.options, threads=1, undo=not adapters)
    return folder / name


def looks(result: VerifyResult) -> dict[str, str | None]:
    return {difference.key: difference.looks_like for difference in result.different}


@every_world
def test_one_bit_of_any_tensor(tmp_path: Path, name: str) -> None:
    """Copied, changed, repeated, replaced: it is named with the base, and by the undo file alone."""
    world = WORLDS[name](tmp_path, BF16, 2)
    merged = merged_of(tmp_path, world)
    keys = {key: shard_of(merged, key).name for path in merged.glob("*.safetensors") for key in read_raw(path)[1]}
    for key in keys:
        flip_tensor(merged, key)
        found = verify(merged, world.base, world.adapters, world.options, threads=1)
        assert [(one.key, one.what, one.elements) for one in found.different] == [(key, "values", 1)]
        assert str(found.different[0].looks_like).startswith(("this merge", "the base with 1 changed element"))
        alone = verify(merged, None, world.given, roundtrip=True, threads=1)
        assert len(alone.different) == 1
        assert {one.what for one in alone.different} == {"roundtrip"}
        flip_tensor(merged, key)
    assert verify(merged, world.base, world.adapters, world.options, roundtrip=True, threads=1).verified


@every_world
def test_the_base_alone(tmp_path: Path, name: str) -> None:
    """What could be there is the bare base; what could not is missing, or of another shape."""
    world = WORLDS[name](tmp_path, BF16, 1)
    result = verify(world.base, world.base, world.adapters, world.options, threads=1)
    assert not result.verified
    if name not in ("repeated", "shortened"):  # there the layers themselves are other ones
        words = {one.looks_like for one in result.different if one.what == "values"}
        assert all(str(one).startswith("the bare base") for one in words)
    assert {one.what for one in result.different} <= {"values", "missing", "shape", "unexpected", "config"}


@every_world
def test_what_survived_is_what_the_merge_said(tmp_path: Path, name: str) -> None:
    world = WORLDS[name](tmp_path, BF16, 1)
    result = merge(world.base, world.adapters, tmp_path / "merged", world.options)
    survival = verify(tmp_path / "merged", world.base, world.adapters, world.options).survival
    assert survival == result.survival
    assert all(survived.strength == pytest.approx(1, abs=0.01) for survived in survival)


# Lengths


def with_tensors(adapter: Path, folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor | None]) -> Path:
    """A copy of an adapter with other numbers, or without some."""
    shutil.copytree(adapter, folder)
    tensors = {key: new for key, old in read_tensors(adapter).items() if (new := change(key, old)) is not None}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    if not any("magnitude" in key for key in tensors):
        config = json.loads((folder / "adapter_config.json").read_text()) | {"use_dora": False}
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(name="stretched")
def stretched_fixture(tmp_path: Path) -> World:
    return dora(tmp_path, BF16, 1)


def test_a_tool_that_knows_no_magnitudes(stretched: World, tmp_path: Path) -> None:
    plain = with_tensors(stretched.adapters[0], tmp_path / "plain", lambda k, t: None if "magnitude" in k else t)
    other = merged_of(tmp_path, stretched, "other", plain, stretched.adapters[1])
    result = verify(other, stretched.base, stretched.adapters, stretched.options)
    assert len(result.different) == 6
    words = "this merge without the magnitudes of one: only B·A was added"
    assert result.looks_like == f"all 6 tensors that differ look like {words}"


def test_other_magnitudes(stretched: World, tmp_path: Path) -> None:
    near = with_tensors(stretched.adapters[0], tmp_path / "near", lambda k, t: t * 1.01 if "magnitude" in k else t)
    other = merged_of(tmp_path, stretched, "other", near, stretched.adapters[1])
    result = verify(other, stretched.base, stretched.adapters, stretched.options)
    assert result.looks_like == "all 6 tensors that differ look like this merge with other magnitudes or factors"
    assert all(one.strength == pytest.approx(1.01, abs=0.01) for one in result.different)


def test_half_way_there_is_no_scale(stretched: World, tmp_path: Path) -> None:
    """A tool may have taken the middle of base and merge, which is no DoRA of these factors."""
    merged, base = merged_of(tmp_path, stretched), read_tensors(stretched.base)
    right = {key: tensor.clone() for key, tensor in read_tensors(merged).items() if key != "y.weight"}
    for key in ("x.weight", "emb.weight"):
        overwrite(merged, key, ((right[key].double() + base[key].double()) / 2).to(BF16))
    found = looks(verify(merged, stretched.base, stretched.adapters, stretched.options))
    assert found == dict.fromkeys(("emb.weight", "x.weight"), "this merge with other magnitudes or factors")


def test_one_magnitude(stretched: World, tmp_path: Path) -> None:
    def change(key: str, tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor[:5] * 1.5, tensor[5:]]) if key.endswith("x.lora_magnitude_vector") else tensor

    other = with_tensors(stretched.adapters[0], tmp_path / "near", lambda k, t: change(k, t.clone()))
    merged = merged_of(tmp_path, stretched, "other", other, stretched.adapters[1])
    result = verify(merged, stretched.base, stretched.adapters, stretched.options)
    assert [one.key for one in result.different] == ["x.weight"]
    assert (result.different[0].elements or 0) <= 5 * 45


def test_dora_twice_is_no_strength(stretched: World, tmp_path: Path) -> None:
    once = merged_of(tmp_path, stretched)
    merge(once, stretched.adapters, tmp_path / "twice", stretched.options, again=True)
    result = verify(tmp_path / "twice", stretched.base, stretched.adapters, stretched.options)
    found = looks(result)
    assert {found["y.weight"], found["x.bias"]} == {"two applied twice", "one applied twice"}
    rest = {words for key, words in found.items() if key not in ("y.weight", "x.bias")}
    assert not any(word in str(words) for words in rest for word in ("twice", "scale", "sign"))


def test_lengths_beside_a_plain_change(tmp_path: Path) -> None:
    """A value with lengths, and a key without, in one tensor."""
    world = WORLDS["fused"](tmp_path, BF16, 1)
    key = "encoder.layers.2.attn.Wqkv.weight"
    left_out = {"another adapter, or another change": 2, "this merge with other magnitudes or factors": 0}
    for words, number in left_out.items():
        chosen = [at for at in range(4) if at != number]
        weights, adapters = zip(*((world.options.weights[at], world.adapters[at]) for at in chosen), strict=True)
        merge(world.base, adapters, tmp_path / f"without {number}", PlanOptions(weights), undo=False)
        different = verify(tmp_path / f"without {number}", world.base, world.adapters, world.options).different
        (found,) = [one for one in different if one.key == key]
        assert str(found.looks_like).startswith(words)
        assert 0 <= (found.strength or 0) <= 1
    near = with_tensors(world.adapters[2], tmp_path / "near", lambda k, t: t * 1.01 if "magnitude" in k else t)
    merge(world.base, [*world.adapters[:2], near, world.adapters[3]], tmp_path / "other", world.options, undo=False)
    result = verify(tmp_path / "other", world.base, world.adapters, world.options)
    assert looks(result) == {key: "this merge with other magnitudes or factors"}


def test_other_rounding_is_told_and_allowed(stretched: World, tmp_path: Path) -> None:
    """As by a tool that multiplies in another order."""
    merged = merged_of(tmp_path, stretched)
    key = "emb.weight"
    table = read_tensors(merged)[key].clone()
    table[::3] = neighbours(table)[1][::3]
    overwrite(merged, key, table)
    result = verify(merged, stretched.base, stretched.adapters, stretched.options)
    assert "rounded in another way" in str(looks(result)[key])
    assert verify(merged, stretched.base, stretched.adapters, stretched.options, max_ulp=1).verified


@pytest.mark.parametrize("with_base", [True, False])
def test_gains_that_are_not_those_of_the_merge(stretched: World, tmp_path: Path, with_base: bool) -> None:
    merged = merged_of(tmp_path, stretched)
    undo = merged / "lora_merge.undo"
    name = "gains/x.weight"
    assert name in read_undo(undo)[1]

    def change(_: object, parts: dict[str, tuple[str, list[int], bytes]]) -> None:
        dtype, shape, data = parts[name]
        parts[name] = (dtype, shape, data[:8] + bytes([data[8] ^ 1]) + data[9:])

    rewrite(undo, change)
    base = stretched.base if with_base else None
    options = stretched.options if with_base else None
    with pytest.raises(MalformedFileError) as caught:
        verify(merged, base, stretched.adapters, options, roundtrip=True)
    assert "x.weight: the gains" in str(caught.value.expected)
    assert not with_base or verify(merged, base, stretched.adapters, options).verified


# Rows


def test_rows_are_judged_apart_from_what_is_added(tmp_path: Path) -> None:
    world = rows(tmp_path, BF16, 1)
    key = "model.embed_tokens.weight"
    merged = merged_of(tmp_path, world)
    survival = verify(merged, world.base, world.adapters, world.options).survival
    assert {survived.key: round(survived.strength or 0, 2) for survived in survival}[key] == 1.0
    base, made, held = read_tensors(world.base)[key], read_tensors(merged)[key].clone(), [32, 0, 7]
    without, alone = made.clone(), base.clone()
    without[held], alone[held] = base[held], made[held]
    ways = {
        "this merge, but for the rows that the adapter holds whole": without,
        "this merge without what one would have added": alone,
    }
    for words, table in ways.items():
        overwrite(merged, key, table)
        assert looks(verify(merged, world.base, world.adapters, world.options)) == {key: words}


def test_one_row(tmp_path: Path) -> None:
    world = rows(tmp_path, BF16, 1)
    merged = merged_of(tmp_path, world)
    key = "model.embed_tokens.weight"
    table = read_tensors(merged)[key].clone()
    found = {7: "this merge, but for the rows that the adapter holds whole", 8: "this merge with 12 changed elements"}
    for row, words in found.items():
        overwrite(merged, key, torch.cat([table[:row], -table[row : row + 1], table[row + 1 :]]))
        assert looks(verify(merged, world.base, world.adapters, world.options)) == {key: words}
    overwrite(merged, key, table)
    assert verify(merged, world.base, world.adapters, world.options).verified


# Parts of a tensor, and what stands on top of something else


def test_parts_of_one_adapter_have_names(tmp_path: Path) -> None:
    world = WORLDS["fused"](tmp_path, BF16, 1)
    one = world.adapters[0]
    part = with_tensors(one, tmp_path / "part", lambda k, t: None if "layers.0.self_attn.k_proj" in k else t)
    merge(world.base, [one], tmp_path / "right", threads=1)
    for name, adapter, weight in (("part", part, 1.0), ("half", one, 0.5), ("opposite", one, -1.0)):
        merge(world.base, [adapter], tmp_path / f"merged {name}", PlanOptions((weight,)), undo=False)
    key = "encoder.layers.0.attn.Wqkv.weight"
    names = ("part", "half", "opposite")
    found = {name: looks(verify(tmp_path / f"merged {name}", world.base, [one]))[key] for name in names}
    assert found == {
        "part": "this merge without the adapter on layers.0.self_attn.k_proj",
        "half": "the adapter at 0.5 times its scale",
        "opposite": "the adapter with the opposite sign",
    }


def test_a_change_that_is_missing_on_a_table_that_was_replaced(tmp_path: Path) -> None:
    world = WORLDS["resized"](tmp_path, BF16, 1)
    merge(world.base, world.adapters[:1], tmp_path / "first", undo=False)
    result = verify(tmp_path / "first", world.base, world.adapters)
    assert looks(result) == {"lm_head.weight": "this merge without what two would have added"}


# Inits


def test_what_was_taken_off_before_training(tmp_path: Path) -> None:
    world = WORLDS["initial"](tmp_path, BF16, 1)
    ignored = ReadOptions(ignore_fields=("init_lora_weights",))
    merge(world.base, world.adapters, tmp_path / "wrong", PlanOptions((0.7,), read=ignored), undo=False)
    result = verify(tmp_path / "wrong", world.base, world.adapters, world.options)
    assert set(looks(result).values()) == {"this merge without before (as it was before training)"}


def test_the_command_line_with_initial(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = WORLDS["initial"](tmp_path, BF16, 1)
    merged = merged_of(tmp_path, world)
    (adapter,), (before,) = world.adapters, world.befores
    given = ["--adapter", adapter, "--initial", before]
    assert command("verify", merged, "--base", world.base, *given, "--weight", 0.7, "--roundtrip") == 0
    assert command("verify", merged, *given, "--roundtrip") == 0
    assert command("verify", merged, "--adapter", adapter, "--roundtrip") == 2
    said = capsys.readouterr().err
    assert "before (as it was before training) is needed" in said
    proves, restores = "verify MERGED --adapter one --initial before --roundtrip", "unmerge MERGED one before -o OUT"
    assert f"try: {proves} or {restores};" in said
    assert command("unmerge", merged, adapter, "-o", tmp_path / "back") == 2
    assert f"try: {restores} or {proves};" in capsys.readouterr().err
    assert command("unmerge", merged, adapter, "--initial", before, "-o", tmp_path / "back") == 0
    assert (tmp_path / "back/model.safetensors").read_bytes() == (world.base / "model.safetensors").read_bytes()


# Layers


def test_adapters_for_other_layers_are_not_merged_together(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", llama(BF16, head=True), 1, num_hidden_layers=3, **LLAMA)
    runs = {"one": [[0, 3]], "two": [[0, 2], [1, 3]], "three": None}
    made = {
        name: write_adapter(tmp_path / name, queries(40 + at, 0, 1, 2), **({"layer_replication": said} if said else {}))
        for at, (name, said) in enumerate(runs.items())
    }
    with pytest.raises(UnsupportedError, match="models of different layers") as caught:
        merge(base, [made["two"], made["three"]], tmp_path / "merged")
    assert [line.partition(":")[0] for line in caught.value.details] == ["two", "three"]
    merge(base, [made["two"]], tmp_path / "first")
    merge(tmp_path / "first", [made["three"]], tmp_path / "second")
    assert verify(tmp_path / "second", tmp_path / "first", [made["three"]], roundtrip=True).verified
