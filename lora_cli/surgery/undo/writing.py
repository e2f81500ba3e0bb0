"""Writing the undo file of a merge that was recorded: how each file and tensor of the base comes back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lora_cli.arithmetic import ARITHMETIC
from lora_cli.checkpoint.checkpoint import Shard, StoredTensor
from lora_cli.checkpoint.digests import bytes_digest, file_digest, path_digest, tensor_digests
from lora_cli.checkpoint.dtypes import DTYPES
from lora_cli.checkpoint.header import TensorInfo
from lora_cli.checkpoint.manifest import (
    AdapterRecord,
    FileRecord,
    Manifest,
    SideRecord,
    TensorRecord,
    recorded,
)
from lora_cli.checkpoint.sidefiles import SIDE_FILE_LIMIT, SideFile, side_files
from lora_cli.checkpoint.source import read_whole
from lora_cli.checkpoint.staging import Staging
from lora_cli.checkpoint.undo_file import (
    UNDO_FILE,
    Part,
    copied,
    copied_file,
    factor_part,
    gains_part,
    header_part,
    numbers,
    packed,
    side_part,
    stored_part,
    write_undo_file,
)
from lora_cli.surgery.edit import Edit
from lora_cli.surgery.identity import factors_of
from lora_cli.surgery.plan import Plan
from lora_cli.surgery.receipt import own_files
from lora_cli.surgery.undo.recording import Cut, Recorder, codec_of
from lora_cli.surgery.undo.terms import record
from lora_cli.version import __version__


class UndoWriter:
    """Writes one undo file.

    Args:
        plan: The merge.
        recorder: What watched it; all of its units are done.
        adapters: What is recorded of the adapters.

    Attributes:
        base_digests: Digest of each file of the base, once it is written.
    """

    def __init__(self, plan: Plan, recorder: Recorder, adapters: Sequence[AdapterRecord]) -> None:
        self._plan = plan
        self._recorder = recorder
        self._adapters = tuple(adapters)
        self._parts: list[Part] = []
        self.base_digests: dict[str, str] = {}
        self._edits = {
            (former.shard.name, former.key): (number, edit)
            for number, file in enumerate(plan.files)
            for edit in file.edits
            if (former := edit.former)
        }

    def write(self, staging: Staging, name: str) -> int:
        """Write it into an output; returns its length."""
        base = self._plan.checkpoint
        numbers = {file.base.name: number for number, file in enumerate(self._plan.files)}
        files = tuple(self._file(shard, numbers.get(shard.name)) for shard in base.shards)
        sides = tuple(self._sides())
        back = {side.name for side in sides}
        manifest = Manifest(
            arithmetic=ARITHMETIC,
            tool=f"lora-cli {__version__}",
            base=recorded(base.label),
            files=files,
            side_files=sides,
            adapters=self._adapters,
            left_out=tuple(recorded(name) for name in self._plan.left_out if name not in back),
        )
        self.base_digests = {file.name: file.digest for file in manifest.files}
        self.base_digests |= {side.name: side.digest for side in manifest.side_files}
        for number, adapter in enumerate(self._adapters):
            if adapter.held == "embedded":
                factors = factors_of(self._plan, number)
                self._parts += [copied(factor_part(number, key), factors[key]) for key in sorted(factors)]
        return write_undo_file(staging, name, self._parts, manifest)

    def _file(self, shard: Shard, number: int | None) -> FileRecord:
        tensors = tuple(self._tensor(shard, info) for info in shard.header.tensors)
        merged = None if number is None else self._plan.files[number].header
        own = merged is None or merged.raw != shard.header.raw
        if own:
            self._parts.append(packed(header_part(recorded(shard.name)), shard.header.raw))
        return FileRecord(
            name=recorded(shard.name),
            size=shard.source.size,
            digest=file_digest(shard.header, (digest for tensor in tensors for digest in tensor.digests)),
            tensors=tensors,
            own_header=own,
            merged_header=bytes_digest(merged.prefix) if merged else "",
            appended={} if number is None else self._appended(number),
        )

    def _appended(self, number: int) -> dict[str, tuple[str, ...]]:
        edits = [edit for edit in self._plan.files[number].edits if edit.former is None]
        return {edit.key: tuple(cut.after for cut in self._recorder.cuts(number, edit)) for edit in edits}

    def _tensor(self, shard: Shard, info: TensorInfo) -> TensorRecord:
        stored = StoredTensor(shard, info)
        if (shard.name, info.name) not in self._edits:
            self._parts.append(copied(stored_part(info.name), stored))
            with shard.source.open() as reader:
                return TensorRecord(key=info.name, how="stored", digests=tensor_digests(stored, reader))
        number, edit = self._edits[shard.name, info.name]
        cuts = self._recorder.cuts(number, edit)
        source = "" if edit.key == info.name else edit.key
        before = tuple(cut.before for cut in cuts)
        if edit.copies and edit.displaced is None:
            return TensorRecord(key=info.name, how="copy", digests=before, source=source)
        self._parts.append(self._recorder.fragment_part(info.name, cuts))
        return self._changed(info.name, edit, cuts, source)

    def _changed(self, key: str, edit: Edit, cuts: Sequence[Cut], source: str) -> TensorRecord:
        how = codec_of(edit)
        gains = b"".join(cut.gains for cut in cuts)
        if gains:
            outputs = edit.matrix[1] if edit.terms[0].transposed else edit.matrix[0]
            self._parts.append(numbers(gains_part(key), DTYPES["F64" if len(gains) == 8 * outputs else "F32"], gains))
        return TensorRecord(
            key=key,
            how=how,
            digests=tuple(cut.before for cut in cuts),
            source=source,
            source_digests=tuple(cut.after for cut in cuts),
            fragments=tuple(cut.size for cut in cuts),
            terms=tuple(record(term) for term in edit.terms) if how == "preimages" else (),
            gains=bytes_digest(gains) if gains else "",
        )

    def _sides(self) -> Iterator[SideRecord]:
        """The small files of the base: those that the output does not have are stored."""
        base = self._plan.checkpoint
        planned = {side.name: side.source for side in self._plan.side_files}
        sides = [*side_files(base)[0]] if planned else []
        if base.index is not None:
            sides.append(SideFile.of(base.index.name, base.looks.at(base.path / base.index.name)))
        for side in sides:
            stored = planned.get(side.name) != side.source
            if stored:
                self._parts.append(packed(side_part(side.name), side.read()))
            yield SideRecord(side.name, side.size, bytes_digest(side.read()), "packed" if stored else "")
        for name, source in own_files(base).items():
            # An older undo file can be long, and is noise.
            part = copied_file(side_part(name), source)
            small = packed(part.name, read_whole(source, limit=SIDE_FILE_LIMIT)) if name != UNDO_FILE else None
            self._parts.append(small or part)
            yield SideRecord(name, part.size, path_digest(source), "raw" if name == UNDO_FILE else "packed")
