"""Bases and adapters with one thing wrong, made for the case; the rest is that of the small world."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cli_world import World
from safetensors.numpy import save_file
from tiny import CONFIG, Array, Tensors, adapter_tensors, write_adapter, write_base, write_json

Line = list[object]
Case = Callable[[World, Path], Line]
"""Makes what a command line needs in a folder, and returns the line."""


def merging(
    *more: object,
    factors: Tensors | None = None,
    base: Tensors | None = None,
    base_config: Mapping[str, Any] | None = None,
    fields: Mapping[str, Any] | None = None,
    **config: Any,
) -> Case:
    """Merge a PEFT folder, with these factors and fields of its config, into the world's base or these tensors."""

    def make(world: World, folder: Path) -> Line:
        own = base is not None or base_config is not None
        into = write_base(folder / "b", base, config={**CONFIG, **(base_config or {})}) if own else world.base
        adapter = write_adapter(folder / "a", factors, **{**config, **(fields or {})})
        return ["merge", into, adapter, "-o", folder / "out", *more]

    return make


def plainly(factors: Tensors, *more: object, config: Mapping[str, Any] | None = None, **metadata: str) -> Case:
    """Merge a bare file of factors into the world's base."""

    def make(world: World, folder: Path) -> Line:
        save_file(dict(factors), folder / "a.safetensors", metadata or None)
        if config is not None:
            write_json(folder / "adapter_config.json", config)
        return ["merge", world.base, folder / "a.safetensors", "-o", folder / "out", *more]

    return make


def config_text(old: str, new: str) -> Case:
    """Merge an adapter whose config has other text in one place."""

    def make(world: World, folder: Path) -> Line:
        file = write_adapter(folder / "a") / "adapter_config.json"
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new, 1))
        return ["merge", world.base, folder / "a", "-o", folder / "out"]

    return make


def merged(change: Callable[[Path], object], *more: object, adapter: Tensors | None = None) -> Case:
    """Unmerge a copy of the world's merged checkpoint to which something was done."""

    def make(world: World, folder: Path) -> Line:
        shutil.copytree(world.merged, folder / "m")
        change(folder / "m")
        given = world.adapter if adapter is None else write_adapter(folder / "a", adapter)
        return ["unmerge", folder / "m", given, "-o", folder / "out", *more]

    return make


def changed(tensors: Tensors) -> dict[str, Array]:
    """The world's factors with some of them exchanged or added."""
    return {**adapter_tensors(), **tensors}
