"""Parameters that are trained whole beside the adapters: biases, and modules that are saved with the adapter."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lora_cli.adapters.patterns import compile_user_pattern
from lora_cli.errors import NamesError, UsageError
from lora_cli.nn.config import Bias
from lora_cli.nn.layer import LoRALayer


class Wholes:
    """Parameters that are trained whole, by their plain names, and what they were before."""

    def __init__(self) -> None:
        self.parameters: dict[str, nn.Parameter] = {}
        self._before: dict[str, Tensor] = {}
        self._adapters: dict[str, set[str]] = {}

    def train(self, parameters: Mapping[str, nn.Parameter], adapter: str) -> None:
        """Let parameters ask for gradients, and keep what they are.

        Args:
            parameters: By their names in a plain checkpoint.
            adapter: With which adapter they are trained. There may be several.
        """
        for name, parameter in parameters.items():
            if name not in self.parameters:
                self.parameters[name] = parameter
                self._before[name] = parameter.detach().cpu().clone()
            self._adapters.setdefault(name, set()).add(adapter)
            parameter.requires_grad_(True)

    def of(self, adapter: str) -> dict[str, nn.Parameter]:
        """What is trained with an adapter."""
        return {name: p for name, p in self.parameters.items() if adapter in self._adapters[name]}

    @torch.no_grad()
    def restore(self, adapter: str) -> None:
        """Give back what the parameters of an adapter were, and freeze them, unless another one has them too."""
        for name in self.of(adapter):
            self._adapters[name].discard(adapter)
            if not self._adapters[name]:
                parameter = self.parameters.pop(name)
                parameter.copy_(self._before.pop(name))
                parameter.requires_grad_(False)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Compute with what the parameters were for a while."""
        trained = {name: parameter.data for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            parameter.data = self._before[name].to(parameter.device)
        try:
            yield
        finally:
            for name, data in trained.items():
                self.parameters[name].data = data


def biases(model: nn.Module, which: Bias, layers: Mapping[str, LoRALayer]) -> dict[str, nn.Parameter]:
    """The biases that are trained, by their names in the injected model.

    Args:
        model: The injected model.
        which: `none`, `all`, or those of the LoRA layers.
        layers: The LoRA layers.
    """
    if which == "none":
        return {}
    own = {id(p) for layer in layers.values() for p in layer.base.parameters()}
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.endswith("bias") and (which == "all" or id(parameter) in own)
    }


def saved_modules(model: nn.Module, patterns: Sequence[str], targets: Collection[str]) -> dict[str, nn.Parameter]:
    """The parameters of modules that are trained whole, by their names.

    Raises:
        NamesError: A pattern that matches no module with parameters.
        UsageError: A module that gets factors as well.
    """
    found: dict[str, nn.Parameter] = {}
    for pattern in patterns:
        compiled = compile_user_pattern(pattern)
        modules = {name: module for name, module in model.named_modules() if name and compiled.match(name)}
        doubly = sorted({name for name in modules for target in targets if f"{target}.".startswith(f"{name}.")})
        if doubly:
            raise UsageError("A module cannot be trained whole and get factors", found=", ".join(doubly))
        parameters = {f"{name}.{key}": p for name, module in modules.items() for key, p in module.named_parameters()}
        if not parameters:
            raise NamesError("A pattern matches no module with parameters", tensor="modules_to_save", found=pattern)
        found |= parameters
    return found
