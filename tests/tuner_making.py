"""How adapters of PEFT's other tuners are made: what an option says, and what is done to some models.

A `TunerOption` is an `Option` of `lora_options` whose config is another tuner's.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
from families import FAMILIES, IMAGES, Family
from family_models import FEW, Model, model, pixels
from lora_options import BIASED, Config, Option
from models import read_tensors
from safetensors.torch import save_file

if TYPE_CHECKING:
    from pathlib import Path

Build = Callable[[Family], Config]

POINTS: Final = Family(  # its kernels are of one point, but for the first of each part
    "points",
    model(
        "PoolFormer",
        "ForImageClassification",
        hidden_sizes=[8, 12],
        depths=[1, 1],
        num_encoder_blocks=2,
        patch_sizes=[4, 3],
        strides=[4, 2],
        padding=[0, 1],
        mlp_ratio=2.0,
        layer_scale_init_value=1.0,
        drop_path_rate=0.0,
        **FEW,
    ),
    pixels,
    IMAGES,
    kernel="patch_embeddings.1.projection",
)
GROUPS: Final = Family(  # and here of groups of one channel
    "groups",
    model(
        "ConvNext",
        "ForImageClassification",
        hidden_sizes=[8, 12],
        depths=[1, 1],
        num_stages=2,
        patch_size=4,
        layer_scale_init_value=1.0,
        drop_path_rate=0.0,
        **FEW,
    ),
    pixels,
    IMAGES,
    kernel="dwconv",
)
TUNED: Final = FAMILIES | {family.name: family for family in (POINTS, GROUPS)}


@dataclass(frozen=True)
class TunerOption(Option):
    """An adapter of another tuner than LoRA.

    Attributes:
        families: What it is tried on.
        share: How far PEFT's merge may be apart, as a share of the largest number, where it decomposes the base in
            float32.
        turns: Whether numbers of half the size change nothing, so that damage turns them around.
        refused: Words that name why it cannot be merged, where it cannot.
    """

    families: tuple[str, ...] = ("llama",)
    share: float | None = None
    turns: bool = False
    refused: str = ""


def config_of(kind: str, **said: Any) -> Build:
    """A config on all linear layers, unless `said` says otherwise; values that are functions get the family."""

    def config(family: Family) -> Config:
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        linear = family.linear if isinstance(family.linear, str) else list(family.linear)
        usual = {"target_modules": linear, "task_type": family.task}
        own = {name: value(family) if callable(value) else value for name, value in said.items()}
        return PEFT_TYPE_TO_CONFIG_MAPPING[kind](**(usual | own))

    return config


def of(kind: str, **usual: Any) -> Callable[..., TunerOption]:
    """Options of one tuner, whose names begin with its; what is not an option's attribute is its config's."""
    attributes = {field.name for field in fields(TunerOption)}

    def option(name: str = "", *families: str, **said: Any) -> TunerOption:
        said = usual | said
        own = {key: value for key, value in said.items() if key in attributes}
        config = config_of(kind, **{key: value for key, value in said.items() if key not in own})
        return TunerOption(f"{kind.lower()}-{name}".strip("-"), config, families=families or ("llama",), **own)

    return option


# Targets


def biased(family: Family) -> list[str]:
    return BIASED[family.name]


NORMS: Final = {"llama": ["input_layernorm", "norm"], "bert": ["LayerNorm"], "gpt2": ["ln_1", "ln_f"]}


def norms(family: Family) -> list[str]:
    return NORMS[family.name.removesuffix("-bf16")]


# What single options do


def allocated(steps: int) -> Callable[[Model], None]:
    """What AdaLoRA's training loop calls after each step, here with the gradients of the last."""

    def end(adapted: Model) -> None:
        for step in range(steps):
            adapted.base_model.update_and_allocate(step)

    return end


def far(adapted: Model, family: Family, folder: Path) -> None:
    """Begin far from where nothing is changed."""
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter) * 0.3)


def rounded(adapted: Model) -> None:
    """Its numbers are such that 16 bits hold them."""
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter.copy_(parameter.bfloat16())


def in_16_bits(adapted: Model, folder: Path) -> None:
    adapted.save_pretrained(folder)
    tensors = {name: tensor.bfloat16() for name, tensor in read_tensors(folder).items()}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def as_bone(adapted: Model, folder: Path) -> None:
    """As PEFT 0.14 to 0.17 saved the same adapter, under MiSS's first name."""
    adapted.save_pretrained(folder)
    tensors = {name.replace("miss_block", "bone_block"): tensor for name, tensor in read_tensors(folder).items()}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    for name in ("mini_r", "miss_dropout", "peft_version"):
        del config[name]
    file.write_text(json.dumps(config | {"peft_type": "BONE"}))


def old_series(adapted: Model, family: Family, folder: Path) -> None:
    """OFT's rotations before PEFT 0.18, whose last term was twice what it is."""

    def rotations(module: Model, vectors: torch.Tensor, size: int, *_: object) -> torch.Tensor:
        skew = module._pytorch_skew_symmetric(vectors, size)
        powers = [torch.linalg.matrix_power(skew, power) for power in range(1, module.num_cayley_neumann_terms)]
        return torch.eye(size, dtype=skew.dtype) + 2 * torch.stack(powers).sum(0)

    for module in adapted.modules():
        if hasattr(module, "_cayley_batch"):
            module._cayley_batch = partial(rotations, module)
