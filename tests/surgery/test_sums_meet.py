"""Adapters of several tuners on one weight: in any order, taken off again; and what is drawn for all its modules."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import pytest
import torch
from models import read_tensors
from safetensors.torch import save_file
from tuner_formulas import Net, Tuners

from lora_cli.errors import LoraCliError, UnsupportedError
from lora_cli.surgery.merge import merge
from lora_cli.surgery.placing import PlanOptions
from lora_cli.surgery.unmerge import unmerge
from lora_cli.surgery.verify import verify


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Tuners:
    """Each adapter, made once."""
    return Tuners(tmp_path_factory.mktemp("tuned"))


def _base(folder: Path, *without: str) -> Path:
    """The model's own checkpoint, in bfloat16."""
    torch.manual_seed(5)
    tensors = {key: tensor.bfloat16() for key, tensor in Net().state_dict().items() if not key.startswith(without)}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_tuners_meet_in_any_order(made: Tuners, tmp_path: Path) -> None:
    base = _base(tmp_path / "base")
    adapters = [made(name).folder for name in ("lokr", "shira", "gralora-hybrid", "miss")]
    first = None
    for number, order in enumerate(permutations(adapters)):
        if number % 5:
            continue
        merged = tmp_path / str(number)
        merge(base, order, merged)
        found = (merged / "model.safetensors").read_bytes()
        first = first or found
        assert found == first
    assert verify(tmp_path / "0", base, adapters, roundtrip=True).verified
    unmerge(tmp_path / "0", adapters, tmp_path / "unmerged")
    assert (tmp_path / "unmerged/model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    deltas = sum(made(name).delta("up") for name in ("lokr", "shira", "gralora-hybrid", "miss"))
    before, after = (read_tensors(folder)["up.weight"].double() for folder in (base, tmp_path / "0"))
    torch.testing.assert_close(after, before + deltas, rtol=2**-8, atol=1e-9)


def test_what_is_drawn_for_all_modules_is_not_drawn_for_some(made: Tuners, tmp_path: Path) -> None:
    base, part = _base(tmp_path / "base"), _base(tmp_path / "part", "beside")
    adapter, options = made("vera-drawn").folder, PlanOptions(allow_unmapped=True)
    with pytest.raises(LoraCliError, match=r"beside\.weight"):
        merge(part, [adapter], tmp_path / "merged")
    with pytest.raises(UnsupportedError, match=r"beside\.weight.*depends on its shape"):
        merge(part, [adapter], tmp_path / "merged", options)
    merge(base, [adapter], tmp_path / "merged", options)
    saved = made("randlora-saved").folder  # of what is saved nothing depends on others
    merge(part, [saved], tmp_path / "saved", options)
