"""Diff: how far are two checkpoints, or two adapters, apart? Nothing is written."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from lora_cli.adapters.adapter import Adapter, Delta, Target
from lora_cli.adapters.expert_deltas import OpenExperts
from lora_cli.adapters.formats import open_adapter
from lora_cli.adapters.formula import Formula
from lora_cli.adapters.patterns import compile_user_pattern
from lora_cli.adapters.source import ReadOptions
from lora_cli.checkpoint.checkpoint import Checkpoint, StoredTensor, open_checkpoint
from lora_cli.errors import UsageError
from lora_cli.progress import SILENT, Progress
from lora_cli.regex import Matches
from lora_cli.surgery.budget import DEFAULT_MEMORY
from lora_cli.surgery.changes import Changed, Comparison
from lora_cli.surgery.inspect import is_adapter, locate_any
from lora_cli.surgery.results import Reference, measured
from lora_cli.surgery.workers import default_threads

Kind = Literal["checkpoints", "adapters"]
T = TypeVar("T")


@dataclass(frozen=True)
class DiffResult:
    """What a comparison found.

    Attributes:
        kind: What was compared.
        a: Label of the first.
        b: Label of the second.
        same: Whether nothing differs by more than the tolerance.
        only_in_a: Names that B lacks, sorted.
        only_in_b: Names that A lacks, sorted.
        changed: What differs, the largest change first: other shapes, then by relative norm.
        unchanged: How many are the same within the tolerance.
        tolerance: What was allowed.
        seconds: Wall time.
        peak_rss_bytes: Most memory that one process had: this one, or any that it has waited for.
        names: What was compared by name: tensors, also of an adapter of another tuner than LoRA, or modules with their
            deltas.
    """

    kind: Kind
    a: str
    b: str
    same: bool
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    changed: tuple[Changed, ...]
    unchanged: int
    tolerance: float
    seconds: float
    peak_rss_bytes: int
    names: Literal["tensor", "module"] = "tensor"


def diff(
    a: Reference,
    b: Reference,
    *,
    tolerance: float = 0.0,
    only: str | None = None,
    rank: bool = False,
    threads: int | None = None,
    memory: int | None = None,
    options: ReadOptions | None = None,
    progress: Progress = SILENT,
) -> DiffResult:
    """Compare two checkpoints tensor by tensor, or two adapters: LoRA by its deltas, other tuners by their tensors.

    Tensors are matched by name, however they are spread over files, and are the same when their bits are: -0.0 is
    not +0.0 (a change of size 0), and NaN is itself. Deltas are the same when `scale·B·A` is, whatever the factors
    are, up to the rounding of float64; what other tuners than LoRA make their changes of is compared tensor by tensor,
    as `MODULE.PART`, and so are tensors that an adapter holds whole; trained rows of a table one by one, as
    `TABLE[ROW]`. Of square experts the side that A meets must be known to be the same in both, or that is what differs,
    as `NAME.side`. Adapters also differ where they say other things of layers, ties and inits, or of single modules.

    Args:
        a: A checkpoint or an adapter: a file, a folder or a Hub id.
        b: Another of the same kind.
        tolerance: Tensors of one type whose elements differ by at most this count as unchanged; 0 means the same bits.
        only: Compare what this pattern finds, by name or by the name of its module (see `compile_user_pattern`).
        rank: Look at how many directions changed matrices changed in: several more passes over them, and on top of
            `memory`, where that does not hold it, 24·(out + in)·256 bytes for the one matrix being looked at. For
            deltas that comes from the factors and is always there.
        threads: Pieces of work at once; all cores by default. No number depends on it.
        memory: Bytes that buffers and factors may take; 256 MiB, or what one tensor needs, unless given.
        options: How adapters are read.
        progress: Hears of every step.

    Raises:
        UsageError: An adapter and a checkpoint, a tolerance that is no distance, a pattern that finds nothing, or too
            little memory.
        LoraCliError: What opening the inputs raises.
    """
    if not 0 <= tolerance < math.inf:
        raise UsageError("The tolerance must be a number from 0 on", found=tolerance)
    with measured() as run:
        one, other = (_open(reference, options, progress) for reference in (a, b))
        if type(one) is not type(other):
            kinds = ["an adapter" if isinstance(side, Adapter) else "a checkpoint" for side in (one, other)]
            raise UsageError(
                "An adapter and a checkpoint cannot be compared",
                found=f"{one.label} is {kinds[0]}, {other.label} is {kinds[1]}",
                hint="merge the adapter first, or use verify",
            )
        comparison = Comparison(tolerance, rank, threads or default_threads(), memory or DEFAULT_MEMORY, progress)
        chosen = (lambda name: True) if only is None else compile_user_pattern(only)
        comparison.tensors(*(_chosen(_tensors(side), chosen) for side in (one, other)))
        comparison.deltas(*_met_alike(*(_chosen(_deltas(side), chosen) for side in (one, other))))
        comparison.settings(*(_chosen(_settings(side), chosen) for side in (one, other)))
        if only is not None and not comparison.names:
            raise UsageError("The pattern of --only finds nothing in either", found=only)
    changed = comparison.by_size()
    return DiffResult(
        kind="adapters" if isinstance(one, Adapter) else "checkpoints",
        a=one.label,
        b=other.label,
        same=not (changed or comparison.only_in_a or comparison.only_in_b),
        only_in_a=tuple(sorted(comparison.only_in_a)),
        only_in_b=tuple(sorted(comparison.only_in_b)),
        changed=changed,
        unchanged=comparison.common - len(changed),
        tolerance=tolerance,
        seconds=run.seconds,
        peak_rss_bytes=run.peak_rss_bytes,
        names="module" if all(_has_deltas(side) for side in (one, other)) else "tensor",
    )


def _has_deltas(side: Checkpoint | Adapter) -> bool:
    return isinstance(side, Adapter) and not any(_formulas(side))


def _open(reference: Reference, options: ReadOptions | None, progress: Progress) -> Checkpoint | Adapter:
    place = locate_any(reference, progress)
    opened: Checkpoint | Adapter
    if is_adapter(place.path):
        opened = open_adapter(place.path, options, label=place.label)
    else:
        opened = open_checkpoint(place.path, label=place.label)
    for warning in opened.warnings:
        progress.warn(f"{opened.label}: {warning}")
    return opened


def _chosen(named: Mapping[str, T], matches: Matches) -> dict[str, T]:
    """What the pattern finds by its name, or by the name of its module."""
    return {name: value for name, value in named.items() if matches(name) or matches(name.rpartition(".")[0])}


def _tensors(side: Checkpoint | Adapter) -> Mapping[str, StoredTensor]:
    """Every tensor that is compared as it is stored; of an adapter all that is no factor of a delta."""
    if isinstance(side, Checkpoint):
        return side.tensors
    magnitudes = (target.delta.magnitude for target in side.targets)
    rest = (*side.unread, *(tensor for tensor, _ in side.skipped), *(found for found in magnitudes if found))
    rows = {
        f"{change.name}[{row}]": change.tensor.part(at) for change in side.rows for at, row in enumerate(change.rows)
    }
    named = _formula_parts(side) | {r.name: r.tensor for r in side.replacements} | rows
    return named | {tensor.key: tensor for tensor in rest}


def _formula_parts(side: Adapter) -> dict[str, StoredTensor]:
    """What formulas are made of, by module and the tuner's name; what modules share, by its own."""
    found: dict[str, StoredTensor] = {}
    owners: dict[str, str] = {}
    for target, formula in _formulas(side):
        for part, tensor in formula.parts.items():
            shared = owners.setdefault(tensor.key, target.module) != target.module
            if shared:
                found.pop(f"{owners[tensor.key]}.{part}", None)
            found[tensor.key if shared else f"{target.module}.{part}"] = tensor
    return found


def _formulas(side: Adapter) -> Iterator[tuple[Target, Formula]]:
    return ((target, target.delta) for target in side.targets if isinstance(target.delta, Formula))


def _deltas(side: Checkpoint | Adapter) -> Mapping[str, Delta]:
    """What is compared as the product that it is."""
    if isinstance(side, Checkpoint):
        return {}
    return {target.name: target.delta for target in side.targets if not isinstance(target.delta, Formula)}


def _met_alike(a: Mapping[str, Delta], b: Mapping[str, Delta]) -> tuple[Mapping[str, Delta], ...]:
    """Those of both whose B·A is of the same sides of a matrix; what has others differs in its settings."""
    apart = {name for name in a.keys() & b.keys() if _side(a[name]) != _side(b[name])}
    return tuple({name: delta for name, delta in side.items() if name not in apart} for side in (a, b))


def _side(delta: Delta) -> str | None:
    """What is known of the side that A meets of square experts, of which shapes do not say it."""
    return delta.meets if isinstance(delta, OpenExperts) else None


def _settings(side: Checkpoint | Adapter) -> Mapping[str, object]:
    """What an adapter says besides, by the names that PEFT has for it."""
    if isinstance(side, Checkpoint):
        return {}
    layers = None if side.layers is None else list(side.layers)
    said: dict[str, object] = {
        "peft_type": side.tuner or "LoRA",
        "layer_replication": layers,
        "ensure_weight_tying": side.tied,
        "init_lora_weights": side.initial,
    }
    said |= {f"{name}.side": met for name, delta in _deltas(side).items() if (met := _side(delta))}
    for target, formula in _formulas(side):
        said[f"{target.name}.scale"] = formula.scale.times()
        said |= {f"{target.name}.{name}": value for name, value in formula.settings.items()}
    return said
