"""Which names are one tensor: what transformers ties, by the class and by the config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
import transformers
from conversion_world import Model, script

from lora_cli.adapters.resolve import resolve
from lora_cli.adapters.ties import ties

CLASSES = [
    "LlamaForCausalLM",
    "Qwen2ForCausalLM",
    "Gemma3ForCausalLM",
    "Gemma3ForConditionalGeneration",
    "GPT2LMHeadModel",
    "GPT2ForSequenceClassification",
    "GPTNeoXForCausalLM",
    "BertForMaskedLM",
    "BertModel",
    "RobertaForMaskedLM",
    "RobertaForSequenceClassification",
    "T5ForConditionalGeneration",
    "BartForConditionalGeneration",
    "WhisperForConditionalGeneration",
    "LlavaForConditionalGeneration",
    "Qwen2VLForConditionalGeneration",
    "PaliGemmaForConditionalGeneration",
    "Blip2ForConditionalGeneration",
    "ViTForImageClassification",
]
SAYS: Mapping[str, Mapping[str, Any]] = {
    "nothing": {},
    "yes": {"tie_word_embeddings": True},
    "no": {"tie_word_embeddings": False},
}


def made(name: str, said: Mapping[str, Any]) -> Model:
    """A small model on the meta device whose config says this."""
    kind = getattr(transformers, name)
    config = script().small(kind.config_class(**said))
    with torch.device("meta"):
        return kind(config)


def groups(model: Model, names: Sequence[str]) -> set[frozenset[str]]:
    """The names that are one parameter."""
    by_identity: dict[int, set[str]] = {}
    for name in names:
        by_identity.setdefault(id(model.get_parameter(name)), set()).add(name)
    return {frozenset(found) for found in by_identity.values() if len(found) > 1}


@pytest.mark.parametrize("says", SAYS)
@pytest.mark.parametrize("name", CLASSES)
def test_names_that_a_model_ties(name: str, says: str) -> None:
    """Saved, each tensor once, the tied names are those that transformers holds as one."""
    from transformers.core_model_loading import revert_weight_conversion

    model = made(name, SAYS[says])
    live = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    tied = groups(model, live)
    dropped = {alias for group in tied for alias in group - {s for a, s in model.all_tied_weights_keys.items()}}
    files = revert_weight_conversion(model, {n: t for n, t in model.state_dict().items() if n not in dropped})
    config = {"model_type": model.config.model_type, **SAYS[says], "architectures": [name]}
    if hasattr(model.config, "text_config"):
        config["text_config"] = {}
    found = ties(config, list(files))
    resolved = resolve(live, {**files, **{alias: files[key] for alias, key in found.items()}}, config=config)
    ours: dict[str, set[str]] = {}
    for parameter, (place,) in resolved.places.items():
        ours.setdefault(found.get(place.key, place.key), set()).add(parameter)
    assert {frozenset(names) for names in ours.values() if len(names) > 1} == tied
    assert not found.keys() & files.keys()


LEVELS = (None, False, True)


@pytest.mark.parametrize("inner", LEVELS)
@pytest.mark.parametrize("outer", LEVELS)
@pytest.mark.parametrize("family", ["Llava", "Gemma3", "PaliGemma", "Mistral3", "Qwen2VL", "InternVL"])
def test_a_text_config_may_say_it_as_well(family: str, outer: bool | None, inner: bool | None) -> None:
    said: dict[str, Any] = {"text_config": {} if inner is None else {"tie_word_embeddings": inner}}
    if outer is not None:
        said["tie_word_embeddings"] = outer
    kind = getattr(transformers, f"{family}Config")
    config = {"architectures": [f"{family}ForConditionalGeneration"], "model_type": kind.model_type, **said}
    found = ties(config, ["model.language_model.embed_tokens.weight"])
    assert bool(found) == kind(**said).tie_word_embeddings


# Files


LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True}
BERT = {"architectures": ["BertForMaskedLM"], "model_type": "bert"}
LLAVA = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "tie_word_embeddings": True}
T5 = {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}
OWN = {"architectures": ["OwnForCausalLM"], "model_type": "own", "tie_word_embeddings": True}


@pytest.mark.parametrize(
    ("config", "keys", "expected"),
    [
        (LLAMA, ["model.embed_tokens.weight"], {"lm_head.weight": "model.embed_tokens.weight"}),
        (LLAMA, ["embed_tokens.weight"], {"lm_head.weight": "embed_tokens.weight"}),
        # Some files hold the head alone.
        (LLAMA, ["lm_head.weight"], {"model.embed_tokens.weight": "lm_head.weight"}),
        (LLAMA, ["lm_head.weight", "model.embed_tokens.weight"], {}),
        (LLAMA, ["model.norm.weight"], {}),
        (
            LLAMA,
            ["_orig_mod.model.embed_tokens.weight"],
            {"_orig_mod.lm_head.weight": "_orig_mod.model.embed_tokens.weight"},
        ),
        ({**LLAMA, "tie_word_embeddings": "no"}, ["model.embed_tokens.weight"], {}),
        (
            BERT,
            ["bert.embeddings.word_embeddings.weight", "cls.predictions.bias"],
            {
                "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
                "cls.predictions.decoder.bias": "cls.predictions.bias",
            },
        ),
        # In the spelling of the files.
        (
            LLAVA,
            ["language_model.model.embed_tokens.weight"],
            {"language_model.lm_head.weight": "language_model.model.embed_tokens.weight"},
        ),
        (
            LLAVA,
            ["model.language_model.embed_tokens.weight"],
            {"lm_head.weight": "model.language_model.embed_tokens.weight"},
        ),
        (
            T5,
            ["shared.weight", "decoder.embed_tokens.weight"],
            {"encoder.embed_tokens.weight": "shared.weight", "lm_head.weight": "shared.weight"},
        ),
        # Of a class that nobody knows, by the usual names.
        (OWN, ["model.embed_tokens.weight"], {"lm_head.weight": "model.embed_tokens.weight"}),
        (OWN, ["model.embed_tokens.weight", "lm_head.weight"], {}),
        (OWN, ["model.embed_tokens.weight", "model.wte.weight"], {}),
        ({**OWN, "tie_word_embeddings": False}, ["model.embed_tokens.weight"], {}),
        ({}, ["model.embed_tokens.weight"], {}),
        (OWN, ["weight", "x"], {}),
    ],
)
def test_ties_of_files(config: Mapping[str, Any], keys: Sequence[str], expected: Mapping[str, str]) -> None:
    assert ties(config, keys) == expected


def test_shared_layers_are_as_many_as_the_files_have() -> None:
    """The tables hold one pair for all layers."""
    config = {"architectures": ["MMGroundingDinoForObjectDetection"], "tie_word_embeddings": True}
    keys = [f"bbox_embed.{n}.layers.{m}.bias" for n, m in ((0, 0), (17, 2))]
    assert ties(config, keys) == {f"model.decoder.{key}": key for key in keys}
