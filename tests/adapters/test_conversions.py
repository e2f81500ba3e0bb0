"""The tables of names say what transformers does: for every parameter of a model, where its files hold it."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conversion_world import Shaped, held, script, small_model, stored
from tiny import within

from lora_cli.adapters.conversions import (
    LONGEST,
    Conversion,
    Part,
    architecture,
    compiled,
    conversions,
    renamed,
    tables,
    transposed_experts,
)
from lora_cli.adapters.region import Place
from lora_cli.adapters.resolve import resolve
from lora_cli.adapters.spelling import spelling

CURRENT = pytest.mark.skipif(
    transformers.__version__ != tables()["transformers"], reason="the tables are those of another release"
)
ROOT = Path(__file__).parents[2]

CLASSES = [
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "Gemma3ForConditionalGeneration",
    "PhiForCausalLM",
    "Phi3ForCausalLM",
    "GPT2LMHeadModel",
    "GPTNeoXForCausalLM",
    "BertForMaskedLM",
    "RobertaForSequenceClassification",
    "T5ForConditionalGeneration",
    "WhisperForConditionalGeneration",
    "ViTModel",
    "ViTForImageClassification",
    "DeiTForImageClassification",
    "Dinov2ForImageClassification",
    "SwinForImageClassification",
    "BeitForImageClassification",
    "SegformerForSemanticSegmentation",
    "CLIPModel",
    "CLIPVisionModel",
    "SiglipModel",
    "AltCLIPModel",
    "LlavaForConditionalGeneration",
    "LlavaModel",
    "LlavaOnevisionForConditionalGeneration",
    "Mistral3ForConditionalGeneration",
    "PaliGemmaForConditionalGeneration",
    "InternVLForConditionalGeneration",
    "Idefics3ForConditionalGeneration",
    "Qwen2VLForConditionalGeneration",
    "Qwen2VLModel",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3_5ForConditionalGeneration",
    "Qwen2AudioForConditionalGeneration",
    "ColPaliForRetrieval",
    "MixtralForCausalLM",
    "Qwen3MoeForCausalLM",
    "DeepseekV3ForCausalLM",
    "GptOssForCausalLM",
    "KimiLinearForCausalLM",
    "OlmoHybridForCausalLM",
    "HrmTextForCausalLM",
    "MistralLarge4ForConditionalGeneration",
    "Step3p7Model",
    "Ernie4_5_VLMoeForConditionalGeneration",
    "Kimi_K25ForConditionalGeneration",
    "InklingForConditionalGeneration",
    "Inkling2ForConditionalGeneration",
    "AXK1ForCausalLM",
    "CHMv2ForDepthEstimation",
]
"""The families that people train, whatever else stores a parameter in parts, and bare backbones."""

UNLIKE = {
    "RfDetrForInstanceSegmentation": 8,
    "Molmo2ForConditionalGeneration": 6,
    "Molmo2Model": 6,
    "Molmo2TextModel": 6,
}
"""Classes and how many of their parameters are not there: heads with the backbone's names, and cuts of a tensor whose
sizes no file says."""


def wrong(model: Any) -> list[str]:
    """Parameters of a model that are not where the tables say."""
    world = stored(model)
    found = resolve(list(world.live), world.files, config=world.config)
    lost = [lost.name for lost in found.unmapped]
    return lost + [name for name, there in found.places.items() if not holds(there, world.files, world.live[name])]


def holds(places: tuple[Place, ...], files: Mapping[str, torch.Tensor], parameter: torch.Tensor) -> bool:
    return torch.equal(held(places, files, tuple(parameter.shape)), parameter)


@CURRENT
@pytest.mark.parametrize("name", CLASSES)
def test_every_parameter_is_where_the_tables_say(name: str) -> None:
    assert wrong(small_model(name)) == []


@CURRENT
@pytest.mark.slow
def test_every_parameter_of_every_class_is_where_the_tables_say() -> None:
    made = script().instances(script().model_classes())
    found = {kind.__name__: wrong(model) for kind, model in made if model is not None and script().converted(model)}
    assert len(found) > 400
    assert {name: len(names) for name, names in found.items() if names} == UNLIKE


# Experts


def wrong_experts(model: Any) -> list[str]:
    """Experts, by names of files, that are not where the tables say in a base that has those of a layer together."""
    world = stored(model)
    names = [name for name in world.files if name not in world.live and re.search(r"experts\.\d+\.", name)]
    found = resolve(names, world.live, config=world.config)
    lost = [lost.name for lost in found.unmapped]
    return lost + [name for name, there in found.places.items() if not holds(there, world.live, world.files[name])]


EXPERTS = [
    "MixtralForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM",
    "DeepseekV2ForCausalLM",
    "OlmoeForCausalLM",
    "JambaForCausalLM",
    "PhimoeForCausalLM",
    "NemotronHForCausalLM",
    "Ernie4_5_VLMoeForConditionalGeneration",
    "Glm4MoeForCausalLM",
    "KimiLinearForCausalLM",
    "MiniMaxForCausalLM",
]


@CURRENT
@pytest.mark.parametrize("name", EXPERTS)
def test_experts_of_files_are_in_what_modules_hold(name: str) -> None:
    assert wrong_experts(small_model(name)) == []


def has_experts(model: Any) -> bool:
    return any(hasattr(module, "is_transposed") for module in model.modules())


@CURRENT
@pytest.mark.slow
def test_experts_of_every_class() -> None:
    """With all parameters of these models; and the tables know those that PEFT takes the other way."""
    made = script().instances(script().model_classes())
    found = {kind.__name__: model for kind, model in made if model is not None and has_experts(model)}
    assert len(found) > 100
    for name, model in found.items():
        assert wrong(model) + wrong_experts(model) == [], name
        world = {"architectures": [name], "model_type": model.config.model_type}
        if architecture(world) is None:
            continue
        said = {p: transposed_experts(world, p) for p, part in model.named_modules() if hasattr(part, "is_transposed")}
        assert said == {path: model.get_submodule(path).is_transposed for path in said}, name


@CURRENT
@pytest.mark.slow
def test_no_class_is_transposed_that_the_tables_do_not_know() -> None:
    """What a decorator says of classes, made or not."""
    script().model_classes()
    modules = [module for name, module in sys.modules.items() if ".modeling_" in name]
    classes = {kind for module in modules for kind in vars(module).values() if isinstance(kind, type)}
    said = [
        inspect.getclosurevars(vars(kind)["__init__"]).nonlocals
        for kind in classes
        if "Experts" in kind.__name__ and "__init__" in vars(kind)
    ]
    transposed = [closed for closed in said if closed.get("is_transposed")]
    known = [facts["experts"] for facts in tables()["classes"].values() if "experts" in facts]
    assert len(transposed) == sum("is_transposed" in str(experts) for experts in known) == 3


# Models in models


def composed(name: str, **parts: Any) -> Any:
    """A model whose parts are not the usual ones."""
    config = getattr(transformers, f"{name}Config")(**parts)
    with torch.device("meta"):
        return getattr(transformers, f"{name}ForConditionalGeneration")(config)


FEW = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
EYE = {**FEW, "image_size": 28, "patch_size": 14}
COMPOSED: Mapping[str, tuple[str, Mapping[str, Mapping[str, Any]]]] = {
    "llava of qwen2 and siglip": (
        "Llava",
        {"text_config": {**FEW, "model_type": "qwen2"}, "vision_config": {**EYE, "model_type": "siglip_vision_model"}},
    ),
    "llava of mixtral and dinov2": (
        "Llava",
        {
            "text_config": {**FEW, "model_type": "mixtral", "num_local_experts": 2, "num_key_value_heads": 2},
            "vision_config": {**EYE, "model_type": "dinov2", "use_swiglu_ffn": True},
        },
    ),
    "onevision of olmo-hybrid": ("LlavaOnevision", {"text_config": {"model_type": "olmo_hybrid"}}),
}


@CURRENT
@pytest.mark.parametrize("name", COMPOSED)
def test_parts_of_another_type_have_their_own_conversions(name: str) -> None:
    family, parts = COMPOSED[name]
    model = composed(family, **parts)
    assert wrong(model) == []
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    theirs = transformers.conversion_mapping.get_model_conversion_mapping(model)
    known = conversions(config)
    ours = [*known.renamings, *known.converters]
    assert [step.sources for step in ours] == [tuple(step.source_patterns) for step in _in_order(theirs)]
    assert [step.scope for step in ours] == [_scope(step) for step in _in_order(theirs)]


def _in_order(steps: Any) -> list[Any]:
    return sorted(steps, key=lambda step: hasattr(step, "operations"))


def _scope(step: Any) -> tuple[str, str] | None:
    if step.scope_prefix is None:
        return None
    inner = f"{step.scope_prefix}." if step.scope_prefix else ""
    return (f"{step.base_model_prefix}." if step.base_model_prefix else "") + inner, inner


# What the files hold


@CURRENT
def test_the_conversions_are_current() -> None:
    """All of them, and what is said of some classes; the slow test compares every class."""
    assert tables()["conversions"] == json.loads(json.dumps(script().conversions()))
    kinds = [getattr(transformers, name) for name in CLASSES]
    for kind in kinds:
        model = script().instance(kind)
        said = tables()["classes"].get(kind.__name__)
        assert said in (None, json.loads(json.dumps(script().of_class(kind, model)))), kind


@CURRENT
@pytest.mark.slow
def test_the_files_are_current() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "make_conversions.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@CURRENT
def test_patterns_are_put_together_as_transformers_does() -> None:
    known = transformers.conversion_mapping._build_checkpoint_conversion_mapping()
    steps = [step for steps in known.values() for step in steps]
    assert len(steps) > 1000
    assert {step.compiled_sources.pattern for step in steps} == {
        compiled(tuple(step.source_patterns)).pattern for step in steps
    }


def test_steps_that_belong_together_wait_for_the_first() -> None:
    """Both names of a pair are in newer files too; the older ones have a first that these lack."""
    config = {"architectures": ["Kimi_K25ForConditionalGeneration"], "model_type": "kimi_k25"}
    older, newer = ([f"vision_tower.encoder.blocks.3.norm{n}.weight" for n in numbers] for numbers in ((0, 1), (1, 2)))
    names = conversions(config).for_files(newer).newest(newer)
    assert [name.split(".")[-2] for name in names] == ["norm1", "norm2"]
    assert conversions(config).for_files(older).newest(older) == names


def test_no_pattern_can_take_long() -> None:
    """What repeats holds nothing that repeats, and no name is longer than the limit."""
    for rows in tables()["conversions"].values():
        for row in rows if isinstance(rows, list) else ():
            for source in row["from"]:
                assert not any(end in source for end in (")*", ")+", "}+", "}*", "+*", "*+"))
    config = {"architectures": ["ViTModel"], "model_type": "vit"}
    name = "encoder.layer.0.attention.attention.query.weight"
    assert conversions(config).newest([name]) == ["layers.0.attention.q_proj.weight"]
    long = name + "x" * LONGEST
    assert conversions(config).newest([long]) == [long]
    mixtral = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
    with within(1):
        assert spelling(mixtral, {"mlp.experts." * 100_000: Shaped((2, 2))}).places == {}
        long = "experts." * 100_000
        assert renamed([long], [Conversion((r"experts.*.w1.*.w2",), ("x",))]) == [long]


def test_the_parts_of_every_class_come_to_an_end() -> None:
    assert max(len(list(Part("", kind, {}).parts())) for kind in tables()["classes"]) < 50


def test_the_table_says_where_it_comes_from() -> None:
    text = (resources.files("lora_cli") / "data" / "conversions.json").read_text("utf-8")
    assert "Apache-2.0" in text.splitlines()[1]
    assert all(len(line) < 30_000 for line in text.splitlines())


# Configs


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({}, None),
        ({"architectures": ["ViTModel"]}, "ViTModel"),
        ({"model_type": "vit"}, "ViTModel"),
        ({"architectures": ["ViTForNothing"], "model_type": "vit"}, "ViTForNothing"),
        ({"architectures": ["Own"], "model_type": "vit", "auto_map": {}}, None),
        ({"architectures": ["Own"], "model_type": "own"}, None),
        ({"architectures": [], "model_type": ["vit"]}, None),
        ({"architectures": "ViTModel"}, None),
        ({"architectures": [["ViTModel"]], "model_type": None}, None),
    ],
)
def test_the_class_that_a_config_names(config: Mapping[str, Any], kind: str | None) -> None:
    assert conversions(config).kind == (kind or "")


@pytest.mark.parametrize("level", [None, 3, "llama", [], {}, {"model_type": 3}, {"model_type": "nobody"}])
def test_a_level_of_the_config_may_be_anything(level: object) -> None:
    config = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "text_config": level}
    (name,) = conversions(config).newest(["language_model.model.layers.0.q.weight"])
    assert name == "model.language_model.layers.0.q.weight"
    assert spelling(config, {}).places == {}
