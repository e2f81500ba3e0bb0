"""What a module's weight was, for changes that are computed from all of it."""

from __future__ import annotations

from functools import partial

import torch

from lora_cli.adapters.formula import Before
from lora_cli.surgery.edit import Contribution, Seen
from lora_cli.surgery.readers import Readers, torch_dtype


def before(term: Contribution, readers: Readers) -> Before | None:
    """What reads the weight that a change is computed from; None for others."""
    return partial(_whole, term.seen, readers) if term.seen else None


def _whole(seen: tuple[Seen, ...], readers: Readers) -> torch.Tensor:
    """The weight as a matrix (out × in), put together from where its outputs are stored."""
    parts = [(_matrix(one, readers), one.region) for one in seen]
    first, region = parts[0]
    if region is None:
        return first
    outputs = sum(len(part) for part, _ in parts)
    types = {torch_dtype(one.tensor.dtype) for one in seen}
    # Parts of several types go into one that holds all of them as they are.
    made = first.new_empty((outputs, first.shape[1]), dtype=types.pop() if len(types) == 1 else torch.float64)
    for part, region in parts:
        assert region is not None  # noqa: S101 (what is stored in parts has them)
        made[torch.tensor(region.indices())] = part.to(made.dtype)
    return made


def _matrix(seen: Seen, readers: Readers) -> torch.Tensor:
    stored = readers.load(seen.tensor)
    matrix = stored.reshape(len(stored), -1)
    matrix = matrix.T if seen.transposed else matrix
    return matrix if seen.region is None else matrix[slice(*seen.region.outputs, seen.region.step)]
