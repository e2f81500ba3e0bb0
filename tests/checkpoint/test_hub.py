"""What a reference becomes: a local path, or just the needed files of a repository on the Hub."""

from __future__ import annotations

import errno
import importlib
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

TOKEN = "hf_n0t4nyb0dysT0k3n"  # noqa: S105
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
    return bytes(save({name: np.full((2, 3), seed, dtype=np.float32) for name in names}))


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
    assert locate(reference, role="checkpoint") == Location(Path(reference), label, hub=False)
    assert not hub_server.requests
    (here / "hf:" / "owner" / "name").mkdir(parents=True)
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
    assert (error.message == "Path not found") == ("nothing of that name is here" in str(error.hint))
    assert not hub_server.requests


def test_letters_that_older_clients_let_through(
    refused: Callable[..., LoraCliError], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._validators.validate_repo_id", lambda _text: None)
    refused("ö/n", UsageError)


@pytest.mark.parametrize(
    "reference",
    [
        f"https://someone:{TOKEN}@huggingface.co/o/n",
        f"https://{TOKEN}@huggingface.co/o/n",
        f"https://huggingface.co/o/n/resolve/main/model.safetensors?token={TOKEN}&{SIGNATURE}=1",
        f"hf://{TOKEN}@o/n",
        f"hf://someone:pa55w0rd-{TOKEN}@o/n",
        f"hf://o/n@{TOKEN}?",
        f"./no/such/{TOKEN}",
        TOKEN,
        TOKEN + "x" * 300,
    ],
)
def test_a_token_in_an_address_is_not_repeated(
    reference: str, hub_server: HubServer, refused: Callable[..., LoraCliError]
) -> None:
    """R137: what somebody pasted with a password in it must not end in the log of a CI job."""
    error = refused(reference, UsageError)
    assert "…" in f"{error.file}{error.found}"
    assert "pa55w0rd" not in said(error)
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
    uris = pytest.importorskip("huggingface_hub.utils._hf_uris", reason="older clients have no parser")
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
    """R133: a branch that moves meanwhile cannot mix two versions."""
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
    assert "model.safetensors" in str(hub_server.requests[-1])


def test_large_side_files_stay_where_they_are(hub_server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "SIDE_FILE_LIMIT", 100)
    monkeypatch.setattr(hub, "_NESTED_LIMIT", 10)
    sizes = {"vocab.json": 100, "big.json": 101, "1_Pooling/config.json": 10, "original/tokenizer.model": 11}
    hub_server.publish("owner/name", {**SINGLE, **{name: name[:1].encode() * n for name, n in sizes.items()}})
    locate("owner/name", role="checkpoint")
    assert hub_server.fetched() == sorted([*SINGLE, "vocab.json", "1_Pooling/config.json"])


@pytest.mark.parametrize("kind", ["branch", "tag", "commit", "pull request", "branch with a slash"])
@pytest.mark.parametrize("spelling", ["{}@{}", "hf://{}@{}", "hf://models/{}@{}"])
def test_revisions(kind: str, spelling: str, hub_server: HubServer) -> None:
    old = hub_server.publish("owner/name", {**SINGLE, "config.json": b"old"})
    hub_server.publish("owner/name", {**SINGLE, "config.json": b"new"})
    names = {"branch": "dev", "tag": "v1.0", "commit": old, "pull request": "refs/pr/1", "branch with a slash": "a/b"}
    hub_server.repositories["owner/name"].tags = {name: old for name in names.values() if name != old}
    typed = names[kind].replace("a/b", "a%2Fb") if spelling.startswith("hf:") else names[kind]
    found = locate(spelling.format("owner/name", typed), role="checkpoint")
    assert found.label == f"owner/name@{old}"
    assert (found.path / "config.json").read_bytes() == b"old"


def test_a_branch_that_moves_is_followed_and_a_commit_stays(hub_server: HubServer) -> None:
    """R133: and the label, which receipts record, has the commit."""
    old = hub_server.publish("owner/name", {**SINGLE, "config.json": b"old"})
    assert locate("owner/name", role="checkpoint").path.name == old
    new = hub_server.publish("owner/name", {**SINGLE, "config.json": b"new"})
    assert locate("owner/name", role="checkpoint").path.name == new
    hub_server.requests.clear()
    found = locate(f"owner/name@{old}", role="checkpoint").path
    assert found.name == old
    assert not hub_server.fetched()
    assert [(path.name, path.read_text()) for path in (found.parents[1] / "refs").iterdir()] == [("main", new)]


def test_what_the_cache_holds_is_not_fetched_again(hub_server: HubServer) -> None:
    hub_server.publish("owner/name", {**SIDE, **sharded()})
    first = locate("owner/name", role="checkpoint")
    hub_server.requests.clear()
    progress = Listener()
    assert locate("hf://owner/name", role="checkpoint", progress=progress) == first
    assert [str(request) for request in hub_server.requests] == ["GET /api/models/owner/name/revision/main"]
    assert progress.notes == [f"{first.label}: the weights are in the cache"]


def test_only_what_is_missing_is_fetched(hub_server: HubServer) -> None:
    hub_server.publish("owner/name", {**SIDE, **sharded()})
    found = locate("owner/name", role="checkpoint")
    lose(found.path / SHARDS[1])
    hub_server.requests.clear()
    assert locate("owner/name", role="checkpoint") == found
    assert hub_server.fetched() == [SHARDS[1]]


def lose(file: Path) -> None:
    """Remove a file's blob, as a cleaner of caches does: its link stays and leads nowhere."""
    file.resolve().unlink()
    assert file.is_symlink()
    assert not file.exists()


def test_the_links_of_the_cache_may_be_followed(hub_server: HubServer, tmp_path: Path) -> None:
    hub_server.publish("owner/name", {**SIDE, **sharded()})
    found = locate("owner/name", role="checkpoint")
    shard = found.path / SHARDS[0]
    assert shard.is_symlink()
    # Clients from 2.0 on share blobs between repositories: a second link that leaves the repository's folder.
    shared = tmp_path / "hf-home" / "hub" / "blobs" / "ab" / "abc"
    shared.parent.mkdir(parents=True)
    blob = shard.resolve()
    blob.rename(shared)
    blob.symlink_to(shared)
    checkpoint = open_checkpoint(found.path, label=found.label)
    assert sorted(checkpoint.tensors) == ["a.weight", "b.weight"]
    assert checkpoint.label == found.label


def test_a_broken_connection_is_resumed(hub_server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = hub_server.publish("owner/name", {**SINGLE, "config.json": b"{}"})
    path = f"/cdn/owner/name/{commit}/model.safetensors"
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1)
    hub_server.cut.add(path)
    found = locate("owner/name", role="checkpoint")
    assert (found.path / "model.safetensors").read_bytes() == SINGLE["model.safetensors"]
    ranges = [request.byte_range for request in hub_server.requests if request.path == path and request.method == "GET"]
    assert ranges == [None, f"bytes={len(SINGLE['model.safetensors']) // 2}-"]


# ---------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("files", "role", "named"),
    [
        ({"a.safetensors": b"1", "b.safetensors": b"2"}, "checkpoint", ["a.safetensors", "b.safetensors"]),
        ({"a.safetensors": b"1", "b.safetensors": b"2"}, "adapter", ["a.safetensors", "b.safetensors"]),
        ({**sharded("a"), **sharded("b")}, "checkpoint", ["a.safetensors.index.json", "b.safetensors.index.json"]),
    ],
)
def test_several_candidates_are_named(
    files: dict[str, bytes], role: Role, named: list[str], hub_server: HubServer, refused: Callable[..., LoraCliError]
) -> None:
    hub_server.publish("owner/name", files)
    error = refused("owner/name", UnsupportedError, role=role)
    assert list(error.details) == named
    assert "hf download owner/name FILE" in str(error.hint)
    assert not hub_server.fetched()


@pytest.mark.parametrize("files", [{**SINGLE, "config.json": b"{}"}, sharded()], ids=["single", "sharded"])
def test_a_checkpoint_as_adapter_is_refused_before_it_is_fetched(
    files: dict[str, bytes], hub_server: HubServer, refused: Callable[..., LoraCliError]
) -> None:
    hub_server.publish("owner/name", files)
    assert "first" in str(refused("owner/name", UsageError, role="adapter").hint)
    assert not hub_server.fetched()


@pytest.mark.parametrize(
    ("role", "name"),
    [("adapter", "adapter_model.bin"), ("checkpoint", "pytorch_model-00001-of-00002.bin"), ("checkpoint", "x.ckpt")],
)
def test_pickles(role: Role, name: str, hub_server: HubServer, refused: Callable[..., LoraCliError]) -> None:
    hub_server.publish("owner/name", {"adapter_config.json": b"{}", name: b"pickle", "training_args.bin": b"x"})
    error = refused("owner/name", UnsafeInputError, role=role)
    assert error.exit_code == 11
    assert error.found == name
    assert "weights_only=True" in str(error.hint)
    assert "save_file" in str(error.hint)
    assert not hub_server.fetched()


@pytest.mark.parametrize("files", [{}, {"model.gguf": b"x"}, {"training_args.bin": b"x"}, {"sub/x.safetensors": b"x"}])
def test_no_weights(files: dict[str, bytes], hub_server: HubServer, refused: Callable[..., LoraCliError]) -> None:
    hub_server.publish("owner/name", {"config.json": b"{}", **files})
    assert "no safetensors" in refused("owner/name", HubError).message
    assert not hub_server.fetched()


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"{", MalformedFileError),
        (b"{}", MalformedFileError),
        (index("model-9.safetensors", SHARDS[0]), MalformedFileError),
        (index("../model.safetensors", SHARDS[0]), UnsafeInputError),
        (index("model.bin", SHARDS[0]), UnsafeInputError),
    ],
)
def test_a_bad_index(
    content: bytes, error: type[LoraCliError], hub_server: HubServer, refused: Callable[..., LoraCliError]
) -> None:
    hub_server.publish("owner/name", {**sharded(), "model.safetensors.index.json": content, "model.bin": b"x"})
    refused("owner/name", error)
    assert hub_server.fetched() == ["model.safetensors.index.json"]


def test_missing_shards_are_named(hub_server: HubServer, refused: Callable[..., LoraCliError]) -> None:
    files = sharded()
    del files[SHARDS[1]]
    hub_server.publish("owner/name", files)
    assert refused("owner/name", MalformedFileError).details == (SHARDS[1],)


def test_names_that_lead_out_are_not_fetched(hub_server: HubServer, tmp_path: Path) -> None:
    bad = [
        "../up.json",
        "a/../../up.json",
        "/abs.json",
        "..\\up.json",
        ".hidden.json",
        "a/.hidden.json",
        "a\nb.json",
        "..",
    ]
    hub_server.publish("owner/name", {**SINGLE, **{name: name.encode() for name in bad}})
    before = set(tmp_path.rglob("*.json"))
    locate("owner/name", role="checkpoint")
    assert hub_server.fetched() == sorted(SINGLE)
    assert set(tmp_path.rglob("*.json")) == before


# ---------------------------------------------------------------------------------------------- what the Hub says


@pytest.mark.parametrize("token", [None, TOKEN])
def test_not_found(token: str | None, refused: Callable[..., LoraCliError], monkeypatch: pytest.MonkeyPatch) -> None:
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    error = refused("owner/nothing", HubError)
    assert error.message == "owner/nothing is not on the Hub, or is private"
    assert "hf auth login" in str(error.hint)


def test_a_private_repository_opens_with_a_token_that_only_the_hub_sees(
    hub_server: HubServer, refused: Callable[..., LoraCliError], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_server.publish("owner/name", {**SIDE, **SINGLE})
    hub_server.repositories["owner/name"].private = True
    assert "private" in refused("owner/name", HubError).message
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub_server.requests.clear()
    locate("owner/name", role="checkpoint")
    assert {bool(request.token) for request in hub_server.requests if request.path.startswith("/cdn/")} == {False}
    assert {bool(request.token) for request in hub_server.requests if not request.path.startswith("/cdn/")} == {True}


def test_gated(hub_server: HubServer, refused: Callable[..., LoraCliError], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub_server.publish("owner/name", {**SIDE, **SINGLE})
    hub_server.repositories["owner/name"].gated = True
    error = refused("owner/name", HubError)
    assert error.message == "owner/name is gated"
    assert error.hint == f"accept its terms at {hub_server.endpoint}/owner/name, then run `hf auth login`"


def test_no_such_revision(hub_server: HubServer, refused: Callable[..., LoraCliError]) -> None:
    hub_server.publish("owner/name", SINGLE)
    error = refused("owner/name@v9", HubError)
    assert error.message.startswith("owner/name@v9 does not exist")
    assert f"{hub_server.endpoint}/owner/name/tree/main" in str(error.hint)


@pytest.mark.parametrize(
    ("path", "status", "headers", "body", "message"),
    [
        ("/api/", 429, {}, b"", "too many requests"),
        ("/api/", 429, {"RateLimit": '"api";r=0;t=100'}, b"", "too many requests"),
        ("/resolve/", 429, {"Retry-After": "100"}, b"", "too many requests"),
        ("/cdn/", 429, {}, b"", "too many requests"),
        ("/api/", 401, {"X-Error-Message": "Invalid credentials in Authorization header"}, b"", "accept the token"),
        ("/api/", 403, {"X-Error-Message": "no \x1b[31m rights"}, b"", "may not read owner/name"),
        ("/cdn/", 403, {}, b"expired", "may not read owner/name"),
        ("/api/", 500, {}, b"", "HTTP 500"),
        ("/resolve/", 503, {}, b"", "HTTP 503"),
        ("/cdn/", 502, {}, b"", "HTTP 502"),
        ("/resolve/", 404, {"X-Error-Code": "EntryNotFound"}, b"", "lacks a file"),
        ("/api/", 200, {}, b"<html>log in to the hotel</html>", "did not answer as a Hub does"),
        ("/api/", 200, {}, b"[]", "did not answer as a Hub does"),
        ("/api/", 200, {}, b'{"id": "owner/name", "siblings": [{"rfilename": 1}]}', "did not answer as a Hub does"),
        ("/api/", 200, {}, b'{"id": "owner/name"}', "named no commit"),
        ("/api/", 200, {}, b'{"id": "owner/name", "sha": "../../x"}', "named no commit"),
        ("/resolve/", 200, {}, b"<html></html>", "did not answer as a Hub does"),
    ],
)
def test_answers_that_are_errors(  # noqa: PLR0917
    path: str,
    status: int,
    headers: dict[str, str],
    body: bytes,
    message: str,
    hub_server: HubServer,
    refused: Callable[..., LoraCliError],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """R177: gated, rate-limited, gone, half an answer: each has its words, and nothing half fetched is used."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub_server.publish("owner/name", {**SIDE, **SINGLE})
    hub_server.fail(path, status, headers, body=body)
    assert message in refused("owner/name", HubError).message
    assert not list(Path(os.environ["HF_HOME"]).rglob("refs/*")), "half a checkpoint must not be found offline"


def test_server_down(hub_server: HubServer, refused: Callable[..., LoraCliError]) -> None:
    hub_server.publish("owner/name", SINGLE)
    locate("owner/name", role="checkpoint")
    hub_server.stop()
    error = refused("owner/name", HubError)
    assert "cannot be reached" in error.message
    assert "HF_HUB_OFFLINE=1" in str(error.hint), "the cache is used when asked for, never silently"


def test_server_goes_away_between_listing_and_files(
    hub_server: HubServer, refused: Callable[..., LoraCliError], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import HfApi

    hub_server.publish("owner/name", SINGLE)
    ask: Callable[..., object] = HfApi.model_info

    def ask_then_stop(*args: object, **options: object) -> object:
        info = ask(*args, **options)
        hub_server.stop()
        return info

    monkeypatch.setattr(HfApi, "model_info", ask_then_stop)
    assert "cannot be reached" in refused("owner/name", HubError).message


def test_tls_fails(
    hub_server: HubServer,
    refused: Callable[..., LoraCliError],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """R177: a proxy that breaks TLS."""
    use_hub(hub_server.endpoint.replace("http:", "https:"), tmp_path / "other", monkeypatch)
    error = refused("owner/name", HubError)
    assert "TLS" in error.message
    assert "SSL_CERT_FILE" in str(error.hint)


def test_a_token_that_cannot_be_sent_is_not_shown(
    hub_server: HubServer, refused: Callable[..., LoraCliError], monkeypatch: pytest.MonkeyPatch
) -> None:
    """R137."""
    hub_server.publish("owner/name", SINGLE)
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN}ß")
    assert refused("owner/name", HubError).message == "The token cannot be sent"
    assert not hub_server.requests


@pytest.mark.parametrize(
    ("raised", "error"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/cache"), DiskFullError),
        (RuntimeError("Data processing error: IO Error: No space left on device (os error 28)"), DiskFullError),
        (PermissionError(errno.EACCES, "Permission denied", "/cache"), WriteError),
        (OSError(errno.EROFS, "Read-only file system", "/cache"), WriteError),
        (ValueError(f"Illegal header value b'Bearer {TOKEN}'"), HubError),
    ],
)
def test_failures_of_the_disk_and_of_the_client(
    raised: Exception,
    error: type[LoraCliError],
    hub_server: HubServer,
    refused: Callable[..., LoraCliError],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from huggingface_hub import HfApi

    def fail(*_args: object, **_options: object) -> None:
        raise raised

    hub_server.publish("owner/name", SINGLE)
    monkeypatch.setattr(HfApi, "hf_hub_download", fail)
    assert refused("owner/name", error).hint


def test_faults_of_listeners_are_not_the_hubs(hub_server: HubServer) -> None:
    class Closed(Progress):
        def note(self, text: str) -> None:
            raise BrokenPipeError(text)

    hub_server.publish("owner/name", SINGLE)
    with pytest.raises(BrokenPipeError):
        locate("owner/name", role="checkpoint", progress=Closed())


# ---------------------------------------------------------------------------------------------- offline


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def go_offline() -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    return go_offline


@pytest.mark.parametrize("revision", ["", "@a/b", "@v1.0", "@COMMIT"])
@pytest.mark.parametrize("files", [sharded(), SINGLE, ADAPTER], ids=["sharded", "single", "adapter"])
def test_offline_with_a_full_cache(
    revision: str, files: dict[str, bytes], hub_server: HubServer, offline: Callable[[], None]
) -> None:
    commit = hub_server.publish("owner/name", {**SIDE, **files})
    hub_server.repositories["owner/name"].tags |= {"v1.0": commit, "a/b": commit}
    reference, role = f"owner/name{revision.replace('COMMIT', commit)}", "adapter" if files is ADAPTER else "checkpoint"
    online = locate(reference, role=role)  # type: ignore[arg-type]
    hub_server.requests.clear()
    offline()
    assert locate(reference, role=role) == online  # type: ignore[arg-type]
    assert not hub_server.requests


def test_offline_with_what_another_program_fetched(hub_server: HubServer, offline: Callable[[], None]) -> None:
    from huggingface_hub import snapshot_download

    commit = hub_server.publish("owner/name", {**SIDE, **SINGLE})
    snapshot_download("owner/name", allow_patterns=["*.safetensors"])
    offline()
    assert locate("owner/name", role="checkpoint").label == f"owner/name@{commit}"


def test_offline_with_an_empty_cache(
    hub_server: HubServer, refused: Callable[..., LoraCliError], offline: Callable[[], None]
) -> None:
    hub_server.publish("owner/name", SINGLE)
    offline()
    error = refused("owner/name@v1.0", HubError)
    assert error.message == "owner/name@v1.0 is not in the Hub's cache, and HF_HUB_OFFLINE is set"
    assert "`HF_HUB_OFFLINE=0 hf download owner/name --revision v1.0`" in str(error.hint)
    assert not hub_server.requests


def test_offline_with_a_part(
    hub_server: HubServer, refused: Callable[..., LoraCliError], offline: Callable[[], None]
) -> None:
    hub_server.publish("owner/name", {**SIDE, **sharded()})
    found = locate("owner/name", role="checkpoint")
    lose(found.path / SHARDS[1])
    offline()
    error = refused("owner/name", HubError)
    assert "only in part" in error.message
    assert error.details == (SHARDS[1],)
    for name in ("model.safetensors.index.json", SHARDS[0]):
        lose(found.path / name)
    assert refused("owner/name", HubError).message.startswith("owner/name is not in")


# ---------------------------------------------------------------------------------------------- manners


ENDPOINTS = [
    *(
        "",
        "nonsense",
        "file:///etc/passwd",
        "ftp://hub.test",
        "javascript:alert(1)",
        "//hub.test",
        "http://",
        "https:///x",
    ),
    *(
        f"https://me:{TOKEN}@hub.test",
        f"https://{TOKEN}@hub.test",
        f"https://hub.test/?t={TOKEN}",
        "https://hub.test#a",
    ),
    *(
        "https://hub test",
        "https://hub.test\n",
        "https://hub.test\x1b[31m",
        "https://hub.test:port",
        "https://hub.test\\@x",
    ),
]


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda text: ascii(text).replace(TOKEN, "TOKEN"))
def test_hostile_endpoint(
    endpoint: str,
    hub_server: HubServer,
    refused: Callable[..., LoraCliError],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """R136: an address from the environment is checked like an option, and not shown."""
    use_hub(endpoint, tmp_path / "other", monkeypatch)
    error = refused("owner/name", UsageError)
    assert "HF_ENDPOINT" in str(error.hint)
    assert not hub_server.requests


@pytest.mark.parametrize("endpoint", ["https://huggingface.co", "http://[::1]:80/api/hub-1.x", "https://HUB.test:8443"])
def test_good_endpoints(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_cli.checkpoint.hub_client import check_environment

    use_hub(endpoint, tmp_path, monkeypatch)
    check_environment()


@pytest.mark.parametrize("progress", [Progress(), Listener()], ids=["silent", "listening"])
def test_the_clients_state_is_as_before(
    progress: Progress, hub_server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import HfApi

    bars = importlib.import_module("huggingface_hub.utils.tqdm")
    monkeypatch.setattr(bars, "progress_bar_states", {"_global": True, "elsewhere": False})
    handlers = [logging.NullHandler()]
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "handlers", handlers)
    shown: dict[str, bool] = {}
    fetch: Callable[..., str] = HfApi.hf_hub_download

    def watch(self: HfApi, repo: str, name: str, **options: object) -> str:
        shown[name] = not bars.are_progress_bars_disabled("huggingface_hub.http_get")
        return fetch(self, repo, name, **options)

    monkeypatch.setattr(HfApi, "hf_hub_download", watch)
    hub_server.publish("owner/name", {**SINGLE, "config.json": b"{}", "lora_merge.undo": b"large"})
    locate("owner/name", role="checkpoint", progress=progress)
    listens = isinstance(progress, Listener)
    assert shown == {"config.json": False, "lora_merge.undo": listens, "model.safetensors": listens}
    hub_server.fail("/api/", 500)
    with pytest.raises(HubError):
        locate("owner/name", role="checkpoint", progress=progress)
    assert bars.progress_bar_states == {"_global": True, "elsewhere": False}
    assert handlers[0].filters == []


@pytest.mark.parametrize("shown", ["0", "1"])
def test_what_the_environment_says_about_bars_is_left_alone(
    shown: str, hub_server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The client warns when it is asked to overrule its environment; warnings are errors here.
    for module in ("huggingface_hub.constants", "huggingface_hub.utils.tqdm"):
        monkeypatch.setattr(sys.modules[module], "HF_HUB_DISABLE_PROGRESS_BARS", shown == "1")
    hub_server.publish("owner/name", SINGLE)
    locate("owner/name", role="checkpoint")


class Kept(logging.Handler):
    """Keeps what would be written."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def log() -> Iterator[list[str]]:
    handler = Kept()
    logging.getLogger("huggingface_hub").addHandler(handler)
    yield handler.lines
    logging.getLogger("huggingface_hub").removeHandler(handler)


def test_warnings_of_the_client_are_shown_without_secrets(hub_server: HubServer, log: list[str]) -> None:
    hub_server.publish("owner/name", SINGLE)
    hub_server.fail("/cdn/", 429, {"Retry-After": "3"}, times=1)
    locate("owner/name", role="checkpoint", progress=Listener())
    assert any("Waiting 4.0s" in line for line in log), log
    assert any("/cdn/" in line for line in log)
    assert not any(SIGNATURE in line for line in log)


def test_a_servers_words_cannot_draw_on_the_screen(hub_server: HubServer, log: list[str]) -> None:
    hub_server.fail("/api/", 500, {"X-HF-Warning": "lora-cli tests; a \x1b[31mred word"})
    with pytest.raises(HubError):
        locate("owner/name", role="checkpoint", progress=Listener())
    assert log == ["a \ufffd[31mred word"]


def test_no_warnings_when_nobody_listens(hub_server: HubServer, log: list[str]) -> None:
    hub_server.publish("owner/name", SINGLE)
    hub_server.fail("/cdn/", 429, times=1)
    locate("owner/name", role="checkpoint")
    assert log == []


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)


LOCATE = """
from lora_cli.checkpoint.hub import locate
from lora_cli.errors import LoraCliError
try:
    print(locate("owner/name", role="checkpoint").label)
except LoraCliError as error:
    print(error.exit_code, error.message)
"""


def test_a_new_process_goes_by_its_environment(hub_server: HubServer) -> None:
    commit = hub_server.publish("owner/name", {**SIDE, **SINGLE})
    done = run(LOCATE)
    assert (done.stdout, done.stderr) == (f"owner/name@{commit}\n", "")
    hub_server.stop()
    done = run(LOCATE, HF_HUB_OFFLINE="1")
    assert (done.stdout, done.stderr) == (f"owner/name@{commit}\n", "")


@pytest.mark.parametrize("name", ["HF_ENDPOINT", "HF_HUB_ETAG_TIMEOUT"])
def test_an_environment_that_the_client_cannot_load(name: str, hub_server: HubServer) -> None:
    done = run(LOCATE, **{name: f"http://[{TOKEN}"})
    assert done.stdout.startswith("2 An environment variable of the Hub's client")
    assert TOKEN not in done.stdout + done.stderr
    assert not hub_server.requests


def test_local_paths_do_not_load_the_client() -> None:
    code = """
import sys
from lora_cli.checkpoint.hub import locate
assert locate(".", role="adapter").path.is_dir()
print(sorted({"huggingface_hub", "httpx", "httpx2", "torch", "tqdm", "numpy"} & set(sys.modules)))
"""
    assert run(code).stdout == "[]\n"
