"""The receipt beside an output: what it was made of. It has no clock and no path of any machine."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_cli.adapters.wrap_file import WRAP_FILE
from lora_cli.checkpoint.checkpoint import Checkpoint, read_config
from lora_cli.checkpoint.leftovers import leftovers
from lora_cli.checkpoint.links import is_there
from lora_cli.checkpoint.sidefiles import SIDE_FILE_LIMIT, SideFile, lies_inside
from lora_cli.checkpoint.source import Looks, SourceFile, as_text, listing
from lora_cli.checkpoint.staged import ASIDE
from lora_cli.checkpoint.staging import OUTPUT
from lora_cli.checkpoint.undo_file import UNDO_FILE
from lora_cli.errors import ChangedFileError, LoraCliError, MalformedFileError, WriteError
from lora_cli.version import __version__

SCHEMA = "lora-cli/receipt/1"


def beside(out: Path, name: str) -> Path:
    """Where a file of ours is: in the output's folder, or beside an output of one file as `STEM.NAME`."""
    return out.with_name(f"{out.stem}.{name}") if out.suffix == ".safetensors" else out / name


def receipt_path(out: Path, operation: str) -> Path:
    """Where the receipt of an output is."""
    return beside(out, f"lora_{operation}.json")


OWN_FILES = ("lora_inject.json", "lora_merge.json", UNDO_FILE, WRAP_FILE)
"""Files of ours that say what a checkpoint is, and come back with it when a merge is undone."""


def own_files(checkpoint: Checkpoint) -> dict[str, SourceFile]:
    """The files of ours that are with a checkpoint and can come back with it, by their names in a folder."""
    places, looks = {name: beside(checkpoint.path, name) for name in OWN_FILES}, checkpoint.looks
    there = (name for name, place in places.items() if place in looks or place.is_file())
    seen = {name: looks.at(places[name]) for name in there if lies_inside(checkpoint, places[name])}
    return {name: source for name, source in seen.items() if name == UNDO_FILE or source.size <= SIDE_FILE_LIMIT}


def make_receipt(
    out: Path, operation: str, content: Mapping[str, Any], files: Mapping[str, int], others: Collection[str] = ()
) -> SideFile:
    """Return the receipt of an output as a file to be written last.

    Args:
        out: The output.
        operation: Name of the command.
        content: What it was made of.
        files: Name → size of every other file of the output.
        others: Names of files whose size is not the same on every machine: what zstd makes depends on its version.
    """
    name = receipt_path(out, operation).name
    document = {
        "schema": SCHEMA,
        "operation": operation,
        "tool": {"name": "lora-cli", "version": __version__},
        **content,
        "files": sorted([*files, *others, name]),
        "bytes": dict(files),
    }
    data = json.dumps(_readable(document), indent=2, sort_keys=True, ensure_ascii=True, allow_nan=False) + "\n"
    return SideFile(name, None, len(data), data.encode())


def _readable(value: Any) -> Any:
    """The same, so that every reader of JSON takes it: with names as text."""
    if isinstance(value, Mapping):
        return {as_text(name): _readable(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_readable(inner) for inner in value]
    return as_text(value) if isinstance(value, str) else value


OPERATIONS = ("merge", "unmerge", "inject")
"""Commands that leave a receipt."""


def find_receipt(path: Path, looks: Looks | None = None) -> Mapping[str, Any] | None:
    """Read the receipt of a checkpoint or adapter that lora-cli wrote, or None.

    A file in the folder of an output has that folder's receipt, if it lists the file.

    Raises:
        ChangedFileError: It is not what was seen of it before.
        LoraCliError: It is a link that leads nowhere or out of its folder.
    """
    looks = looks or Looks()
    places = [receipt_path(path, operation) for operation in OPERATIONS]
    place = next((place for place in places if place in looks or is_there(place)), None)
    if place is not None:
        return _read_receipt(place, looks)
    if path.suffix != ".safetensors":
        return None
    around = find_receipt(path.parent, looks)
    files = around.get("files") if around else None
    return around if isinstance(files, list) and path.name in files else None


def ours_beside(out: Path) -> list[str]:
    """Names of the small files beside an output of one file that are ours: receipts, and what these list."""
    places = [receipt_path(out, operation) for operation in OPERATIONS]
    with _read_at(out):
        found = {place.name: _read_receipt(place) for place in places if place.is_file()}
        cut_off = _cut_off(out, leftovers(out))
    receipts = {name: said for name, said in found.items() if said is not None}
    lists = [said.get("files") for said in [*receipts.values(), *cut_off]]
    listed = {str(name) for names in lists if isinstance(names, list) for name in names}
    ours = {*receipts, *listed.intersection(beside(out, name).name for name in OWN_FILES)}
    return sorted(name for name in ours if out.with_name(name).exists())


def _cut_off(out: Path, folders: Iterable[Path]) -> list[Mapping[str, Any]]:
    """Receipts in what runs left that were cut off while they put an output of one file in its place, part by part.

    There is the one that was to come last, or the one that it took the place of.
    """
    if out.suffix != ".safetensors":
        return []
    names = [receipt_path(out, operation).name for operation in OPERATIONS]
    places = [folder / OUTPUT / f"{name}{suffix}" for folder in folders for name in names for suffix in ("", ASIDE)]
    found = [_read_receipt(place) for place in places if place.is_file() and not place.is_symlink()]
    return [said for said in found if said is not None]


def _read_receipt(place: Path, looks: Looks | None = None) -> Mapping[str, Any] | None:
    try:
        document = read_config((looks or Looks()).at(place))
    except ChangedFileError:
        raise
    except LoraCliError as error:
        if isinstance(error, MalformedFileError) and isinstance(error.__cause__, OSError):
            raise  # what cannot be read is not what is not there
        return None
    return document if document.get("schema") == SCHEMA else None


@contextmanager
def _read_at(out: Path) -> Iterator[None]:
    """Within it what stands at an output is read, which is no input."""
    try:
        yield
    except MalformedFileError as error:
        why = f"{error.message} ({error.file})"
        raise WriteError("What stands at the output cannot be read", file=out, found=why) from error


def written_by_us(out: Path) -> Callable[[], bool]:
    """Return a check that `out` holds nothing but what a receipt lists: the only thing that `--force` replaces."""
    left = leftovers(out)  # before this run makes a folder of its own there

    def check() -> bool:
        places = (receipt_path(out, operation) for operation in OPERATIONS)
        with _read_at(out):
            receipts = [said for place in places if place.is_file() and (said := _read_receipt(place))]
            # What was unmerged once may hold the receipt of an earlier merge besides its own.
            return any(_lists_all(out, said) for said in [*receipts, *_cut_off(out, left)])

    return check


def _length(path: Path) -> int:
    """Length of a file; -1 if there is none, or cannot be."""
    try:
        return path.stat().st_size if path.is_file() else -1
    except OSError:
        return -1


def _lists_all(out: Path, receipt: Mapping[str, Any]) -> bool:
    files, sizes = receipt.get("files"), receipt.get("bytes")
    if not isinstance(files, list) or not isinstance(sizes, dict):
        return False
    listed = {str(name) for name in files}
    root = out if out.is_dir() else out.parent
    # A file of another size is somebody's own work under one of our names.
    if any(_length(root / name) not in (-1, size) for name, size in sizes.items()):
        return False
    # What has no size there could be anybody's: none but the receipts themselves and the undo file.
    own = {beside(out, UNDO_FILE).name, *(receipt_path(out, operation).name for operation in OPERATIONS)}
    listed &= sizes.keys() | own
    if not out.is_dir():
        return out.name in listed
    folders = {parent.as_posix() for name in listed for parent in Path(name).parents}
    present = {path: path.relative_to(out).as_posix() for path in listing(out, below=True)}
    # A link to a folder is somebody's link, not a folder of ours.
    return all(
        name in (folders if path.is_dir() and not path.is_symlink() else listed) for path, name in present.items()
    )
