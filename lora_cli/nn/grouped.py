"""A stack of linear layers, such as the experts of a mixture, and LoRA beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_cli.adapters.modules import Kind
from lora_cli.arithmetic.product import Term
from lora_cli.errors import ShapeError, UnsupportedError
from lora_cli.nn import exact
from lora_cli.nn.layer import LoRALayer
from lora_cli.nn.starts import Start


class GroupedLinear(nn.Module):
    """One linear layer without bias for each group of rows: y = x·W[g] for the rows x of group g.

    Args:
        n_groups: Groups.
        in_features: Numbers that a row has.
        out_features: Numbers that it becomes.
        device: Of the weight.
        dtype: Of the weight.

    Attributes:
        weight: (n_groups, in, out).
    """

    def __init__(
        self,
        n_groups: int,
        in_features: int,
        out_features: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.n_groups, self.in_features, self.out_features = n_groups, in_features, out_features
        self.weight = nn.Parameter(torch.empty((n_groups, in_features, out_features), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew: uniform on (-1/√in, 1/√in), as `torch.nn.Linear` does."""
        bound = self.in_features**-0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Tensor, x_groups: Tensor) -> Tensor:
        """Multiply each group's rows by its weight.

        Args:
            x: Rows sorted by group, (rows, in).
            x_groups: How many rows each group has, (n_groups,); zeros are allowed.

        Returns:
            (rows, out).

        Raises:
            ShapeError: The groups are not as many as the weights, or do not add up to the rows.
        """
        return multiply_groups(x, self.weight, x_groups)

    def extra_repr(self) -> str:
        """The sizes."""
        return f"n_groups={self.n_groups}, in_features={self.in_features}, out_features={self.out_features}"


def multiply_groups(x: Tensor, stack: Tensor, x_groups: Tensor) -> Tensor:
    """Multiply consecutive rows by one matrix of a stack each. Arguments and errors are those of `GroupedLinear`."""
    # Not compiled: sizes are read to split the rows by, and a graph would be made for each set of them.
    multiply = torch.compiler.disable(_multiply) if torch.compiler.is_compiling() else _multiply
    product: Tensor = multiply(x, stack, x_groups)
    return product


def _multiply(x: Tensor, stack: Tensor, x_groups: Tensor) -> Tensor:
    sizes = x_groups.tolist()
    fits = x.dim() == 2 and x_groups.shape == stack.shape[:1] and not x_groups.is_floating_point()
    if not fits or min(sizes, default=0) < 0 or sum(sizes) != x.shape[0]:
        raise ShapeError(
            "The groups do not add up to the rows",
            expected=f"(rows, {stack.shape[1]}) with the sizes of {stack.shape[0]} groups",
            found=f"{tuple(x.shape)} with {str(sizes)[:80]}",
        )
    return torch.cat([rows @ matrix for rows, matrix in zip(x.split(sizes), stack, strict=True)])


class LoRAGroupedLinear(LoRALayer):
    """LoRA beside `GroupedLinear`: W (n × in × out), A (n × in × rank), B (n × rank × out), ΔW[g] = s·A[g]·B[g]."""

    kind: ClassVar[Kind] = "grouped"
    layers: ClassVar[tuple[type[nn.Module], ...]] = (GroupedLinear,)

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored (in × out): each group's is."""
        return True

    @property
    def output_size(self) -> int:
        """How many numbers a row becomes."""
        return self.base_weight.shape[2]

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B."""
        groups, inner, out = self.base_weight.shape
        return (groups, inner, rank), (groups, rank, out)

    def first_factor(self, start: Start, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Draw A: rows of (groups · rank × in), so that each group has numbers of its own, and their width is by `in`.

        Raises:
            UnsupportedError: A rule that is about one matrix as a whole.
        """
        if start.rule not in ("kaiming", "gaussian"):
            raise UnsupportedError("This init is not for a stack of matrices", found=start.rule)
        groups, inner, rank = shape
        return start.first_factor((groups * rank, inner), dtype).view(groups, rank, inner).mT.contiguous()

    def matrix(self) -> Tensor:
        """Refuse: a stack is no one matrix.

        Raises:
            UnsupportedError: Always.
        """
        raise UnsupportedError("This init is not for a stack of matrices", found="factors taken from the weight")

    def low_rank(self, x: Tensor, a: Tensor, b: Tensor, x_groups: Tensor) -> Tensor:
        """Return x·A[g]·B[g] in the factors' type, without the scale."""
        return multiply_groups(multiply_groups(x.to(a.dtype), a, x_groups), b, x_groups)

    def base_product(self, x: Tensor, x_groups: Tensor) -> Tensor:
        """Return x·W[g]."""
        return multiply_groups(x.to(self.base_weight.dtype), self.base_weight, x_groups)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """Return A[g]·B[g] of all groups."""
        return a @ b

    def output_norms(self, weight: Tensor) -> Tensor:
        """Return the length of each output's column, (n × out)."""
        norms: Tensor = torch.linalg.vector_norm(weight, dim=1)
        return norms

    def along_output(self, values: Tensor, *rest: Any) -> Tensor:
        """Repeat the numbers of each group for its rows."""
        (x_groups,) = rest
        return values.repeat_interleave(x_groups.to(values.device), dim=0)

    def _along_weight(self, gain: Tensor) -> Tensor:
        return gain.unsqueeze(1)

    def _pieces(self) -> Sequence[tuple[Any, exact.Change]]:
        magnitude, in_use = self._magnitude(), list(self._in_use())
        return [
            (
                group,
                exact.Change(
                    tuple(Term(b[group].T, a[group].T, scale) for a, b, scale, _ in in_use),
                    transposed=True,
                    magnitude=None if magnitude is None else magnitude[group],
                ),
            )
            for group in range(self.base_weight.shape[0])
        ]
