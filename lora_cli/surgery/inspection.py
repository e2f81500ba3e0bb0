"""What `inspect` finds out, as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lora_cli.adapters.adapter import Acts
from lora_cli.surgery.effects import Effects
from lora_cli.surgery.plan import LayoutUse
from lora_cli.surgery.spectrum import AdapterSpectrum
from lora_cli.surgery.undo.summary import UndoSummary

Kind = Literal["adapter", "checkpoint", "merged"]


@dataclass(frozen=True, slots=True)
class PlaceInfo:
    """A tensor of a base that a module of an adapter changes.

    Attributes:
        key: Its key.
        outputs: The first of its outputs that are the module's, and one past the last; None for all.
    """

    key: str
    outputs: tuple[int, int] | None = None


@dataclass(frozen=True)
class ModuleInfo:
    """One module of an adapter.

    Attributes:
        module: Name in the adapter's spelling, with the parameter where it is not the weight.
        key: The base key that it resolves to, or the first of them; None without a base.
        rank: Rank as the factors have it; None where the change has none.
        alpha: Numerator of the scale; None for a scale given directly.
        scale: What multiplies the change; None where nothing says it, or where it has none.
        scale_source: Where the scale came from.
        kind: Kind of delta, or why a whole tensor or single rows are in the adapter.
        shape: (out, in) of the change, or the shape of a whole tensor or of the rows; None where only a base tells it.
        dtype: Storage types of the factors.
        magnitude: Whether each output gets a length of its own (DoRA).
        rows: Which rows of a table are held, such as those of trained tokens; None for all else.
        places: All tensors of the base that it changes; empty without a base.
        acts: What it does: adds a product of factors, or the sum that a formula gives, multiplies each element, or
            makes new rows of the old ones; None for what is held whole.
        undo: What an undo file keeps for it: which of its `preimages` each element was, which is little, or the
            `residual`, which is more; None for what is held whole.
        parts: Shapes of the tensors that a formula is made of, by the tuner's names; empty for LoRA's factors.
    """

    module: str
    key: str | None
    rank: int | None
    alpha: float | None
    scale: float | None
    scale_source: str | None
    kind: str
    shape: tuple[int, ...] | None
    dtype: str
    magnitude: bool = False
    rows: tuple[int, ...] | None = None
    places: tuple[PlaceInfo, ...] = ()
    acts: Acts | None = None
    undo: Literal["preimages", "residual"] | None = None
    parts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint: name, storage type, shape and the shard that holds it."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    shard: str


@dataclass(frozen=True)
class LeftOut:
    """A tensor of an adapter that no merge applies, and why."""

    tensor: str
    reason: str


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
        adapter_kind: LoRA, rsLoRA or DoRA, or another tuner's name; None for a checkpoint.
        base: The base that an adapter's config names; shown, never opened.
        refused: Why an adapter cannot be merged, as far as it says itself, and into the given base; then it is shown as
            far as it is understood.
        modules: Modules of an adapter.
        tensors: Tensors of a checkpoint, or of an adapter that is not understood.
        left_out: Tensors of an adapter that no merge applies.
        layouts: How an adapter's factors of stacks, such as those of experts, are read, as far as that is known.
        layers: For an adapter of a model whose layers repeat those of the files: the stored layer of each.
        initial: The init that took an adapter's first factors off its base; a merge then needs these, or that base.
        before: The adapter as it was before training, where that was given.
        architecture: What config.json calls the model.
        shards: Names of the safetensors files.
        tied: Whether the config ties the head to the embedding; of an adapter, whether it does to both of two tied
            tensors what it does to one (`ensure_weight_tying`), else None.
        ties: Name that a model has and its files lack → the key whose tensor it is.
        quantised: How the checkpoint is quantised, if it is.
        quantised_tensors: How many tensors are.
        wrapped: Modules that hold a base weight and factors.
        receipt: What lora-cli wrote beside it when it made it.
        effects: What a merge into the given base would do besides adding to whole tensors, or what the one did that
            made a merged checkpoint; None where nothing is known of one.
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
    refused: tuple[str, ...] = ()
    modules: tuple[ModuleInfo, ...] = ()
    tensors: tuple[TensorInfo, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    layouts: tuple[LayoutUse, ...] = ()
    layers: tuple[int, ...] | None = None
    initial: str | None = None
    before: str | None = None
    architecture: str | None = None
    shards: tuple[str, ...] = ()
    tied: bool | None = None
    ties: Mapping[str, str] = field(default_factory=dict)
    quantised: str | None = None
    quantised_tensors: int = 0
    wrapped: tuple[str, ...] = ()
    receipt: Mapping[str, Any] | None = None
    effects: Effects | None = None
    undo: UndoSummary | None = None
    spectrum: AdapterSpectrum | None = None
    warnings: tuple[str, ...] = field(default=())
