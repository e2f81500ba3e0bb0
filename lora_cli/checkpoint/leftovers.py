"""What runs that were killed left beside their outputs: staging folders, which nobody cleans up but the next run.

They have a recognisable name (`staged.hidden_name`), lock nobody out, and are never taken away unasked: a finished
shard may be hours of work.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path

from lora_cli.checkpoint import files
from lora_cli.checkpoint.staged import hidden_name
from lora_cli.errors import LoraCliError

_MARK = re.compile(r"[0-9a-f]{12}(-old)?")


def leftovers(target: Path, *, but: Iterable[str] = ()) -> list[Path]:
    """Staging folders of a target, made by this user and lying in its folder, by name.

    Args:
        target: The output.
        but: Names of those that are in use.
    """
    start = hidden_name(target.name, "")
    found = []
    with contextlib.suppress(OSError):  # a folder that cannot be listed shows nothing
        for path in files.listed(target.parent):
            mark = path.name.removeprefix(start) if path.name.startswith(start) else ""
            if _MARK.fullmatch(mark) and path.name not in but and _is_ours(path):
                found.append(path)
    return found


def bytes_in(folder: Path) -> int:
    """Bytes of the files in a folder, as far as they can be seen."""
    with contextlib.suppress(OSError):
        found = [path.lstat() for path in files.listed_below(folder)]
        return sum(status.st_size for status in found if stat.S_ISREG(status.st_mode))
    return 0


def with_leftovers(error: LoraCliError, target: Path, *, but: Iterable[str] = ()) -> None:
    """Let an error about space say which leftovers take some."""
    found = leftovers(target, but=but)
    if found:
        names = ", ".join(f"{path} ({bytes_in(path):,} bytes)" for path in found)
        error.hint = f"free some space: {names} is what a run that was cut off has left"


def _is_ours(path: Path) -> bool:
    """Whether it is a folder, no link, and this user's own: in a folder that many write to, others' are not trusted."""
    status = path.lstat()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
