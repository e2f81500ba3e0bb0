"""Which packing trained factors of experts look like: seen in those that were trained, and in nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from safetensors.torch import save_file

from lora_cli.adapters.expert_layout import ExpertLayout
from lora_cli.adapters.source import ReadOptions
from lora_cli.surgery.looks.packing import doubts, monotone
from lora_cli.surgery.merge import merge, plan_merge
from lora_cli.surgery.placing import PlanOptions

LAYERS: Final = 3
OUT, IN = 24, 16
Factors = list[tuple[torch.Tensor, torch.Tensor]]
"""A (experts, rank, in) and B (experts, out, rank) for each layer."""


@cache
def trained(experts: int, rank: int) -> Factors:
    """Trained by AdamW on tokens of which each expert gets its own share."""
    found = []
    for layer in range(LAYERS):
        draw = torch.Generator().manual_seed(layer)
        share = (1.0 / torch.arange(1, experts + 1))[torch.randperm(experts, generator=draw)]
        wanted = torch.randn(experts, OUT, IN, generator=draw) / 50
        a = ((torch.rand(experts, rank, IN, generator=draw) * 2 - 1) / 4).requires_grad_()
        b = torch.zeros(experts, OUT, rank, requires_grad=True)
        optimizer = torch.optim.AdamW([a, b], lr=1e-3)
        for _ in range(50):
            expert = torch.multinomial(share, 96, replacement=True, generator=draw)
            x = torch.randn(96, IN, 1, generator=draw)
            loss = ((wanted - b @ a)[expert] @ x).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found.append((a.detach(), b.detach()))
    return found


def drawn(experts: int, rank: int) -> Factors:
    draw = torch.Generator().manual_seed(experts * rank)
    return [
        (torch.randn(experts, rank, IN, generator=draw), torch.randn(experts, OUT, rank, generator=draw))
        for _ in range(LAYERS)
    ]


def truncated(experts: int, rank: int) -> Factors:
    """The largest singular values of random changes, all of them in B."""
    draw = torch.Generator().manual_seed(experts * rank)
    changes = [torch.randn(experts, OUT, IN, generator=draw) for _ in range(LAYERS)]
    parts = [torch.linalg.svd(change) for change in changes]
    return [(v[:, :rank], u[..., :rank] * s[:, None, :rank]) for u, s, v in parts]


def unused(experts: int, rank: int) -> Factors:
    return [(a, torch.zeros_like(b)) for a, b in drawn(experts, rank)]


def fastest(b: torch.Tensor) -> torch.Tensor:
    return b.permute(1, 2, 0).flatten(1)


def slowest(b: torch.Tensor) -> torch.Tensor:
    return b.permute(1, 0, 2).flatten(1)


Pack = Callable[[torch.Tensor], torch.Tensor]


def saved(folder: Path, factors: Factors, pack: Pack, **config: Any) -> tuple[Path, Path]:
    """A base and an adapter."""
    base, adapter = folder / "base.safetensors", folder / "adapter"
    adapter.mkdir()
    experts, rank, _ = factors[0][0].shape
    names = [f"layers.{layer}.experts" for layer in range(len(factors))]
    save_file({f"{name}.up_proj": torch.zeros(experts, OUT, IN) for name in names}, base)
    tensors = {}
    for name, (a, b) in zip(names, factors, strict=True):
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.flatten(0, 1).contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = pack(b).contiguous()
    save_file(tensors, adapter / "adapter_model.safetensors")
    plain = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_parameters": ["experts.up_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(plain | config))
    return base, adapter


def said(folder: Path, factors: Factors, pack: Pack, layout: str | None = None) -> list[str]:
    options = PlanOptions(read=ReadOptions(expert_layout=ExpertLayout.parse(layout) if layout else ExpertLayout()))
    base, adapter = saved(folder, factors, pack)
    return list(doubts(plan_merge(base, [adapter], options)))


SIZES: Final = [(32, 4), (8, 16), (8, 8)]


@pytest.mark.parametrize(("experts", "rank"), SIZES)
@pytest.mark.parametrize("pack", [fastest, slowest])
@pytest.mark.parametrize("layout", ["fastest", "slowest"])
def test_trained_factors_tell_their_packing(tmp_path: Path, experts: int, rank: int, pack: Pack, layout: str) -> None:
    words = said(tmp_path, trained(experts, rank), pack, layout)
    if layout == pack.__name__:
        assert words == []
    else:
        (line,) = words
        assert line.startswith("adapter: ")
        assert f"--expert-layout {pack.__name__}" in line


@pytest.mark.parametrize(("experts", "rank"), [*SIZES, (2, 2), (32, 1), (1, 4)])
@pytest.mark.parametrize("factors", [drawn, truncated, unused])
@pytest.mark.parametrize("layout", ["fastest", "slowest"])
def test_others_tell_nothing(
    tmp_path: Path, experts: int, rank: int, factors: Callable[[int, int], Factors], layout: str
) -> None:
    pack = fastest if layout == "fastest" else slowest
    assert said(tmp_path, factors(experts, rank), pack, layout) == []


def test_a_merge_tells_it_unless_someone_said_it(tmp_path: Path) -> None:
    base, adapter = saved(tmp_path, trained(32, 4), slowest)

    def words(**read: Any) -> list[str]:
        result = merge(base, [adapter], tmp_path / "out.safetensors", PlanOptions(read=ReadOptions(**read)), force=True)
        return [warning for warning in result.warnings if "expert-layout" in warning]

    assert len(words()) == 1
    assert words(expert_layout=ExpertLayout.parse("fastest")) == []
    assert len(words(expert_layout=ExpertLayout.parse("columns"))) == 1
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_B_layout": "rank_major"}))
    assert words() == []


def test_the_nearest_monotone_numbers() -> None:
    assert monotone([4.0, 1.0, 3.0, 0.0]) == [4.0, 2.0, 2.0, 0.0]
    assert monotone([0.0, 3.0, 1.0, 4.0]) == [0.0, 2.0, 2.0, 4.0]
    assert monotone([5.0]) == [5.0]
    assert monotone([1.0, 2.0, 3.0]) == [1.0, 2.0, 3.0]
