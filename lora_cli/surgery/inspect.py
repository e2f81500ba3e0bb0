"""Inspect: what is this file? From headers and configs only, without torch, unless numbers are asked for."""

from __future__ import annotations

import math
from pathlib import Path

from lora_cli.adapters.source import CONFIG_FILE, ReadOptions
from lora_cli.adapters.ties import ties
from lora_cli.adapters.wrapped import unwrap, wrapped_modules
from lora_cli.checkpoint.checkpoint import ADAPTER_FILE, Checkpoint, open_checkpoint, open_shard
from lora_cli.checkpoint.hub import Location, local_path, locate
from lora_cli.checkpoint.links import check_link, is_there
from lora_cli.checkpoint.quantised import Quantised, method
from lora_cli.checkpoint.source import listing
from lora_cli.errors import LoraCliError, UsageError
from lora_cli.progress import SILENT, Progress
from lora_cli.surgery.effects import recalled
from lora_cli.surgery.inspect_adapter import count_dtypes, inspect_adapter, tensor_infos
from lora_cli.surgery.inspection import InspectResult
from lora_cli.surgery.placing import PlanOptions
from lora_cli.surgery.receipt import find_receipt
from lora_cli.surgery.results import Reference
from lora_cli.surgery.spectrum import AdapterSpectrum, adapter_spectrum
from lora_cli.surgery.undo.summary import undo_summary


def inspect(
    reference: Reference,
    *,
    base: Reference | None = None,
    options: PlanOptions | None = None,
    spectrum: bool = False,
    progress: Progress = SILENT,
) -> InspectResult:
    """Say what a path or Hub id holds, from headers only.

    An adapter that no merge takes is shown as far as it is understood, with the reasons in `refused`.

    Args:
        reference: An adapter or a checkpoint.
        base: Resolve the adapter's names against this checkpoint.
        options: How the adapter is read and its names are mapped.
        spectrum: Read the factors, an adapter's or a wrapped checkpoint's own, and find the singular values of what
            they change (see `adapter_spectrum`).
        progress: Hears of downloads, and of factors that are read.

    Raises:
        UsageError: The spectrum of a checkpoint without factors; or an adapter as it was before training, for one
            that does not need it.
        UnsupportedError: The spectrum of an adapter whose factors are not understood.
        NumericError: A factor whose spectrum is wanted holds NaN or infinity.
        LoraCliError: What opening it raises.
    """
    options = options or PlanOptions()
    place = locate_any(reference, progress)
    if is_adapter(place.path):
        return inspect_adapter(place, base, options, spectrum, progress)
    return _inspect_checkpoint(place, options, spectrum, progress)


def locate_any(reference: Reference, progress: Progress) -> Location:
    """Find an adapter or a checkpoint; on the Hub only its own listing says which it is."""
    if local_path(str(reference)) is not None:
        return locate(str(reference), role="checkpoint", progress=progress)
    try:
        return locate(str(reference), role="adapter", progress=progress)
    except LoraCliError:
        return locate(str(reference), role="checkpoint", progress=progress)


def is_adapter(path: Path) -> bool:
    """Whether a local path holds an adapter, by the files of a folder or the names in a file's header."""
    if path.is_dir():
        if is_there(path / CONFIG_FILE) or is_there(path / ADAPTER_FILE):
            return True
        files = [entry for entry in listing(path) if entry.suffix == ".safetensors" and entry.name[:1] != "."]
        if len(files) != 1 or (path / "config.json").exists():
            return False
        check_link(files[0])
        return is_adapter(files[0])
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


def _inspect_checkpoint(place: Location, options: PlanOptions, spectrum: bool, progress: Progress) -> InspectResult:
    checkpoint = open_checkpoint(place.path, label=place.label)
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
        dtypes=count_dtypes(stored),
        architecture=str(name or checkpoint.config.get("model_type") or "") or None,
        shards=tuple(shard.name for shard in checkpoint.shards),
        tensors=tensor_infos(stored),
        tied=_tied(checkpoint),
        ties=ties(checkpoint.config, checkpoint.tensors),
        quantised=method(checkpoint) or ("by the tensors beside the weights" if quantised else None),
        quantised_tensors=quantised,
        wrapped=wrapped_modules(checkpoint),
        receipt=receipt,
        effects=recalled(receipt.get("effects", {})) if merged and receipt else None,
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


def _tied(checkpoint: Checkpoint) -> bool | None:
    said = checkpoint.config.get("tie_word_embeddings")
    return said if isinstance(said, bool) else None
