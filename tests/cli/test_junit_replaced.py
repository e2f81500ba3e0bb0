"""Which files `--junit` replaces: what verify wrote itself, and empty ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_world import Call, World, call_fixture, world_fixture  # noqa: F401 (fixtures)
from test_junit import DECLARED, YESTERDAY, both_forms, cases_of, line

FOREIGN = {
    "XML of another kind": f"{DECLARED}<project><name>precious</name></project>",
    "tests of somebody else": f'{DECLARED}<testsuites name="pytest tests"></testsuites>',
    "a suite that begins as ours does": f'{DECLARED}<testsuites name="lora-cli verification"></testsuites>',
    "a declaration alone": "<?xml",
    "text": "precious",
}
"""What is in files that somebody else wrote."""


@both_forms
@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_what_verify_did_not_write_is_not_replaced(
    call: Call, world: World, tmp_path: Path, content: str, flags: tuple[str, ...]
) -> None:
    """A slip in a name must not cost anybody a file."""
    report = tmp_path / "pom.xml"
    report.write_text(content)
    ran = call(*line(world), "--junit", report, *flags)
    assert ran.code == 30
    assert "--junit names a file that verify did not write" in " ".join((ran.out + ran.err).split())
    assert report.read_text() == content


@pytest.mark.parametrize("before", ["", YESTERDAY], ids=["empty", "an earlier report"])
def test_an_earlier_report_is_replaced(call: Call, world: World, tmp_path: Path, before: str) -> None:
    report = tmp_path / "report.xml"
    report.write_text(before)
    for _ in range(2):  # the second time it is our own
        assert call(*line(world), "--junit", report).code == 0
        assert "of yesterday" not in report.read_text()
        assert cases_of(report)
