"""Folders, indexes and links: what is opened, what is refused and why. R… are the cases of the fault catalogue."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from folder_cases import POINTER, REFUSED, Build, file_of, not_waiting, single, sparse

from lora_cli.checkpoint.checkpoint import CONFIG_LIMIT, open_checkpoint
from lora_cli.errors import LoraCliError, MalformedFileError, UnsafeInputError, UsageError


def said(error: LoraCliError) -> str:
    parts = (error.message, error.file, error.tensor, error.found, error.expected, error.hint, *error.details)
    return "\n".join(str(part) for part in parts)


def refusal(path: Path, error: type[LoraCliError]) -> LoraCliError:
    with not_waiting(), pytest.raises(LoraCliError) as caught:
        open_checkpoint(path)
    assert type(caught.value) is error, said(caught.value)
    return caught.value


@pytest.mark.parametrize(("build", "words", "error"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(tmp_path: Path, build: Build, words: str, error: type[LoraCliError]) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    build(folder)
    caught = refusal(folder, error)
    assert [fragment for fragment in words.split("|") if fragment not in said(caught)] == []
    assert str(tmp_path) not in said(caught)


@pytest.mark.parametrize(
    ("path", "error", "words"),
    [
        ("/dev/zero", UnsafeInputError, "Not a regular file"),
        ("/dev/null", UnsafeInputError, "Not a regular file"),
        ("/nowhere/at/all", UsageError, "does not exist"),
        ("/proc/self/status", MalformedFileError, "too short"),
    ],
)
def test_a_path_that_is_no_file(path: str, error: type[LoraCliError], words: str) -> None:
    assert words in refusal(Path(path), error).message


@pytest.mark.parametrize("name", ["m.bin", "m.pt", "m.pth", "m.ckpt", "m.pkl"])
def test_a_pickle_is_never_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(file_of("a"))
    assert "weights_only=True" in str(refusal(tmp_path / name, UnsafeInputError).hint)


def test_r072_a_file_that_may_not_be_read() -> None:
    """Also as root, who may read everything: as somebody else for a moment."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        single(folder).chmod(0)
        user = os.geteuid()
        os.seteuid(65534 if user == 0 else user)
        try:
            caught = refusal(folder, MalformedFileError)
        finally:
            os.seteuid(user)
    assert "Permission denied" in caught.message
    assert caught.file == "model.safetensors"


CONFIGS = ["[]", "null", "{", '{"a": 1, "a": 2}', '{"a": NaN}', '{"a":' + "[" * 500 + "]" * 500 + "}", POINTER.decode()]


@pytest.mark.parametrize("text", [*CONFIGS, None], ids=lambda text: str(text)[:20])
def test_r127_a_config_that_is_none(tmp_path: Path, text: str | None) -> None:
    single(tmp_path)
    (tmp_path / "config.json").write_text(text or "")
    if text is None:
        sparse(tmp_path / "config.json", CONFIG_LIMIT + 1)
    with pytest.raises(MalformedFileError) as caught:
        _ = open_checkpoint(tmp_path).config
    assert caught.value.file == "config.json"


def test_checkpoints_below_a_folder_are_named(tmp_path: Path) -> None:
    for name in ("base", "merged", "notes"):
        (tmp_path / name).mkdir()
    for name in ("base", "merged"):
        (tmp_path / name / "model.safetensors").touch()
    (tmp_path / "README.md").touch()
    with pytest.raises(UsageError, match="holds no safetensors checkpoint") as caught:
        open_checkpoint(tmp_path)
    assert caught.value.found == "safetensors files below it, in base, merged"
    assert caught.value.hint == "name one of these folders"
    with pytest.raises(UsageError) as caught:
        open_checkpoint(tmp_path / "notes")
    assert caught.value.found is None
