"""What an adapter for a live model is to be like: one validated value."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch

from lora_cli.adapters.fresh import FreshOptions, check
from lora_cli.adapters.modules import Module
from lora_cli.adapters.patterns import compile_user_pattern
from lora_cli.checkpoint.dtypes import DTYPES
from lora_cli.nn.parameters import LoRAParameters
from lora_cli.nn.starts import Start

Bias = Literal["none", "all", "lora_only"]

_NUMBER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(FreshOptions):
    """What an adapter for a live model is to be like.

    Rank, alpha, targets, exclusions, init, scaling, type and seed mean what they mean to `lora-cli inject`: one seed
    gives the same factors there and here.

    Attributes:
        dropout: Probability with which numbers on the way into an adapter are left out in training.
        dora: Learn the length of each output's weights apart from their direction.
        layers: Numbers of the layers that get factors: the first number in a module's name counts. All unless given.
        layers_within: What the list of layers is called, such as `encoder.layer`, where a model has several.
        bias: Which biases are trained: `none`, `all` of the model, or those of layers that get factors (`lora_only`).
        rank_pattern: Other ranks, by patterns on module names; the first that matches counts.
        alpha_pattern: Other alphas, likewise.
        modules_to_save: Patterns of modules that are trained whole and saved with the adapter, such as a new head.

    Raises:
        UsageError: A value that makes no sense; names the field.
    """

    rank: int = 8
    dropout: float = 0.0
    dora: bool = False
    layers: tuple[int, ...] | None = None
    layers_within: str | None = None
    bias: Bias = "none"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check what was said."""
        super().__post_init__()
        self._tuple_of("layers", int)
        self._tuple_of("modules_to_save", str)
        check(self.bias in get_args(Bias), "bias", ", ".join(get_args(Bias)), self.bias)
        check(
            not (self.dora and self.principal),
            "dora",
            f"not with the init {self.init}, which changes the base",
            self.dora,
        )
        for pattern in (*self.rank_pattern, *self.alpha_pattern, *self.modules_to_save):
            compile_user_pattern(pattern)
        check(
            self.layers_within is None or self.layers is not None,
            "layers_within",
            "only with layers",
            self.layers_within,
        )
        # Each set of parameters that can come out is looked at once, here.
        LoRAParameters(rank=self.rank, alpha=self.alpha, dropout=self.dropout)
        for rank in self.rank_pattern.values():
            LoRAParameters(rank=rank)
        for alpha in self.alpha_pattern.values():
            LoRAParameters(alpha=alpha)

    def _tuple_of(self, name: str, kind: type) -> None:
        given = getattr(self, name)
        if given is None:
            return
        values = (given,) if isinstance(given, kind) else tuple(given)
        right = all(isinstance(value, kind) and not isinstance(value, bool) for value in values)
        check(right, name, f"a row of {kind.__name__}", given)
        object.__setattr__(self, name, values)

    def takes_layer(self, module: Module) -> bool:
        """Whether a module is in one of the layers that were asked for."""
        if self.layers is None:
            return True
        name = module.name
        if self.layers_within is not None:
            _, found, name = f".{name}.".partition(f".{self.layers_within}.")
            if not found:
                return False
        number = _NUMBER.search(name)
        return number is not None and int(number[1]) in self.layers

    def parameters_for(self, module: str) -> LoRAParameters:
        """Rank, strength and the rest of the adapter of one module."""
        return LoRAParameters(
            rank=_first(self.rank_pattern, module, self.rank),
            alpha=_first(self.alpha_pattern, module, self.alpha),
            dropout=self.dropout,
            rslora=self.rslora,
            dora=self.dora,
            dtype=getattr(torch, str(DTYPES[self.storage.name].torch_name)),
        )

    def start_for(self, module: str) -> Start:
        """How the factors of one module begin."""
        return Start(self.init, module, self.seed, self.width)


def _first(patterns: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    return next((v for pattern, v in patterns.items() if compile_user_pattern(pattern)(module)), otherwise)
