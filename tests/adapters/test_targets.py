"""Which modules get an adapter: presets, patterns, files of patterns, and what is refused."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_cli.adapters import targets
from lora_cli.adapters.peft_writer import adapter_config, is_bare, target_names, task_type
from lora_cli.adapters.adapter import Scale
from lora_cli.adapters.target_files import expand
from lora_cli.adapters.targets import presets, select
from lora_cli.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lora_cli.errors import (
    LoraCliError,
    MalformedFileError,
    NamesError,
    ShapeError,
    UnsafeInputError,
    UnsupportedError,
    UsageError,
)
from lora_cli.surgery.placing import MERGEABLE

Shapes = Mapping[str, tuple[int, ...]]

LLAMA: Shapes = {
    "model.embed_tokens.weight": (20, 8),
    **{
        f"model.layers.{layer}.{name}.weight": shape
        for layer in range(2)
        for name, shape in {
            "self_attn.q_proj": (8, 8),
            "self_attn.k_proj": (4, 8),
            "self_attn.v_proj": (4, 8),
            "self_attn.o_proj": (8, 8),
            "mlp.gate_proj": (12, 8),
            "mlp.up_proj": (12, 8),
            "mlp.down_proj": (8, 12),
            "input_layernorm": (8,),
        }.items()
    },
    "model.norm.weight": (8,),
    "lm_head.weight": (20, 8),
}
GPT2: Shapes = {
    "wte.weight": (20, 8),
    "wpe.weight": (6, 8),
    "h.0.ln_1.weight": (8,),
    "h.0.attn.bias": (1, 1, 6, 6),
    "h.0.attn.c_attn.weight": (8, 24),
    "h.0.attn.c_attn.bias": (24,),
    "h.0.attn.c_proj.weight": (8, 8),
    "h.0.attn.c_proj.bias": (8,),
    "h.0.mlp.c_fc.weight": (8, 32),
    "h.0.mlp.c_fc.bias": (32,),
    "h.0.mlp.c_proj.weight": (32, 8),
    "h.0.mlp.c_proj.bias": (8,),
}
BERT: Shapes = {
    "embeddings.word_embeddings.weight": (20, 8),
    "embeddings.position_embeddings.weight": (6, 8),
    "embeddings.token_type_embeddings.weight": (2, 8),
    "encoder.layer.0.attention.self.query.weight": (8, 8),
    "encoder.layer.0.attention.self.key.weight": (8, 8),
    "encoder.layer.0.attention.self.value.weight": (8, 8),
    "encoder.layer.0.attention.output.dense.weight": (8, 8),
    "encoder.layer.0.intermediate.dense.weight": (12, 8),
    "encoder.layer.0.output.dense.weight": (8, 12),
    "pooler.dense.weight": (8, 8),
    "classifier.weight": (3, 8),
}
T5: Shapes = {
    "shared.weight": (20, 8),
    "decoder.block.0.layer.0.SelfAttention.q.weight": (8, 8),
    "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 2),
    "decoder.block.0.layer.1.EncDecAttention.o.weight": (8, 8),
    "decoder.block.0.layer.2.DenseReluDense.wi_0.weight": (12, 8),
    "decoder.block.0.layer.2.DenseReluDense.wo.weight": (8, 12),
}
NEOX: Shapes = {
    "gpt_neox.embed_in.weight": (20, 8),
    "gpt_neox.layers.0.attention.query_key_value.weight": (24, 8),
    "gpt_neox.layers.0.attention.dense.weight": (8, 8),
    "gpt_neox.layers.0.mlp.dense_h_to_4h.weight": (32, 8),
    "gpt_neox.layers.0.mlp.dense_4h_to_h.weight": (8, 32),
    "embed_out.weight": (20, 8),
}
VIT: Shapes = {
    "vit.embeddings.patch_embeddings.projection.weight": (8, 3, 2, 2),
    "vit.encoder.layer.0.attention.attention.query.weight": (8, 8),
    "vit.encoder.layer.0.attention.output.dense.weight": (8, 8),
    "vit.encoder.layer.0.intermediate.dense.weight": (12, 8),
    "vit.encoder.layer.0.output.dense.weight": (8, 12),
    "classifier.weight": (3, 8),
}
MOE: Shapes = {
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.0.mlp.gate.weight": (3, 8),
    **{
        f"model.layers.0.mlp.experts.{expert}.{name}.weight": (6, 8)
        for expert in range(3)
        for name in ("gate_proj", "up_proj")
    },
    "model.layers.0.mlp.shared_expert.gate_proj.weight": (6, 8),
    "model.layers.0.mlp.shared_expert_gate.weight": (1, 8),
    "model.layers.1.mlp.gate.weight": (8, 8),  # no experts beside it: a gate of another kind
}


def checkpoint(
    folder: Path, shapes: Shapes, *, dtypes: Mapping[str, Any] | None = None, **config: Any
) -> Checkpoint:
    dtypes = dtypes or {}
    tensors = {key: np.zeros(shape, dtypes.get(key, np.float32)) for key, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return open_checkpoint(folder, label="base")


def names(base: Checkpoint, wanted: Sequence[str], exclude: Sequence[str] = ()) -> list[str]:
    return [module.module for module in select(base, wanted, exclude).modules]


def linear(shapes: Shapes, *without: str) -> list[str]:
    """Modules with a matrix, in the order in which the file has them (that of their names)."""
    modules = sorted(key.removesuffix(".weight") for key, shape in shapes.items() if len(shape) == 2)
    return [module for module in modules if module.split(".")[-1] not in without]


# Presets


@pytest.mark.parametrize(
    ("shapes", "without"),
    [
        pytest.param(LLAMA, ("embed_tokens", "lm_head"), id="llama"),
        pytest.param(GPT2, ("wte", "wpe"), id="gpt2"),
        pytest.param(
            BERT, ("word_embeddings", "position_embeddings", "token_type_embeddings", "classifier"), id="bert"
        ),
        pytest.param(T5, ("shared", "relative_attention_bias"), id="t5"),
        pytest.param(NEOX, ("embed_in", "embed_out"), id="neox"),
        pytest.param(VIT, ("classifier",), id="vit"),
    ],
)
def test_all_linear_is_every_matrix_but_embeddings_and_the_head(
    tmp_path: Path, shapes: Shapes, without: Sequence[str]
) -> None:
    base = checkpoint(tmp_path, shapes)
    everything = names(base, ["all-linear"])
    assert everything == linear(shapes, *without)
    parts = [set(names(base, [preset])) for preset in ("attention", "mlp")]
    assert parts[0]
    assert parts[1]
    assert not parts[0] & parts[1]
    assert set(everything) - parts[0] - parts[1] == {name for name in everything if name.startswith("pooler")}
    assert names(base, ["attention", "mlp"]) == [name for name in everything if not name.startswith("pooler")]


def test_presets_leave_experts_and_what_chooses_between_them(tmp_path: Path) -> None:
    base = checkpoint(tmp_path, MOE)
    selection = select(base, ["all-linear"])
    assert [module.module for module in selection.modules] == [
        "model.layers.0.mlp.shared_expert.gate_proj",
        "model.layers.0.mlp.shared_expert_gate",
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.mlp.gate",
    ]
    assert [note.split(",")[0] for note in selection.notes] == ["left out: 6 of kind expert", "left out: 1 of kind router"]
    assert names(base, ["mlp"]) == ["model.layers.0.mlp.shared_expert.gate_proj"]
    assert len(names(base, ["experts.*.up_proj"])) == 3
    assert names(base, ["re:.*layers\\.0\\.mlp\\.gate"]) == ["model.layers.0.mlp.gate"]


def test_a_preset_for_another_architecture_says_what_it_passed_over(tmp_path: Path) -> None:
    only = {key: shape for key, shape in MOE.items() if "shared" not in key}
    with pytest.raises(NamesError) as caught:
        select(checkpoint(tmp_path, only), ["mlp"])
    assert caught.value.details == ("mlp (no preset takes what matches: 6 of kind expert)",)


def test_the_presets() -> None:
    assert presets() == ("all-linear", "attention", "mlp")


# Patterns


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["q_proj"], ["0.self_attn.q_proj", "1.self_attn.q_proj"]),
        (["layers.0.*.q_proj"], ["0.self_attn.q_proj"]),
        (["model.layers.1.mlp.*_proj"], ["1.mlp.down_proj", "1.mlp.gate_proj", "1.mlp.up_proj"]),
        (["layers.1.**"], [f"1.{n}" for n in ("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj")] + _ATTENTION)
        if (_ATTENTION := [f"1.self_attn.{n}_proj" for n in "koqv"])
        else (),
        ([r"re:model\.layers\.\d\.self_attn\.[qv]_proj"], ["0.self_attn.q_proj", "0.self_attn.v_proj"]
         + ["1.self_attn.q_proj", "1.self_attn.v_proj"]),
        (["v_proj", "layers.0.**.q_proj"], ["0.self_attn.q_proj", "0.self_attn.v_proj", "1.self_attn.v_proj"]),
        (["model.layers.0.self_attn.q_proj.weight"], ["0.self_attn.q_proj"]),
    ],
)
def test_patterns(tmp_path: Path, patterns: Sequence[str], expected: Sequence[str]) -> None:
    base = checkpoint(tmp_path, LLAMA)
    assert names(base, patterns) == [f"model.layers.{name}" for name in expected]
    assert names(base, [*reversed(patterns), *patterns]) == [f"model.layers.{name}" for name in expected]
