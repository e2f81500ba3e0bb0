"""Reading a method's tensors: numbers that are finite, and whole numbers that say places."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_cli.adapters.formula import Given, Settings
from lora_cli.errors import NumericError

if TYPE_CHECKING:
    from torch import Tensor


_LARGEST = 1 << 24
"""More inputs or outputs than any module has."""


def sizes(settings: Settings, *names: str) -> tuple[int, ...]:
    """Settings that are sizes; 0 for each that is none."""
    found = (settings.get(name) for name in names)
    return tuple(
        size if isinstance(size, int) and not isinstance(size, bool) and 0 < size < _LARGEST else 0 for size in found
    )


def numbers(given: Given, part: str) -> Tensor:
    """A tensor in float64.

    Raises:
        NumericError: It holds NaN or infinity.
    """
    import torch

    found = given.tensors[part].to(torch.float64)
    bad = int((~torch.isfinite(found)).sum())
    if bad:
        raise NumericError(f"{part} holds NaN or infinity", found=f"{bad} of {found.numel()} values")
    return found


def places(given: Given, part: str, below: int | Tensor) -> Tensor:
    """A tensor of places, from 0 on; `below` may say for each where they end. PEFT writes floating ones on Windows.

    Raises:
        NumericError: One is no whole number, or too large.
    """
    import torch

    stored = given.tensors[part]
    found = numbers(given, part).to(torch.int64) if stored.is_floating_point() else stored.to(torch.int64)
    wrong = (found < 0) | (found >= below)
    if stored.is_floating_point():
        wrong |= found != stored
    if bool(wrong.any()):
        raise NumericError(
            f"{part} holds what are no places",
            expected="whole numbers, none beyond what there is",
            found=f"{int(wrong.sum())} others",
        )
    return found
