"""Comparing embeddings, convolutions and stacks, and taking them out by subtraction."""

from __future__ import annotations

from pathlib import Path

import kinds
import pytest
import torch
from kinds import SCALE, gaussian
from safetensors.torch import load_file, save_file

from lora_cli.adapters.adapter import Scale
from lora_cli.adapters.deltas import LowRankStack
from lora_cli.adapters.source import ReadOptions
from lora_cli.checkpoint.checkpoint import open_checkpoint
from lora_cli.progress import SILENT
from lora_cli.surgery.diff import diff
from lora_cli.surgery.directions import measure_deltas
from lora_cli.surgery.merge import merge
from lora_cli.surgery.placing import PlanOptions
from lora_cli.surgery.unmerge import unmerge


def test_adapters_are_compared_by_what_they_change(tmp_path: Path) -> None:
    """Kernels and tables whose factors lie in two ways are the same; another scale is another change."""
    a, b = kinds.kernels(matrix_b=False).adapter, kinds.kernels(matrix_b=True).adapter
    assert a is not None
    assert b is not None
    table = {"emb.lora_embedding_A": gaussian(1, 2, 30), "emb.lora_embedding_B": gaussian(2, 8, 2)}
    turned = {name: tensor.T.contiguous() for name, tensor in table.items()}
    b["grouped.lora_B.weight"] = 1.25 * b["grouped.lora_B.weight"]
    save_file(a | table, tmp_path / "a.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in (b | turned).items()}, tmp_path / "b.safetensors")
    found = diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors", options=ReadOptions(scale=1.0))
    (changed,) = found.changed
    assert (changed.key, changed.rank, found.unchanged) == ("grouped.weight", 5, 4)
    assert changed.relative_norm == pytest.approx(0.25, rel=1e-6)


def test_stacks_are_compared_matrix_by_matrix(tmp_path: Path) -> None:
    tensors = {"a": gaussian(1, 4, 9, 2), "b": gaussian(2, 4, 2, 7)}
    tensors["c"] = tensors["b"].clone()
    tensors["c"][1] *= 3.0
    tensors["c"][2, 0] += 0.5
    tensors["nan"] = torch.full((4, 2, 7), torch.nan)
    save_file(tensors, tmp_path / "f.safetensors")
    stored, scale = open_checkpoint(tmp_path / "f.safetensors").tensors, Scale(2.0, None, False, "")
    one, other, broken = (LowRankStack(stored["a"], stored[name], scale) for name in ("b", "c", "nan"))
    found = measure_deltas([("same", one, one), ("x", one, other), ("nan", one, broken)], 1, SILENT)
    before, after = (2 * torch.bmm(tensors["a"].double(), tensors[name].double()) for name in ("b", "c"))
    assert found.keys() == {"x", "nan"}
    assert found["nan"].spectrum is None
    x = found["x"]
    assert x.largest == pytest.approx(float((after - before).abs().max()))
    assert x.relative_norm == pytest.approx(float((after - before).norm() / before.norm()))
    assert x.spectrum is not None
    assert x.spectrum.rank == 3  # two directions of one matrix and one of another


@pytest.mark.parametrize("name", ["from scratch", "from scratch, bf16", "kernels and matrices", "functional"])
def test_subtraction_proves_what_it_can(tmp_path: Path, name: str) -> None:
    case = kinds.CASES[name]()
    base, adapters = case.write(tmp_path)
    said = PlanOptions(read=ReadOptions(scale=SCALE), orientation=case.orientation)  # type: ignore[arg-type]
    merge(base, adapters, tmp_path / "out", said, undo=False)
    result = unmerge(tmp_path / "out", adapters, tmp_path / "back", said, approximate=True)
    assert set(result.kept) == set(case.whole)
    assert all(proof.impossible == 0 for proof in result.undecided)
    found = load_file(tmp_path / "back" / "model.safetensors")
    unsure = {proof.key: proof.undecided for proof in result.undecided}
    for key in case.deltas:
        wrong = int((found[key] != case.before(key)).sum())
        assert wrong <= unsure.get(key, 0), key
    assert sum(unsure.values()) < sum(case.before(key).numel() for key in case.deltas) / 2
