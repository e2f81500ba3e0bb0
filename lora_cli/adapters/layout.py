"""Which way round a base stores a matrix: (out × in) as torch's Linear does, or (in × out) as GPT-2's Conv1D.

Some kinds of delta are stored in one way alone. Of the others shapes decide. Where the base is square they cannot;
then, in this order: the names of embeddings, which are stored (in × out), what the user said, what the architecture in
the base's config says, how the adapter's other matrices lie, what the adapter's config claims.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import lru_cache
from importlib import resources
from typing import Any, Literal

from lora_cli.adapters.adapter import Adapter, Target
from lora_cli.adapters.modules import is_embedding

Orientation = Literal["ba", "ab"]


def is_table(adapter: Adapter, key: str) -> bool:
    """Whether a matrix is an embedding's by its name in the base, where the adapter's format does not say it."""
    return adapter.orientation is None and is_embedding(key.removesuffix(".weight"))


def bears_witness(adapter: Adapter, key: str, transposed: bool, keys: Collection[str]) -> bool:
    """Whether how a matrix lies says how others of the base do.

    What lies (in × out) may be an embedding, as all of them lie, and then says nothing of linear layers. It is none if
    the config tells embeddings apart, if it has a bias, or if it is a bare matrix that no layer has given a name.
    """
    module = key.removesuffix(".weight")
    return not transposed or adapter.transposed_hint is not None or module == key or f"{module}.bias" in keys


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
    return bool(adapter.transposed_hint) if adapter.orientation is not None else None


@lru_cache(maxsize=1)
def conv1d_modules() -> Mapping[str, tuple[str, ...]]:
    """Model type → last name parts of the modules that store (in × out)."""
    import yaml

    text = (resources.files("lora_cli") / "data" / "conv1d.yaml").read_text("utf-8")
    return {name: tuple(modules) for name, modules in yaml.safe_load(text).items()}
