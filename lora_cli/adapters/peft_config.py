"""What the fields of a PEFT `adapter_config.json` mean to a merge: understood, neutral, or refused when set.

A field that nobody here has heard of is refused when it is set: it may change the arithmetic.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from lora_cli.adapters.peft_types import check_types, is_set
from lora_cli.adapters.tuners import REFUSED as NO_MERGE
from lora_cli.adapters.tuners import TUNERS
from lora_cli.errors import UnsupportedError

UNDERSTOOD = {
    "peft_type": "which tuner made the adapter",
    "r": "rank; checked against the factors",
    "lora_alpha": "numerator of the scale",
    "use_rslora": "divide alpha by the square root of the rank",
    "rank_pattern": "ranks of single modules; checked against the factors",
    "alpha_pattern": "alphas of single modules",
    "ensure_weight_tying": "what is done to one of two tied tensors is done to both",
    "layer_replication": "the layers of the files that the trained model had, some of them several times",
    "fan_in_fan_out": "layout of the base; shapes decide, this settles squares",
    "bias": "which biases were trained; they are in the file",
    "lora_bias": "B factors have biases; they are in the file",
    "modules_to_save": "modules that are in the file whole",
    "init_lora_weights": "how the factors began; some inits changed the base",
    "peft_version": "who wrote the file; how often it adds one factor of attention",
    "task_type": "which head the fine-tune may have added",
    "trainable_token_indices": "which rows of a table were trained; they are in the file",
    "use_bdlora": "which factors are block-diagonal",
    "target_parameters": "which factors are of parameters, such as stacks of experts, and not of modules",
    "lora_B_layout": "how B of a stack of experts is packed",
    "use_dora": "lengths are learned apart from directions; the magnitudes are in the file",
}

COMMON = {
    "peft_type": "which tuner made the adapter",
    "bias": "which biases were trained; they are in the file",
    "modules_to_save": "modules that are in the file whole",
    "peft_version": "who wrote the file",
    "task_type": "which head the fine-tune may have added",
    "trainable_token_indices": "which rows of a table were trained; they are in the file",
}
"""Understood of every tuner."""

NEUTRAL = {
    "auto_mapping": "which class to load",
    "base_model_name_or_path": "a name; shown, never opened",
    "corda_config": "settings of an init; init_lora_weights says if it was used",
    "eva_config": "settings of an init that leaves the base alone",
    "exclude_modules": "chose the targets; the file shows them",
    "inference_mode": "training or not",
    "layers_pattern": "chose the targets; the file shows them",
    "layers_to_transform": "chose the targets; the file shows them",
    "loftq_config": "settings of an init; init_lora_weights says if it was used",
    "lora_dropout": "acts in training only",
    "lora_ga_config": "settings of an init; init_lora_weights says if it was used",
    "megatron_config": "how layers were split in training; files hold whole factors",
    "megatron_core": "name of a Python module",
    "merge_weights": "whether layers of the first PEFT versions merged themselves to be used",
    "monteclora_config": "how factors were varied in training; what is used is plain LoRA",
    "qalora_group_size": "only read with use_qalora",
    "revision": "a name; shown, never opened",
    "runtime_config": "never saved with a meaning",
    "target_modules": "chose the targets; the file shows them",
    "velora_config": "how activations were kept in training; factors are plain LoRA",
}

REFUSED = {
    "alora_invocation_tokens": "activated LoRA acts on some tokens only, which no merged weight does; serve it apart",
    "arrow_config": "Arrow picks among adapters at run time, which no merged weight does; merge one of these adapters",
    "enable_lora": "the first PEFT versions could give only some outputs of a module factors; that is not supported",
    "kasa_config": "KaSA took singular values off the base, and the file lacks what is left of it; merge it by PEFT",
    "use_qalora": "QA-LoRA pools its inputs, for quantised weights only; serve it apart",
}

_INIT = "init_lora_weights"
_PLAIN_INITS = ("gaussian", "orthogonal", "eva", "mica")
"""Those that leave the base as it was; so do true, false and null."""
_TAKING_INITS = re.compile(r"pissa(_niter_\d+)?|olora|corda|lora_ga")
"""Those that take the product of the first factors off the base."""
_ANY_CASE = ("gaussian", "olora", "mica")
"""Those that PEFT compares in any case."""


def check_fields(config: Mapping[str, Any], *, file: str, ignore: Collection[str] = ()) -> tuple[str, ...]:
    """Refuse what a config asks for and this tool does not do, all at once.

    Args:
        config: The parsed `adapter_config.json`.
        file: Its name.
        ignore: Fields that the user takes responsibility for (`--ignore-field`).

    Returns:
        The fields that were set and ignored.

    Raises:
        UnsupportedError: Another tuner, or fields that are set and not understood.
        MalformedFileError: A field has the wrong type.
    """
    _check_type(config.get("peft_type"), file)
    ignored = refuse_set_fields(config, UNDERSTOOD, file=file, ignore=ignore)
    check_types(config, file)
    if _INIT in ignore and _taking(config.get(_INIT)):
        ignored = tuple(sorted({*ignored, _INIT}))
    return ignored


_LISTED = "docs/tuners.md lists what is supported"


def _check_type(tuner: object, file: str) -> None:
    """Refuse any PEFT type but LoRA's; the others that can be merged have a reader of their own."""
    if tuner == "LORA":
        return
    reason = NO_MERGE.get(str(tuner))
    if reason:
        raise UnsupportedError(
            f"Adapters of this type cannot be merged: {reason}",
            file=file,
            tensor="peft_type",
            found=tuner,
            hint=_LISTED,
        )
    raise UnsupportedError(
        "Adapters of this type are not supported" if tuner else "The config names no peft_type",
        file=file,
        tensor="peft_type",
        expected=", ".join(sorted({"LORA", *TUNERS})),
        found=tuner,
        hint=_LISTED,
    )


def initial_of(config: Mapping[str, Any], ignored: Collection[str]) -> str | None:
    """The init that took its first factors off the base; None where the base was left alone.

    A file that PEFT converted (`path_initial_model_for_weight_conversion`) says that it began plainly.

    Args:
        config: A config that was checked.
        ignored: What `check_fields` said is ignored: then the base given is the one that the init left.
    """
    return None if _INIT in ignored else _taking(config.get(_INIT))


def layers_of(config: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The stored layer of each layer of the trained model, where `layer_replication` says so.

    Args:
        config: A config that was checked.
    """
    runs = config.get("layer_replication")
    return tuple(layer for first, end in runs for layer in range(first, end)) if runs else None


def refuse_set_fields(
    config: Mapping[str, Any],
    understood: Collection[str],
    *,
    file: str,
    ignore: Collection[str] = (),
    neutral: Collection[str] = (),
    refused: Mapping[str, str] = MappingProxyType({}),
) -> tuple[str, ...]:
    """Refuse every field that is set, not understood and not neutral; return those that the user told us to ignore.

    Args:
        config: The config.
        understood: Fields that are looked at.
        file: Its name.
        ignore: Fields that the user takes responsibility for.
        neutral: Fields that change nothing, besides those of every tuner.
        refused: Why single fields are refused.

    Raises:
        UnsupportedError: With all of them.
    """
    refused = refusals(config, {*understood, *neutral}, refused)
    ignored = tuple(sorted(set(refused) & set(ignore)))
    problems = [words for name, words in refused.items() if name not in ignored]
    if problems:
        raise UnsupportedError(
            "The adapter's config asks for what lora-cli does not do",
            file=file,
            details=problems,
            hint="if you are sure that a field does not matter here: --ignore-field NAME",
        )
    return ignored


def refusals(
    config: Mapping[str, Any],
    understood: Collection[str] = UNDERSTOOD,
    reasons: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, str]:
    """The fields that are set, not understood and not neutral, each with what it says and why that is refused."""
    return {
        name: f"{name} = {str(value)[:60]}: {reasons.get(name) or _reason(name, value)}"
        for name, value in config.items()
        if _refused(name, value, understood)
    }


def _refused(name: str, value: object, understood: Collection[str]) -> bool:
    if name == _INIT:
        plain = value is None or isinstance(value, bool) or _init_name(value) in _PLAIN_INITS
        return not plain and not (name in understood and _taking(value))
    return is_set(value) and name not in understood and name not in NEUTRAL


def _init_name(value: object) -> str | None:
    if not isinstance(value, str):
        return None
    return value.lower() if value.lower() in _ANY_CASE else value


def _taking(value: object) -> str | None:
    name = _init_name(value)
    return name if name and _TAKING_INITS.fullmatch(name) else None


def _reason(name: str, value: object) -> str:
    if name != _INIT:
        return REFUSED.get(name, "unknown field; it may change the arithmetic")
    if value == "loftq":
        return "LoftQ quantised the base before training; merge into the base as LoftQ left it, and ignore this field"
    if _taking(value):
        return "this init changed the base; merging into the original base would be wrong"
    return "unknown init; it may have changed the base"
