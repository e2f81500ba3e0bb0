"""The receipt of a merge: what it says, that it says the same everywhere, and what it keeps from happening."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from safetensors.torch import save_file
from undo_world import (
    FIRST,
    LORA,
    RECEIPT,
    SECOND,
    UNDO,
    World,
    adapter_tensors,
    contents,
    lora,
    read_raw,
    read_undo,
    unpack,
)

import lora_cli
from lora_cli.adapters.source import ReadOptions
from lora_cli.checkpoint import digests
from lora_cli.surgery.merge import merge
from lora_cli.surgery.placing import PlanOptions

ROOT = Path(__file__).parents[2]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path).write()


def receipt_of(folder: Path) -> dict[str, Any]:
    document = json.loads((folder / RECEIPT).read_text())
    assert isinstance(document, dict)
    return document


# Digests, from their definition


def cuts_of(dtype: str, shape: list[int], data: bytes, most: int = 1 << 25) -> list[bytes]:
    """The bytes of each cut: rows that have at most so many elements together."""
    if not data:
        return []
    rows = shape[0] if shape else 1
    elements = 1
    for size in shape:
        elements *= size
    step = max(1, most // max(1, elements // rows)) if dtype not in ("F4", "F6_E2M3", "F6_E3M2") else rows
    row = len(data) // rows
    return [data[at * row : (at + step) * row] for at in range(0, rows, step)]


def digest_of(path: Path, most: int = 1 << 25) -> str:
    """The digest of a file: of its bytes; of tensors, of what stands before them and of the digests of their cuts."""
    data = path.read_bytes()
    if path.suffix != ".safetensors":
        return blake3(data).hexdigest()
    prefix = data[: 8 + int.from_bytes(data[:8], "little")]
    cuts = [cut for said in read_raw(path)[1].values() for cut in cuts_of(*said, most)]
    return blake3(b"".join(blake3(part).digest() for part in [prefix, *cuts])).hexdigest()


def digest_of_adapter(tensors: Mapping[str, torch.Tensor], types: Mapping[torch.dtype, str]) -> str:
    """The digest of an adapter: of a line for each name and one for what it is."""
    text = ""
    for name, tensor in sorted(tensors.items()):
        cuts = [blake3(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()]
        text += f"{name}\n" + " ".join([types[tensor.dtype], str(list(tensor.shape)), *cuts]) + "\n"
    return blake3(text.encode()).hexdigest()


# What it says


def test_everything_it_says(world: World) -> None:
    second = lora("x", 6, 4, 40)
    second = {key: tensor.to(torch.bfloat16) for key, tensor in second.items()}
    options = PlanOptions(weights=(1.0, -0.25), maps=("nothing=else",))
    adapter = world.write_adapter("second", second, use_rslora=True, lora_alpha=3)
    world.merge(world.adapter, adapter, options=options)
    files = contents(world.merged)
    names = {torch.float32: "F32", torch.bfloat16: "BF16"}
    assert receipt_of(world.merged) == {
        "schema": "lora-cli/receipt/1",
        "operation": "merge",
        "tool": {"name": "lora-cli", "version": lora_cli.__version__},
        "arithmetic": 1,
        "base": {
            "label": "base",
            "digests": {path.name: digest_of(path) for path in world.base.iterdir()},
        },
        "adapters": [
            {
                "label": "adapter",
                "format": "peft",
                "kind": "LoRA",
                "weight": 1.0,
                "rewrite": "nothing → else; as they are",
                "scales": [{"scale": 2.0, "source": "lora_alpha / r", "modules": 2}],
                "digest": digest_of_adapter(adapter_tensors(), names),
            },
            {
                "label": "second",
                "format": "peft",
                "kind": "rsLoRA",
                "weight": -0.25,
                "rewrite": "nothing → else; as they are",
                "scales": [{"scale": -0.5303300858899106, "source": "lora_alpha / √r", "modules": 1}],
                "digest": digest_of_adapter(second, names),
            },
        ],
        "options": {
            "dtype": "keep",
            "map": ["nothing=else"],
            "allow_unmapped": False,
            "orientation": None,
            "ignore_field": [],
        },
        "tensors": {"total": 6, "edited": 3, "copied": 2, "added": 1, "dropped": 0},
        "ledger": {"applied": 6, "replaced": 1, "added": 1, "ignored": 0},
        "edited": ["head.weight", "x.weight", "y.weight", "score.weight"],
        "digests": {name: digest_of(world.merged / name) for name in (FIRST, SECOND)},
        "files": sorted(files),
        "bytes": {name: len(data) for name, data in files.items() if name not in (UNDO, RECEIPT)},
    }
    assert set(world.result.files) == set(files)


def test_what_was_asked_for_is_in_it(world: World) -> None:
    read = ReadOptions(scale=0.5, ignore_fields=("use_sparkle",))
    world.write_adapter("adapter", lora("x", 6, 4, 10) | lora("zz", 6, 4, 3), use_sparkle=1)
    options = PlanOptions(dtype="fp32", allow_unmapped=True, orientation="ba", read=read)
    said = receipt_of(world.merge(options=options).merged)
    assert said["options"] == {
        "dtype": "fp32",
        "map": [],
        "allow_unmapped": True,
        "orientation": "ba",
        "ignore_field": ["use_sparkle"],
    }
    assert said["ledger"] == {"applied": 2, "replaced": 0, "added": 0, "ignored": 2}
    (scale,) = said["adapters"][0]["scales"]
    assert (scale["scale"], scale["source"]) == (0.5, "--scale")


def test_without_an_undo_file(world: World) -> None:
    world.merge(undo=False)
    said = receipt_of(world.merged)
    assert world.result.undo is None
    assert UNDO not in said["files"]
    assert "digest" in said["adapters"][0]
    assert said["files"] == sorted(contents(world.merged))


def test_tensors_of_many_cuts(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a cut had at most 8 elements."""
    monkeypatch.setattr(digests, "CUT_ELEMENTS", 8)
    said = receipt_of(world.merge().merged)
    assert said["digests"] == {name: digest_of(world.merged / name, 8) for name in (FIRST, SECOND)}
    assert said["base"]["digests"][FIRST] == digest_of(world.base / FIRST, 8) != digest_of(world.base / FIRST)
    manifest, _ = read_undo(world.merged / UNDO)
    assert [len(tensor["digests"]) for file in manifest["files"] for tensor in file["tensors"]] == [2, 3, 1, 1, 3]
    world.restored()


def said(receipt: Mapping[str, Any]) -> list[dict[str, str]]:
    return [{"label": adapter["label"], "digest": adapter["digest"]} for adapter in receipt["adapters"]]


def test_a_stack_says_what_was_merged_earlier(world: World) -> None:
    first = receipt_of(world.merge().merged)
    world.base, world.merged = world.merged, world.folder / "twice"
    second = receipt_of(world.merge(world.write_adapter("b", lora("x", 6, 4, 60))).merged)
    assert second["earlier"] == said(first)
    assert second["base"]["digests"] == {path.name: digest_of(path) for path in world.base.iterdir()}
    world.base, world.merged = world.merged, world.folder / "thrice"
    third = receipt_of(world.merge(world.write_adapter("c", lora("x", 6, 4, 70))).merged)
    assert third["earlier"] == said(first) + said(second)


# The same everywhere

PROGRAM = """
import sys, lora_cli
base, adapter, out = sys.argv[1:]
lora_cli.merge(base, [adapter], out, embed_adapter=True)
"""


def test_it_is_the_same_at_any_place_and_time_and_for_anybody(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = contents(world.merge(embed_adapter=True).merged)
    other = tmp_path / "another place"
    for name in ("base", "adapter"):
        shutil.copytree(tmp_path / name, other / name)
        for path in (other / name).iterdir():
            os.utime(path, (1, 1))
    monkeypatch.setattr(time, "time", lambda: 4e9)
    monkeypatch.chdir(other)
    merge("base", ["adapter"], "here", embed_adapter=True, threads=2, memory=64 << 20)
    assert contents(other / "here") == expected
    env = os.environ | {"PYTHONPATH": str(ROOT), "HOME": str(other), "USER": "somebody", "LOGNAME": "else"}
    env |= {"TZ": "Asia/Kathmandu", "LC_ALL": "C", "PYTHONHASHSEED": "7", "SOURCE_DATE_EPOCH": "1"}
    line = [sys.executable, "-c", PROGRAM, *(str(other / name) for name in ("base", "adapter", "there"))]
    subprocess.run(line, env=env, check=True, cwd=tmp_path)
    assert contents(other / "there") == expected


def test_no_path_of_this_machine_is_in_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "xyzzy of somebody's ünknown \u202e [red]"
    place.mkdir()
    world = World(place).write()
    claim = str(place / "where it was trained")
    adapter = world.write_adapter("adapter", adapter_tensors(), base_model_name_or_path=claim)
    plain = place / "plain.safetensors"
    save_file({key.removeprefix(LORA): tensor for key, tensor in lora("x", 6, 4, 50).items()}, plain, {"alpha": "2"})
    monkeypatch.chdir(world.base)
    outs = [place / "absolute", Path("../relative"), place / "bare.safetensors"]
    merge(world.base.absolute(), [adapter, plain], outs[0], embed_adapter=True)
    merge("..//base/.", ["../adapter", "../plain.safetensors"], outs[1], embed_adapter=True)
    merge(f"../base/{FIRST}", ["../plain.safetensors"], outs[2])
    lora_cli.unmerge(outs[0].resolve(), (), place / "back")
    secrets = [b"xyzzy", b"somebody", b"trained", str(tmp_path).encode(), b"..", os.fsencode(Path.home())]
    files = [path for name in ("absolute", "relative", "back") for path in (place / name).iterdir()]
    files += list(place.glob("bare.*"))
    assert len(files) > 15
    for path in files:
        for data in texts_of(path):
            assert [secret for secret in secrets if secret in data and len(secret) > 1] == [], path


def texts_of(path: Path) -> list[bytes]:
    """The bytes of a file, and those that an undo file holds compressed."""
    data = path.read_bytes()
    if path.suffix != ".undo":
        return [data]
    parts = {name: part for name, (_, _, part) in read_raw(path)[1].items()}
    packed = [part for name, part in parts.items() if name == "manifest" or name.startswith(("header/", "side/"))]
    assert len(packed) >= 1
    return [data, *map(unpack, packed)]
