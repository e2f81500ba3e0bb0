"""Recording a merge while it is made, so that it can be undone: digests of both sides, and what each block forgot."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from blake3 import blake3

from lora_cli.arithmetic.fragments import FragmentWriter
from lora_cli.checkpoint.digests import file_digest
from lora_cli.checkpoint.staged import Scratch, Span, StagedFile
from lora_cli.checkpoint.undo_file import Part, undo_part
from lora_cli.surgery.edit import Edit
from lora_cli.surgery.engine import Piece, Pieces
from lora_cli.surgery.plan import Plan
from lora_cli.surgery.readers import open_readers, raw_bytes, torch_dtype
from lora_cli.surgery.undo.codecs import LENGTHS, Encoder, How, Summand
from lora_cli.surgery.units import Unit


@dataclass
class Cut:
    """What is kept of one cut: digests before and after, gains, and where its fragment lies in the scratch file."""

    before: str = ""
    after: str = ""
    gains: bytes = b""
    spans: list[Span] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Bytes of its fragment."""
        return sum(span.length for span in self.spans)


class Recorder:
    """Watches the units of a merge, in any order and from any process, and writes the undo file at the end.

    Args:
        plan: The merge.
        scratch: Where fragments are gathered.
    """

    def __init__(self, plan: Plan, scratch: Scratch) -> None:
        self._plan = plan
        self._scratch = scratch
        self._cuts: defaultdict[tuple[int, str], dict[int, Cut]] = defaultdict(dict)

    kind = Cut

    def watch(self, unit: Unit, pieces: Pieces, found: list[Cut]) -> Pieces:
        """Pass the pieces of a unit on; what undoing them needs is found at their end."""
        edit = unit.edit
        if edit is None:
            yield from pieces
            return
        cut = Cut()
        if edit.copies and edit.displaced is None:
            yield from self._watch_copy(cut, pieces)
        else:
            yield from self._watch_change(edit, cut, pieces)
        found.append(cut)

    def take(self, unit: Unit, found: Cut) -> None:
        """Keep what was found in a unit."""
        if unit.edit is not None:
            self._cuts[unit.file, unit.edit.key][unit.begin] = found

    def _watch_copy(self, cut: Cut, pieces: Pieces) -> Pieces:
        digest = blake3()
        for piece in pieces:
            digest.update(raw_bytes(piece.result))
            yield piece
        cut.before = cut.after = digest.hexdigest()

    def _watch_change(self, edit: Edit, cut: Cut, pieces: Pieces) -> Pieces:
        before, after, how = blake3(), blake3(), codec_of(edit)
        encoder, writer = Encoder(how), FragmentWriter(LENGTHS[how])
        with open_readers() as readers:
            for piece in pieces:
                after.update(raw_bytes(piece.result))
                if edit.former is not None:
                    base = piece.source
                    if edit.displaced is not None:
                        dtype = piece.result.dtype if edit.copies else torch_dtype(edit.displaced.dtype)
                        base = readers.load_part(edit.displaced, dtype, piece.offset, piece.result.numel())
                    before.update(raw_bytes(base))
                    change = Summand(piece.delta, piece.gains)
                    stream = encoder.add(base, piece.result, change, ends_block=piece.ends_block)
                    self._spool(cut, b"" if stream is None else writer.add(stream))
                    cut.gains += _gains_seen(edit, piece)
                yield piece
        self._spool(cut, writer.close())
        cut.before, cut.after = before.hexdigest(), after.hexdigest()

    def _spool(self, cut: Cut, data: bytes) -> None:
        if data:
            cut.spans.append(self._scratch.append(data))

    def cuts(self, number: int, edit: Edit) -> list[Cut]:
        """What was kept of a tensor of an output file, cut by cut."""
        return [cut for _, cut in sorted(self._cuts[number, edit.key].items())]

    def gathered(self, number: int) -> tuple[tuple[Span, ...], str]:
        """Where the fragments of an output file are, synced, and their digest."""
        cuts = (cut for edit in self._plan.files[number].edits for cut in self.cuts(number, edit))
        spans = tuple(span for cut in cuts for span in cut.spans)
        return spans, self._scratch.seal(spans) if spans else ""

    def digest(self, number: int) -> str:
        """Digest of an output file."""
        file = self._plan.files[number]
        return file_digest(file.header, (cut.after for edit in file.edits for cut in self.cuts(number, edit)))

    def fragment_part(self, key: str, cuts: Sequence[Cut]) -> Part:
        """The part of an undo file that holds the fragments of a tensor."""
        spans = [span for cut in cuts for span in cut.spans]

        def write(file: StagedFile, at: int) -> None:
            self._scratch.copy_to(file, at, spans)

        return Part(undo_part(key), sum(cut.size for cut in cuts), write)


def _gains_seen(edit: Edit, piece: Piece) -> bytes:
    """The gains of the outputs that a piece is the first to show: rows as they begin, columns in the first row."""
    if piece.gains is None or not edit.stretched or codec_of(edit) == "residual":
        return b""
    columns = edit.matrix[1]
    if edit.terms[0].transposed:
        first = piece.gains[: max(0, columns - piece.offset)]
    else:
        first = piece.gains[-piece.offset % columns :: columns]
    return first.numpy().tobytes()


def codec_of(edit: Edit) -> How:
    """How what a merge forgets of a tensor is kept.

    What is replaced is no map of what was there, new rows are none of single elements, and of what other machines would
    compute otherwise nothing must be computed again.
    """
    by_element = edit.displaced is None and not edit.rows and all(t.delta.preimages for t in edit.terms)
    return "preimages" if by_element else "residual"
