"""Modules that a config names and a base has, and of which an adapter's file holds nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from adapter_worlds import WORLDS
from tiny import CONFIG, MODULES, WIDTH, factors, out_of, write_adapter, write_base
from tuner_worlds import PARTS, write_tuner

from lora_cli.progress import Progress
from lora_cli.surgery.inspect import inspect
from lora_cli.surgery.merge import merge, plan_merge
from lora_cli.surgery.verify import verify

NAMES = sorted({module.rpartition(".")[2] for module in MODULES})
SECOND = [module for module in MODULES if ".1." in module]
LOST = SECOND[0]


class Heard(Progress):
    """Keeps warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def without(folder: Path, lost: Sequence[str], **config: Any) -> Path:
    """An adapter of all modules of the base but some."""
    said: dict[str, Any] = {"target_modules": NAMES} | config
    held = {name: (out_of(name), WIDTH) for name in MODULES if name not in lost}
    return write_adapter(folder, factors(held), **said)


def told(warnings: Sequence[str]) -> list[str]:
    return [words for words in warnings if "holds nothing of" in words]


def test_a_module_that_is_lost_is_told(tmp_path: Path) -> None:
    base, adapter = write_base(tmp_path / "base"), without(tmp_path / "a", [LOST])
    words = "its config names modules of the base that its file holds nothing of, and their 1 tensor stays as it is"
    assert told(plan_merge(base, [adapter]).warnings) == [f"a: {words}: {LOST}.weight"]
    assert len(told(inspect(adapter, base=base).warnings)) == 1
    assert not told(inspect(adapter).warnings)
    merge(base, [adapter], tmp_path / "out")
    heard = Heard()
    verify(tmp_path / "out", base=base, adapters=[adapter], progress=heard)
    assert len(told(heard.warnings)) == 1


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ".*"},
        {"target_modules": [f"{module[len('model.layers.') :]}" for module in MODULES if module != LOST]},
        {"layers_to_transform": [0]},
        {"exclude_modules": [LOST]},
        {"target_modules": None},
    ],
)
def test_a_config_that_may_leave_it_out(config: dict[str, Any], tmp_path: Path) -> None:
    base, adapter = write_base(tmp_path / "base"), without(tmp_path / "a", [LOST], **config)
    assert not told(inspect(adapter, base=base).warnings)


@pytest.mark.parametrize(("layers", "tensors"), [(1, 0), (2, len(SECOND))])
def test_layers_that_the_model_does_not_count(layers: int, tensors: int, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", config=CONFIG | {"num_hidden_layers": layers})
    warnings = told(inspect(without(tmp_path / "a", SECOND), base=base).warnings)
    assert len(warnings) == bool(tensors)
    assert all(f"their {tensors:,} tensors stay as they are" in words for words in warnings)


@pytest.mark.parametrize("kind", PARTS)
def test_whole_adapters_of_tuners_are_whole(kind: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    assert not told(inspect(write_tuner(tmp_path / "a", kind, target_modules=NAMES), base=base).warnings)


@pytest.mark.parametrize("kind", WORLDS)
def test_whole_adapters_are_whole(kind: str, tmp_path: Path) -> None:
    world = WORLDS[kind](tmp_path)
    assert not told(inspect(world.adapter, base=world.base).warnings)
