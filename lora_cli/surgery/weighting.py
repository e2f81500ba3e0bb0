"""How much of each adapter is applied, and of what it was before training, where that was taken off the base."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from lora_cli.adapters.adapter import Adapter
from lora_cli.errors import UnsupportedError, UsageError, WrongInputError

BEFORE_TRAINING = "as it was before training"
"""What follows the label of an adapter that is taken off, in brackets."""


def with_weights(adapters: Sequence[Adapter], weights: Sequence[float]) -> tuple[list[Adapter], list[float]]:
    """Return adapters with their weights; what some were before training follows them, to be taken off again.

    Args:
        adapters: The adapters.
        weights: One number for each, or none at all for 1.

    Raises:
        UsageError: No adapter, not as many weights, or one that is no number.
        UnsupportedError: An adapter whose first factors were taken off its base, and nothing says which they were.
    """
    given = _weights(weights, adapters)
    both = [pair for adapter, weight in zip(adapters, given, strict=True) for pair in _with_before(adapter, weight)]
    return [adapter for adapter, _ in both], [weight for _, weight in both]


def _with_before(adapter: Adapter, weight: float) -> Iterator[tuple[Adapter, float]]:
    yield adapter, weight
    if adapter.initial is None:
        return
    if adapter.before is None:
        raise UnsupportedError(
            f"The base of this adapter was changed by its init ({adapter.initial}), and the factors do not say how",
            file=adapter.label,
            hint="give the adapter as it was before training with --initial DIR (PEFT's examples save it then); or "
            "merge into the changed base that it was trained on, with --ignore-field init_lora_weights",
        )
    yield adapter.before, -weight


def with_initial(adapter: Adapter, before: Adapter) -> Adapter:
    """Return an adapter that knows what it was before training: W - scale·B₀·A₀ was its base then.

    (PEFT, `LoraModel.subtract_mutated_init`, puts both into one adapter of twice the rank; the sum is the same.)

    Raises:
        WrongInputError: It cannot have been this adapter: other targets, shapes or scales.
    """
    said, found = (
        {target.name: (target.delta.shape, target.delta.rank, target.delta.scale.times()) for target in one.targets}
        for one in (adapter, before)
    )
    if said != found:
        differing = sorted(name for name in said.keys() | found.keys() if said.get(name) != found.get(name))
        raise WrongInputError(
            "The adapter given with --initial is not this one before its training",
            file=before.label,
            expected=f"the targets, ranks and scales of {adapter.label}",
            details=differing,
        )
    whole = [change.tensor for change in before.replacements] + [change.tensor for change in before.rows]
    skipped = (*before.skipped, *((tensor, BEFORE_TRAINING) for tensor in whole))
    label = f"{before.label} ({BEFORE_TRAINING})"
    bare = replace(before, label=label, replacements=(), rows=(), skipped=skipped, initial=None, beginning=True)
    # The layers and ties of the model are those of the trained adapter.
    return replace(adapter, before=replace(bare, layers=adapter.layers, tied=adapter.tied))


def _weights(weights: Sequence[float], adapters: Sequence[Adapter]) -> list[float]:
    if not adapters:
        raise UsageError(
            "No adapter given, and the base carries none",
            hint="name an adapter: merge BASE ADAPTER, verify --adapter ADAPTER",
        )
    if not weights:
        return [1.0] * len(adapters)
    if len(weights) != len(adapters):
        names = ", ".join(adapter.label for adapter in adapters)
        raise UsageError(
            "Give --weight once per adapter, in their order, or not at all",
            expected=f"{len(adapters)} ({names})",
            found=len(weights),
        )
    bad = [weight for weight in weights if not math.isfinite(weight)]
    if bad:
        raise UsageError("A weight must be a finite number", found=bad[0])
    return list(weights)
