"""Models of transformers on the meta device, and what their files would hold, by transformers' own conversions."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
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
    for name, parameter in model.state_dict().items():
        shape = [*parameter.shape[:1], *(1 for _ in parameter.shape[1:])]
        if parameter.ndim > 2 and "experts" in name:
            shape = [2, 2, *(1 for _ in parameter.shape[2:])]
        size = torch.Size(shape).numel()
        live[name] = torch.arange(count, count + size, dtype=torch.int64).reshape(shape)
        count += size
    files = revert_weight_conversion(model, dict(live))
    return Stored({**model.config.to_dict(), "architectures": [type(model).__name__]}, live, files)


def small_model(name: str) -> Model:
    """A small model of a class on the meta device, from its default config."""
    import transformers

    return script().instance(getattr(transformers, name))


def held(places: tuple[Place, ...], files: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The parameter that lies in these places."""
    pieces = [(files[p.key].T if p.turned else files[p.key], p.region) for p in places]
    if pieces[0][1] is None:
        assert len(pieces) == 1
        return pieces[0][0]
    rows = sum(region.outputs[1] - region.outputs[0] for _, region in pieces if region)
    made = torch.full((rows, *pieces[0][0].shape[1:]), -1)
    for tensor, region in pieces:
        assert region is not None
        assert region.of == tensor.shape[0]
        made[region.indices()] = tensor[slice(*region.outputs)]
    return made
