"""Factors of experts whose numbers lie apart: copied once into an order in which those of each expert lie together.

PEFT's B of a stack is (out × rank·experts) with the expert fastest, so that every expert's numbers are spread over all
of it, and reading them expert by expert would read it as often as there are experts. Copies are in a scratch file of
the same length, which is gone afterwards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace

from lora_cli.adapters.adapter import Strided
from lora_cli.checkpoint.checkpoint import StoredTensor, open_shard
from lora_cli.checkpoint.files import Folder, temporary_folder
from lora_cli.checkpoint.header import render_header
from lora_cli.checkpoint.source import SourceFile
from lora_cli.checkpoint.staged import StagedFile
from lora_cli.surgery.edit import Contribution, Edit
from lora_cli.surgery.plan import Plan

CHUNK = 16 << 20
"""Bytes that are put in order at once."""

_FILE, _NAME = ".factors", "factors in order"

Copies = Mapping[tuple[SourceFile, str], StoredTensor]
"""What tells a factor from others → its copy, (matrices, rows, rank)."""


@contextlib.contextmanager
def in_order(plan: Plan, place: Folder | None = None) -> Iterator[Plan]:
    """The same plan, with factors that can be read expert by expert.

    Args:
        plan: The plan; itself where all of its factors can.
        place: A folder for the copies, on the disk of the output; a temporary one unless given.

    Raises:
        DiskFullError: There is no space for them.
    """
    strided = plan.strided
    if not strided:
        yield plan
        return
    with contextlib.ExitStack() as stack:
        folder = place or stack.enter_context(temporary_folder())
        stack.callback(folder.remove, _FILE)
        yield _with_copies(plan, _write(folder, strided))


def _write(folder: Folder, strided: list[Strided]) -> Copies:
    """Write all of them into one file; returns where each is, (matrices, rows, rank)."""
    header = render_header([(str(n), one.tensor.dtype, one.shape) for n, one in enumerate(strided)], {})
    file = StagedFile(folder, _FILE, _NAME, header.file_bytes)
    try:
        file.write(0, header.prefix)
        places = {info.name: header.data_start + info.begin for info in header.tensors}
        for number, one in enumerate(strided):
            _copy(one, file, places[str(number)])
    finally:
        file.abandon()  # nothing of it must last
    shard = open_shard(file.path, name=_NAME)
    found = {info.name: info for info in shard.header.tensors}
    named = (replace(found[str(number)], name=one.tensor.key) for number, one in enumerate(strided))
    return {one.place: StoredTensor(shard, info) for one, info in zip(strided, named, strict=True)}


def _copy(one: Strided, file: StagedFile, at: int) -> None:
    import numpy as np

    matrices, rows, rank = one.shape
    size = one.tensor.dtype.bits // 8
    line = matrices * rank * size
    height = max(1, CHUNK // line)
    with one.tensor.shard.source.open() as reader:
        for top in range(0, rows, height):
            count = min(height, rows - top)
            data = np.frombuffer(reader.read(one.tensor.offset + top * line, count * line), f"u{size}")
            lying = (count, rank, matrices) if one.fastest else (count, matrices, rank)
            ordered = np.ascontiguousarray(data.reshape(lying).transpose((2, 0, 1) if one.fastest else (1, 0, 2)))
            for number, matrix in enumerate(ordered):
                file.write(at + (number * rows + top) * rank * size, matrix.reshape(-1).view("u1").data)


def _with_copies(plan: Plan, copies: Copies) -> Plan:
    files = tuple(
        replace(file, edits=tuple(_edit(edit, copies) if edit.terms else edit for edit in file.edits))
        for file in plan.files
    )
    return replace(plan, files=files)


def _edit(edit: Edit, copies: Copies) -> Edit:
    return replace(edit, terms=tuple(_term(term, copies) for term in edit.terms))


def _term(term: Contribution, copies: Copies) -> Contribution:
    strided = term.delta.strided
    return term if strided is None else replace(term, delta=term.delta.gathered(copies[strided.place]))
