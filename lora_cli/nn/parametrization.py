"""LoRA as a parametrization: a module's own weight becomes W + scale · B·A, whatever the module computes with it.

    lora = parametrize_lora(model.proj, rank=8, alpha=16)     # torch.nn.utils.parametrize under the hood
    ...                                                       # train lora.parameters()
    with switched(model, on=False):
        ...                                                   # the frozen model again

No layer is replaced, so this works for any module that reads its weight as an attribute: `Linear`, convolutions,
`Embedding`, `MultiheadAttention`, `LSTM`, and modules of your own. The price is that W + scale · B·A is made anew at
each use; `torch.nn.utils.parametrize.cached()` makes it once for a block of code.

In a state dict the frozen weight is at `X.parametrizations.weight.original` and the factors are at
`X.parametrizations.weight.0.A` and `.0.B`: keys that `lora-cli merge` folds back to `X.weight`. torch pickles no
parametrized module; save its state dict.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lora_cli.arithmetic.scale import exact_scale
from lora_cli.errors import ShapeError, UsageError


class LoRA(nn.Module):
    """Adds scale · B·A to a weight. Source of the update: Hu et al. 2021, equation 3.

    The weight is seen as the matrix that its storage is: `in_f` rows, its first size, by `out_f` columns, the product
    of all others. For `torch.nn.Linear`, which stores (out × in), `in_f` is therefore its number of outputs. B·A has
    that shape, and is viewed in the weight's: kernels of convolutions work as matrices do.

    A is drawn as `torch.nn.Linear` draws its weight (Kaiming uniform, a = √5) and B is zero. So the update is zero, and
    the first step moves B alone; were both zero, as a product of zeros has zero gradients, neither would ever move.

    Args:
        in_f: First size of the weight.
        out_f: Product of its other sizes.
        rank: Rank of the update.
        alpha: Strength, before it is divided by the rank.
        device: Where the factors are.
        rslora: Divide alpha by √rank instead (Kalajdzievski 2023).
        dtype: Type of the factors; torch's default unless given.

    Attributes:
        A: (rank, out_f).
        B: (in_f, rank).
        scale: alpha / rank, rounded once. Not in the state dict.
        en: Whether the update is added. See `switched` for a whole model.

    Raises:
        ShapeError: A size or the rank is not positive.
        UsageError: One of them is no whole number, or the type is no floating one.
        NumericError: The scale is not finite.
    """

    def __init__(
        self,
        in_f: int,
        out_f: int,
        rank: int = 1,
        alpha: float = 1,
        device: torch.device | str = "cpu",
        *,
        rslora: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("in_f", in_f), ("out_f", out_f), ("rank", rank)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise UsageError("A size is a whole number", tensor=name, found=repr(value)[:60])
            if value <= 0:
                raise ShapeError("A size must be positive", tensor=name, expected="at least 1", found=value)
        dtype = dtype or torch.get_default_dtype()
        if not dtype.is_floating_point:
            raise UsageError("Factors need a floating type", tensor="dtype", found=dtype)
        self.A = nn.Parameter(torch.empty((rank, out_f), device=device, dtype=dtype))
        self.B = nn.Parameter(torch.zeros((in_f, rank), device=device, dtype=dtype))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.scale = exact_scale(alpha, rank, rslora=rslora)
        self.en = True

    def forward(self, wts: Tensor) -> Tensor:
        """Return wts + scale · B·A in the weight's type and shape; wts itself while `en` is off.

        Raises:
            ShapeError: The weight has not in_f · out_f elements.
        """
        if not self.en:
            return wts
        if wts.numel() != self.B.shape[0] * self.A.shape[1]:
            raise ShapeError(
                "The weight does not fit the factors",
                expected=f"{self.B.shape[0]} · {self.A.shape[1]} elements",
                found=tuple(wts.shape),
            )
        update = torch.matmul(self.B, self.A).view(wts.shape) * self.scale
        return wts + update.to(wts.dtype)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"in_f={self.B.shape[0]}, out_f={self.A.shape[1]}, rank={self.A.shape[0]}, scale={self.scale:g}"


def parametrize_lora(
    module: nn.Module,
    rank: int = 1,
    alpha: float = 1,
    *,
    parameter: str = "weight",
    rslora: bool = False,
    dtype: torch.dtype | None = None,
) -> LoRA:
    """Freeze one parameter of a module and let LoRA change what it is read as.

    `torch.nn.utils.parametrize.remove_parametrizations` takes it off again: with `leave_parametrized=False` the frozen
    parameter comes back as it was, with `True` the sum stays (in ordinary arithmetic; `lora-cli merge` rounds once).
    A parameter that several modules share is changed in this one only.

    Args:
        module: Any module.
        rank: Rank of the update.
        alpha: Strength, before it is divided by the rank.
        parameter: Name of one of its own parameters, of two dimensions or more.
        rslora: Divide alpha by √rank instead.
        dtype: Type of the factors; the parameter's unless given.

    Returns:
        The parametrization, whose parameters are to be trained.

    Raises:
        UsageError: The module has no such parameter, or it is not of a floating type.
        ShapeError: It has fewer than two dimensions, or the rank is not positive.
    """
    weight = _parameter(module, parameter)
    lora = LoRA(
        weight.shape[0],
        math.prod(weight.shape[1:]),
        rank,
        alpha,
        device=weight.device,
        rslora=rslora,
        dtype=dtype or weight.dtype,
    )
    parametrize.register_parametrization(module, parameter, lora)
    for original in module.get_submodule(f"parametrizations.{parameter}").parameters(recurse=False):
        original.requires_grad_(False)
    return lora


@contextmanager
def switched(model: nn.Module, on: bool) -> Iterator[None]:
    """Let every `LoRA` below a model add its update, or none, for a while; then each is as it was.

    Raises:
        UsageError: There is none.
    """
    found = [module for module in model.modules() if isinstance(module, LoRA)]
    if not found:
        raise UsageError("The model has no LoRA parametrization", found=type(model).__name__)
    before = [lora.en for lora in found]
    try:
        _set(found, [on] * len(found))
        yield
    finally:
        _set(found, before)


def _set(found: list[LoRA], states: list[bool]) -> None:
    for lora, state in zip(found, states, strict=True):
        lora.en = state
    # Inside of parametrize.cached() the sums of before would be used on; torch has no public way to drop them.
    parametrize._cache.clear()


def _parameter(module: nn.Module, name: str) -> Tensor:
    """Return what a module has under a name, which must be a matrix or more."""
    parametrized = parametrize.is_parametrized(module, name)
    own = dict(module.named_parameters(recurse=False))
    if not parametrized and name not in own:
        known = ", ".join(own) or "none of its own"
        raise UsageError("The module has no such parameter", tensor=name, expected=known, found=type(module).__name__)
    weight: Tensor = getattr(module, name)
    if weight.dim() < 2:
        raise ShapeError("LoRA needs two dimensions or more", tensor=name, found=tuple(weight.shape))
    if not weight.is_floating_point():
        raise UsageError("LoRA needs a floating type", tensor=name, found=weight.dtype)
    return weight
