"""The layers of a live model, as target choice sees them: under the names that its checkpoint has for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import nn

from lora_cli.adapters.modules import Module, describe, parents_of_experts
from lora_cli.errors import UnsupportedError
from lora_cli.nn.layer import LoRALayer
from lora_cli.nn.wrap import kind_of


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer that holds a weight of its own, by name; what LoRA layers were put around is not looked into."""
    return {name: layer for name, layer in _walk(model, "") if name}


def _walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, LoRALayer) or kind_of(module) is not None or module._parameters.get("weight") is not None:
        yield prefix, module
    if isinstance(module, LoRALayer):
        return
    for name, child in module._modules.items():  # unlike `named_children`, a child of two names under both
        if child is None:
            continue
        yield from _walk(child, f"{prefix}.{name}" if prefix else name)


def described(model: nn.Module) -> list[Module]:
    """Every layer as target choice wants it; those of other types are refused by name, so that a target may say why."""
    beside_experts = parents_of_experts(name for name, _ in model.named_modules())
    modules = []
    for name, layer in layers_of(model).items():
        kind = layer.kind if isinstance(layer, LoRALayer) else kind_of(layer)
        weight = layer.base_weight if isinstance(layer, LoRALayer) else _weight(layer)
        module = describe(
            name, f"{name}.weight", weight.shape, None, kind=kind or "linear", beside_experts=beside_experts
        )
        if kind is None:
            module = replace(module, refusal=f"a layer of type {type(layer).__name__}, which takes no adapter")
        modules.append(module)
    return modules


def _weight(layer: nn.Module) -> nn.Parameter:
    parameter = layer._parameters.get("weight")
    return parameter if parameter is not None else next(layer.parameters())


def without_inner(modules: list[Module]) -> list[Module]:
    """Leave out what lies inside another one of them: attention takes its output projection along."""
    names = {module.name for module in modules}
    parts = ((module, module.name.split(".")) for module in modules)
    return [m for m, p in parts if not any(".".join(p[:count]) in names for count in range(1, len(p)))]


def paths_of(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every name under which a model reaches each of its modules: several where one is used in several places."""
    paths: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(name)
    return paths


def owners(model: nn.Module) -> Counter[int]:
    """How many layers of a model hold each parameter, by its id: more than one where weights are tied."""
    return Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)


def refuse_tied(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Refuse to take anything off a weight that another layer uses too.

    Raises:
        UnsupportedError: Names the layers.
    """
    counts = owners(model)
    tied = [name for name, layer in layers.items() if any(counts[id(p)] > 1 for p in layer.parameters())]
    if tied:
        raise UnsupportedError(
            "An init cannot take anything off a weight that another layer uses too",
            details=tied,
            hint="leave these out with exclude, or take another init",
        )
