"""Models of transformers on the meta device, and what their files would hold, by transformers' own conversions."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from lora_cli.adapters.region import Place

Model = Any  # of transformers, which is not typed


@cache
def script() -> ModuleType:
    """scripts/make_conversions.py."""
    path = Path(__file__).parents[2] / "scripts" / "make_conversions.py"
    spec = importlib.util.spec_from_file_location("make_conversions", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Shaped:
    """A tensor of which nothing but the shape is known."""

    shape: tuple[int, ...] = (8, 4)


@dataclass(frozen=True)
class Stored:
    """A model and its files: each number is another one, so that every row is known again.

    Attributes:
        config: What config.json says.
        live: Parameter → numbers.
        files: Key → numbers.
    """

    config: Mapping[str, Any]
    live: Mapping[str, torch.Tensor]
    files: Mapping[str, torch.Tensor]


def stored(model: Model) -> Stored:
    """What transformers would write. All sides but the first are cut to one: only conversions of experts look there."""
    from transformers.core_model_loading import revert_weight_conversion

    live, count = {}, 0
    experts = dict(expert_shapes(model))
    for name, parameter in model.state_dict().items():
        shape = experts.get(name, [*parameter.shape[:1], *(1 for _ in parameter.shape[1:])])
        size = torch.Size(shape).numel()
        live[name] = torch.arange(count, count + size, dtype=torch.int64).reshape(shape)
        count += size
    files = revert_weight_conversion(model, dict(live))
    return Stored({**model.config.to_dict(), "architectures": [type(model).__name__]}, live, files)


EXPERTS, WIDE, INSIDE = 3, 5, 2
"""How many experts there are, and of how many numbers, in what is stored; none of them makes a square."""


def expert_shapes(model: Model) -> Iterator[tuple[str, tuple[int, int, int]]]:
    """Small shapes for all stacks of experts, in which gate, up and down fit each other as they do in the model."""
    for path, module in model.named_modules():
        held = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False) if p.ndim == 3}
        if held.keys() == {"gate_up_proj", "down_proj"}:
            usual = held["gate_up_proj"][1:] == (2 * held["down_proj"][2], held["down_proj"][1])
            yield f"{path}.gate_up_proj", (EXPERTS, 2 * INSIDE, WIDE) if usual else (EXPERTS, WIDE, 2 * INSIDE)
            yield f"{path}.down_proj", (EXPERTS, WIDE, INSIDE) if usual else (EXPERTS, INSIDE, WIDE)
        elif held and "down_proj" in held:
            for name in held:
                yield f"{path}.{name}", (EXPERTS, WIDE, INSIDE) if name == "down_proj" else (EXPERTS, INSIDE, WIDE)


def small_model(name: str) -> Model:
    """A small model of a class on the meta device, from its default config."""
    import transformers

    return script().instance(getattr(transformers, name))


def held(places: tuple[Place, ...], files: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    """The parameter of some shape that lies in these places; -1 where nothing does."""
    made = torch.full(shape, -1, dtype=torch.int64)
    for place in places:
        part = files[place.key] if place.at is None else files[place.key][place.at]
        part = part.mT if place.turned else part
        whole = made if place.matrix is None else made[place.matrix]
        if place.region is None:
            whole[...] = part
            continue
        rows = 1 if part.ndim == 3 and "conv" not in place.key else 0
        assert place.region.of == part.shape[rows]
        taken = part.index_select(rows, torch.tensor(range(*place.region.outputs, place.region.step)))
        whole.index_copy_(rows, torch.tensor(place.region.indices()), taken)
    return made
