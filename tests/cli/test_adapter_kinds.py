"""Adapters of several kinds through the command line: exit codes and what is said."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_world import Call, call_fixture  # noqa: F401 (fixture)
from families import FAMILIES
from family_cases import REFUSALS, Case, base_of, make
from lora_options import OPTIONS

from lora_cli.errors import LoraCliError

ACCEPTED = [
    ("llama", "dora"),
    ("llama-tied", "table-and-head"),
    ("llama-shards", "replicated"),
    ("vit", "kernel"),
    ("bert-bare", "all-linear"),
]


@pytest.mark.parametrize(("family", "option"), ACCEPTED)
def test_kinds_are_merged_verified_and_taken_out(family: str, option: str, tmp_path: Path, call: Call) -> None:
    case = Case(FAMILIES[family], OPTIONS[option])
    base = base_of(case.family, tmp_path)
    adapter = make(case, base, tmp_path / "case").adapter
    merged, back = tmp_path / "merged", tmp_path / "back"
    assert call("merge", base, adapter, "-o", merged).code == 0
    assert call("verify", merged, "--base", base, "--adapter", adapter, "--roundtrip").code == 0
    assert call("unmerge", merged, adapter, "-o", back).code == 0
    assert (back / "config.json").read_bytes() == (base / "config.json").read_bytes()
    again = call("verify", base, "--base", base, "--adapter", adapter)
    assert again.code == 1
    assert again.out.startswith("differs ")


@pytest.mark.parametrize(("case", "error", "words"), REFUSALS)
def test_a_refusal_has_its_code_and_says_why(
    case: Case, error: type[LoraCliError], words: str, tmp_path: Path, call: Call
) -> None:
    base = base_of(case.family, tmp_path)
    adapter = make(case, base, tmp_path / "case", mergeable=False).adapter
    refused = call("merge", base, adapter, "-o", tmp_path / "merged")
    assert refused.code == error.exit_code
    assert words.replace("\\", "") in " ".join(refused.err.split())
    assert not (tmp_path / "merged").exists()
