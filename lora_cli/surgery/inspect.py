"""Inspect: what is this file? From headers and configs only, without torch, unless numbers are asked for."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from lora_cli.adapters.adapter import Adapter
from lora_cli.adapters.formats import read_adapter
from lora_cli.adapters.source import CONFIG_FILE, ReadOptions, look_at_adapter
from lora_cli.adapters.wrapped import unwrap, wrapped_modules
from lora_cli.checkpoint.checkpoint import ADAPTER_FILE, Checkpoint, StoredTensor, open_checkpoint, open_shard
from lora_cli.checkpoint.hub import Location, locate
from lora_cli.checkpoint.quantised import Quantised, method
from lora_cli.errors import LoraCliError, MissingScaleError, UsageError
from lora_cli.progress import SILENT, Progress
from lora_cli.surgery.placing import PlanOptions
from lora_cli.surgery.planning import plan
from lora_cli.surgery.receipt import find_receipt
from lora_cli.surgery.results import Reference, open_base
from lora_cli.surgery.spectrum import AdapterSpectrum, adapter_spectrum, module_name
from lora_cli.surgery.undo.summary import UndoSummary, undo_summary

Kind = Literal["adapter", "checkpoint", "merged"]


@dataclass(frozen=True)
class ModuleInfo:
    """One module of an adapter.

    Attributes:
        module: Name in the adapter's spelling, with the parameter where it is not the weight.
        key: The base key that it resolves to; None without a base.
        rank: Rank as the factors have it.
        alpha: Numerator of the scale; None for a scale given directly.
        scale: What multiplies the product; None where nothing says it.
        scale_source: Where the scale came from.
        kind: Kind of delta, or why a whole tensor is in the adapter.
        shape: (out, in) of the change, or the shape of a whole tensor.
        dtype: Storage types of the factors.
    """

    module: str
    key: str | None
    rank: int | None
    alpha: float | None
    scale: float | None
    scale_source: str | None
    kind: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint: name, storage type, shape and the shard that holds it."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    shard: str


@dataclass(frozen=True)
class InspectResult:
    """What a path holds.

    Attributes:
        kind: Adapter, checkpoint, or a checkpoint that lora-cli merged.
        label: What it is called.
        format: Format of the file or files.
        evidence: Why it was taken for that.
        parameters: Elements of all tensors.
        bytes: Bytes of all files read.
        dtypes: Storage type → number of tensors.
        adapter_kind: LoRA or rsLoRA; None for a checkpoint.
        base: The base that an adapter's config names; shown, never opened.
        modules: Modules of an adapter.
        tensors: Tensors of a checkpoint.
        architecture: What config.json calls the model.
        shards: Names of the safetensors files.
        tied: Whether the config ties the head to the embedding.
        quantised: How the checkpoint is quantised, if it is.
        quantised_tensors: How many tensors are.
        wrapped: Modules that hold a base weight and factors.
        receipt: What lora-cli wrote beside it when it made it.
        undo: Whether and how the merge can be undone; None without an undo file.
        spectrum: Singular values of what the factors change; None where they were not asked for.
        warnings: What a person should look at.
    """

    kind: Kind
    label: str
    format: str
    evidence: str
    parameters: int
    bytes: int
    dtypes: Mapping[str, int]
    adapter_kind: str | None = None
    base: str | None = None
    modules: tuple[ModuleInfo, ...] = ()
    tensors: tuple[TensorInfo, ...] = ()
    architecture: str | None = None
    shards: tuple[str, ...] = ()
    tied: bool | None = None
    quantised: str | None = None
    quantised_tensors: int = 0
    wrapped: tuple[str, ...] = ()
    receipt: Mapping[str, Any] | None = None
    undo: UndoSummary | None = None
    spectrum: AdapterSpectrum | None = None
    warnings: tuple[str, ...] = field(default=())


def inspect(
    reference: Reference,
    *,
    base: Reference | None = None,
    options: PlanOptions | None = None,
    spectrum: bool = False,
    progress: Progress = SILENT,
) -> InspectResult:
    """Say what a path or Hub id holds, from headers only.

    Args:
        reference: An adapter or a checkpoint.
        base: Resolve the adapter's names against this checkpoint.
        options: How the adapter is read and its names are mapped.
        spectrum: Read the factors, an adapter's or a wrapped checkpoint's own, and find the singular values of what
            they change (see `adapter_spectrum`).
        progress: Hears of downloads, and of factors that are read.

    Raises:
        UsageError: The spectrum of a checkpoint without factors.
        NumericError: A factor whose spectrum is wanted holds NaN or infinity.
        LoraCliError: What opening it raises.
    """
    options = options or PlanOptions()
    place = locate_any(reference, progress)
    if is_adapter(place.path):
        return _inspect_adapter(place, base, options, spectrum, progress)
    return _inspect_checkpoint(place, options, spectrum, progress)


def locate_any(reference: Reference, progress: Progress) -> Location:
    """Find an adapter or a checkpoint; on the Hub only its own listing says which it is."""
    if Path(reference).exists():
        return locate(str(reference), role="checkpoint", progress=progress)
    try:
        return locate(str(reference), role="adapter", progress=progress)
    except LoraCliError:
        return locate(str(reference), role="checkpoint", progress=progress)


def is_adapter(path: Path) -> bool:
    """Whether a local path holds an adapter, by the files of a folder or the names in a file's header."""
    if path.is_dir():
        if (path / CONFIG_FILE).exists() or (path / ADAPTER_FILE).exists():
            return True
        files = list(path.glob("*.safetensors"))
        return len(files) == 1 and not (path / "config.json").exists() and is_adapter(files[0])
    if path.suffix != ".safetensors" or not path.exists():
        return False
    # A file is an adapter when its tensors are factors; a wrapped checkpoint holds base weights as well.
    keys = {info.name for info in open_shard(path).header.tensors}
    names = [key.split(".") for key in keys]
    factors = [name for name in names if not _ADAPTER_PARTS.isdisjoint(name[-3:])]
    wrapped = any(
        name[-2:] in (["base", "weight"], ["base_layer", "weight"]) or name[-1] == "original" for name in names
    )
    if not factors or wrapped:
        return False
    # All that was trained may be in the file, and be more than the factors; but not the weights that these are for.
    modules = [name[: name.index(part)] for name in factors for part in name if part.startswith("lora_")]
    alone = bool(modules) and keys.isdisjoint(".".join([*module, "weight"]) for module in modules)
    return alone or 2 * len(factors) >= len(names)


_ADAPTER_PARTS = {"lora_A", "lora_B", "A", "B", "lora_a", "lora_b", "lora_down", "lora_up"}
_ADAPTER_PARTS |= {"lora_embedding_A", "lora_embedding_B"}
"""Last parts of names that only factors have."""


def _inspect_adapter(
    place: Location, base: Reference | None, options: PlanOptions, spectrum: bool, progress: Progress
) -> InspectResult:
    adapter, scaled = _read_adapter(place, options.read)
    keys: dict[tuple[str, str], str] = {}
    if base is not None:
        # What resolves is shown, and what does not as well.
        made = plan(open_base(base, progress), [adapter], replace(options, allow_unmapped=True))
        keys = {(entry.tensor, ""): entry.key for entry in made.ledger if entry.key}
    modules = [
        ModuleInfo(
            module=module_name(target),
            key=keys.get((target.delta.tensors[0].key, "")),
            rank=target.delta.rank,
            alpha=target.delta.scale.alpha if target.delta.scale.rank else None,
            scale=target.delta.scale.times() if scaled else None,
            scale_source=target.delta.scale.source if scaled else None,
            kind=target.delta.kind,
            shape=target.delta.shape,
            dtype="/".join(sorted({tensor.dtype.name for tensor in target.delta.tensors})),
        )
        for target in adapter.targets
    ]
    modules += [
        ModuleInfo(
            module=replacement.name,
            key=keys.get((replacement.tensor.key, "")),
            rank=None,
            alpha=None,
            scale=None,
            scale_source=None,
            kind=f"whole tensor ({replacement.reason})",
            shape=replacement.tensor.shape,
            dtype=replacement.tensor.dtype.name,
        )
        for replacement in adapter.replacements
    ]
    named = adapter.config.get("base_model_name_or_path")
    return InspectResult(
        kind="adapter",
        label=place.label,
        format=adapter.format,
        evidence=adapter.evidence,
        parameters=sum(math.prod(tensor.shape) for tensor in adapter.tensors),
        bytes=sum({tensor.shard.source: tensor.shard.source.size for tensor in adapter.tensors}.values()),
        dtypes=_dtypes(adapter.tensors),
        adapter_kind=adapter.kind,
        base=str(named) if named else None,
        modules=tuple(modules),
        receipt=find_receipt(place.path),
        spectrum=adapter_spectrum(adapter, progress, scaled=scaled) if spectrum else None,
        warnings=(*adapter.warnings, *_unread_warning(adapter), *(() if scaled else (NO_SCALE,))),
    )


NO_SCALE = "nothing says how strong this adapter is; merge will need --alpha A or --scale S"


def _read_adapter(place: Location, options: ReadOptions) -> tuple[Adapter, bool]:
    """Read it, and say whether its scale is known; for a look at it that is not needed."""
    source = look_at_adapter(place.path, label=place.label)
    try:
        return read_adapter(source, options), True
    except MissingScaleError:
        return read_adapter(source, replace(options, scale=1.0)), False


def _unread_warning(adapter: Adapter) -> tuple[str, ...]:
    names = [tensor.key for tensor in adapter.unread]
    return (f"{len(names)} tensors belong to no pair of factors: {', '.join(names[:4])}",) if names else ()


def _inspect_checkpoint(place: Location, options: PlanOptions, spectrum: bool, progress: Progress) -> InspectResult:
    checkpoint = open_checkpoint(place.path, label=place.label, links_inside=place.links_inside)
    receipt = find_receipt(place.path)
    merged = receipt is not None and receipt.get("operation") == "merge"
    stored = list(checkpoint.tensors.values())
    architectures = checkpoint.config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    evidence = "an index and shards" if checkpoint.index else "one safetensors file"
    quantised = _count_quantised(checkpoint)
    return InspectResult(
        kind="merged" if merged else "checkpoint",
        label=place.label,
        format="safetensors",
        evidence=f"{evidence}, with a receipt of a merge" if merged else evidence,
        parameters=sum(math.prod(tensor.shape) for tensor in stored),
        bytes=sum(shard.source.size for shard in checkpoint.shards),
        dtypes=_dtypes(stored),
        architecture=str(name or checkpoint.config.get("model_type") or "") or None,
        shards=tuple(shard.name for shard in checkpoint.shards),
        tensors=tuple(TensorInfo(t.key, t.dtype.name, t.shape, t.shard.name) for t in stored),
        tied=_tied(checkpoint),
        quantised=method(checkpoint) or ("by the tensors beside the weights" if quantised else None),
        quantised_tensors=quantised,
        wrapped=wrapped_modules(checkpoint),
        receipt=receipt,
        undo=undo_summary(place.path),
        spectrum=_own_spectrum(checkpoint, options.read, progress) if spectrum else None,
        warnings=checkpoint.warnings,
    )


def _own_spectrum(checkpoint: Checkpoint, options: ReadOptions, progress: Progress) -> AdapterSpectrum:
    """The spectrum of the factors that a wrapped checkpoint carries."""
    wrapped = unwrap(checkpoint, options)
    if wrapped is None:
        raise UsageError(
            "Only factors have a spectrum, and this checkpoint holds none",
            file=checkpoint.label,
            hint="name an adapter; lora-cli diff --rank looks at the change between two checkpoints",
        )
    return adapter_spectrum(wrapped.adapter, progress, scaled=True)


def _count_quantised(checkpoint: Checkpoint) -> int:
    quantised = Quantised(checkpoint)
    return sum(1 for key in checkpoint.tensors if key.endswith("weight") and quantised(key))


def _dtypes(tensors: Sequence[StoredTensor]) -> Mapping[str, int]:
    return dict(Counter(tensor.dtype.name for tensor in tensors).most_common())


def _tied(checkpoint: Checkpoint) -> bool | None:
    said = checkpoint.config.get("tie_word_embeddings")
    return said if isinstance(said, bool) else None
