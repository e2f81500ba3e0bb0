"""Where a base has the weight that a change is computed from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from lora_cli.adapters.adapter import Target
from lora_cli.adapters.region import Place
from lora_cli.checkpoint.checkpoint import StoredTensor
from lora_cli.errors import LoraCliError, NamesError, UnsupportedError
from lora_cli.surgery.changing import Change
from lora_cli.surgery.edit import MERGEABLE, Seen

Places = Mapping[str, Sequence[Place]]
"""Where parameters are, by their names in the adapter."""


def seen(target: Target, places: Places, tensors: Mapping[str, StoredTensor], *, transposed: bool) -> tuple[Seen, ...]:
    """The stored tensors that have the weight that a change is computed from; none for other changes.

    Args:
        target: The change.
        places: Where the adapter's parameters are.
        tensors: The base's tensors.
        transposed: How the change lies, if it is one of the weight.
    """
    own, found = target.name == target.weight, places.get(target.weight, ()) if target.reads else ()
    return tuple(Seen(tensors[place.key], transposed if own else place.turned, place.region) for place in found)


def unseen(
    target: Target,
    places: Places,
    tensors: Mapping[str, StoredTensor],
    changes: Mapping[str, Change],
    quantised: Callable[[str], str | None],
) -> Iterator[tuple[type[LoraCliError], str]]:
    """What hinders a change from being computed, in words."""
    if not target.reads:
        return
    if target.weight not in places:
        yield NamesError, f"{target.name}: computed from {target.weight}, which the base lacks"
    for place in places.get(target.weight, ()):
        tensor, change = tensors[place.key], changes.get(place.key)
        if place.matrix is not None or place.at is not None:
            why = "a stack of matrices"
        elif change and change.replaced:
            why = "which an adapter replaces"
        elif tensor.dtype.name not in MERGEABLE or quantised(tensor.key):
            why = quantised(tensor.key) or f"of storage type {tensor.dtype.name}"
        else:
            continue
        yield UnsupportedError, f"{target.name}: computed from {place.key}, {why}"
