"""An adapter by itself: a layer of low rank, for whoever adds it to something of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_cli.nn.factors import DEFAULT, Factors
from lora_cli.nn.parameters import LoRAParameters
from lora_cli.nn.starts import Start


class LoRAAdapter(nn.Module):
    """y = s·B·A·x with s = alpha/rank (Hu et al. 2021) or alpha/√rank, and no frozen layer: (…, in) → (…, out).

    Its state is `lora_A.weight` (rank × in) and `lora_B.weight` (out × rank). B is zero at first, and so is y.

    Args:
        input_size: Numbers that go in. None takes it from the first input, or from the state that is loaded; until then
            the adapter has no state to save.
        output_size: Numbers that come out.
        rank: Rows of A and columns of B.
        alpha: Numerator of the scale.
        dropout: Probability with which numbers on the way in are left out in training.
        rslora: Divide alpha by the square root of the rank.
        device: Of the factors.
        dtype: Of the factors.
        start: How A begins.

    Attributes:
        input_size: Numbers that go in, None before they are known.
        output_size: Numbers that come out.
        settings: Rank, strength and the rest.
    """

    def __init__(  # noqa: PLR0913 # as a linear layer has them, and an adapter
        self,
        input_size: int | None,
        output_size: int,
        rank: int = 8,
        alpha: float | None = 16.0,
        *,
        dropout: float = 0.0,
        rslora: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        start: Start | None = None,
    ) -> None:
        super().__init__()
        self.settings = LoRAParameters(rank=rank, alpha=alpha, dropout=dropout, rslora=rslora, dtype=dtype)
        self.input_size, self.output_size = input_size, output_size
        self.lora_A, self.lora_B = Factors(), Factors()
        self.dropout = nn.Dropout(dropout)
        self._scale = self.settings.scale.times()
        self._start = start or Start.drawn()
        # A lazy parameter is there from the beginning, so that an optimizer made before the first input knows it.
        lazy: Any = nn.UninitializedParameter
        self.lora_A.register_parameter("weight", lazy(device=device, dtype=dtype))
        self.lora_B.put(DEFAULT, torch.zeros((output_size, rank), device=device, dtype=dtype))
        if input_size is not None:
            self._settle(input_size)

    def forward(self, x: Tensor) -> Tensor:
        """Return s·B·A·x in the type of x."""
        if self.input_size is None:
            self._settle(x.shape[-1])
        a, b = self.lora_A[DEFAULT], self.lora_B[DEFAULT]
        low = functional.linear(self.dropout(x).to(a.dtype), a)
        return (functional.linear(low, b) * self._scale).to(x.dtype)

    @property
    def weight(self) -> Tensor:
        """What it multiplies by: s·B·A, (out × in)."""
        return self._scale * (self.lora_B[DEFAULT] @ self.lora_A[DEFAULT])

    def reset_parameters(self, start: Start | None = None) -> None:
        """Begin anew: A drawn, B zero."""
        self._start = start or Start.drawn()
        if self.input_size is not None:
            self._draw()
        nn.init.zeros_(self.lora_B[DEFAULT])

    def extra_repr(self) -> str:
        """The sizes and the scale."""
        return f"input_size={self.input_size}, output_size={self.output_size}, rank={self.settings.rank}"

    def _settle(self, input_size: int) -> None:
        self._materialize(input_size)
        self._draw()

    def _materialize(self, input_size: int) -> None:
        self.input_size = input_size
        cast("nn.UninitializedParameter", self.lora_A[DEFAULT]).materialize((self.settings.rank, input_size))

    @torch.no_grad()
    def _draw(self) -> None:
        a = self.lora_A[DEFAULT]
        a.copy_(self._start.first_factor(tuple(a.shape), a.dtype))

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """Take the input size from the state before the parts load theirs, if nothing else said it."""
        found = state_dict.get(f"{prefix}lora_A.weight")
        if self.input_size is None and isinstance(found, Tensor) and found.dim() == 2:
            self._materialize(found.shape[1])
        super()._load_from_state_dict(state_dict, prefix, *rest)
