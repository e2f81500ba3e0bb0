"""How the factors of a live layer begin: as `lora-cli inject` writes them for the same seed and module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lora_cli.adapters.inits import GAUSSIAN_STD, INITS, draw, stored
from lora_cli.checkpoint.dtypes import DTYPES

if TYPE_CHECKING:
    from lora_cli.nn.layer import LoRALayer
    from lora_cli.nn.parameters import LoRAParameters

_STORAGE = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True, slots=True)
class Start:
    """A rule for A, with all that decides its numbers; B is zero.

    Attributes:
        rule: One of `adapters.inits.INITS`.
        module: Name of the module in its model.
        seed: Any whole number.
        std: Standard deviation of `gaussian`.
    """

    rule: str = "kaiming"
    module: str = ""
    seed: int = 0
    std: float = GAUSSIAN_STD

    @staticmethod
    def drawn() -> Start:
        """The rule `kaiming` with a seed from torch's generator: two layers made by hand do not begin alike."""
        return Start(seed=int(torch.randint(1 << 62, ())))

    @property
    def principal(self) -> bool:
        """Whether the factors are taken from the weight, and their product is then taken off it."""
        return self.rule not in INITS

    def factors(self, layer: LoRALayer, parameters: LoRAParameters, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Make A and B, rounded once to their type.

        Raises:
            UsageError: No such rule.
            ShapeError: A rank larger than a side of the weight, for a rule that takes them from it.
        """
        a_shape, b_shape = layer.shapes(parameters.rank)
        return layer.first_factor(self, a_shape, dtype), torch.zeros(b_shape, dtype=dtype)

    def first_factor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Draw A.

        Raises:
            UsageError: No such rule.
        """
        key = f"{self.module}.lora_A.weight" if self.module else "lora_A.weight"
        values = draw(self.rule, key, shape, seed=self.seed, std=self.std)
        if dtype not in _STORAGE:
            return torch.from_numpy(values).to(dtype)
        return torch.from_numpy(stored(values.reshape(-1), DTYPES[_STORAGE[dtype]])).view(dtype).view(shape)
