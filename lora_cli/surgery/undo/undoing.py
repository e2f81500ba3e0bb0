"""Planning an exact unmerge: the merged checkpoint, its undo file and the adapters, held against each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from lora_cli.adapters.source import AdapterSource
from lora_cli.adapters.tuners import NAMES
from lora_cli.arithmetic import ARITHMETIC
from lora_cli.checkpoint.checkpoint import Checkpoint, Shard, StoredTensor
from lora_cli.checkpoint.digests import bytes_digest, cuts, file_digest, span_digest
from lora_cli.checkpoint.header import Header, TensorInfo
from lora_cli.checkpoint.manifest import AdapterRecord, FileRecord, SideRecord, TensorRecord, recorded
from lora_cli.checkpoint.sidefiles import SIDE_FILE_LIMIT, SideFile, lies_inside
from lora_cli.checkpoint.source import listing
from lora_cli.checkpoint.undo_file import UndoFile, factor_part, gains_part, side_part, stored_part, undo_part
from lora_cli.errors import UnsupportedError, UsageError, WrongInputError
from lora_cli.surgery.edit import MERGEABLE, Contribution, Edit, Forgotten, Operation
from lora_cli.surgery.identity import contents
from lora_cli.surgery.plan import AdapterUse, OutputFile, Plan, ScaleUse
from lora_cli.surgery.receipt import OWN_FILES
from lora_cli.surgery.undo.advice import with_all
from lora_cli.surgery.undo.given import check_given, differing
from lora_cli.surgery.undo.places import check_places, damaged
from lora_cli.surgery.undo.terms import Most, recall

_NAMED = 50
"""So many names a warning has at most."""


@dataclass(frozen=True, slots=True)
class OwnFile:
    """A file of lora-cli in an undo file: its name in a folder, its digest, and its bytes or the part that has them."""

    name: str
    digest: str
    content: bytes | StoredTensor

    @property
    def size(self) -> int:
        """Its length."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.nbytes


@dataclass(frozen=True)
class Undoing:
    """An exact unmerge that was planned.

    Attributes:
        plan: What will be written.
        undo: The undo file.
        own: Files of lora-cli that were with the base.
        lost: Small files of the base that were changed in the merged checkpoint since, and cannot come back.
    """

    plan: Plan
    undo: UndoFile
    own: tuple[OwnFile, ...]
    lost: tuple[str, ...]

    def uses(self) -> tuple[AdapterUse, ...]:
        """How each adapter was used, as the undo file has it."""
        return tuple(self._use(number, said) for number, said in enumerate(self.undo.manifest.adapters))

    def _use(self, number: int, said: AdapterRecord) -> AdapterUse:
        terms = [term for edit in self.plan.edits for term in edit.terms if term.adapter == number]
        kinds = {NAMES.get(term.delta.kind, "LoRA") for term in terms}
        scales = Counter(term.delta.scale.alpha for term in terms)
        uses = tuple(ScaleUse(scale, "recorded at the merge", count) for scale, count in scales.items())
        return AdapterUse(said.label, "undo file", ", ".join(sorted(kinds)) or "not recorded", said.weight, "", uses)


def plan_undoing(
    merged: Checkpoint, undo: UndoFile, adapters: Sequence[AdapterSource], *, whole: bool = False
) -> Undoing:
    """Plan an exact unmerge, reading headers and the adapters' tensors, whose digests are compared.

    Args:
        merged: The merged checkpoint.
        undo: Its undo file.
        adapters: What was merged; not needed where the undo file holds the factors.
        whole: Whether all tensors of an adapter must be those of the merge, and not only its factors.

    Raises:
        WrongInputError: The merged checkpoint or an adapter is not the one of the merge.
        UsageError: An adapter is needed and was not given.
        UnsupportedError: Another arithmetic made the merge.
        MalformedFileError: The undo file is damaged.
    """
    if undo.manifest.arithmetic != ARITHMETIC:
        raise UnsupportedError(
            "The merge was made by another version of the arithmetic",
            file=undo.shard.name,
            expected=ARITHMETIC,
            found=undo.manifest.arithmetic,
            hint="update lora-cli",
        )
    return _Undoing(merged, undo, adapters, whole=whole).planned()


class _Undoing:
    """Makes the plan. Used once."""

    def __init__(self, merged: Checkpoint, undo: UndoFile, adapters: Sequence[AdapterSource], *, whole: bool) -> None:
        self._merged = merged
        self._whole = whole
        self._undo = undo
        self._given = adapters
        self._most = Most.of(tensor.shape for tensor in merged.tensors.values())
        self._contents = [contents(source.tensors.values()) for source in adapters]
        check_given(undo.manifest, adapters, self._contents, whole=whole)
        self._factors = [self._factors_of(number, said) for number, said in enumerate(undo.manifest.adapters)]
        self._warnings: list[str] = []
        self._lost: list[str] = []

    def planned(self) -> Undoing:
        manifest = self._undo.manifest
        check_places(self._undo, merged_folder=self._merged.folder is not None)
        pairs = self._pairs()
        files = tuple(self._file(said, shard) for said, shard in pairs)
        sides = [side for said in manifest.side_files if said.name not in OWN_FILES and (side := self._side(said))]
        own = tuple(self._own(said) for said in manifest.side_files if said.name in OWN_FILES)
        used = {side.name for side in sides} | {file.name for file in files}
        ours = {*(shard.name for shard in self._merged.shards), *OWN_FILES, "README.md"}
        left = sorted(name for name in _names_in(self._merged) if name not in used | ours)
        if manifest.left_out:
            self._warnings.append(f"the base also had {_some(manifest.left_out)}, which the merge did not take along")
        plan = Plan(
            operation="unmerge",
            checkpoint=self._merged,
            files=files,
            side_files=tuple(sides),
            left_out=tuple(left),
            adapters=(),
            opened=(),
            ledger=(),
            dropped=self._appended(files),
            inputs=(*self._merged.paths, self._undo.shard.source.path, *(source.path for source in self._given)),
            warnings=tuple(self._warnings),
        )
        return Undoing(plan, self._undo, own, tuple(self._lost))

    # Inputs

    def _pairs(self) -> list[tuple[FileRecord, Shard | None]]:
        """Each file of the base with the merged file that it comes from; refuses what is not what the merge wrote."""
        said = self._undo.manifest.files
        shards = {shard.name: shard for shard in self._merged.shards}
        # Files that held nothing but a wrapped checkpoint's factors were not written; one file alone has any name.
        written = [file for file in said if file.merged_header]
        alone = written[0] if len(written) == len(shards) == 1 else None
        pairs = [(file, self._merged.shards[0] if file is alone else shards.get(file.name)) for file in said]
        wrong = [
            f"{file.name}: {'missing' if shard is None else 'another header'}"
            for file, shard in pairs
            if file.merged_header and (shard is None or bytes_digest(shard.header.prefix) != file.merged_header)
        ]
        if wrong:
            raise WrongInputError(
                "The checkpoint is not the one that this undo file belongs to",
                file=self._merged.label,
                expected=f"what merging into {self._undo.manifest.base} gave",
                details=wrong,
                hint="name the merged checkpoint as the merge wrote it, with its own undo file",
            )
        return pairs

    def _factors_of(self, number: int, said: AdapterRecord) -> Mapping[str, StoredTensor]:
        """Where the factors of an adapter are: in the undo file, or in an adapter that was given."""
        if said.held != "apart":
            place = partial(factor_part, number) if said.held == "embedded" else stored_part
            if not said.factors:
                return {}
            held = {name: self._undo.part(place(name)) for name in said.factors}
            broken = differing(said, contents(held.values()), by_part=place)
            if broken:
                raise damaged(self._undo, f"the factors of {said.label}", details=broken)
            return held
        pairs = zip(self._given, self._contents, strict=True)
        source = next((source for source, content in pairs if not differing(said, content)), None)
        if said.factors and source is None:
            raise UsageError(
                f"The adapter {said.label} is needed to undo this merge",
                file=self._merged.label,
                expected=f"content digest {said.digest}",
                hint=with_all(self._undo.manifest.adapters, verify=self._whole),
            )
        return {name: source.tensors[name] for name in said.factors} if source else {}

    # Tensors

    def _file(self, said: FileRecord, shard: Shard | None) -> OutputFile:
        header = self._header(said, shard)
        records = {record.key: record for record in said.tensors}
        names = [info.name for info in header.tensors]
        if sorted(records) != sorted(names) or len(said.tensors) != len(names):
            raise damaged(self._undo, f"{said.name}: the tensors of its header")
        digests = (digest for name in names for digest in records[name].digests)
        if file_digest(header, digests) != said.digest:
            raise damaged(self._undo, f"{said.name}: the digests of its tensors")
        edits = tuple(self._edit(info, records[info.name]) for info in header.tensors)
        # A name that could not be recorded as it is has not changed.
        name = shard.name if shard is not None and recorded(shard.name) == said.name else said.name
        return OutputFile(name, header, edits, shard)

    def _header(self, said: FileRecord, shard: Shard | None) -> Header:
        if said.own_header:
            return self._undo.header(said.name, said.size)
        if shard is None or shard.header.file_bytes != said.size:
            raise damaged(self._undo, f"the header of {said.name}")
        return shard.header

    def _edit(self, info: TensorInfo, said: TensorRecord) -> Edit:
        key = info.name
        terms = tuple(recall(term, key, info.shape, self._find, self._most) for term in said.terms)
        forgotten = None
        operation: Operation = "keep"
        if said.how == "stored":
            source = self._undo.part(stored_part(key))
        elif said.origin in self._merged.tensors:
            source = self._merged.tensors[said.origin]
        else:
            raise damaged(self._undo, f"{key}: a tensor {said.origin} in the merged checkpoint")
        if said.how in ("preimages", "residual"):
            operation = "restore"
            part = self._undo.part(undo_part(key))
            forgotten = Forgotten("preimages" if said.how == "preimages" else "residual", part, said.fragments)
        elif said.origin != key:
            operation = "rename"
        edit = Edit(
            key,
            operation,
            source,
            info.dtype,
            info.shape,
            info.begin,
            info.end,
            terms=terms,
            forgotten=forgotten,
            gains=self._gains(info, said, source, terms) if said.gains else None,
        )
        self._check_edit(edit, said)
        return edit

    def _gains(
        self, info: TensorInfo, said: TensorRecord, source: StoredTensor, terms: Sequence[Contribution]
    ) -> StoredTensor:
        """What the outputs of a tensor were multiplied by, in the working type."""
        part = self._undo.part(gains_part(info.name))
        work = "F64" if {info.dtype.name, source.dtype.name} & {"F32", "F64"} else "F32"
        outputs = {term.matrices[1 + term.transposed] for term in terms}
        if said.how != "preimages" or part.dtype.name != work or {part.shape} != {(count,) for count in outputs}:
            raise damaged(self._undo, f"{info.name}: the gains of its outputs")
        with part.shard.source.open() as reader:
            if span_digest(reader, part.offset, part.nbytes) != said.gains:
                raise damaged(self._undo, f"{info.name}: the gains that were recorded")
        return part

    def _check_edit(self, edit: Edit, said: TensorRecord) -> None:
        """Hold what is said of a tensor against the types and shapes that are there."""
        amount = len(list(cuts(edit.source)))
        types = {edit.dtype.name, edit.source.dtype.name}
        numbers, alike = types <= set(MERGEABLE), len(types) == 1
        same = edit.source.shape == edit.shape and {"preimages": numbers, "residual": numbers or alike}.get(
            said.how, alike
        )
        digests = {len(said.digests), len(said.origin_digests)} == {amount}
        one_way = len({(term.count, term.transposed) for term in edit.terms}) <= 1
        fits = one_way and all(term.covers(edit.shape) for term in edit.terms)
        terms = fits and (said.how == "preimages" or not edit.terms)
        sizes = (amount, edit.forgotten.stored.nbytes) if edit.forgotten else (0, 0)
        held = (len(said.fragments), sum(said.fragments)) == sizes and min(said.fragments, default=0) >= 0
        if not (same and digests and terms and held):
            raise damaged(self._undo, f"{edit.key}: what its shape {list(edit.shape)} needs")

    def _find(self, number: int, name: str) -> StoredTensor:
        if not 0 <= number < len(self._factors) or name not in self._factors[number]:
            raise damaged(self._undo, f"the factor {name} of adapter {number}")
        return self._factors[number][name]

    def _appended(self, files: Sequence[OutputFile]) -> tuple[str, ...]:
        used = {edit.source.key for file in files for edit in file.edits if edit.source.shard is not self._undo.shard}
        return tuple(sorted(key for key in self._merged.tensors if key not in used))

    # Small files

    def _side(self, said: SideRecord) -> SideFile | None:
        name = said.name
        if said.stored:
            data = self._packed(said)
            return SideFile(name, None, len(data), data)
        path = self._merged.folder / name if self._merged.folder else None
        if path is None:
            self._lose(name, "is not beside a single file")
            return None
        if not path.is_file() or not lies_inside(self._merged, path):
            what = "is missing from the merged checkpoint" if not path.is_file() else "is a link that leads out of it"
            self._lose(name, what)
            return None
        side = SideFile.of(name, self._merged.looks.at(path, name))
        if bytes_digest(side.read()) != said.digest:
            self._lose(name, "was changed since the merge, and comes as it is now")
        return side

    def _own(self, said: SideRecord) -> OwnFile:
        if said.stored == "packed":
            return OwnFile(said.name, said.digest, self._packed(said))
        part = self._undo.part(side_part(said.name))
        with part.shard.source.open() as reader:
            if part.nbytes != said.size or span_digest(reader, part.offset, said.size) != said.digest:
                raise damaged(self._undo, f"the file {said.name}, of {said.size} bytes")
        return OwnFile(said.name, said.digest, part)

    def _packed(self, said: SideRecord) -> bytes:
        data = self._undo.unpacked(side_part(said.name), SIDE_FILE_LIMIT)
        if bytes_digest(data) != said.digest:
            raise damaged(self._undo, f"the file {said.name}")
        return data

    def _lose(self, name: str, what: str) -> None:
        self._lost.append(name)
        self._warnings.append(f"{name} {what}; the base's own is not in the undo file")


def _some(names: Sequence[str]) -> str:
    """Names for a sentence; of very many the first."""
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more files" if more > 0 else "")


def _names_in(checkpoint: Checkpoint) -> list[str]:
    root = checkpoint.folder
    return [path.relative_to(root).as_posix() for path in listing(root, below=True) if path.is_file()] if root else []
