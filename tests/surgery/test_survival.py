"""What a merge says of what survived rounding, and what a dry run says of the undo file to come."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_file

from lora_cli.progress import Progress
from lora_cli.surgery.budget import settle_budget
from lora_cli.surgery.merge import merge, plan_merge
from lora_cli.surgery.placing import PlanOptions
from lora_cli.surgery.undo.estimate import undo_bytes

SIDE = 256


class Warnings(Progress):
    def __init__(self) -> None:
        self.said: list[str] = []

    def warn(self, text: str) -> None:
        self.said.append(text)


def gaussian(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def job(folder: Path, spread: float, dtype: torch.dtype = torch.bfloat16, layers: int = 1) -> tuple[Path, Path]:
    """A base of standard normal weights, and an adapter whose delta has a standard deviation of `spread`."""
    folder.mkdir(exist_ok=True)
    (folder / "base").mkdir()
    base = {f"h.{n}.weight": gaussian(10 * n, SIDE, SIDE).to(dtype) for n in range(layers)}
    save_file(base | {"other": gaussian(99, SIDE).to(dtype)}, folder / "base" / "model.safetensors")
    tiny.write_adapter(folder / "adapter", {}, r=16, lora_alpha=16)
    factors = {}
    for n in range(layers):
        factors[f"h.{n}.lora_A.weight"] = gaussian(10 * n + 1, 16, SIDE) * spread / 4
        factors[f"h.{n}.lora_B.weight"] = gaussian(10 * n + 2, SIDE, 16)
    save_file(factors, folder / "adapter" / "adapter_model.safetensors")
    return folder / "base", folder / "adapter"


def test_a_change_above_the_spacing_survives_whole(tmp_path: Path) -> None:
    base, adapter = job(tmp_path, 0.1)
    heard = Warnings()
    (survival,) = merge(base, [adapter], tmp_path / "out", progress=heard).survival
    assert survival.key == "h.0.weight"
    assert survival.strength == pytest.approx(1.0, abs=0.01)
    assert 0.8 < survival.changed_fraction < 1
    assert heard.said == []


@pytest.mark.parametrize("undo", [True, False])
def test_a_change_below_the_spacing_is_lost_and_said_to_be(tmp_path: Path, undo: bool) -> None:
    base, adapter = job(tmp_path, 1e-4)
    heard = Warnings()
    result = merge(base, [adapter], tmp_path / "out", undo=undo, progress=heard)
    (survival,) = result.survival
    assert survival.strength is not None
    assert survival.strength < 0.9
    assert survival.changed_fraction < 0.1
    (warning,) = heard.said
    assert warning in result.warnings
    assert "less than 90%" in warning
    assert "h.0.weight" in warning


def test_in_a_wider_type_it_survives(tmp_path: Path) -> None:
    base, adapter = job(tmp_path, 1e-4)
    (survival,) = merge(base, [adapter], tmp_path / "out", PlanOptions(dtype="fp32")).survival
    assert survival.strength == pytest.approx(1.0, abs=1e-3)
    assert survival.changed_fraction > 0.999  # all but those below half the spacing of float32


def test_weight_zero_changes_nothing_and_has_no_strength(tmp_path: Path) -> None:
    base, adapter = job(tmp_path, 0.1)
    heard = Warnings()
    result = merge(base, [adapter], tmp_path / "out", PlanOptions(weights=(0.0,)), progress=heard)
    assert [(s.changed_fraction, s.strength) for s in result.survival] == [(0.0, None)]
    assert heard.said == []


@pytest.mark.parametrize("embed", [False, True], ids=["alone", "with factors"])
@pytest.mark.parametrize("spread", [0.005, 0.05, 1.0])
def test_the_estimate_of_the_undo_file_is_close(tmp_path: Path, spread: float, embed: bool) -> None:
    base, adapter = job(tmp_path, spread, layers=20)
    plan = plan_merge(base, [adapter], out=tmp_path / "out")
    estimate = undo_bytes(plan, settle_budget(plan, memory=None, threads=1, blocks=True), embed=embed)
    result = merge(base, [adapter], tmp_path / "out", embed_adapter=embed)
    assert result.undo is not None
    assert result.undo.bytes == pytest.approx(estimate, rel=0.1, abs=2000)
