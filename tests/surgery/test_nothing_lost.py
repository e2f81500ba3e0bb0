"""What a merge does not change is there to the byte; what fails leaves no trace; inputs are never touched."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

import lora_cli

Raw = tuple[str, list[int], bytes]

TARGET: Raw = ("F32", [6, 4], np.linspace(-1, 1, 24, dtype="<f4").tobytes())
ODD: dict[str, Raw] = {
    "": ("BF16", [2], b"\x01\x02\xc0\x7f"),
    "flag": ("BOOL", [3], b"\x00\x01\x02"),
    "unaligned": ("F64", [1], b"12345678"),
    "x.weight": TARGET,
    " two  words\t": ("I64", [], (1 << 62).to_bytes(8, "little")),
    "重み.ü.\u202e": ("F16", [3], b"\x01\x7e\x00\x80\xff\x03"),
    "..a..weight.": ("F8_E4M3", [2, 1], b"\x7f\xff"),
    "scales": ("F8_E8M0", [5], b"\x00\x01\x02\x03\xff"),
    "packed": ("F4", [3, 2], b"abc"),
    "empty": ("F32", [0, 5], b""),
    "X.WEIGHT": ("U8", [1], b"!"),
}
"""Tensors that no model class knows, in an order and at offsets that no writer would choose."""
SHARDS = ("b of 2.safetensors", "a of 2.safetensors")
INDEX = "model.safetensors.index.json"


def write_file(path: Path, tensors: Mapping[str, Raw], metadata: object) -> None:
    """A safetensors file with a header as unusual as the format allows."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, (dtype, shape, data) in tensors.items():
        begin, end = end, end + len(data)
        header[name] = {"shape": shape, "data_offsets": [begin, end], "dtype": dtype}
    raw = json.dumps(dict(reversed(header.items())), indent=1).encode() + b" " * 13
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + b"".join(data for _, _, data in tensors.values()))


def read_header(file: Path) -> tuple[dict[str, Any], dict[str, slice]]:
    """The header of a file, and where each tensor is, in byte order."""
    raw = file.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    found = json.loads(raw[8:start])
    spans = sorted((entry["data_offsets"], name) for name, entry in found.items() if name != "__metadata__")
    return found, {name: slice(start + begin, start + end) for (begin, end), name in spans}


def state(folder: Path) -> dict[str, str]:
    """Everything in a folder: bytes of files, where links lead."""

    def what(path: Path) -> str:
        return str(path.readlink()) if path.is_symlink() else hashlib.sha256(path.read_bytes()).hexdigest()

    return {str(p.relative_to(folder)): "" if p.is_dir() else what(p) for p in sorted(folder.rglob("*"))}


class Job:
    """Two shards, an index that lists a part of them, an adapter for a tensor of each, and a place for the output."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.place, self.out = folder, folder / "place", folder / "place" / "out"
        self.base, self.adapter = folder / "base", folder / "adapter"
        self.place.mkdir()
        self.base.mkdir()
        first = {name: ODD[name] for name in list(ODD)[:7]}
        write_file(self.base / SHARDS[0], first, {"zeta": "1", "alpha": "ü"})
        write_file(self.base / SHARDS[1], {n: raw for n, raw in ODD.items() if n not in first} | {"last": TARGET}, None)
        index = {"weight_map": dict(zip(("x.weight", "last"), SHARDS, strict=True)), "metadata": {"by": "hand"}, "v": 1}
        tiny.write_json(self.base / INDEX, index)
        (self.base / "config.json").write_text('{ "model_type":"none", "torch_dtype": "float32" }')
        self.write_adapter("x", "last")

    def write_adapter(self, *modules: str, **tensors: tiny.Array) -> None:
        for module in modules:
            tensors |= {f"{module}.lora_A.weight": np.ones((1, 4)), f"{module}.lora_B.weight": np.ones((6, 1))}
        tiny.write_adapter(self.adapter, tensors, r=1, lora_alpha=1, modules_to_save=["head"])

    def single(self) -> Job:
        """The same with one file as its base and its output."""
        self.write_adapter("x")
        self.base, self.out = self.base / SHARDS[0], self.out.with_suffix(".safetensors")
        return self

    def merge(self, **how: Any) -> lora_cli.MergeResult:
        return lora_cli.merge(self.base, [self.adapter], self.out, threads=2, **how)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


@pytest.mark.parametrize("single", [False, True])
def test_only_the_bytes_of_targets_change(job: Job, single: bool) -> None:
    before, job = state(job.base), job.single() if single else job
    result = job.merge()
    for name, key in zip(SHARDS[:1] if single else SHARDS, ("x.weight", "last"), strict=False):
        old, new = (bytearray((at if single else at / name).read_bytes()) for at in (job.base, job.out))
        target = read_header(job.folder / "base" / name)[1][key]
        assert (np.frombuffer(new[target], "<f4") == np.frombuffer(old[target], "<f4") + np.float32(1)).all()
        new[target] = old[target]
        assert new == old
    assert state(job.folder / "base") == before
    assert lora_cli.verify(job.out, job.base, [job.adapter]).verified
    assert sorted(result.files) == sorted(path.name for path in (job.place if single else job.out).iterdir())
    if not single:
        assert {name for name, _ in state(job.out).items() & before.items()} == {"config.json", INDEX}
        assert any("does not list 10 tensors" in text for text in result.warnings)


def test_a_changed_layout_keeps_the_rest(job: Job) -> None:
    job.write_adapter("x", **{"head.weight": np.arange(6.0)})
    result = job.merge(options=lora_cli.PlanOptions(dtype="bf16"))
    assert result.tensors == {"total": 13, "edited": 5, "copied": 7, "added": 1, "dropped": 0}
    total = 0
    for name in SHARDS:
        (old, old_spans), (new, new_spans) = read_header(job.base / name), read_header(job.out / name)
        new_bytes, old_bytes = (job.out / name).read_bytes(), (job.base / name).read_bytes()
        assert new.get("__metadata__") == old["__metadata__"]
        assert list(new_spans) == [*old_spans, *(["head.weight"] if name == max(SHARDS) else [])]
        for key, span in old_spans.items():
            cast = old[key]["dtype"] in ("F16", "F32", "F64")
            assert (new[key]["dtype"], new[key]["shape"]) == ("BF16" if cast else old[key]["dtype"], old[key]["shape"])
            assert cast or new_bytes[new_spans[key]] == old_bytes[span]
        total += sum(span.stop - span.start for span in new_spans.values())
    assert json.loads((job.out / INDEX).read_text()) == {
        "weight_map": {key: name for name in SHARDS for key in read_header(job.out / name)[1]},
        "metadata": {"by": "hand", "total_size": total},
        "v": 1,
    }
    assert json.loads((job.out / "config.json").read_text()) == {"model_type": "none", "torch_dtype": "bfloat16"}


OURS = ["lora_merge.json", "lora_merge.undo"]
TAKEN = ["LICENSE", "USE_POLICY.md", "README.md", "tokenizer.json", "tokenizer.model", "chat_template.jinja"]
TAKEN += ["generation_config.json", "1_Pooling/config.json", "modeling.py", "config.json"]
LEFT = ["adapter_config.json", "adapter_model.safetensors", "pytorch_model.bin", "sub/optimizer.pt", "lora_merge.json"]
LEFT += ["other.safetensors", "sub/adapter_config.json", "sub/model.safetensors", "link.json", "too/deep/notes.json"]
HIDDEN = [".gitattributes", ".cache/x.json", "sub/.hidden.json"]


def test_side_files_are_those_of_the_contract(job: Job) -> None:
    for name in TAKEN + LEFT + HIDDEN:
        (job.base / name).parent.mkdir(exist_ok=True, parents=True)
        (job.base / name).write_text(f'{{"name": "{name}"}}')
    (job.base / "link.json").unlink()
    (job.base / "link.json").symlink_to(job.adapter / "adapter_config.json")
    (job.base / "LICENCE").symlink_to("LICENSE")
    result = job.merge()
    sides = {*TAKEN, "LICENCE", INDEX}
    assert {name for name, what in state(job.out).items() if what} == {*sides, *SHARDS, *OURS}
    assert all((job.out / name).read_bytes() == (job.base / name).read_bytes() for name in sides - {"README.md"})
    assert (job.out / "README.md").read_text().startswith("---\n")
    assert set(result.left_out) - set(HIDDEN) == set(LEFT)


def test_a_hub_cache_is_read_through_its_links(job: Job) -> None:
    job.merge()
    cache = job.folder / "models--owner--name"
    snapshot = cache / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, path in enumerate(sorted(job.base.iterdir())):
        path.rename(cache / "blobs" / f"b{number}")
        (snapshot / path.name).symlink_to(f"../../blobs/b{number}")
    before = state(cache)
    lora_cli.merge(snapshot, [job.adapter], job.place / "again")
    assert state(cache) == before
    assert {name for name, _ in state(job.out).items() ^ state(job.place / "again").items()} == {"README.md", *OURS}


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o002])
@pytest.mark.parametrize("single", [False, True])
def test_modes_are_those_of_the_umask(job: Job, umask: int, single: bool) -> None:
    """R162."""
    (job.base / "sub").mkdir()
    (job.base / "sub" / "config.json").write_text("{}")
    before = os.umask(umask)
    try:
        (job.single() if single else job).merge()
    finally:
        os.umask(before)
    for path in job.place.rglob("*"):
        assert stat.S_IMODE(path.lstat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~umask, path
