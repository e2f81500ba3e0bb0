"""How every entry of the catalogue of bad inputs is tried: on the program, with all that a refusal promises.

The catalogue and its numbers (R001 to R178) are listed in docs/reliability.md.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from cli_world import Call, Ran

LINES = 4
"""Lines that an error takes at most, besides those that list all that is wrong."""

Entry = tuple[int, str, int, int]


def entries(folder: Path) -> dict[str, Entry]:
    """Every path below a folder: mode, where it points if it is a link, length, time of its last change."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        target = str(path.readlink()) if path.is_symlink() else ""
        found[path.relative_to(folder).as_posix()] = (status.st_mode, target, status.st_size, status.st_mtime_ns)
    return found


def check_refused(
    call: Call, line: Sequence[object], exit_code: int, words: str, *, folder: Path, inputs: Sequence[Path] = ()
) -> Ran:
    """Run a command line that must be refused, for people and as JSON, and check everything that a refusal promises.

    Args:
        call: Runs the program.
        line: Its arguments.
        exit_code: The code it must end with.
        words: What the text must say, in pieces separated by bars; what is to be found in a message of one's own.
        folder: Where the case was built and the output would go: nothing in it may change, appear or be left.
        inputs: Other folders that may not change.

    Returns:
        The run for people.
    """
    places = [folder, *inputs]
    before = [entries(place) for place in places]
    ran = call(*line)
    said = ran.err
    assert ran.code == exit_code, f"exit {ran.code}, not {exit_code}: {said}"
    assert not ran.out
    assert "Traceback" not in said
    assert "Internal error" not in said
    errors = said[said.index("error: ") :]
    assert len([row for row in errors.splitlines() if not row.startswith(("  - ", "  … "))]) <= LINES, errors
    assert not re.search(r"[^\n\x20-\x7e\u00a0-\u200a\u2010-\u2027\u2030-\ud7ff\uf900-\uffff]", said), repr(said)
    plain = re.sub(r"\s+", " ", said)
    assert all(word in plain for word in words.split("|")), f"{words} not in: {said}"
    document = call(*line, "--json").document
    assert (document["schema"], document["exit"]) == ("lora-cli/error/1", exit_code)
    assert document["message"]
    assert document["hint"]
    assert [entries(place) for place in places] == before, "something was left, or an input was touched"
    return ran
