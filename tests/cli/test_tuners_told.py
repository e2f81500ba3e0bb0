"""How adapters of other tuners than LoRA are shown: within eighty columns, and as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from cli_world import ROOT, Call, call_fixture  # noqa: F401 (fixture)
from tiny import MODULES, write_base
from tuner_worlds import PARTS, write_norms, write_tuner

KINDS = {
    "ADALORA": "4 parameters with a product added",
    "FOURIERFT": "4 parameters with a formula's values added",
    "IA3": "4 parameters multiplied, element by element",
    "LOHA": "4 parameters with a formula's values added",
    "OFT": "4 parameters made anew of what was there, row by row",
}
STRENGTH = {
    "ADALORA": "(AdaLoRA, peft): scale 2 = lora_alpha / (init_r + 1e-5)",
    "FOURIERFT": "(FourierFT, peft): scale 30 = scaling",
    "IA3": "((IA)³, peft)",
    "LOHA": "(LoHa, peft): scale 3 = alpha / r",
    "OFT": "(OFT, peft)",
}
EDITS = {"IA3": ("multiply", "ia3"), "OFT": ("make anew", "(rank 4)"), "LOHA": ("add", "3 (rank 2)")}


def lines(text: str) -> list[str]:
    assert max(map(len, text.splitlines())) <= 80
    return [" ".join(line.split()) for line in text.splitlines()]


@pytest.mark.parametrize("kind", PARTS)
def test_inspect(kind: str, tmp_path: Path, call: Call) -> None:
    base, adapter = write_base(tmp_path / "base"), write_tuner(tmp_path / "a", kind)
    alone, based = lines(call("inspect", adapter).out), lines(call("inspect", adapter, "--base", base).out)
    assert f"modules {KINDS[kind]}" in based
    assert "base 4 of 4 names found" in based
    assert ("undo the undo file keeps more than it does for LoRA" in alone) == (kind == "OFT")
    assert not [line for line in (*alone, *based) if "0×0" in line or "scale 1 = " in line]
    (row,) = (line for line in based if line.startswith(f"{MODULES[0]} "))
    assert " 12×8 " in row


@pytest.mark.parametrize("kind", PARTS)
def test_plans_and_results(kind: str, tmp_path: Path, call: Call) -> None:
    line = ["merge", write_base(tmp_path / "base"), write_tuner(tmp_path / "a", kind), "-o", tmp_path / "out"]
    planned, done = lines(call(*line, "--dry-run").out), lines(call(*line).out)
    assert f"adapter a {STRENGTH[kind]}" in done
    assert f"adapter a {STRENGTH[kind]}" in planned
    for said in (planned, done):
        assert ("multiplied 4 tensors, element by element" in said) == (kind == "IA3")
        assert ("made anew 4 tensors, of what they were, row by row" in said) == (kind == "OFT")
    (row,) = (said for said in planned if said.startswith(f"{MODULES[0]}.weight "))
    edit, strength = EDITS.get(kind, ("add", ""))
    assert row.startswith(f"{MODULES[0]}.weight {edit} 12×8 F32 {strength}")
    assert "rank 0" not in " ".join(planned)


def test_wholes(tmp_path: Path, call: Call) -> None:
    said = lines(call("inspect", write_norms(tmp_path / "a")).out)
    assert "kind LN tuning" in said
    assert not [line for line in said if line.startswith("modules")]


def test_a_refusal_says_what_has_no_spectrum(tmp_path: Path, call: Call) -> None:
    ran = call("inspect", write_tuner(tmp_path / "a", "LOHA"), "--spectrum")
    assert ran.code != 0
    assert "Singular values are computed of LoRA's factors, and LoHa has others" in ran.err


@pytest.mark.parametrize("kind", PARTS)
def test_documents_keep_to_the_schema(kind: str, tmp_path: Path, call: Call) -> None:
    base, adapter = write_base(tmp_path / "base"), write_tuner(tmp_path / "a", kind)
    schema: dict[str, Any] = json.loads((ROOT / "docs" / "schemas" / "inspect.json").read_text("utf-8"))
    alone = call("--json", "inspect", adapter).document
    for document in (alone, call("--json", "inspect", adapter, "--base", base).document):
        jsonschema.Draft202012Validator(schema).validate(document)
    assert {module["shape"] for module in alone["modules"]} == {None}
