"""Units of work: a plan's output cut into parts that are done side by side, in any order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lora_cli.checkpoint.digests import rows_per_cut
from lora_cli.checkpoint.source import SourceFile
from lora_cli.surgery.budget import UNIT_BYTES
from lora_cli.surgery.edit import Edit
from lora_cli.surgery.plan import OutputFile


@dataclass(frozen=True, slots=True)
class Unit:
    """One piece of work: rows of a tensor, a run of bytes that are copied unseen, or a header that is written.

    Attributes:
        file: Position of the output file in the plan.
        edit: The tensor, or None for a run of bytes.
        begin: First row, or first byte within the output file.
        end: One past the last.
        source: The file that bytes are copied from; None for rows and headers.
        source_offset: Where they begin in it.
        nbytes: Output bytes.
    """

    file: int
    edit: Edit | None
    begin: int
    end: int
    source: SourceFile | None
    source_offset: int
    nbytes: int


def units_of(number: int, file: OutputFile, *, seen: bool = False) -> Iterator[Unit]:
    """Cut one output file into units, in byte order. The first has the header, alone or as the beginning of a copy.

    Args:
        number: Position of the file in the plan.
        file: The file.
        seen: Whether copied tensors are looked at too: then each of them comes as rows besides the copy.
    """
    start = file.header.data_start
    copy = _copied_header(file)  # source, its offset, begin, end
    if copy is None:
        yield Unit(number, None, 0, start, None, 0, start)
    for edit in file.edits:
        if not edit.nbytes:
            continue
        if edit.copies:
            if seen:
                yield from _row_units(number, edit)
            source, begin = edit.source.shard.source, start + edit.begin
            if copy and copy[0] == source and copy[1] + copy[3] - copy[2] == edit.source.offset and copy[3] == begin:
                copy = (source, copy[1], copy[2], start + edit.end)
                continue
            yield from _copy_units(number, copy)
            copy = (source, edit.source.offset, begin, start + edit.end)
        else:
            yield from _copy_units(number, copy)
            copy = None
            yield from _row_units(number, edit)
    yield from _copy_units(number, copy)


def _copied_header(file: OutputFile) -> tuple[SourceFile, int, int, int] | None:
    """The header as the beginning of a copy: a file that stays as it is can then be shared on the disk, whole."""
    shards = {edit.source.shard.source: edit.source.shard for edit in file.edits if edit.fresh is None}
    for source, shard in shards.items():
        if shard.header.prefix == file.header.prefix:
            return source, 0, 0, file.header.data_start
    return None


def _copy_units(number: int, copy: tuple[SourceFile, int, int, int] | None) -> Iterator[Unit]:
    if copy is None:
        return
    source, offset, begin, end = copy
    for at in range(begin, end, UNIT_BYTES):
        stop = min(at + UNIT_BYTES, end)
        yield Unit(number, None, at, stop, source, offset + at - begin, stop - at)


def _row_units(number: int, edit: Edit) -> Iterator[Unit]:
    rows = edit.matrix[0]
    step = _rows_per_unit(edit)
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        yield Unit(number, edit, begin, end, None, 0, edit.nbytes * (end - begin) // rows)


def _rows_per_unit(edit: Edit) -> int:
    # Some inits must make all of a fresh tensor to make any of it.
    return max(1, edit.matrix[0]) if edit.fresh is not None else rows_per_cut(edit.shape, edit.dtype)
