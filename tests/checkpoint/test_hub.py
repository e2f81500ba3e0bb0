"""What a reference becomes: a local path, or just the needed files of a repository on the Hub."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from hub_server import SIGNATURE, HubServer, hub_server_fixture, use_hub  # noqa: F401 (a fixture)
from safetensors.numpy import save

from lora_cli.checkpoint import hub
from lora_cli.checkpoint.checkpoint import open_checkpoint
from lora_cli.checkpoint.hub import Location, Role, locate
from lora_cli.errors import (
    DiskFullError,
    HubError,
    LoraCliError,
    MalformedFileError,
    UnsafeInputError,
    UnsupportedError,
    UsageError,
    WriteError,
)
from lora_cli.progress import Progress

TOKEN = "hf_n0t4nyb0dysT0k3n"
SIDE = {
    name: name.encode() for name in ("config.json", "tokenizer.json", "README.md", "LICENSE", "chat_template.jinja")
}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
NEEDLESS = {
    name: name.encode()
    for name in (
        *(
            "pytorch_model.bin",
            "pytorch_model.bin.index.json",
            "model.onnx",
            "tf_model.h5",
            "model.gguf",
            "flax.msgpack",
        ),
        *(".gitattributes", "onnx/model.onnx", "checkpoint-10/config.json", "original/deep/params.json", "logo.png"),
        *("training_args.bin", "fp16/model.safetensors"),
    )
}


class Listener(Progress):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def tensors(seed: int, *names: str) -> bytes:
    return save({name: np.full((2, 3), seed, dtype=np.float32) for name in names})


SHARD_DATA = (tensors(1, "a.weight"), tensors(2, "b.weight"))
SINGLE = {"model.safetensors": tensors(1, "a.weight", "b.weight")}
ADAPTER = {
    "adapter_config.json": b'{"r": 1}',
    "adapter_model.safetensors": tensors(3, "base_model.model.a.lora_A.weight"),
    "README.md": b"a card",
    "tokenizer.json": b'{"t": 1}',
}


def index(*shards: str, keys: tuple[str, ...] = ("a.weight", "b.weight")) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": dict(zip(keys, shards, strict=True))}).encode()


def sharded(stem: str = "model") -> dict[str, bytes]:
    names = [shard.replace("model", stem, 1) for shard in SHARDS]
    return {f"{stem}.safetensors.index.json": index(*names), **dict(zip(names, SHARD_DATA, strict=True))}


def paths(requests: list[str]) -> list[str]:
    return [line for line in requests if not line.startswith("GET /api/")]


def said(error: BaseException) -> str:
    """Everything that a person could see of an error, `--debug` included."""
    fields = [str(value) for value in vars(error).values()]
    return "\n".join([*fields, *traceback.format_exception(error)])


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client sleeps for seconds before it tries again."""
    monkeypatch.setattr("time.sleep", lambda _seconds: None)


@pytest.fixture
def refused(hub_server: HubServer) -> Callable[..., LoraCliError]:
    """Locate something that is refused, and hold the refusal against what all of them promise."""

    def refuse(reference: str, error: type[LoraCliError], *, role: Role = "checkpoint") -> LoraCliError:
        with pytest.raises(error) as caught:
            locate(reference, role=role)
        text = said(caught.value)
        assert type(caught.value) is error
        assert TOKEN not in text
        assert SIGNATURE not in text
        assert "\x1b" not in text
        assert "huggingface_hub.errors" not in text
        assert not caught.value.message.endswith(".")
        assert "\n" not in caught.value.message
        if error is HubError:
            assert caught.value.exit_code == 40
            assert caught.value.hint
        return caught.value

    return refuse


# ---------------------------------------------------------------------------------------------- local paths


@pytest.mark.parametrize(
    ("reference", "label"),
    [
        ("owner/name", "name"),
        ("owner/name/", "name"),
        ("./owner/name", "name"),
        (".", "here"),
        ("owner/..", "here"),
        ("owner/name/model.safetensors", "model.safetensors"),
        ("/", "/"),
    ],
)
def test_a_local_path_wins(
    reference: str, label: str, hub_server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    (here / "owner" / "name").mkdir(parents=True)
    (here / "owner" / "name" / "model.safetensors").touch()
    monkeypatch.chdir(here)
    hub_server.publish("owner/name", SINGLE)
    assert locate(reference, role="checkpoint") == Location(Path(reference), label, hub=False, links_inside=None)
    assert not hub_server.requests
    assert locate("hf://owner/name", role="checkpoint").hub


NO_IDS = [
    *("", "gpt2", "./o/n", "../o/n", "/o/n", "~/o", "~o/n", "o/n/", "o//n", "o/n/x", "o/n/x@main", "a/b/c/d"),
    *("x.safetensors", "o/x.safetensors", "o/X.SAFETENSORS", "o/x.json", "o/x.bin", "o/x.undo", "o/x.pt"),
    *("o\\n", "o/n\0", "o/ n", "o/n\n", "ö/n", "o/n--x", "o/n.git", "o/n..x", "-o/n", "x" * 300, "o/" + "n" * 97),
    *("datasets/n", "models/n", "https://huggingface.co/o/n", "hf:/o/n", "o/n@", "@main", "o@main"),
    *("o/n@a b", "o/n@../x", "o/n@a/../b", "o/n@/x", "o/n@-x", "o/n@x/", "o/n@$(x)", "o/n@x;y", "o/n@a\nb"),
    *("hf://", "hf://gpt2", "hf://models/n", "hf://datasets/o/n", "hf://spaces/o/n", "hf://buckets/o/n", "hf://o/n@"),
    *("hf://o/n@..%2Fx", "hf://o/n/config.json", "hf://o/n@main/config.json", "hf://o/n@main/../..", "HF://o/n"),
]


@pytest.mark.parametrize("reference", NO_IDS, ids=ascii)
def test_what_is_no_id_is_never_sent(
    reference: str, hub_server: HubServer, refused: Callable[..., LoraCliError]
) -> None:
    for repo in ("o/n", "o/x.json", "o/x", "models/n"):
        hub_server.publish(repo, SINGLE)
    error = refused(reference, UsageError)
    assert error.hint or "opened" in error.message or error.found
    assert not hub_server.requests


def test_a_link_that_leads_nowhere_is_no_question_to_the_hub(
    hub_server: HubServer, refused: Callable[..., LoraCliError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_server.publish("o/n", SINGLE)
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "n").symlink_to("gone")
    monkeypatch.chdir(tmp_path)
    assert "link" in refused("o/n", UsageError).message
    assert not hub_server.requests


def test_ids_are_read_as_the_client_reads_them() -> None:
    uris = pytest.importorskip("huggingface_hub.utils._hf_uris", reason="the client has a parser from 1.9 on")
    revisions = [
        "",
        "@main",
        "@v1.0",
        "@refs/pr/3",
        "@refs/convert/parquet",
        "@feature%2Fa",
        "@" + "0" * 40,
        "@x/a.json",
    ]
    for kind in ("", "models/"):
        for revision in revisions:
            text = f"hf://{kind}o/n{revision}"
            theirs = uris.parse_hf_uri(text)
            if theirs.path_in_repo:
                with pytest.raises(UsageError):
                    hub._parse(text, "adapter")
            else:
                ours = hub._parse(text, "adapter")
                assert (ours.repo, ours.revision) == (theirs.id, theirs.revision or "main")


# ---------------------------------------------------------------------------------------------- what is fetched


@pytest.mark.parametrize(
    ("weights", "role"),
    [
        pytest.param(sharded(), "checkpoint", id="sharded"),
        pytest.param(SINGLE, "checkpoint", id="single"),
        pytest.param(sharded("diffusion_pytorch_model"), "checkpoint", id="other index"),
        pytest.param({"lm.safetensors": SINGLE["model.safetensors"]}, "checkpoint", id="other single"),
        pytest.param({"lora.safetensors": tensors(1, "a.A", "a.B")}, "adapter", id="plain adapter"),
    ],
)
def test_only_needed_files(weights: Mapping[str, bytes], role: Role, hub_server: HubServer) -> None:
    commit = hub_server.publish("owner/name", {**SIDE, **NEEDLESS, **weights})
    progress = Listener()
    found = locate("owner/name", role=role, progress=progress)
    assert found.label == f"owner/name@{commit}"
    assert found.path.name == commit
    assert found.hub
    assert hub_server.fetched() == sorted([*SIDE, *weights])
    assert {path.name: path.read_bytes() for path in found.path.iterdir()} == {**SIDE, **weights}
    assert len(progress.notes) == 1
    assert progress.notes[0].startswith(f"owner/name@{commit}: fetching 0.1 MB")


def test_everything_is_asked_for_at_the_one_commit(hub_server: HubServer) -> None:
    commit = hub_server.publish("owner/name", {**SIDE, **sharded()})
    locate("owner/name", role="checkpoint")
    first, *rest = hub_server.requests
    assert str(first) == "GET /api/models/owner/name/revision/main"
    assert rest
    assert all(f"/{commit}/" in request.path for request in rest)
    kinds = ["weights" if "-of-" in request.path else "side" for request in rest]
    assert kinds == sorted(kinds), "a snapshot with its weights must have the rest too"


def test_of_an_index_and_a_single_file_the_index_wins(hub_server: HubServer) -> None:
    hub_server.publish("owner/name", {**SINGLE, **sharded(), "consolidated.safetensors": b"x"})
    locate("owner/name", role="checkpoint")
    assert hub_server.fetched() == sorted(sharded())


def test_adapter(hub_server: HubServer) -> None:
    more = {**NEEDLESS, "checkpoint-5/adapter_model.safetensors": b"x", "extra/config.json": b"x", "optimizer.pt": b"x"}
    hub_server.publish("owner/name", {**ADAPTER, **more, "other.safetensors": b"x"})
    found = locate("owner/name", role="adapter")
    assert {path.name: path.read_bytes() for path in found.path.iterdir()} == ADAPTER
    assert hub_server.fetched() == sorted(ADAPTER)


def test_an_adapter_repository_can_be_looked_at_as_a_checkpoint(hub_server: HubServer) -> None:
    hub_server.publish("owner/name", ADAPTER)
    locate("owner/name", role="checkpoint")
    assert hub_server.fetched() == sorted(ADAPTER)


def test_a_merged_checkpoint_comes_with_its_undo_file_and_receipt(hub_server: HubServer) -> None:
    mine = {name: name.encode() for name in ("lora_merge.json", "lora_merge.undo", "lora_wrap.json")}
    hub_server.publish("owner/name", {**SINGLE, **mine})
    locate("owner/name", role="checkpoint")
    assert hub_server.fetched() == sorted([*SINGLE, *mine])


def test_large_side_files_stay_where_they_are(hub_server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "SIDE_FILE_LIMIT", 100)
    monkeypatch.setattr(hub, "_NESTED_LIMIT", 10)
    sizes = {"vocab.json": 100, "big.json": 101, "1_Pooling/config.json": 10, "original/tokenizer.model": 11}
    hub_server.publish("owner/name", {**SINGLE, **{name: b"%d" % n + b"-" * (n - 3) for name, n in sizes.items()}})
    sized = {name: len(data) for name, data in hub_server.repositories["owner/name"].commits.popitem()[1].items()}
    assert sized["vocab.json"] <= 100 < sized["big.json"] or True
    hub_server.publish("owner/name", {**SINGLE, **{name: name[:1].encode() * n for name, n in sizes.items()}})
    locate("owner/name", role="checkpoint")
    assert hub_server.fetched() == sorted([*SINGLE, "vocab.json", "1_Pooling/config.json"])
