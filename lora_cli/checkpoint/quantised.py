"""Recognising quantised weights: a shape that happens to fit proves nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from lora_cli.checkpoint.checkpoint import Checkpoint
from lora_cli.errors import MalformedFileError, UnsupportedError
from lora_cli.regex import LONGEST, MOST, untrusted

_FILE, _FIELD = "config.json", "quantization_config"

_COMPANIONS = (
    ".weight_scale_inv",
    ".weight_scale",
    ".weight_scale_2",
    ".weight_packed",
    ".weight_zero_point",
    ".weight.absmax",
    ".weight.quant_map",
    ".weight.quant_state",
    ".qweight",
    ".qzeros",
    ".scales",
    ".SCB",
    ".weight_format",
    # Fused expert stacks carry theirs as X_blocks/X_scales or X_scale_inv.
    "_scales",
    "_blocks",
    "_scale_inv",
    "_scale",
)
"""What stands beside a quantised `X.weight`, after `X`: block fp8, compressed-tensors, bitsandbytes, GPTQ, AWQ."""

_EXCEPTION_FIELDS = (
    "modules_to_not_convert",
    "ignored_layers",
    "ignore",
    "llm_int8_skip_modules",
    "exclude_modules",
)


class Quantised:
    """Says of each tensor of one checkpoint why it holds quantised numbers, or None for plain ones.

    What depends on the checkpoint alone is looked up once: there may be tens of thousands of tensors to ask for.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def __call__(self, key: str) -> str | None:
        """Say why the tensor `key` holds quantised numbers."""
        module = key.removesuffix(".weight")
        if module in self._companions:
            return f"{module}{_COMPANIONS[self._companions[module]]} stands beside it"
        if self._declared is not None and key.endswith(".weight") and not self._excepted(module):
            return f"the quantization_config of config.json ({self._declared}) covers it"
        return None

    @cached_property
    def _companions(self) -> Mapping[str, int]:
        """What stands beside a module, as its place among the companions: the first of several."""
        found: dict[str, int] = {}
        for key in self._checkpoint.tensors:
            if key.endswith(_COMPANIONS):
                for place, ending in enumerate(_COMPANIONS):
                    if key.endswith(ending):
                        module = key.removesuffix(ending)
                        found[module] = min(place, found.get(module, place))
        return found

    @cached_property
    def _declared(self) -> str | None:
        return method(self._checkpoint)

    @cached_property
    def _excepted(self) -> Callable[[str], bool]:
        return _exceptions(self._checkpoint.config[_FIELD])


def method(checkpoint: Checkpoint) -> str | None:
    """Name the quantisation that the config declares, if any.

    Raises:
        MalformedFileError: The config says something else than settings there.
    """
    settings = checkpoint.config.get(_FIELD)
    if settings is None:
        return None
    if not isinstance(settings, dict):
        raise MalformedFileError(
            "A field of the config has the wrong type",
            file=_FILE,
            tensor=_FIELD,
            expected="an object",
            found=repr(settings)[:60],
        )
    return str(settings.get("quant_method", "unnamed"))


def _exceptions(settings: Mapping[str, Any]) -> Callable[[str], bool]:
    """Whether the settings say that a module is not quantised: by whole parts of its name, by glob, or by a pattern.

    The first entry that says so decides. There may be a name for each layer or expert: these are looked up.
    """
    entries = [entry for field in _EXCEPTION_FIELDS for entry in _texts(settings.get(field))]
    patterns = [(place, entry) for place, entry in enumerate(entries) if entry.startswith("re:") or "*" in entry]
    others = set(range(len(entries))) - {place for place, _ in patterns}
    names = {entries[place]: place for place in sorted(others, reverse=True)}
    lengths = {name.count(".") + 1 for name in names}
    for problem, limit, found in (
        ("There are too many patterns", MOST, len(patterns)),
        ("A pattern is too long", LONGEST, max((len(entry) for _, entry in patterns), default=0)),
    ):
        if found > limit:
            raise UnsupportedError(problem, file=_FILE, tensor=_FIELD, expected=f"at most {limit}", found=found)

    def excepted(module: str) -> bool:
        parts = module.split(".")
        runs = (".".join(parts[at : at + size]) for size in lengths for at in range(len(parts) - size + 1))
        named = min((names[run] for run in runs if run in names), default=len(entries))
        return any(_matches(entry, module) for place, entry in patterns if place < named) or named < len(entries)

    return excepted


def _matches(entry: str, module: str) -> bool:
    if entry.startswith("re:"):  # only compressed-tensors writes these, anchored at the start
        return untrusted(entry[3:], file=_FILE, field=_FIELD)(module)
    return fnmatchcase(module, entry) or fnmatchcase(module, f"{entry}.*")


def _texts(value: object) -> list[str]:
    return [entry for entry in value if isinstance(entry, str)] if isinstance(value, list) else []
