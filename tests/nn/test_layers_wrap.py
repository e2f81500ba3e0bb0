"""Which layer gets which LoRA layer, what is refused by name, and the sizes of groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layer_world import CASES, base_of
from torch import nn
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

from lora_cli.errors import LoraCliError, ShapeError, UnsupportedError, UsageError
from lora_cli.nn.grouped import GroupedLinear
from lora_cli.nn.linear import LoRAConv1D, LoRALinear
from lora_cli.nn.parameters import LoRAParameters
from lora_cli.nn.wrap import kind_of, wrap

KINDS = dict.fromkeys(CASES, "conv") | {
    "linear": "linear",
    "linear without bias": "linear",
    "gpt2": "linear",
    "embedding": "embedding",
    "grouped": "grouped",
    "attention": "attention",
}


@pytest.mark.parametrize("kind", CASES)
def test_every_kind_is_told_by_its_type(kind: str) -> None:
    layer = base_of(CASES[kind])
    assert kind_of(layer) == KINDS[kind]
    wrapped = wrap(layer)
    assert wrapped.base is layer
    assert wrapped.kind == KINDS[kind]
    assert not wrapped.settings


def test_subclasses_are_what_they_descend_from() -> None:
    class Special(nn.Linear):
        pass

    assert type(wrap(Special(2, 3))) is LoRALinear
    assert type(wrap(nn.MultiheadAttention(4, 1).out_proj)) is LoRALinear
    assert type(wrap(Conv1D(3, 2))) is LoRAConv1D


def test_fields_are_those_of_the_parameters() -> None:
    assert wrap(nn.Linear(2, 3), rank=2, dora=True).settings == {"default": LoRAParameters(rank=2, dora=True)}
    given = LoRAParameters(alpha=3.0)
    assert wrap(nn.Linear(2, 3), given).settings["default"] is given
    with pytest.raises(UsageError, match="not both"):
        wrap(nn.Linear(2, 3), given, rank=2)


class Quantised(nn.Linear):
    """Stores integers, as 8-bit layers do."""

    def __init__(self) -> None:
        super().__init__(2, 3)
        self.weight = nn.Parameter(torch.zeros(3, 2, dtype=torch.int8), requires_grad=False)


class Standardised(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self._conv_forward(x, self.weight - self.weight.mean(), self.bias)
        return result


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.ConvTranspose2d(2, 3, 2), "ConvTranspose2d"),
        (nn.LSTM(2, 3), "LSTM"),
        (nn.Bilinear(2, 3, 4), "Bilinear"),
        (nn.EmbeddingBag(2, 3), "EmbeddingBag"),
        (nn.LayerNorm(3), "LayerNorm"),
        (wrap(nn.Linear(2, 3)), "already"),
        (Quantised(), "int8"),
        (nn.LazyLinear(3), "first input"),
        (parametrizations.weight_norm(nn.Linear(2, 3)), "no parameter of its own"),
        (Standardised(2, 3, 2), "a way of its own"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_layers_are_refused_by_name(layer: nn.Module, words: str) -> None:
    with pytest.raises(UnsupportedError) as refused:
        wrap(layer, rank=2)
    assert words in f"{refused.value} {refused.value.details}"
    assert type(layer).__name__ in str(refused.value)


def test_types_without_a_lora_layer_have_no_kind() -> None:
    assert [kind_of(layer) for layer in (nn.ConvTranspose1d(1, 1, 1), nn.GELU(), nn.Bilinear(1, 1, 1))] == [None] * 3


def test_a_lora_layer_made_directly_refuses_other_layers() -> None:
    layer = nn.Conv2d(2, 3, 1)
    with pytest.raises(UnsupportedError, match="Conv2d"):
        LoRALinear(layer, LoRAParameters())
    assert layer.weight.requires_grad


def test_constructors_take_a_layer_and_parameters() -> None:
    assert LoRALinear(nn.Linear(4, 3), LoRAParameters(rank=2, alpha=4, dropout=0.1)).lora_A.weight.shape == (2, 4)


def test_a_grouped_layer_is_a_linear_layer_for_each_group() -> None:
    torch.manual_seed(0)
    layer = GroupedLinear(3, 4, 5, dtype=torch.float64)
    assert layer.weight.shape == (3, 4, 5)
    assert 0.45 < layer.weight.abs().max().item() <= 0.5
    x, sizes = torch.randn(6, 4, dtype=torch.float64), torch.tensor([4, 0, 2])
    expected = torch.cat([x[:4] @ layer.weight[0], x[4:] @ layer.weight[2]])
    assert torch.equal(layer(x, sizes), expected)
    layer(x, sizes).sum().backward()
    assert layer.weight.grad is not None
    assert not layer.weight.grad[1].any()
    assert layer(x[:0], torch.zeros(3, dtype=torch.int64)).shape == (0, 5)
    before = layer.weight.detach().clone()
    layer.reset_parameters()
    assert not torch.equal(layer.weight, before)


@pytest.mark.parametrize(
    ("rows", "sizes"),
    [
        ((5, 4), [2, 2]),
        ((5, 4), [2, 2, 2]),
        ((5, 4), [6, -1, 0]),
        ((5, 4), [1, 1, 1, 2]),
        ((5, 2, 4), [2, 3, 0]),
        ((5, 4), [2.0, 3.0, 0.0]),
        ((5, 4), [[2, 3, 0]]),
    ],
    ids=str,
)
def test_groups_that_do_not_add_up_are_refused(rows: tuple[int, ...], sizes: list[Any]) -> None:
    layer = GroupedLinear(3, 4, 5)
    for module in (layer, wrap(layer, rank=2)):
        with pytest.raises(ShapeError, match="do not add up"):
            module(torch.zeros(rows), torch.tensor(sizes))


@pytest.mark.parametrize("fields", [{"rank": 0}, {"rank": True}, {"alpha": 0.0}, {"dropout": 1.0}], ids=str)
def test_parameters_that_make_no_sense_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(LoraCliError, match="makes no sense"):
        wrap(nn.Linear(2, 3), **fields)
