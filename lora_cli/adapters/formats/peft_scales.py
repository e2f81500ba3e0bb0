"""Ranks, alphas and scales of single modules, as a PEFT config says them, and whether the factors agree.

The scale is alpha/r, or alpha/√r for rsLoRA (Kalajdzievski 2023), with alpha and r taken from the first matching entry
of `alpha_pattern` and `rank_pattern`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

from lora_cli.adapters.adapter import Scale
from lora_cli.adapters.deltas import is_kernel_pair, is_matrix_pair
from lora_cli.adapters.formats.pairs import Pair
from lora_cli.adapters.formats.peft_blocks import Blocks
from lora_cli.adapters.formats.peft_keys import Found
from lora_cli.adapters.patterns import PeftPatterns
from lora_cli.adapters.source import CONFIG_FILE, ReadOptions
from lora_cli.adapters.strength import check_alpha
from lora_cli.errors import SAVE_AGAIN, ShapeError


class Scales:
    """What a config says of the ranks and strengths of modules.

    Args:
        config: A config that was checked.
        options: What the user says instead.
    """

    def __init__(self, config: Mapping[str, Any], options: ReadOptions) -> None:
        self._config = config
        self._options = options
        self._rslora = bool(config.get("use_rslora"))
        self._patterns = {
            name: PeftPatterns(config.get(name) or {}, file=CONFIG_FILE, field=name)
            for name in ("rank_pattern", "alpha_pattern")
        }

    def rank(self, module: str) -> tuple[Any, str] | None:
        """The rank of a module and the field that says it."""
        return self._value("rank_pattern", "r", module)

    def scale(self, module: str) -> Scale:
        """What multiplies the product of a module's factors.

        Raises:
            NumericError: It would be zero.
        """
        options = self._options
        if options.scale is not None:
            return Scale(options.scale, None, False, "--scale")
        rank, rank_source = self.rank(module) or (8, "PEFT's default r")
        alpha, alpha_source = self._value("alpha_pattern", "lora_alpha", module) or (8, "PEFT's default lora_alpha")
        if options.alpha is not None:
            alpha, alpha_source = options.alpha, "--alpha"
        else:
            check_alpha(alpha, file=CONFIG_FILE, field=alpha_source)
        root = "√" if self._rslora else ""
        return Scale(float(alpha), int(rank), self._rslora, f"{alpha_source} / {root}{rank_source}")

    def ambiguous(self, modules: Iterable[str]) -> list[str]:
        """Warnings where the order of a pattern's entries matters: PEFT saves them sorted, trained as they may be."""
        warnings = []
        for name, patterns in self._patterns.items():
            found = ((module, patterns.all(module)) for module in modules) if len(patterns) > 1 else iter(())
            for module, values in islice(((m, v) for m, v in found if len(set(map(str, v))) > 1), 1):
                warnings.append(f"several entries of {name} match {module}; the first one, {values[0]}, is taken")
        return warnings

    def _value(self, patterns: str, field: str, module: str) -> tuple[Any, str] | None:
        found = self._patterns[patterns].first(module)
        if found is not None:
            return found[1], f"{patterns}[{found[0]!r}]"
        return (self._config[field], field) if field in self._config else None


def twice(scale: Scale) -> Scale:
    """The scale of what PEFT adds a second time."""
    return replace(scale, alpha=2 * scale.alpha, source=f"2 × {scale.source}, as PEFT adds it twice")


def check_ranks(found: Found, modules: Iterable[str], scales: Scales, blocks: Blocks) -> None:
    """Refuse pairs of modules that share no rank, or another one than the config says.

    Raises:
        ShapeError: With all of them.
    """
    pairs = ((module, found.pairs[module]) for module in modules)
    wrong = [words for module, pair in pairs if (words := _problem(module, pair, found, scales, blocks))]
    if wrong:
        raise ShapeError("Ranks do not agree", file=CONFIG_FILE, details=wrong, hint=SAVE_AGAIN)


def _problem(module: str, pair: Pair, found: Found, scales: Scales, blocks: Blocks) -> str | None:
    a, b = (tensor.shape for tensor in pair.both)
    kind = blocks.kind(module)
    if kind is not None:
        fits, more = blocks.fit(a, b, kind), f", and {kind[-1].upper()} has {blocks.count} blocks, says use_bdlora"
    else:
        fits, more = is_matrix_pair(a, b) or is_kernel_pair(a, b), _groups_words(a, b)
    if not fits:
        return f"{module}: A is {list(a)}, B is {list(b)}{more}"
    said = scales.rank(found.in_config(module))
    if said is not None and said[0] != a[0]:
        return f"{module}: the factors have rank {a[0]}, {said[1]} says {said[0]}"
    return None


def _groups_words(a: tuple[int, ...], b: tuple[int, ...]) -> str:
    """Words for a convolution with groups, where PEFT's A sees all inputs, and each group of B only a part of A's."""
    if len(a) > 2 and b[1] and a[0] > b[1] and a[0] % b[1] == 0:
        return f"; a convolution in {a[0] // b[1]} groups, whose factors no kernel in groups is the product of"
    return ""
