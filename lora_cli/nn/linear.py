"""LoRA beside a linear layer, also one that stores its weight (in × out) as GPT-2's Conv1D does."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional

from lora_cli.adapters.modules import Kind
from lora_cli.nn.layer import LoRALayer


class LoRALinear(LoRALayer):
    """LoRA beside `torch.nn.Linear`, with or without a bias: W (out × in), A (rank × in), B (out × rank)."""

    kind: ClassVar[Kind] = "linear"
    layers: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)

    def _check_base(self) -> None:
        super()._check_base()
        if isinstance(self.base, nn.Linear) and type(self.base).forward is not nn.Linear.forward:
            self._refuse_base("it computes in a way of its own, which a change of its weight may not follow")

    def low_rank(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return B·A·x in the factors' type, without the scale: two thin products."""
        return functional.linear(functional.linear(x.to(a.dtype), a), b)

    def base_product(self, x: Tensor) -> Tensor:
        """Return W·x."""
        weight = self.base_weight
        return functional.linear(x.to(weight.dtype), weight.T if self.transposed else weight)


class LoRAConv1D(LoRALinear):
    """LoRA beside transformers' `Conv1D`, a linear layer whose weight is stored (in × out)."""

    @classmethod
    def takes(cls, layer: nn.Module) -> bool:
        """Whether it is one, told by its name and its shape: transformers need not be there."""
        weight = layer._parameters.get("weight")
        named = any(kind.__name__ == "Conv1D" for kind in type(layer).__mro__)
        return named and weight is not None and weight.dim() == 2 and hasattr(layer, "nf")

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored (in × out): always."""
        return True
