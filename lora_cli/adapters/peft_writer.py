"""Writing what PEFT reads: the config of a LoRA adapter, with targets that select exactly the modules it has.

The fields are those of PEFT's `LoraConfig` that every release since 0.9 knows; the rest have defaults there.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from lora_cli.adapters.adapter import Scale
from lora_cli.adapters.formats.peft_wholes import HEADS
from lora_cli.adapters.targets import Selected, added_heads
from lora_cli.errors import UnsupportedError

TASKS = (
    ("ForCausalLM", "CAUSAL_LM"),
    ("LMHeadModel", "CAUSAL_LM"),
    ("ForSequenceClassification", "SEQ_CLS"),
    ("ForTokenClassification", "TOKEN_CLS"),
    ("ForQuestionAnswering", "QUESTION_ANS"),
)
"""Ends of architecture names, and the task that PEFT has for them."""


def adapter_config(
    target_modules: Collection[str],
    scale: Scale,
    *,
    task: str | None,
    fan_in_fan_out: bool,
    init: str,
    base_id: str | None = None,
) -> dict[str, Any]:
    """Return the content of `adapter_config.json`.

    Args:
        target_modules: What `target_names` gives.
        scale: Alpha and rank, and what alpha is divided by.
        task: What `task_type` gives.
        fan_in_fan_out: The base stores its matrices as (in × out).
        init: How the factors began.
        base_id: The base as `owner/name` or `owner/name@revision`, where it came from the Hub.
    """
    name, _, revision = (base_id or "").partition("@")
    return {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": name or None,
        "bias": "none",
        "exclude_modules": None,
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        # A name only, for the factors are in the file; but of inits that change the base PEFT and `merge` would hold it
        # against this one, which is the residual: what the factors took has been taken off it.
        "init_lora_weights": init if init == "gaussian" else True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": int(scale.alpha) if float(scale.alpha).is_integer() else scale.alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": scale.rank,
        "rank_pattern": {},
        "revision": revision or None,
        "target_modules": sorted(target_modules),
        "task_type": task,
        "use_dora": False,
        "use_rslora": scale.rslora,
    }


def peft_keys(module: Selected) -> tuple[str, str]:
    """Names of A and B in a PEFT file, without the prefix: those of embeddings are parameters, not modules."""
    infix, end = ("lora_embedding_", "") if module.kind == "embedding" else ("lora_", ".weight")
    return f"{module.module}.{infix}A{end}", f"{module.module}.{infix}B{end}"


def rendered(config: Mapping[str, Any]) -> bytes:
    """Return the bytes of a config as PEFT writes them."""
    return (json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


MOST_PARTS = 100
"""Dots of a name that is looked at: all ends of all its beginnings are, and real names have some fifteen."""


def target_names(modules: Collection[str], base_names: Iterable[str], *, bare: bool) -> list[str]:
    """Return the shortest ends of names that mean exactly `modules`: what `target_modules` is to be.

    PEFT takes a module whose name ends with a listed one, counted in whole parts. Where the last part of a name means
    other modules as well, more of the name is listed.

    Args:
        modules: Names of the wanted modules.
        base_names: Keys of the base.
        bare: The base is a backbone; a model that is loaded from it may have a head whose names must not match.

    Raises:
        UnsupportedError: No ends of names mean exactly these, or a name has too many parts.
    """
    wanted, names = set(modules), list(base_names)
    if endless := next((name for name in names if name.count(".") > MOST_PARTS), None):
        raise UnsupportedError(
            "A name has too many parts for targets to be chosen by ends of names",
            tensor=endless[:80],
            found=f"{endless.count('.') + 1} parts",
            expected=f"at most {MOST_PARTS + 1}",
        )
    others = {end for name in names for module in _modules_of(name) if module not in wanted for end in _ends(module)}
    if bare:
        others |= {end for head in added_heads() for end in _ends(head)}
    return sorted({_shortest(module, others) for module in wanted})


def _modules_of(key: str) -> list[str]:
    """Every module that holds a parameter, near or far."""
    parts = key.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _ends(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[at:]) for at in range(len(parts) - 1, -1, -1)]


def _shortest(module: str, others: Collection[str]) -> str:
    # `layers.3.q_proj` says more to a reader than `3.q_proj`.
    ends = [end for end in _ends(module) if end not in others and not end.split(".")[0].isdigit()]
    if not ends and module in others:
        raise UnsupportedError(
            "PEFT's target_modules cannot name a module whose whole name another one ends with",
            tensor=module,
            hint="target the other one as well, or write a wrapped checkpoint",
        )
    return ends[0] if ends else module


def is_bare(config: Mapping[str, Any]) -> bool:
    """Whether a config is that of a backbone without a head, or says nothing of it."""
    return (_architecture(config) or "Model").endswith("Model") and _task(config) is None


def task_type(config: Mapping[str, Any], wholes: Iterable[str] = ()) -> str | None:
    """PEFT's name for what the base's architecture is for; None where that is not plain.

    Args:
        config: The base's.
        wholes: Names of the tensors that the adapter holds whole. For some tasks PEFT asks for a head among them, and
            does not load an adapter without: then it is told none.
    """
    task = _task(config)
    heads = HEADS.get(task or "")
    has_head = heads is None or any(part in heads for name in wholes for part in name.split("."))
    return task if has_head else None


def _task(config: Mapping[str, Any]) -> str | None:
    architecture = _architecture(config)
    if architecture is None:
        return None
    if architecture.endswith("ForConditionalGeneration") and config.get("is_encoder_decoder") is True:
        return "SEQ_2_SEQ_LM"
    return next((task for ending, task in TASKS if architecture.endswith(ending)), None)


def _architecture(config: Mapping[str, Any]) -> str | None:
    said = config.get("architectures")
    return said[0] if isinstance(said, list) and said and isinstance(said[0], str) else None
