"""Writing what a live injection learned: as a PEFT folder, and merged into a checkpoint by the surgery on files."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import Tensor

from lora_cli.adapters.adapter import Scale
from lora_cli.adapters.formats.peft_keys import PREFIX
from lora_cli.adapters.peft_writer import adapter_config, peft_keys, rendered, target_names, task_type
from lora_cli.adapters.source import CONFIG_FILE
from lora_cli.checkpoint.checkpoint import ADAPTER_FILE
from lora_cli.checkpoint.files import temporary_folder
from lora_cli.checkpoint.source import listing
from lora_cli.checkpoint.staging import Staging
from lora_cli.errors import NamesError, OutputExistsError, UnsupportedError
from lora_cli.nn.config import LoRAConfig
from lora_cli.nn.factors import DEFAULT
from lora_cli.nn.layer import LoRALayer
from lora_cli.nn.modules import paths_of
from lora_cli.surgery.merge import MergeResult, merge
from lora_cli.surgery.placing import PlanOptions
from lora_cli.surgery.results import Reference

if TYPE_CHECKING:
    from lora_cli.nn.injection import Injection

_MAGNITUDE = "lora_magnitude_vector"


def save_adapter(
    injection: Injection,
    folder: str | Path,
    name: str = DEFAULT,
    *,
    base_model: str | None = None,
    force: bool = False,
) -> None:
    """Write an adapter as a PEFT folder, which PEFT and `lora-cli merge` take; complete, or not at all.

    An adapter whose init took something off the base is written so that it fits the base as it was before: with the
    first factors subtracted, at twice the rank.

    Args:
        injection: Where it is.
        folder: A folder that is absent or empty.
        name: Which adapter.
        force: Replace what is there, if that is an adapter and nothing else.
        base_model: What the config calls the base, or nothing; the name that the model knows itself by unless given.

    Raises:
        NamesError: No such adapter.
        UnsupportedError: Layers for which PEFT has no form.
        WrongInputError: An init took something off a weight that was changed since.
        OutputExistsError: Something is in the folder.
    """
    place = Path(folder)
    may_replace = force and place.is_dir() and {file.name for file in listing(place)} <= {ADAPTER_FILE, CONFIG_FILE}
    if not may_replace and place.exists() and (not place.is_dir() or listing(place)):
        hint = "name another folder, or give force=True to replace an adapter that has nothing beside it"
        raise OutputExistsError("The output exists already", file=place, hint=hint)
    layers = _layers_with(injection, name)
    tensors: dict[str, Tensor] = {}
    wholes = injection.wholes_of(name)
    for module, layer in layers.items():
        tensors |= {f"{PREFIX}{key}": tensor for key, tensor in _peft_tensors(module, layer, name).items()}
    tensors |= {f"{PREFIX}{_whole_key(key, injection)}": whole for key, whole in wholes.items()}
    data = safetensors.torch.save({key: _own(tensor) for key, tensor in tensors.items()}, metadata={"format": "pt"})
    config = _config(injection, layers, name, base_model)
    with Staging(place, folder=True, may_replace=lambda: may_replace).opened() as staging:
        staging.write_small(ADAPTER_FILE, data)
        staging.write_small(CONFIG_FILE, rendered(config))
        staging.publish()


def save_merged(
    injection: Injection,
    base: Reference,
    out: Reference,
    *,
    name: str = DEFAULT,
    options: PlanOptions | None = None,
    **keywords: Any,
) -> MergeResult:
    """Merge an adapter into the checkpoint of the base, on files: tensors that the model's class does not know survive.

    The adapter is put into the undo file, so that `lora-cli unmerge` needs nothing else.

    Args:
        injection: Where the adapter is.
        base: The checkpoint that the model was made from.
        out: A folder that is absent or empty, or a `.safetensors` file.
        name: Which adapter.
        options: What is said of the merge, such as a weight.
        **keywords: Others of `lora_cli.merge`.

    Raises:
        LoraCliError: What `save_adapter` and `lora_cli.merge` raise.
    """
    with temporary_folder() as scratch:
        folder = scratch.path / name
        save_adapter(injection, folder, name)
        return merge(base, [folder], out, options, **({"embed_adapter": True} | keywords))


def _layers_with(injection: Injection, name: str) -> dict[str, LoRALayer]:
    # A layer that the model reaches by several names has a tensor in the checkpoint under each of them.
    paths = paths_of(injection.model)
    layers = {path: layer for layer in injection.layers.values() if name in layer.settings for path in paths[layer]}
    if not layers:
        raise NamesError("No such adapter", found=name, expected=", ".join(injection.configs))
    return layers


def _peft_tensors(module: str, layer: LoRALayer, name: str) -> dict[str, Tensor]:
    """The tensors of one module by their names in a PEFT file, without the prefix."""
    if layer.kind in ("grouped", "attention") or getattr(layer.base, "groups", 1) > 1:
        raise UnsupportedError(
            "PEFT has no form for the adapter of this layer, or means another thing by it",
            tensor=module,
            found=f"{type(layer.base).__name__} ({layer.kind})",
            hint="merge it in memory (Injection.merge), or save the injected model's state as a wrapped checkpoint",
        )
    key_a, key_b = peft_keys(layer.selected(module))
    # Stacked along the rank: one pair, or two where an init took the first factors' product off the base.
    terms = layer.change_of(name)
    signs = [math.copysign(1.0, term.scale) for term in terms]
    rank = sum(term.a.shape[0] for term in terms)
    a_shape, b_shape = layer.shapes(rank)
    a = torch.cat([term.a.detach().cpu() for term in terms])
    b = torch.cat([sign * term.b.detach().cpu() for sign, term in zip(signs, terms, strict=True)], dim=1)
    tensors = {key_a: a.reshape(a_shape), key_b: b.reshape(b_shape)}
    if layer.settings[name].dora:
        magnitude = layer.lora_magnitude[name].detach().cpu()
        tensors[f"{module}.{_MAGNITUDE}"] = _as_peft(magnitude, layer)
    return tensors


def _as_peft(magnitude: Tensor, layer: LoRALayer) -> Tensor:
    """PEFT keeps the magnitudes of a convolution in the shape of its output."""
    return magnitude.view(1, -1, *(1 for _ in layer.base_weight.shape[2:])) if layer.kind == "conv" else magnitude


def _whole_key(name: str, injection: Injection) -> str:
    """The name in a PEFT file of what was trained whole: a bias of a LoRA layer is in the layer that PEFT wraps."""
    module, _, parameter = name.rpartition(".")
    return f"{module}.base_layer.{parameter}" if module in injection.layers else name


def _config(injection: Injection, layers: Mapping[str, LoRALayer], name: str, base_model: str | None) -> dict[str, Any]:
    config = injection.configs[name]
    numbers = {module: _numbers(layer, name) for module, layer in layers.items()}
    common = Counter(numbers.values()).most_common(1)[0][0]
    selected = [layer.selected(module) for module, layer in layers.items()]
    about = _about(injection)
    content = adapter_config(
        target_names(list(layers), injection.base_state(), bare=False),
        Scale(common[1], common[0], config.rslora, "config"),
        task=task_type(about, injection.wholes_of(name)),
        fan_in_fan_out=any(module.transposed for module in selected),
        init=config.init,
        base_id=about.get("_name_or_path") if base_model is None else base_model,
    )
    others = {"^" + re.escape(module): found for module, found in numbers.items() if found != common}
    return content | {
        "lora_dropout": config.dropout,
        "use_dora": config.dora,
        "bias": config.bias,
        "modules_to_save": _saved(config, injection.wholes_of(name)) or None,
        "rank_pattern": {module: rank for module, (rank, _) in others.items() if rank != common[0]},
        "alpha_pattern": {module: _plain(alpha) for module, (_, alpha) in others.items() if alpha != common[1]},
    }


def _saved(config: LoRAConfig, wholes: Collection[str]) -> list[str]:
    """Modules that hold what was trained whole; biases are not told by module where the config asks for them."""
    told = () if config.bias == "none" else ("bias",)
    return sorted({name.rpartition(".")[0] for name in wholes if not name.endswith(told)})


def _numbers(layer: LoRALayer, name: str) -> tuple[int, float]:
    """Rank and alpha of what is written: doubled with the rank, so that the scale stays."""
    scale, count = layer.settings[name].scale, len(layer.change_of(name))
    rank = scale.rank or 1
    return rank * count, scale.alpha * (math.sqrt(count) if scale.rslora else count)


def _about(injection: Injection) -> dict[str, Any]:
    """What a transformers model says of itself; nothing of any other."""
    config: Any = getattr(injection.model, "config", None)
    said = config.to_dict() if hasattr(config, "to_dict") else {}
    name = getattr(config, "_name_or_path", None)
    return {"architectures": [type(injection.model).__name__], **_set(said), "_name_or_path": name}


def _set(said: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in said.items() if value is not None}


def _plain(number: float) -> float | int:
    return int(number) if number.is_integer() else number


def _own(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().clone()
