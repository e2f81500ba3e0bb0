"""What the fields of a PEFT `adapter_config.json` mean to a merge: understood, neutral, or refused when set.

A field that nobody here has heard of is refused when it is set: it may change the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from lora_cli.errors import MalformedFileError, UnsupportedError

UNDERSTOOD = {
    "peft_type": "which tuner made the adapter",
    "r": "rank; checked against the factors",
    "lora_alpha": "numerator of the scale",
    "use_rslora": "divide alpha by the square root of the rank",
    "rank_pattern": "ranks of single modules; checked against the factors",
    "alpha_pattern": "alphas of single modules",
    "fan_in_fan_out": "layout of the base; shapes decide, this settles squares",
    "bias": "which biases were trained; they are in the file",
    "lora_bias": "B factors have biases; they are in the file",
    "modules_to_save": "modules that are in the file whole",
    "init_lora_weights": "how the factors began; some inits changed the base",
    "task_type": "which head the fine-tune may have added",
    "use_dora": "lengths are learned apart from directions; the magnitudes are in the file",
}

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
    "peft_version": "who wrote the file",
    "qalora_group_size": "only read with use_qalora",
    "revision": "a name; shown, never opened",
    "runtime_config": "never saved with a meaning",
    "target_modules": "chose the targets; the file shows them",
    "velora_config": "how activations were kept in training; factors are plain LoRA",
}

REFUSED = {
    "alora_invocation_tokens": "activated LoRA acts on some tokens only; no merged weight does that",
    "arrow_config": "Arrow routes between adapters at run time; no merged weight does that",
    "ensure_weight_tying": "adapters on tied weights are not supported",
    "kasa_config": "KaSA truncated the base before training",
    "layer_replication": "the trained model had more layers than the files",
    "monteclora_config": "MonteCLoRA samples its factors",
    "target_parameters": "LoRA on expert parameters is not supported",
    "trainable_token_indices": "single trained token rows are not supported",
    "use_bdlora": "block-diagonal factors are not supported",
    "use_qalora": "QA-LoRA pools its inputs; no merged weight of full precision does that",
}

PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
"""Values of init_lora_weights that leave the base as it was."""


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
    tuner = config.get("peft_type")
    if tuner != "LORA":
        raise UnsupportedError(
            f"Adapters of PEFT type {tuner} are not supported" if tuner else "The config names no peft_type",
            file=file,
            tensor="peft_type",
            expected="LORA",
            found=tuner,
        )
    ignored = refuse_set_fields(config, UNDERSTOOD, file=file, ignore=ignore)
    _check_types(config, file)
    return ignored


def refuse_set_fields(
    config: Mapping[str, Any], understood: Collection[str], *, file: str, ignore: Collection[str] = ()
) -> tuple[str, ...]:
    """Refuse every field that is set, not understood and not neutral; return those that the user told us to ignore.

    Raises:
        UnsupportedError: With all of them.
    """
    refused = {name: _reason(name) for name, value in config.items() if _refused(name, value, understood)}
    ignored = tuple(sorted(set(refused) & set(ignore)))
    problems = [f"{name} = {str(config[name])[:60]}: {why}" for name, why in refused.items() if name not in ignored]
    if problems:
        raise UnsupportedError(
            "The adapter's config asks for what lora-cli does not do",
            file=file,
            details=problems,
            hint="if you are sure that a field does not matter here: --ignore-field NAME",
        )
    return ignored


def _refused(name: str, value: object, understood: Collection[str]) -> bool:
    if name == "init_lora_weights":
        # `1 in (True,)` is true in Python; compare types as well.
        return not any(value is plain or (isinstance(plain, str) and value == plain) for plain in PLAIN_INITS)
    is_set = value not in (None, False, "", [], {})
    return is_set and name not in understood and name not in NEUTRAL


def _reason(name: str) -> str:
    if name == "init_lora_weights":
        return "this init changed the base; merging into the original base would be wrong"
    return REFUSED.get(name, "unknown field; it may change the arithmetic")


def _check_types(config: Mapping[str, Any], file: str) -> None:
    for name, (words, fits) in _TYPES.items():
        if name in config and not fits(config[name]):
            raise MalformedFileError(
                "A field of the adapter's config has the wrong type",
                file=file,
                tensor=name,
                expected=words,
                found=repr(config[name])[:60],
            )


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 31


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -LARGEST < value < LARGEST


def _is_flag(value: object) -> bool:
    return value is None or isinstance(value, bool)


def _maps_to(fits: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or (isinstance(value, dict) and all(map(fits, value.values())))


LARGEST = 1e30
"""Alphas beyond this are no alphas."""

_TYPES: Mapping[str, tuple[str, Callable[[object], bool]]] = {
    "r": ("a whole number", _is_rank),
    "lora_alpha": ("a number", _is_number),
    "rank_pattern": ("an object of whole numbers", _maps_to(_is_rank)),
    "alpha_pattern": ("an object of numbers", _maps_to(_is_number)),
    "modules_to_save": ("a list", lambda value: value is None or isinstance(value, list)),
    "use_dora": ("true or false", _is_flag),
    "use_rslora": ("true or false", _is_flag),
    "fan_in_fan_out": ("true or false", _is_flag),
}
