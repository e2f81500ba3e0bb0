"""How people are told what a merge does besides adding to whole tensors: a line for each kind."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from lora_cli.cli.text import count, few, spans

if TYPE_CHECKING:
    from lora_cli.surgery.effects import ConfigChange, Effects

NAMED = 2
"""Tensors that are named; JSON has all of them."""
LONGEST = 24
"""Characters of one value of a config."""


def rows(effects: Effects | None) -> Iterator[tuple[str, str]]:
    """What there is to say, each with its name; nothing of a merge that only adds."""
    if effects is None:
        return
    if effects.lengths:
        yield "DoRA", f"lengths of outputs are set in {count(effects.lengths, 'tensor')}"
    if effects.multiplied:
        yield "multiplied", f"{count(effects.multiplied, 'tensor')}, element by element"
    if effects.remade:
        yield "transformed", f"the rows of {count(effects.remade, 'tensor')}"
    if effects.rows:
        yield "rows", few((f"{amount:,} of {key}" for key, amount in effects.rows.items()), NAMED)
    if effects.layers is not None:
        repeated = f"; {count(len(effects.repeated), 'tensor')} stored once more" if effects.repeated else ""
        yield "layers", f"{len(effects.layers):,}, formerly {few(spans(effects.layers).split(', '))}{repeated}"
    yield from on_base(effects)


def on_base(effects: Effects | None) -> Iterator[tuple[str, str]]:
    """What of it an adapter alone does not tell: that depends on the base."""
    if effects is None:
        return
    if effects.parts:
        yield "parts", few((f"{key} {outputs_words(parts)}" for key, parts in effects.parts.items()), NAMED)
    sizes: defaultdict[tuple[int, int], list[str]] = defaultdict(list)
    for key, size in effects.resized.items():
        sizes[size].append(key)
    for (before, after), keys in sizes.items():
        yield "resized", f"from {before:,} to {after:,} rows: {few(keys, NAMED)}"
    if effects.untied:
        yield "untied", few((f"{name} from {key}" for name, key in effects.untied.items()), NAMED)
    if effects.config:
        yield "config", few(map(_config_words, effects.config), NAMED)


def outputs_words(outputs: Iterable[tuple[int, int]]) -> str:
    """Outputs as Python cuts them: [0:12] [24:36]."""
    return " ".join(f"[{begin}:{end}]" for begin, end in outputs)


def _config_words(change: ConfigChange) -> str:
    before, after = (_value(value) for value in (change.before, change.after))
    if change.before is None:
        return f"{change.field} is {after}"
    return f"{change.field} from {before} to {after}" if change.after is not None else f"{change.field} is gone"


def _value(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
