"""How strong an adapter may be: what is refused, and what a person should look at before it is merged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lora_cli.adapters.adapter import Adapter, Target
from lora_cli.adapters.deltas import LowRank
from lora_cli.errors import NumericError

LARGEST = 1e30
"""Alphas beyond this are no alphas."""

_LARGE = 1000.0
"""Scales beyond this are rather a slip: those that are trained with lie between 0.01 and 100."""


def check_alpha(alpha: float, *, file: str, field: str) -> None:
    """Refuse an adapter whose file says that it changes nothing.

    Raises:
        NumericError: It does.
    """
    if not alpha:
        name = "scale" if field.startswith("scal") else "alpha"
        raise NumericError(
            f"The adapter's {name} is 0, so it would change nothing",
            file=file,
            tensor=field,
            hint="give the alpha it was trained with by --alpha A; to apply nothing on purpose use --weight 0",
        )


def doubts(adapter: Adapter, weight: float = 1.0) -> Iterator[str]:
    """Warnings where an adapter is valid, and stronger, weaker or larger than one that was meant so.

    Args:
        adapter: The adapter.
        weight: The user's weight for it.
    """
    scaled = [target for target in adapter.targets if target.delta.scale.exists]
    wide = [target for target in scaled if _is_wide(target)]
    if wide:
        rank, shape = wide[0].delta.rank, " × ".join(map(str, wide[0].delta.shape))
        yield (
            f"the rank of {_count(wide)} is larger than {'its matrix' if len(wide) == 1 else 'their matrices'}: "
            f"{wide[0].name}, rank {rank} for {shape}"
        )
    negative = [t for t in scaled if t.delta.scale.alpha < 0 and not t.delta.scale.source.startswith("--")]
    if negative and weight > 0:
        scale = negative[0].delta.scale
        yield (
            f"the scale of {_count(negative)} is negative, so the change is taken away and not added: "
            f"{negative[0].name}, {scale.times():g} = {scale.source}"
        )
    large = [target for target in scaled if abs(target.delta.scale.times(weight)) > _LARGE]
    if large:
        scale = large[0].delta.scale
        by = f" and weight {weight:g}" if weight != 1 else ""
        yield (
            f"the scale of {_count(large)} is very large: {large[0].name}, {scale.times(weight):g} by "
            f"{scale.source}{by}"
        )


def _is_wide(target: Target) -> bool:
    return isinstance(target.delta, LowRank) and target.delta.rank > min(target.delta.shape)


def _count(targets: Sequence[Target]) -> str:
    return "1 module" if len(targets) == 1 else f"{len(targets)} modules"
