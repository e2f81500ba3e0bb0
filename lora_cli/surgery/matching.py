"""Names of an adapter held against those of a base: what has a place, what has none, and what to say of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lora_cli.adapters.adapter import Adapter
from lora_cli.adapters.expert_deltas import OpenExperts
from lora_cli.adapters.expert_layout import ExpertLayout
from lora_cli.adapters.resolve import Resolution, parse_maps
from lora_cli.checkpoint.checkpoint import StoredTensor
from lora_cli.errors import NamesError

NO_TENSOR = "no such tensor in the base (--allow-unmapped)"
NO_PAIR = "belongs to no pair of factors (--allow-unmapped)"


def check_mapped(adapter: Adapter, found: Resolution, new: set[str], *, allow_unmapped: bool) -> None:
    """Refuse an adapter of which nothing, or not all, has a place.

    Args:
        adapter: The adapter.
        found: Where its names are.
        new: Names that need no place: heads that it adds.
        allow_unmapped: Whether some may be left out.

    Raises:
        NamesError: With every such name.
    """
    may_lack = {target.name for target in adapter.targets if target.may_lack}
    lost = [name for name in found.unmapped if name.name not in new | may_lack]
    if not found.places and (lost or not adapter.targets):
        raise _unmapped("Nothing in this adapter matches the base", adapter, found)
    if (lost or adapter.unread) and not allow_unmapped:
        count = len(lost) + len(adapter.unread)
        raise _unmapped(f"Names of the adapter with no place in the base: {count}", adapter, found, new | may_lack)


def left_out(adapter: Adapter, found: Resolution, new: set[str]) -> Iterator[tuple[StoredTensor, str]]:
    """The tensors of an adapter that are ignored, each with the reason."""
    yield from adapter.skipped
    names = {name.name for name in found.unmapped} - new
    used = {tensor.key for target in adapter.targets if target.name not in names for tensor in target.delta.tensors}
    for target in adapter.targets:
        for tensor in target.delta.tensors if target.name in names else ():
            if tensor.key not in used:  # one may be of several targets
                used.add(tensor.key)
                yield tensor, NO_TENSOR
    yield from ((change.tensor, NO_TENSOR) for change in adapter.replacements if change.name in names)
    yield from ((change.tensor, NO_TENSOR) for change in adapter.rows if change.name in names)
    yield from ((tensor, NO_PAIR) for tensor in adapter.unread)


def unused_maps(maps: Sequence[str], adapters: Sequence[Adapter]) -> list[str]:
    """A warning for each `--map` that concerns nothing."""
    names = [name for adapter in adapters for name in adapter.names]
    return [
        f"--map {leaf.old}={leaf.new} concerns no name of any adapter"
        for leaf in parse_maps(maps)
        if all(leaf(name) is None for name in names)
    ]


def unused_layout(layout: ExpertLayout, adapters: Sequence[Adapter]) -> list[str]:
    """A warning of an `--expert-layout` that concerns nothing."""
    if not str(layout) or any(isinstance(t.delta, OpenExperts) for adapter in adapters for t in adapter.targets):
        return []
    return [f"--expert-layout {layout} concerns nothing: there are no factors of experts whose layout is open"]


def _unmapped(message: str, adapter: Adapter, found: Resolution, new: set[str] | None = None) -> NamesError:
    details = [
        name.name
        + (f", by --map {name.told}" if name.told else "")
        + (f" ({name.reason})" if name.reason else f" (nearest: {', '.join(name.nearest)})" if name.nearest else "")
        for name in found.unmapped
        if name.name not in (new or ())
    ]
    details += [f"{tensor.key} belongs to no pair of factors" for tensor in adapter.unread]
    biases = {target.name for target in adapter.targets if target.delta.kind == "lora-bias"}
    if any(name.name in biases for name in found.unmapped):
        details.append("the bias of a factor (lora_bias) needs one in the base to go into; PEFT cannot merge it either")
    return NamesError(
        message,
        file=adapter.label,
        found=f"{len(found.places)} names match",
        details=details,
        hint="is this the right base? Say what is called differently with --map OLD=NEW"
        + (", or leave these out with --allow-unmapped" if found.places else ""),
    )
