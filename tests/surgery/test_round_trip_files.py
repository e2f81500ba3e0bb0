"""Merge, and unmerge with the undo file: however the base lies on disk, all of its files come back, and no others."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from round_trips import (
    RECEIPT,
    as_raw,
    contents,
    digest_of,
    gaussian,
    lora,
    round_trip,
    weights,
    write_adapter,
    write_base,
    write_raw,
)

from lora_cli.adapters.source import ReadOptions
from lora_cli.checkpoint.dtypes import DTYPES
from lora_cli.errors import UsageError, WrongInputError
from lora_cli.progress import Progress
from lora_cli.surgery.inject import inject
from lora_cli.surgery.merge import merge
from lora_cli.surgery.placing import PlanOptions
from lora_cli.surgery.unmerge import unmerge

INDEX = "model.safetensors.index.json"


def small_base(folder: Path, shards: int = 1, dtype: torch.dtype = torch.bfloat16) -> Path:
    tensors = {f"{key}.weight": gaussian(n, 30, 20, dtype=dtype) for n, key in enumerate("xyz")}
    return write_base(folder, tensors | {"x.bias": gaussian(4, 30, dtype=dtype)}, shards)


def small_adapter(folder: Path, seed: int, *modules: str, **others: torch.Tensor) -> Path:
    tensors = {key: t for n, name in enumerate(modules or "xy") for key, t in lora(seed + n, name, 30, 20).items()}
    return write_adapter(folder, tensors | others, modules_to_save=["head"])


def every_type(dtype: str) -> list[tuple[str, list[int]]]:
    """Shapes of tensors of a type: matrices, vectors, scalars and empty ones."""
    shapes = [[4, 12], [8], [2, 0, 3], [0]]
    return [(f"{dtype}.{shape}", shape) for shape in ([[], *shapes] if DTYPES[dtype].bits % 8 == 0 else shapes)]


@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("output", ["keep", "bf16"])
def test_what_no_adapter_touches_comes_back_whatever_it_is(tmp_path: Path, odd: bool, output: str) -> None:
    rng, base, target = np.random.default_rng(1), tmp_path / "base", ("F32", [6, 4], bytes(96))
    tensors: dict[str, Any] = {" two  words\t": ("BF16", [1], b"\x01\x80"), "..": ("U8", [3], b"abc"), "": target}
    for name, dtype in DTYPES.items():
        for key, shape in every_type(name):
            data = rng.bytes(math.prod(shape) * dtype.bits // 8)
            # Numbers that are cast must fit: these are about 0.7, the others are small anyway.
            wide = output != "keep" and name in ("F32", "F64")
            tensors[key] = (name, shape, b"\x3f" * len(data) if wide else data)
    names = ("b of 2.safetensors", "a of 2.safetensors")
    write_raw(base / names[0], tensors, {"zeta": "1", "alpha": "ü"}, odd=odd)
    write_raw(base / names[1], {"x.weight": target, "重み/../x": ("F16", [1], b"\x01\xfe")}, None, odd=odd)
    index = {"weight_map": {"": names[0], "x.weight": names[1]}, "metadata": {"by": "hand"}, "v": 1}
    (base / INDEX).write_text(json.dumps(index, indent=3))
    (base / "sub").mkdir()
    (base / "sub" / "config.json").write_text("{}")
    factors = {"x.lora_A.weight": torch.ones(4, 4), "x.lora_B.weight": torch.ones(6, 4)}
    trip = round_trip(tmp_path, base, [write_adapter(tmp_path / "adapter", factors)], PlanOptions(dtype=output))
    cast = sum(kind in ("F16", "F32", "F64") for kind, _, _ in tensors.values()) + 1
    assert trip.there.tensors["edited"] == 1 + (0 if output == "keep" else cast)


class Listener(Progress):
    """Remembers what a person was told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def warn(self, text: str) -> None:
        self.told.append(text)


@pytest.mark.parametrize("bare", [False, True])
def test_names_that_are_odd_as_names_of_files(tmp_path: Path, bare: bool) -> None:
    """What no undo file can name is not taken along; a hidden file of tensors is, and labels may be anything."""
    latin = os.fsdecode(b"\xe9")
    base = write_base(tmp_path / f"b{latin}", {"x.weight": gaussian(1, 30, 20)})
    (base / "model.safetensors").rename(base / ".hidden.safetensors")
    lost = [f"{latin}.txt", "back\\slash.txt"]
    for name in (*lost, "new\nline.txt", "x" * 251 + ".txt"):
        (base / name).write_text(ascii(name))
    adapter = small_adapter(tmp_path / f"a{latin}", 1, "x")
    if bare:
        merge(base / ".hidden.safetensors", [adapter], tmp_path / f"m{latin}.safetensors")
        unmerge(tmp_path / f"m{latin}.safetensors", [adapter], tmp_path / "back")
        assert weights(tmp_path / "back") == weights(base)
    else:
        round_trip(tmp_path / "there", base, [adapter], lost=lost)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", ["lora_A lora_B", "A B"])
def test_plain_files_of_factors_in_either_layout(tmp_path: Path, name: str, turned: bool) -> None:
    a, b = gaussian(1, 4, 20), gaussian(2, 30, 4)
    first, second = name.split()
    factors = {f"x.{first}": a.T if turned else a, f"x.{second}": b.T if turned else b}
    raw = {key: as_raw(tensor) for key, tensor in factors.items()}
    adapter = write_raw(tmp_path / "factors.safetensors", raw)
    options = PlanOptions(read=ReadOptions(scale=0.3))
    trip = round_trip(tmp_path, small_base(tmp_path / "base"), [adapter], options)
    # Nothing that says how strong it was is needed again.
    assert trip.there.adapters[0].scales[0].scale == 0.3


# One bare file


@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("output", ["keep", "fp32"])
def test_a_bare_file_becomes_a_bare_file_and_back(tmp_path: Path, odd: bool, output: str) -> None:
    raw = {"x.weight": ("BF16", [30, 20], np.arange(600, dtype="<u2").tobytes()), "n": ("I8", [3], b"abc")}
    base = write_raw(tmp_path / "base.safetensors", raw, {"b": "2", "a": "1"}, odd=odd)
    adapter, out = small_adapter(tmp_path / "adapter", 1, "x"), tmp_path / "out"
    out.mkdir()
    result = merge(base, [adapter], out / "m.safetensors", PlanOptions(dtype=output))
    assert set(contents(out)) == {"m.safetensors", "m.lora_merge.undo", "m.lora_merge.json"} == set(result.files)
    assert result.undo is not None
    assert result.undo.path == "m.lora_merge.undo"
    back = unmerge(out / "m.safetensors", [adapter], tmp_path / "back.safetensors")
    assert back.exact
    assert (tmp_path / "back.safetensors").read_bytes() == base.read_bytes()
    assert [file.name for file in back.files] == ["back.safetensors", "back.lora_unmerge.json"]
    assert not [
        path
        for path in tmp_path.iterdir()
        if path.name not in {"base.safetensors", "adapter", "out", "back.safetensors", "back.lora_unmerge.json"}
    ]


def test_a_bare_file_may_be_renamed_with_its_undo_file_or_named_apart_from_it(tmp_path: Path) -> None:
    base = write_raw(tmp_path / "base.safetensors", {"x.weight": ("F32", [30, 20], bytes(2400))})
    adapter, out = small_adapter(tmp_path / "adapter", 1, "x"), tmp_path / "m.safetensors"
    merge(base, [adapter], out)
    out.rename(tmp_path / "other name.safetensors")
    with pytest.raises(WrongInputError, match="no undo file"):
        unmerge(tmp_path / "other name.safetensors", [adapter], tmp_path / "a")
    unmerge(tmp_path / "other name.safetensors", [adapter], tmp_path / "a", undo=tmp_path / "m.lora_merge.undo")
    (tmp_path / "m.lora_merge.undo").rename(tmp_path / "other name.lora_merge.undo")
    (tmp_path / "m.lora_merge.json").unlink()
    unmerge(tmp_path / "other name.safetensors", [adapter], tmp_path / "b")
    for folder in ("a", "b"):
        assert set(contents(tmp_path / folder)) == {"base.safetensors", RECEIPT}
        assert (tmp_path / folder / "base.safetensors").read_bytes() == base.read_bytes()


@pytest.mark.parametrize("shards", [1, 2])
def test_a_folder_that_became_a_bare_file_comes_back_as_tensors_alone(tmp_path: Path, shards: int) -> None:
    """Of two shards one may hold nothing but the factors of a wrapped checkpoint, which has no place in the output."""
    tensors: dict[str, Any] = {"x.base.weight": gaussian(1, 30, 20), "y": gaussian(2, 3)}
    tensors |= lora(3, "x", 30, 20)
    base = write_base(tmp_path / "base", tensors, shards)
    alpha = PlanOptions(read=ReadOptions(alpha=4.0))
    merge(base, [], tmp_path / "m.safetensors", alpha)
    listener = Listener()
    back = unmerge(tmp_path / "m.safetensors", [], tmp_path / "back", progress=listener)
    found = contents(tmp_path / "back")
    assert found.pop(RECEIPT)
    assert back.exact
    assert weights(tmp_path / "back") == weights(base)
    assert found.items() <= contents(base).items()
    assert "config.json" in " ".join(listener.told)


# Wrapped checkpoints


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
@pytest.mark.parametrize("more", [False, True])
@pytest.mark.parametrize("shards", [1, 3])
def test_wrapped_checkpoints_come_back_wrapped(tmp_path: Path, shards: int, more: bool, output: str) -> None:
    inject(
        small_base(tmp_path / "plain", shards),
        tmp_path / "base",
        rank=2,
        alpha=3,
        rslora=True,
        layout="wrapped",
        targets=["x", "z"],
    )
    base = trained(tmp_path / "base")
    adapters = [small_adapter(tmp_path / "adapter", 5, "x", "y")] if more else []
    trip = round_trip(tmp_path, base, adapters, PlanOptions(dtype=output), embed=False)
    assert {"lora_wrap.json", "lora_inject.json"} <= set(contents(trip.back))
    assert trip.there.tensors["dropped"] == 4
    assert "lora_wrap.json" not in contents(trip.merged)


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


# The adapter, and other files


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
    unmerge(trip.merged, [other], tmp_path / "right")
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


def test_the_tokenizer_of_the_base_comes_back(tmp_path: Path) -> None:
    base, adapter = small_base(tmp_path / "base"), small_adapter(tmp_path / "adapter", 1)
    (adapter / "tokenizer.json").write_text('{"version": "the adapter\'s"}')
    (adapter / "chat_template.jinja").write_text("{{ new }}")
    trip = round_trip(tmp_path, base, [adapter], PlanOptions(tokenizer="adapter"))
    assert "adapter's" in (trip.merged / "tokenizer.json").read_text()
    assert (trip.merged / "chat_template.jinja").exists()
    assert "chat_template.jinja" in [name for name in contents(trip.merged) if name not in contents(trip.back)]


def test_what_a_merge_left_out_is_named_when_it_is_undone(tmp_path: Path) -> None:
    base, adapter, listener = small_base(tmp_path / "base"), small_adapter(tmp_path / "adapter", 1), Listener()
    for name in ("pytorch_model.bin", "other.safetensors", ".gitattributes"):
        (base / name).write_text("left")
    lost = ["pytorch_model.bin", "other.safetensors", ".gitattributes"]
    trip = round_trip(tmp_path, base, [adapter], lost=lost)
    unmerge(trip.merged, [adapter], tmp_path / "told", progress=listener)
    assert all(name in " ".join(listener.told) for name in lost[:2])


def test_without_an_undo_file_nothing_is_undone(tmp_path: Path) -> None:
    base, adapter = small_base(tmp_path / "base", 2), small_adapter(tmp_path / "adapter", 1)
    plain = merge(base, [adapter], tmp_path / "plain", undo=False)
    full = merge(base, [adapter], tmp_path / "full")
    assert plain.undo is None
    assert weights(tmp_path / "plain") == weights(tmp_path / "full")
    assert set(contents(tmp_path / "full")) - set(contents(tmp_path / "plain")) == {"lora_merge.undo"}
    receipts = [json.loads((tmp_path / name / "lora_merge.json").read_text()) for name in ("plain", "full")]
    assert ["digests" in receipt["base"] for receipt in receipts] == [False, True]
    assert ["digests" in receipt for receipt in receipts] == [False, True]
    assert receipts[0]["adapters"] == receipts[1]["adapters"]
    assert set(full.files) == set(plain.files) | {"lora_merge.undo"}
    with pytest.raises(WrongInputError) as caught:
        unmerge(tmp_path / "plain", [adapter], tmp_path / "back")
    assert caught.value.exit_code == 23
    assert "--approximate" in str(caught.value)
    with pytest.raises(UsageError):
        merge(base, [adapter], tmp_path / "no", undo=False, embed_adapter=True)


@pytest.mark.parametrize("output", ["keep", "fp32"])
def test_digests_are_those_of_the_files(tmp_path: Path, output: str) -> None:
    base = small_base(tmp_path / "base", 2)
    adapter = small_adapter(tmp_path / "adapter", 1, **{"head.weight": gaussian(1, 3, 5)})
    trip = round_trip(tmp_path, base, [adapter], PlanOptions(dtype=output))
    said = json.loads((trip.merged / "lora_merge.json").read_text())
    assert said["digests"] == {name: digest_of(trip.merged / name) for name in weights(trip.merged)}
    assert said["base"]["digests"] == {name: digest_of(base / name) for name in contents(base)}
    assert {file.name: file.digest for file in trip.again.files if file.digest} == said["base"]["digests"]
    receipt = json.loads((trip.back / RECEIPT).read_text())
    assert (receipt["digests"], receipt["exact"]) == (said["base"]["digests"], True)
