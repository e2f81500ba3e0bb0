"""What must not pass in silence: factors left over, files that are not ours, receipts that disagree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lora_cli.adapters.source import ReadOptions
from lora_cli.errors import (
    LoraCliError,
    MalformedFileError,
    NamesError,
    NumericError,
    OutputExistsError,
    ShapeError,
    UnsupportedError,
    WrongInputError,
)
from lora_cli.surgery.inspect import inspect
from lora_cli.surgery.merge import merge, plan_merge
from lora_cli.surgery.placing import PlanOptions
from lora_cli.surgery.unmerge import unmerge

Q = "base_model.model.l.q"
FACTORS = {f"{Q}.lora_A.weight": torch.ones(2, 6), f"{Q}.lora_B.weight": torch.ones(8, 2)}


def adapter(folder: Path, more: dict[str, torch.Tensor] | None = None, **config: Any) -> Path:
    folder.mkdir()
    save_file(FACTORS | (more or {}), folder / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 2} | config
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tensors = {"l.q.weight": torch.randn(8, 6), "l.q.bias": torch.zeros(8), "tok.weight": torch.zeros(32, 6)}
    save_file(tensors, tmp_path / "b.safetensors")
    return tmp_path / "b.safetensors"


REFUSED: dict[str, tuple[type[LoraCliError], dict[str, torch.Tensor], dict[str, Any]]] = {
    "a bias of A": (NamesError, {f"{Q}.lora_A.bias": torch.ones(2), f"{Q}.lora_B.bias": torch.ones(8)}, {}),
    "two biases of B": (NamesError, {f"{Q}.lora_B.{n}bias": torch.ones(8) for n in ("", "default.")}, {}),
    "an embedding of another name": (
        NamesError,
        {"base_model.model.embed_tokens.weight": torch.ones(40, 6)},
        {"modules_to_save": ["embed_tokens"]},
    ),
    "a head of NaN": (
        NumericError,
        {"base_model.model.score.weight": torch.full((2, 6), torch.nan)},
        {"modules_to_save": ["score"]},
    ),
    "alpha 0": (NumericError, {}, {"lora_alpha": 0}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_no_tensor_of_an_adapter_is_lost(base: Path, tmp_path: Path, name: str) -> None:
    kind, more, config = REFUSED[name]
    with pytest.raises(kind):
        merge(base, [adapter(tmp_path / "a", more, **config)], tmp_path / "out.safetensors")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("stray", ["l.q.lora_magnitude_vector.default.weight", "l.q.lora_A.second.weight", "x.lora_A"])
def test_factors_that_a_base_carries_are_not_lost(tmp_path: Path, stray: str) -> None:
    live = {
        "l.q.base_layer.weight": torch.ones(8, 6),
        "l.q.lora_A.default.weight": torch.ones(2, 6),
        "l.q.lora_B.default.weight": torch.ones(8, 2),
    }
    options = PlanOptions(read=ReadOptions(alpha=2))
    save_file(live, tmp_path / "fine.safetensors")
    assert plan_merge(tmp_path / "fine.safetensors", (), options).counts()["dropped"] == 2
    save_file(live | {stray: torch.ones(2, 6)}, tmp_path / "stray.safetensors")
    with pytest.raises(UnsupportedError) as caught:
        plan_merge(tmp_path / "stray.safetensors", (), options)
    assert caught.value.details == (stray,)


@pytest.mark.parametrize(
    ("said", "kind"),
    [({"scaling": "banana"}, MalformedFileError), ({"scaling": "alpha/rank", "rank": 3}, ShapeError)],
)
def test_a_wrap_file_is_read_strictly(tmp_path: Path, said: dict[str, Any], kind: type[LoraCliError]) -> None:
    wrapped = {
        "q.base.weight": torch.ones(8, 6),
        "q.lora_A.weight": torch.ones(2, 6),
        "q.lora_B.weight": torch.ones(8, 2),
    }
    save_file(wrapped, tmp_path / "w.safetensors")
    document = {"schema": "lora-cli/wrap/1", "alpha": 2, **said}
    (tmp_path / "w.lora_wrap.json").write_text(json.dumps(document))
    with pytest.raises(kind):
        plan_merge(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"lora_alpha": 2, "use_dora": True}, UnsupportedError),
        ({"lora_alpha": 2, "alpha_pattern": {"l.q": 9}}, UnsupportedError),
        ({"lora_alpha": 2, "scale": 5}, MalformedFileError),
    ],
)
def test_the_config_of_a_plain_file_is_read_whole(base: Path, tmp_path: Path, config: Any, kind: Any) -> None:
    (tmp_path / "p").mkdir()
    save_file({"l.q.A": torch.ones(2, 6), "l.q.B": torch.ones(8, 2)}, tmp_path / "p" / "f.safetensors")
    (tmp_path / "p" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(kind):
        plan_merge(base, [tmp_path / "p" / "f.safetensors"])


def test_files_of_others_are_spared(base: Path, tmp_path: Path) -> None:
    mine, out = tmp_path / "out.lora_unmerge.json", tmp_path / "out.safetensors"
    mine.write_text("mine")
    merge(base, [adapter(tmp_path / "a")], out)
    merge(base, [tmp_path / "a"], out, force=True)
    assert mine.read_text() == "mine"
    save_file({"my.own": torch.ones(3)}, out)
    with pytest.raises(OutputExistsError):
        merge(base, [tmp_path / "a"], out, force=True)


def test_an_unmerge_believes_its_receipt(base: Path, tmp_path: Path) -> None:
    adapter(tmp_path / "a")
    merge(base, [tmp_path / "a"], tmp_path / "m.safetensors", PlanOptions(weights=(0.7,)))
    with pytest.raises(WrongInputError) as caught:
        unmerge(tmp_path / "m.safetensors", [tmp_path / "a"], tmp_path / "u.safetensors", approximate=True)
    assert "weight 0.7" in str(caught.value.expected)
    options = PlanOptions(weights=(0.7,))
    result = unmerge(
        tmp_path / "m.safetensors", [tmp_path / "a"], tmp_path / "u.safetensors", options, approximate=True
    )
    assert result.proved


def test_a_file_without_a_scale_can_be_looked_at(tmp_path: Path) -> None:
    save_file({"l.q.A": torch.ones(2, 6), "l.q.B": torch.ones(8, 2)}, tmp_path / "f.safetensors")
    result = inspect(tmp_path / "f.safetensors")
    assert [(module.module, module.rank, module.scale) for module in result.modules] == [("l.q", 2, None)]
    assert "--alpha" in " ".join(result.warnings)


def test_a_map_that_concerns_nothing_is_told(base: Path, tmp_path: Path) -> None:
    made = plan_merge(base, [adapter(tmp_path / "a")], PlanOptions(maps=("nope=foo",)))
    assert any("nope=foo" in warning for warning in made.warnings)
