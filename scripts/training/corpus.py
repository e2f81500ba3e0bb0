"""Two texts in the public domain, as bytes: prose to begin with, and verse that an adapter learns.

The prose is from "Alice's Adventures in Wonderland" by Lewis Carroll (1865), the verse from the sonnets of William
Shakespeare (1609).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

HELD_OUT = 0.1
"""The last part of a text, which no training sees."""


@dataclass(frozen=True)
class Text:
    """Tokens of a text, one a byte.

    Attributes:
        train: What training may see.
        held_out: What it may not.
    """

    train: Tensor
    held_out: Tensor

    @classmethod
    def read(cls, name: str) -> Text:
        """Read one of the texts that lie beside this file."""
        data = bytearray(Path(__file__).with_name(f"{name}.txt").read_bytes())
        tokens = torch.frombuffer(data, dtype=torch.uint8).long()
        cut = round(len(tokens) * (1 - HELD_OUT))
        return cls(tokens[:cut], tokens[cut:])

    def batch(self, size: int, length: int, numbers: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return random windows and, for each of their tokens, the next one: both (size, length)."""
        starts = torch.randint(len(self.train) - length, (size,), generator=numbers)
        windows = torch.stack([self.train[start : start + length + 1] for start in starts.tolist()])
        return windows[:, :-1], windows[:, 1:]

    def windows(self, length: int) -> tuple[Tensor, Tensor]:
        """Return what was held out in windows that do not overlap, as `batch` does."""
        count = (len(self.held_out) - 1) // length
        used = self.held_out[: count * length + 1]
        return used[:-1].view(count, length), used[1:].view(count, length)
