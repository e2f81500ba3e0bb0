"""Merge on merge, wrapped checkpoints and embedded adapters: each merge comes off as the whole that it was put on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from round_trips import (
    RECEIPT,
    Listener,
    contents,
    gaussian,
    lora,
    round_trip,
    small_adapter,
    small_base,
    weights,
    write_base,
    write_raw,
)

from lora_cli.adapters.source import ReadOptions
from lora_cli.checkpoint.undo_file import open_undo_file
from lora_cli.errors import UsageError, WrongInputError
from lora_cli.surgery.inject import inject
from lora_cli.surgery.merge import merge
from lora_cli.surgery.placing import PlanOptions
from lora_cli.surgery.unmerge import unmerge

# Wrapped checkpoints


def with_factors_apart(folder: Path, shards: int) -> Path:
    """A wrapped checkpoint; of two shards one holds nothing but its factors, and has no place in what is merged."""
    tensors = {"x.base.weight": gaussian(1, 30, 20), "y": gaussian(2, 3)}
    return write_base(folder, tensors | lora(3, "x", 30, 20), shards)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_folder_that_became_a_bare_file_comes_back_as_tensors_alone(tmp_path: Path, shards: int) -> None:
    base, listener = with_factors_apart(tmp_path / "base", shards), Listener()
    merge(base, [], tmp_path / "m.safetensors", PlanOptions(read=ReadOptions(alpha=4.0)))
    back = unmerge(tmp_path / "m.safetensors", [], tmp_path / "back", progress=listener)
    found = contents(tmp_path / "back")
    assert found.pop(RECEIPT)
    assert back.exact
    assert weights(tmp_path / "back") == weights(base)
    assert found.items() <= contents(base).items()
    assert "config.json" in " ".join(listener.told)


def test_a_shard_that_has_no_place_in_the_merged_checkpoint_comes_back(tmp_path: Path) -> None:
    base = with_factors_apart(tmp_path / "base", 2)
    trip = round_trip(tmp_path, base, [], PlanOptions(read=ReadOptions(alpha=4.0)))
    assert len(weights(trip.merged)) == 1


def trained(wrapped: Path) -> Path:
    """Give the factors of a wrapped checkpoint values: B is zero when it is fresh."""
    for number, path in enumerate(sorted(wrapped.glob("*.safetensors")) if wrapped.is_dir() else [wrapped]):
        raw = bytearray(path.read_bytes())
        start = 8 + int.from_bytes(raw[:8], "little")
        for name, entry in json.loads(raw[8:start]).items():
            if ".lora_B." in name:
                begin, end = (start + at for at in entry["data_offsets"])
                raw[begin:end] = gaussian(number, (end - begin) // 4).numpy().tobytes()
        path.write_bytes(raw)
    return wrapped


@pytest.mark.parametrize("output", ["keep", "fp32"])
@pytest.mark.parametrize("more", ["", "apart", "embedded"])
@pytest.mark.parametrize("shards", [1, 3])
def test_wrapped_checkpoints_come_back_wrapped(tmp_path: Path, shards: int, more: str, output: str) -> None:
    plain, targets = small_base(tmp_path / "plain", shards), ["x", "z"]
    inject(plain, tmp_path / "base", rank=2, alpha=3, rslora=True, layout="wrapped", targets=targets)
    base, options = trained(tmp_path / "base"), PlanOptions(dtype=output)
    adapters = [small_adapter(tmp_path / "adapter", 5, "x", "y")] if more else []
    embed = more == "embedded"
    trip = round_trip(tmp_path, base, adapters, options, given=[] if embed else adapters, embed=embed)
    assert {"lora_wrap.json", "lora_inject.json"} <= set(contents(trip.back))
    assert trip.there.tensors["dropped"] == 4
    assert "lora_wrap.json" not in contents(trip.merged)
    held = [adapter.held for adapter in open_undo_file(trip.merged / "lora_merge.undo").manifest.adapters]
    assert held == ["in the base", *([more] if more else [])]


def test_a_bare_wrapped_file_comes_back_with_its_description(tmp_path: Path) -> None:
    plain = write_raw(tmp_path / "p.safetensors", {"x.weight": ("F16", [30, 20], bytes(1200))})
    inject(plain, tmp_path / "w.safetensors", rank=2, alpha=4, layout="wrapped", targets=["x"])
    wrapped = trained(tmp_path / "w.safetensors")
    merge(wrapped, [], tmp_path / "m.safetensors")
    unmerge(tmp_path / "m.safetensors", [], tmp_path / "b.safetensors")
    for name in ("safetensors", "lora_wrap.json", "lora_inject.json"):
        assert (tmp_path / f"b.{name}").read_bytes() == (tmp_path / f"w.{name}").read_bytes()
    assert not (tmp_path / "b.lora_merge.json").exists()
    assert merge(tmp_path / "b.safetensors", [], tmp_path / "again.safetensors").tensors["edited"] == 1
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "m.safetensors").read_bytes()


# Merge on merge


@pytest.mark.parametrize("embed", [False, True])
@pytest.mark.parametrize("shards", [1, 2])
def test_stacked_merges_come_off_one_by_one(tmp_path: Path, shards: int, embed: bool) -> None:
    base = small_base(tmp_path / "0", shards)
    adapters = [
        small_adapter(tmp_path / f"adapter {level}", level, *modules) for level, modules in enumerate(["xy", "yz", "x"])
    ]
    for level, adapter in enumerate(adapters):
        merge(tmp_path / str(level), [adapter], tmp_path / str(level + 1), embed_adapter=embed)
    place = tmp_path / "3"
    for level in (2, 1, 0):
        with pytest.raises(WrongInputError):  # the last one comes off first
            unmerge(place, [adapters[level - 1]], tmp_path / "no")
        unmerge(place, [] if embed else [adapters[level]], tmp_path / f"back to {level}")
        place = tmp_path / f"back to {level}"
        found = contents(place)
        assert found.pop(RECEIPT)
        assert found == contents(tmp_path / str(level))
        assert ("lora_merge.undo" in found, "lora_merge.json" in found) == (level > 0, level > 0)
    assert {name: d for name, d in contents(place).items() if name != RECEIPT} == contents(base)


def test_stacked_merges_of_bare_files_come_off_one_by_one(tmp_path: Path) -> None:
    write_raw(tmp_path / "m0.safetensors", {"x.weight": ("F16", [30, 20], bytes(1200))}, {"k": "v"}, odd=True)
    adapters = [small_adapter(tmp_path / f"adapter {level}", level, "x") for level in range(3)]
    for level, adapter in enumerate(adapters):
        options = PlanOptions(dtype="bf16" if level == 1 else "keep")
        merge(tmp_path / f"m{level}.safetensors", [adapter], tmp_path / f"m{level + 1}.safetensors", options)
    place = tmp_path / "m3.safetensors"
    for level in (2, 1, 0):
        unmerge(place, [adapters[level]], tmp_path / f"b{level}.safetensors")
        place = tmp_path / f"b{level}.safetensors"
        for ending in ("safetensors", "lora_merge.json", "lora_merge.undo"):
            before, after = tmp_path / f"m{level}.{ending}", tmp_path / f"b{level}.{ending}"
            assert before.exists() == after.exists()
            assert not before.exists() or before.read_bytes() == after.read_bytes()


def test_what_was_unmerged_can_take_the_same_adapter_again(tmp_path: Path) -> None:
    base, adapter = small_base(tmp_path / "base"), small_adapter(tmp_path / "adapter", 1)
    other = small_adapter(tmp_path / "other", 9)
    first = round_trip(tmp_path / "1", base, [adapter])
    # What says that it was unmerged once is a receipt: it is not taken along.
    second = round_trip(tmp_path / "2", first.back, [adapter], lost=[RECEIPT])
    assert weights(second.merged) == weights(first.merged)
    stacked = round_trip(tmp_path / "3", first.merged, [other])
    for place in (stacked.merged, stacked.back):
        with pytest.raises(WrongInputError, match="already"):
            merge(place, [adapter], tmp_path / "no")
    merge(stacked.back, [other], tmp_path / "yes")


# Embedded adapters


def test_an_embedded_adapter_is_all_that_is_needed(tmp_path: Path) -> None:
    base, adapter = small_base(tmp_path / "base", 2), small_adapter(tmp_path / "adapter", 1, "x", "y")
    other = small_adapter(tmp_path / "other", 2)
    trip = round_trip(tmp_path, base, [adapter, other], given=[], embed=True)
    wrong = small_adapter(tmp_path / "wrong", 3)
    with pytest.raises(WrongInputError) as caught:
        unmerge(trip.merged, [wrong], tmp_path / "no")
    assert caught.value.exit_code == 23
    with pytest.raises(WrongInputError):
        unmerge(trip.merged, [adapter, wrong], tmp_path / "no")
    unmerge(trip.merged, str(other), tmp_path / "right")  # one alone needs no list
    assert weights(tmp_path / "right") == weights(base)
    assert not (tmp_path / "no").exists()


def test_an_adapter_that_was_not_embedded_is_asked_for_by_name_and_digest(tmp_path: Path) -> None:
    base, adapter = small_base(tmp_path / "base"), small_adapter(tmp_path / "adapter", 1)
    result = merge(base, [adapter, small_adapter(tmp_path / "second", 2)], tmp_path / "merged")
    receipt = json.loads((tmp_path / "merged/lora_merge.json").read_text())
    with pytest.raises(UsageError) as caught:
        unmerge(tmp_path / "merged", [adapter], tmp_path / "no")
    assert caught.value.exit_code == 2
    assert "second" in str(caught.value)
    assert receipt["adapters"][1]["digest"] in str(caught.value)
    assert result.undo is not None
    one_bit = shutil.copytree(tmp_path / "second", tmp_path / "one bit")
    raw = bytearray((one_bit / "adapter_model.safetensors").read_bytes())
    raw[-1] ^= 1
    (one_bit / "adapter_model.safetensors").write_bytes(raw)
    with pytest.raises(WrongInputError):
        unmerge(tmp_path / "merged", [adapter, one_bit], tmp_path / "no")
