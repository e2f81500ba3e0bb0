"""Families with mixtures of experts: those that are stored as one tensor for all experts, and one by one.

Experts, hidden and intermediate sizes and ranks all differ, but where a name says that something is square.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import torch
from families import LM, SEES, Family, Tensors
from family_models import DECODER, END, IMAGE, START, Model, model, qwen_inputs, words

EXPERTS: Final = 5
MANY: Final = 11
INSIDE: Final = 12
"""The width inside of an expert."""
OTHER: Final = 28
"""That of experts which see every token."""

BOTH: Final = ("experts.gate_up_proj", "experts.down_proj")
HALF: Final = DECODER["hidden_size"] // 2
"""With this width inside, gate and up together are square."""

CHOOSING: Final[dict[str, Any]] = {"num_experts_per_tok": 2, "tie_word_embeddings": False}
NUMBERED: Final = {**DECODER, **CHOOSING, "num_experts": EXPERTS}
LOCAL: Final = {**DECODER, **CHOOSING, "num_local_experts": EXPERTS, "intermediate_size": INSIDE}
ROUTED: Final = {
    **DECODER,
    **CHOOSING,
    "n_routed_experts": EXPERTS,
    "moe_intermediate_size": INSIDE,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
"""The first layer has no experts."""

WITHOUT: Final = {**DECODER, "tie_word_embeddings": False, "intermediate_size": INSIDE}


# Models


def qwen3_moe(experts: int = EXPERTS, inside: int = INSIDE) -> Callable[[], Model]:
    chosen = min(experts, 2)
    options = NUMBERED | {"num_experts": experts, "num_experts_per_tok": chosen, "moe_intermediate_size": inside}
    return model("Qwen3Moe", **options)


def qwen2_moe() -> Model:
    return model("Qwen2Moe", moe_intermediate_size=INSIDE, shared_expert_intermediate_size=OTHER, **NUMBERED)()


def mixtral(inside: int = INSIDE) -> Callable[[], Model]:
    return model("Mixtral", **(LOCAL | {"intermediate_size": inside, "sliding_window": None}))


def deepseek() -> Model:
    options = {key: value for key, value in ROUTED.items() if key != "head_dim"} | {"num_key_value_heads": 4}
    options |= {"qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 7}
    return model("DeepseekV3", q_lora_rank=10, kv_lora_rank=9, **options)()


def gpt_oss(inside: int = INSIDE) -> Callable[[], Model]:
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    return model("GptOss", **(LOCAL | {"intermediate_size": inside, "sliding_window": 16, "rope_parameters": rope}))


def llama4(experts: int = EXPERTS, inside: int = INSIDE) -> Callable[[], Model]:
    named = {"num_local_experts": experts, "num_experts_per_tok": 1, "intermediate_size": inside}
    return model("Llama4Text", **(LOCAL | named), intermediate_size_mlp=40, interleave_moe_layer_step=1)


def nemotron() -> Model:
    layers = ["attention", "moe"]
    options = {key: value for key, value in ROUTED.items() if key not in {"num_hidden_layers", "first_k_dense_replace"}}
    return model("NemotronH", layers_block_type=layers, moe_shared_expert_intermediate_size=OTHER, **options)()


def jetmoe() -> Model:
    options = {key: value for key, value in LOCAL.items() if key not in {"num_attention_heads", "head_dim"}}
    return model("JetMoe", kv_channels=8, **options)()


def qwen3_vl_moe() -> Model:
    import transformers

    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    text = {key: value for key, value in NUMBERED.items() if key != "tie_word_embeddings"}
    config = transformers.Qwen3VLMoeConfig(
        text_config=text | {"moe_intermediate_size": INSIDE, "rope_parameters": rope},
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "patch_size": 4,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=IMAGE,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=False,
    )
    return transformers.Qwen3VLMoeForConditionalGeneration(config)


# Files


def fused(model: Model, saved: Tensors) -> Tensors:
    """As the model has them in memory: all experts in one tensor."""
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items()}


def turned(model: Model, saved: Tensors) -> Tensors:
    """Experts with inputs before outputs, as some were published."""
    return {
        name: tensor.mT.contiguous() if ".experts." in name and tensor.ndim == 3 else tensor
        for name, tensor in saved.items()
    }


def mixed(model: Model, saved: Tensors) -> Tensors:
    """The first layer's experts in one tensor, those of the others one by one."""
    first = {name: tensor for name, tensor in fused(model, saved).items() if ".0.mlp.experts." in name}
    return first | {name: tensor for name, tensor in saved.items() if ".0.mlp.experts." not in name}


_QWEN3: Final = Family("qwen3-moe", qwen3_moe(), words, LM, experts=BOTH)
_MIXTRAL: Final = Family("mixtral", mixtral(), words, LM, experts=BOTH)
_QWEN3_VL: Final = Family("qwen3-vl-moe", qwen3_vl_moe, qwen_inputs, SEES, experts=BOTH)
_GPT_OSS: Final = Family("gpt-oss", gpt_oss(), words, LM, experts=BOTH)

_LISTED: Final = (
    Family("qwen2-moe", qwen2_moe, words, LM, experts=BOTH),
    _QWEN3,
    _MIXTRAL,
    Family("deepseek-v3", deepseek, words, LM, experts=BOTH),
    Family("glm4-moe", model("Glm4Moe", **ROUTED), words, LM, experts=BOTH),
    Family("olmoe", model("Olmoe", **(NUMBERED | {"intermediate_size": INSIDE})), words, LM, experts=BOTH),
    Family("phimoe", model("Phimoe", **LOCAL), words, LM, experts=BOTH),
    _GPT_OSS,
    Family("llama4", llama4(), words, LM, experts=BOTH),
    Family("granite-moe", model("GraniteMoe", **LOCAL), words, LM, experts=BOTH),
    Family(
        "granite-moe-shared",
        model("GraniteMoeShared", shared_intermediate_size=OTHER, **LOCAL),
        words,
        LM,
        experts=BOTH,
    ),
    Family("nemotron-h", nemotron, words, LM, experts=("experts.up_proj", "experts.down_proj")),
    Family("jetmoe", jetmoe, words, LM, experts=("mlp.input_linear.weight", "mlp.output_linear.weight")),
    Family(
        "aria",
        model("AriaText", "TextForCausalLM", moe_num_experts=EXPERTS, moe_topk=2, moe_num_shared_experts=2, **WITHOUT),
        words,
        LM,
        experts=BOTH,
    ),
    _QWEN3_VL,
    # The same models in other files
    replace(_QWEN3, name="qwen3-moe-fused", stored=fused),
    replace(_QWEN3, name="qwen3-moe-mixed", stored=mixed),
    replace(_QWEN3, name="qwen3-moe-shards", max_shard_size="12KB"),
    replace(_QWEN3, name="qwen3-moe-bf16", dtype=torch.bfloat16, max_shard_size="12KB"),
    replace(_MIXTRAL, name="mixtral-fused", stored=fused),
    replace(_MIXTRAL, name="mixtral-shards", max_shard_size="12KB"),
    replace(_GPT_OSS, name="gpt-oss-shards", dtype=torch.bfloat16, max_shard_size="12KB"),
    replace(_QWEN3_VL, name="qwen3-vl-moe-published", stored=turned),
    # Squares, of which shapes say nothing, one expert, and so many that their numbers have two digits
    replace(_QWEN3, name="qwen3-moe-square", build=qwen3_moe(inside=HALF)),
    replace(_QWEN3, name="qwen3-moe-square-fused", build=qwen3_moe(inside=HALF), stored=fused),
    replace(_MIXTRAL, name="mixtral-square", build=mixtral(DECODER["hidden_size"])),
    replace(_GPT_OSS, name="gpt-oss-square", build=gpt_oss(HALF)),
    Family("llama4-square", llama4(inside=HALF), words, LM, experts=BOTH),
    replace(_QWEN3, name="qwen3-moe-many", build=qwen3_moe(experts=MANY), max_shard_size="30KB", count=MANY),
    replace(_QWEN3, name="qwen3-moe-single", build=qwen3_moe(experts=1), count=1),
    replace(_QWEN3, name="qwen3-moe-single-fused", build=qwen3_moe(experts=1), stored=fused, count=1),
    Family("llama4-single", llama4(experts=1), words, LM, experts=BOTH, count=1),
)

EXPERT_FAMILIES: Final = {family.name: replace(family, count=family.count or EXPERTS) for family in _LISTED}
