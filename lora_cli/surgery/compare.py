"""Comparing a checkpoint with what a plan would write, or with another checkpoint, as streams of pieces."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lora_cli.arithmetic.ordered import ulp, ulp_distances
from lora_cli.arithmetic.rounding import MERGEABLE
from lora_cli.arithmetic.strength import Strength
from lora_cli.checkpoint.checkpoint import StoredTensor
from lora_cli.checkpoint.digests import rows_per_cut
from lora_cli.surgery.budget import TILE_ELEMENTS, UNIT_BYTES, Budget
from lora_cli.surgery.edit import Edit
from lora_cli.surgery.engine import Piece, Workshop
from lora_cli.surgery.plan import Plan
from lora_cli.surgery.readers import open_readers, raw_bytes, torch_dtype
from lora_cli.surgery.workers import run_units


class Counted(NamedTuple):
    """What comparing one part of a tensor found.

    Attributes:
        key: The tensor.
        nbytes: How many bytes were compared.
        elements: How many elements differ.
        max_ulp: The largest difference in units in the last place; None for other than floating tensors.
        begin: Where the part begins.
        strength: How much of the deltas is there; None for tensors that take none.
    """

    key: str
    nbytes: int
    elements: int
    max_ulp: int | None
    begin: int
    strength: Strength | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of a computed tensor, or bytes of a copied one."""

    edit: Edit
    begin: int
    end: int


def compare_plan(plan: Plan, candidates: Mapping[str, StoredTensor], budget: Budget, max_ulp: int) -> Iterator[Counted]:
    """Compare each planned tensor with the candidate of its name, in no fixed order.

    Args:
        plan: What should be there.
        candidates: What is there, of the same types and shapes; other keys of the plan are passed over.
        budget: Threads and buffer sizes.
        max_ulp: How far an element of a computed tensor may be off.
    """

    def work(part: Part, tools: _Tools) -> Counted:
        candidate = candidates[part.edit.key]
        if part.edit.copies:
            return tools.copied(part, candidate)
        # Only what takes a delta is rounded; a tensor that was replaced is replaced to the bit.
        return tools.computed(part, candidate, max_ulp if part.edit.terms else 0)

    units = (part for edit in plan.edits if edit.key in candidates and edit.nbytes for part in parts(edit))
    nbytes = sum(edit.nbytes for edit in plan.edits if edit.key in candidates)
    for _, counted in run_units(units, work, lambda: _Tools(budget), budget.threads, nbytes=nbytes):
        yield counted


def parts(edit: Edit) -> Iterator[Part]:
    """Cut a tensor into units of work: by bytes where it is copied, else by rows."""
    size = edit.nbytes if edit.copies else edit.matrix[0]
    # A cut within an element would count it twice; all widths of whole bytes divide UNIT_BYTES.
    step = UNIT_BYTES if edit.copies else rows_per_cut(edit.shape, edit.dtype)
    for begin in range(0, size, step):
        yield Part(edit, begin, min(begin + step, size))


class _Tools:
    """What one worker keeps: the engine's buffers and one more for the candidate."""

    def __init__(self, budget: Budget) -> None:
        self.workshop = Workshop(budget.strip_bytes)
        self.buffer = torch.empty(budget.strip_bytes, dtype=torch.uint8)
        self.other = torch.empty(budget.strip_bytes, dtype=torch.uint8)

    def computed(self, part: Part, candidate: StoredTensor, max_ulp: int) -> Counted:
        elements, most, nbytes = 0, 0, 0
        strength = Strength()
        with open_readers() as readers:
            reader = readers.of(candidate)
            for piece in self.workshop.pieces(part.edit, part.begin, part.end):
                found = self.buffer[: piece.result.numel() * piece.result.itemsize].view(piece.result.dtype)
                reader.read_into(candidate.offset + piece.offset * found.itemsize, raw_bytes(found))
                nbytes += found.numel() * found.itemsize
                count, worst = _differences(piece, found, max_ulp)
                elements += count
                most = max(most, worst)
                strength.sample(piece.offset, piece.source, found, piece.wanted)
        return Counted(part.edit.key, nbytes, elements, most, part.begin, strength if part.edit.terms else None)

    def copied(self, part: Part, candidate: StoredTensor) -> Counted:
        elements, most = 0, None
        size = part.edit.dtype.bits // 8 or 1
        step = self.buffer.numel() // size * size
        with open_readers() as readers:
            here, there = readers.of(candidate), readers.of(part.edit.source)
            for begin in range(part.begin, part.end, step):
                length = min(step, part.end - begin)
                one, two = self.buffer[:length], self.other[:length]
                here.read_into(candidate.offset + begin, raw_bytes(one))
                there.read_into(part.edit.source.offset + begin, raw_bytes(two))
                places = _unequal(one.numpy(), two.numpy(), size)
                if places.size:
                    elements += int(places.size)
                    most = _worst(part.edit, one, two, most)
        return Counted(part.edit.key, part.end - part.begin, elements, most, part.begin)


def _unequal(one: NDArray[Any], two: NDArray[Any], size: int) -> NDArray[np.intp]:
    """Indices of the elements of `size` bytes that are not the same bytes."""
    unequal = one != two
    if not unequal.any():
        return np.empty(0, np.intp)
    return np.flatnonzero(unequal.reshape(-1, size).any(axis=1))


def _worst(edit: Edit, one: torch.Tensor, two: torch.Tensor, most: int | None) -> int | None:
    dtype = torch_dtype(edit.dtype) if edit.dtype.torch_name else None
    if dtype not in MERGEABLE:
        return None
    return max(most or 0, int(ulp_distances(one.view(dtype), two.view(dtype)).max()))


def _differences(piece: Piece, found: torch.Tensor, max_ulp: int) -> tuple[int, int]:
    """How many elements are more than `max_ulp` off, and by how much the worst of them.

    The unit is that of the storage type at the largest of |w|, |w' - w| and |w'|: where a weight and its change cancel,
    a rounding of either is many units of the small result, and yet as good as it can be.
    """
    elements, worst = 0, 0
    # In short runs: where all elements differ, the wide copies of a whole piece would not fit the budget.
    for begin in range(0, found.numel(), TILE_ELEMENTS):
        part = slice(begin, begin + TILE_ELEMENTS)
        count, most = _different(piece.source[part], piece.result[part], found[part], max_ulp)
        elements, worst = elements + count, max(worst, most)
    return elements, worst


def _different(source: torch.Tensor, expected: torch.Tensor, found: torch.Tensor, max_ulp: int) -> tuple[int, int]:
    places = _unequal(raw_view(expected), raw_view(found), expected.itemsize)
    if not places.size:
        return 0, 0
    index = torch.from_numpy(places)
    w, m, h = (tensor[index].to(torch.float64) for tensor in (source, expected, found))
    unit = ulp(torch.maximum(torch.maximum(w.abs(), m.abs()), (m - w).abs()), expected.dtype)
    off = (h - m).abs() / unit
    # NaN is wrong; and without leave every other bit is, be it the sign of a zero.
    wrong = ~(off <= max_ulp) if max_ulp else torch.ones_like(off, dtype=torch.bool)
    if not bool(wrong.any()):
        return 0, 0
    worst = off[wrong].nan_to_num(nan=2.0**62, posinf=2.0**62).amax().ceil().clamp(max=2.0**62)
    return int(wrong.sum()), int(worst)


def raw_view(tensor: torch.Tensor) -> NDArray[np.uint8]:
    """The bytes of a contiguous tensor as numpy sees them."""
    view: NDArray[np.uint8] = tensor.view(torch.uint8).numpy()
    return view
