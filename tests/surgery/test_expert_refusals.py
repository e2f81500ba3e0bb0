"""What adapters of stacked experts say that cannot be, by name; nothing is written then."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest
import torch
from expert_families import qwen3_moe
from family_cases import FAMILIES, OPTIONS, Case, base_of, make
from models import read_tensors
from safetensors.torch import save_file

from lora_cli.errors import LoraCliError
from lora_cli.surgery.merge import merge

Tensors = dict[str, torch.Tensor]
Fields = dict[str, object]
Change = Callable[[Tensors, Fields], None]

OUTER: Final = "base_model.model.model.layers.1.mlp.experts"
INNER: Final = f"{OUTER}.base_layer"
THIRD: Final = f"{OUTER}.3.down_proj"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


def short(tensors: Tensors, fields: Fields) -> None:
    """A row is missing, so that experts have no equal ranks."""
    tensors[f"{OUTER}.lora_A.weight"] = tensors[f"{OUTER}.lora_A.weight"][:-1].clone()


def narrow(tensors: Tensors, fields: Fields) -> None:
    """The parameter is wider."""
    tensors[f"{OUTER}.lora_A.weight"] = tensors[f"{OUTER}.lora_A.weight"][:, :-1].clone()


def lacking(tensors: Tensors, fields: Fields) -> None:
    """B is not there."""
    del tensors[f"{OUTER}.lora_B.weight"]


def deeper(tensors: Tensors, fields: Fields) -> None:
    """Two are nested where one was adapted."""
    fields["target_parameters"] = ["experts.down_proj"]


def shallow(tensors: Tensors, fields: Fields) -> None:
    """One is there where two were adapted."""
    for part in "AB":
        del tensors[f"{INNER}.lora_{part}.weight"]


def elsewhere(tensors: Tensors, fields: Fields) -> None:
    """None of those that were adapted is the module's."""
    fields["target_parameters"] = ["experts.input_linear", "experts.output_linear"]


def unheard(tensors: Tensors, fields: Fields) -> None:
    """A packing that nobody knows."""
    fields["lora_B_layout"] = "sideways"


def beyond(tensors: Tensors, fields: Fields) -> None:
    """There are five experts."""
    for part in "AB":
        tensors[f"{OUTER}.5.down_proj.lora_{part}.weight"] = tensors[f"{THIRD}.lora_{part}.weight"].clone()


def half(tensors: Tensors, fields: Fields) -> None:
    """One expert's B is not there."""
    del tensors[f"{THIRD}.lora_B.weight"]


def long(tensors: Tensors, fields: Fields) -> None:
    """One expert's matrix is of another size."""
    b = tensors[f"{THIRD}.lora_B.weight"]
    tensors[f"{THIRD}.lora_B.weight"] = torch.cat([b, b[:1]])


def few(tensors: Tensors, fields: Fields) -> None:
    """A stack of four for a layer of five."""
    for part in "AB":
        key = f"{OUTER}.down_proj.lora_{part}.weight"
        tensors[key] = tensors[key][:4].clone()


def uneven(tensors: Tensors, fields: Fields) -> None:
    """Ranks of the two stacks differ."""
    key = f"{OUTER}.down_proj.lora_A.weight"
    tensors[key] = tensors[key][:, 1:].clone()


REFUSED: Final[list[tuple[str, Change, str]]] = [
    ("experts", short, r"experts"),
    ("experts", narrow, r"experts"),
    ("experts", lacking, r"experts\.lora_A\.weight has no B"),
    ("experts", deeper, r"experts"),
    ("experts", shallow, r"experts"),
    ("experts", elsewhere, r"experts"),
    ("experts", unheard, r"lora_B_layout"),
    ("experts-apart", beyond, r"experts\.5\.down_proj"),
    ("experts-apart", half, r"experts\.3\.down_proj"),
    ("experts-apart", long, r"experts\.3\.down_proj"),
    ("experts-megatron", few, r"experts\.down_proj"),
    ("experts-megatron", uneven, r"experts\.down_proj"),
]


@pytest.mark.parametrize("family", ["qwen3-moe", "qwen3-moe-fused"])
@pytest.mark.parametrize(("option", "change", "words"), REFUSED, ids=[change.__name__ for _, change, _ in REFUSED])
def test_what_cannot_be_is_refused(
    family: str, option: str, change: Change, words: str, bases: Path, tmp_path: Path
) -> None:
    case = Case(FAMILIES[family], OPTIONS[option])
    base = base_of(case.family, bases)
    adapter = make(case, base, tmp_path / "case", mergeable=False).adapter
    tensors, file = read_tensors(adapter), adapter / "adapter_config.json"
    fields = json.loads(file.read_text())
    merge(base, [adapter], tmp_path / "whole", undo=False)
    change(tensors, fields)
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    file.write_text(json.dumps(fields))
    with pytest.raises(LoraCliError, match=words):
        merge(base, [adapter], tmp_path / "merged", undo=False)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("option", ["experts", "experts-apart", "experts-megatron"])
def test_another_number_of_experts_is_refused(option: str, bases: Path, tmp_path: Path) -> None:
    case = Case(FAMILIES["qwen3-moe"], OPTIONS[option])
    adapter = make(case, base_of(case.family, bases), tmp_path / "case", mergeable=False).adapter
    fewer = base_of(replace(case.family, name="fewer", build=qwen3_moe(experts=4)), bases)
    with pytest.raises(LoraCliError, match="experts"):
        merge(fewer, [adapter], tmp_path / "merged", undo=False)
    assert not (tmp_path / "merged").exists()
