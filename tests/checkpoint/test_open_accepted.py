"""Folders that are opened although something about them is odd: nothing is dropped, and what is odd is said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_cli.checkpoint.checkpoint import open_checkpoint
from lora_cli.checkpoint.index import Index

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def shard(path: Path, *names: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ones(3, np.float32) for name in names}, path)
    return path


def index(folder: Path, weight_map: dict[str, str], metadata: object = None) -> Path:
    document = {"weight_map": weight_map} | ({} if metadata is None else {"metadata": metadata})
    (folder / INDEX).write_text(json.dumps(document))
    return folder


def sharded(folder: Path, metadata: object = None) -> Path:
    shard(folder / ONE, "a")
    shard(folder / TWO, "b", "c")
    return index(folder, {"a": ONE, "b": TWO, "c": TWO}, metadata)


def test_a_folder_of_shards(tmp_path: Path) -> None:
    opened = open_checkpoint(sharded(tmp_path, {"total_size": 36, "more": 1}))
    assert [part.name for part in opened.shards] == [ONE, TWO]
    assert {key: stored.shard.name for key, stored in opened.tensors.items()} == {"a": ONE, "b": TWO, "c": TWO}
    assert isinstance(opened.index, Index)
    assert opened.index.raw == (tmp_path / INDEX).read_bytes()
    assert (opened.label, opened.folder, opened.warnings, opened.config) == (tmp_path.name, tmp_path, (), {})
    assert opened.data_bytes == 36


def test_a_folder_of_one_file_and_a_bare_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    file = shard(tmp_path / "weights.safetensors", "a")
    folder, bare = open_checkpoint(tmp_path), open_checkpoint(file)
    assert list(folder.tensors) == list(bare.tensors) == ["a"]
    assert folder.config == {"model_type": "llama"}
    assert (bare.folder, bare.config, bare.label) == (None, {}, "weights.safetensors")


def test_r060_what_the_index_does_not_list_is_kept(tmp_path: Path) -> None:
    opened = open_checkpoint(index(sharded(tmp_path), {"a": ONE, "b": TWO}))
    assert list(opened.tensors) == ["a", "b", "c"]
    (warning,) = opened.warnings
    assert "does not list 1 tensors" in warning
    assert "c" in warning
    assert "kept" in warning


@pytest.mark.parametrize(
    ("metadata", "warned"),
    [({"total_size": 36}, False), ({"total_size": 37}, True), ({"total_size": "36"}, True), ({}, False), ([], False)],
)
def test_r063_a_wrong_total_size_is_said(tmp_path: Path, metadata: object, warned: bool) -> None:
    warnings = open_checkpoint(sharded(tmp_path, metadata)).warnings
    assert len(warnings) == int(warned)
    assert all("total_size" in warning and "36 bytes" in warning for warning in warnings)


@pytest.mark.parametrize("with_index", [True, False])
def test_r065_files_that_do_not_belong_are_said_and_not_used(tmp_path: Path, with_index: bool) -> None:
    if with_index:
        sharded(tmp_path)
    else:
        shard(tmp_path / "model.safetensors", "a", "b", "c")
    (tmp_path / "extra.safetensors").write_bytes(b"not even a header")
    shard(tmp_path / "adapter_model.safetensors", "x")
    opened = open_checkpoint(tmp_path)
    assert sorted(opened.tensors) == ["a", "b", "c"]
    assert opened.warnings == ("not part of the checkpoint, left out: extra.safetensors",)


def test_an_index_may_name_the_single_file(tmp_path: Path) -> None:
    shard(tmp_path / "model.safetensors", "a")
    assert list(open_checkpoint(index(tmp_path, {"a": "model.safetensors"})).tensors) == ["a"]


def hub_cache(root: Path) -> Path:
    """A snapshot as `hf download` leaves it: every file a link to a blob."""
    repository = root / "models--owner--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    real = sharded(root / "real")
    for number, file in enumerate(sorted(real.iterdir())):
        blob = repository / "blobs" / f"{number:064x}"
        blob.parent.mkdir(exist_ok=True)
        file.rename(blob)
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    return snapshot


def test_r067_links_inside_a_hub_cache(tmp_path: Path) -> None:
    assert list(open_checkpoint(hub_cache(tmp_path)).tensors) == ["a", "b", "c"]


def test_links_within_the_folder_and_to_it(tmp_path: Path) -> None:
    shard(tmp_path / "base" / "real" / "blob", "a")
    (tmp_path / "base" / "model.safetensors").symlink_to("real/blob")
    (tmp_path / "link").symlink_to("base")
    assert list(open_checkpoint(tmp_path / "link").tensors) == ["a"]
    # A file that is named itself may be a link: whoever names it knows.
    (tmp_path / "named.safetensors").symlink_to("base/real/blob")
    assert list(open_checkpoint(tmp_path / "named.safetensors").tensors) == ["a"]


NAMES = ["new\nline", "per%cent", "[brack]et", "'quo\"tes'", "emoji 🦀", "x" * 255, "\x1b[2J", "..x", " ", "-o", "ünï"]


@pytest.mark.parametrize("name", [*NAMES, b"\xff\xfe".decode(errors="surrogateescape")], ids=ascii)
def test_r074_odd_names_of_folders_and_files(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    shard(folder / "model.safetensors", "a")
    assert list(open_checkpoint(folder).tensors) == ["a"]
    assert open_checkpoint(folder).label == name.encode("utf-8", "backslashreplace").decode()
    if len(name) < 200:
        assert list(open_checkpoint(shard(tmp_path / f"{name}.safetensors", "a")).tensors) == ["a"]


def test_tensor_names_are_never_normalised(tmp_path: Path) -> None:
    names = ["é", "e\u0301", "A", "a", "", " ", "\x1b[2J"]
    assert sorted(open_checkpoint(shard(tmp_path / "m.safetensors", *names)).tensors) == sorted(names)
