"""What is trained whole beside the adapters: biases, and modules that are saved with the adapter, buffers and all."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lora_cli.adapters.patterns import compile_user_pattern
from lora_cli.errors import NamesError, UsageError
from lora_cli.nn.config import Bias
from lora_cli.nn.layer import LoRALayer


class Wholes:
    """What is trained whole, by its plain names, and what it was before.

    Args:
        state: Gives the model's parameters and buffers as they are now, by their plain names.
    """

    def __init__(self, state: Callable[[], Mapping[str, Tensor]]) -> None:
        self._state = state
        self._before: dict[str, Tensor] = {}
        self._adapters: dict[str, set[str]] = {}
        self._swapped = False

    def train(self, names: Collection[str], adapter: str) -> None:
        """Let parameters ask for gradients, and keep what they are; buffers move by themselves.

        Args:
            names: Their names in a plain checkpoint.
            adapter: With which adapter they are trained. There may be several.
        """
        state = self._state()
        for name in names:
            if name not in self._before:
                self._before[name] = state[name].detach().cpu().clone()
            self._adapters.setdefault(name, set()).add(adapter)
            if isinstance(state[name], nn.Parameter):
                state[name].requires_grad_(True)

    def ask(self) -> None:
        """Let everything that is trained whole ask for gradients again."""
        state = self._state()
        for tensor in (state[name] for name in self._before):
            if isinstance(tensor, nn.Parameter):
                tensor.requires_grad_(True)

    def renew(self) -> None:
        """Take what is there now for what was before the training."""
        state = self._state()
        self._before = {name: state[name].detach().cpu().clone() for name in self._before}

    def clear(self) -> None:
        """Forget everything, and leave it as it is."""
        self._before.clear()
        self._adapters.clear()

    def shared_with(self, names: Collection[str]) -> list[str]:
        """Those of these names that are trained whole already."""
        return sorted(set(names) & set(self._before))

    def of(self, adapter: str) -> dict[str, Tensor]:
        """What is trained with an adapter, as it is now.

        Raises:
            UsageError: What was before is in its place (see `swapped`).
        """
        self.refuse_while_swapped()
        state = self._state()
        return {name: state[name] for name, adapters in self._adapters.items() if adapter in adapters}

    @torch.no_grad()
    def restore(self, adapter: str) -> None:
        """Give back what was trained with an adapter, and freeze it, unless another one has it too."""
        for name, tensor in self.of(adapter).items():
            self._adapters[name].discard(adapter)
            if not self._adapters[name]:
                del self._adapters[name]
                tensor.copy_(self._before.pop(name))
                tensor.requires_grad_(False)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Compute with what was before for a while."""
        state = self._state()
        trained = {name: state[name].data for name in self._before}
        for name, data in trained.items():
            state[name].data = self._before[name].to(data.device, data.dtype, copy=True)
        self._swapped = True
        try:
            yield
        finally:
            self._swapped = False
            for name, data in trained.items():
                state[name].data = data

    def refuse_while_swapped(self) -> None:
        """Refuse to give what is trained while what was before is in its place."""
        if self._swapped and self._before:
            what = "The adapters are disabled, so what was trained is not in the model"
            raise UsageError(what, hint="leave disabled() first")


def biases(model: nn.Module, which: Bias, layers: Mapping[str, LoRALayer]) -> list[str]:
    """The biases that are trained, by their names in the injected model.

    Args:
        model: The injected model.
        which: `none`, `all`, or those of the LoRA layers.
        layers: The LoRA layers.
    """
    if which == "none":
        return []
    own = {id(p) for layer in layers.values() for p in layer.base.parameters()}
    named = model.named_parameters(remove_duplicate=False)
    return [name for name, p in named if name.endswith("bias") and (which == "all" or id(p) in own)]


def saved_modules(model: nn.Module, patterns: Sequence[str], frozen: Collection[nn.Module]) -> list[str]:
    """What modules that are trained whole hold, by its names in the model.

    Args:
        model: The model.
        patterns: Say which modules.
        frozen: Layers that have or get factors: nothing of theirs can be trained whole.

    Raises:
        NamesError: A pattern that matches no module with parameters.
        UsageError: A module that gets factors as well, or shares a parameter with one that does.
    """
    taken = {id(parameter) for layer in frozen for parameter in layer.parameters()}
    found: list[str] = []
    for pattern in patterns:
        matches = compile_user_pattern(pattern)
        modules = {name: module for name, module in model.named_modules() if name and matches(name)}
        parameters = [p for module in modules.values() for p in module.parameters()]
        if not parameters:
            raise NamesError("A pattern matches no module with parameters", tensor="modules_to_save", found=pattern)
        doubly = [name for name, module in modules.items() if any(id(p) in taken for p in module.parameters())]
        if doubly:
            raise UsageError("A module cannot be trained whole and get factors", found=", ".join(doubly))
        found += [f"{name}.{key}" for name, module in modules.items() for key in module.state_dict()]
    return list(dict.fromkeys(found))
