"""A merge of every formula that an undo computes again, each on modules of its own, and stacks of experts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from round_trips import gaussian, write_base
from safetensors.torch import save_file
from special_worlds import World

Tensors = dict[str, torch.Tensor]
OUT: Final = 12
IN: Final = 8


def some(seed: int, **shapes: tuple[int, ...]) -> Tensors:
    """Numbers of these shapes."""
    return {name: gaussian(seed + at, *shape, std=0.3) for at, (name, shape) in enumerate(shapes.items())}


def _frequent(part: str, count: int, seed: int) -> Tensors:
    return some(seed, **{part: (count,)})


_VB: Final = {"vblora_logits_A": (2, 2, 9), "vblora_logits_B": (3, 2, 9)}
_VB_TOP: Final = {"vblora_logits_A_topk_weights": (2, 2, 2), "vblora_logits_B_topk_weights": (3, 2, 2)}
_VB_PLACES: Final = {
    "vblora_logits_A_topk_indices": torch.tensor([[[0, 8, 3], [2, 1, 7]], [[4, 5, 6], [8, 0, 1]]]),
    "vblora_logits_B_topk_indices": torch.tensor([[[1, 2, 3], [0, 4, 8]]] * 3).to(torch.uint8),
}
_UNI_A: Final = torch.arange(3 * IN).view(3, IN) % 7
_UNI_B: Final = (torch.arange(OUT * 3).view(OUT, 3) * 5 % 7).to(torch.int32)
_BOTH: Final = {"inner": (OUT, IN), "outer": (IN, OUT)}

# Name → PEFT's type and config, the tensors of each module, those of the model.
Kind = tuple[dict[str, Any], dict[str, Tensors], Tensors]

KINDS: Final[Mapping[str, Kind]] = {
    "adalora": (
        {"peft_type": "ADALORA", "init_r": 4, "lora_alpha": 7},
        {"": some(10, lora_A=(2, IN), lora_B=(OUT, 2), lora_E=(2, 1))},
        {},
    ),
    "beft": ({"peft_type": "BEFT"}, {"": some(20, beft_bias=(1, OUT))}, {}),
    "c3a": ({"peft_type": "C3A"}, {"": some(30, c3a_kernel=(3, 2, 4))}, {}),
    "delora": (
        {"peft_type": "DELORA"},
        {"": some(40, delora_A=(2, IN), delora_B=(OUT, 2), delora_lambda=(1,), delora_w_norm=(IN,))},
        {},
    ),
    "fourierft": (
        {"peft_type": "FOURIERFT", "scaling": 30.0, "random_loc_seed": 7},
        {"": _frequent("fourierft_spectrum", 11, 50)},
        {},
    ),
    "gralora": (
        {"peft_type": "GRALORA", "alpha": 7},
        {
            "": some(60, gralora_A=(2, 4, 4), gralora_B=(2, 4, 6)),
            ".hybrid": some(
                65, gralora_A=(2, 4, 2), gralora_B=(2, 2, 6), gralora_A_general=(3, IN), gralora_B_general=(OUT, 3)
            ),
        },
        {},
    ),
    "hira": ({"peft_type": "HIRA"}, {"": some(70, hira_A=(2, IN), hira_B=(OUT, 2))}, {}),
    "ia3": (
        {"peft_type": "IA3", "feedforward_modules": ["inputs"]},
        {"": some(80, ia3_l=(OUT, 1)), ".inputs": some(85, ia3_l=(1, IN))},
        {},
    ),
    "loha": (
        {"peft_type": "LOHA", "r": 2, "alpha": 6},
        {
            "": some(90, hada_w1_a=(OUT, 2), hada_w1_b=(2, IN), hada_w2_a=(OUT, 2), hada_w2_b=(2, IN)),
            ".kernel": some(
                95,
                hada_w1_a=(2, 6), hada_w1_b=(2, 4), hada_w2_a=(2, 6), hada_w2_b=(2, 4),
                hada_t1=(2, 2, 3, 2), hada_t2=(2, 2, 3, 2),
            ),
        },
        {},
    ),
    "lokr": (
        {"peft_type": "LOKR", "r": 2, "alpha": 3},
        {
            "": some(110, lokr_w1=(3, 2), lokr_w2_a=(4, 2), lokr_w2_b=(2, 4)),
            ".kernel": some(115, lokr_w1_a=(2, 2), lokr_w1_b=(2, 2), lokr_t2=(2, 2, 3, 2), lokr_w2_a=(2, 3),
                            lokr_w2_b=(2, 2)),
            ".row": some(120, lokr_w1=(3, 2), lokr_w2=(2, 2, 3)),
        },
        {},
    ),
    "miss": ({"peft_type": "MISS"}, {"": some(130, miss_block=(3, OUT))}, {}),
    "miss-mini": ({"peft_type": "MISS", "init_weights": "mini"}, {"": some(135, miss_block=(4, 6))}, {}),
    "pvera": (
        {"peft_type": "PVERA", "r": 3},
        {"": some(140, pvera_lambda_b=(OUT,), pvera_lambda_d=(6,))},
        some(145, pvera_A=(6, IN + 1), pvera_B=(OUT + 1, 3)),
    ),
    "pvera-drawn": (
        {"peft_type": "PVERA", "r": 3, "projection_prng_key": 5, "save_projection": False},
        {"": some(150, pvera_lambda_b=(OUT,), pvera_lambda_d=(6,))},
        {},
    ),
    "randlora": (
        {"peft_type": "RANDLORA", "r": 3, "randlora_alpha": 7},
        {
            "": some(160, randlora_lambda=(3, 3), randlora_gamma=(3, IN)),
            ".wide": some(165, randlora_lambda=(3, 3), randlora_gamma=(3, IN)),
        },
        some(168, randlora_A=(3, 1, IN + 1), randlora_B=(OUT + 1, 4, 3)),
    ),
    "shira": (
        {"peft_type": "SHIRA"},
        {"": some(170, shira_weight=(4,)) | {"shira_indices": torch.tensor([[0, 11, 5, 5], [7, 0, 3, 4]])}},
        {},
    ),
    "supertuning": (
        {"peft_type": "SUPERTUNING", "r": 2, "lora_alpha": 3},
        {
            "": some(180, supertuning_values=(3,), supertuning_lora_A=(2, IN), supertuning_lora_B=(OUT, 2))
            | {"supertuning_indices": torch.tensor([0, 50, 17])}
        },
        {},
    ),
    "tinylora": (
        {"peft_type": "TINYLORA", "weight_tying": 1.0},
        {"": some(190, tinylora_A=(2, IN), tinylora_B=(OUT, 2), tinylora_P=(5, 2, 2))},
        some(195, **{"tinylora_v.group_0": (5,)}),
    ),
    "unilora": (
        {"peft_type": "UNILORA", "save_indices": True},
        {
            "": some(200, unilora_scales_A=(3, IN), unilora_scales_B=(OUT, 3))
            | {"unilora_indices_A": _UNI_A, "unilora_indices_B": _UNI_B}
        },
        some(205, unilora_theta_d=(7,)),
    ),
    "vblora": ({"peft_type": "VBLORA", "topk": 3}, {"": some(210, **_VB)}, some(215, vblora_vector_bank=(9, 4))),
    "vblora-top": (
        {"peft_type": "VBLORA", "topk": 3, "save_only_topk_weights": True},
        {"": some(220, **_VB_TOP) | _VB_PLACES},
        some(225, vblora_vector_bank=(9, 4)),
    ),
    "vera": (
        {"peft_type": "VERA", "r": 3},
        {"": some(230, vera_lambda_b=(OUT,), vera_lambda_d=(3,))},
        some(235, vera_A=(3, IN + 1), vera_B=(OUT + 1, 3)),
    ),
    "vera-drawn": (
        {"peft_type": "VERA", "r": 3, "projection_prng_key": 11, "save_projection": False},
        {"": some(240, vera_lambda_b=(OUT,), vera_lambda_d=(3,))},
        {},
    ),
    "waveft": (
        {"peft_type": "WAVEFT", "scaling": 3.0, "random_loc_seed": 7, "wavelet_family": "db2"},
        {"": _frequent("waveft_spectrum", 11, 250)},
        {},
    ),
    "waveft-plain": (
        {"peft_type": "WAVEFT", "scaling": 3.0, "random_loc_seed": 8, "use_idwt": False},
        {"": _frequent("waveft_spectrum", 11, 255)},
        {},
    ),
}  # fmt: skip

_SHAPES: Final = {
    "loha.kernel": (6, 4, 3, 2), "lokr.kernel": (6, 4, 3, 2), "lokr.row": (6, 4, 3), "randlora.wide": (IN, OUT),
}  # fmt: skip
"""Of weights that are no (12, 8)."""
BIASED: Final = ("beft", "ia3")


def formulas(
    folder: Path, dtype: torch.dtype, shards: int = 1, kinds: tuple[str, ...] = tuple(KINDS), std: float = 1.0
) -> World:
    """Each kind on its modules; over `loha` lies a second adapter's product, and over `shira` three further sums."""
    base: Tensors = {}
    for at, name in enumerate(kind + end for kind in kinds for end in KINDS[kind][1]):
        base[f"{name}.weight"] = gaussian(1000 + at, *_SHAPES.get(name, (OUT, IN)), std=std, dtype=dtype)
        if name in BIASED:
            base[f"{name}.bias"] = gaussian(2000 + at, OUT, std=std, dtype=dtype)
    adapters = [write_kind(folder / name, name) for name in kinds]
    if "loha" in kinds:
        factors = some(300, **{"loha.lora_A.weight": (2, IN), "loha.lora_B.weight": (OUT, 2)})
        adapters.append(write_peft(folder / "over", {"peft_type": "LORA", "r": 2, "lora_alpha": 3}, factors, {}))
    if "shira" in kinds:
        blocks = {f"shira.{name}": tensor for name, tensor in KINDS["c3a"][1][""].items()}
        adapters.append(write_peft(folder / "further", KINDS["c3a"][0], blocks, {}))
        blocks = {f"shira.{name}": tensor for name, tensor in KINDS["miss"][1][""].items()}
        adapters.append(write_peft(folder / "last", KINDS["miss"][0], blocks, {}))
        blocks = {f"shira.{name}": tensor for name, tensor in KINDS["lokr"][1][""].items()}
        adapters.append(write_peft(folder / "very-last", KINDS["lokr"][0], blocks, {}))
    return World(write_base(folder / "base", base, shards), adapters)


def write_kind(folder: Path, name: str) -> Path:
    """The adapter of a kind."""
    config, modules, shared = KINDS[name]
    tensors = {f"{name}{end}.{part}": tensor for end, parts in modules.items() for part, tensor in parts.items()}
    return write_peft(folder, config, tensors, shared)


def write_peft(folder: Path, config: Mapping[str, Any], tensors: Tensors, shared: Tensors) -> Path:
    """A PEFT folder with tensors of modules and of the model."""
    folder.mkdir(parents=True)
    named = {f"base_model.model.{key}": tensor for key, tensor in tensors.items()}
    named |= {f"base_model.{key}": tensor for key, tensor in shared.items()}
    save_file(named, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(dict(config)))
    return folder


# Experts

EXPERTS: Final = 3
INSIDE: Final = 6
RANK: Final = 2
_WAYS: Final = ("packed", "packed-by-expert", "stacked", "stacked-last", "stacked-turned", "rows", "once", "apart")
"""How the factors of each layer lie."""


def experts(folder: Path, dtype: torch.dtype, shards: int = 1, stored: str = "apart") -> World:
    """A layer of experts for each way in which adapters have their factors.

    Args:
        folder: Where.
        dtype: Of the base.
        shards: Of the base.
        stored: How the base has them: `apart`, as `fused` tensors, or so with outputs of gate and up `in turn`.
    """
    base: Tensors = {}
    for layer in range(len(_WAYS)):
        name, seed = f"model.layers.{layer}.mlp.experts", 500 + 10 * layer
        if stored == "apart":
            shapes = {"gate_proj": (INSIDE, IN), "up_proj": (INSIDE, IN), "down_proj": (IN, INSIDE)}
            for expert in range(EXPERTS):
                base |= some(seed + expert, **{f"{name}.{expert}.{part}.weight": of for part, of in shapes.items()})
        elif stored == "fused":
            base |= some(seed, **{f"{name}.gate_up_proj": (EXPERTS, 2 * INSIDE, IN)})
            base |= some(seed + 1, **{f"{name}.down_proj": (EXPERTS, IN, INSIDE)})
        else:
            base |= some(seed, **{f"{name}.gate_up_proj": (EXPERTS, IN, 2 * INSIDE)})
            base |= some(seed + 1, **{f"{name}.down_proj": (EXPERTS, INSIDE, IN)})
    words = ("GptOssForCausalLM", "gpt_oss") if stored == "in turn" else ("Qwen3MoeForCausalLM", "qwen3_moe")
    config = {"architectures": [words[0]], "model_type": words[1], "num_experts": EXPERTS, "hidden_size": IN}
    config |= {"moe_intermediate_size": INSIDE, "intermediate_size": INSIDE, "num_local_experts": EXPERTS}
    tensors = {key: tensor.to(dtype) for key, tensor in base.items()}
    made = write_base(folder / "base", tensors, shards, **config)
    adapters = [_experts(folder / way, way, layer) for layer, way in enumerate(_WAYS)]
    return World(made, adapters)


def _experts(folder: Path, way: str, layer: int) -> Path:
    """An adapter for the experts of one layer."""
    a = gaussian(700 + layer, EXPERTS, RANK, IN, std=0.3)
    b = gaussian(750 + layer, EXPERTS, 2 * INSIDE, RANK, std=0.3)
    name = f"model.layers.{layer}.mlp.experts"
    said = {"peft_type": "LORA", "r": RANK, "lora_alpha": 3, "peft_version": "0.21.2"}
    parameter = {"target_parameters": [f"layers.{layer}.mlp.experts.gate_up_proj"]}
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    if way == "packed":
        said |= parameter
        pairs[name] = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
    elif way == "packed-by-expert":
        said |= parameter | {"lora_B_layout": "grouped_by_expert"}
        pairs[name] = a.flatten(0, 1), b.permute(1, 0, 2).flatten(1)
    elif way == "rows":
        said |= parameter | {"peft_version": "0.18.0"}
        pairs[name] = b.mT.flatten(0, 1), a.mT.permute(1, 2, 0).flatten(1)
    elif way == "stacked":
        pairs[f"{name}.w1"] = a, b[:, :INSIDE]
        pairs[f"{name}.w3"] = a, b[:, INSIDE:]
    elif way == "once":
        pairs[f"{name}.w1"] = a[:1], b[:, :INSIDE]
        pairs[f"{name}.w2"] = b[:, :INSIDE].mT, a[:1].mT
    elif way == "stacked-last":
        said |= parameter
        pairs[name] = a, b.permute(1, 2, 0)
    elif way == "apart":
        for expert in range(EXPERTS):
            pairs[f"{name}.{expert}.up_proj"] = a[expert], b[expert, INSIDE:]
    tensors = {f"{key}.lora_A.weight": of_a for key, (of_a, _) in pairs.items()}
    tensors |= {f"{key}.lora_B.weight": of_b for key, (_, of_b) in pairs.items()}
    if way == "stacked-turned":
        tensors = {f"{name}.lora_gate_a": a.mT, f"{name}.lora_gate_b": b[:, :INSIDE].mT}
    copies = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
    return write_peft(folder, said, copies, {})
