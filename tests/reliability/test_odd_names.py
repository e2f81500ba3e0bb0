"""R073 to R075, and R164: names that are odd, that a file system takes for one another, or that are long."""

from __future__ import annotations

import json
import re
import shutil
import unicodedata
from pathlib import Path
from xml.etree import ElementTree

import pytest
from catalogue import check_refused
from cli_world import Call, Ran, World, call_fixture, world_fixture  # noqa: F401 (fixtures)
from tiny import base_tensors, read_tensors, write_base, write_json

from lora_cli.checkpoint.files import Folder

# ---------------------------------------------------------------------------------------------- odd names

ODD = [
    "new\nline",
    "per%cent",
    "[red]mark[bold]up",
    "'quo\"tes'",
    "emoji 🦀",
    "x" * 200,
    "\x1b[2J",
    "..x",
    " ",
    "-o",
]
ODD += [
    "ünï",
    "e\u0301",
    "\u202egnp",
    "a=b",
    "{braces}",
    "$HOME `id`",
    "re:x",
    "a;b&c|d",
    "*?",
    "\x9b31m",
    "~",
    "#",
    "@main",
]
ODD += [b"\xff\xfe not UTF-8".decode(errors="surrogateescape")]
STEERING = re.compile(r"[^\n\x20-\x7e\u00a0-\u200a\u2010-\u2027\u2030-\ud7ff\uf900-\uffff\U0001f300-\U0001faff]")
"""What no output for people may hold: control, direction and private characters, and what is no character."""


def text(name: str) -> str:
    """A name as documents hold it: bytes that are no UTF-8 as escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


def run(call: Call, *words: object, code: int = 0) -> Ran:
    """A command line for people, with all that its output promises whatever the names are."""
    ran = call(*words)
    assert ran.code == code, ran.err
    for text in (ran.out, ran.err):
        assert not STEERING.search(text), ascii(text)
        assert "Traceback" not in text
    return ran


@pytest.mark.parametrize("name", ODD, ids=ascii)
def test_r074_odd_names_of_every_input_and_output(call: Call, world: World, tmp_path: Path, name: str) -> None:
    """The folder around all, the inputs and outputs themselves, and files named alone."""
    here = tmp_path / name
    base, adapter, merged, back, fresh = (here / f"{letter}{name}" for letter in "bamuf")
    shutil.copytree(world.base, base)
    shutil.copytree(world.adapter, adapter)
    out = run(call, "merge", base, adapter, "-o", merged).out
    assert "merged" in out
    for shard in world.merged.glob("*.safetensors"):
        assert (merged / shard.name).read_bytes() == shard.read_bytes()
    report = here / f"{name}.xml"
    proved = ["verify", merged, "--base", base, "--adapter", adapter, "--roundtrip", "--junit", report]
    run(call, *proved)
    ElementTree.parse(report)  # noqa: S314 (written one line above)
    run(call, "diff", base, merged, code=1)
    run(call, "unmerge", merged, adapter, "--undo", merged / "lora_merge.undo", "-o", back)
    assert read_tensors(back).keys() == base_tensors().keys()
    for path in world.base.iterdir():
        assert (back / path.name).read_bytes() == path.read_bytes()
    targets = here / f"{name}.yaml"
    targets.write_text("targets: [all-linear]\n")
    run(call, "inject", base, "--rank", "2", "--target", targets, "-o", fresh)
    for place in (base, adapter, merged, back, fresh):
        run(call, "inspect", place)
        document = call("inspect", place, "--json").document
        assert document["label"] == text(place.name)
    (merged / "lora_merge.json").write_text("[")
    for words in (["merge", merged, here / "no-such", "-o", here / "o"], ["merge", base, adapter, "-o", merged]):
        assert call(*words).code in (2, 30)
        assert not STEERING.search(call(*words).err)


@pytest.mark.parametrize("name", ODD, ids=ascii)
def test_r074_a_folder_with_one_file_of_an_odd_name(call: Call, world: World, tmp_path: Path, name: str) -> None:
    """It keeps its name there and back; a receipt that holds the name can be read, so nothing is merged twice."""
    base, merged, back = (tmp_path / letter for letter in "bmu")
    base.mkdir()
    shutil.copy(world.file, base / f"m{name}.safetensors")
    run(call, "merge", base, world.adapter, "-o", merged)
    assert [path.name for path in merged.glob("*.safetensors")] == [f"m{name}.safetensors"]
    assert call("inspect", merged, "--json").document["kind"] == "merged"
    assert call("merge", merged, world.adapter, "-o", back).code == 23
    assert "1 file as before the merge" in run(call, "unmerge", merged, world.adapter, "-o", back).out
    assert (back / f"m{name}.safetensors").read_bytes() == world.file.read_bytes()


@pytest.mark.parametrize("name", ODD, ids=ascii)
def test_r074_odd_names_of_single_files(call: Call, world: World, tmp_path: Path, name: str) -> None:
    base, adapter, merged, back = (tmp_path / f"{letter}{name}.safetensors" for letter in "bamu")
    shutil.copy(world.file, base)
    shutil.copy(world.plain, adapter)
    run(call, "merge", base, adapter, "--scale", "2", "-o", merged)
    assert read_tensors(merged).keys() == base_tensors().keys()
    run(call, "verify", merged, "--base", base, "--adapter", adapter, "--scale", "2", "--roundtrip")
    run(call, "unmerge", merged, adapter, "-o", back)
    assert back.read_bytes() == base.read_bytes()
    for place in (base, adapter, merged):
        assert call("inspect", place, "--scale", "2", "--json").document["label"] == text(place.name)


@pytest.mark.parametrize(
    "name", ["ünï.txt", "a b.json", "emoji 🦀.md", "x" * 240 + ".txt", "-o.json", "50%.txt", "[x].md"]
)
def test_r074_odd_names_of_side_files_come_along(call: Call, world: World, tmp_path: Path, name: str) -> None:
    base = write_base(tmp_path / "base")
    (base / name).write_text("kept")
    run(call, "merge", base, world.adapter, "-o", tmp_path / "out")
    assert (tmp_path / "out" / name).read_text() == "kept"
    run(call, "unmerge", tmp_path / "out", world.adapter, "-o", tmp_path / "back")
    assert (tmp_path / "back" / name).read_text() == "kept"


@pytest.mark.parametrize("name", ["new\nline.txt", "\x1b[2J.json", "\u202etxt.json", "\udcff.txt", "a\\b.txt"])
def test_r074_side_files_whose_name_is_not_the_same_everywhere_are_left_out(
    call: Call, world: World, tmp_path: Path, name: str
) -> None:
    base = write_base(tmp_path / "base")
    (base / name).write_text("odd")
    plan = call("merge", base, world.adapter, "-o", tmp_path / "out", "--dry-run", "--json").document
    assert plan["left_out"] == [name]
    assert "left out" in run(call, "merge", base, world.adapter, "-o", tmp_path / "out").err
    assert not (tmp_path / "out" / name).exists()


# ---------------------------------------------------------------------------------------------- names that meet


def folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


@pytest.fixture(name="folding")
def folding_fixture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs lie on a file system that takes names for one that differ by case or the form of an accent."""
    create, make = Folder.create, Folder.make
    monkeypatch.setattr(Folder, "create", lambda self, name, *mode: create(self, folded(name), *mode))
    monkeypatch.setattr(Folder, "make", lambda self, name, *mode: make(self, folded(name), *mode))


PAIRS = {
    "case": ("Notes.txt", "notes.txt"),
    "accent": ("e\u0301.md", "\u00e9.md"),
    "folders": ("Sub/a.json", "sub/b.json"),
}


@pytest.mark.parametrize(("one", "other"), PAIRS.values(), ids=PAIRS.keys())
def test_r073_side_files_that_would_be_one(
    call: Call, world: World, tmp_path: Path, folding: None, one: str, other: str
) -> None:
    base = write_base(tmp_path / "base")
    for name in (one, other):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(name)
    words = f"{ascii(other)[1:-1].rpartition('/')[2] if other.isascii() else ''}|have one name on this file system"
    check_refused(call, ["merge", base, world.adapter, "-o", tmp_path / "out"], 11, words, folder=tmp_path)


def test_r073_shards_that_would_be_one(call: Call, world: World, tmp_path: Path, folding: None) -> None:
    base = write_base(tmp_path / "base")
    index = json.loads((base / "model.safetensors.index.json").read_text())
    new = {
        "model-00001-of-00002.safetensors": "Model.safetensors",
        "model-00002-of-00002.safetensors": "MODEL.safetensors",
    }
    for old, name in new.items():
        (base / old).rename(base / name)
    index["weight_map"] = {key: new[shard] for key, shard in index["weight_map"].items()}
    write_json(base / "model.safetensors.index.json", index)
    words = ["merge", base, world.adapter, "-o", tmp_path / "out"]
    check_refused(call, words, 11, "odel.safetensors|have one name on this file system", folder=tmp_path)


@pytest.mark.parametrize(("one", "other"), PAIRS.values(), ids=PAIRS.keys())
def test_r073_and_stay_two_where_the_file_system_tells_them_apart(
    call: Call, world: World, tmp_path: Path, one: str, other: str
) -> None:
    base = write_base(tmp_path / "base")
    for name in (one, other):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(name)
    if (base / one).read_text() != one:
        pytest.skip("this file system takes them for one")
    assert call("merge", base, world.adapter, "-o", tmp_path / "out").code == 0
    assert call("unmerge", tmp_path / "out", world.adapter, "-o", tmp_path / "back").code == 0
    for folder in ("out", "back"):
        assert [(tmp_path / folder / name).read_text() for name in (one, other)] == [one, other]


# ---------------------------------------------------------------------------------------------- long names

LONG = {"a name of 5,000 characters": "n" * 5000, "6,000 folders": "a/" * 6000, "256 bytes": "n" * 256}
INPUTS = {
    "inspect": "inspect {x}",
    "base": "merge {x} {adapter} -o {out}",
    "adapter": "merge {base} {x} -o {out}",
    "adapter before training": "merge {base} {adapter} --initial {x} -o {out}",
    "merged": "verify {x} --base {base} --adapter {adapter}",
    "undo": "unmerge {merged} {adapter} --undo {x} -o {out}",
    "second of two": "diff {base} {x}",
    "targets": "inject {base} --rank 2 --target {x}.yaml -o {out}",
    "settings": "inject {base} --config {x}.yaml -o {out}",
}
OUTPUTS = {
    "merge": "merge {base} {adapter} -o {x}",
    "merge of one file": "merge {file} {adapter} -o {x}.safetensors",
    "unmerge": "unmerge {merged} {adapter} -o {x}",
    "inject": "inject {base} --rank 2 -o {x}",
    "residual": "inject {base} --rank 2 --init olora -o {out} --base-out {x}",
    "report": "verify {merged} --base {base} --adapter {adapter} --junit {x}",
}


@pytest.mark.parametrize(
    "where", [*INPUTS.values(), *OUTPUTS.values()], ids=[*INPUTS, *(f"{name} to" for name in OUTPUTS)]
)
@pytest.mark.parametrize("path", LONG.values(), ids=LONG.keys())
def test_r075_a_path_that_is_too_long(call: Call, world: World, tmp_path: Path, path: str, where: str) -> None:
    words = [part.replace("{x}", f"{tmp_path}/{path}") for part in where.split()]
    check_refused(call, world.fill(tuple(words), tmp_path), 2, "oo long", folder=tmp_path)


@pytest.mark.parametrize("name", ["n" * 234 + ".safetensors", "é" * 117 + ".safetensors"], ids=["ASCII", "UTF-8"])
def test_r075_a_name_to_which_no_receipt_can_be_added(call: Call, world: World, tmp_path: Path, name: str) -> None:
    """The name itself could be; what is written beside it has a longer one."""
    words = ["merge", world.file, world.adapter, "-o", tmp_path / name]
    check_refused(call, words, 2, "oo long", folder=tmp_path)


@pytest.mark.parametrize("letter", ["n", "é"])
def test_r075_the_longest_names_that_are_possible(call: Call, world: World, tmp_path: Path, letter: str) -> None:
    """Hidden folders of the work have a name of their own length, which is no hindrance."""
    width = len(letter.encode())
    folder, file = tmp_path / (letter * (255 // width)), tmp_path / (letter * (233 // width))
    run(call, "merge", world.base, world.adapter, "-o", folder)
    assert len(list(folder.glob("*.safetensors"))) == 2
    single = file.with_name(file.name + ".safetensors")
    run(call, "merge", world.file, world.adapter, "-o", single)
    run(call, "unmerge", single, world.adapter, "-o", tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == world.file.read_bytes()
