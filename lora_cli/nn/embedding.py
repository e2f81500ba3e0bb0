"""LoRA beside a table of embeddings."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from lora_cli.adapters.modules import Kind
from lora_cli.nn.layer import LoRALayer
from lora_cli.nn.starts import Start


class LoRAEmbedding(LoRALayer):
    """LoRA beside `torch.nn.Embedding`: W (entries × dim), A (rank × entries), B (dim × rank), ΔW = s·(B·A)ᵀ.

    What is looked up in W is looked up in the columns of A and goes through B. A's column for padding gets no gradient,
    but B does, so what padding gives may change, as with PEFT. Gradients are divided by frequency if the layer has it
    so; those of A are dense also where those of W would be sparse. A subclass that does more than look up, such as one
    that scales what it finds, does it for A too: it must be linear in its weight. There is no dropout, as there are no
    numbers on the way in.
    """

    kind: ClassVar[Kind] = "embedding"
    layers: ClassVar[tuple[type[nn.Module], ...]] = (nn.Embedding,)

    def _check_base(self) -> None:
        super()._check_base()
        if self.base.max_norm is not None:
            self._refuse_base("max_norm rewrites the frozen table while it computes")

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored (in × out): always, as entries are what goes in."""
        return True

    def first_factor(self, start: Start, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Draw A."""
        return start.first_factor(shape, dtype, table=True)

    def low_rank(self, x: Tensor, a: Tensor, b: Tensor, *rest: Any) -> Tensor:
        """Return the columns of A that tokens mean, through B, in the factors' type."""
        return functional.linear(self._look_up(a.T, x, *rest), b)

    def base_product(self, x: Tensor, *rest: Any) -> Tensor:
        """Return what the frozen table has for these tokens."""
        return cast("Tensor", self.base(x, *rest))

    def _look_up(self, table: Tensor, x: Tensor, *rest: Any) -> Tensor:
        base = cast("nn.Embedding", self.base)
        if type(base).forward is not nn.Embedding.forward:
            return cast("Tensor", functional_call(base, {"weight": table}, (x, *rest)))
        return functional.embedding(x, table, padding_idx=base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq)
