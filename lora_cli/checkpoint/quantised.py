"""Recognising quantised weights: a shape that happens to fit proves nothing."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from lora_cli.checkpoint.checkpoint import Checkpoint
from lora_cli.regex import untrusted

_COMPANIONS = (
    "weight_scale_inv",
    "weight_scale",
    "weight_scale_2",
    "weight_packed",
    "weight_zero_point",
    "weight.absmax",
    "weight.quant_map",
    "weight.quant_state",
    "qweight",
    "qzeros",
    "scales",
    "SCB",
    "weight_format",
)
"""What stands beside a quantised `X.weight`, after `X.`: block fp8, compressed-tensors, bitsandbytes, GPTQ, AWQ."""

_EXCEPTION_FIELDS = (
    "modules_to_not_convert",
    "ignored_layers",
    "ignore",
    "llm_int8_skip_modules",
    "exclude_modules",
)


def quantised(checkpoint: Checkpoint, key: str) -> str | None:
    """Say why the tensor `key` holds quantised numbers, or None for plain ones."""
    module = key.removesuffix(".weight")
    companion = next((name for name in _companions(module) if name in checkpoint.tensors), None)
    if companion is not None:
        return f"{companion} stands beside it"
    settings = checkpoint.config.get("quantization_config")
    if isinstance(settings, dict) and key.endswith(".weight") and not _excepted(settings, module):
        return f"the quantization_config of config.json ({settings.get('quant_method', 'unnamed')}) covers it"
    return None


def method(checkpoint: Checkpoint) -> str | None:
    """Name the quantisation that the config declares, if any."""
    settings = checkpoint.config.get("quantization_config")
    return str(settings.get("quant_method", "unnamed")) if isinstance(settings, dict) else None


def _companions(module: str) -> list[str]:
    names = [f"{module}.{suffix}" for suffix in _COMPANIONS]
    # Fused expert stacks carry theirs as X_blocks/X_scales or X_scale_inv.
    return [*names, *(f"{module}{suffix}" for suffix in ("_scales", "_blocks", "_scale_inv", "_scale"))]


def _excepted(settings: Mapping[str, Any], module: str) -> bool:
    """Whether the settings say that a module is not quantised: by name, by glob, or by `re:` and a pattern."""
    entries = [entry for name in _EXCEPTION_FIELDS for entry in _texts(settings.get(name))]
    return any(_names(entry, module) for entry in entries)


def _texts(value: object) -> list[str]:
    return [entry for entry in value if isinstance(entry, str)] if isinstance(value, list) else []


def _names(entry: str, module: str) -> bool:
    if entry.startswith("re:"):  # only compressed-tensors writes these, anchored at the start
        return untrusted(entry[3:])(module)
    if "*" in entry:
        return fnmatchcase(module, entry) or fnmatchcase(module, f"{entry}.*")
    return f".{entry}." in f".{module}."
