"""Merge, and unmerge with the undo file: however the base lies on disk, all of its files come back, and no others."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from round_trips import (
    RECEIPT,
    Listener,
    as_raw,
    contents,
    digest_of,
    gaussian,
    lora,
    round_trip,
    small_adapter,
    small_base,
    weights,
    write_adapter,
    write_base,
    write_raw,
)

from lora_cli.adapters.source import ReadOptions
from lora_cli.checkpoint.dtypes import DTYPES
from lora_cli.checkpoint.undo_file import open_undo_file
from lora_cli.errors import UsageError, WrongInputError
from lora_cli.surgery.merge import merge
from lora_cli.surgery.placing import PlanOptions
from lora_cli.surgery.unmerge import unmerge

INDEX = "model.safetensors.index.json"


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


@pytest.mark.parametrize("bare", [False, True])
def test_names_that_are_odd_as_names_of_files(tmp_path: Path, bare: bool) -> None:
    """What no undo file can name is not taken along; labels may be anything, and the names of tensor files."""
    latin = os.fsdecode(b"\xe9")
    base = write_base(tmp_path / f"b{latin}", {"x.weight": gaussian(1, 30, 20)})
    odd = base / (
        ".hidden.safetensors" if bare else f"m{latin}\n.safetensors"
    )  # hidden ones are read where they are named
    (base / "model.safetensors").rename(odd)
    lost = [f"{latin}.txt", "back\\slash.txt", "new\nline.txt"]
    for name in (*lost, "ü 重み.txt", "x" * 251 + ".txt"):
        (base / name).write_text(ascii(name))
    adapter = small_adapter(tmp_path / f"a{latin}", 1, "x")
    if bare:
        merge(odd, [adapter], tmp_path / f"m{latin}.safetensors")
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


# Other files


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


def test_only_what_is_needed_is_kept(tmp_path: Path) -> None:
    tensors = {"x.base.weight": gaussian(1, 30, 20), "y.weight": gaussian(2, 30, 20), "z": gaussian(3, 9)}
    tensors |= lora(4, "x", 30, 20) | {"head.weight": gaussian(5, 30, 20), "norm": gaussian(6, 7).half()}
    base = write_base(tmp_path / "base", tensors)
    adapter = small_adapter(tmp_path / "adapter", 7, "y", **{"head.weight": gaussian(8, 30, 20)})
    options = PlanOptions(read=ReadOptions(alpha=4.0), dtype="fp32", weights=(1.0, 1.0))
    trip = round_trip(tmp_path, base, [adapter], options)
    undo = open_undo_file(trip.merged / "lora_merge.undo")
    kept = {tensor.key: tensor.how for file in undo.manifest.files for tensor in file.tensors}
    assert kept == {
        **dict.fromkeys(["x.base.weight", "y.weight", "norm"], "preimages"),
        **dict.fromkeys(["x.lora_A.weight", "x.lora_B.weight"], "stored"),
        "head.weight": "residual",
        "z": "copy",
    }
    sides = {side.name: side.stored for side in undo.manifest.side_files}
    assert sides == {"config.json": "packed", "tokenizer.json": "", "README.md": "packed"}
    header = ["header/model.safetensors", "manifest", "side/README.md", "side/config.json"]
    parts = [f"{'stored' if how == 'stored' else 'undo'}/{key}" for key, how in kept.items() if how != "copy"]
    assert sorted(undo.parts) == sorted([*header, *parts])


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


def test_a_cast_that_loses_nothing_takes_little(tmp_path: Path) -> None:
    tensors = {"x.weight": gaussian(1, 30, 20, dtype=torch.bfloat16), "cast": gaussian(2, 9999, dtype=torch.bfloat16)}
    base, adapter = write_base(tmp_path / "base", tensors), small_adapter(tmp_path / "adapter", 1, "x")
    trip = round_trip(tmp_path, base, [adapter], PlanOptions(dtype="fp32"))
    assert trip.there.undo is not None
    assert trip.there.undo.bytes < 4000


def test_a_tensor_that_was_replaced_by_its_like_takes_little(tmp_path: Path) -> None:
    head = gaussian(1, 100, 100, dtype=torch.bfloat16)
    base = write_base(tmp_path / "base", {"head.weight": head, "x.weight": gaussian(2, 4, 4)})
    near = head.clone()
    near[7] *= 1.01
    factors = lora(3, "x", 4, 4) | {"head.weight": near}
    trip = round_trip(tmp_path, base, [write_adapter(tmp_path / "adapter", factors, modules_to_save=["head"])])
    assert trip.there.undo is not None
    assert trip.there.undo.bytes < head.nbytes // 4


@pytest.mark.parametrize("dtype", ["keep", "fp32"])
def test_a_tensor_that_one_adapter_replaces_and_another_changes(tmp_path: Path, dtype: str) -> None:
    """Its deltas come in tiles, what it displaced is kept in blocks; it has several of both."""
    head, new = (gaussian(seed, 700, 512, dtype=torch.bfloat16) for seed in (1, 2))
    base = write_base(tmp_path / "base", {"head.weight": head, "x.weight": gaussian(3, 4, 4)})
    whole = write_adapter(tmp_path / "whole", lora(4, "x", 4, 4) | {"head.weight": new}, modules_to_save=["head"])
    changed = write_adapter(tmp_path / "changed", lora(5, "head", 700, 512))
    trip = round_trip(tmp_path, base, [whole, changed], PlanOptions(dtype=dtype))
    assert trip.there.ledger["replaced"] == 1
