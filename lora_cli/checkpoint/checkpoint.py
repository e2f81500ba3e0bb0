"""A checkpoint as it lies on disk: named tensors in one safetensors file, or in a folder of shards.

Opening reads headers only. Shard names come from the index but are looked up in the folder's own listing, so no name
from a file ever becomes a path.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lora_cli.checkpoint import strict_json
from lora_cli.checkpoint.dtypes import DType
from lora_cli.checkpoint.header import Header, TensorInfo, parse_header, read_header_length
from lora_cli.checkpoint.index import INDEX_LIMIT, Index, parse_index
from lora_cli.checkpoint.links import check_link, is_there
from lora_cli.checkpoint.source import Looks, SourceFile, as_text, listing, look_at, read_whole
from lora_cli.errors import MalformedFileError, UnsafeInputError, UnsupportedError, UsageError

CONFIG_LIMIT = 16 << 20
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
ADAPTER_FILE = "adapter_model.safetensors"
CONVERT_HINT = (
    'convert it: python -c "import sys, torch; from safetensors.torch import save_file; '
    'save_file(torch.load(sys.argv[1], weights_only=True), sys.argv[2])" IN.bin OUT.safetensors'
)


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file and its parsed header."""

    source: SourceFile
    header: Header

    @property
    def name(self) -> str:
        """File name within the checkpoint."""
        return self.source.name


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor where it lies: a reference, no data."""

    shard: Shard
    info: TensorInfo

    @property
    def key(self) -> str:
        """Its name."""
        return self.info.name

    @property
    def dtype(self) -> DType:
        """Its storage type."""
        return self.info.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.info.shape

    @property
    def nbytes(self) -> int:
        """Its length in bytes."""
        return self.info.end - self.info.begin

    @property
    def offset(self) -> int:
        """Where its first byte is in the file."""
        return self.shard.header.data_start + self.info.begin

    def part(self, index: int) -> StoredTensor:
        """One entry along its first axis, where it lies: a row of a table, a matrix of a stack."""
        size = self.nbytes // self.shape[0]
        begin = self.info.begin + index * size
        return replace(self, info=replace(self.info, shape=self.shape[1:], begin=begin, end=begin + size))


@dataclass(frozen=True)
class Checkpoint:
    """Named tensors in one file or a folder of shards.

    Attributes:
        path: The file or folder.
        label: What messages and receipts call it; never a path of this machine.
        folder: The folder of side files, or None for a bare file.
        shards: The safetensors files, in name order.
        index: The parsed index, if there is one.
        warnings: What a person should know about it.
        looks: What was seen of its small files.
    """

    path: Path
    label: str
    folder: Path | None
    shards: tuple[Shard, ...]
    index: Index | None = None
    warnings: tuple[str, ...] = ()
    looks: Looks = field(default_factory=Looks, repr=False, compare=False)

    @cached_property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Every tensor by its name, in shard and byte order."""
        return {info.name: StoredTensor(shard, info) for shard in self.shards for info in shard.header.tensors}

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The model's `config.json`; empty when there is none."""
        path = self.folder / "config.json" if self.folder else None
        if path is None or not is_there(path):
            return {}
        return read_config(self.looks.at(path))

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(shard.source.size - shard.header.data_start for shard in self.shards)

    @property
    def paths(self) -> list[Path]:
        """Every place that must not be written to while this checkpoint is an input."""
        return [self.path, *(shard.source.path for shard in self.shards)]


def read_config(place: Path | SourceFile) -> Mapping[str, Any]:
    """Read a JSON object such as `config.json`.

    Raises:
        MalformedFileError: It is not one.
    """
    data = read_whole(place, limit=CONFIG_LIMIT)
    document = strict_json.loads(data, file=place.name, limit=CONFIG_LIMIT, what="config")
    if not isinstance(document, dict):
        raise MalformedFileError("The config is not a JSON object", file=place.name)
    return document


def open_shard(path: Path, *, name: str | None = None) -> Shard:
    """Read the header of one safetensors file.

    Raises:
        UnsupportedError: This machine stores the bytes of numbers in another order than the format.
        LoraCliError: The file cannot be read, or is none.
    """
    source = look_at(path, name)
    if sys.byteorder != "little":
        raise UnsupportedError(
            "This machine stores numbers with the highest byte first, and the file with the lowest",
            file=source.name,
            hint="run lora-cli on a little-endian machine, as x86 and ARM are",
        )
    with source.open() as reader:
        first = reader.read(0, min(16, source.size))
        length = read_header_length(first, source.size, file=source.name)
        raw = reader.read(8, length)
    return Shard(source, parse_header(raw, source.size, file=source.name))


def open_checkpoint(path: Path, *, label: str | None = None) -> Checkpoint:
    """Open a checkpoint from a `.safetensors` file or a folder, reading headers only.

    Args:
        path: The file or folder.
        label: What to call it; the last part of the path if not given.

    Raises:
        UsageError: Nothing is there, or it holds no checkpoint.
        MalformedFileError: A header or the index is broken, or a shard is missing.
        UnsafeInputError: Pickles, links that lead outside, a tensor in two shards.
    """
    label = label or as_text(path.resolve().name)
    if not path.exists():
        raise UsageError("The path does not exist", file=path)
    if path.is_dir():
        return _open_folder(path, label)
    refuse_pickle(path)
    return Checkpoint(path, label, None, (open_shard(path),))


def refuse_pickle(path: Path) -> None:
    """Raise UnsafeInputError for a file that would have to be unpickled."""
    if path.suffix in PICKLES:
        raise UnsafeInputError("Pickled weights can run code when they are read", file=path.name, hint=CONVERT_HINT)


def _open_folder(folder: Path, label: str) -> Checkpoint:
    inside = {entry.name: entry for entry in listing(folder)}
    seen = [name for name in inside if not name.startswith(".")]  # what is hidden, systems and killed runs left
    weights = [name for name in seen if name.endswith(".safetensors") and name != ADAPTER_FILE]
    indexes = [name for name in seen if name.endswith(".safetensors.index.json")]
    if len(indexes) > 1:
        raise UnsupportedError(
            "The folder holds several checkpoints",
            file=label,
            found=", ".join(indexes),
            hint="name one file of them",
        )
    for name in (*weights, *indexes):
        check_link(inside[name])
    if indexes:
        looks = Looks()
        data = read_whole(looks.at(inside[indexes[0]]), limit=INDEX_LIMIT)
        opened = _open_sharded(folder, label, inside, parse_index(data, name=indexes[0]), weights)
        return replace(opened, looks=looks)
    return _open_only_file(folder, label, inside, weights)


def _open_only_file(folder: Path, label: str, inside: Mapping[str, Path], weights: list[str]) -> Checkpoint:
    chosen = "model.safetensors" if "model.safetensors" in weights else (weights[0] if len(weights) == 1 else None)
    if chosen is None:
        _refuse_folder(label, inside, weights)
    assert chosen is not None  # noqa: S101 (_refuse_folder never returns)
    unused = [name for name in weights if name != chosen]
    return Checkpoint(folder, label, folder, (open_shard(inside[chosen]),), warnings=_unused_warning(unused))


def _refuse_folder(label: str, inside: Mapping[str, Path], weights: list[str]) -> None:
    if weights:
        raise MalformedFileError(
            "The folder holds several safetensors files and no index",
            file=label,
            found=", ".join(weights[:8]),
            hint="add model.safetensors.index.json, or name one file",
        )
    pickles = [name for name in inside if name.endswith(PICKLES)]
    if pickles:
        raise UnsafeInputError(
            "The folder holds only pickled weights, which can run code when they are read",
            file=label,
            found=", ".join(pickles[:8]),
            hint=CONVERT_HINT,
        )
    if ADAPTER_FILE in inside or "adapter_config.json" in inside:
        raise UsageError(
            "The folder is an adapter, not a checkpoint",
            file=label,
            hint="give the base checkpoint first, then the adapter",
        )
    below = [name for name, entry in inside.items() if _holds_weights(entry)]
    raise UsageError(
        "The folder holds no safetensors checkpoint",
        file=label,
        found=f"safetensors files below it, in {', '.join(below[:8])}{', …' if len(below) > 8 else ''}"
        if below
        else None,
        hint="name one of these folders" if below else "name the folder that holds the weights",
    )


def _holds_weights(entry: Path) -> bool:
    return entry.is_dir() and any(path.suffix == ".safetensors" for path in listing(entry))


def _open_sharded(folder: Path, label: str, inside: Mapping[str, Path], index: Index, weights: list[str]) -> Checkpoint:
    names = sorted(set(index.weight_map.values()))
    missing = [name for name in names if name not in inside]
    if missing:
        raise MalformedFileError(
            f"{len(missing)} of {len(names)} shards are missing",
            file=label,
            details=missing,
            hint="download the checkpoint again; it is not complete",
        )
    if "model.safetensors" in weights and "model.safetensors" not in names:
        raise MalformedFileError(
            "The folder holds both an index and a single model.safetensors that the index does not name",
            file=label,
            hint="remove one of them, or name the file that you mean",
        )
    shards = tuple(open_shard(inside[name]) for name in names)
    warnings = _check_index(index, shards)
    unused = [name for name in weights if name not in names]
    warnings += _unused_warning(unused)
    return Checkpoint(folder, label, folder, shards, index, warnings)


def _check_index(index: Index, shards: tuple[Shard, ...]) -> tuple[str, ...]:
    """Hold the index against the headers; what the index does not list stays, with a warning."""
    where: dict[str, str] = {}
    for shard in shards:
        for info in shard.header.tensors:
            if info.name in where:
                raise UnsafeInputError(
                    "A tensor is in two shards",
                    file=index.name,
                    tensor=info.name,
                    found=f"{where[info.name]} and {shard.name}",
                )
            where[info.name] = shard.name
    wrong = [
        f"{key}: the index says {shard}, found in {where.get(key, 'no shard')}"
        for key, shard in index.weight_map.items()
        if where.get(key) != shard
    ]
    if wrong:
        raise MalformedFileError(
            f"{len(wrong)} tensors are not in the shard that the index names", file=index.name, details=wrong
        )
    warnings = []
    unlisted = [key for key in where if key not in index.weight_map]
    if unlisted:
        warnings.append(
            f"{index.name} does not list {len(unlisted)} tensors that the shards hold ({', '.join(unlisted[:3])}"
            f"{', …' if len(unlisted) > 3 else ''}); they are kept"
        )
    real = sum(shard.source.size - shard.header.data_start for shard in shards)
    if index.total_size is not None and index.total_size != real:
        warnings.append(f"{index.name} says total_size {index.total_size!r}; the tensors have {real} bytes")
    return tuple(warnings)


def _unused_warning(names: list[str]) -> tuple[str, ...]:
    return (f"not part of the checkpoint, left out: {', '.join(names)}",) if names else ()
