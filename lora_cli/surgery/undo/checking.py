"""Checking an exact unmerge while it is made: every byte that goes in and every byte that comes out, by digest."""

from __future__ import annotations

import threading

from blake3 import blake3

from lora_cli.checkpoint.digests import rows_per_cut, tensor_digests
from lora_cli.checkpoint.manifest import TensorRecord
from lora_cli.errors import LoraCliError, MalformedFileError, WrongInputError
from lora_cli.surgery.engine import Pieces, Unit, raw_bytes
from lora_cli.surgery.plan import Edit
from lora_cli.surgery.undo.undoing import Undoing


class Checker:
    """Watches the units of an unmerge, in any order and from any thread.

    Args:
        undoing: What was planned.
    """

    def __init__(self, undoing: Undoing) -> None:
        self._undoing = undoing
        self._said = {
            (number, record.key): record
            for number, file in enumerate(undoing.undo.manifest.files)
            for record in file.tensors
        }
        self._left = {place: len(record.digests) for place, record in self._said.items()}
        self._changed: set[str] = set()
        self._broken: set[str] = set()
        self._lock = threading.Lock()

    def watch(self, unit: Unit, pieces: Pieces) -> Pieces:
        """Pass the pieces of a unit on, and compare both sides with what the undo file says."""
        edit = unit.edit
        if edit is None:
            yield from pieces
            return
        said = self._said[unit.file, edit.key]
        number = unit.begin // rows_per_cut(edit.shape, edit.dtype)
        source, result = blake3(), blake3()
        try:
            for piece in pieces:
                result.update(raw_bytes(piece.result))
                if edit.forgotten is not None:
                    source.update(raw_bytes(piece.source))
                yield piece
        except MalformedFileError as error:
            if error.file is not None:
                raise  # it cannot be read, or changed meanwhile, and says so itself
            # Streams do not fit other values than those they were made for: then these are what is wrong.
            if self._is_changed(edit, said):
                self._note(self._changed, said.origin)
            else:
                self._note(self._broken, said.key)
            return
        self._compare(edit, said, number, source.hexdigest(), result.hexdigest())
        with self._lock:
            self._left[unit.file, edit.key] -= 1

    def _compare(self, edit: Edit, said: TensorRecord, number: int, source: str, result: str) -> None:
        if edit.forgotten is None:
            if result != said.digests[number]:
                self._note(self._broken if said.how == "stored" else self._changed, said.origin)
        elif source != said.origin_digests[number]:
            self._note(self._changed, said.origin)
        elif result != said.digests[number]:
            self._note(self._broken, said.key)

    def _is_changed(self, edit: Edit, said: TensorRecord) -> bool:
        with edit.source.shard.source.open() as reader:
            return tensor_digests(edit.source, reader) != said.origin_digests

    def _note(self, where: set[str], key: str) -> None:
        with self._lock:
            where.add(key)

    def problems(self) -> dict[str, str]:
        """Tensors that are not right, each with what is wrong."""
        found = dict.fromkeys(sorted(self._changed), "not what the merge wrote")
        found |= dict.fromkeys(sorted(self._broken), "what comes out is not the base")
        return found

    def verdict(self) -> None:
        """Raise unless every tensor was seen, whole and right.

        Raises:
            WrongInputError: Tensors of the merged checkpoint are not what the merge wrote.
            MalformedFileError: What comes out is not the base: the undo file is damaged.
        """
        if self._changed:
            raise WrongInputError(
                f"Tensors of the merged checkpoint are not what the merge wrote ({len(self._changed)})",
                file=self._undoing.plan.base,
                details=sorted(self._changed),
                hint="get the checkpoint as the merge wrote it; --approximate subtracts the adapter from this one",
            )
        if self._broken:
            raise MalformedFileError(
                "The undo file is damaged",
                file=self._undoing.undo.shard.name,
                tensor=next(iter(self._broken)) if len(self._broken) == 1 else None,
                details=[f"{key}: {what}" for key, what in self.problems().items()],
                hint="get the undo file again from where the merged checkpoint came from",
            )
        if any(self._left.values()):
            raise LoraCliError("Not every tensor was checked", found=sum(self._left.values()))
