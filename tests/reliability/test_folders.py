"""R054 to R066 and R076 to R080: folders that are no checkpoint, and those about which something is odd."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from catalogue import check_refused, entries
from cli_world import Call, World, call_fixture, world_fixture  # noqa: F401 (fixtures)
from folder_cases import INDEX, ONE, PAGE, POINTER, REFUSED, TWO, Build, sharded, single, sparse
from tiny import base_tensors, read_tensors, write_base, write_json

from lora_cli.checkpoint.index import INDEX_LIMIT
from lora_cli.checkpoint.sidefiles import SIDE_FILE_LIMIT
from lora_cli.errors import LoraCliError

LINES = {"inspect": "inspect {x}", "merge": "merge {x} {adapter} -o {out}"}
SAMPLES = (
    "R054: '../x.safetensors'",
    "R057 all missing shards",
    "R059 in two shards",
    "R062 {}",
    "R066 index too long",
)
PLACES = {
    "verify": "verify {x} --base {base} --adapter {adapter}",
    "verify against": "verify {merged} --base {x} --adapter {adapter}",
    "diff": "diff {base} {x}",
    "inject": "inject {x} -o {out} --rank 2",
    "unmerge": "unmerge {x} {adapter} --approximate -o {out}",
    "inspect against": "inspect {adapter} --base {x}",
}


def line(text: str, world: World, folder: Path) -> list[str]:
    return world.fill(tuple(text.replace("{x}", str(folder / "x")).split()), folder)


@pytest.mark.parametrize("where", LINES.values(), ids=LINES.keys())
@pytest.mark.parametrize(("build", "words", "error"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_no_checkpoint(
    call: Call, world: World, tmp_path: Path, build: Build, words: str, error: type[LoraCliError], where: str
) -> None:
    if where == LINES["inspect"] and "base checkpoint first" in words:
        words = "holds no adapter"
    (tmp_path / "x").mkdir()
    build(tmp_path / "x")
    check_refused(call, line(where, world, tmp_path), error.exit_code, words, folder=tmp_path)


@pytest.mark.parametrize("where", PLACES.values(), ids=PLACES.keys())
@pytest.mark.parametrize("name", SAMPLES)
def test_wherever_a_checkpoint_is_read(call: Call, world: World, tmp_path: Path, name: str, where: str) -> None:
    build, words, error = REFUSED[name]
    (tmp_path / "x").mkdir()
    build(tmp_path / "x")
    check_refused(call, line(where, world, tmp_path), error.exit_code, words, folder=tmp_path)


CODES = {
    10: "R037 R057 R058 R061 R062 R064 R066 R069 R071 R079 R080 R122 R123",
    11: "R054 R055 R056 R059 R068 R070 R121",
}
"""What the catalogue says, by exit code."""


def test_codes_are_those_of_the_catalogue() -> None:
    found: dict[int, set[str]] = {code: set() for code in CODES}
    for name, (_, _, error) in REFUSED.items():
        if name.startswith("R"):
            found[error.exit_code].add(name[:4])
    assert found == {code: set(numbers.split()) for code, numbers in CODES.items()}


def test_r066_an_index_of_a_gigabyte_is_never_read(call: Call, world: World, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    sparse(sharded(tmp_path / "x") / INDEX, 1 << 30)
    words = f"{INDEX}|too large|at most {INDEX_LIMIT} bytes|{1 << 30} bytes"
    check_refused(call, line("inspect {x}", world, tmp_path), 10, words, folder=tmp_path)


# ---------------------------------------------------------------------------------------------- odd, and accepted


def odd_base(folder: Path, change: Callable[[dict[str, object]], object]) -> Path:
    base = write_base(folder / "x")
    index = json.loads((base / INDEX).read_text())
    change(index)
    write_json(base / INDEX, index)
    return base


def merged(call: Call, world: World, folder: Path) -> Path:
    """The odd base merged, verified and unmerged again to the byte."""
    ran = call("merge", folder / "x", world.adapter, "-o", folder / "out")
    assert ran.code == 0, ran.err
    line_ = ["verify", folder / "out", "--base", folder / "x", "--adapter", world.adapter, "--roundtrip"]
    assert call(*line_).code == 0
    assert call("unmerge", folder / "out", world.adapter, "-o", folder / "back").code == 0
    for name in (INDEX, ONE, TWO):
        assert (folder / "back" / name).read_bytes() == (folder / "x" / name).read_bytes()
    return folder / "out"


def test_r060_a_tensor_that_the_index_does_not_list_is_kept(call: Call, world: World, tmp_path: Path) -> None:
    base = odd_base(tmp_path, lambda index: index["weight_map"].pop("lm_head.weight"))  # type: ignore[attr-defined]
    assert "does not list 1 tensors" in call("inspect", base).err
    out = merged(call, world, tmp_path)
    assert read_tensors(out)["lm_head.weight"].tobytes() == base_tensors()["lm_head.weight"].tobytes()
    assert read_tensors(out).keys() == base_tensors().keys()


@pytest.mark.parametrize("metadata", [{"total_size": 1}, {"total_size": "all"}, {"total_size": None}, {}, [], None])
def test_r063_a_wrong_total_size_is_said_and_every_byte_comes_back(
    call: Call, world: World, tmp_path: Path, metadata: object
) -> None:
    base = odd_base(tmp_path, lambda index: index.update(metadata=metadata))
    claims = isinstance(metadata, dict) and metadata.get("total_size") is not None
    assert ("total_size" in call("inspect", base).err) == claims
    merged(call, world, tmp_path)


def test_r063_the_size_is_counted_anew_where_tensors_change_their_length(
    call: Call, world: World, tmp_path: Path
) -> None:
    base = odd_base(tmp_path, lambda index: index.update(metadata={"total_size": "all", "kept": 1}))
    assert call("merge", base, world.adapter, "-o", tmp_path / "out", "--dtype", "bf16").code == 0
    said = json.loads((tmp_path / "out" / INDEX).read_text())["metadata"]
    floats = sum(tensor.nbytes // 2 for tensor in base_tensors().values() if tensor.dtype.kind == "f")
    assert said == {"total_size": floats + 6 * 8, "kept": 1}


def test_r065_tensors_that_belong_to_nothing_are_told_and_never_used(call: Call, world: World, tmp_path: Path) -> None:
    """What is hidden, as systems and killed runs leave files behind, is not even told."""
    base = odd_base(tmp_path, lambda index: None)
    for name in ("extra.safetensors", "._model.safetensors", ".model.safetensors.index.json"):
        (base / name).write_bytes(b"nobody reads this")
    ran = call("inspect", base)
    assert ran.err.count("not part of the checkpoint, left out: extra.safetensors\n") == 1
    assert "._model" not in ran.err
    out = merged(call, world, tmp_path)
    assert not list(out.glob("*extra*"))
    assert sorted(read_tensors(out)) == sorted(base_tensors())


@pytest.mark.parametrize("name", [".model.safetensors", ".scratch-1.safetensors", "._adapter_model.safetensors"])
def test_r065_a_hidden_file_alone_is_no_checkpoint(call: Call, world: World, tmp_path: Path, name: str) -> None:
    (tmp_path / "x").mkdir()
    shutil.copy(world.file, tmp_path / "x" / name)
    arguments = line("merge {x} {adapter} -o {out}", world, tmp_path)
    check_refused(call, arguments, 2, "no safetensors checkpoint", folder=tmp_path)
    check_refused(call, line("merge {base} {x} -o {out}", world, tmp_path), 2, "holds no adapter", folder=tmp_path)


def test_r076_tensors_alone_are_a_checkpoint(call: Call, world: World, tmp_path: Path) -> None:
    """A folder may have no config, as a bare file has none: what is there is copied, and nothing is made up."""
    base = write_base(tmp_path / "x")
    (base / "config.json").unlink()
    assert call("inspect", base, "--json").document["architecture"] is None
    out = merged(call, world, tmp_path)
    assert not (out / "config.json").exists()
    for shard in (ONE, TWO):
        assert (out / shard).read_bytes() == (world.merged / shard).read_bytes()


def side_links(base: Path) -> set[str]:
    """Side files that are none, each in another way."""
    (base / "tokenizer.json").symlink_to("/etc/passwd")
    (base / "vocab.json").symlink_to("nowhere")
    (base / "merges.txt").symlink_to("merges.txt")
    os.mkfifo(base / "added_tokens.json")
    sparse(base / "tokenizer.model", SIDE_FILE_LIMIT + 1)
    (base / "NOTICE").symlink_to("../outside")
    (base.parent / "outside").write_text("secret")
    return {"tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", "tokenizer.model", "NOTICE"}


def test_r077_side_files_that_are_links_out_pipes_or_huge_are_left_out_by_name(
    call: Call, world: World, tmp_path: Path
) -> None:
    base = odd_base(tmp_path, lambda index: None)
    odd = side_links(base)
    (base / "LICENSE").write_text("a licence")
    (base / "special_tokens_map.json").symlink_to("config.json")
    before = entries(base)
    plan = call("merge", base, world.adapter, "-o", tmp_path / "out", "--dry-run", "--json").document
    assert set(plan["left_out"]) == odd
    out = merged(call, world, tmp_path)
    assert not odd & {path.name for path in out.iterdir()}
    assert (out / "LICENSE").read_text() == "a licence"
    inside = out / "special_tokens_map.json"
    assert not inside.is_symlink()
    assert inside.read_bytes() == (base / "config.json").read_bytes()
    assert entries(base) == before


@pytest.mark.parametrize(
    ("make", "code", "words"),
    [
        pytest.param(lambda path: path.symlink_to("/etc/passwd"), 11, "leads out of its folder", id="R077 link out"),
        pytest.param(lambda path: path.symlink_to("nowhere"), 10, "leads nowhere", id="R069 dangling"),
        pytest.param(os.mkfifo, 11, "Not a regular file", id="R070 pipe"),
        pytest.param(lambda path: path.mkdir(), 10, "A folder stands", id="R071 folder"),
        pytest.param(lambda path: sparse(path, SIDE_FILE_LIMIT + 1), 10, "too large", id="R077 huge"),
    ],
)
def test_a_tokenizer_that_is_none_is_never_taken_from_an_adapter(
    call: Call, world: World, tmp_path: Path, make: Callable[[Path], object], code: int, words: str
) -> None:
    """Refused where it is asked for; passed over where it is not."""
    adapter = tmp_path / "a"
    shutil.copytree(world.adapter, adapter)
    make(adapter / "tokenizer.json")
    arguments = ["merge", world.base, adapter, "-o", tmp_path / "out"]
    check_refused(call, [*arguments, "--tokenizer", "adapter"], code, f"tokenizer.json|{words}", folder=tmp_path)
    ran = call(*arguments)
    assert ran.code == 0
    assert "tokenizer" not in ran.err
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_r078_code_in_a_model_folder_is_copied_said_and_never_run(call: Call, world: World, tmp_path: Path) -> None:
    base = odd_base(tmp_path, lambda index: None)
    write_json(base / "config.json", {"auto_map": {"AutoModel": "modeling_mine.Model"}})
    code = "import pathlib\npathlib.Path(__file__).with_name('was-run').touch()\n"
    for name in ("modeling_mine.py", "__init__.py", "sitecustomize.py"):
        (base / name).write_text(code)
    loaded = set(sys.modules)
    plan = call("merge", base, world.adapter, "-o", tmp_path / "planned", "--dry-run")
    assert "modeling_mine.py" in plan.out
    assert "never run" in plan.out
    out = merged(call, world, tmp_path)
    assert (out / "modeling_mine.py").read_text() == code
    assert not list(tmp_path.rglob("was-run"))
    assert not {name for name in set(sys.modules) - loaded if "mine" in name or name == "sitecustomize"}


SMALL_FILES = {
    "config.json": ("x/config.json", "inspect {x}"),
    "index": (f"x/{INDEX}", "merge {x} {adapter} -o {out}"),
    "adapter_config.json": ("a/adapter_config.json", "merge {base} {a} -o {out}"),
    "factors": ("a/adapter_model.safetensors", "merge {base} {a} -o {out}"),
    "undo": ("m/lora_merge.undo", "unmerge {m} {adapter} -o {out}"),
    "wrap": ("w/lora_wrap.json", "merge {w} -o {out}"),
}


@pytest.mark.parametrize(("file", "where"), SMALL_FILES.values(), ids=SMALL_FILES.keys())
@pytest.mark.parametrize("content", [POINTER, PAGE, b"", b"\0" * 40, b"{"], ids=["R079", "R080", "R001", "NUL", "cut"])
def test_r079_r080_what_stands_in_the_place_of_a_small_file(
    call: Call, world: World, tmp_path: Path, file: str, where: str, content: bytes
) -> None:
    """A Git LFS pointer, an HTML page, nothing, zeros, a cut file: of weights the format is named, all are refused."""
    write_base(tmp_path / "x")
    shutil.copytree(world.adapter, tmp_path / "a")
    shutil.copytree(world.merged, tmp_path / "m")
    arguments = ["inject", world.base, "--rank", "2", "--layout", "wrapped", "-o", tmp_path / "w"]
    assert call(*arguments).code == 0
    path = tmp_path / file
    assert path.exists()
    path.write_bytes(content)
    for name in "xamw":
        where = where.replace(f"{{{name}}}", str(tmp_path / name))
    known = {POINTER: "Git LFS pointer|git lfs pull", PAGE: "a web page"}
    words = known.get(content, "") if path.suffix in (".safetensors", ".undo") else ""
    check_refused(call, line(where, world, tmp_path), 10, f"{path.name}|{words}", folder=tmp_path)


def test_a_single_file_is_opened_as_it_is_named(call: Call, tmp_path: Path) -> None:
    """R064: where two could be meant, the one that is named is taken, whatever lies beside it."""
    (tmp_path / "x").mkdir()
    sharded(tmp_path / "x")
    single(tmp_path / "x")
    assert call("inspect", tmp_path / "x").code == 10
    assert call("inspect", tmp_path / "x" / "model.safetensors").code == 0
