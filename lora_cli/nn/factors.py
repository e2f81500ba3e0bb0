"""One tensor for each adapter of a layer, under the names that checkpoints have for it."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from lora_cli.errors import NamesError, UsageError

DEFAULT = "default"
"""The adapter that is meant where none is named."""


class Factors(nn.Module):
    """Tensors by adapter: that of `default` is at `weight`, as wrapped checkpoints have it, others at `NAME.weight`."""

    weight: nn.Parameter

    def put(self, name: str, tensor: Tensor) -> None:
        """Store the tensor of an adapter as a parameter.

        Raises:
            UsageError: The name cannot be a part of a key.
            NamesError: There is such an adapter already.
        """
        if name in self:
            raise NamesError("There is an adapter of this name already", found=name)
        if name == DEFAULT:
            self.register_parameter("weight", nn.Parameter(tensor))
            return
        if not name.isidentifier() or name == "weight" or hasattr(nn.ModuleDict, name) or hasattr(self, name):
            raise UsageError("An adapter's name is a plain word that torch does not use itself", found=name)
        holder = nn.Module().train(self.training)
        holder.register_parameter("weight", nn.Parameter(tensor))
        self.add_module(name, holder)

    def remove(self, name: str) -> None:
        """Forget the tensor of an adapter."""
        if name == DEFAULT:
            del self.weight
        else:
            delattr(self, name)

    def __getitem__(self, name: str) -> nn.Parameter:
        """The tensor of an adapter.

        Raises:
            KeyError: There is none.
        """
        holder = self if name == DEFAULT else self._modules[name]
        parameter = None if holder is None else holder._parameters.get("weight")
        if parameter is None:
            raise KeyError(name)
        return parameter

    def __contains__(self, name: str) -> bool:
        return name in list(self)

    def __iter__(self) -> Iterator[str]:
        if "weight" in self._parameters:
            yield DEFAULT
        yield from self._modules
