"""Which LoRA layer goes around which layer."""

from __future__ import annotations

from typing import Any

from torch import nn

from lora_cli.adapters.modules import Kind
from lora_cli.errors import UnsupportedError, UsageError
from lora_cli.nn.attention import LoRAMultiheadAttention
from lora_cli.nn.conv import LoRAConv
from lora_cli.nn.embedding import LoRAEmbedding
from lora_cli.nn.grouped import LoRAGroupedLinear
from lora_cli.nn.layer import LoRALayer
from lora_cli.nn.linear import LoRAConv1D, LoRALinear
from lora_cli.nn.parameters import LoRAParameters

CLASSES: tuple[type[LoRALayer], ...] = (
    LoRALinear,
    LoRAConv1D,
    LoRAEmbedding,
    LoRAConv,
    LoRAGroupedLinear,
    LoRAMultiheadAttention,
)
"""Every LoRA layer. No layer is for two of them."""


def wrap(layer: nn.Module, parameters: LoRAParameters | None = None, **fields: Any) -> LoRALayer:
    """Put a LoRA layer around a layer, which is frozen and not copied.

    Args:
        layer: Linear, also transformers' Conv1D, an embedding, a convolution, a grouped linear layer, or attention.
        parameters: Of its adapter. Without them, and without fields, it gets no adapter yet.
        **fields: Fields of `LoRAParameters`, in the place of `parameters`.

    Raises:
        UnsupportedError: A layer that takes no adapters; names its type.
        UsageError: Parameters and fields, or a value that makes no sense.
    """
    if parameters is not None and fields:
        raise UsageError("Give parameters or their fields, not both", found=", ".join(fields))
    if isinstance(layer, LoRALayer):
        raise UnsupportedError(
            "The layer has adapters already", found=type(layer).__name__, hint="add another with add_adapter"
        )
    found = _class_for(layer)
    if found is None:
        supported = [name for cls in CLASSES for name in _types(cls)]
        raise UnsupportedError(
            "Layers of this type take no adapter", found=type(layer).__name__, expected=", ".join(supported)
        )
    return found(layer, LoRAParameters(**fields) if fields else parameters)


def kind_of(layer: nn.Module) -> Kind | None:
    """What a layer computes, or None where there is no LoRA layer for its type.

    Some layers of a known type are refused all the same, by `wrap` and with the reason: quantised ones, for example.
    """
    found = _class_for(layer)
    return found.kind if found else None


def _class_for(layer: nn.Module) -> type[LoRALayer] | None:
    return next((cls for cls in CLASSES if cls.takes(layer)), None)


def _types(cls: type[LoRALayer]) -> list[str]:
    """What the layers are called that a LoRA layer goes around."""
    return ["transformers' Conv1D"] if cls is LoRAConv1D else [kind.__name__ for kind in cls.layers]
