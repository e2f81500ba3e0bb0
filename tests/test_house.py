"""The house rules that a machine can check: who may import whom, who may print, and what is public."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import lora_cli
from lora_cli import errors
from lora_cli.arithmetic.rounding import MERGEABLE as TORCH_MERGEABLE
from lora_cli.checkpoint.dtypes import DTYPES
from lora_cli.surgery.edit import MERGEABLE

PACKAGE = Path(lora_cli.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
FLOORS = {"arithmetic": 0, "checkpoint": 1, "adapters": 2, "surgery": 3, "cli": 4, "nn": 4}
"""From the ground up; files that stand on no floor may be imported from all."""


def floor_of(module: str) -> int:
    """The floor that `lora_cli.x.y` is on; -1 for the ground."""
    return FLOORS.get(room_of(module), -1)


def room_of(module: str) -> str:
    """The room that `lora_cli.x.y` is in: x."""
    return module.split(".")[1] if "." in module else ""


def imports_of(file: Path) -> list[str]:
    tree = ast.parse(file.read_text("utf-8"))
    found = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    return found + [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]


def name_of(file: Path) -> str:
    return ".".join(("lora_cli", *file.relative_to(PACKAGE).with_suffix("").parts))


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_a_room_imports_only_from_floors_below_or_its_own(file: Path) -> None:
    own = floor_of(name_of(file))
    above = [name for name in imports_of(file) if name.startswith("lora_cli") and floor_of(name) > own]
    assert not above or file.name in ("__init__.py", "__main__.py")


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_rooms_of_one_floor_do_not_know_each_other(file: Path) -> None:
    own = room_of(name_of(file))
    beside = {room for room, floor in FLOORS.items() if floor == FLOORS.get(own) and room != own}
    assert not [name for name in imports_of(file) if name.startswith("lora_cli") and room_of(name) in beside]


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_only_the_command_line_prints(file: Path) -> None:
    if room_of(name_of(file)) == "cli":
        return
    names = imports_of(file)
    assert (
        not [name for name in names if name.split(".")[0] in ("typer", "rich", "click")] or file.name == "__main__.py"
    )
    calls = [node.func for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.Call)]
    assert not [call for call in calls if isinstance(call, ast.Name) and call.id == "print"]


SYSTEM = """open read write pread preadv pwrite pwritev readv writev truncate ftruncate fsync fdatasync sendfile
posix_fallocate copy_file_range rename renames replace link symlink unlink remove rmdir removedirs mkdir makedirs
scandir listdir fstat stat lstat chmod fchmod chown utime statvfs mkfifo walk"""
PATHS = """read_text read_bytes write_text write_bytes touch mkdir rmdir unlink hardlink_to symlink_to iterdir glob
rglob chmod"""
APART = {
    "lora_cli.checkpoint.files": "it is the place",
    "lora_cli.checkpoint.advice": "what the system says of its own memory is no file of anybody's",
    "lora_cli.surgery.results": "likewise",
    "lora_cli.cli.app": "stdout and stderr, where they were closed",
    "lora_cli.cli.room": "likewise",
    "lora_cli.__main__": "stderr, where nothing else can be loaded",
}


def file_calls_of(file: Path) -> list[str]:
    """What opens, lists, changes or removes files, but for data of the package itself."""
    tree = ast.parse(file.read_text("utf-8"))
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    methods = [func for func in calls if isinstance(func, ast.Attribute)]
    found = [f"os.{func.attr}" for func in methods if ast.unparse(func.value) == "os" and func.attr in SYSTEM.split()]
    found += [
        f".{func.attr}" for func in methods if func.attr in PATHS.split() and "resources" not in ast.unparse(func)
    ]
    found += ["open" for func in calls if isinstance(func, ast.Name) and func.id == "open"]
    return found + [name for name in imports_of(file) if name in ("shutil", "tempfile", "fcntl", "glob")]


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_files_are_touched_in_one_place(file: Path) -> None:
    """What a test lets fail call by call (tests/reliability) is all that there is."""
    assert not file_calls_of(file) or name_of(file) in APART


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_files_stay_small(file: Path) -> None:
    assert len(file.read_text("utf-8").splitlines()) <= 400


def test_floors_below_the_engine_load_without_torch() -> None:
    """Checked on the text: what must not load torch does not import it at its top."""
    for file in FILES:
        top = [
            node for node in ast.parse(file.read_text("utf-8")).body if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        names = [getattr(node, "module", None) or node.names[0].name for node in top]
        if room_of(name_of(file)) in ("checkpoint", "adapters", "cli") or file.parent == PACKAGE:
            assert not [name for name in names if name.split(".")[0] in ("torch", "transformers")], file


def test_public_names_are_sorted_and_there() -> None:
    names = [name for name in lora_cli.__all__ if not name.startswith("__")]
    assert names == sorted(names)
    for name in lora_cli.__all__:
        member = getattr(lora_cli, name)
        assert name == "__version__" or member.__doc__
    assert set(lora_cli.__all__) <= set(dir(lora_cli))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        lora_cli.nothing  # noqa: B018


def test_both_lists_of_types_that_take_a_delta_agree() -> None:
    assert {getattr(torch, str(DTYPES[name].torch_name)) for name in MERGEABLE} == set(TORCH_MERGEABLE)


def test_every_error_has_its_own_code() -> None:
    classes = errors.LoraCliError.__subclasses__()
    assert len({kind.code for kind in classes}) == len(classes)
    codes = [kind.exit_code for kind in classes if kind is not errors.Interrupted]
    assert len(set(codes)) == len(codes)
    assert not {0, 1} & set(codes)
    assert [errors.Interrupted(number).exit_code for number in (1, 2, 15)] == [129, 130, 143]
