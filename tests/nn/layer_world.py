"""Layers of every kind that takes adapters, with inputs, and adapters that do something."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from lora_cli.nn.grouped import GroupedLinear
from lora_cli.nn.layer import LoRALayer
from lora_cli.nn.wrap import wrap

RANK: Final = 3
SIZES: Final = (2, 0, 3)
"""Rows of each group: one group is empty."""


@dataclass(frozen=True)
class Case:
    """A layer, and how it is called.

    Attributes:
        make: Makes the layer, with weights that do not depend on what ran before.
        inputs: Makes its inputs; those of floating type come first.
        keys: Of the weights that get an adapter, by where the adapter is in the LoRA layer.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    keys: tuple[str, ...] = ("weight",)


def _floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def _tokens() -> tuple[Tensor, ...]:
    return (torch.tensor([[3, 0, 8], [3, 3, 1]]),)


CASES: Final[Mapping[str, Case]] = {
    "linear": Case(lambda: nn.Linear(6, 5), lambda: (_floats(2, 4, 6),)),
    "linear without bias": Case(lambda: nn.Linear(6, 5, bias=False), lambda: (_floats(4, 6),)),
    "gpt2": Case(lambda: Conv1D(5, 6), lambda: (_floats(2, 4, 6),)),
    "embedding": Case(lambda: nn.Embedding(9, 5), _tokens),
    "conv1d": Case(lambda: nn.Conv1d(4, 5, 3, stride=2), lambda: (_floats(2, 4, 11),)),
    "conv2d": Case(lambda: nn.Conv2d(4, 5, (3, 2), padding=(1, 0)), lambda: (_floats(2, 4, 5, 6),)),
    "conv2d without bias": Case(lambda: nn.Conv2d(4, 5, 1, bias=False), lambda: (_floats(2, 4, 3, 3),)),
    "conv3d": Case(lambda: nn.Conv3d(2, 4, 2), lambda: (_floats(1, 2, 3, 4, 3),)),
    "conv in groups": Case(lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: (_floats(2, 4, 5, 4),)),
    "grouped": Case(lambda: GroupedLinear(3, 6, 5), lambda: (_floats(5, 6), torch.tensor(SIZES))),
    "attention": Case(
        lambda: nn.MultiheadAttention(6, 2, batch_first=True),
        lambda: (_floats(2, 4, 6), _floats(3, 4, 6)[:2], _floats(5, 4, 6)[3:]),
        ("in_proj_weight", "out_proj.weight"),
    ),
}


def base_of(case: Case, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A plain layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        layer = case.make()
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.5)
    return layer.to(dtype)


def inputs_of(case: Case, dtype: torch.dtype = torch.float32, *, grad: bool = False) -> tuple[Tensor, ...]:
    """Its inputs."""
    return tuple(
        x.to(dtype).requires_grad_(grad) if x.is_floating_point() else x for x in (t.clone() for t in case.inputs())
    )


def dressed(case: Case, dtype: torch.dtype = torch.float32, /, **fields: Any) -> Any:
    """A LoRA layer whose adapter does something."""
    layer: LoRALayer = wrap(base_of(case, dtype), **({"rank": RANK, "alpha": 4.0} | fields))
    learn(layer)
    return layer


@torch.no_grad()
def learn(layer: LoRALayer, seed: int = 0) -> None:
    """Give factors and magnitudes the numbers that training might."""
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in layer.named_parameters():
        if "lora_magnitude" in key:
            stretch = 1 + 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.mul_(stretch.to(parameter.dtype))
        elif "lora_" in key:
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def call(layer: Any, inputs: tuple[Tensor, ...]) -> Tensor:
    """What a layer gives; of attention, what it attends to."""
    result = layer(*inputs)
    first: Tensor = result[0] if isinstance(result, tuple) else result
    return first


def parts_of(layer: LoRALayer) -> list[LoRALayer]:
    """The LoRA layers that a LoRA layer consists of, in the order of the keys of its case."""
    return [module for module in layer.modules() if isinstance(module, LoRALayer)]


def with_weights(case: Case, layer: LoRALayer, weights: list[Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
    """What a plain layer gives that has these weights, and the biases of a LoRA layer."""
    plain = base_of(case, weights[0].dtype)
    result = functional_call(plain, dict(zip(case.keys, weights, strict=True)), inputs)
    first: Tensor = result[0] if isinstance(result, tuple) else result
    return first


def is_close(found: Any, expected: Any, tolerance: float) -> bool:
    """Whether the largest difference is small beside the largest number."""
    assert found.shape == expected.shape
    difference = (found.detach().double() - expected.detach().double()).abs().max()
    return bool(difference <= tolerance * expected.detach().double().abs().max())
