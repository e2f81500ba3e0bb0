"""The index of a sharded checkpoint: which tensor is in which shard."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_cli.checkpoint import strict_json
from lora_cli.errors import MalformedFileError, UnsafeInputError

if TYPE_CHECKING:
    from collections.abc import Mapping

INDEX_LIMIT = 64 << 20
"""Longest index that is read; a million tensors fit."""

_DEVICE_NAMES = {
    "con",
    "prn",
    "aux",
    "nul",
    "conin$",
    "conout$",
    *(f"{port}{n}" for port in ("com", "lpt") for n in "123456789¹²³"),
}
_FORBIDDEN = re.compile(r'[\x00-\x1f\x7f/\\:*?"<>|]')


@dataclass(frozen=True, slots=True)
class Index:
    """A parsed `*.safetensors.index.json`.

    Attributes:
        name: File name of the index.
        raw: Its bytes as they stand in the file.
        weight_map: Tensor name → shard name, every shard name a plain file name.
        document: The whole document, for writing it anew with its other fields kept.
    """

    name: str
    raw: bytes
    weight_map: Mapping[str, str]
    document: Mapping[str, Any]

    @property
    def total_size(self) -> object:
        """What the index claims to be the size of all tensors; may be missing or of any type."""
        metadata = self.document.get("metadata")
        return metadata.get("total_size") if isinstance(metadata, dict) else None

    def rewritten(self, weight_map: Mapping[str, str], total_size: int) -> bytes:
        """Return the bytes of this index for other tensors, everything else kept."""
        metadata = self.document.get("metadata")
        kept = dict(metadata) if isinstance(metadata, dict) else {}
        if list(self.weight_map) == sorted(self.weight_map):
            weight_map = dict(sorted(weight_map.items()))  # as most writers leave it
        changed = {"metadata": {**kept, "total_size": total_size}, "weight_map": dict(weight_map)}
        document = {**self.document, **changed}
        return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def parse_index(raw: bytes, *, name: str) -> Index:
    """Parse an index strictly.

    Raises:
        MalformedFileError: It is no JSON object with a `weight_map` of strings.
        UnsafeInputError: A shard name is not a plain `.safetensors` file name on every system.
    """
    document = strict_json.loads(raw, file=name, limit=INDEX_LIMIT, what="index")
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise MalformedFileError(
            "The index has no weight_map", file=name, expected='{"weight_map": {tensor: shard, …}}'
        )
    for shard in dict.fromkeys(map(_as_text, weight_map.values())):
        check_plain_name(shard, file=name)
    return Index(name, raw, weight_map, document)


def check_plain_name(shard: str | None, *, file: str) -> None:
    """Refuse a shard name that could lead out of its folder, or mean something else on another system.

    Raises:
        MalformedFileError: It is not a string.
        UnsafeInputError: It is not a plain, portable `.safetensors` name.
    """
    if shard is None:
        raise MalformedFileError("The index names a shard by something that is not text", file=file)
    stem = shard.split(".", 1)[0].strip().lower()  # Windows takes "con .x" for CON
    if not shard.endswith(".safetensors") or _FORBIDDEN.search(shard) or stem in _DEVICE_NAMES or shard[:1] == ".":
        raise UnsafeInputError(
            "The index names a shard that is not a plain .safetensors file name",
            file=file,
            found=ascii(shard),
            hint="get the checkpoint from a source you trust; lora-cli opens only files of the same folder",
        )


def _as_text(value: object) -> str | None:
    return value if isinstance(value, str) else None
