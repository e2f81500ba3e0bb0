"""Symbolic links in folders that are inputs.

Whoever packed a folder may have put links into it that lead anywhere. What is found there by its name, and not named by
the user, is read only if it really lies in the folder, or in the store of the Hub cache that the folder is part of.
"""

from __future__ import annotations

from pathlib import Path

from lora_cli.errors import MalformedFileError, UnsafeInputError


def is_there(path: Path) -> bool:
    """Whether there is something of this name in its folder.

    Raises:
        MalformedFileError: A link that leads nowhere, or a place that cannot be looked at.
        UnsafeInputError: A link that leads out of the folder.
    """
    check_link(path)
    return path.exists()


def check_link(path: Path) -> None:
    """Refuse a link that leads out of its folder; anything else passes.

    Raises:
        MalformedFileError: It leads nowhere, or cannot be looked at.
        UnsafeInputError: It leads out.
    """
    try:
        if not path.is_symlink():
            return
    except OSError as error:
        why = f"The file cannot be looked at: {error.strerror}"
        raise MalformedFileError(why, file=path.name, hint="check who may read its folder") from error
    try:
        path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise MalformedFileError("A symbolic link leads nowhere", file=path.name) from error
    if not lies_inside(path, path.parent):
        raise UnsafeInputError(
            "A symbolic link leads out of its folder",
            file=path.name,
            hint="name the folder that really holds the files, or copy them",
        )


def lies_inside(path: Path, folder: Path) -> bool:
    """Whether a file that is there really is in a folder, or in the store of the folder's Hub cache."""
    parents = path.resolve().parents
    return any(place in parents for place in (folder.resolve(), *_stores(folder)))


def _stores(folder: Path) -> list[Path]:
    """Where the files of a snapshot in a Hub cache lie: its repository's blobs, and those that repositories share."""
    # CACHE/models--owner--name/snapshots/COMMIT, with links to CACHE/models--owner--name/blobs and CACHE/blobs
    snapshots = folder.resolve().parent
    repository = snapshots.parent
    if snapshots.name != "snapshots" or not repository.name.startswith("models--"):
        return []
    # Not resolved: a store that is itself a link leads out.
    return [repository / "blobs", repository.parent / "blobs"]
