"""How adapters of other tuners than LoRA are shown: within eighty columns, and as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from cli_world import ROOT, Call, call_fixture  # noqa: F401 (fixture)
from tiny import MODULES, write_adapter, write_base
from tuner_worlds import PARTS, tensors_of, write_norms, write_tuner

KINDS = {
    "ADALORA": "AdaLoRA adds to 4 parameters",
    "FOURIERFT": "FourierFT adds to 4 parameters",
    "IA3": "(IA)³ multiplies 4 parameters",
    "LOHA": "LoHa adds to 4 parameters",
    "OFT": "OFT transforms the rows of 4 parameters",
}
OPEN = {
    "ADALORA": " 2×8, 12×2, 2×1 ",
    "FOURIERFT": " 5 ",
    "IA3": " 12×1 ",
    "LOHA": " 12×2 (2), 2×8 (2) ",
    "OFT": " 2×6 ",
}
"""Shapes of the tensors, where no base tells that of the change."""
STRENGTH = {
    "ADALORA": "(AdaLoRA, peft): scale 2 = lora_alpha / (init_r + 1e-5)",
    "FOURIERFT": "(FourierFT, peft): scale 30 = scaling",
    "IA3": "((IA)³, peft)",
    "LOHA": "(LoHa, peft): scale 3 = alpha / r",
    "OFT": "(OFT, peft)",
}
EDITS = {"IA3": ("multiply", ""), "OFT": ("transform", ""), "LOHA": ("add", "3 (rank 2)")}


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
    (bare,) = (
        line for line in alone if line.startswith((f"{MODULES[0]} ", f"{MODULES[0].removeprefix('model.layers.')} "))
    )
    assert OPEN[kind] in bare
    assert [head for head in alone if " tensors type" in head]


@pytest.mark.parametrize("kind", PARTS)
def test_plans_and_results(kind: str, tmp_path: Path, call: Call) -> None:
    line = ["merge", write_base(tmp_path / "base"), write_tuner(tmp_path / "a", kind), "-o", tmp_path / "out"]
    planned, done = lines(call(*line, "--dry-run").out), lines(call(*line).out)
    assert f"adapter a {STRENGTH[kind]}" in done
    assert f"adapter a {STRENGTH[kind]}" in planned
    for said in (planned, done):
        assert ("multiplied 4 tensors, element by element" in said) == (kind == "IA3")
        assert ("transformed the rows of 4 tensors" in said) == (kind == "OFT")
    (row,) = (said for said in planned if said.startswith(f"{MODULES[0]}.weight "))
    edit, strength = EDITS.get(kind, ("add", ""))
    assert row.startswith(f"{MODULES[0]}.weight {edit} 12×8 F32 {strength}".strip())
    assert "rank 0" not in " ".join(planned)


def test_a_plan_has_the_scale_of_each_adapter(tmp_path: Path, call: Call) -> None:
    made = [
        write_tuner(tmp_path / "a", "LOHA"),
        write_adapter(tmp_path / "b"),
        write_tuner(tmp_path / "c", "FOURIERFT"),
    ]
    base, alone = write_base(tmp_path / "base"), write_tuner(tmp_path / "d", "IA3")
    planned = lines(call("merge", base, *made, "-o", tmp_path / "out", "--dry-run").out)
    assert "tensor in model.layers edit shape type scales, by adapter" in planned
    assert f"{MODULES[0].removeprefix('model.layers.')}.weight add 12×8 F32 3 (rank 2) / 2 (rank 2) / 30" in planned
    assert "tensor edit shape type scale" in lines(call("merge", base, alone, "-o", tmp_path / "o", "--dry-run").out)


def test_differences_are_of_tensors(tmp_path: Path, call: Call) -> None:
    one, other = write_tuner(tmp_path / "a", "LOHA"), write_tuner(tmp_path / "b", "LOHA")
    said = lines(call("diff", one, other).out)
    assert "same 16 tensors compared" in said
    made = tensors_of("LOHA")
    only = {key.replace("model.layers", f"model.{'x' * 60}"): tensor for key, tensor in made.items()}
    differ = call("diff", one, write_tuner(tmp_path / "c", "LOHA", only)).out
    assert "… and 8 more" in differ
    assert "…" not in differ.replace("… and 8 more", "")
    name = next(iter(made))
    changed = lines(call("diff", one, write_tuner(tmp_path / "d", "LOHA", made | {name: made[name] + 1})).out)
    assert "tensor max abs relative elements" in changed
    lora = [write_adapter(tmp_path / label) for label in "ef"]
    assert "same 4 modules compared" in lines(call("diff", *lora).out)


@pytest.mark.parametrize("kind", PARTS)
def test_the_page_of_tuners_says_what_can_be_done(kind: str, tmp_path: Path, call: Call) -> None:
    page = (ROOT / "docs" / "tuners.md").read_text("utf-8").splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page]
    ((does, strength),) = ((row[3], row[4]) for row in rows if row[:1] == [f"`{kind}`"] and len(row) == 7)
    ((weight, others, taken),) = (row[2:] for row in rows if row[:1] == [f"**{does}**"])
    base, one, other = (
        write_base(tmp_path / "base"),
        write_tuner(tmp_path / "a", kind),
        write_adapter(tmp_path / "b"),
    )
    tried = {"--scale": ["--scale", 2], "--alpha": ["--alpha", 2]}
    for option, words in tried.items():
        assert (call("merge", base, one, "-o", tmp_path / option, *words).code == 0) == (f"`{option}`" in strength)
    assert (call("merge", base, one, "-o", tmp_path / "w", "--weight", 2).code == 0) == (weight == "yes")
    assert (call("merge", base, one, other, "-o", tmp_path / "two").code == 0) == others.startswith("yes")
    assert call("merge", base, one, "-o", tmp_path / "m").code == 0
    took = call("unmerge", tmp_path / "m", one, "-o", tmp_path / "u", "--approximate")
    assert (took.code == 0) == (taken == "yes"), took.err


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
