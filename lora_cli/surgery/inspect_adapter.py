"""Inspect an adapter: what it changes, how strongly, where that lies in a base, and why it could not be merged."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from lora_cli.adapters.adapter import Adapter, Delta, Replacement, RowReplacement, Target
from lora_cli.adapters.expert_deltas import OpenExperts
from lora_cli.adapters.formats import read_adapter
from lora_cli.adapters.formula import Formula
from lora_cli.adapters.peft_config import COMMON, refusals
from lora_cli.adapters.resolve import parse_maps, resolve
from lora_cli.adapters.source import CONFIG_FILE, AdapterSource, ReadOptions, look_at_adapter
from lora_cli.adapters.strength import doubts
from lora_cli.adapters.tuners import TUNERS
from lora_cli.checkpoint.checkpoint import Checkpoint, StoredTensor
from lora_cli.checkpoint.hub import Location
from lora_cli.errors import LoraCliError, MissingScaleError, NamesError, ShapeError, UnsupportedError
from lora_cli.progress import Progress
from lora_cli.surgery.effects import Effects, effects_of
from lora_cli.surgery.inspection import InspectResult, LeftOut, ModuleInfo, PlaceInfo, TensorInfo
from lora_cli.surgery.matching import unused_layout
from lora_cli.surgery.passed_over import passed_over
from lora_cli.surgery.placing import PlanOptions
from lora_cli.surgery.plan import LayoutUse, Plan
from lora_cli.surgery.planning import plan
from lora_cli.surgery.receipt import find_receipt
from lora_cli.surgery.results import Reference, open_base, with_beginnings
from lora_cli.surgery.spectrum import adapter_spectrum, module_name

_NAMED = 4
"""Details of a refusal that are told."""

NO_SCALE = "nothing says how strong this adapter is; merge will need --alpha A or --scale S"


def inspect_adapter(
    place: Location, base: Reference | None, options: PlanOptions, spectrum: bool, progress: Progress
) -> InspectResult:
    """Say what an adapter holds; see `inspect.inspect`."""
    source = look_at_adapter(place.path, label=place.label)
    refused = _refusals(source, options.read)
    # What a merge refuses is shown as far as it is understood.
    allowed = replace(options.read, ignore_fields=(*options.read.ignore_fields, *refused))
    try:
        adapter, scaled = _read(source, allowed)
    except UnsupportedError as error:
        if spectrum:
            raise
        return _not_understood(source, (*refused.values(), _words(error)))
    (adapter,) = with_beginnings([adapter], options.read, progress)
    found = _Found() if base is None else _find(adapter, base, options, progress)
    named = adapter.config.get("base_model_name_or_path")
    return InspectResult(
        kind="adapter",
        label=place.label,
        format=adapter.format,
        evidence=adapter.evidence,
        parameters=sum(math.prod(tensor.shape) for tensor in adapter.tensors),
        bytes=sum({tensor.shard.source: tensor.shard.source.size for tensor in adapter.tensors}.values()),
        dtypes=count_dtypes(adapter.tensors),
        adapter_kind=adapter.kind,
        base=str(named) if named else None,
        refused=(*refused.values(), *found.refused),
        modules=(
            *(_target_info(target, found, scaled=scaled) for target in adapter.targets if found.has(target)),
            *(_whole_info(replacement, found) for replacement in adapter.replacements),
            *(_rows_info(rows, found) for rows in adapter.rows),
        ),
        layouts=found.layouts or _layouts(adapter, alone=base is None),
        left_out=tuple(LeftOut(tensor.key, reason) for tensor, reason in adapter.skipped),
        layers=adapter.layers,
        initial=adapter.initial,
        before=adapter.before.label if adapter.before else None,
        tied=adapter.tied or None,
        receipt=find_receipt(place.path),
        effects=found.effects,
        spectrum=adapter_spectrum(adapter, progress, scaled=scaled) if spectrum else None,
        warnings=(
            *adapter.warnings,
            *doubts(adapter),
            *_unread_warning(adapter),
            *unused_layout(options.read.expert_layout, [adapter]),
            *found.warnings,
            *(() if scaled else (NO_SCALE,)),
        ),
    )


def _layouts(adapter: Adapter, *, alone: bool) -> tuple[LayoutUse, ...]:
    """How factors of stacks may lie, as far as the adapter says it; of what is open a base tells, if none was given."""
    deltas = (target.delta for target in adapter.targets)
    words = Counter(d.words if alone else d.packed_words for d in deltas if isinstance(d, OpenExperts))
    return tuple(LayoutUse(layout, modules) for layout, modules in words.items())


def count_dtypes(tensors: Iterable[StoredTensor]) -> Mapping[str, int]:
    """Storage type → number of tensors, the most frequent first."""
    return dict(Counter(tensor.dtype.name for tensor in tensors).most_common())


def tensor_infos(tensors: Iterable[StoredTensor]) -> tuple[TensorInfo, ...]:
    """What is said of each of some tensors."""
    return tuple(TensorInfo(t.key, t.dtype.name, t.shape, t.shard.name) for t in tensors)


def _refusals(source: AdapterSource, options: ReadOptions) -> dict[str, str]:
    """Fields of the config that a merge refuses, each with why."""
    config = source.config or {}
    kind = str(config.get("peft_type"))
    tuner, found = TUNERS.get(kind), dict[str, str]()
    if tuner is not None:
        found = refusals(config, {*COMMON, *tuner.understood, *tuner.neutral}, tuner.refused)
    elif kind == "LORA":
        found = refusals(config)
    return {name: words for name, words in found.items() if name not in options.ignore_fields}


def _read(source: AdapterSource, options: ReadOptions) -> tuple[Adapter, bool]:
    """Read it, and say whether its scale is known; for a look at it that is not needed."""
    try:
        return read_adapter(source, options), True
    except MissingScaleError:
        return read_adapter(source, replace(options, scale=1.0)), False


def _words(error: LoraCliError) -> str:
    more = [f"{len(error.details) - _NAMED:,} more"] if len(error.details) > _NAMED else []
    return ": ".join([error.message, *([", ".join([*error.details[:_NAMED], *more])] if error.details else [])])


def _not_understood(source: AdapterSource, refused: tuple[str, ...]) -> InspectResult:
    """What can be said of an adapter that cannot be read: what its file holds."""
    config, tensors = source.config or {}, list(source.tensors.values())
    tuner, named = config.get("peft_type"), config.get("base_model_name_or_path")
    return InspectResult(
        kind="adapter",
        label=source.label,
        format="peft" if tuner else "safetensors",
        evidence=f"{CONFIG_FILE} has peft_type" if tuner else "names of factors",
        parameters=sum(math.prod(tensor.shape) for tensor in tensors),
        bytes=source.shard.source.size,
        dtypes=count_dtypes(tensors),
        adapter_kind="LoRA" if tuner == "LORA" else str(tuner) if tuner else None,
        base=str(named) if named else None,
        refused=refused,
        tensors=tensor_infos(tensors),
        receipt=find_receipt(source.path),
    )


def _unread_warning(adapter: Adapter) -> tuple[str, ...]:
    names = [tensor.key for tensor in adapter.unread]
    return (f"{len(names)} tensors belong to nothing that is changed: {', '.join(names[:4])}",) if names else ()


# Where it goes in a base


_Part = int | tuple[str, tuple[int, ...]]
"""What of an adapter is meant: a tensor by its identity, or a delta by its parameter and its tensors."""


def _part(parameter: str, delta: Delta) -> _Part:
    # A base may have told it more than it knew: then it is another object, of the same tensors.
    return parameter, tuple(map(id, delta.tensors))


@dataclass(frozen=True)
class _Found:
    """Where the parts of an adapter go.

    Attributes:
        places: For a delta, by its tensors and parameter, or for the identity of a tensor that is held whole: what it
            changes.
        shapes: For a delta: its shape, which without a base may not be known.
        keys: Name of a tensor in the adapter's file → the key that it is for.
        effects: What a merge would do besides.
        layouts: How factors of stacks are read.
        refused: Why no merge into the base can be planned; then it is only known where names are.
        warnings: What a merge into the base would warn of, besides what the adapter alone tells.
    """

    places: Mapping[_Part, tuple[PlaceInfo, ...]] | None = None
    shapes: Mapping[_Part, tuple[int, int]] = field(default_factory=dict)
    keys: Mapping[str, str] | None = None
    effects: Effects | None = None
    layouts: tuple[LayoutUse, ...] = ()
    refused: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def has(self, target: Target) -> bool:
        """Whether the base has the parameter, or must have it; of a base that is not known nobody can tell."""
        return not target.may_lack or _part(target.parameter, target.delta) in (self.places or {})

    def of(self, part: _Part, tensor: StoredTensor) -> tuple[str | None, tuple[PlaceInfo, ...]]:
        """The key of a delta or whole tensor, and all of its places; `tensor` is the first that it is made of."""
        places = (self.places or {}).get(part, ())
        key = places[0].key if places else (self.keys or {}).get(tensor.key)
        # What is done to one of two tied tensors for both has no place of its own.
        return key, places or ((PlaceInfo(key),) if key else ())


def _find(adapter: Adapter, base: Reference, options: PlanOptions, progress: Progress) -> _Found:
    """Find the names in a base; what resolves is shown, and what does not as well."""
    known = adapter if adapter.before else replace(adapter, initial=None)
    opened = open_base(base, progress)
    refused: dict[str, None] = {}  # once each
    made: Plan | None = None
    # What a merge refuses for a few names is shown as far as the others go.
    for unmapped in dict.fromkeys((options.allow_unmapped, True)):
        try:
            made = plan(opened, [known], replace(options, allow_unmapped=unmapped))
        except (NamesError, ShapeError, UnsupportedError) as error:
            refused[f"into {opened.label}: {_words(error)}" + (f"; try: {error.hint}" if error.hint else "")] = None
            if not isinstance(error, NamesError):
                break
        else:
            break
    if made is None:
        return _Found(_resolved(known, opened, options), refused=tuple(refused))
    keys = {entry.tensor: entry.key for entry in made.ledger if entry.key}
    shapes = {_part(term.parameter, term.delta): term.delta.shape for edit in made.edits for term in edit.terms}
    layouts = tuple(layout for use in made.adapters for layout in use.layouts)
    return _Found(
        _places(made), shapes, keys, effects_of(made), layouts, tuple(refused), warnings=tuple(passed_over(made))
    )


def _resolved(adapter: Adapter, base: Checkpoint, options: PlanOptions) -> Mapping[_Part, tuple[PlaceInfo, ...]]:
    """Where names are, of what no merge can be planned for; not of a wrapped base."""
    try:
        found = resolve(adapter.names, base.tensors, config=base.config, maps=parse_maps(options.maps)).places
    except NamesError:
        return {}
    parts: list[tuple[_Part, str]] = [(_part(t.parameter, t.delta), t.name) for t in adapter.targets]
    parts += [(id(replacement.tensor), replacement.name) for replacement in adapter.replacements]
    parts += [(id(rows.tensor), rows.name) for rows in adapter.rows]
    return {part: tuple(PlaceInfo(place.key) for place in found[name]) for part, name in parts if name in found}


def _places(made: Plan) -> Mapping[_Part, tuple[PlaceInfo, ...]]:
    found: defaultdict[_Part, list[PlaceInfo]] = defaultdict(list)
    for edit in made.edits:
        for term in edit.terms:
            found[_part(term.parameter, term.delta)].append(PlaceInfo(edit.key, term.part))
        for rows in edit.rows:
            found[id(rows.tensor)].append(PlaceInfo(edit.key))
        if edit.displaced or edit.operation == "append":
            found[id(edit.source)].append(PlaceInfo(edit.key))
    return {part: tuple(places) for part, places in found.items()}


# Single modules


def _target_info(target: Target, found: _Found, *, scaled: bool) -> ModuleInfo:
    delta = target.delta
    part = _part(target.parameter, delta)
    key, places = found.of(part, delta.tensors[0])
    shape = found.shapes.get(part, delta.shape)
    return ModuleInfo(
        module=module_name(target),
        key=key,
        rank=delta.rank or None,
        alpha=delta.scale.alpha if delta.scale.rank else delta.scale.said,
        scale=delta.scale.times() if scaled and delta.scale.exists else None,
        scale_source=delta.scale.source if scaled else None,
        kind=delta.kind,
        shape=shape if any(shape) else None,
        dtype="/".join(sorted({tensor.dtype.name for tensor in delta.tensors})),
        magnitude=delta.magnitude is not None,
        places=places,
        acts=delta.acts,
        undo="preimages" if delta.preimages else "residual",
        parts={name: tensor.shape for name, tensor in delta.parts.items()} if isinstance(delta, Formula) else {},
    )


def _whole_info(replacement: Replacement, found: _Found) -> ModuleInfo:
    tensor = replacement.tensor
    key, places = found.of(id(tensor), tensor)
    kind = f"whole tensor ({replacement.reason})"
    return ModuleInfo(
        replacement.name, key, None, None, None, None, kind, tensor.shape, tensor.dtype.name, places=places
    )


def _rows_info(change: RowReplacement, found: _Found) -> ModuleInfo:
    tensor, kind = change.tensor, f"rows ({change.reason})"
    key, places = found.of(id(tensor), tensor)
    return ModuleInfo(
        change.name,
        key,
        None,
        None,
        None,
        None,
        kind,
        tensor.shape,
        tensor.dtype.name,
        rows=change.rows,
        places=places,
    )
