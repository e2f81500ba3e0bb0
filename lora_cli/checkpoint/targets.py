"""Where outputs may go: nowhere that anything stands which lora-cli did not write, and never into an input."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from lora_cli.checkpoint import files
from lora_cli.checkpoint.source import check_path
from lora_cli.checkpoint.staged import write_errors
from lora_cli.errors import DiskFullError, OutputExistsError, UsageError


def check_target(target: Path, *, folder: bool, may_replace: Callable[[], bool]) -> None:
    """Refuse a target that cannot be written, or that holds anything that lora-cli did not write.

    Raises:
        UsageError: Its folder does not exist.
        OutputExistsError: Something is there.
        WriteError: Nobody may look there.
    """
    if target.name in ("", ".."):
        raise OutputExistsError("The output has no name of its own", file=target, hint="name a folder in it with -o")
    with write_errors(str(target)):
        _check_target(target, folder=folder, may_replace=may_replace)


def _check_target(target: Path, *, folder: bool, may_replace: Callable[[], bool]) -> None:
    if not target.parent.is_dir():
        raise UsageError("The folder of the output does not exist", file=target.parent, hint="make it first")
    if target.is_symlink():
        raise OutputExistsError("The output is a symbolic link", file=target, hint="name the place it points to")
    if target.is_mount():
        raise OutputExistsError(
            "The output is a mount point, which nothing can take the place of", file=target, hint="name a folder in it"
        )
    if not target.exists() or (folder and target.is_dir() and not files.listed(target)):
        return
    if folder != target.is_dir():
        kind = "file" if folder else "folder"
        raise OutputExistsError(f"A {kind} stands where the output should go", file=target)
    if not may_replace():
        raise OutputExistsError(
            "The output exists already",
            file=target,
            hint="choose another name with -o; --force replaces only what lora-cli wrote",
        )


def check_apart(target: Path, inputs: Iterable[Path]) -> None:
    """Refuse an output that is an input, lies inside one, or would swallow one.

    Raises:
        UsageError: No file can have this name.
        OutputExistsError: Output and input are the same place, by device and inode or by path.
        WriteError: Nobody may look there.
    """
    check_path(target)
    with write_errors(str(target)):
        try:
            around = _places(target.resolve())
        except RuntimeError as error:
            raise OutputExistsError("The output is a symbolic link that leads to itself", file=target) from error
        for path in inputs:
            others = _places(path.resolve())
            if around[0] & set().union(*others) or others[0] & set().union(*around):
                raise OutputExistsError(
                    "The output would be written into an input",
                    file=target,
                    found=f"input {path}",
                    hint="choose a place outside the inputs with -o",
                )


def _places(path: Path) -> list[set[object]]:
    """What a place and each folder around it are known by: paths, and inodes, which may be mounted elsewhere too."""
    found: list[set[object]] = []
    for place in (path, *path.parents):
        found.append({place})
        if place.exists():
            status = place.stat()
            found[-1].add((status.st_dev, status.st_ino))
    return found


def check_space(target: Path, needed: int) -> None:
    """Refuse when the file system of `target` has less than `needed` bytes free.

    Raises:
        DiskFullError: With what is needed and what is free.
    """
    free = free_bytes(target)
    if free < needed:
        raise DiskFullError(
            "Not enough free space for the output",
            file=target.parent,
            expected=f"{needed} bytes",
            found=f"{free} bytes free",
            hint="free some space or choose another disk with -o",
        )


def free_bytes(target: Path) -> int:
    """Bytes free for this user where `target` will be."""
    with write_errors(target.name):
        return files.free_bytes(target.parent if target.parent.exists() else Path.cwd())
