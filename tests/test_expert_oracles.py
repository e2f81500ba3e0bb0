"""The other formats of adapters for stacked experts, by the formulas that their makers give, against PEFT's own merge.

Nothing of `lora_cli` is used here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
import torch
from expert_families import EXPERTS
from family_cases import FAMILIES, OPTIONS, Case, base_of, make
from models import read_tensors

Tensors = dict[str, torch.Tensor]
Delta = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

MODULE: Final = "model.layers.1.mlp.experts"
PATH: Final = f"base_model.model.{MODULE}"
SCALE: Final = 6 / 4
INPUTS_FIRST: Final = {"qwen3-moe-fused": False, "gpt-oss": True}
"""Whether a matrix is (in, out); there, gate and up take turns as well."""


def packed(sides: str, *, slow: bool = False) -> Delta:
    """PEFT's einsum for 2-D factors; `sides` are the parameter's dimensions, of e, i (A's) and o (B's)."""

    def delta(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        split = b.reshape(len(b), EXPERTS, -1) if slow else b.reshape(len(b), -1, EXPERTS)
        return torch.einsum(f"{'oer' if slow else 'ore'},eri->{sides}", split, a.reshape(EXPERTS, -1, a.shape[-1]))

    return delta


def two(delta: Delta) -> Callable[[Tensors], list[torch.Tensor]]:
    """Of PEFT's two nested names."""
    names = (f"{PATH}.base_layer", PATH)
    return lambda held: [delta(held[f"{name}.lora_A.weight"], held[f"{name}.lora_B.weight"]) for name in names]


def joined(gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, *, turns: bool) -> list[torch.Tensor]:
    """Three changes (experts, out, in) as two of the parameters."""
    if turns:
        return [torch.stack([gate, up], 2).flatten(1, 2).mT, down.mT]
    return [torch.cat([gate, up], 1), down]


def megatron(held: Tensors, *, first: bool) -> list[torch.Tensor]:
    names = [f"{PATH}.{name}" for name in ("gate_up_proj", "down_proj")]
    changes = [held[f"{name}.lora_B.weight"] @ held[f"{name}.lora_A.weight"] for name in names]
    return [change.mT if first else change for change in changes]


def tinker(held: Tensors, *, first: bool) -> list[torch.Tensor]:
    names = [f"{PATH}.{name}" for name in ("w1", "w3", "w2")]
    gate, up, down = (held[f"{name}.lora_B.weight"] @ held[f"{name}.lora_A.weight"] for name in names)
    return joined(gate, up, down, turns=first)


def torchtune(held: Tensors, *, first: bool) -> list[torch.Tensor]:
    parts = ("gate", "up", "down")
    gate, up, down = ((held[f"{PATH}.lora_{part}_a"] @ held[f"{PATH}.lora_{part}_b"]).mT for part in parts)
    return joined(gate, up, down, turns=first)


def apart(held: Tensors, *, first: bool) -> list[torch.Tensor]:
    def changes(part: str) -> torch.Tensor:
        names = [f"{PATH}.{expert}.{part}_proj" for expert in range(EXPERTS)]
        return torch.stack([held[f"{name}.lora_B.weight"] @ held[f"{name}.lora_A.weight"] for name in names])

    return joined(*map(changes, ("gate", "up", "down")), turns=first)


def formula(form: str, *, first: bool) -> Callable[[Tensors], list[torch.Tensor]]:
    today, other = ("eio", "eoi") if first else ("eoi", "eio")
    packings = {
        "experts": packed(today),
        "experts-fastest": packed(today),
        "experts-grouped": packed(today, slow=True),
        "experts-018": packed("eio"),
        "experts-unversioned": packed("eio"),
        "experts-019": packed(other),
        "experts-vllm": lambda a, b: torch.einsum(f"ore,eri->{today}", b, a),
    }
    if form in packings:
        return two(packings[form])
    parts = {
        "experts-megatron": megatron,
        "experts-tinker": tinker,
        "experts-tinker-shared": tinker,
        "experts-torchtune": torchtune,
        "experts-apart": apart,
        "experts-apart-ranks": apart,
    }
    return lambda held: parts[form](held, first=first)


FORMS: Final = """
    experts experts-fastest experts-grouped experts-018 experts-unversioned experts-019
    experts-vllm experts-megatron experts-tinker experts-tinker-shared experts-torchtune
    experts-apart experts-apart-ranks"""


@pytest.mark.parametrize("form", FORMS.split())
@pytest.mark.parametrize("family", INPUTS_FIRST)
def test_a_format_means_the_change_that_was_trained(family: str, form: str, tmp_path: Path) -> None:
    case = Case(FAMILIES[family], OPTIONS[form])
    base = base_of(case.family, tmp_path)
    made = make(case, base, tmp_path / "case")
    assert made.merged is not None
    before = read_tensors(base)
    names = [f"{MODULE}.{name}" for name in ("gate_up_proj", "down_proj")]
    expected = [made.merged[name] - before[name].double() for name in names]
    found = formula(form, first=INPUTS_FIRST[family])(
        {key: tensor.double() for key, tensor in read_tensors(made.adapter).items()}
    )
    for change, trained in zip(found, expected, strict=True):
        torch.testing.assert_close(change * SCALE, trained, atol=1e-9, rtol=1e-9)
        assert trained.abs().max() > 1e-3
