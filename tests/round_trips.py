"""There and back: a merge and its exact unmerge, and what must then be there, to the last byte of every file."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import reference
import torch
from blake3 import blake3

from lora_cli.progress import Progress
from lora_cli.surgery.merge import MergeResult, merge
from lora_cli.surgery.placing import PlanOptions
from lora_cli.surgery.unmerge import UnmergeResult, unmerge

Array = np.ndarray[Any, np.dtype[Any]]
Raw = tuple[str, Sequence[int], bytes]
"""A tensor as it lies in a file: type, shape, bytes."""

RECEIPT = "lora_unmerge.json"
DTYPES = {name: getattr(torch, name) for name in reference.FORMATS}
STORED = {
    "bfloat16": "BF16",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}


def contents(place: Path) -> dict[str, str]:
    """Every file of a folder, or one file, by its digest."""
    files = sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place]
    root = place if place.is_dir() else place.parent
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@dataclass(frozen=True)
class Trip:
    """Both ways, done."""

    merged: Path
    back: Path
    there: MergeResult
    again: UnmergeResult


def round_trip(
    folder: Path,
    base: Path,
    adapters: Sequence[Path],
    options: PlanOptions | None = None,
    *,
    given: Sequence[Path] | None = None,
    embed: bool = False,
    lost: Sequence[str] = (),
    changes: bool = True,
    **how: Any,
) -> Trip:
    """Merge into `folder` and take it out again with the adapters, or those `given`: the base's files come back.

    Those that are `lost` are there neither in the merged folder nor afterwards.
    """
    inputs = [contents(path) for path in (base, *adapters)]
    folder.mkdir(exist_ok=True)
    there = merge(base, adapters, folder / "merged", options, embed_adapter=embed, **how)
    assert there.undo is not None
    assert (folder / "merged" / there.undo.path).stat().st_size == there.undo.bytes
    if changes:
        assert weights(folder / "merged") != weights(base)
    again = unmerge(folder / "merged", adapters if given is None else given, folder / "back", **how)
    found = contents(folder / "back")
    assert found.pop(RECEIPT)
    assert found == {name: digest for name, digest in inputs[0].items() if name not in lost}
    assert (again.exact, again.proved, again.undecided, again.kept) == (True, True, (), ())
    assert {file.name for file in again.files} == {*found, RECEIPT}
    assert {file.name for file in again.files if file.digest is None} == {RECEIPT}
    assert [contents(path) for path in (base, *adapters)] == inputs
    return Trip(folder / "merged", folder / "back", there, again)


def weights(folder: Path) -> dict[str, str]:
    """The safetensors files of a folder."""
    return {name: digest for name, digest in contents(folder).items() if name.endswith(".safetensors")}


def digest_of(path: Path, cut: int = 1 << 25) -> str:
    """The digest of a file as `checkpoint.digests` describes it."""
    raw = path.read_bytes()
    if path.suffix != ".safetensors":
        return blake3(raw).hexdigest()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    parts = [blake3(raw[:start]).digest()]
    tensors = [(*said["data_offsets"], said) for name, said in header.items() if name != "__metadata__"]
    for begin, end, said in sorted(tensors, key=lambda tensor: tensor[:2]):
        rows, elements = (said["shape"] or [1])[0], max(1, math.prod(said["shape"]))
        # Rows of less than whole bytes cannot be told apart.
        height = rows if said["dtype"] in ("F4", "F6_E2M3", "F6_E3M2") else max(1, cut * rows // elements)
        step = max(1, height * (end - begin) // max(1, rows))
        parts += [blake3(raw[start + at : start + min(at + step, end)]).digest() for at in range(begin, end, step)]
    return blake3(b"".join(parts)).hexdigest()


# Files


def write_raw(path: Path, tensors: Mapping[str, Raw], metadata: object = None, *, odd: bool = False) -> Path:
    """A safetensors file of any bytes; `odd` gives it a header that no library would write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header: dict[str, Any] = {} if metadata is None and not odd else {"__metadata__": metadata}
    end = 0
    for name, (dtype, shape, data) in tensors.items():
        begin, end = end, end + len(data)
        header[name] = {"shape": list(shape), "data_offsets": [begin, end], "dtype": dtype}
    raw = json.dumps(header).encode()
    if odd:
        raw = json.dumps(dict(reversed(header.items())), indent=1).encode() + b" " * 13
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + b"".join(data for _, _, data in tensors.values()))
    return path


def write_base(folder: Path, tensors: Mapping[str, torch.Tensor | Raw], shards: int = 1, **config: Any) -> Path:
    """A folder with config, tokenizer and card; tensors in one file, or in shards with an index."""
    raw = {name: tensor if isinstance(tensor, tuple) else as_raw(tensor) for name, tensor in tensors.items()}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "none", "dtype": "float32"} | config))
    (folder / "tokenizer.json").write_text('{"version": "the base\'s"}')
    (folder / "README.md").write_text("---\nlicense: mit\ntags:\n- x # kept\n---\n# A base\r\n\n\n")
    if shards == 1:
        write_raw(folder / "model.safetensors", raw, {"format": "pt"})
        return folder
    names = [f"model-{number + 1:05d}-of-{shards:05d}.safetensors" for number in range(shards)]
    places = {key: names[at * shards // len(raw)] for at, key in enumerate(raw)}
    for name in names:
        write_raw(folder / name, {key: raw[key] for key in raw if places[key] == name}, {"format": "pt"})
    index = {"metadata": {"total_size": sum(len(data) for _, _, data in raw.values())}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_adapter(folder: Path, tensors: Mapping[str, torch.Tensor | Raw], **config: Any) -> Path:
    """A PEFT folder; its names are the base's."""
    folder.mkdir(parents=True)
    raw = {key: tensor if isinstance(tensor, tuple) else as_raw(tensor) for key, tensor in tensors.items()}
    write_raw(folder / "adapter_model.safetensors", {f"base_model.model.{key}": value for key, value in raw.items()})
    said = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(said | config))
    return folder


def as_raw(tensor: torch.Tensor) -> Raw:
    """A tensor as a file holds it."""
    data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return STORED[str(tensor.dtype).removeprefix("torch.")], tensor.shape, data


# Numbers


def gaussian(seed: int, *shape: int, std: float = 1.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random numbers, the same everywhere."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * std).to(dtype)


def lora(
    seed: int, module: str, out: int, inner: int, *, std: float = 0.1, rank: int = 4, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Factors of one module whose product has this deviation; some rows of B are zero, so that nothing is added."""
    b = gaussian(seed, out, rank, std=std / rank**0.5, dtype=dtype)
    b[::5] = 0
    return {f"{module}.lora_A.weight": gaussian(seed + 1, rank, inner, dtype=dtype), f"{module}.lora_B.weight": b}


def from_patterns(patterns: Array, name: str) -> torch.Tensor:
    """The numbers that have these bits."""
    width = reference.FORMATS[name].width // 8
    return torch.frombuffer(bytearray(patterns.astype(f"<u{width}").tobytes()), dtype=DTYPES[name]).view(patterns.shape)


def any_patterns(rng: np.random.Generator, name: str, *shape: int) -> Array:
    """Any bits at all: NaN of every payload, infinities, subnormals, zeros of both signs among them."""
    form, count = reference.FORMATS[name], math.prod(shape)
    patterns = (
        np.frombuffer(rng.bytes(count * form.width // 8), f"<u{form.width // 8}").astype(np.uint64).reshape(shape)
    )
    exponents = np.uint64(form.sign - (1 << form.fraction_bits))
    kind = rng.random(shape)
    return np.where(kind < 0.1, patterns & ~exponents, np.where(kind > 0.95, patterns | exponents, patterns))


def finite(patterns: Array, name: str, limit: float) -> Array:
    """The same bits where they are a number of at most this magnitude; elsewhere without the exponent's highest bit."""
    form = reference.FORMATS[name]
    wide = from_patterns(patterns, name).to(torch.float64).numpy()
    with np.errstate(invalid="ignore"):
        fits = np.abs(wide) <= limit
    return np.where(fits, patterns, patterns & ~np.uint64(form.sign >> 1))


def edges(name: str) -> Array:
    """Patterns where something ends: zeros, subnormals, powers of two and their neighbours, the largest numbers."""
    form = reference.FORMATS[name]
    binades = np.arange(1, (form.largest_pattern >> form.fraction_bits) + 1, dtype=np.uint64) << np.uint64(
        form.fraction_bits
    )
    rng = np.random.default_rng(5)
    some = rng.choice(binades, min(len(binades), 64), replace=False)
    least = np.array([0, 1, 2, 3, (1 << form.fraction_bits) - 1, 1 << form.fraction_bits], np.uint64)
    high = np.array([form.largest_pattern - step for step in range(4)], np.uint64)
    found = np.unique(np.concatenate([least, some, some + np.uint64(1), some - np.uint64(1), high]))
    return np.concatenate([found, found | np.uint64(form.sign)])


def patterns_of(tensor: torch.Tensor) -> Array:
    """The bits of a tensor."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().view(f"<u{tensor.itemsize}").astype(np.uint64)


# Small ones


def small_base(folder: Path, shards: int = 1, dtype: torch.dtype = torch.bfloat16) -> Path:
    tensors = {f"{key}.weight": gaussian(n, 30, 20, dtype=dtype) for n, key in enumerate("xyz")}
    return write_base(folder, tensors | {"x.bias": gaussian(4, 30, dtype=dtype)}, shards)


def small_adapter(folder: Path, seed: int, *modules: str, **others: torch.Tensor) -> Path:
    tensors = {key: t for n, name in enumerate(modules or "xy") for key, t in lora(seed + n, name, 30, 20).items()}
    return write_adapter(folder, tensors | others, modules_to_save=["head"])


class Listener(Progress):
    """Remembers what a person was told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def warn(self, text: str) -> None:
        self.told.append(text)
