"""Which adapters of stacked experts each family is tried with."""

from __future__ import annotations

from typing import Final

from lora_cli.errors import LoraCliError, UnsupportedError

VERSIONS: Final = "experts-018 experts-018-dev experts-019 experts-first-018"
PACKINGS: Final = """
    experts-grouped experts-fastest experts-megatron experts-megatron-shared experts-vllm experts-first-vllm
    experts-tinker experts-tinker-shared experts-torchtune"""
APART: Final = "experts-apart experts-apart-rslora experts-apart-ranks experts-apart-some experts-apart-last"
NESTED: Final = "experts experts-first experts-last"

EXPERT_CASES: Final = {
    "qwen2-moe": "experts experts-first experts-and-shared experts-and-linear",
    "qwen3-moe": f"""
        {NESTED} experts-and-attention experts-and-linear experts-and-router experts-router-saved experts-named
        experts-rslora experts-patterns experts-rslora-patterns experts-rank-as-many experts-rank-as-many-vllm
        experts-saved experts-layer-saved experts-replicated experts-unversioned {VERSIONS} {PACKINGS} {APART}
        experts-apart-router""",
    "qwen3-moe-fused": f"""
        {NESTED} experts-patterns experts-018 experts-router-saved experts-saved experts-grouped {APART}""",
    "qwen3-moe-mixed": "experts experts-apart experts-parted",
    "qwen3-moe-shards": "experts experts-rslora experts-018 experts-apart-some experts-tinker",
    "qwen3-moe-bf16": "experts experts-apart",
    "mixtral": f"""
        {NESTED} experts-and-router experts-and-linear experts-saved experts-018 experts-tinker {APART}
        experts-apart-router""",
    "mixtral-fused": "experts experts-last experts-apart experts-apart-some",
    "mixtral-shards": "experts-and-router experts-apart",
    "deepseek-v3": "experts experts-and-shared experts-and-linear experts-apart",
    "glm4-moe": "experts-and-linear experts-apart-some",
    "olmoe": "experts experts-last",
    "phimoe": "experts experts-and-router",
    "gpt-oss": f"""
        {NESTED} experts-and-attention experts-and-router experts-every experts-three experts-saved
        experts-unversioned {VERSIONS} experts-grouped experts-megatron experts-megatron-shared experts-vllm
        experts-tinker experts-tinker-shared""",
    "gpt-oss-shards": "experts experts-every",
    "llama4": f"{NESTED} experts-and-shared experts-unversioned {VERSIONS} experts-grouped experts-megatron",
    "granite-moe": "experts experts-first experts-018 experts-granite-018",
    "granite-moe-shared": "experts-and-shared",
    "nemotron-h": f"{NESTED} experts-018",
    "aria": "experts experts-first experts-018",
    "jetmoe": "experts experts-first",
    "qwen3-vl-moe": "experts experts-first experts-018",
    "qwen3-vl-moe-published": "experts experts-first experts-018",
    "qwen3-moe-square": f"{NESTED} experts-018 experts-019 experts-unversioned experts-grouped experts-apart",
    "qwen3-moe-square-fused": f"{NESTED} {VERSIONS} experts-grouped experts-megatron experts-vllm experts-apart",
    "mixtral-square": "experts experts-018 experts-apart",
    # Of these, all versions but one meet the same side; between 0.18.0 and 0.19.0 both kinds were made.
    "gpt-oss-square": f"{NESTED} experts-018 experts-019 experts-unversioned experts-grouped",
    "llama4-square": f"{NESTED} {VERSIONS}",
    "qwen3-moe-many": "experts experts-tinker experts-apart",
    "qwen3-moe-single": "experts experts-first",
    "qwen3-moe-single-fused": "experts experts-last",
    "llama4-single": "experts",
    "llama-tied": "parameters-table",
    "llama": "parameters parameters-and-linear",
    "gpt2": "parameters",
    "bert": "parameters",
}

UNDECIDED: Final = (UnsupportedError, "expert-layout")
EXPERT_REFUSED: Final[dict[str, dict[str, tuple[type[LoraCliError], str]]]] = {
    "qwen3-moe-square": {"experts-first-unversioned": UNDECIDED},
    "llama4-square": {"experts-first-unversioned": UNDECIDED},
    "gpt-oss-square": {"experts-first-018-dev": UNDECIDED},
}
