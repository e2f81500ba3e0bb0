"""Adapters of PEFT's other tuners, on checkpoints that transformers writes, merged without a hint.

What is compared with owes nothing to lora-cli: the answers of the live adapted model, and PEFT's own merge, which is
made to count in float64 throughout.
"""

from __future__ import annotations

import re
import shutil
from typing import TYPE_CHECKING, Any, Final

import family_cases
import pytest
import torch
from family_cases import Case, Made, base_of, halved, make
from models import read_tensors
from safetensors.torch import save_file
from test_families import (
    FAR,
    assert_accounted,
    assert_same_answers,
    assert_same_tensors,
    assert_undone,
    assert_well_formed,
    distance,
)
from torch.overrides import TorchFunctionMode
from tuner_making import TUNED, TunerOption
from tuner_options import TUNERS, UNMERGED

from lora_cli.errors import NamesError, UnsupportedError
from lora_cli.surgery.merge import merge
from lora_cli.surgery.placing import PlanOptions
from lora_cli.surgery.verify import verify

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from families import Family
    from family_models import Model

Tensors = dict[str, torch.Tensor]

CASES: Final = [Case(TUNED[family], option) for option in TUNERS.values() for family in option.families]
REFUSED: Final = [Case(TUNED[family], option) for option in UNMERGED.values() for family in option.families]


class InFloat64(TorchFunctionMode):
    """What is cast to float32 is cast to float64."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.float:
            return torch.Tensor.double(*args)
        named = {key: torch.float64 if value is torch.float32 else value for key, value in (kwargs or {}).items()}
        return func(*(torch.float64 if value is torch.float32 else value for value in args), **named)


class Butterflies:
    """What PEFT compiles for BOFT where there is a GPU: blocks on diagonals, for every factor."""

    @staticmethod
    def forward(blocks: torch.Tensor) -> list[torch.Tensor]:
        return [torch.stack([torch.block_diag(*factor) for factor in blocks])]

    @staticmethod
    def backward(gradient: torch.Tensor, blocks: torch.Tensor) -> list[torch.Tensor]:
        factors, count, size, _ = blocks.shape
        grid = gradient.view(factors, count, size, count, size)
        return [torch.stack([grid[:, block, :, block] for block in range(count)], 1)]


@pytest.fixture(autouse=True)
def _peft_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT merges in float64, and has what it compiles for GPUs."""
    merged_by_peft = family_cases.merged_by_peft

    def merged(adapted: Model, family: Family, base: Tensors, folder: Path) -> Tensors:
        usual = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            with InFloat64():
                return merged_by_peft(adapted, family, base, folder)
        finally:
            torch.set_default_dtype(usual)

    monkeypatch.setattr(family_cases, "merged_by_peft", merged)
    monkeypatch.setattr("peft.tuners.boft.layer._FBD_CUDA", Butterflies)


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the bases are."""
    return tmp_path_factory.mktemp("tuned")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_case(case: Case, root: Path, tmp_path: Path) -> None:
    base, merged = base_of(case.family, root), tmp_path / "merged"
    made = make(case, base, tmp_path / "case")
    result = merge(base, [made.adapter], merged)
    assert_well_formed(merged)
    assert_same_answers(made, merged)
    assert_near(made, base, merged)
    assert_accounted(made, result)
    assert verify(merged, base, [made.adapter], roundtrip=True).verified
    assert_undone(made, base, merged, tmp_path, PlanOptions())
    assert_damage_is_seen(made, base, tmp_path)


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_a_refusal(case: Case, root: Path, tmp_path: Path) -> None:
    base = base_of(case.family, root)
    adapter = make(case, base, tmp_path / "case", mergeable=False).adapter
    with pytest.raises((UnsupportedError, NamesError), match=option_of(case).refused):
        merge(base, [adapter], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def option_of(case: Case) -> TunerOption:
    """The case's option, with what only other tuners' have."""
    assert isinstance(case.option, TunerOption)
    return case.option


def assert_near(made: Made, base: Path, merged: Path) -> None:
    """Names and numbers are those of PEFT's merge; where it decomposes the base in float32, nearly."""
    share = option_of(made.case).share
    if share is None:
        assert_same_tensors(made, base, merged)
        return
    assert made.merged is not None
    found, before = read_tensors(merged), read_tensors(base)
    assert found.keys() == made.merged.keys()
    for key, tensor in made.merged.items():
        limit = share * max((tensor - before[key]).abs().max(), before[key].abs().max())
        assert float((found[key] - tensor).abs().max()) <= limit, key


def assert_damage_is_seen(made: Made, base: Path, folder: Path) -> None:
    """The merge of another adapter does not pass."""
    tensors = read_tensors(made.adapter)
    trained = {
        key: tensor
        for key, tensor in tensors.items()
        if tensor.is_floating_point() and not re.search(r"base_layer\.weight|original_module", key)
    }
    shutil.copytree(made.adapter, folder / "damaged")
    change = backwards if option_of(made.case).turns else halved
    save_file(tensors | change(trained), folder / "damaged" / "adapter_model.safetensors", {"format": "pt"})
    merge(base, [folder / "damaged"], folder / "wrong", undo=False)
    assert distance(made.case.answer_of(folder / "wrong"), made.adapted) > FAR[made.case.family.dtype]


def backwards(tensors: Tensors) -> Tensors:
    """Every axis from its other end."""
    return {key: tensor.flip(tuple(range(tensor.ndim))).contiguous() for key, tensor in tensors.items()}
