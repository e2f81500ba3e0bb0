"""Merging into a weight in memory and taking it out again, with the bits that the surgery on files would write.

The product is exact and the sum is rounded once (`arithmetic.rounding`); what rounding forgets is kept in memory as an
undo file keeps it (`arithmetic.undo`). All of it is computed on the CPU, from wherever the weight is, and does not
depend on that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from blake3 import blake3
from torch import Tensor

from lora_cli.arithmetic import dora, undo
from lora_cli.arithmetic.floats import dtype_name
from lora_cli.arithmetic.product import Term, prepare
from lora_cli.arithmetic.rounding import TileKernel, check_flush_to_zero, slices_for, work_dtype
from lora_cli.errors import ShapeError, WrongInputError

BLOCK_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class Change:
    """What adapters do to one matrix.

    Attributes:
        terms: Low-rank summands, (out × K) by (K × in).
        transposed: The matrix is stored (in × out).
        magnitude: For DoRA, the length that each output's row gets, (out,).
    """

    terms: tuple[Term, ...]
    transposed: bool = False
    magnitude: Tensor | None = None

    def copied(self) -> Change:
        """The same change, on the CPU and in memory of its own: training does not reach it."""
        terms = tuple(replace(term, b=_own(term.b), a=_own(term.a)) for term in self.terms)
        return replace(self, terms=terms, magnitude=None if self.magnitude is None else _own(self.magnitude))


@dataclass(frozen=True)
class Forgotten:
    """What a merge forgot of one matrix, and what it was.

    Attributes:
        change: What was merged.
        gains: For DoRA, what each output's row was multiplied by, in the working type.
        dtype: Storage type of the matrix.
        digest: BLAKE3 of the merged bytes.
        streams: What undoes each block.
    """

    change: Change
    gains: Tensor | None
    dtype: torch.dtype
    digest: bytes
    streams: tuple[bytes, ...]


def merge(weight: Tensor, change: Change) -> tuple[Tensor, Forgotten]:
    """Return the merged weight and what undoes it.

    Args:
        weight: A matrix, or a kernel that is seen as (out × rest).
        change: What is added to it.

    Returns:
        A new tensor of the weight's type, shape and device, bit for bit what `lora-cli merge` writes; and what
        `unmerge` needs.

    Raises:
        UnsupportedError: The weight's type takes no delta.
        ShapeError: The change has another shape.
        NumericError: Numbers that must not be merged.
    """
    change = change.copied()
    bench = _Bench(weight, change)
    gains = None if change.magnitude is None else dora.gains(change.magnitude, bench.square_sums(), bench.kernel.work)
    merged = torch.empty_like(bench.matrix)
    streams = []
    for rows, delta in bench.deltas():
        base, result = bench.matrix[rows], merged[rows]
        factors = bench.along_outputs(gains, rows)
        bench.kernel.merge(base, delta, result, factors)
        streams.append(undo.encode(base, result, delta, factors))
    forgotten = Forgotten(change, gains, weight.dtype, _digest(merged), tuple(streams))
    return bench.like_the_weight(merged), forgotten


def unmerge(weight: Tensor, forgotten: Forgotten) -> Tensor:
    """Return the weight as it was before a merge, bit for bit.

    Raises:
        WrongInputError: It is not what the merge gave: it was trained, cast or loaded since.
    """
    check_unchanged(weight, forgotten)
    bench = _Bench(weight, forgotten.change)
    base = torch.empty_like(bench.matrix)
    for (rows, delta), stream in zip(bench.deltas(), forgotten.streams, strict=True):
        undo.decode(bench.matrix[rows], delta, stream, base[rows], bench.along_outputs(forgotten.gains, rows))
    return bench.like_the_weight(base)


def check_unchanged(weight: Tensor, forgotten: Forgotten) -> None:
    """Refuse a weight that is not what a merge gave.

    Raises:
        WrongInputError: It was trained, cast or loaded since.
    """
    if weight.dtype != forgotten.dtype or _digest(weight.detach().cpu().flatten(1).contiguous()) != forgotten.digest:
        raise WrongInputError(
            "The weight was changed since the merge, so the merge cannot be undone",
            expected=f"{dtype_name(forgotten.dtype)} as merged",
            found=f"{dtype_name(weight.dtype)} with other bytes",
            hint="make the model anew from its checkpoint; what an adapter learned can be saved before",
        )


def added(weight: Tensor, terms: Sequence[Term], *, transposed: bool = False) -> Tensor:
    """Return weight + Σ scale·B·A as `merge` does, without a way back. Errors are those of `merge`."""
    bench = _Bench(weight, Change(tuple(terms), transposed))
    merged = torch.empty_like(bench.matrix)
    for rows, delta in bench.deltas():
        bench.kernel.merge(bench.matrix[rows], delta, merged[rows])
    return bench.like_the_weight(merged)


def subtracted(weight: Tensor, terms: Sequence[Term], *, transposed: bool = False) -> Tensor:
    """Return weight - Σ scale·B·A: of a merged weight what it was, within rounding. Errors are those of `merge`."""
    bench = _Bench(weight, Change(tuple(terms), transposed))
    less = torch.empty_like(bench.matrix)
    for rows, delta in bench.deltas():
        bench.kernel.subtract(bench.matrix[rows], delta, less[rows])
    return bench.like_the_weight(less)


class _Bench:
    """One weight on the CPU as a matrix, with the deltas of its rows."""

    def __init__(self, weight: Tensor, change: Change) -> None:
        check_flush_to_zero()
        self._weight = weight
        self._transposed = change.transposed
        self.matrix = weight.detach().cpu().flatten(1).contiguous()
        work = work_dtype(weight.dtype)
        self._product = prepare(change.terms, slices=slices_for(work))
        shape = self._product.shape[::-1] if change.transposed else self._product.shape
        if shape != self.matrix.shape:
            raise ShapeError("The change does not fit the weight", expected=tuple(self.matrix.shape), found=shape)
        # Rows that are inputs come in whole runs, so that their squares can be summed block by block.
        step = dora.RUN if change.transposed else 1
        height = step * max(1, BLOCK_ELEMENTS // step // max(1, self.matrix.shape[1]))
        self._height = min(height, max(1, self.matrix.shape[0]))
        self.kernel = TileKernel(work, self._height * self.matrix.shape[1])

    def deltas(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the rows of each block and what is added to them, in a buffer that the next block overwrites."""
        height, columns = self.matrix.shape
        buffer = torch.empty((self._height, columns), dtype=self.kernel.work)
        for start in range(0, height, self._height):
            rows = slice(start, min(start + self._height, height))
            product = self.kernel.product(self._product, rows, slice(0, columns), transposed=self._transposed)
            yield rows, self.kernel.delta(product, out=buffer[: rows.stop - start])

    def square_sums(self) -> Tensor:
        """The squared length of each output's row of W + Δ, (out,)."""
        blocks = (self.matrix[rows].to(self.kernel.work) + delta for rows, delta in self.deltas())
        if not self._transposed:
            return torch.cat([dora.square_sums(block) for block in blocks])
        sums = dora.SquareSums(self.matrix.shape[1])
        for block in blocks:
            sums.add(block)
        return dora.total(sums.groups())

    def along_outputs(self, gains: Tensor | None, rows: slice) -> Tensor | None:
        """The gain of each element of these rows of the stored matrix, or none."""
        if gains is None:
            return None
        across = gains.unsqueeze(0) if self._transposed else gains[rows].unsqueeze(1)
        return across.expand(self.matrix[rows].shape).contiguous()

    def like_the_weight(self, matrix: Tensor) -> Tensor:
        """A result in the shape and place of the weight."""
        return matrix.view(self._weight.shape).to(self._weight.device)


def _digest(matrix: Tensor) -> bytes:
    return blake3(matrix.view(-1).view(torch.uint8).numpy().data).digest()


def _own(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone()
