"""The receipt beside an output: what it was made of. It has no clock and no path of any machine."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lora_cli.checkpoint.checkpoint import read_config
from lora_cli.checkpoint.sidefiles import SideFile
from lora_cli.errors import LoraCliError
from lora_cli.version import __version__

SCHEMA = "lora-cli/receipt/1"


def receipt_path(out: Path, operation: str) -> Path:
    """Where the receipt of an output is: in its folder, or beside its file as `NAME.lora_OPERATION.json`."""
    if out.suffix == ".safetensors":
        return out.with_name(f"{out.stem}.lora_{operation}.json")
    return out / f"lora_{operation}.json"


def make_receipt(out: Path, operation: str, content: Mapping[str, Any], files: Mapping[str, int]) -> SideFile:
    """Return the receipt of an output as a file to be written last.

    Args:
        out: The output.
        operation: Name of the command.
        content: What it was made of.
        files: Name → size of every other file of the output.
    """
    name = receipt_path(out, operation).name
    document = {
        "schema": SCHEMA,
        "operation": operation,
        "tool": {"name": "lora-cli", "version": __version__},
        **content,
        "files": sorted([*files, name]),
        "bytes": dict(files),
    }
    data = (json.dumps(document, indent=2, sort_keys=True, ensure_ascii=True, allow_nan=False) + "\n").encode()
    return SideFile(name, None, len(data), data)


OPERATIONS = ("merge", "unmerge", "inject")
"""Commands that leave a receipt."""


def find_receipt(path: Path) -> Mapping[str, Any] | None:
    """Read the receipt of a checkpoint or adapter that lora-cli wrote, or None."""
    places = (receipt_path(path, operation) for operation in OPERATIONS)
    place = next((place for place in places if place.is_file()), None)
    return None if place is None else _read_receipt(place)


def other_receipts(out: Path, operation: str) -> list[str]:
    """Names of the receipts that other commands than `operation` left beside an output of one file."""
    places = [receipt_path(out, other) for other in OPERATIONS if other != operation]
    return [place.name for place in places if place.is_file() and _read_receipt(place) is not None]


def _read_receipt(place: Path) -> Mapping[str, Any] | None:
    try:
        document = read_config(place)
    except LoraCliError:
        return None
    return document if document.get("schema") == SCHEMA else None


def written_by_us(out: Path) -> Callable[[], bool]:
    """Return a check that `out` holds nothing but what a receipt lists: the only thing that `--force` replaces."""

    def check() -> bool:
        receipt = find_receipt(out)
        files = receipt.get("files") if receipt else None
        if not isinstance(files, list):
            return False
        sizes = receipt.get("bytes") if receipt else None
        listed = {str(name) for name in files}
        if not isinstance(sizes, dict):
            return False
        root = out if out.is_dir() else out.parent
        # A file of another size is somebody's own work under one of our names.
        if any((root / name).is_file() and (root / name).stat().st_size != size for name, size in sizes.items()):
            return False
        if not out.is_dir():
            return out.name in listed
        folders = {parent.as_posix() for name in listed for parent in Path(name).parents}
        present = {path: path.relative_to(out).as_posix() for path in out.rglob("*")}
        # A link to a folder is somebody's link, not a folder of ours.
        return all(
            name in (folders if path.is_dir() and not path.is_symlink() else listed) for path, name in present.items()
        )

    return check
