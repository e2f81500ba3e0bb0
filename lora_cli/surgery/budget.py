"""How much may be in flight: the budget that the engine's buffers keep to. No torch here: a plan shows it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from lora_cli.adapters.formula import Formula
from lora_cli.errors import UsageError
from lora_cli.surgery.edit import Edit
from lora_cli.surgery.plan import Plan

TILE_ELEMENTS = 1 << 16
TILE_COLUMNS = 2048
"""A tile has at most so many elements and columns: its buffers stay in a core's own cache."""

DEFAULT_MEMORY = 256 << 20
"""Bytes that buffers and factors may take unless the user says otherwise."""

BLOCK_ELEMENTS = 1 << 18
"""Most elements that are read, computed and written at once. Undo files are encoded by such blocks."""

UNIT_BYTES = 64 << 20
"""Runs of copied bytes longer than this are cut into several units of work."""

_WIDEST = 8
"""Bytes of the widest element that is computed."""

STRIP_BYTES = BLOCK_ELEMENTS * _WIDEST
"""Most bytes that one read takes."""

_LEAST_STRIP = 64 << 10
_CODEC_BYTES = 16 * BLOCK_ELEMENTS
"""What encoding or decoding a block takes where half of its elements have several preimages."""

_GAIN_BYTES = 4 * 8 * BLOCK_ELEMENTS
"""What finding the lengths of DoRA takes: a block as it is stored and as it is computed, its gains, and sums."""

_TILE_BYTES = TILE_ELEMENTS * (8 + 8 + 8)


@dataclass(frozen=True, slots=True)
class Budget:
    """How much may be in flight.

    Attributes:
        threads: Units that run at once.
        strip_bytes: Bytes of one piece.
        peak_bytes: Most bytes that buffers and prepared factors take, all workers together.
    """

    threads: int
    strip_bytes: int
    peak_bytes: int


def settle_budget(plan: Plan, *, memory: int | None, threads: int, blocks: bool = False) -> Budget:
    """Find how many workers and how long pieces fit in `memory` bytes, with four pieces in each.

    Without a bound from the user it is `DEFAULT_MEMORY`, or more where one tensor's factors need it. With `blocks`
    pieces are whole blocks, since what they forget is encoded or decoded with them.

    Raises:
        UsageError: Not even one worker with the shortest piece fits; says what would.
    """
    blocks = blocks or any(edit.forgotten for edit in plan.edits)
    factors = max((_factor_bytes(edit) for edit in plan.edits), default=0)
    gained = any(edit.gains or edit.stretched or edit.acts & {"gain", "map"} for edit in plan.edits)
    fixed = _TILE_BYTES + factors + (_CODEC_BYTES if blocks else 0) + (_GAIN_BYTES if gained else 0)
    shortest = BLOCK_ELEMENTS * max(map(_width, plan.edits), default=1) if blocks else _LEAST_STRIP
    least = fixed + 4 * shortest
    if memory is None:
        memory = max(DEFAULT_MEMORY, least)
    if memory < least:
        raise UsageError(
            "The memory budget is too small for one tile",
            expected=f"--memory {-(-least // (1 << 20))}MiB or more",
            found=f"{memory} bytes",
        )
    threads = max(1, min(threads, memory // least))
    strip = min(max(STRIP_BYTES, shortest), (memory // threads - fixed) // 4)
    return Budget(threads, strip, threads * (fixed + 4 * strip))


def _width(edit: Edit) -> int:
    """Bytes of the widest element on either side of a computed tensor."""
    if edit.copies or edit.fresh is not None:
        return 1
    sides = [edit.dtype, edit.source.dtype, *([edit.displaced.dtype] if edit.displaced else [])]
    return max(dtype.bits // 8 for dtype in sides)


def _factor_bytes(edit: Edit) -> int:
    """Bytes that the factors of one tensor take at their height: as stored, in float64, and on their grids; or made.

    Of a stack it is those of one matrix: they are prepared one after the other.
    """
    products: Counter[int | None] = Counter()
    formulas: Counter[int | None] = Counter()
    for term in edit.terms:
        if term.delta.acts == "product":
            products[term.at] += term.delta.rank * sum(term.matrices[1:])
        if isinstance(term.delta, Formula):
            formulas[term.at] += term.delta.working_bytes + (
                term.delta.group * edit.matrix[1] * 16 if term.delta.acts == "map" else 0
            )
            formulas[term.at] += 2 * sum(seen.tensor.nbytes for seen in term.seen)
    made = edit.fresh.working_bytes if edit.fresh is not None else 0
    return _at_once(products) * 8 * 5 + _at_once(formulas) + made


def _at_once(amounts: Mapping[int | None, int]) -> int:
    """The most that is there at once: what is for all matrices of a stack, with what is for one of them."""
    return amounts.get(None, 0) + max((count for at, count in amounts.items() if at is not None), default=0)
