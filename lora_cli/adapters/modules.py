"""What the modules of a model are, as plain values: from the headers of a file and from a live model by the same rules.

Names decide what a module is in the model: a head, a router, an expert. In a file they also tell an embedding from a
matrix product; a live model says itself which layer is which.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any, Literal

import yaml

FLOATING = ("BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2")
"""Storage types that can take a delta, as `surgery.placing.MERGEABLE` has them."""

Kind = Literal["linear", "embedding", "conv", "grouped", "attention"]
Role = Literal["plain", "head", "router", "expert"]

_EXPERTS = "experts"


@dataclass(frozen=True, slots=True)
class Module:
    """A module that has a weight.

    Attributes:
        name: Its name.
        key: The name of its weight.
        shape: The shape of the weight as it is stored.
        dtype: The weight's storage type as a header calls it, such as `BF16`; None where that does not matter.
        kind: What it computes. `grouped` is a stack of matrices, one for each expert; `attention` holds the matrices
            of queries, keys and values in one.
        role: What it is in the model.
        refusal: Why it cannot take an adapter, or None.
        quantised: How its numbers are quantised, or None.
    """

    name: str
    key: str
    shape: tuple[int, ...]
    dtype: str | None
    kind: Kind
    role: Role
    refusal: str | None
    quantised: str | None

    @property
    def ordinary(self) -> bool:
        """Whether presets take it: a linear module of no special role that can take an adapter."""
        return self.kind == "linear" and self.role == "plain" and self.refusal is None


def describe(
    name: str,
    key: str,
    shape: Iterable[int],
    dtype: str | None,
    *,
    kind: Kind | None = None,
    quantised: str | None = None,
    beside_experts: Collection[str] = (),
) -> Module:
    """Say what a module is.

    Args:
        name: Its name.
        key: The name of its weight.
        shape: The shape of its weight: a linear module's (out, in) or (in, out), an embedding's (entries, dim), a
            convolution's (out, in / groups, kernel…).
        dtype: Storage type of the weight as a header calls it. None, as on a live layer that unpacks its numbers
            itself, is not held against the module.
        kind: What it computes, where a live model says so. In a file name and shape decide.
        quantised: How its numbers are quantised, or None.
        beside_experts: What `parents_of_experts` says of the model.
    """
    dimensions = tuple(shape)
    role = _role(name, beside_experts)
    settled = kind or _kind(name, dimensions, role)
    refusal = _refusal(settled, dimensions, told=kind is not None)
    # A quantised matrix is refused as such: the type that it is packed in says nothing to a person.
    if refusal is None and quantised is None and dtype is not None and dtype not in FLOATING:
        refusal = f"storage type {dtype} takes no delta"
    return Module(name, key, dimensions, dtype, settled, role, refusal, quantised)


def parents_of_experts(names: Iterable[str]) -> set[str]:
    """Modules with experts in them: what stands beside those by the name of `gate` or `router` chooses between them.

    Args:
        names: Names of all modules or parameters of a model.
    """
    parted = (name.split(".") for name in names)
    return {".".join(parts[:at]) for parts in parted for at, part in enumerate(parts) if part == _EXPERTS}


def is_embedding(name: str) -> bool:
    """Whether a module is a lookup table by its name."""
    return ends_in(name, table()["embeddings"])


def ends_in(name: str, endings: Iterable[str]) -> bool:
    """Whether the last one, two or three parts of a name are among `endings`."""
    parts = name.split(".")
    return not {".".join(parts[-count:]) for count in (1, 2, 3)}.isdisjoint(endings)


def _role(name: str, beside_experts: Collection[str]) -> Role:
    parts, names = name.split("."), table()
    if _EXPERTS in parts[:-1]:
        return "expert"
    if any(part in names["routers"] and ".".join(parts[:at]) in beside_experts for at, part in enumerate(parts)):
        return "router"
    return "head" if ends_in(name, names["heads"]) or name in names["top_heads"] else "plain"


def _kind(name: str, shape: tuple[int, ...], role: Role) -> Kind:
    if len(shape) > 2:
        stacked = role == "expert" or ends_in(name, table()["stacked_experts"])
        return "grouped" if stacked else "conv"
    return "embedding" if is_embedding(name) else "linear"


def _refusal(kind: Kind, shape: tuple[int, ...], *, told: bool) -> str | None:
    sizes = {"linear": (2,), "embedding": (2,), "conv": (3, 4, 5)}
    # Which way round a stack of experts is, and how it is split, its shape does not say.
    right = len(shape) in sizes[kind] if kind in sizes else told
    if right and 0 not in shape:
        return None
    needed = {"conv": "a convolution of 1 to 3 dimensions", "embedding": "a table"}.get(kind, "a matrix")
    return f"shape {list(shape)}; an adapter needs {needed}"


@lru_cache(maxsize=1)
def table() -> Mapping[str, Any]:
    """The names that `data/targets.yaml` lists."""
    text = (resources.files("lora_cli") / "data" / "targets.yaml").read_text("utf-8")
    names: Mapping[str, Any] = yaml.safe_load(text)
    return names
