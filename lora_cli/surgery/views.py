"""The names under which a model knows the tensors of a checkpoint, where these are more than the checkpoint's keys.

A tied tensor has two names and is stored once. A model whose layers repeat those of its files (`layer_replication`)
has a name for each repetition. An adapter may change what stands under one name and not what stands under another;
then the output stores them apart.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lora_cli.checkpoint.checkpoint import StoredTensor
from lora_cli.checkpoint.repairs import counts_layers, numbered_layers
from lora_cli.errors import NamesError, WrongInputError

_LAYER = re.compile(r"((?:.*\.)?(?:layers|layer|h|blocks|block)\.)(0|[1-9][0-9]{0,8})(\..+)", re.DOTALL)


@dataclass(frozen=True)
class Views:
    """Every name that a change can be for.

    Attributes:
        tensors: Name → the stored tensor that is known by it.
        tied: Name that the checkpoint does not have → the key that it shares a tensor with.
        layers: The stored layer of each layer of the output; None where they are the same.
        stored: Where they are not, how many layers the checkpoint has.
    """

    tensors: Mapping[str, StoredTensor]
    tied: Mapping[str, str] = field(default_factory=dict)
    layers: tuple[int, ...] | None = None
    stored: int = 0

    def group(self, name: str) -> tuple[str, ...]:
        """The names that share a tensor with `name` by a tie, itself among them, the stored one first."""
        key = self.tied.get(name, name)
        return (key, *(alias for alias, stored in self.tied.items() if stored == key))

    def names(self, tensor: StoredTensor) -> tuple[str, ...]:
        """Names of a stored tensor, those that it has by a tie apart; none of a layer that the model leaves out."""
        return self._names.get((tensor.shard.name, tensor.key), ())

    @cached_property
    def _names(self) -> Mapping[tuple[str, str], tuple[str, ...]]:
        found: defaultdict[tuple[str, str], tuple[str, ...]] = defaultdict(tuple)
        for name, tensor in self.tensors.items():
            if name not in self.tied:
                found[tensor.shard.name, tensor.key] += (name,)
        return found


def views_of(
    tensors: Mapping[str, StoredTensor], tied: Mapping[str, str], layers: tuple[int, ...] | None, *, file: str
) -> Views:
    """Find the names that changes can be for.

    Args:
        tensors: The checkpoint's tensors by key.
        tied: Name that is not among them → the key that it shares a tensor with.
        layers: The stored layer of each layer of the model, where they repeat.
        file: The checkpoint's label, for messages.

    Raises:
        NamesError: Layers are to be repeated, and it is not plain which tensors they have.
        WrongInputError: They are not the layers that the checkpoint has.
    """
    named, stored = (dict(tensors), 0) if layers is None else _repeated(tensors, layers, file)
    tied = {alias: key for alias, key in tied.items() if key in named and alias not in named}
    return Views(named | {alias: named[key] for alias, key in tied.items()}, tied, layers, stored)


def layer_warnings(views: Views, config: Mapping[str, Any], *, file: str) -> list[str]:
    """What a config says of layers that is not said anew where they repeat.

    Args:
        views: The names of the checkpoint's tensors.
        config: Its config, as it was.
        file: The checkpoint's label.
    """
    if views.layers is None or not config:
        return []
    became = f"{views.stored} layers became {len(views.layers)}"
    if not counts_layers(config, views.stored):
        return [f"{file}: {became}, and config.json names no such number; set it to {len(views.layers)}"]
    numbered = ", ".join(numbered_layers(config, views.stored))
    return [f"{file}: {became}, and config.json lists numbers of them as they were: {numbered}"] if numbered else []


def _repeated(
    tensors: Mapping[str, StoredTensor], layers: tuple[int, ...], file: str
) -> tuple[dict[str, StoredTensor], int]:
    """Every name with its tensor, and the number of stored layers."""
    matches = {key: match for key in tensors if (match := _LAYER.fullmatch(key))}
    stacks = Counter(match[1] for match in matches.values())
    if len(stacks) != 1:
        raise NamesError(
            "Layers are to be repeated, and nothing tells which",
            file=file,
            expected="one stack of layers",
            found=", ".join(stacks) or "none",
        )
    stored = {int(match[2]) for match in matches.values()}
    if not set(layers) <= stored:
        raise WrongInputError(
            "The adapter is for a model with other layers",
            file=file,
            expected=f"layers up to {max(layers)}, as layer_replication says",
            found=f"layers up to {max(stored)}",
            hint="name the base that the adapter was trained on, with its layers not yet repeated",
        )
    copies: defaultdict[int, list[int]] = defaultdict(list)
    for number, layer in enumerate(layers):
        copies[layer].append(number)
    named: dict[str, StoredTensor] = {}
    for key, tensor in tensors.items():
        match = matches.get(key)
        if match is None:
            named[key] = tensor
        else:
            named.update({f"{match[1]}{number}{match[3]}": tensor for number in copies[int(match[2])]})
    return named, len(stored)
