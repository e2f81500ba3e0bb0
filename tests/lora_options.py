"""Everything that PEFT can be told about a LoRA adapter, each as a small function from a family to a `LoraConfig`.

An `Option` may also say what is done to the model before it is adapted, to the adapted model before and after it is
trained, and how it is saved. A new option is one entry. PEFT is imported only where an option is used.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from families import BETWEEN, OLD, Family, Spelling
from family_models import LLAMA, WORDS, Inputs, Model

Config = Any  # PEFT is not typed


def _nothing(*_: object) -> None:
    """What most options do beside their config."""


def _as_it_is(family: Family) -> Spelling:
    return ()


def _save(adapted: Model, folder: Path) -> None:
    adapted.save_pretrained(folder)


@dataclass(frozen=True)
class Option:
    """An adapter that PEFT can save.

    Attributes:
        name: Unique among options.
        config: Makes the `LoraConfig`, for a family.
        prepare: What is done to the model before it is adapted; is given the config.
        begin: What is done to the adapted model before it is trained; is given the family and the case's folder.
        end: What is done to it afterwards.
        save: Writes it into a folder.
        inputs: What the model is called with, made of what the family is called with.
        place: Where in that folder the adapter is.
        ignored: Which of its tensors need not be used, as a regular expression of their names.
        ties: Whether it is for the table or the head, which many models have as one, and PEFT merges as if apart.
        peft_merges: Whether PEFT itself merges it rightly.
        spelling: How names in its file are written otherwise afterwards, without PEFT's prefix.
        initial: Whether a merge is given the adapter as it was before training, in `initial` beside it.
    """

    name: str
    config: Callable[[Family], Config]
    prepare: Callable[[Model, Family, Config], None] = _nothing
    begin: Callable[[Model, Family, Path], None] = _nothing
    end: Callable[[Model], None] = _nothing
    save: Callable[[Model, Path], None] = _save
    inputs: Callable[[Inputs], Inputs] = dict
    place: str = ""
    ignored: str = ""
    ties: bool = False
    peft_merges: bool = True
    spelling: Callable[[Family], Spelling] = _as_it_is
    initial: bool = False


def lora(**fields: Any) -> Callable[[Family], Config]:
    """A config of rank 4 on all linear layers, unless `fields` say otherwise; those that are functions get the family.

    Rank and alpha are such that no scale is 1 by accident.
    """

    def config(family: Family) -> Config:
        from peft import LoraConfig

        linear = family.linear if isinstance(family.linear, str) else list(family.linear)
        said = {"r": 4, "lora_alpha": 6, "target_modules": linear, "task_type": family.task}
        said |= {name: value(family) if callable(value) else value for name, value in fields.items()}
        return LoraConfig(**said)

    return config


def table(family: Family) -> list[str]:
    return [family.table]


def head(family: Family) -> list[str]:
    return [family.head]


def kernel(family: Family) -> list[str]:
    return [family.kernel]


def both(family: Family) -> list[str]:
    return [family.table, family.head]


# Targets whose names are a family's own

BIASED: Final[dict[str, list[str]]] = {
    "bert": ["query", "value", "dense"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "opt": ["q_proj", "out_proj", "fc1"],
    "qwen2": ["q_proj", "k_proj"],
    "phi": ["q_proj", "dense", "fc1"],
    "small": ["wide", "one", "two"],
    "llama": ["q_proj"],
    "dinov2-gated": ["q_proj", "gate_proj", "up_proj", "down_proj"],
}
NEAR: Final[dict[str, list[str]]] = {
    "llama": ["q_proj", "o_proj"],
    "llama-tied": ["q_proj", "o_proj"],
    "gpt2": ["c_attn"],
    "bert-bare": ["query"],
}
POSITIONS: Final = {"gpt2": "wpe", "bert": "position_embeddings"}
MIXED: Final[dict[str, str | list[str]]] = {"siglip": r".*head\.attention", "small": ["resampler", "wide"]}


# What single options do


def resized(by: int) -> Callable[[Model, Family, Config], None]:
    def resize(model: Model, family: Family, config: Config) -> None:
        model.resize_token_embeddings(WORDS + by, mean_resizing=False)

    return resize


def new_words(inputs: Inputs) -> Inputs:
    """The added words are said as well."""
    ids = inputs["input_ids"].clone()
    ids[:, -3:] = torch.arange(WORDS, WORDS + 3)
    return inputs | {"input_ids": ids}


def with_tables(adapted: Model, folder: Path) -> None:
    adapted.save_pretrained(folder, save_embedding_layers=True)


def negate(adapted: Model) -> None:
    """Magnitudes have any sign."""
    for name, parameter in adapted.named_parameters():
        if "lora_magnitude_vector" in name:
            with torch.no_grad():
                parameter.view(-1)[::2].neg_()


def lend_strides(adapted: Model, family: Family, folder: Path) -> None:
    """Whisper looks at its convolutions' strides, which PEFT's layers hide."""
    for module in adapted.modules():
        if hasattr(getattr(module, "base_layer", None), "stride"):
            module.stride = module.base_layer.stride


def with_eva(adapted: Model, family: Family, folder: Path) -> None:
    from peft import initialize_lora_eva_weights

    given = family.inputs() | {"attention_mask": torch.ones_like(family.inputs()["input_ids"])}
    initialize_lora_eva_weights(adapted, [given] * 4, show_progress_bar=False)


def with_corda(model: Model, family: Family, config: Config) -> None:
    from peft.tuners.lora.corda import preprocess_corda

    preprocess_corda(model, config, lambda: model(family.inputs()["input_ids"].view(1, -1)))


def with_gradients(model: Model, family: Family, config: Config) -> None:
    from peft.tuners.lora.loraga import preprocess_loraga

    preprocess_loraga(model, config, lambda: family.answer(model).square().sum().backward())


def keep_start(adapted: Model, family: Family, folder: Path) -> None:
    """Save the adapter as it begins, as PEFT's documentation says for inits that change the base."""
    config = adapted.peft_config["default"]
    init, config.init_lora_weights = config.init_lora_weights, True
    adapted.save_pretrained(folder / "initial")
    config.init_lora_weights = init


def converted(adapted: Model, folder: Path) -> None:
    """The difference to that beginning: a plain adapter of twice the rank for the unchanged base."""
    adapted.save_pretrained(folder, path_initial_model_for_weight_conversion=str(folder.parent / "initial"))


def written(**fields: Any) -> Callable[[Model, Path], None]:
    """What only other hardware or other libraries can train: the config says that it was."""

    def save(adapted: Model, folder: Path) -> None:
        adapted.save_pretrained(folder)
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return save


def principal(
    init: str, prepare: Callable[[Model, Family, Config], None] = _nothing, **fields: Any
) -> tuple[Option, ...]:
    """An init that takes its factors off the base: saved as a plain adapter, with how it began, and as it is."""
    config = lora(init_lora_weights=init, **fields)
    return (
        Option(init, config, prepare),
        Option(f"{init}-converted", config, prepare, keep_start, save=converted),
        Option(f"{init}-with-initial", config, prepare, keep_start, initial=True),
    )


def old(family: Family) -> Spelling:
    """As adapters were saved before transformers 4.52."""
    return OLD[family.name.removesuffix("-today").removesuffix("-published")]


def between(family: Family) -> Spelling:
    """As adapters were saved by transformers 4.52 to 4.57."""
    return BETWEEN


def sub(name: str, **fields: Any) -> Callable[[Family], Config]:
    """A config inside the config."""

    def make(family: Family) -> Config:
        from peft.tuners.lora import config

        return getattr(config, name)(**fields)

    return make


# The options

TWICE: Final = r"\.lora_"
"""The file holds what is tied under both names."""
ORIGINAL: Final = r"\.(original_module|modules_to_save)\."
"""It holds saved modules as they are in memory, too, and as they were, where the vocabulary looks like another one."""

OPTIONS: Final = {
    option.name: option
    for option in (
        Option("all-linear", lora()),
        Option("dora", lora(use_dora=True)),
        # Strengths. PEFT saves patterns in the order of their names, and takes the first that matches.
        Option("rslora", lora(use_rslora=True)),
        Option("patterns", lora(rank_pattern={r"layers\.1\..*": 3, "q_proj": 2}, alpha_pattern={"down_proj": 9})),
        Option("rslora-patterns", lora(use_rslora=True, rank_pattern={"up_proj": 7}, alpha_pattern={"layers.0": 3})),
        Option("rank-above-width", lora(r=50, lora_alpha=3)),
        # Targets
        Option("regex", lora(target_modules=r".*layers\.\d\.self_attn\.[qv]_proj")),
        Option("exclude", lora(exclude_modules=["o_proj", "gate_proj"])),
        Option("layers", lora(target_modules=["q_proj", "up_proj"], layers_to_transform=[1])),
        Option("layers-pattern", lora(target_modules=["c_attn"], layers_to_transform=[0], layers_pattern="h")),
        Option("dropout", lora(lora_dropout=0.3)),
        Option("fan-in-fan-out", lora(fan_in_fan_out=True)),
        Option("named", lora(), place="style"),
        # Biases
        Option(
            "bias-all",
            lora(bias="all", target_modules=lambda family: BIASED[family.name]),
            ignored=r"predictions\.decoder\.bias$",  # the same tensor by another name
        ),
        Option("bias-lora-only", lora(bias="lora_only", target_modules=lambda family: BIASED[family.name])),
        Option("lora-bias", lora(lora_bias=True, target_modules=lambda family: BIASED[family.name])),
        # Modules in the file whole
        Option("head-saved", lora(modules_to_save=head), ties=True, ignored=ORIGINAL),
        Option("classifier-saved", lora(target_modules=["query"], modules_to_save=["classifier"])),
        Option("nested-saved", lora(target_modules=["query"], modules_to_save=["classifier.dense"])),
        Option("norms-saved", lora(modules_to_save=["input_layernorm", "norm"])),
        Option("dora-head-saved", lora(use_dora=True, modules_to_save=head), ties=True),
        # Tables and heads
        Option("table", lora(target_modules=table), ties=True),
        Option("table-and-linear", lora(target_modules=lambda family: [family.table, *NEAR[family.name]]), ties=True),
        Option("table-dora", lora(target_modules=table, use_dora=True), ties=True),
        Option("head", lora(target_modules=head), ties=True),
        Option("head-dora", lora(target_modules=head, use_dora=True), ties=True),
        Option("table-and-head", lora(target_modules=both), ties=True),
        Option("table-and-head-dora", lora(target_modules=both, use_dora=True), ties=True),
        Option("table-saved", lora(modules_to_save=table), ties=True, ignored=ORIGINAL),
        Option("both-saved", lora(modules_to_save=both), ties=True, ignored=ORIGINAL),
        Option("positions", lora(target_modules=["wpe", "position_embeddings", "embed_positions"])),
        # Both as one, where a model has them as one
        Option("table-as-one", lora(target_modules=table, ensure_weight_tying=True), ties=True, ignored=TWICE),
        Option("head-as-one", lora(target_modules=head, ensure_weight_tying=True), ties=True, ignored=TWICE),
        Option("table-and-head-as-one", lora(target_modules=both, ensure_weight_tying=True), ties=True, ignored=TWICE),
        Option("table-saved-as-one", lora(modules_to_save=table, ensure_weight_tying=True), ties=True, ignored=TWICE),
        Option("head-saved-as-one", lora(modules_to_save=head, ensure_weight_tying=True), ties=True, ignored=TWICE),
        Option("both-saved-as-one", lora(modules_to_save=both, ensure_weight_tying=True), ties=True, ignored=TWICE),
        Option(
            "table-and-positions-as-one",
            lora(target_modules=lambda f: [f.table, POSITIONS[f.name]], ensure_weight_tying=True),
            ties=True,
            ignored=TWICE,
        ),
        # Single tokens
        Option("tokens", lora(trainable_token_indices=[3, 1, 40])),
        Option("tokens-named", lora(trainable_token_indices=lambda family: {family.table: [0, 47, 5]})),
        Option("tokens-of-head", lora(trainable_token_indices=lambda f: {f.head: [0, 47, 5]}), ties=True),
        Option("tokens-of-both", lora(trainable_token_indices=lambda f: {f.table: [0, 47], f.head: [9]}), ties=True),
        Option("tokens-as-one", lora(trainable_token_indices=[3, 1, 40], ensure_weight_tying=True)),
        Option(  # which lie under what the head's factors add
            "tokens-and-head",
            lora(target_modules=lambda f: [f.head, *NEAR[f.name]], trainable_token_indices=[3, 1, 40]),
            ties=True,
        ),
        Option("tokens-dora", lora(trainable_token_indices=[3, 1, 40], use_dora=True)),
        # Another vocabulary
        Option("resized", lora(), resized(5), inputs=new_words),
        Option("resized-table", lora(target_modules=table), resized(5), inputs=new_words, peft_merges=False),
        Option("resized-both", lora(target_modules=both), resized(5), inputs=new_words, peft_merges=False),
        Option(
            "resized-saved",
            lora(modules_to_save=both),
            resized(5),
            inputs=new_words,
            peft_merges=False,
            ignored=ORIGINAL,
        ),
        Option("resized-dora", lora(use_dora=True), resized(5), inputs=new_words),
        Option(
            "resized-tokens",
            lora(trainable_token_indices=[3, WORDS, WORDS + 1, WORDS + 2]),
            resized(5),
            inputs=new_words,
        ),
        Option("resized-told", lora(), resized(5), save=with_tables, inputs=new_words),
        Option("smaller", lora(), resized(-1)),
        Option("tables-with-it", lora(), save=with_tables, ignored=r"\.(embed_tokens|lm_head|wte)\."),
        # DoRA
        Option("dora-rslora", lora(use_dora=True, use_rslora=True)),
        Option("dora-patterns", lora(use_dora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1": 9})),
        Option("dora-negative", lora(use_dora=True), end=negate),
        Option("dora-bias", lora(use_dora=True, bias="lora_only", target_modules=lambda family: BIASED[family.name])),
        Option("dora-dropout", lora(use_dora=True, lora_dropout=0.3)),
        # Convolutions and attention
        Option("kernel", lora(target_modules=kernel), begin=lend_strides),
        Option("kernel-dora", lora(target_modules=kernel, use_dora=True), begin=lend_strides),
        Option("kernels", lora(target_modules=["one", "two", "three"])),
        Option("kernels-dora", lora(target_modules=["one", "two", "three"], use_dora=True)),
        Option("kernels-lora-bias", lora(target_modules=["one", "two", "three"], lora_bias=True)),
        Option("attention", lora(target_modules=lambda family: MIXED[family.name]), peft_merges=False),
        Option("attention-rslora", lora(target_modules=lambda f: MIXED[f.name], use_rslora=True), peft_merges=False),
        # Variants
        Option(
            "blocks",
            lora(
                target_modules=LLAMA,
                use_bdlora=sub(
                    "BdLoraConfig",
                    target_modules_bd_a=["q_proj", "k_proj", "v_proj", "up_proj"],
                    target_modules_bd_b=["o_proj", "down_proj"],
                    nblocks=2,
                    match_strict=False,
                ),
            ),
        ),
        Option("replicated", lora(layer_replication=[[0, 2], [0, 2]]), peft_merges=False),
        Option("replicated-odd", lora(layer_replication=[[1, 2], [0, 2], [0, 1]]), peft_merges=False),
        Option("replicated-dora", lora(layer_replication=[[0, 1], [0, 2]], use_dora=True), peft_merges=False),
        Option("replicated-head", lora(layer_replication=[[0, 2], [1, 2]], modules_to_save=head), peft_merges=False),
        Option("monteclora", lora(monteclora_config=sub("MontecloraConfig", buffer_size=2)), ignored="monteclora"),
        Option("velora", lora(velora_config=sub("VeloraConfig", num_groups=4)), ignored="velora"),
        # Inits
        Option("random", lora(init_lora_weights=False)),
        Option("gaussian", lora(init_lora_weights="gaussian")),
        Option("orthogonal", lora(init_lora_weights="orthogonal")),
        Option("eva", lora(init_lora_weights="eva", eva_config=sub("EvaConfig", rho=1.5)), begin=with_eva),
        Option("mica", lora(init_lora_weights="mica")),
        Option("mica-table", lora(init_lora_weights="mica", target_modules=table)),
        # What no merged weight does, and what the base cannot take
        Option("alora", lora(alora_invocation_tokens=[3, 4], task_type="CAUSAL_LM")),
        Option("arrow", lora(), save=written(arrow_config={"top_k": 2, "router_temperature": 1.0})),
        Option("qalora", lora(), save=written(use_qalora=True)),
        Option("kasa", lora(kasa_config=sub("KasaConfig"))),
        Option("loftq", lora(), save=written(init_lora_weights="loftq", loftq_config={"loftq_bits": 4})),
        Option("head-adapted", lora(target_modules=head, task_type=None)),
        # Names of other times
        Option("old", lora(), spelling=old),
        Option("old-dora", lora(use_dora=True), spelling=old),
        Option("old-head", lora(target_modules=head), spelling=old),
        Option("old-both", lora(target_modules=both), spelling=old),
        Option("old-head-saved", lora(modules_to_save=head), spelling=old),
        Option("between", lora(), spelling=between),
        *principal("pissa"),
        *principal("pissa_niter_4", use_rslora=True),
        *principal("olora", rank_pattern={"q_proj": 2}),
        *principal("corda", target_modules=LLAMA, corda_config=sub("CordaConfig"), prepare=with_corda),
        *principal("lora_ga", target_modules=LLAMA, lora_ga_config=sub("LoraGAConfig"), prepare=with_gradients),
    )
}
