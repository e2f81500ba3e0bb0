"""Which modules get an adapter: presets, patterns, files of patterns, and what is refused."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_cli.adapters import modules, targets
from lora_cli.adapters.adapter import Scale
from lora_cli.adapters.peft_writer import adapter_config, is_bare, target_names, task_type
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
from lora_cli.surgery.edit import MERGEABLE

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
LAYER = sorted(key.removesuffix(".weight") for key, shape in LLAMA.items() if "layers.0" in key and len(shape) == 2)
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
    "model.layers.0.mlp.experts.0.norm.weight": (8,),  # no matrix, so nobody misses it
    "model.layers.0.mlp.shared_expert.gate_proj.weight": (6, 8),
    "model.layers.0.mlp.shared_expert_gate.weight": (1, 8),
    "model.layers.1.mlp.gate.weight": (8, 8),  # no experts beside it: a gate of another kind
}


def checkpoint(folder: Path, shapes: Shapes, *, dtypes: Mapping[str, Any] | None = None, **config: Any) -> Checkpoint:
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
    experts = "model.layers.0.mlp.experts"
    assert [note.split(", which")[0] for note in selection.notes] == [
        f"left out: 6 of kind expert ({experts}.0.gate_proj, {experts}.0.up_proj, {experts}.1.gate_proj, …)",
        "left out: 1 of kind router (model.layers.0.mlp.gate)",
    ]
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
        (["v_proj"], ["0.self_attn.v_proj", "1.self_attn.v_proj"]),
        (["layers.0.*.q_proj"], ["0.self_attn.q_proj"]),
        (["model.layers.1.mlp.*_proj"], ["1.mlp.down_proj", "1.mlp.gate_proj", "1.mlp.up_proj"]),
        (["layers.1.**.?_proj"], [f"1.self_attn.{name}_proj" for name in "koqv"]),
        ([r"re:model\.layers\.1\.self_attn\.[qv]_proj"], ["1.self_attn.q_proj", "1.self_attn.v_proj"]),
        (["v_proj", "layers.0.**.q_proj"], ["0.self_attn.q_proj", "0.self_attn.v_proj", "1.self_attn.v_proj"]),
        (["model.layers.0.self_attn.q_proj.weight"], ["0.self_attn.q_proj"]),
        (["layers.0.**", "mlp.up_proj"], [*(n.removeprefix("model.layers.") for n in LAYER), "1.mlp.up_proj"]),
    ],
)
def test_patterns(tmp_path: Path, patterns: Sequence[str], expected: Sequence[str]) -> None:
    base = checkpoint(tmp_path, LLAMA)
    assert names(base, patterns) == [f"model.layers.{name}" for name in expected]
    # Neither order nor repetition matters.
    assert names(base, [*reversed(patterns), *patterns]) == [f"model.layers.{name}" for name in expected]


def test_exclusions(tmp_path: Path) -> None:
    base = checkpoint(tmp_path, LLAMA)
    assert names(base, ["attention"], ["layers.1.**", "q_proj"]) == [
        f"model.layers.0.self_attn.{name}_proj" for name in "kov"
    ]
    assert names(base, ["all-linear"], ["mlp"]) == names(base, ["attention"])
    with pytest.raises(NamesError, match="The exclusions leave no module"):
        select(base, ["mlp"], ["mlp.*"])
    with pytest.raises(NamesError) as caught:
        select(base, ["mlp"], ["mlp.gate"])
    assert caught.value.details[0].startswith("mlp.gate (nearest: model.layers.")


def test_a_pattern_may_take_the_head_that_presets_leave(tmp_path: Path) -> None:
    base = checkpoint(tmp_path, LLAMA)
    assert names(base, ["lm_head"]) == ["lm_head"]
    notes = select(base, ["all-linear"]).notes
    assert notes == ("left out: 1 of kind head (lm_head), which no preset takes; a pattern can name it",)
    assert select(base, ["all-linear", "lm_head"]).notes == ()


def test_what_matches_too_much_is_noted(tmp_path: Path) -> None:
    """`**` means what it can mean; what it passes over is said."""
    selection = select(checkpoint(tmp_path, LLAMA), ["**"])
    assert len(selection.modules) == 16
    assert selection.notes == ("left out: 3 that a pattern matches: shape [8]; an adapter needs a matrix",)


# Refusals


def test_a_pattern_that_matches_nothing_names_what_is_near(tmp_path: Path) -> None:
    base = checkpoint(tmp_path, LLAMA)
    with pytest.raises(NamesError, match="2 target patterns match no module") as caught:
        select(base, ["q_proj", "self_attn.query_proj", "re:nothing"])
    assert caught.value.exit_code == 20
    assert caught.value.details[0].startswith("self_attn.query_proj (nearest: model.layers.")
    assert "self_attn.q_proj" in caught.value.details[0]
    assert caught.value.details[1].startswith("re:nothing")


def test_a_misspelt_target_is_told_what_there_is(tmp_path: Path) -> None:
    base = checkpoint(tmp_path, LLAMA)
    with pytest.raises(NamesError) as caught:
        select(base, ["q_porj", "mpl", "nosuch"])
    assert caught.value.details == (
        "q_porj (nearest: q_proj, v_proj)",
        "mpl (nearest: mlp)",
        "nosuch",
    )
    assert caught.value.expected == (
        "names that end in lm_head, embed_tokens, down_proj, gate_proj, up_proj, k_proj, o_proj, q_proj, v_proj"
    )
    (tmp_path / "many").mkdir()
    many = checkpoint(tmp_path / "many", {f"blocks.m{number}.weight": (4, 4) for number in range(20)})
    with pytest.raises(NamesError, match=r"^1 target pattern matches no module ") as caught:
        select(many, ["nosuch"])
    assert str(caught.value.expected).endswith("m0, m1, m10, m11, m12, m13, m14, m15, m16, m17, m18, m19 and 8 more")


def test_targets_in_one_word_are_to_be_several(tmp_path: Path) -> None:
    with pytest.raises(NamesError) as caught:
        select(checkpoint(tmp_path, LLAMA), ["lm_head,embed_tokens"])
    assert str(caught.value.hint).startswith("one pattern each: repeat --target")


def test_an_exclusion_that_matches_nothing_is_called_one(tmp_path: Path) -> None:
    base = checkpoint(tmp_path, LLAMA)
    with pytest.raises(NamesError, match=r"^1 exclusion matches no module "):
        select(base, ["mlp"], ["nosuch"])
    with pytest.raises(NamesError, match=r"^2 exclusions match no module "):
        select(base, ["mlp"], ["nosuch", "nothing"])


def test_vectors_and_scalars_are_refused(tmp_path: Path) -> None:
    base = checkpoint(tmp_path, {**LLAMA, "odd.weight": (2,) * 6, "empty.weight": (4, 0), "no.embed_in.weight": (3,)})
    with pytest.raises(UnsupportedError) as caught:
        select(base, ["q_proj", "norm", "odd", "empty", "embed_in"])
    assert caught.value.exit_code == 12
    assert caught.value.details == (
        "model.norm: shape [8]; an adapter needs a matrix",
        "odd: shape [2, 2, 2, 2, 2, 2]; an adapter needs a convolution of 1 to 3 dimensions",
        "empty: shape [4, 0]; an adapter needs a matrix",
        "no.embed_in: shape [3]; an adapter needs a table",
    )


def test_integers_are_refused(tmp_path: Path) -> None:
    base = checkpoint(tmp_path, {**VIT, "x.weight": (4, 4)}, dtypes={"x.weight": np.int32})
    with pytest.raises(UnsupportedError) as caught:
        select(base, ["x"])
    assert caught.value.details == ("x: storage type I32 takes no delta",)
    assert "x" not in names(base, ["all-linear"])


def test_stacks_of_experts_are_refused_where_a_convolution_would_not_be(tmp_path: Path) -> None:
    """A weight of three dimensions does not say what it is; its name does."""
    shapes = {
        "a.mlp.experts.up.weight": (2, 4, 4),
        "b.input_linear.weight": (2, 4, 4),
        "shared_mlp.input_linear.weight": (4, 4),
        "c.conv1.weight": (2, 4, 4),
    }
    base = checkpoint(tmp_path, shapes)
    for pattern in ("experts.up", "b.input_linear"):
        with pytest.raises(UnsupportedError) as caught:
            select(base, [pattern])
        assert caught.value.details[0].endswith("shape [2, 4, 4]; an adapter needs a matrix")
    assert names(base, ["conv1"]) == ["c.conv1"]
    assert names(base, ["all-linear"]) == ["shared_mlp.input_linear"]


def test_quantised_bases_are_refused(tmp_path: Path) -> None:
    """By what stands beside the weight, by the config, and by names that only quantised weights have."""
    q = "model.layers.0.self_attn.q_proj"
    cases: list[tuple[Shapes, dict[str, Any], dict[str, Any]]] = [
        ({**LLAMA, f"{q}.weight_scale_inv": (1, 1)}, {}, {}),
        ({**LLAMA, f"{q}.SCB": (8,)}, {f"{q}.weight": np.int8}, {}),
        (LLAMA, {}, {"quantization_config": {"quant_method": "fp8"}}),
        (
            {"embed_tokens.weight": (4, 2), f"{q}.qweight": (1, 8), f"{q}.scales": (1, 8)},
            {f"{q}.qweight": np.int32},
            {},
        ),
    ]
    for number, (shapes, dtypes, config) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        base = checkpoint(folder, shapes, dtypes=dtypes, **config)
        for pattern in ("all-linear", "q_proj"):
            with pytest.raises(UnsupportedError, match="targets are quantised") as caught:
                select(base, [pattern])
            assert any(detail.startswith(f"{q}: ") for detail in caught.value.details)
            assert not any("norm" in detail or "embed" in detail for detail in caught.value.details)
    # Others of the same base may be plain.
    assert names(checkpoint(tmp_path, cases[0][0]), ["v_proj"]) == [
        f"model.layers.{n}.self_attn.v_proj" for n in (0, 1)
    ]


def test_broken_and_missing_patterns(tmp_path: Path) -> None:
    base = checkpoint(tmp_path, LLAMA)
    for patterns in ([], ["re:("]):
        with pytest.raises(UsageError):
            select(base, patterns)


def test_the_storage_types_are_those_that_a_merge_takes() -> None:
    assert modules.FLOATING == MERGEABLE


# Which way round


def shapes_of(base: Checkpoint) -> dict[str, tuple[int, int, bool]]:
    return {
        module.module: (module.out, module.inner, module.transposed) for module in select(base, ["all-linear"]).modules
    }


GPT2_SHAPES = {
    "h.0.attn.c_attn": (24, 8, True),
    "h.0.attn.c_proj": (8, 8, True),
    "h.0.mlp.c_fc": (32, 8, True),
    "h.0.mlp.c_proj": (8, 32, True),
}


@pytest.mark.parametrize("config", [{"model_type": "gpt2"}, {}, {"model_type": "unheard-of"}])
def test_conv1d_is_stored_the_other_way_round(tmp_path: Path, config: dict[str, Any]) -> None:
    """The table knows GPT-2; without a config its biases say it, and for square ones the other matrices."""
    found = shapes_of(checkpoint(tmp_path, GPT2, **config))
    square = "h.0.attn.c_proj"
    assert found == GPT2_SHAPES | ({square: (8, 8, False)} if config.get("model_type") == "unheard-of" else {})


def test_the_table_decides_where_there_are_no_biases(tmp_path: Path) -> None:
    bare = {key: shape for key, shape in GPT2.items() if not key.endswith(".bias")}
    assert shapes_of(checkpoint(tmp_path, bare, model_type="gpt2")) == GPT2_SHAPES
    (tmp_path / "config.json").unlink()
    assert shapes_of(open_checkpoint(tmp_path))["h.0.attn.c_attn"] == (8, 24, False)
    assert shapes_of(open_checkpoint(tmp_path))["h.0.mlp.c_proj"] == (32, 8, False)


def test_linear_layers_are_not_turned(tmp_path: Path) -> None:
    found = shapes_of(checkpoint(tmp_path, {**LLAMA, "model.layers.0.mlp.up_proj.bias": (12,)}, model_type="llama"))
    assert found["model.layers.0.mlp.up_proj"] == (12, 8, False)
    assert found["model.layers.0.mlp.down_proj"] == (8, 12, False)
    assert not any(transposed for _, _, transposed in found.values())


def test_biases_that_contradict_the_config_are_an_error(tmp_path: Path) -> None:
    turned = {**GPT2, "h.0.mlp.c_fc.weight": (32, 8)}
    with pytest.raises(ShapeError, match="gpt2, the model_type") as caught:
        select(checkpoint(tmp_path, turned, model_type="gpt2"), ["all-linear"])
    assert caught.value.details == ("h.0.mlp.c_fc: [32, 8] with a bias of 32",)
    assert caught.value.exit_code == 21


# Files of patterns


def test_a_file_of_patterns(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("# ours\ntargets: [attention, 're:.*up_proj']\nexclude:\n- layers.1.**\n")
    assert expand([str(file), "lm_head"], ["o_proj"]) == (
        ("attention", "re:.*up_proj", "lm_head"),
        ("o_proj", "layers.1.**"),
    )
    assert expand(["a", "b", "a"]) == (("a", "b"), ())
    base = checkpoint(tmp_path, LLAMA)
    assert len(names(base, *expand([str(file)]))) == 5


@pytest.mark.parametrize(
    ("text", "error", "where"),
    [
        ("targets: [a]\ntargets: [b]", MalformedFileError, "'targets' stands twice"),
        ("targets: [a]\nrank: 3", MalformedFileError, "rank"),
        ("exclude: [a]", MalformedFileError, "targets"),
        ("- a\n- b", MalformedFileError, "no named fields"),
        ("", MalformedFileError, "no named fields"),
        ("targets: a", MalformedFileError, "targets"),
        ("targets: [1]", MalformedFileError, "targets"),
        ("targets: ['']", MalformedFileError, "targets"),
        ("targets: [a, b, a]", MalformedFileError, "stands twice"),
        ("targets: [other.yaml]", MalformedFileError, "names another one"),
        ("targets: [a]\nexclude: {b: 1}", MalformedFileError, "exclude"),
        ("targets: [*a]", UnsafeInputError, "quotes"),
        ("targets: &x [a]\nexclude: *x", UnsafeInputError, "line 1"),
        ("targets: !!python/name:os.system [a]", UnsafeInputError, "line 1"),
        ("targets: [", MalformedFileError, "not valid YAML"),
        ("[" * 3000, MalformedFileError, "nested"),
        ("targets: [" + "a," * 600_000 + "]", MalformedFileError, "too large"),
        ("targets: [\ud800]", MalformedFileError, "UTF-8"),
        ("--- {targets: [a]}\n--- {targets: [b]}", MalformedFileError, "single document"),
    ],
)
def test_broken_files_of_patterns(tmp_path: Path, text: str, error: type[LoraCliError], where: str) -> None:
    file = tmp_path / "mine.yml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(error) as caught:
        expand([str(file)])
    said = caught.value
    assert where in " ".join(str(part) for part in (said.message, said.tensor, said.found, said.hint))
    assert said.file is not None
    assert said.file.endswith("mine.yml")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        expand([str(tmp_path / "none.yaml")])


# Names for PEFT


def peft_selects(listed: Sequence[str], modules: Sequence[str]) -> list[str]:
    """How PEFT reads a list of target_modules (its `check_target_module_exists`)."""
    return [name for name in modules if any(name == entry or name.endswith(f".{entry}") for entry in listed)]


@pytest.mark.parametrize(
    ("shapes", "wanted", "exclude", "listed"),
    [
        (LLAMA, ["attention"], [], ["k_proj", "o_proj", "q_proj", "v_proj"]),
        (LLAMA, ["q_proj"], ["layers.0.**"], ["layers.1.self_attn.q_proj"]),
        (LLAMA, ["lm_head"], [], ["lm_head"]),
        (MOE, ["all-linear"], [], ["layers.1.mlp.gate", "q_proj", "shared_expert.gate_proj", "shared_expert_gate"]),
        (BERT, ["attention"], [], ["attention.output.dense", "key", "query", "value"]),
        (BERT, ["mlp"], [], ["intermediate.dense", "layer.0.output.dense"]),
        (GPT2, ["mlp"], [], ["c_fc", "mlp.c_proj"]),
    ],
)
def test_short_names_mean_the_selected_modules_and_no_others(
    tmp_path: Path, shapes: Shapes, wanted: Sequence[str], exclude: Sequence[str], listed: Sequence[str]
) -> None:
    base = checkpoint(tmp_path, shapes)
    chosen = names(base, wanted, exclude)
    found = target_names(chosen, base.tensors, bare=False)
    assert found == listed
    everything = [module.name for module in targets.modules_of(base)]
    assert peft_selects(found, everything) == chosen
    assert peft_selects(found, [f"wrapper.{name}" for name in everything]) == [f"wrapper.{name}" for name in chosen]


def test_a_head_that_is_added_later_is_not_meant(tmp_path: Path) -> None:
    base = checkpoint(tmp_path, BERT)
    chosen = names(base, ["all-linear"])
    assert target_names(chosen, base.tensors, bare=False) == ["dense", "key", "query", "value"]
    listed = target_names(chosen, base.tensors, bare=True)
    assert listed == ["intermediate.dense", "key", "output.dense", "pooler.dense", "query", "value"]
    assert peft_selects(listed, ["classifier.dense", "lm_head.dense", "classifier.out_proj"]) == []


def test_a_container_of_the_same_name_is_not_meant() -> None:
    """PEFT holds every module against the list, those without a weight as well."""
    keys = ["a.proj.weight", "b.proj.inner.weight"]
    assert target_names(["a.proj"], keys, bare=False) == ["a.proj"]


def test_a_name_that_cannot_be_told_apart() -> None:
    with pytest.raises(UnsupportedError):
        target_names(["proj"], ["proj.weight", "a.proj.weight"], bare=False)


@pytest.mark.parametrize(
    ("architecture", "task", "head", "bare"),
    [
        ("LlamaForCausalLM", "CAUSAL_LM", None, False),
        ("GPT2LMHeadModel", "CAUSAL_LM", None, False),
        ("BertForSequenceClassification", "SEQ_CLS", "classifier", False),
        ("LlamaForSequenceClassification", "SEQ_CLS", "score", False),
        ("BertForTokenClassification", "TOKEN_CLS", "classifier", False),
        ("BertForQuestionAnswering", "QUESTION_ANS", "qa_outputs", False),
        ("LlavaForConditionalGeneration", None, None, False),
        ("BertForMaskedLM", None, None, False),
        ("BertModel", None, None, True),
        (None, None, None, True),
    ],
)
def test_tasks(architecture: str | None, task: str | None, head: str | None, bare: bool) -> None:
    """A task whose head PEFT looks for in the adapter is only named where it is there: else PEFT would not load it."""
    config = {"architectures": [architecture]} if architecture else {}
    assert task_type(config) == (None if head else task)
    assert task_type(config, [f"{head}.weight", "other.bias"] if head else []) == task
    assert task_type(config, ["scores.weight", "a.bias"]) == (None if head else task)
    assert is_bare(config) is bare


def test_encoder_and_decoder_is_another_task() -> None:
    config = {"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}
    assert task_type(config) == "SEQ_2_SEQ_LM"
    assert task_type({"architectures": "LlamaForCausalLM"}) is None


def test_the_config_names_a_base_of_the_hub_and_its_revision() -> None:
    def config(base_id: str | None, alpha: float = 8.0) -> dict[str, Any]:
        scale = Scale(alpha, 4, False, "test")
        return adapter_config(["b", "a"], scale, task=None, fan_in_fan_out=False, init="kaiming", base_id=base_id)

    assert config("owner/name@" + "0" * 40)["base_model_name_or_path"] == "owner/name"
    assert config("owner/name@" + "0" * 40)["revision"] == "0" * 40
    assert config("owner/name")["revision"] is None
    assert config(None)["base_model_name_or_path"] is None
    assert config(None)["target_modules"] == ["a", "b"]
    assert json.dumps(config(None)["lora_alpha"]) == "8"
    assert config(None, 0.5)["lora_alpha"] == 0.5
