"""Where the files that an undo file speaks of may go: into the output, each to a place of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from lora_cli.checkpoint.checkpoint import PICKLES
from lora_cli.checkpoint.sidefiles import belongs
from lora_cli.checkpoint.undo_file import UndoFile
from lora_cli.errors import MalformedFileError, UnsafeInputError
from lora_cli.surgery.receipt import OWN_FILES, receipt_path

_NAME_BYTES = 256
"""No usual file system takes a name of so many bytes."""


def check_places(undo: UndoFile, *, merged_folder: bool) -> None:
    """Refuse files that would be written to one place, or to places where no base has such a file.

    Args:
        undo: What names them.
        merged_folder: Whether the merged checkpoint is a folder, of which only `.safetensors` files are read; a single
            file may be called otherwise.

    Raises:
        MalformedFileError: There are no files, or two of them have one place.
        UnsafeInputError: A name leads out of the output, or is none of a file that belongs there.
    """
    manifest = undo.manifest
    names = [receipt_path(Path(), "unmerge").name, *(said.name for said in manifest.side_files)]
    names += [said.name for said in manifest.files]
    folders = {parent.as_posix() for name in names for parent in PurePosixPath(name).parents}
    if not manifest.files or len(set(names)) < len(names) or not folders.isdisjoint(names):
        raise damaged(undo, "files, each with a place of its own")
    unsafe = [said.name for said in manifest.side_files if not _is_side_file(said.name)]
    unsafe += [file.name for file in manifest.files if not _is_weights(file.name, alone=not merged_folder)]
    if unsafe:
        raise UnsafeInputError(
            "The undo file names a file that cannot be in its output", file=undo.shard.name, found=repr(unsafe[0])
        )


def _is_side_file(name: str) -> bool:
    """Whether a small file may have this name, at most one folder deep."""
    parts = name.split("/")
    plain = len(parts) <= 2 and not any(part[:1] in ("", ".") or _is_long(part) for part in parts)
    ours = belongs(PurePosixPath(name)) or name in OWN_FILES or name.endswith(".safetensors.index.json")
    return plain and ours and "\\" not in name and name.isprintable()


def _is_weights(name: str, *, alone: bool) -> bool:
    """Whether a base's file of tensors may have this name; one `alone` may have any that means nothing else."""
    plain = name.removeprefix(".")[:1] not in ("", ".") and not _is_long(name) and name.isprintable()
    if not plain or "/" in name or "\\" in name:
        return False
    return name.endswith(".safetensors") or (alone and not _means_something(name))


def _means_something(name: str) -> bool:
    """Whether people or programs take a file of this name for anything but one that somebody just called so."""
    ending = PurePosixPath(name.lower().rstrip(". ")).suffix
    small = belongs(PurePosixPath(name)) or belongs(PurePosixPath(f"x{ending}")) or ending in (*PICKLES, ".undo")
    return small or name.startswith((".", "-")) or name in OWN_FILES


def _is_long(part: str) -> bool:
    return len(part.encode()) >= _NAME_BYTES


def damaged(undo: UndoFile, expected: str, details: Sequence[str] = ()) -> MalformedFileError:
    """The error for an undo file that does not hold what it says."""
    return MalformedFileError(
        "The undo file is damaged, or belongs to another checkpoint",
        file=undo.shard.name,
        expected=expected,
        details=details,
        hint="get the undo file again from where the merged checkpoint came from",
    )
