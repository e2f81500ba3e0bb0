"""Which way round a base stores a matrix: (out × in) as torch's Linear does, or (in × out) as GPT-2's Conv1D.

Shapes decide. Where the base is square they cannot; then, in this order: what the user said, what the architecture in
the base's config says, how the adapter's other matrices lie, what the adapter's config claims.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from importlib import resources
from typing import Any, Literal

from lora_cli.adapters.adapter import Adapter, Target

Orientation = Literal["ba", "ab"]


def fits(delta: tuple[int, int], base: tuple[int, ...]) -> set[bool]:
    """The values of `transposed` with which a delta of (out, in) has the base's shape."""
    return {transposed for transposed, shape in ((False, delta), (True, delta[::-1])) if shape == base}


def by_architecture(target: Target, key: str, base_config: Mapping[str, Any]) -> bool | None:
    """How the architecture in the base's config stores the target's matrix; None for one that is not listed.

    Where a config holds others (an encoder and a decoder), the one that the key's name begins with decides.
    """
    config = base_config
    for part in key.split(".", 2)[:2]:
        inner = config.get(part, config.get(f"{part}_config"))
        config = inner if isinstance(inner, dict) else config
    modules = conv1d_modules().get(str(config.get("model_type")))
    return None if modules is None else target.module.rpartition(".")[2] in modules


def settle_square(adapter: Adapter, told: bool | None, others: set[bool], said: Orientation | None) -> bool | None:
    """Decide `transposed` for a square base; None when nothing decides.

    Args:
        adapter: Whose matrix it is.
        told: What the architecture says.
        others: How the adapter's matrices lie that are not square.
        said: `--orientation`: `ba` for a base stored (out × in), `ab` for (in × out).
    """
    if said is not None:
        return said == "ab"
    if told is not None:
        return told
    if len(others) == 1:
        return next(iter(others))
    if adapter.orientation is not None:
        return bool(adapter.transposed_hint)
    return None


@lru_cache(maxsize=1)
def conv1d_modules() -> Mapping[str, tuple[str, ...]]:
    """Model type → last name parts of the modules that store (in × out)."""
    import yaml

    text = (resources.files("lora_cli") / "data" / "conv1d.yaml").read_text("utf-8")
    return {name: tuple(modules) for name, modules in yaml.safe_load(text).items()}
