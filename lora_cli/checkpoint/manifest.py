"""What an undo file says: how each file and tensor of the base comes back, and from what.

The manifest is JSON in the undo file (see `undo_file`). It holds no path of any machine and no clock.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

import msgspec

from lora_cli.errors import MalformedFileError, UnsupportedError

MANIFEST_LIMIT = 64 << 20
"""Longest manifest that is read, in bytes of JSON."""

CUTS_LIMIT = 1 << 16
"""Most cuts of a tensor: they have 2^41 elements together, which no tensor has."""

TERMS_LIMIT = 1 << 14
"""Most terms of a tensor: sixteen adapters with two for each of 512 experts."""

NAMES_LIMIT = 1 << 16
"""Most files of a base's folder that stayed behind."""


Digest = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
"""Digest of a cut or file, in hexadecimal."""


Digests = Annotated[tuple[Digest, ...], msgspec.Meta(max_length=CUTS_LIMIT)]
"""Digests of the cuts of a tensor."""

Setting = bool | int | float | str | tuple[int, ...]
"""A number or word that a formula needs besides tensors."""


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Strictly read: a field that is not known is an error, for whoever wrote it meant something by it."""


class TermRecord(_Record, frozen=True):
    """One term of a delta, with all that its arithmetic needs.

    Attributes:
        kind: Which class of deltas.
        adapter: Position among the adapters.
        tensors: Names of its factors in the adapter's file.
        scale: What multiplies the product, the user's weight included.
        swapped: The factors are stored the other way round.
        transposed: The base stores the matrix as (in × out).
        outputs: First output of the stored tensor that it changes, one past the last, and how many there are; and from
            one to the next, if that is not 1. All of them if empty.
        rows: Which outputs of the delta these are, as (start, stop, step).
        blocks: How many blocks a block-diagonal factor has.
        matrix: Which matrix of the delta, a stack, it is; none or all if missing.
        at: Which matrix of the stored tensor, a stack, it changes; none or all if missing.
        count: Of how many, where `at` says one.
        layout: How a stack's factors lie in their tensors, in a word; empty for (in × rank) and (rank × out) of each.
        parts: What a formula calls its tensors.
        settings: Numbers and words that it needs besides.
        shape: Of the parameter, as the trained model has it.
    """

    kind: str
    adapter: int
    tensors: tuple[str, ...]
    scale: float
    swapped: bool = False
    transposed: bool = False
    outputs: tuple[int, ...] = ()
    rows: tuple[tuple[int, int, int], ...] = ()
    blocks: int = 0
    matrix: int | None = None
    at: int | None = None
    count: int = 0
    layout: str = ""
    parts: tuple[str, ...] = ()
    settings: dict[str, Setting] = {}
    shape: tuple[int, ...] = ()


class TensorRecord(_Record, frozen=True):
    """How one tensor of the base comes back.

    Attributes:
        key: Its name in the base.
        how: `copy` its bytes from the merged checkpoint, find it again by its `preimages` or by a stored `residual`, or
            take it as it is `stored` in the undo file.
        digests: Of each cut of the base's tensor.
        source: The merged tensor that it comes from; the same key if empty.
        source_digests: Of each cut of that; those of the base if empty.
        fragments: Bytes of what the undo file holds for each cut.
        terms: What was added, for preimages.
        gains: Digest of what its outputs were multiplied by; empty if they were not.
    """

    key: str
    how: Literal["copy", "preimages", "residual", "stored"]
    digests: Digests
    source: str = ""
    source_digests: Digests = ()
    fragments: Annotated[tuple[int, ...], msgspec.Meta(max_length=CUTS_LIMIT)] = ()
    terms: Annotated[tuple[TermRecord, ...], msgspec.Meta(max_length=TERMS_LIMIT)] = ()
    gains: Annotated[str, msgspec.Meta(pattern=r"\A(?:[0-9a-f]{64})?\Z")] = ""

    @property
    def origin(self) -> str:
        """Key of the merged tensor that it comes from."""
        return self.source or self.key

    @property
    def origin_digests(self) -> tuple[str, ...]:
        """Digests of the cuts of that."""
        return self.source_digests or self.digests


class FileRecord(_Record, frozen=True):
    """One safetensors file of the base.

    Attributes:
        name: Its name.
        size: Its length.
        digest: Its digest (see `digests`).
        tensors: Its tensors in byte order.
        own_header: Whether its header is in the undo file; else the merged file has the same.
        merged_header: Digest of what stands before the data in the merged file of that name; empty if there is none.
        appended: Tensors that the merge added to that file: digest of each cut, by key.
    """

    name: str
    size: int
    digest: Digest
    tensors: tuple[TensorRecord, ...]
    own_header: bool = False
    merged_header: str = ""
    appended: dict[str, Digests] = {}


class SideRecord(_Record, frozen=True):
    """One small file of the base; `stored` whole in the undo file, or else the merged checkpoint has the same."""

    name: str
    size: int
    digest: Digest
    stored: Literal["", "packed", "raw"] = ""


class AdapterRecord(_Record, frozen=True):
    """One adapter that was merged.

    Attributes:
        label: What it is called.
        digest: Of its content: names, types, shapes and bytes of all tensors in its file.
        weight: The user's weight.
        factors: Content of each factor, by name (see `digests.tensor_content`).
        held: Where its factors are: in the adapter's own file, embedded in the undo file, or in the base itself.
    """

    label: str
    digest: Digest
    factors: dict[str, str]
    weight: float = 1.0
    held: Literal["apart", "embedded", "in the base"] = "apart"


class Manifest(_Record, frozen=True):
    """All of it.

    Attributes:
        arithmetic: Version of the arithmetic that the merge and its undo use.
        tool: Who wrote it.
        base: Label of the base.
        files: Its safetensors files.
        side_files: Its small files.
        adapters: What was merged.
        left_out: Files of the base's folder that were not taken along, and do not come back.
    """

    arithmetic: int
    tool: str
    base: str
    files: tuple[FileRecord, ...]
    side_files: tuple[SideRecord, ...]
    adapters: tuple[AdapterRecord, ...]
    left_out: Annotated[tuple[str, ...], msgspec.Meta(max_length=NAMES_LIMIT)] = ()

    @property
    def tensors(self) -> Iterator[TensorRecord]:
        """The tensors of the base, of all files."""
        return (tensor for file in self.files for tensor in file.tensors)

    @property
    def format(self) -> int:
        """The first format that has all that it says; whoever knows no later one can read it."""
        tensors = [*self.tensors]
        terms = [term for tensor in tensors for term in tensor.terms]
        if any(t.layout or t.shape or t.matrix is not None or t.at is not None or len(t.outputs) > 3 for t in terms):
            return 3
        newer = any(tensor.gains for tensor in tensors) or any(t.outputs or t.rows or t.blocks for t in terms)
        return 2 if newer else 1


def recorded(name: str) -> str:
    """Return the name of a file or folder as a manifest can hold it: `?` for what is not printable or no UTF-8."""
    return "".join(character if character.isprintable() else "?" for character in name)


def write_manifest(manifest: Manifest) -> bytes:
    """Return the JSON of a manifest: the same manifest, the same bytes.

    Raises:
        UnsupportedError: It has more than `read_manifest` takes.
    """
    longest = max((len(tensor.terms) for tensor in manifest.tensors), default=0)
    digests = [tensor.digests for tensor in manifest.tensors]
    digests += [cuts for file in manifest.files for cuts in file.appended.values()]
    for what, count, limit in (
        ("files that stay behind", len(manifest.left_out), NAMES_LIMIT),
        ("changes of one tensor", longest, TERMS_LIMIT),
        ("cuts of one tensor", max(map(len, digests), default=0), CUTS_LIMIT),
    ):
        if count > limit:
            raise UnsupportedError(
                f"An undo file cannot hold so many {what}",
                expected=f"at most {limit}",
                found=count,
                hint="merge without an undo file: --no-undo",
            )
    return msgspec.json.encode(manifest)


def read_manifest(data: bytes, *, file: object) -> Manifest:
    """Parse a manifest.

    Raises:
        MalformedFileError: It is none.
    """
    try:
        return msgspec.json.decode(data, type=Manifest)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise MalformedFileError("The manifest of the undo file cannot be read", file=file, found=error) from error
