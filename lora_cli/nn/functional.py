"""LoRA as functions of plain tensors: no modules, no state, adapters are dicts.

    adapter = init_lora_adapter(weight, rank=8)          # {"A": (in, r), "B": (r, out)}
    y = lora_linear(x, weight, adapter, alpha=16)        # x @ (W + alpha/r · A @ B), W frozen
    merged = merge_lora_weight(weight, adapter, alpha=16)

Weights are stored (in, out), as `x @ W` takes them. Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large
Language Models".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.utils import _pytree as pytree

from lora_cli.arithmetic.product import Term
from lora_cli.arithmetic.scale import exact_scale
from lora_cli.errors import ShapeError, UsageError
from lora_cli.nn import exact

Adapter = Mapping[str, Tensor]
"""The factors of one weight: "A" (in, r) and "B" (r, out)."""


def init_lora_adapter(
    weight: Tensor,
    rank: int,
    init_std: float = 0.01,
    dtype: torch.dtype | None = None,
    *,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Return a fresh adapter, which adds zero: A normal with mean zero, B zero.

    Args:
        weight: The frozen weight, (in, out).
        rank: Columns of A, at least 1.
        init_std: Standard deviation of A.
        dtype: Type of A and B; the weight's unless given.
        generator: Where the numbers come from; torch's own for the weight's device unless given.

    Returns:
        {"A": (in, rank), "B": (rank, out)} on the weight's device. Neither asks for gradients yet.

    Raises:
        ShapeError: The weight is no matrix, or the rank is not positive.
        UsageError: A type is no floating one, or the rank or the deviation is no such number.
    """
    _check_matrix(weight, "weight")
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise UsageError("The rank is not a whole number", tensor="rank", found=repr(rank)[:60])
    if rank <= 0:
        raise ShapeError("The rank must be positive", tensor="rank", expected="at least 1", found=rank)
    if not (math.isfinite(init_std) and init_std >= 0):
        raise UsageError("A standard deviation is zero or more", tensor="init_std", found=init_std)
    dtype = dtype or weight.dtype
    _check_floating(dtype, "dtype")
    rows, columns = weight.shape
    # torch draws no normal numbers in eight bits.
    drawn = torch.float32 if dtype.itemsize == 1 else dtype
    a = torch.empty((rows, rank), dtype=drawn, device=weight.device).normal_(0.0, init_std, generator=generator)
    return {"A": a.to(dtype), "B": torch.zeros((rank, columns), dtype=dtype, device=weight.device)}


def lora_delta(adapter: Adapter, alpha: float = 1.0) -> Tensor:
    """Return (alpha / rank) · A @ B, (in, out), in the type of the factors; differentiable.

    Raises:
        ShapeError: The factors are no matrices that share a rank.
        UsageError: Not an adapter: other keys than A and B, or tensors that are not of one floating type.
    """
    return _delta(adapter, alpha)


def lora_linear(x: Tensor, frozen_weight: Tensor, adapter: Adapter, alpha: float = 1.0) -> Tensor:
    """Return x @ W + (alpha / rank) · (x @ A) @ B, without ever making A @ B.

    Gradients reach x, A and B; the weight is frozen and gets none. Where the factors have another type than x, the
    adapter's path is computed in theirs and added in that of x @ W.

    Args:
        x: Input, (…, in).
        frozen_weight: The weight, (in, out).
        adapter: Its adapter.
        alpha: Strength, before it is divided by the rank.

    Returns:
        Output, (…, out).

    Raises:
        ShapeError: Shapes do not fit together.
        UsageError: As for `lora_delta`.
    """
    a, b = _fitting(frozen_weight, adapter)
    if x.dim() == 0 or x.shape[-1] != frozen_weight.shape[0]:
        raise ShapeError(
            "The input does not fit the weight", expected=f"(…, {frozen_weight.shape[0]})", found=tuple(x.shape)
        )
    frozen = x @ frozen_weight.detach()
    added = (x.to(a.dtype) @ a) @ b * (alpha / a.shape[1])
    return frozen + added.to(frozen.dtype)


def merge_lora_weight(frozen_weight: Tensor, adapter: Adapter, alpha: float = 1.0) -> Tensor:
    """Return W + (alpha / rank) · A @ B, bit for bit as `lora-cli merge` writes it.

    The product is exact and the sum is rounded once. Gradients reach the weight, A and B, once; they are those of the
    formula without rounding.

    Args:
        frozen_weight: The weight, (in, out).
        adapter: Its adapter.
        alpha: Strength, before it is divided by the rank.

    Returns:
        The merged weight, of the weight's type, shape and device.

    Raises:
        ShapeError: Shapes do not fit together.
        UsageError: As for `lora_delta`.
        NumericError: NaN, infinity, or a sum that does not fit in the type.
    """
    return _sum(frozen_weight, adapter, alpha, exact.added, 1.0)


def unmerge_lora_weight(merged_weight: Tensor, adapter: Adapter, alpha: float = 1.0) -> Tensor:
    """Return W - (alpha / rank) · A @ B: of a merged weight what it was, within rounding.

    Merging rounds, so some bits of the frozen weight are not in the merged one. To get them back exactly, keep what was
    forgotten: the layers' `unmerge` in memory and `lora-cli unmerge` on files do. Arguments, gradients and errors are
    those of `merge_lora_weight`.
    """
    return _sum(merged_weight, adapter, alpha, exact.subtracted, -1.0)


def tree_lora_delta(adapters: Any, alpha: float = 1.0, *, is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """Return the same tree with each adapter's delta in its place.

    Args:
        adapters: Dicts, lists, tuples and named tuples, nested at will, with adapters as leaves. None stays None.
        alpha: As for `lora_delta`.
        is_leaf: Says where a leaf is; unless given, that is a dict with the keys A and B and tensors under both.

    Raises:
        ShapeError: As for `lora_delta`, with the place in the tree.
        UsageError: As for `lora_delta`, with the place in the tree: also for any other leaf.
    """

    def delta(path: tuple[Any, ...], leaf: Any) -> Tensor | None:
        return None if leaf is None else _delta(leaf, alpha, pytree.keystr(path))

    return pytree.tree_map_with_path(delta, adapters, is_leaf=is_leaf or _is_adapter)


class _ExactSum(torch.autograd.Function):
    """W + scale·A·B by an exact function, with the derivative of the formula."""

    @staticmethod
    def forward(weight: Tensor, a: Tensor, b: Tensor, scale: float, how: Callable[..., Tensor], sign: float) -> Tensor:
        return how(weight, [Term(b.T, a.T, scale)], transposed=True)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, a, b, scale, _, sign = inputs
        ctx.save_for_backward(a, b)
        ctx.scale = sign * scale  # type: ignore[attr-defined] # torch keeps what is set on it

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        slope = grad.to(a.dtype) * ctx.scale
        for_weight, for_a, for_b = ctx.needs_input_grad[:3]
        return (
            grad if for_weight else None,
            slope @ b.T if for_a else None,
            a.T @ slope if for_b else None,
            None,
            None,
            None,
        )


def _sum(weight: Tensor, adapter: Adapter, alpha: float, how: Callable[..., Tensor], sign: float) -> Tensor:
    a, b = _fitting(weight, adapter)
    # The exact product works in blocks on tensors that are there, so a compiler goes around it.
    apply = torch.compiler.disable(_ExactSum.apply) if torch.compiler.is_compiling() else _ExactSum.apply
    merged: Tensor = apply(weight, a, b, exact_scale(alpha, a.shape[1]), how, sign)
    return merged


def _delta(adapter: Adapter, alpha: float, place: str | None = None) -> Tensor:
    a, b = _factors(adapter, place)
    # One division is `exact_scale` of a float, and the compiler can follow it.
    return a @ b * (alpha / a.shape[1])


def _is_adapter(node: Any) -> bool:
    return isinstance(node, dict) and set(node) == {"A", "B"} and all(isinstance(v, Tensor) for v in node.values())


def _factors(adapter: Adapter, place: str | None = None) -> tuple[Tensor, Tensor]:
    """Return A and B of what must be an adapter; `place` is its path in a tree."""
    if not _is_adapter(adapter):
        found = sorted(map(str, adapter)) if isinstance(adapter, Mapping) else type(adapter).__name__
        raise UsageError("Not an adapter", tensor=place, expected="a dict with the tensors A and B alone", found=found)
    a, b = adapter["A"], adapter["B"]
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0] or a.shape[1] == 0:
        raise ShapeError(
            "The factors share no rank",
            tensor=place,
            expected="A (in, rank) and B (rank, out)",
            found=f"A {tuple(a.shape)} and B {tuple(b.shape)}",
        )
    if a.dtype != b.dtype or not a.dtype.is_floating_point:
        raise UsageError("The factors are not of one floating type", tensor=place, found=f"A {a.dtype} and B {b.dtype}")
    return a, b


def _fitting(weight: Tensor, adapter: Adapter) -> tuple[Tensor, Tensor]:
    """Return A and B, which must be those of this weight."""
    a, b = _factors(adapter)
    _check_matrix(weight, "weight")
    if (a.shape[0], b.shape[1]) != tuple(weight.shape):
        raise ShapeError(
            "The adapter does not fit the weight",
            expected=f"A ({weight.shape[0]}, rank) and B (rank, {weight.shape[1]})",
            found=f"A {tuple(a.shape)} and B {tuple(b.shape)}",
        )
    return a, b


def _check_matrix(weight: Tensor, name: str) -> None:
    if weight.dim() != 2:
        raise ShapeError("The weight is no matrix", tensor=name, expected="(in, out)", found=tuple(weight.shape))
    _check_floating(weight.dtype, name)


def _check_floating(dtype: torch.dtype, name: str) -> None:
    if not dtype.is_floating_point:
        raise UsageError("An adapter needs a floating type", tensor=name, found=dtype)
