"""Files as they are before a job, and after it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

CHUNK = 8 << 20
WARM_SHARE = 0.75
"""Inputs larger than this share of the memory are not read ahead: their beginning would be gone at the end."""


def warm(folders: Iterable[Path]) -> None:
    """Read files into the page cache, if they fit there."""
    files = [file for folder in folders for file in folder.iterdir() if file.is_file()]
    if sum(file.stat().st_size for file in files) > WARM_SHARE * memory():
        return
    buffer = bytearray(CHUNK)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def memory() -> int:
    """Bytes of memory that the machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def weights(folder: Path) -> dict[str, Path]:
    """Name → weight file of a checkpoint."""
    return {path.name: path for path in folder.glob("*.safetensors")}


def same_weights(one: Path, other: Path) -> bool:
    """Say whether two checkpoints have the same weight files, byte for byte."""
    ours, theirs = weights(one), weights(other)
    return bool(ours) and ours.keys() == theirs.keys() and all(same(ours[name], theirs[name]) for name in ours)


def same(one: Path, other: Path) -> bool:
    """Compare two files, in large pieces."""
    if one.stat().st_size != other.stat().st_size:
        return False
    with one.open("rb") as ours, other.open("rb") as theirs:
        return all(piece == theirs.read(CHUNK) for piece in iter(lambda: ours.read(CHUNK), b""))
