"""How many rows are the same in two tables of different lengths: a vocabulary before and after it was resized."""

from __future__ import annotations

import math

from lora_cli.checkpoint.checkpoint import StoredTensor

_STEP = 4 << 20


def equal_rows(a: StoredTensor, b: StoredTensor) -> int | None:
    """Count the rows that have the same bits in both, each compared with the one of the same number.

    Returns:
        How many there are among those of the shorter one; None where rows are of another type or width.
    """
    import numpy as np

    width = math.prod(a.shape[1:]) * a.dtype.bits
    if a.dtype != b.dtype or len(a.shape) < 2 or a.shape[1:] != b.shape[1:] or not width or width % 8:
        return None
    row, rows, equal = width // 8, min(a.shape[0], b.shape[0]), 0
    step = max(1, _STEP // row)
    with a.shard.source.open() as left, b.shard.source.open() as right:
        for begin in range(0, rows, step):
            count = min(step, rows - begin)
            one, other = (
                np.frombuffer(reader.read(tensor.offset + begin * row, count * row), np.uint8).reshape(count, row)
                for reader, tensor in ((left, a), (right, b))
            )
            equal += int((one == other).all(axis=1).sum())
    return equal
