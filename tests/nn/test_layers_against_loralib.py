"""LoRA layers against those of loralib, the paper's own code: the same factors, before and after merging."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import loralib
import pytest
import torch
from layer_world import is_close, learn
from torch import nn

from lora_cli.nn.wrap import wrap

LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 5), lambda: loralib.Linear(6, 5, r=3, lora_alpha=4), (2, 6)),
    "embedding": (lambda: nn.Embedding(9, 5), lambda: loralib.Embedding(9, 5, r=3, lora_alpha=4), (2, 4)),
    "conv2d": (
        # loralib has rank · kernel rows in A: 3 here is 1 · 3, and one column of the kernel is one output of B.
        lambda: nn.Conv2d(4, 5, 1, stride=2),
        lambda: loralib.Conv2d(4, 5, 1, r=3, lora_alpha=4, stride=2),
        (2, 4, 5, 5),
    ),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_what_a_layer_gives_is_what_loralib_gives(kind: str) -> None:
    make, make_theirs, shape = LAYERS[kind]
    layer: Any = wrap(make().double(), rank=3, alpha=4)
    theirs = make_theirs().double()
    learn(layer)
    target = theirs.conv if kind == "conv2d" else theirs
    target.weight.data.copy_(layer.base_weight)
    if kind != "embedding":
        target.bias.data.copy_(layer.base.bias)
    theirs.lora_A.data.copy_(layer.lora_A.weight.flatten(1))
    theirs.lora_B.data.copy_(layer.lora_B.weight.flatten(1))
    generator = torch.Generator().manual_seed(2)
    x = torch.randint(9, shape, generator=generator) if kind == "embedding" else torch.randn(shape, generator=generator)
    x = x.double() if x.is_floating_point() else x
    found, expected = layer(x), theirs(x)
    assert is_close(found, expected, 1e-13)
    found.square().sum().backward()
    expected.square().sum().backward()
    assert is_close(layer.lora_A.weight.grad.flatten(1), theirs.lora_A.grad, 1e-12)
    assert is_close(layer.lora_B.weight.grad.flatten(1), theirs.lora_B.grad, 1e-12)
    layer.merge()
    theirs.train(False)  # loralib merges here
    assert is_close(layer.base_weight, target.weight, 1e-6)
