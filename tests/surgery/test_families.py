"""Every adapter that PEFT can save, on every checkpoint that transformers can write, merged without a hint.

What is compared with owes nothing to lora-cli: the answers of the live adapted model, and PEFT's own merge in float64.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from family_cases import CASES, REFUSALS, Case, Made, base_of, damaged, damages, make
from models import read_tensors
from round_trips import contents
from safetensors.torch import load_file

from lora_cli.adapters.source import ReadOptions
from lora_cli.errors import LoraCliError
from lora_cli.surgery.merge import MergeResult, merge
from lora_cli.surgery.placing import PlanOptions
from lora_cli.surgery.unmerge import unmerge
from lora_cli.surgery.verify import verify

CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""How far two computations of the same model are apart in float32, as a share of what they give, by what files hold."""
FAR = {torch.float32: 1e-3, torch.bfloat16: 6e-2}
"""What is another model."""


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the bases are."""
    return tmp_path_factory.mktemp("bases")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_case(case: Case, root: Path, tmp_path: Path) -> None:
    base, merged = base_of(case.family, root), tmp_path / "merged"
    made = make(case, base, tmp_path / "case")
    options = PlanOptions(read=reading(made))
    result = merge(base, [made.adapter], merged, options)
    assert_well_formed(merged)
    assert_same_answers(made, merged)
    assert_same_tensors(made, base, merged)
    assert_accounted(made, result)
    assert verify(merged, base, [made.adapter], options, roundtrip=True).verified
    assert_undone(made, base, merged, tmp_path, options)
    assert_damage_is_seen(made, base, tmp_path, options)


@pytest.mark.parametrize(("case", "error", "words"), REFUSALS)
def test_a_refusal(case: Case, error: type[LoraCliError], words: str, root: Path, tmp_path: Path) -> None:
    base = base_of(case.family, root)
    adapter = make(case, base, tmp_path / "case", mergeable=False).adapter
    with pytest.raises(error, match=words):
        merge(base, [adapter], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def reading(made: Made) -> ReadOptions:
    """Nothing is said to a merge, but where an adapter began."""
    return ReadOptions(initial=tuple(map(str, made.folders[1:])))


def distance(left: torch.Tensor, right: torch.Tensor) -> float:
    """The largest difference, as a share of the largest number."""
    return float((left - right).abs().max() / right.abs().max())


def assert_well_formed(merged: Path) -> None:
    """An index names every tensor, the file that has it, and the length of all."""
    held = {path.name: load_file(path) for path in merged.glob("*.safetensors")}
    file = merged / "model.safetensors.index.json"
    assert file.exists() == (len(held) > 1)
    if file.exists():
        index = json.loads(file.read_text())
        assert index["weight_map"] == {key: name for name, tensors in held.items() for key in tensors}
        total = sum(tensor.nbytes for tensors in held.values() for tensor in tensors.values())
        assert index["metadata"]["total_size"] == total


def assert_same_answers(made: Made, merged: Path) -> None:
    """The merged folder is the adapted model; the base is another one."""
    assert distance(made.case.answer_of(merged), made.adapted) <= CLOSE[made.case.family.dtype]
    if made.before is not None:
        assert distance(made.before, made.adapted) > FAR[made.case.family.dtype]


def assert_same_tensors(made: Made, base: Path, merged: Path) -> None:
    """Names are those that PEFT's merge has, and numbers those of its merge in float64, rounded.

    What its model does not know it loses: that is there as it was.
    """
    if made.merged is None:
        return
    found, before = read_tensors(merged), read_tensors(base)
    unknown = before.keys() - made.merged.keys()
    assert found.keys() == made.merged.keys() | unknown
    assert all(torch.equal(found[key], before[key]) for key in unknown)
    for key, tensor in made.merged.items():
        old = before.get(key, tensor)[: len(tensor)]  # a vocabulary may have been made longer, or shorter
        change = (tensor[: len(old)] - old.double()).abs().max()
        limit = tensor.abs() * torch.finfo(found[key].dtype).eps + change * 2**-20
        assert bool(((found[key].double() - tensor).abs() <= limit).all()), key


def assert_accounted(made: Made, result: MergeResult) -> None:
    """Every tensor of the adapter, and of what it began as, is in the ledger once; what was not used has a reason."""
    held = [(folder.name, key) for folder in made.folders for key in read_tensors(folder)]
    assert sorted((entry.adapter.split(" ")[0], entry.tensor) for entry in result.entries) == sorted(held)
    for entry in result.entries:
        assert entry.outcome != "ignored" or (made.case.may_ignore(entry.tensor) and entry.reason), entry


def assert_undone(made: Made, base: Path, merged: Path, folder: Path, options: PlanOptions) -> None:
    """Every file of the base comes back to the byte."""
    unmerge(merged, [made.adapter], folder / "back", options)
    found = contents(folder / "back")
    del found["lora_unmerge.json"]
    assert found == contents(base)


def assert_damage_is_seen(made: Made, base: Path, folder: Path, options: PlanOptions) -> None:
    """The merge of another adapter does not pass: it is another model, or none."""
    for number, change in enumerate(damages(made)):
        wrong = folder / f"wrong{number}"
        try:
            merge(base, [damaged(made, folder / f"damaged{number}", change)], wrong, options, undo=False)
        except LoraCliError:
            assert not wrong.exists()
        else:
            assert distance(made.case.answer_of(wrong), made.adapted) > FAR[made.case.family.dtype]
