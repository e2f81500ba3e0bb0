"""Unmerging in memory: does the undo file give the base, and does that merge to what is there?"""

from __future__ import annotations

from typing import NamedTuple

import torch

from lora_cli.arithmetic.ordered import bits_view
from lora_cli.checkpoint.checkpoint import Checkpoint, Shard, StoredTensor
from lora_cli.checkpoint.digests import path_digest, tensor_digests
from lora_cli.progress import Progress
from lora_cli.surgery.budget import TILE_ELEMENTS, Budget
from lora_cli.surgery.edit import Edit
from lora_cli.surgery.engine import Piece, Workshop
from lora_cli.surgery.plan import Plan
from lora_cli.surgery.readers import Readers, open_readers, raw_bytes
from lora_cli.surgery.receipt import OWN_FILES, beside
from lora_cli.surgery.repacking import in_order
from lora_cli.surgery.undo.checking import Checker, Finding
from lora_cli.surgery.undo.undoing import Undoing
from lora_cli.surgery.units import Unit, units_of
from lora_cli.surgery.workers import run_units


def roundtrip(undoing: Undoing, base: Checkpoint | None, budget: Budget, progress: Progress) -> dict[str, str]:
    """Unmerge in memory; compare with digests, with what merging again gives, and with the base where it is given.

    Returns:
        Tensors and files that are not right, each with what is wrong.

    Raises:
        LoraCliError: An input cannot be read.
    """
    trip = _Trip(undoing, base)
    with in_order(undoing.plan) as plan:
        _take_all(trip, plan, budget, progress)
    return trip.verdict()


def _take_all(trip: _Trip, plan: Plan, budget: Budget, progress: Progress) -> None:
    progress.begin("roundtrip", sum(file.size for file in plan.files))
    every_unit = (unit for number, file in enumerate(plan.files) for unit in units_of(number, file, seen=True))
    units = (unit for unit in every_unit if unit.edit is not None)
    nbytes = sum(edit.nbytes for edit in plan.edits)
    for unit, found in run_units(units, trip.work, lambda: Workshop(budget.strip_bytes), budget.threads, nbytes=nbytes):
        trip.take(unit, found)
        progress.advance(unit.nbytes)


class _Seen(NamedTuple):
    """What was found in one unit: by the checker, and what is wrong besides."""

    checked: list[Finding]
    wrong: list[str]


class _Trip:
    def __init__(self, undoing: Undoing, base: Checkpoint | None) -> None:
        self._undoing = undoing
        self._base = base
        self._checker = Checker(undoing)
        self._different: dict[str, str] = {}

    def work(self, unit: Unit, workshop: Workshop) -> _Seen:
        edit = unit.edit
        assert edit is not None  # noqa: S101 (copies are left out)
        pieces = workshop.pieces(edit, unit.begin, unit.end)
        seen = _Seen([], [])
        with open_readers() as readers:
            for piece in self._checker.watch(unit, pieces, seen.checked):
                if piece.delta is not None and not _merges_again(piece, workshop):
                    seen.wrong.append("the base that comes out does not merge to what is there")
                if self._base is not None:
                    seen.wrong.extend(_compare(self._base, edit, piece, readers))
        return _Seen(seen.checked, seen.wrong[:1])

    def take(self, unit: Unit, found: _Seen) -> None:
        for finding in found.checked:
            self._checker.take(unit, finding)
        for what in found.wrong:
            self._note(unit.edit.key if unit.edit else "", what)

    def _note(self, key: str, what: str) -> None:
        self._different.setdefault(key, what)

    def verdict(self) -> dict[str, str]:
        for key, what in self._checker.problems().items():
            self._different.setdefault(key, what)
        for name in self._undoing.lost:
            self._different.setdefault(name, "changed since the merge, or missing")
        self._check_appended()
        if self._base is not None:
            self._compare_files(self._base)
        return dict(sorted(self._different.items()))

    def _check_appended(self) -> None:
        """What the merge added is as it wrote it, and nothing else was added since."""
        merged = self._undoing.plan.checkpoint.tensors
        said = {key: cuts for file in self._undoing.undo.manifest.files for key, cuts in file.appended.items()}
        for key in self._undoing.plan.dropped:
            if key not in said:
                self._note(key, "the merge did not write it")
                continue
            with merged[key].shard.source.open() as reader:
                if tensor_digests(merged[key], reader) != said[key]:
                    self._note(key, "not what the merge wrote")
        for key in said.keys() - merged.keys():
            self._note(key, "the merge wrote it, and it is not there")

    def _compare_files(self, base: Checkpoint) -> None:
        shards: dict[str, Shard] = {shard.name: shard for shard in base.shards}
        files = self._undoing.plan.files
        alone = len(files) == len(shards) == 1
        for file in files:
            shard = base.shards[0] if alone else shards.get(file.name)
            if shard is None or shard.header.raw != file.header.raw:
                self._note(
                    file.name, "the base has no such file" if shard is None else "another header than the base's"
                )
        for side in self._undoing.undo.manifest.side_files:
            path = beside(base.path, side.name) if side.name in OWN_FILES else (base.folder or base.path) / side.name
            if base.folder is None and side.name not in OWN_FILES:
                continue  # a bare file was named: there is nothing to compare with
            if path not in base.looks and not path.is_file():
                self._note(side.name, "the base has no such file")
            elif path_digest(base.looks.at(path)) != side.digest:
                self._note(side.name, "not the base's file")
        for key in base.tensors.keys() - {edit.key for edit in self._undoing.plan.edits}:
            self._note(key, "in the base, and does not come back")


def _compare(base: Checkpoint, edit: Edit, piece: Piece, readers: Readers) -> list[str]:
    tensor = base.tensors.get(edit.key)
    if tensor is None or (tensor.dtype, tensor.shape) != (edit.dtype, edit.shape):
        return ["the base has no such tensor"]
    return [] if _same(tensor, piece, readers) else ["not what the base has"]


def _merges_again(piece: Piece, workshop: Workshop) -> bool:
    assert piece.delta is not None  # noqa: S101 (who calls has looked)
    kernel = workshop.kernel(piece.result.dtype, piece.source.dtype)
    out = torch.empty_like(piece.source[:TILE_ELEMENTS])
    for begin in range(0, piece.result.numel(), TILE_ELEMENTS):
        part = slice(begin, begin + TILE_ELEMENTS)
        base = piece.result[part]
        gains = None if piece.gains is None else piece.gains[part]
        again = kernel.merge(base, piece.delta[part], out[: base.numel()], gains)
        if (bits_view(again) != bits_view(piece.source[part])).any():
            return False
    return True


def _same(tensor: StoredTensor, piece: Piece, readers: Readers) -> bool:
    data = memoryview(bytearray(piece.result.numel() * piece.result.itemsize))
    readers.of(tensor).read_into(tensor.offset + piece.offset * piece.result.itemsize, data)
    return data == raw_bytes(piece.result)
