"""How long an undo file will be, from a sample of what will be merged."""

from __future__ import annotations

from collections.abc import Sequence

from lora_cli.arithmetic.fragments import FragmentWriter
from lora_cli.surgery.budget import BLOCK_ELEMENTS, Budget
from lora_cli.surgery.edit import Edit
from lora_cli.surgery.engine import Workshop
from lora_cli.surgery.identity import factors_of
from lora_cli.surgery.plan import Plan
from lora_cli.surgery.readers import open_readers, torch_dtype
from lora_cli.surgery.receipt import own_files
from lora_cli.surgery.undo.codecs import LENGTHS, Encoder, Summand
from lora_cli.surgery.undo.recording import codec_of
from lora_cli.surgery.workers import one_torch_thread

SAMPLES = 16
"""Tensors of which one block is looked at."""

_RECORD = 60
_CHANGED_RECORD = 240
"""Bytes that a tensor takes in the manifest and header, about: one that is copied, and one that is not."""


def undo_bytes(plan: Plan, budget: Budget, *, embed: bool = False) -> int:
    """Estimate the length of the undo file of a merge by merging one block of some of its tensors, writing nothing.

    Args:
        plan: The merge.
        budget: Buffer sizes, of whole blocks.
        embed: Whether the factors go into it.

    Raises:
        NumericError: The sample holds numbers that cannot be merged.
    """
    changing = [edit for edit in plan.edits if edit.nbytes and not edit.copies and edit.former]
    chosen = _spread(changing, SAMPLES)
    with one_torch_thread():
        workshop = Workshop(budget.strip_bytes)
        per_byte = [_sampled(edit, workshop) / edit.nbytes for edit in chosen]
    share = sum(per_byte) / len(per_byte) if per_byte else 0.0
    touched = {e.former.key for e in plan.edits if e.former}
    stored = sum(tensor.nbytes for key, tensor in plan.checkpoint.tensors.items() if key not in touched)
    numbers = range(len(plan.opened)) if embed else ()
    embedded = sum(tensor.nbytes for number in numbers for tensor in factors_of(plan, number).values())
    older = sum(source.size for source in own_files(plan.checkpoint).values())
    fixed = _RECORD * len(plan.checkpoint.tensors) + _CHANGED_RECORD * len(changing) + stored + older + embedded
    return int(share * sum(edit.nbytes for edit in changing)) + fixed


def _spread(edits: Sequence[Edit], count: int) -> list[Edit]:
    step = max(1, len(edits) // count)
    return list(edits[step // 2 :: step])[:count]


def _sampled(edit: Edit, workshop: Workshop) -> float:
    """Bytes that undoing a tensor takes, from one block in its middle."""
    rows, columns = edit.matrix
    height = max(1, min(rows, BLOCK_ELEMENTS // max(1, columns)))
    begin = (rows - height) // 2
    seen = size = 0
    how = codec_of(edit)
    encoder, writer = Encoder(how), FragmentWriter(LENGTHS[how])
    with open_readers() as readers:
        for piece in workshop.pieces(edit, begin, begin + height):
            base = piece.source
            if edit.displaced is not None:
                dtype = torch_dtype(edit.displaced.dtype)
                base = readers.load_part(edit.displaced, dtype, piece.offset, piece.result.numel())
            stream = encoder.add(base, piece.result, Summand(piece.delta, piece.gains), ends_block=piece.ends_block)
            size += 0 if stream is None else len(writer.add(stream))
            seen += piece.result.numel()
    size += len(writer.close())
    return size / max(1, seen) * rows * columns
