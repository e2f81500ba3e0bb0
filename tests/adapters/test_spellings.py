"""One parameter, many names: what files, modules of today, older modules, and models inside others call it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from conversion_world import Shaped
from tiny import within

from lora_cli.adapters.region import Place, Region
from lora_cli.adapters.resolve import Resolution, parse_maps, resolve
from lora_cli.errors import NamesError


def config(kind: str, model_type: str, **more: Any) -> dict[str, Any]:
    return {"architectures": [kind], "model_type": model_type, **more}


def found(
    said: Mapping[str, Any], names: Sequence[str], keys: Sequence[str], shape: tuple[int, ...] = (8, 4)
) -> Resolution:
    return resolve(names, dict.fromkeys(keys, Shaped(shape)), config=said)


LLAVA = config("LlavaForConditionalGeneration", "llava", text_config={"model_type": "llama"})
QWEN = config("Qwen2VLForConditionalGeneration", "qwen2_vl")
GEMMA = config("Gemma3ForConditionalGeneration", "gemma3")
VIT = config("ViTForImageClassification", "vit")
NEOX = config("GPTNeoXForCausalLM", "gpt_neox")
INTERN = config("InternVLForConditionalGeneration", "internvl")

Q = "layers.0.self_attn.q_proj.weight"
TOWER = "vision_tower.encoder.layers.0.self_attn.q_proj.weight"
MULTIMODAL = {
    "published": [f"language_model.model.{Q}", "language_model.lm_head.weight", TOWER],
    "today": [f"model.language_model.{Q}", "lm_head.weight", f"model.{TOWER}"],
    # One release wrote these.
    "between": [f"model.language_model.model.{Q}", "lm_head.weight", f"model.{TOWER}"],
}
QWEN_NAMES = {
    "published": [f"model.{Q}", "lm_head.weight", "visual.blocks.0.attn.qkv.weight"],
    "today": [f"model.language_model.{Q}", "lm_head.weight", "model.visual.blocks.0.attn.qkv.weight"],
}
VIT_NAMES = {
    "published": ["vit.encoder.layer.0.attention.attention.query.weight", "vit.encoder.layer.0.output.dense.bias"],
    "today": ["vit.layers.0.attention.q_proj.weight", "vit.layers.0.mlp.fc2.bias"],
    "half today": ["vit.layers.0.attention.attention.query.weight", "vit.layers.0.output.dense.bias"],
    "backbone": ["encoder.layer.0.attention.attention.query.weight", "encoder.layer.0.output.dense.bias"],
    "backbone today": ["layers.0.attention.q_proj.weight", "layers.0.mlp.fc2.bias"],
}
NEOX_NAMES = {"published": ["embed_out.weight"], "today": ["lm_head.weight"]}
FAMILIES = {
    "llava": (LLAVA, MULTIMODAL),
    "gemma3": (GEMMA, MULTIMODAL),
    "qwen2-vl": (QWEN, QWEN_NAMES),
    "vit": (VIT, VIT_NAMES),
    "gpt-neox": (NEOX, NEOX_NAMES),
}


@pytest.mark.parametrize("wrapper", ["", "_orig_mod.", "base_model.model."])
@pytest.mark.parametrize("held", ["", "_orig_mod."])
@pytest.mark.parametrize(
    ("said", "names", "keys"),
    [
        pytest.param(said, spellings[adapter], spellings[base], id=f"{name}, {adapter} in {base}")
        for name, (said, spellings) in FAMILIES.items()
        for adapter in spellings
        for base in spellings
    ],
)
def test_every_spelling_in_files_of_every_spelling(
    said: Mapping[str, Any], names: Sequence[str], keys: Sequence[str], held: str, wrapper: str
) -> None:
    made = found(said, [wrapper + name for name in names], [held + key for key in keys])
    assert made.keys == {wrapper + name: held + key for name, key in zip(names, keys, strict=True)}


@pytest.mark.parametrize("base", MULTIMODAL)
@pytest.mark.parametrize(
    "names",
    [
        pytest.param([f"model.{Q}", "lm_head.weight"], id="of a text model with its head"),
        pytest.param([Q], id="of a text model"),
        pytest.param([f"language_model.base_model.model.model.{Q}"], id="of the text model inside the model"),
    ],
)
def test_adapters_of_the_text_model_alone(base: str, names: Sequence[str]) -> None:
    made = found(LLAVA, names, MULTIMODAL[base])
    assert made.keys == dict(zip(names, MULTIMODAL[base], strict=False))


@pytest.mark.parametrize("spelled", ["published", "today"])
def test_adapters_of_the_whole_for_files_of_the_text_model(spelled: str) -> None:
    said = config("Gemma3ForCausalLM", "gemma3_text")
    names = MULTIMODAL[spelled][:1]
    assert found(said, names, [f"model.{Q}"]).keys == {names[0]: f"model.{Q}"}


def test_a_text_model_of_another_family_is_found_where_the_config_puts_it() -> None:
    said = {**LLAVA, "text_config": {"model_type": "gpt2"}}
    keys = ["language_model.h.0.attn.c_attn.weight"]
    assert found(said, ["transformer.h.0.attn.c_attn.weight"], keys).keys == {
        "transformer.h.0.attn.c_attn.weight": keys[0]
    }


def test_what_is_done_to_the_names_is_told() -> None:
    made = found(LLAVA, MULTIMODAL["today"], MULTIMODAL["published"])
    assert made.rewrite == "as the modules of LlavaForConditionalGeneration are called in transformers 5.23.0"
    made = found(LLAVA, [f"_orig_mod.{name}" for name in MULTIMODAL["today"]], MULTIMODAL["published"])
    assert made.rewrite.startswith("_orig_mod.* → *, then as the modules of Llava")
    assert found(LLAVA, MULTIMODAL["today"], MULTIMODAL["today"]).rewrite == "as they are"


def test_a_map_may_lead_to_a_name_of_today() -> None:
    base = dict.fromkeys(MULTIMODAL["published"], Shaped())
    made = resolve([f"mine.{Q}"], base, config=LLAVA, maps=parse_maps(["mine=model.language_model"]))
    assert made.keys == {f"mine.{Q}": f"language_model.model.{Q}"}


def test_without_a_config_only_the_usual_spellings_are_known() -> None:
    assert found({}, VIT_NAMES["today"], VIT_NAMES["published"]).keys == {}
    assert found({}, MULTIMODAL["today"], MULTIMODAL["published"]).unmapped == ()


# Parts of tensors


def test_rows_of_a_tensor_that_the_model_cuts() -> None:
    said = config("Dinov2Model", "dinov2")
    keys = ["encoder.layer.0.mlp.weights_in.weight", "encoder.layer.0.mlp.weights_in.bias"]
    names = [f"encoder.layer.0.mlp.{part}_proj.{end}" for end in ("weight", "bias") for part in ("gate", "up")]
    made = found(said, names, keys)
    assert made.unmapped == ()
    assert [made.places[name] for name in names] == [
        (Place(key, Region(rows, 8, ((0, 4, 1),))),) for key in keys for rows in ((0, 4), (4, 8))
    ]
    # Adapters of earlier releases are for the stored tensor.
    assert found(said, keys, keys).keys == {key: key for key in keys}


def test_a_tensor_that_the_model_puts_together() -> None:
    said = config("OlmoHybridForCausalLM", "olmo_hybrid")
    keys = [f"model.layers.1.linear_attn.{part}_conv1d.weight" for part in "qkv"]
    name = "model.layers.1.linear_attn.conv1d.weight"
    base = dict(zip(keys, (Shaped((4, 1)), Shaped((4, 1)), Shaped((6, 1))), strict=True))
    made = resolve([name], base, config=said)
    assert made.places[name] == tuple(
        Place(key, Region((0, stop - start), stop - start, ((start, stop, 1),)))
        for key, start, stop in zip(keys, (0, 4, 8), (4, 8, 14), strict=True)
    )
    (lost,) = resolve([name], dict(list(base.items())[:2]), config=said).unmapped
    assert "lacks a part" in str(lost.reason)


def test_many_parts_are_in_the_order_of_their_numbers() -> None:
    said = config("Qwen4ExpTextModel", "qwen4_exp_text")
    keys = [f"layers.0.ngram_embedding.shard_{number}.weight" for number in range(12)]
    name = "layers.0.ngram_embedding.weight"
    assert [place.key for place in found(said, [name], sorted(keys)).places[name]] == keys


def test_a_matrix_that_lies_turned_under_its_own_name() -> None:
    said = config("Ernie4_5_VLMoeForConditionalGeneration", "ernie4_5_vl_moe")
    name = "model.language_model.layers.0.mlp.text_moe.gate.weight"
    key = "model.layers.0.mlp.gate.weight"
    assert found(said, [name], [key]).places == {name: (Place(key, None, turned=True),)}


def test_rows_in_the_order_of_rotary_embeddings() -> None:
    said = config("MistralLarge4ForConditionalGeneration", "mistral_large4", vision_config={"num_attention_heads": 2})
    key = "vision_encoder.transformer.layers.0.attention.wq.weight"
    name = "model.vision_tower.transformer.layers.0.attention.q_proj.weight"
    (place,) = found(said, [name], [key]).places[name]
    assert place.region is not None
    assert place.region.indices() == [0, 2, 1, 3, 4, 6, 5, 7]
    del said["vision_config"]["num_attention_heads"]
    (lost,) = found(said, [name], [key]).unmapped
    assert "heads" in str(lost.reason)


def test_a_part_and_the_whole_are_two_changes_of_one_tensor() -> None:
    said, key = config("Dinov2Model", "dinov2"), "encoder.layer.0.mlp.weights_in.weight"
    with pytest.raises(NamesError, match="mean one tensor"):
        found(said, [key, "encoder.layer.0.mlp.up_proj.weight"], [key])


# Size

MIXTRAL = config("MixtralForCausalLM", "mixtral")

MANY = [
    f"model.layers.{n}.block_sparse_moe.experts.{e}.w{m}.weight"
    for n in range(60)
    for e in range(333)
    for m in (1, 2, 3)
]


LARGE = [f"model.layers.{n}.mlp.experts" for n in range(60)]


def test_sixty_thousand_names_of_experts_that_are_stored_together() -> None:
    base = {f"{at}.gate_up_proj": Shaped((333, 8, 5)) for at in LARGE}
    base |= {f"{at}.down_proj": Shaped((333, 5, 4)) for at in LARGE}
    with within(5):
        made = resolve(MANY, base, config=MIXTRAL)
    assert len(made.places) == len(MANY)


def test_a_model_of_sixty_thousand_experts_that_are_stored_one_by_one() -> None:
    shapes = {"1": Shaped((4, 5)), "2": Shaped((5, 4)), "3": Shaped((4, 5))}
    base = {key: shapes[key[-8]] for key in MANY}
    with within(5):
        made = resolve([f"{at}.gate_up_proj" for at in LARGE], base, config=MIXTRAL)
    assert {len(places) for places in made.places.values()} == {666}


@pytest.mark.parametrize("renamed", [False, True])
def test_sixty_thousand_names_of_a_model_with_conversions(renamed: bool) -> None:
    names = [key.replace("block_sparse_moe", "mlp") for key in MANY] if renamed else MANY
    with within(4):
        made = found(MIXTRAL, names, MANY)
    assert made.keys == dict(zip(names, MANY, strict=True))
