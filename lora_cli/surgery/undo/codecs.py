"""The two ways in which what a merge forgot of a block is kept: which preimage each element was, or the residual."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lora_cli.arithmetic import residual, undo
from lora_cli.arithmetic.fragments import Lengths
from lora_cli.arithmetic.packing import Buffer
from lora_cli.arithmetic.rounding import work_dtype

How = Literal["preimages", "residual"]

LENGTHS: Mapping[How, Lengths] = {"preimages": undo.lengths, "residual": residual.lengths}
"""What tells the head and the tail of a stream."""


class Summand(NamedTuple):
    """What a merge did to the flat elements of a run.

    Attributes:
        delta: What was added, in the working type; None where the run was only cast, or replaced.
        gains: What the sums were multiplied by; None where they were not.
    """

    delta: Tensor | None = None
    gains: Tensor | None = None


class Encoder:
    """Makes the streams of one block after another: what `decode` needs to make the base's bits again.

    Args:
        how: By preimages where the merge is a map of each element, else by the residual.
    """

    def __init__(self, how: How) -> None:
        self._how = how
        self._block: undo.Encoder | None = None
        self._runs: list[tuple[Tensor, Tensor]] = []

    def add(self, base: Tensor, merged: Tensor, change: Summand, *, ends_block: bool) -> bytes | None:
        """Take the next run of a block; returns the stream with its last one.

        Args:
            base: The flat run before the merge.
            merged: The same after it.
            change: What was done to it.
            ends_block: Whether the block ends with it.
        """
        if self._how == "residual":
            return self._residual(base, merged, ends_block=ends_block)
        if self._block is None:
            self._block = undo.Encoder(base.dtype, merged.dtype)
        self._block.add(base, *_summands(base, merged, change.delta), change.gains)
        if not ends_block:
            return None
        stream, self._block = self._block.finish(), None
        return stream

    def _residual(self, base: Tensor, merged: Tensor, *, ends_block: bool) -> bytes | None:
        """Residuals are compressed block by block, so runs of one are gathered."""
        if not ends_block:
            self._runs.append((base.clone(), merged.clone()))
            return None
        if self._runs:
            runs, self._runs = [*self._runs, (base, merged)], []
            base, merged = (torch.cat(side) for side in zip(*runs, strict=True))
        return residual.encode(base, _alike(merged, base))


def decode(how: How, merged: Tensor, change: Summand, stream: Buffer, out: Tensor) -> Tensor:
    """Write the base's own bits into `out`, a flat block of the base's type.

    Args:
        how: As it was encoded.
        merged: The flat block after the merge.
        change: What was done to it.
        stream: What the encoder returned.
        out: Where the base's block goes.

    Raises:
        MalformedFileError: The stream is damaged, or belongs to other data.
    """
    if how == "residual":
        return residual.decode(_alike(merged, out), stream, out)
    return undo.decode(*_summands(out, merged, change.delta), stream, out, change.gains)


def _alike(merged: Tensor, base: Tensor) -> Tensor | None:
    return merged if merged.dtype == base.dtype else None


def _summands(base: Tensor, merged: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return merged values and deltas with which preimages are defined.

    A cast adds nothing. It lets NaN and infinity pass, of which hardware makes different patterns: zeros stand for
    them, to which no such value merges, so that its bits are written out.
    """
    if delta is not None:
        return merged, delta
    wide = merged.to(torch.float32) if merged.itemsize == 1 else merged
    finite = torch.isfinite(wide)
    if not bool(finite.all()):
        merged = torch.where(finite, merged, torch.zeros_like(merged))
    return merged, torch.zeros(merged.numel(), dtype=work_dtype(base.dtype, merged.dtype))
