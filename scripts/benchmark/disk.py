"""How much disk a run takes at most, so that it does not fail in its middle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jobs
from measure import Case

MORE = 1.07
"""Outputs against the checkpoint: headers, and an undo file at any usual strength."""


def needed_for(batches: Sequence[Sequence[Case]], *, keep: bool, caches: bool) -> int:
    """Bytes that the files of a run take.

    Args:
        batches: Cases of which the inputs are there together.
        keep: Whether the inputs of one batch are still there at the next.
        caches: Whether a job keeps its result twice while it runs.
    """
    inputs = [inputs_of(batch) for batch in batches]
    outputs = [outputs_of(batch, 2 if caches else 1) for batch in batches]
    if keep:
        return sum(inputs) + max(outputs)
    return max(ins + outs for ins, outs in zip(inputs, outputs, strict=True))


def inputs_of(batch: Sequence[Case]) -> int:
    """Bytes of checkpoints and adapters that are still to be made."""
    sizes: dict[Path, int] = {}
    for case in batch:
        sizes[case.place / "base"] = case.model.bytes
        sizes[case.folder / jobs.ADAPTER] = case.adapter_bytes
    return sum(size for folder, size in sizes.items() if not folder.is_dir())


def outputs_of(batch: Sequence[Case], copies: int) -> int:
    """Bytes of a merged checkpoint for each case, and of what one job at a time writes."""
    sizes = [int(MORE * case.model.bytes) for case in batch]
    return sum(sizes) + copies * max(sizes)
