"""The training side: LoRA layers and injection into torch models, for anyone's training loop.

    from lora_cli.nn import inject

    injection = inject(model, rank=16, targets=["attention"])
    ...                                  # train injection.parameters()
    injection.save("adapter/")           # a PEFT folder, which `lora-cli merge` takes too

Arithmetic, choice of targets, names and files are those of the surgery on files.
"""

from lora_cli.nn.adapter_layer import LoRAAdapter
from lora_cli.nn.attention import LoRAMultiheadAttention
from lora_cli.nn.config import LoRAConfig
from lora_cli.nn.conv import LoRAConv
from lora_cli.nn.embedding import LoRAEmbedding
from lora_cli.nn.functional import (
    init_lora_adapter,
    lora_delta,
    lora_linear,
    merge_lora_weight,
    tree_lora_delta,
    unmerge_lora_weight,
)
from lora_cli.nn.grouped import GroupedLinear, LoRAGroupedLinear
from lora_cli.nn.injection import Injection, inject, load_adapter
from lora_cli.nn.layer import LoRALayer
from lora_cli.nn.linear import LoRAConv1D, LoRALinear
from lora_cli.nn.parameters import LoRAParameters
from lora_cli.nn.parametrization import LoRA, parametrize_lora, switched
from lora_cli.nn.saving import save_merged
from lora_cli.nn.wrap import wrap

__all__ = [
    "GroupedLinear",
    "Injection",
    "LoRA",
    "LoRAAdapter",
    "LoRAConfig",
    "LoRAConv",
    "LoRAConv1D",
    "LoRAEmbedding",
    "LoRAGroupedLinear",
    "LoRALayer",
    "LoRALinear",
    "LoRAMultiheadAttention",
    "LoRAParameters",
    "init_lora_adapter",
    "inject",
    "load_adapter",
    "lora_delta",
    "lora_linear",
    "merge_lora_weight",
    "parametrize_lora",
    "save_merged",
    "switched",
    "tree_lora_delta",
    "unmerge_lora_weight",
    "wrap",
]
