"""Which small files travel with a checkpoint, and which do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from lora_cli.checkpoint import links
from lora_cli.checkpoint.source import SourceFile, check_size, listing, look_at, read_whole

if TYPE_CHECKING:
    from lora_cli.checkpoint.checkpoint import Checkpoint

SIDE_FILE_LIMIT = 64 << 20
"""Longest side file that is copied; the largest tokenizers have 30 MB."""

_SUFFIXES = {
    *(".json", ".txt", ".md", ".model", ".jinja", ".py", ".yaml", ".yml"),
    *(".tiktoken", ".spm", ".vocab", ".bpe", ".tok", ".jsonl"),
}
_BARE_NAMES = ("license", "licence", "notice", "copying", "use_policy")
_TOKENIZER_FILES = {
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja"),
}
_ADAPTER_FILES = {"adapter_config.json", "trainer_state.json"}


@dataclass(frozen=True, slots=True)
class SideFile:
    """A file that is written beside the tensors.

    Attributes:
        name: Relative name with forward slashes.
        source: Where it is copied from, or None when `data` holds it.
        size: Length in bytes.
        data: Its bytes when it was changed or made new.
    """

    name: str
    source: SourceFile | None
    size: int
    data: bytes | None = None

    @classmethod
    def of(cls, name: str, source: SourceFile) -> SideFile:
        """A file that is copied as it was when it was looked at."""
        return cls(name, source, source.size)

    def read(self) -> bytes:
        """Return its bytes.

        Raises:
            MalformedFileError: The file changed since it was looked at, or cannot be read.
        """
        if self.data is not None:
            return self.data
        assert self.source is not None  # noqa: S101 (either of the two is always set)
        return read_whole(self.source, limit=SIDE_FILE_LIMIT)


def side_files(checkpoint: Checkpoint) -> tuple[list[SideFile], list[str]]:
    """Return the files that belong beside a copy of `checkpoint`, and the names of those that are left out.

    Config, generation config, tokenizer, chat template, licence and card are taken, also one folder deep (the pooling
    config of a sentence encoder). Weights, pickles, adapter configs, receipts, hidden and very large files are not.
    """
    taken: list[SideFile] = []
    left: list[str] = []
    if checkpoint.folder is None:
        return taken, left
    root = checkpoint.folder
    own = {shard.name for shard in checkpoint.shards} | ({checkpoint.index.name} if checkpoint.index else set())
    inside = listing(root, below=True)
    checkpoint.looks.check_there(inside)
    for path in inside:
        name = path.relative_to(root).as_posix()
        if name in own or path.is_dir() or any(part.startswith(".") for part in name.split("/")):
            continue
        ours = name.count("/") <= 1 and _is_plain(name) and path.is_file() and lies_inside(checkpoint, path)
        if ours and belongs(path) and path.stat().st_size <= SIDE_FILE_LIMIT:
            taken.append(SideFile.of(name, checkpoint.looks.at(path, name)))
        else:
            left.append(name)
    return taken, left


def lies_inside(checkpoint: Checkpoint, path: Path) -> bool:
    """Whether a file beside a checkpoint's tensors really is there, or in the Hub's cache: no link leads out."""
    return links.lies_inside(path, checkpoint.folder or checkpoint.path.parent)


def _is_plain(name: str) -> bool:
    """Whether a name is the same name everywhere: undo files can name no others. Not UTF-8 is not printable either."""
    return "\\" not in name and name.isprintable()


def belongs(path: PurePath) -> bool:
    """Whether a file of this name is one that belongs beside a checkpoint's tensors."""
    name = path.name.lower()
    if name in _ADAPTER_FILES or name.endswith(".index.json") or name.startswith("lora_"):
        return False
    return path.suffix.lower() in _SUFFIXES or name.startswith(_BARE_NAMES)


def taken_tokenizer(folder: Path, present: Sequence[SideFile]) -> list[SideFile]:
    """Return `tokenizer_files` of a folder for an output, where none of them may be passed over.

    Raises:
        UnsafeInputError: One of them is a link that leads out of the folder, or no regular file.
        MalformedFileError: One of them is a link that leads nowhere, a folder, or too large.
    """
    for path in listing(folder) if folder.is_dir() else ():
        if path.name in _TOKENIZER_FILES:
            links.check_link(path)
            check_size(look_at(path), SIDE_FILE_LIMIT)
    return tokenizer_files(folder, present)


def tokenizer_files(folder: Path, present: Sequence[SideFile]) -> list[SideFile]:
    """Return the tokenizer files of an adapter's folder that are not, byte for byte, among `present`."""
    if not folder.is_dir():
        return []
    known = {side.name: side for side in present}
    found = [SideFile.of(path.name, look_at(path)) for path in listing(folder) if _is_tokenizer(path)]
    return [side for side in found if side.name not in known or known[side.name].read() != side.read()]


def _is_tokenizer(path: Path) -> bool:
    here = path.name in _TOKENIZER_FILES and path.is_file() and links.lies_inside(path, path.parent)
    return here and path.stat().st_size <= SIDE_FILE_LIMIT
