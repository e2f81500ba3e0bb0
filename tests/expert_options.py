"""What PEFT can be told about stacked experts and other parameters, and other formats of their adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from expert_files import (
    apart,
    as_file,
    exchanged,
    few_experts,
    few_ranks,
    first_side,
    grouped,
    megatron,
    packed_as_peft,
    parted,
    share,
    tinker,
    torchtune,
    vllm,
)
from families import Family
from lora_options import Config, Option, lora

ROUTERS: Final = {"gpt-oss": "router.weight", "phimoe": "router.weight", "granite-moe": "router.weight"}
SHARED: Final = {
    "qwen2-moe": ["q_proj", "shared_expert.gate_proj", "shared_expert.up_proj", "shared_expert_gate"],
    "deepseek-v3": ["q_a_proj", "kv_b_proj"],  # PEFT takes names of its shared experts for those of all
    "llama4": ["q_proj", "shared_expert.up_proj"],
    "granite-moe-shared": ["q_proj", "input_linear", "output_linear"],
}
PARAMETERS: Final = {
    "llama": ["q_proj.weight", "down_proj.weight", "embed_tokens.weight"],
    "gpt2": ["c_attn.weight", "attn.c_proj.weight"],
    "bert": ["query.weight", "value.weight", "dense.weight"],
}
"""Of two dimensions, and of modules that could be targets themselves."""


def experts(**fields: Any) -> Callable[[Family], Config]:
    """A config for the family's stacked experts alone, unless `fields` say otherwise."""
    alone = {"target_modules": [], "target_parameters": lambda family: list(family.experts)}
    return lora(**(alone | fields))


def first(family: Family) -> list[str]:
    return [family.experts[0]]


def last(family: Family) -> list[str]:
    return [family.experts[-1]]


def and_router(family: Family) -> list[str]:
    return [*family.experts, ROUTERS.get(family.name, "mlp.gate.weight")]


def every(family: Family) -> list[str]:
    """A module's four: two of them hold one row for each expert."""
    return [*family.experts, "experts.gate_up_proj_bias", "experts.down_proj_bias"]


def three(family: Family) -> list[str]:
    return [*family.experts, "experts.gate_up_proj_bias"]


Fields = dict[str, object]
GRANITE: Final = ["input_linear.weight", "output_linear.weight"]
PARTS: Final = ["gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"]
APART: Final[Fields] = {"target_modules": PARTS, "target_parameters": None}
CHOSEN: Final[Fields] = {"target_modules": r".*\.experts\.[13]\.\w+", "target_parameters": None}
THIRD: Final = r".*\.experts\.3\..*"
SCALE: Final[Fields] = {"rank_pattern": {THIRD: 2}, "alpha_pattern": {THIRD: 3}}
"""The same strength at another rank."""

_LISTED: Final = (
    Option("experts", experts()),
    Option("experts-first", experts(target_parameters=first)),
    Option("experts-last", experts(target_parameters=last)),
    Option("experts-and-linear", experts(target_modules="all-linear")),
    Option("experts-and-attention", experts(target_modules=["q_proj", "o_proj"])),
    Option("experts-and-shared", experts(target_modules=lambda family: SHARED[family.name])),
    Option("experts-and-router", experts(target_parameters=and_router)),
    Option("experts-router-saved", experts(modules_to_save=["gate"])),
    Option("experts-every", experts(target_parameters=every)),
    Option("experts-three", experts(target_parameters=three)),
    Option("experts-named", experts(), place="style"),
    # Strengths
    Option("experts-rslora", experts(use_rslora=True)),
    Option(
        "experts-patterns",
        experts(
            rank_pattern={r"layers\.1\.mlp\.experts\.down_proj": 2, r".*\.gate_up_proj": 3},
            alpha_pattern={"experts.down_proj": 9, r"layers\.0\..*_proj": 5},
        ),
    ),
    Option("experts-rslora-patterns", experts(use_rslora=True, rank_pattern={r".*\.experts\.down_proj": 7})),
    Option("experts-rank-as-many", experts(r=5, lora_alpha=7)),
    Option("experts-rank-as-many-vllm", experts(r=5, lora_alpha=7), save=as_file(vllm)),
    # Whole modules, and layers that are repeated
    Option("experts-saved", lora(target_modules=["q_proj"], modules_to_save=["experts"])),
    Option("experts-layer-saved", lora(target_modules=["q_proj"], modules_to_save=["mlp"])),
    Option("experts-replicated", experts(layer_replication=[[0, 2], [0, 2]]), peft_merges=False),
    # Two dimensions
    Option("parameters", experts(target_parameters=lambda family: PARAMETERS[family.name])),
    Option("parameters-and-linear", experts(target_parameters=lambda f: PARAMETERS[f.name], target_modules=["v_proj"])),
    Option("parameters-table", experts(target_parameters=["embed_tokens.weight"]), ties=True),
    # Other versions of PEFT
    Option("experts-018", experts(), save=as_file(first_side, {"peft_version": "0.18.0"})),
    Option("experts-018-dev", experts(), save=as_file(first_side, {"peft_version": "0.18.2.dev0@1f3a"})),
    Option("experts-019", experts(), save=as_file(exchanged, {"peft_version": "0.19.0"})),
    Option("experts-unversioned", experts(), save=as_file(first_side, {"peft_version": None})),
    Option(
        "experts-first-018-dev",
        experts(target_parameters=first),
        save=as_file(first_side, {"peft_version": "0.18.2.dev0@1f3a"}),
    ),
    Option(
        "experts-first-unversioned", experts(target_parameters=first), save=as_file(first_side, {"peft_version": None})
    ),
    Option("experts-first-018", experts(target_parameters=first), save=as_file(first_side, {"peft_version": "0.18.0"})),
    Option(  # when these were modules of their own
        "experts-granite-018",
        experts(),
        save=as_file(first_side, {"peft_version": "0.18.0", "target_parameters": GRANITE}),
        spelling=lambda family: (
            (r"\.experts\.base_layer\.", ".input_linear."),
            (r"\.experts\.", ".output_linear."),
        ),
    ),
    # Packings
    Option("experts-grouped", experts(), save=as_file(grouped, {"lora_B_layout": "grouped_by_expert"})),
    Option("experts-fastest", experts(), save=as_file(packed_as_peft, {"lora_B_layout": "rank_major"})),
    Option("experts-megatron", experts(), save=as_file(megatron)),
    Option("experts-megatron-shared", experts(), end=share, save=as_file(megatron)),
    Option("experts-vllm", experts(), save=as_file(vllm)),
    Option("experts-first-vllm", experts(target_parameters=first), save=as_file(vllm)),
    Option("experts-tinker", experts(), save=as_file(tinker)),
    Option("experts-tinker-shared", experts(), end=share, save=as_file(tinker)),
    Option("experts-parted", experts(), save=as_file(parted)),
    Option("experts-torchtune", experts(), save=as_file(torchtune)),
    # Each expert by itself
    Option("experts-apart", experts(), save=as_file(apart, APART)),
    Option("experts-apart-rslora", experts(use_rslora=True), save=as_file(apart, APART)),
    Option("experts-apart-ranks", experts(), end=few_ranks, save=as_file(apart, APART | SCALE)),
    Option("experts-apart-some", experts(), end=few_experts, save=as_file(apart, CHOSEN)),
    Option(
        "experts-apart-router",
        experts(target_parameters=and_router),
        save=as_file(apart, APART | {"target_modules": [*PARTS, "gate"]}),
        spelling=lambda family: ((r"\.mlp\.", ".block_sparse_moe."),) if "mixtral" in family.name else (),
    ),
    Option("experts-apart-last", experts(target_parameters=last), save=as_file(apart, APART)),
)

EXPERT_OPTIONS: Final = {option.name: option for option in _LISTED}
