"""Checking an exact unmerge while it is made: every byte that goes in and every byte that comes out, by digest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from blake3 import blake3

from lora_cli.checkpoint.digests import rows_per_cut, tensor_digests
from lora_cli.checkpoint.manifest import TensorRecord
from lora_cli.errors import LoraCliError, MalformedFileError, WrongInputError
from lora_cli.surgery.edit import Edit
from lora_cli.surgery.undo.undoing import Undoing
from lora_cli.surgery.units import Unit

if TYPE_CHECKING:
    from lora_cli.checkpoint.staged import Span
    from lora_cli.surgery.engine import Pieces

Finding = Literal["right", "changed", "broken"]
"""What the undo file says it is; not what the merge wrote; or not the base that should come out."""


class Checker:
    """Watches the units of an unmerge, in any order and from any process.

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

    kind = Finding

    def digest(self, number: int) -> str:
        """Digest that an output file must have."""
        return self._undoing.undo.manifest.files[number].digest

    def gathered(self, number: int) -> tuple[tuple[Span, ...], str]:
        """Nothing: a finding is one word."""
        return (), ""

    def watch(self, unit: Unit, pieces: Pieces, found: list[Finding]) -> Pieces:
        """Pass the pieces of a unit on, and compare both sides with what the undo file says."""
        from lora_cli.surgery.readers import raw_bytes

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
            found.append("changed" if self._is_changed(edit, said) else "broken")
            return
        found.append(_judge(edit, said, number, source.hexdigest(), result.hexdigest()))

    def take(self, unit: Unit, found: Finding) -> None:
        """Keep what was found in a unit."""
        if unit.edit is None:
            return
        said = self._said[unit.file, unit.edit.key]
        self._left[unit.file, unit.edit.key] -= 1
        if found == "changed":
            self._changed.add(said.origin)
        elif found == "broken":
            self._broken.add(said.origin if said.how == "stored" else said.key)

    def _is_changed(self, edit: Edit, said: TensorRecord) -> bool:
        with edit.source.shard.source.open() as reader:
            return tensor_digests(edit.source, reader) != said.origin_digests

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


def _judge(edit: Edit, said: TensorRecord, number: int, source: str, result: str) -> Finding:
    """Compare the digests of one cut with what the undo file says."""
    right = result == said.digests[number]
    if edit.forgotten is None:
        return "right" if right else "broken" if said.how == "stored" else "changed"
    if source != said.origin_digests[number]:
        return "changed"
    return "right" if right else "broken"
