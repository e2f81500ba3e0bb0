"""R121 to R127, R134 and R135: configs, settings and archives that were made to harm, wherever one is read."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
from catalogue import check_refused
from cli_world import Call, World, call_fixture, world_fixture  # noqa: F401 (fixtures)
from safetensors.numpy import save_file
from tiny import read_tensors, within, write_adapter

SECONDS = 5
"""Processor time that any of these may take."""

Prepare = Callable[[World, Path], tuple[Path, list[object]]]
"""Copies inputs into a folder; returns the file that is to be spoilt, and a command line that reads it."""


def of_base(name: str) -> Prepare:
    def prepare(world: World, folder: Path) -> tuple[Path, list[object]]:
        shutil.copytree(world.base, folder / "b")
        return folder / "b" / name, ["merge", folder / "b", world.adapter, "-o", folder / "out"]

    return prepare


def of_adapter(name: str) -> Prepare:
    def prepare(world: World, folder: Path) -> tuple[Path, list[object]]:
        shutil.copytree(world.adapter, folder / "a")
        return folder / "a" / name, ["merge", world.base, folder / "a", "-o", folder / "out"]

    return prepare


def of_wrapped(world: World, folder: Path) -> tuple[Path, list[object]]:
    shutil.copytree(world.base, folder / "w")
    shard = next((folder / "w").glob("*1-of-*.safetensors"))
    tensors = read_tensors(shard)
    weight = tensors.pop("model.layers.0.self_attn.q_proj.weight")
    factors = read_tensors(world.plain)
    tensors["model.layers.0.self_attn.q_proj.base.weight"] = weight
    for side in "AB":
        name = f"model.layers.0.self_attn.q_proj.lora_{side}.weight"
        tensors[name] = factors[name]
    for path in (folder / "w").glob("*.safetensors*"):
        tensors |= read_tensors(path) if path.suffix == ".safetensors" and path != shard else {}
        path.unlink()
    save_file(tensors, folder / "w" / "model.safetensors")
    return folder / "w" / "lora_wrap.json", ["merge", folder / "w", "-o", folder / "out"]


# R127: JSON

PLACES: dict[str, tuple[Prepare, str]] = {
    "adapter_config.json": (of_adapter("adapter_config.json"), "config"),
    "config.json": (of_base("config.json"), "config"),
    "index": (of_base("model.safetensors.index.json"), "index"),
    "lora_wrap.json": (of_wrapped, "config"),
}
JSON: dict[str, tuple[bytes, str]] = {
    "duplicate keys": (b'{"r": 2, "r": 3}', "the key 'r' stands twice"),
    "duplicate keys, escaped": (b'{"r": 2, "\\u0072": 3}', "the key 'r' stands twice"),
    "duplicate keys below": (b'{"a": [{"r": 2, "r": 3}]}', "the key 'r' stands twice"),
    "NaN": (b'{"r": NaN}', "NaN is no JSON number"),
    "infinity": (b'{"r": -Infinity}', "-Infinity is no JSON number"),
    "a number out of range": (b'{"r": 1e999}', "a number out of range"),
    "a huge integer": (b'{"r": ' + b"9" * 100_000 + b"}", "an integer of 100000 characters"),
    "deep arrays": (b"[" * 200_000, "nested more than 100 deep"),
    "deep objects": (b'{"a":' * 200_000, "nested more than 100 deep"),
    "deep and closed": (b'{"a":' + b"[" * 200 + b"]" * 200 + b"}", "nested more than 100 deep"),
    "two documents": (b"{}{}", "extra data"),
    "not UTF-8": (b'{"r": "\xff"}', "not UTF-8 at byte 7"),
    "UTF-16": ('{"r": 2}'.encode("utf-16"), "not UTF-8 at byte 0"),
    "a byte order mark": (b'\xef\xbb\xbf{"r": 2}', "byte order mark"),
    "half a pair": (b'{"r": "\\ud800"}', "half a surrogate pair"),
    "NUL": (b'{"r": 2}\0', "extra data"),
    "a comment": (b'{"r": 2 /* */}', "JSON"),
    "a comma too many": (b'{"r": 2,}', "JSON"),
    "Python": (b"{'r': 2}", "JSON"),
    "cut off": (b'{"r": 2', "JSON"),
    "nothing": (b"", "JSON"),
    "a web page": (b"<!doctype html>", "JSON"),
}


@pytest.mark.parametrize("name", JSON)
@pytest.mark.parametrize("place", PLACES)
def test_json(place: str, name: str, call: Call, world: World, tmp_path: Path) -> None:
    """R127."""
    prepare, what = PLACES[place]
    content, words = JSON[name]
    file, line = prepare(world, tmp_path)
    file.write_bytes(content)
    with within(SECONDS):
        check_refused(call, line, 10, f"{file.name}|{what}|{words}", folder=tmp_path)


@pytest.mark.parametrize("place", PLACES)
def test_a_gigabyte_of_json(place: str, call: Call, world: World, tmp_path: Path) -> None:
    """R127: its length says enough; nothing is read."""
    file, line = PLACES[place][0](world, tmp_path)
    with file.open("wb") as sparse:
        sparse.truncate(1 << 30)
    with within(1):
        check_refused(call, line, 10, f"{file.name}|too large|1073741824 bytes", folder=tmp_path)


@pytest.mark.parametrize("text", ["[]", "1", '"text"', "null", "true"])
@pytest.mark.parametrize("place", PLACES)
def test_json_that_is_no_object(place: str, text: str, call: Call, world: World, tmp_path: Path) -> None:
    """R127."""
    file, line = PLACES[place][0](world, tmp_path)
    file.write_text(text)
    check_refused(call, line, 10, file.name, folder=tmp_path)


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer.json", "tokenizer_config.json", "x.yaml"])
def test_what_is_only_copied_is_never_parsed(name: str, call: Call, world: World, tmp_path: Path) -> None:
    """R125, R127: of a base's small files, all but its config are bytes."""
    file, line = of_base(name)(world, tmp_path)
    content = b"[" * 500_000 + b"\xff\0&a [*a] !!python/object:os.system"
    file.write_bytes(content)
    with within(SECONDS):
        assert call(*line).code == 0
    assert (tmp_path / "out" / name).read_bytes() == content


BOMB = "\n".join(["a0: &a0 [x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))])
METADATA = {
    "aliases": BOMB,
    "a tag": "license: !!python/object/apply:os.system [true]",
    "deep": "license: " + "[" * 50_000,
    "a key twice": "license: mit\nlicense: other",
    "a long number": "license: " + "9" * 200_000,
    "long": "license: " + "x" * 500_000,
    "binary": "license: \0",
}


@pytest.mark.parametrize("name", METADATA)
def test_the_metadata_of_a_card(name: str, call: Call, world: World, tmp_path: Path) -> None:
    """R125: a card that cannot be read safely stays as it is, and a warning says why."""
    file, line = of_base("README.md")(world, tmp_path)
    file.write_text(f"---\n{METADATA[name]}\n---\n# Base\n")
    before = file.read_bytes()
    with within(SECONDS):
        ran = call(*line, "--json")
    assert ran.code == 0
    assert any(words.startswith("README.md stays as it is") for words in ran.document["warnings"])
    assert (tmp_path / "out" / "README.md").read_bytes() == before


# R125, R126: YAML that people write

YAML: dict[str, tuple[str, int, str]] = {
    "R125 a tag": ("targets: !!python/object/apply:os.system [touch x]", 11, "Anchors, aliases and tags|line 1"),
    "R125 a tag of its own": ("targets: [!x y]", 11, "Anchors, aliases and tags"),
    "R125 aliases": (f"{BOMB}\ntargets: *a11", 11, "Anchors, aliases and tags|line 1"),
    "R125 an anchor": ("targets: &x [q_proj]", 11, "Anchors, aliases and tags|quotes"),
    "R125 a merged key": ("<<: {targets: [q_proj]}", 10, "no plain text"),
    "R125 a key twice": ("targets: [q_proj]\ntargets: [up_proj]", 10, "'targets' stands twice"),
    "R125 deep": ("targets: " + "[" * 5000, 10, "nested more than 20 deep"),
    "R125 deep keys": ("{a: " * 5000, 10, "nested more than 20 deep"),
    "R125 several documents": ("targets: [q_proj]\n---\ntargets: [up_proj]", 10, "single document"),
    "R125 not UTF-8": ("targets: [\udcff]", 10, "not UTF-8"),
    "R125 NUL": ("targets: [a\0]", 10, "not valid YAML"),
    "R126 no": ("targets: [no]", 10, "targets: A field has the wrong type|[False]"),
    "R126 a number": ("targets: [1.5]", 10, "targets: A field has the wrong type"),
    "R126 octal": ("targets: 012", 10, "targets: A field has the wrong type|found 10"),
    "R126 to base 60": ("targets: [1:59:59]", 10, "targets: A field has the wrong type"),
    "R126 many digits to base 60": ("targets: [" + "1:" * 50_000 + "1]", 10, "a number of a hundred digits"),
    "R126 a date": ("targets: [2026-01-01]", 10, "targets: A field has the wrong type"),
    "R126 no date": ("targets: [2026-99-99]", 10, "not valid YAML"),
    "R126 nothing": ("targets:", 10, "targets: A field has the wrong type"),
    "R126 an unknown field": ("targets: [q_proj]\ntarget: [x]", 10, "field without meaning|target"),
    "R126 a key that is no text": ("? [targets]\n: [q_proj]", 10, "no plain text"),
}


@pytest.mark.parametrize("option", ["--target", "--config"])
@pytest.mark.parametrize("name", YAML)
def test_yaml(name: str, option: str, call: Call, world: World, tmp_path: Path) -> None:
    """R125, R126: as a file of targets, and as a config of a fresh adapter."""
    text, exit_code, words = YAML[name]
    file = tmp_path / "t.yaml"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    line = ["inject", world.base, "-o", tmp_path / "out", "--rank", 2, option, file]
    with within(SECONDS):
        check_refused(call, line, exit_code, f"t.yaml|{words}", folder=tmp_path)


def test_a_hundred_megabytes_of_yaml(call: Call, world: World, tmp_path: Path) -> None:
    """R125: nothing of it is read."""
    with (tmp_path / "t.yaml").open("wb") as sparse:
        sparse.truncate(100 << 20)
    for option in ("--target", "--config"):
        line = ["inject", world.base, "-o", tmp_path / "out", "--rank", 2, option, tmp_path / "t.yaml"]
        with within(1):
            check_refused(call, line, 10, "t.yaml: |too large|104857600 bytes", folder=tmp_path)


FIELDS = {"rank: '2'": "rank", "rank: 2.5": "rank", "alpha: yes": "alpha", "seed: 1e3": "seed", "init: [pissa]": "init"}


@pytest.mark.parametrize("text", FIELDS)
def test_a_config_of_wrong_types(text: str, call: Call, world: World, tmp_path: Path) -> None:
    """R126: YAML makes numbers of words and words of numbers; each field takes its own type alone."""
    (tmp_path / "c.yaml").write_text(text)
    line = ["inject", world.base, "-o", tmp_path / "out", "--config", tmp_path / "c.yaml"]
    check_refused(call, line, 10, f"c.yaml: {FIELDS[text]}: ", folder=tmp_path)


# R121 to R124: pickles and archives


class Evil:
    """What runs when it is unpickled."""

    ran: ClassVar[list[str]] = []

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.ran.append, ("unpickled",)


def zipped(pickled: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
    return file.getvalue()


def tarred(pickled: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        entry = tarfile.TarInfo("pickle")
        entry.size = len(pickled)
        archive.addfile(entry, io.BytesIO(pickled))
    return file.getvalue()


PICKLE = pickle.dumps(Evil(), protocol=2)
CONTENTS = {"pickle": PICKLE, "zip": zipped(PICKLE), "tar": tarred(PICKLE)}
ENDINGS = ("bin", "pt", "pth", "ckpt", "pkl")
LINES = {
    "adapter": "merge {base} {x} -o {out}",
    "base": "merge {x} {adapter} -o {out}",
    "inspect": "inspect {x}",
    "diff": "diff {base} {x}",
    "verify": "verify {x} --base {base} --adapter {adapter}",
    "inject": "inject {x} -o {out} --rank 2",
    "undo file": "unmerge {merged} {adapter} --undo {x} -o {out}",
}


def filled(text: str, world: World, x: Path, folder: Path) -> list[object]:
    """The line with the file in its place."""
    places = {"x": x, "out": folder / "out", "base": world.base, "adapter": world.adapter, "merged": world.merged}
    return [str(part).format(**places) for part in text.split()]


@pytest.mark.parametrize("place", LINES)
@pytest.mark.parametrize("kind", CONTENTS)
def test_a_pickle_by_another_name(kind: str, place: str, call: Call, world: World, tmp_path: Path) -> None:
    """R122, R123, R124: what it is, and not what it is called, decides; nothing in the program can unpickle it."""
    file = tmp_path / "x.safetensors"
    file.write_bytes(CONTENTS[kind])
    words = {"pickle": "a Python pickle", "zip": "a zip archive", "tar": "x.safetensors"}[kind]
    check_refused(call, filled(LINES[place], world, file, tmp_path), 10, words, folder=tmp_path)
    assert not Evil.ran


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("place", [place for place in LINES if place != "undo file"])
def test_a_pickle_by_its_name(place: str, ending: str, call: Call, world: World, tmp_path: Path) -> None:
    """R121."""
    file = tmp_path / f"x.{ending}"
    file.write_bytes(PICKLE)
    words = "Pickled weights can run code|weights_only=True"
    check_refused(call, filled(LINES[place], world, file, tmp_path), 11, f"{file.name}|{words}", folder=tmp_path)
    assert not Evil.ran


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("name", ["adapter_model", "pytorch_model"])
def test_a_folder_of_pickles(name: str, ending: str, call: Call, world: World, tmp_path: Path) -> None:
    """R121: as PEFT and transformers once wrote them."""
    adapter = write_adapter(tmp_path / "a")
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / f"{name}.{ending}").write_bytes(PICKLE)
    line = ["merge", world.base, adapter, "-o", tmp_path / "out"]
    check_refused(call, line, 11, f"pickled|{name}.{ending}|weights_only=True", folder=tmp_path)
    assert not Evil.ran


def test_a_polyglot(call: Call, world: World, tmp_path: Path) -> None:
    """R123: safetensors for one reader and a zip archive for another, which looks for its end."""
    file = tmp_path / "x.safetensors"
    file.write_bytes(world.file.read_bytes() + CONTENTS["zip"])
    check_refused(call, ["inspect", file], 11, "x.safetensors|bytes", folder=tmp_path)


def test_pickles_beside_a_checkpoint_are_left_out(call: Call, world: World, tmp_path: Path) -> None:
    """R121: neither read nor passed on."""
    file, line = of_base("training_args.bin")(world, tmp_path)
    file.write_bytes(PICKLE)
    ran = call(*line, "--json")
    assert ran.code == 0
    assert "training_args.bin" in ran.document["left_out"]
    assert not (tmp_path / "out" / "training_args.bin").exists()
    assert not Evil.ran


def test_a_receipt_of_another_version_is_no_receipt(call: Call, world: World, tmp_path: Path) -> None:
    """R134: it lets nothing be replaced; nor does one that lists what it has no right to."""
    shutil.copytree(world.merged, tmp_path / "out")
    receipt = tmp_path / "out" / "lora_merge.json"
    said = json.loads(receipt.read_text())
    (tmp_path / "out" / "notes.txt").write_text("mine")
    line = ["merge", world.base, world.adapter, "-o", tmp_path / "out", "--force"]
    for change in (
        {"schema": "lora-cli/receipt/2"},
        {"files": [*said["files"], "notes.txt"]},
        {"files": [*said["files"], "notes.txt"], "bytes": {}},
        {"files": [*said["files"], "notes.txt"], "bytes": {"notes.txt": 5}},
        {"files": "notes.txt"},
        {},
    ):
        receipt.write_text(json.dumps(said | change))
        check_refused(call, line, 30, "exists already|--force", folder=tmp_path)
