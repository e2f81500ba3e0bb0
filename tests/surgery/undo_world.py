"""What tests of exact unmerging share: a small merge of every kind, undo files taken apart, and refusals without trace.

Undo files are read and written here with json, zstd and blake3 alone, none of the program's own code.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from blake3 import blake3
from safetensors.torch import save_file

from lora_cli.cli.app import run
from lora_cli.errors import LoraCliError
from lora_cli.surgery.merge import MergeResult, merge
from lora_cli.surgery.placing import PlanOptions
from lora_cli.surgery.unmerge import UnmergeResult, unmerge

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

Raw = tuple[str, list[int], bytes]
Parts = dict[str, Raw]
Document = dict[str, Any]
Change = Callable[[Document, Parts], object]

UNDO, RECEIPT = "lora_merge.undo", "lora_merge.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
LORA = "base_model.model."
NEWER = {"gains", "outputs", "rows", "blocks"}
"""Fields of a manifest that format 1 does not have."""
NEWEST = {"matrix", "at", "count", "layout", "parts", "settings", "shape"}
"""Those that format 2 does not have."""


def numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Reproducible numbers around zero."""
    return torch.from_numpy(tiny.numbers(*shape, seed=seed)).to(dtype)


def lora(module: str, out: int, inner: int, seed: int) -> dict[str, torch.Tensor]:
    """Factors of rank 2, as PEFT names them."""
    return {
        f"{LORA}{module}.lora_A.weight": numbers(2, inner, seed=seed),
        f"{LORA}{module}.lora_B.weight": numbers(out, 2, seed=seed + 1),
    }


def base_tensors() -> dict[str, torch.Tensor]:
    """Two linear layers, a head that the adapter replaces, and tensors that nobody touches."""
    return {
        "x.weight": numbers(6, 4, seed=1, dtype=torch.bfloat16),
        "norm.weight": numbers(5, seed=2, dtype=torch.float16),
        "head.weight": numbers(3, 4, seed=3, dtype=torch.bfloat16),
        "y.weight": numbers(3, 5, seed=4),
        "ids": torch.arange(4),
    }


def adapter_tensors(seed: int = 10) -> dict[str, torch.Tensor]:
    """Factors for both layers, the head, and a tensor that the base lacks."""
    whole = {f"{LORA}head.weight": numbers(3, 4, seed=seed + 4), f"{LORA}score.weight": numbers(2, 4, seed=seed + 5)}
    return lora("x", 6, 4, seed) | lora("y", 3, 5, seed + 2) | whole


class World:
    """Inputs of a merge, the merge, and places for what comes after; every folder can be written anew."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.place = folder, folder / "place"
        self.base, self.adapter, self.merged = folder / "base", folder / "adapter", folder / "merged"
        self.out = self.place / "out"
        self.place.mkdir()

    def write(self, base: Mapping[str, torch.Tensor] | None = None) -> World:
        """Write a sharded base and its adapter."""
        self.write_base(self.base, base)
        self.write_adapter("adapter", adapter_tensors())
        return self

    def write_base(self, folder: Path, tensors: Mapping[str, torch.Tensor] | None = None) -> Path:
        """A base of two shards, with an index, a config, a tokenizer and a card."""
        tensors = base_tensors() if tensors is None else tensors
        folder.mkdir()
        names = list(tensors)
        where = {key: FIRST if at < (len(names) + 1) // 2 else SECOND for at, key in enumerate(names)}
        for name in (FIRST, SECOND):
            share = {key: tensor for key, tensor in tensors.items() if where[key] == name}
            save_file(share, folder / name, {"format": "pt"})
        tiny.write_json(folder / INDEX, {"metadata": {}, "weight_map": where})
        tiny.write_json(folder / "config.json", {"model_type": "none", "dtype": "bfloat16"})
        (folder / "tokenizer.json").write_text('{"version": "1.0"}')
        (folder / "README.md").write_text("# A base\n")
        return folder

    def write_adapter(self, name: str, tensors: Mapping[str, torch.Tensor], **config: Any) -> Path:
        """A PEFT folder."""
        said = {"modules_to_save": ["head", "score"]} | config
        tiny.write_adapter(self.folder / name, {}, **said)
        save_file(dict(tensors), self.folder / name / "adapter_model.safetensors")
        return self.folder / name

    def merge(self, *adapters: Path, options: PlanOptions | None = None, **how: Any) -> World:
        """Merge the adapters, or the only one."""
        self.result: MergeResult = merge(self.base, adapters or [self.adapter], self.merged, options, threads=1, **how)
        return self

    def unmerge(self, *adapters: Path, out: Path | None = None, given: bool = True, **how: Any) -> UnmergeResult:
        """Take out what was merged, with the adapter unless others are `given`, or none."""
        taken = adapters or ((self.adapter,) if given else ())
        return unmerge(how.pop("merged", self.merged), taken, out or self.out, threads=1, **how)

    def restored(self, *adapters: Path, base: Path | None = None, **how: Any) -> UnmergeResult:
        """Unmerge, and see that every file of the base is there again and nothing else."""
        result = self.unmerge(*adapters, **how)
        found = contents(self.out)
        assert found.pop("lora_unmerge.json")
        assert found == contents(base or self.base)
        assert result.exact
        shutil.rmtree(self.out)
        return result

    def spoilt(self, change: Change) -> Path:
        """A copy of the undo file with something changed."""
        place = self.folder / "spoilt"
        shutil.copy(self.merged / UNDO, place)
        rewrite(place, change)
        return place

    @contextmanager
    def refused(self, *exits: int) -> Iterator[pytest.ExceptionInfo[LoraCliError]]:
        """What happens inside is refused with one of these exit codes, and leaves everything as it was."""
        before = everything(self.folder)
        with pytest.raises(LoraCliError) as caught:
            yield caught
        assert caught.value.exit_code in exits, str(caught.value)
        assert everything(self.folder) == before
        assert caught.value.message
        assert not caught.value.message.endswith(".")


def command(*line: object) -> int:
    """Run the program in this process; returns its exit code."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    try:
        return run([str(part) for part in line])
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def everything(folder: Path) -> dict[str, object]:
    """Every path below a folder: bytes of files, and when they changed last."""

    def what(path: Path) -> object:
        return (path.read_bytes(), path.stat().st_mtime_ns) if path.is_file() else path.is_symlink()

    return {path.relative_to(folder).as_posix(): what(path) for path in folder.rglob("*")}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def text_of(error: LoraCliError) -> str:
    """All that an error says."""
    said = (error.message, error.file, error.tensor, error.expected, error.found, error.hint, *error.details)
    return "\n".join(str(part) for part in said if part)


# safetensors files, as bytes


def read_raw(path: Path) -> tuple[dict[str, str], Parts]:
    """Metadata and tensors of a safetensors file, in byte order."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    metadata = header.pop("__metadata__", {})
    entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    return metadata, {
        name: (said["dtype"], said["shape"], data[start + said["data_offsets"][0] : start + said["data_offsets"][1]])
        for name, said in entries
    }


def write_raw(path: Path, metadata: object, parts: Mapping[str, Raw]) -> None:
    """A safetensors file of these tensors, one after another."""
    header: Document = {"__metadata__": metadata}
    end = 0
    for name, (dtype, shape, data) in parts.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
        end += len(data)
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + b"".join(data for _, _, data in parts.values()))


def span_of(path: Path, key: str) -> range:
    """Where in a file the bytes of a tensor are."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    begin, end = json.loads(data[8:start])[key]["data_offsets"]
    return range(start + begin, start + end)


def flip(path: Path, bit: int) -> None:
    """Change one bit of a file, counted from its beginning."""
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def shard_of(folder: Path, key: str) -> Path:
    """The file of a folder that holds a tensor."""
    return next(path for path in sorted(folder.glob("*.safetensors")) if key in read_raw(path)[1])


def flip_tensor(folder: Path, key: str, bit: int = 0) -> None:
    """Change one bit of a tensor of a checkpoint."""
    path = shard_of(folder, key)
    flip(path, 8 * span_of(path, key).start + bit)


# Undo files


def frame(data: bytes, **parameters: int) -> bytes:
    """A zstd frame, made as a stream whose end is not known in advance."""
    compressor = zstd.ZstdCompressor(options={int(zstd.CompressionParameter[key]): n for key, n in parameters.items()})
    return compressor.compress(data) + compressor.flush()


def unframe(data: bytes) -> bytes:
    """What a zstd frame holds."""
    return zstd.decompress(data)


def pack(data: bytes) -> bytes:
    """How bytes are compressed in an undo file."""
    return len(data).to_bytes(8, "little") + frame(data)


def unpack(data: bytes) -> bytes:
    """The way back."""
    found = unframe(data[8:])
    assert len(found) == int.from_bytes(data[:8], "little")
    return found


def as_part(data: bytes) -> Raw:
    """Bytes as a part of an undo file."""
    return "U8", [len(data)], data


def read_undo(path: Path) -> tuple[Document, Parts]:
    """The manifest and the other parts of an undo file, after checking the manifest's digest."""
    metadata, parts = read_raw(path)
    packed = parts.pop("manifest")[2]
    manifest = json.loads(unpack(packed))
    assert metadata == {"format": f"lora-cli/undo/{format_of(manifest)}", "manifest": blake3(packed).hexdigest()}
    return manifest, parts


def format_of(manifest: Document) -> int:
    """The format that has all the fields of a manifest."""
    terms = [term for said in _tensors(manifest) for term in said.get("terms", ())]
    fields = {name for said in (*_tensors(manifest), *terms) for name in said}
    if fields & NEWEST or any(len(term.get("outputs", ())) > 3 for term in terms):
        return 3
    return 2 if fields & NEWER else 1


def _tensors(manifest: Document) -> list[Document]:
    return [tensor for file in manifest["files"] for tensor in file["tensors"]]


def write_undo(path: Path, manifest: object, parts: Mapping[str, Raw], **metadata: str) -> None:
    """An undo file with this manifest, under its right digest; bytes are taken for the packed manifest as they are."""
    text = b"" if isinstance(manifest, bytes) else json.dumps(manifest).encode()
    packed = manifest if isinstance(manifest, bytes) else pack(text)
    numbers = {3: NEWEST, 2: NEWER}
    number = next((number for number, names in numbers.items() if any(f'"{n}":'.encode() in text for n in names)), 1)
    said = {"format": f"lora-cli/undo/{number}", "manifest": blake3(packed).hexdigest()} | metadata
    write_raw(path, said, {**parts, "manifest": as_part(packed)})


def rewrite(path: Path, change: Change) -> None:
    """Change the manifest or parts of an undo file; a change that returns bytes gives the packed manifest itself."""
    manifest, parts = read_undo(path)
    returned = change(manifest, parts)
    write_undo(path, returned if isinstance(returned, bytes) else manifest, parts)


def record(manifest: Document, key: str) -> Document:
    """What a manifest says of one tensor."""
    found: Document = next(said for file in manifest["files"] for said in file["tensors"] if said["key"] == key)
    return found


def names_in(details: Collection[str], *names: str) -> bool:
    """Whether details name these and nothing else, one a line, whatever else they say."""
    return len(details) == len(names) and all(any(name in line for line in details) for name in names)
