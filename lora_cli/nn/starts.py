"""How the factors of a live layer begin: as `lora-cli inject` writes them for the same seed and module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lora_cli.adapters.fresh import FACTOR_DTYPES, FreshOptions
from lora_cli.adapters.inits import GAUSSIAN_STD, INITS, draw, stored
from lora_cli.checkpoint.dtypes import dtype_for_torch
from lora_cli.surgery.principal import take_from

if TYPE_CHECKING:
    from lora_cli.nn.layer import LoRALayer
    from lora_cli.nn.parameters import LoRAParameters


@dataclass(frozen=True, slots=True)
class Start:
    """A rule for the factors, with all that decides their numbers.

    Attributes:
        rule: One of `adapters.inits.INITS` for A, with B zero; or one of `adapters.fresh.PRINCIPAL`.
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
        if not self.principal:
            return layer.first_factor(self, a_shape, dtype), torch.zeros(b_shape, dtype=dtype)
        scale = parameters.scale
        options = FreshOptions(
            rank=parameters.rank, alpha=scale.alpha, rslora=scale.rslora, init=self.rule, seed=self.seed
        )
        a, b = take_from(layer.matrix().cpu(), self.module, options)
        return _rounded(a, dtype).view(a_shape), _rounded(b, dtype).view(b_shape)

    def first_factor(self, shape: tuple[int, ...], dtype: torch.dtype, *, table: bool = False) -> Tensor:
        """Draw A, of an embedding or of another layer.

        Raises:
            UsageError: No such rule.
        """
        key = f"{self.module}.lora_A.weight" if self.module else "lora_A.weight"
        return _rounded(torch.from_numpy(draw(self.rule, key, shape, seed=self.seed, std=self.std, table=table)), dtype)


def _rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float64 numbers once, as files have them: torch rounds to 16 bits twice."""
    storage = dtype_for_torch(str(dtype))
    if storage.name not in FACTOR_DTYPES.values():
        return values.to(dtype)
    data = stored(values.contiguous().numpy().reshape(-1), storage)
    return torch.from_numpy(data).view(dtype).view(values.shape)
