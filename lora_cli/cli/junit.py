"""`--junit`: a verification as JUnit XML, which GitHub, GitLab and Jenkins show beside the tests of a project.

One test for each tensor that an adapter changes or that differs, since those are what people look for, and one for all
the rest: a checkpoint may have 70 000 tensors.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from lora_cli.checkpoint.hub import local_path
from lora_cli.checkpoint.source import check_path, look_at
from lora_cli.checkpoint.staged import write_beside, write_errors
from lora_cli.checkpoint.targets import check_apart
from lora_cli.cli.text import count, number, shown, ulps
from lora_cli.errors import LoraCliError, OutputExistsError, UsageError, WriteError
from lora_cli.version import __version__

if TYPE_CHECKING:
    from lora_cli.surgery.survival import Survival
    from lora_cli.surgery.verify import Difference, RoundTrip, VerifyResult

SUITE = "lora-cli verify"
_BEGINNING = f"<?xml version='1.0' encoding='utf-8'?>\n<testsuites name=\"{SUITE}\"".encode()
"""All that is written here begins so: of other files with tests in them nothing is ours."""

CLASS = "lora-cli.verify"
"""Jenkins shows what stands before the last dot as a package; GitLab shows the whole as the suite."""

REST = "tensors that no adapter changes"
ROUND_TRIP = "round trip"
_NAMED_ONLY = ("missing", "unexpected", "dtype", "shape", "config")
_ELSEWHERE = "choose a place outside the inputs"
_LONGEST = 10_000


class Report:
    """The file that `--junit` names; without a name nothing is written.

    Args:
        path: Where it goes; a report that is there already, or an empty file, is replaced.
        inputs: What users gave as MERGED, BASE and ADAPTER, by those names.

    Raises:
        UsageError: There is no such folder, or it names something that is no file.
        OutputExistsError: It would lie in an input.
        WriteError: Nobody may write there.
    """

    def __init__(self, path: str | None, inputs: Sequence[tuple[str, str]]) -> None:
        self._path = None if path is None else Path(path)
        self._inputs = inputs
        if self._path is not None:
            _check(self._path, [place for _, name in inputs if (place := local_path(name)) is not None])

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """While entered, an error becomes the content of the file, and goes on."""
        try:
            yield
        except Exception as error:
            if self._path is not None:
                with contextlib.suppress(LoraCliError):  # the first error is the one to tell
                    write_beside(self._path, error_document(error, self._inputs))
            raise

    def write(self, result: VerifyResult) -> None:
        """Write the file.

        Raises:
            DiskFullError: There is no space for it.
            WriteError: Anything else.
        """
        if self._path is not None:
            write_beside(self._path, document(result))


def _check(path: Path, inputs: Sequence[Path]) -> None:
    check_path(path)
    with write_errors(str(path)):
        _check_place(path, inputs)


def _check_place(path: Path, inputs: Sequence[Path]) -> None:
    if not path.parent.is_dir():
        raise UsageError("The folder of the JUnit file does not exist", file=path.parent, hint="make it first")
    if path.exists() and not path.is_file():
        raise UsageError("--junit names something that is no file", file=path, hint="name a file")
    try:
        check_apart(path, inputs)
    except OutputExistsError as error:
        error.hint = _ELSEWHERE
        raise
    if path.is_file() and not _is_report(path):
        raise OutputExistsError(
            "--junit names a file that verify did not write, and would replace it", file=path, hint=_ELSEWHERE
        )
    if not os.access(path.parent, os.W_OK):
        raise WriteError("The JUnit file cannot be written", file=path, found="a folder that may not be written to")


def _is_report(path: Path) -> bool:
    """Whether a file may be replaced: an empty one, or what the last run left."""
    source = look_at(path)
    with source.open() as reader:
        return reader.read(0, min(len(_BEGINNING), source.size)) in (b"", _BEGINNING)


def document(result: VerifyResult) -> bytes:
    """The file for a verification that came to an end."""
    properties = [("merged", result.merged), ("base", result.base)]
    properties += [("adapter", f"{use.label} (weight {number(use.weight)})") for use in result.adapters]
    properties += [("max-ulp", str(result.max_ulp))]
    properties += [("looks like", result.looks_like)] if result.looks_like else []
    wrong = {difference.key: difference for difference in result.different}
    survived = {survival.key: survival for survival in result.survival}
    edited = set(result.edited)
    keys = [*result.edited, *(difference.key for difference in result.different if difference.key not in edited)]
    cases = [_case(key, wrong.get(key), survived.get(key)) for key in keys]
    rest = _rest(result)
    if rest:
        cases.append(_named(REST))
        SubElement(cases[-1], "system-out").text = f"{count(rest, 'tensor')}, byte for byte"
    if result.roundtrip is not None:
        cases.append(_round_trip(result.roundtrip))
    return _document(cases, properties, seconds=result.seconds)


def error_document(error: Exception, inputs: Sequence[tuple[str, str]]) -> bytes:
    """The file for a verification that an error ended."""
    case = _named("verification")
    kind = error.code if isinstance(error, LoraCliError) else "internal"
    words = str(error) if isinstance(error, LoraCliError) else f"{type(error).__name__}: {error}"
    details = error.details if isinstance(error, LoraCliError) else ()
    _problem(case, "error", kind, [words, *details])
    return _document([case], inputs)


def _document(cases: Sequence[Element], properties: Sequence[tuple[str, str]], *, seconds: float = 0.0) -> bytes:
    problems = {tag: str(sum(case.find(tag) is not None for case in cases)) for tag in ("failure", "error")}
    counts = {"tests": str(len(cases)), "failures": problems["failure"], "errors": problems["error"], "skipped": "0"}
    attributes = {"name": SUITE, **counts, "time": f"{seconds:.3f}"}
    root = Element("testsuites", attributes)
    suite = SubElement(root, "testsuite", attributes)
    listed = SubElement(suite, "properties")
    for name, value in [("lora-cli", __version__), *properties]:
        SubElement(listed, "property", {"name": name, "value": _clean(value)})
    suite.extend(cases)
    indent(root)
    data: bytes = tostring(root, encoding="utf-8", xml_declaration=True)
    return data + b"\n"


def _case(key: str, difference: Difference | None, survival: Survival | None) -> Element:
    case = _named(key)
    if difference is not None:
        _problem(case, "failure", difference.what, [difference_words(difference)])
    if survival is not None and survival.strength is not None:
        words = f"strength {survival.strength:.4g}, {survival.changed_fraction:.1%} of the weights are not the base's"
        SubElement(case, "system-out").text = words
    return case


def _round_trip(trip: RoundTrip) -> Element:
    """That it was asked for, and what came of it; what did not come back has a test of its own besides."""
    case = _named(ROUND_TRIP)
    against = "the base" if trip.against == "base" else "the digests in the undo file"
    if trip.exact:
        SubElement(case, "system-out").text = f"{count(len(trip.files), 'file')}, bit for bit as {against}"
    else:
        found = f"{count(trip.different, 'tensor or file')} not as {against}" if trip.different else "not possible"
        _problem(case, "failure", "roundtrip", [found])
    return case


def _named(name: str) -> Element:
    return Element("testcase", {"classname": CLASS, "name": _clean(name)})


def _problem(case: Element, tag: str, kind: str, lines: Sequence[str]) -> None:
    """What is wrong, twice: some readers show the attribute, others the text."""
    cleaned = [_clean(words) for words in lines]
    SubElement(case, tag, {"type": kind, "message": cleaned[0]}).text = "\n".join(cleaned)


def difference_words(difference: Difference) -> str:
    """One difference as a sentence."""
    if difference.what == "values":
        by = "" if difference.max_ulp is None else f" by up to {ulps(difference.max_ulp)} ULP"
        words = f"{count(difference.elements or 0, 'element')} differ{by}"
    elif difference.what == "roundtrip":
        return f"after unmerging: {difference.looks_like}"
    elif difference.what == "config":
        return str(difference.looks_like)
    elif difference.what in ("dtype", "shape"):
        words = f"{difference.what} {difference.found} instead of {difference.expected}"
    else:
        words = {"missing": "missing from the checkpoint", "unexpected": "no merge writes it"}[difference.what]
    return f"{words}; it looks like {difference.looks_like}" if difference.looks_like else words


def _rest(result: VerifyResult) -> int:
    """How many tensors that no adapter changes are as they should be; at least, where a file does not come back."""
    edited = set(result.edited)
    never_read = {difference.key for difference in result.different if difference.what in _NAMED_ONLY}
    wrong = {difference.key for difference in result.different if difference.what not in _NAMED_ONLY}
    return max(0, result.tensors["checked"] - len(edited - never_read) - len(wrong - edited))


def _clean(text: str) -> str:
    """Without the characters that XML cannot hold, and those that would steer whoever reads it."""
    return shown(text, _LONGEST)
