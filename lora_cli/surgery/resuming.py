"""Going on with a run that was cut off: its finished files are taken over, once they are checked.

A file is taken over if the run was asked for the same, of inputs that did not change, and if its bytes have the digest
that the journal says. What the taps had found in it comes from the journal too, so that the result is byte for byte
that of a run that was never cut off.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from lora_cli.adapters.formula import Formula
from lora_cli.adapters.source import CONFIG_FILE
from lora_cli.arithmetic import ARITHMETIC
from lora_cli.checkpoint.checkpoint import open_shard
from lora_cli.checkpoint.digests import bytes_digest, shard_digest
from lora_cli.checkpoint.journal import Finished, read_journal
from lora_cli.checkpoint.leftovers import bytes_in, leftovers
from lora_cli.checkpoint.source import as_text, listing
from lora_cli.checkpoint.staged import Scratch
from lora_cli.checkpoint.staging import Staging
from lora_cli.errors import LoraCliError, UnsupportedError, WrongInputError
from lora_cli.progress import Progress
from lora_cli.surgery.plan import Plan
from lora_cli.surgery.receipt import OPERATIONS, OWN_FILES, beside, receipt_path
from lora_cli.surgery.resumption import Resumption
from lora_cli.version import __version__


@dataclass(frozen=True)
class Request:
    """What a run was asked for, besides its plan.

    Attributes:
        options: All options that decide which bytes are written, by name.
        resume: Go on with a run that was cut off, and leave finished files to the next if this one is.
        aside: A folder of inputs that the options tell of.
    """

    options: Mapping[str, object] = field(default_factory=dict)
    resume: bool = False
    aside: Path | None = None


def options_of(options: object) -> dict[str, object]:
    """The fields of a dataclass of options, and of those in it, by name."""
    assert dataclasses.is_dataclass(options)  # noqa: S101 (who calls knows)
    found: dict[str, object] = {}
    for one in dataclasses.fields(options):
        value = getattr(options, one.name)
        found |= options_of(value) if dataclasses.is_dataclass(value) else {one.name: value}
    return found


def facts_of(plan: Plan, request: Request) -> dict[str, str]:
    """Everything that decides what a run writes, each by the name that a person knows it by."""
    facts = {
        "the version of lora-cli": f"{__version__}, arithmetic {ARITHMETIC}",
        "the command": plan.operation,
        **{f"the option {name}": repr(value) for name, value in request.options.items()},
        **{f"the planned {file.name}": bytes_digest(file.header.prefix) for file in plan.files},
    }
    inputs = [path for path in plan.inputs if request.aside not in path.parents]
    facts["the order of the inputs"] = as_text(", ".join(str(path.absolute()) for path in inputs))
    for path in inputs:
        facts |= {f"the input {as_text(str(file.absolute()))}": _identity(file) for file in _files_of(path)}
    return facts


def _files_of(path: Path) -> Iterator[Path]:
    """The files that are read where an input is: all of a folder, or a file and what tells of it beside it."""
    if path.is_dir():
        yield from (file for file in listing(path, below=True) if file.is_file())
        return
    ours = [beside(path, name) for name in OWN_FILES] + [receipt_path(path, name) for name in OPERATIONS]
    names = {path, path.with_name(CONFIG_FILE), path.with_name("config.json"), *ours}
    yield from sorted(file for file in names if file.is_file())


def _identity(path: Path) -> str:
    """What changes when a file does; the time of the last change of its entry cannot be set back by anybody."""
    status = path.stat()
    return f"{status.st_size} bytes, inode {status.st_ino}, {status.st_mtime_ns}, {status.st_ctime_ns}"


def prepare(staging: Staging, plan: Plan, request: Request | None, progress: Progress) -> Resumption:
    """Begin a run anew, or where another was cut off; and let others go on with this one, file by file.

    Raises:
        WrongInputError: Only runs of other requests were cut off here.
        UnsupportedError: A run was, and nobody can know whether it still goes on.
    """
    if request and _differs_by_machine(plan):
        if request.resume:
            progress.note("--resume: another machine may compute these changes otherwise, so this run begins anew")
        request = None
    facts = facts_of(plan, request) if request else {}
    left = _left_by_the_same(staging, facts) if request and request.resume else None
    if left is None and request and request.resume:
        progress.note("--resume: nothing here can be gone on with, so this run begins anew")
    finished = _take_over(staging, plan, *left, progress) if left else {}
    _tell_of_leftovers(staging, facts, progress)
    if request is None or len(plan.files) == 1:
        return Resumption(finished)  # a file that is alone is not finished before all is
    journal = staging.journal(facts, finished.values(), keep=request.resume)
    if left:
        gathered = {span.file for one in finished.values() for span in one.spans}
        staging.clean({one.name for one in finished.values()}, gathered=gathered)
    return Resumption(finished, journal, read_back=request.resume)


def _differs_by_machine(plan: Plan) -> bool:
    """Whether libraries compute a part of it, so that files of two runs may be no whole."""
    deltas = (term.delta for edit in plan.edits for term in edit.terms)
    return any(isinstance(delta, Formula) and not delta.method.exact for delta in deltas)


def _left_by_the_same(staging: Staging, facts: Mapping[str, str]) -> tuple[Path, list[Finished]] | None:
    """What a run of the same request has left, and which of its files it had noted."""
    found = [(path, *read) for path in leftovers(staging.target, but=[staging.name]) if (read := read_journal(path))]
    same = [(path, finished) for path, begun, finished in found if begun.facts == facts]
    if found and not same:
        path, begun, _ = found[0]
        raise WrongInputError(
            "The run that was cut off was another one",
            file=path,
            details=_differences(begun.facts, facts),
            hint=f"run without --resume to begin anew, and remove {path}",
        )
    if same and not staging.locked:
        raise UnsupportedError(
            "This file system has no locks, so nobody can know whether the other run still goes on",
            file=same[0][0],
            hint=f"run without --resume to begin anew, and remove {same[0][0]} if nobody writes there",
        )
    return max(same, key=lambda one: len(one[1]), default=None)


def _take_over(
    staging: Staging, plan: Plan, path: Path, finished: Sequence[Finished], progress: Progress
) -> dict[int, Finished]:
    """Take over what a run has left, and return the files that are what it says, by their place in the plan."""
    numbers = {file.name: number for number, file in enumerate(plan.files)}
    progress.note(f"checking {_files(len(finished))} in {path}")
    staging.take_over(path.name, len(finished))
    scratch = staging.scratch()
    return {
        number: one
        for one in finished
        if (number := numbers.get(one.name)) is not None
        and _holds(partial(_is_right, staging.place / one.name, plan, number, one))
        and _holds(partial(_is_sealed, scratch, one))
    }


def _is_right(path: Path, plan: Plan, number: int, one: Finished) -> bool:
    """Whether a file is what was planned, and has the digest that the journal says."""
    shard = open_shard(path)
    as_planned = not path.is_symlink() and shard.header.raw == plan.files[number].header.raw
    return as_planned and shard_digest(shard) == one.digest


def _is_sealed(scratch: Scratch, one: Finished) -> bool:
    """Whether what was gathered of a file is there."""
    return not one.spans or scratch.seal(one.spans) == one.seal


def _holds(check: Callable[[], bool]) -> bool:
    """Whether a check holds. Where the disk cannot be read nothing is known, and nothing is to be thrown away."""
    try:
        return check()
    except LoraCliError as error:
        if isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, FileNotFoundError):
            raise
        return False


def _differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    words = [f"{name} is not what it was" for name in now if name in before and before[name] != now[name]]
    words += [f"{name} is new" for name in now if name not in before]
    return words + [f"{name} is gone" for name in before if name not in now]


@contextlib.contextmanager
def told_of_kept(staging: Staging, progress: Progress) -> Iterator[None]:
    """If the run ends in it, say what of it stays for another."""
    try:
        yield
    except BaseException:
        if staging.kept:
            stay = "stays" if staging.kept == 1 else "stay"
            progress.note(
                f"{_files(staging.kept)} {stay} in {staging.place.parent}: --resume goes on from there, or remove it"
            )
        raise


def _tell_of_leftovers(staging: Staging, facts: Mapping[str, str], progress: Progress) -> None:
    """Warn of what runs left that were cut off: it takes space, and may be gone on from."""
    for path in leftovers(staging.target, but=[staging.name]):
        left = read_journal(path)
        what = f"a run that was cut off left {path} ({bytes_in(path):,} bytes)"
        if left and left[0].facts == facts:
            what += f" with {_files(len(left[1]))}: --resume goes on from there, or it can be removed"
        else:
            what += ": it can be removed"
        progress.warn(what)


def _files(count: int) -> str:
    return f"{count} finished {'file' if count == 1 else 'files'}"
