"""What the card of a merged checkpoint says of the merge, as Markdown: a section at its end."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from itertools import islice

from lora_cli.adapters.adapter import Adapter
from lora_cli.surgery.effects import Effects
from lora_cli.surgery.plan import AdapterUse

HEADING = "## Merged with lora-cli"
CHECK = "To check this, run `lora-cli verify . "

_NAMED = 4
"""Tensors that are named of those that a merge did one thing to."""

Merged = tuple[str, Adapter, AdapterUse]
"""An adapter under the name that people know it by, and how it is used."""


def section(
    name: str,
    merged: Sequence[Merged],
    effects: Effects,
    *,
    told: bool,
    above: bool,
    undo: bool,
    had_results: bool,
) -> str:
    """Return the section.

    Args:
        name: What the base is called.
        merged: The adapters; those that are only taken off, as they were before training, need not be told of apart.
        effects: What the merge does besides adding to whole tensors.
        told: Whether the card ends with the section of an earlier merge, which this one goes on.
        above: Whether the card says anything before it.
        undo: Whether an undo file is written.
        had_results: Whether evaluation results of the base were in the metadata.
    """
    base = code(name)
    beginnings = [adapter.before for _, adapter, _ in merged]
    entries = [
        _entry(label, adapter, use)
        for label, adapter, use in merged
        if not any(adapter is before for before in beginnings)
    ]
    these = "this adapter" if len(entries) == 1 else "these adapters"
    if told:
        opening = f"Afterwards {these} went into the result ({base}):"
    elif above:
        card = f"Everything above is the card of {base}."
        opening = f"{HEADING}\n\n{card} These weights are that model with {these} merged in:"
    else:
        opening = f"{HEADING}\n\nThese weights are {base} with {these} merged in:"
    besides = [f"- {words}" for words in _besides(effects)]
    paragraphs = [opening, "\n".join(entries)]
    paragraphs += ["Besides:", "\n".join(besides)] if besides else []
    if had_results:
        paragraphs.append("The evaluation results in the metadata were left out: they are results of the base.")
    paragraphs.append(f"{CHECK}{_how(merged, undo=undo)} `lora_merge.json` has the details.")
    return "\n\n".join(paragraphs) + "\n"


def _how(merged: Sequence[Merged], *, undo: bool) -> str:
    begun = any(adapter.before for _, adapter, _ in merged)
    option, more = (" --initial INITIAL", " INITIAL") if begun else ("", "")
    if not undo:
        return f"--base BASE --adapter ADAPTER{option}` with the same weights."
    back = f"to take it out again, `lora-cli unmerge . ADAPTER{more} -o BASE`."
    return f"--adapter ADAPTER{option} --roundtrip`; {back}"


def _entry(label: str, adapter: Adapter, use: AdapterUse) -> str:
    scales = sorted({entry.scale for entry in use.scales})
    words = [f"weight {_number(use.weight)}"]
    if len(scales) > 4:
        words.append(f"{len(scales)} scales from {scales[0]:g} to {scales[-1]:g}")
    elif scales:
        words.append(f"scale {' and '.join(f'{scale:g}' for scale in scales)}")
    said = f"- {code(label)}: {use.kind}, {', '.join(words)}"
    layouts = [f"{layout.layout} ({layout.modules})" for layout in use.layouts]
    said += f"; factors of stacks of experts, how they lie and of how many: {'; '.join(layouts)}" if layouts else ""
    if adapter.before is None:
        return said
    command = "`lora-cli merge BASE ADAPTER --initial INITIAL`"
    return f"{said}; its init ({adapter.initial}) took its first factors off the base, so they are off here: {command}"


def _besides(effects: Effects) -> Iterator[str]:
    """What the merge did to the model besides adding to its weights, a sentence for each."""
    if effects.multiplied:
        yield f"the elements of {effects.multiplied} tensors are multiplied, each by its own number"
    if effects.remade:
        yield f"the rows of {effects.remade} tensors are transformed: rotated, mixed or rescaled"
    for key, rows in islice(effects.rows.items(), _NAMED):
        yield f"{rows} {'row' if rows == 1 else 'rows'} of {code(key)} {'is' if rows == 1 else 'are'} the adapter's"
    for key, (before, after) in islice(effects.resized.items(), _NAMED):
        yield f"{code(key)} has {after} rows; in the base it has {before}"
    for name, key in islice(effects.untied.items(), _NAMED):
        yield f"{code(name)} is a tensor of its own; in the base it is {code(key)}"
    if effects.layers is not None:
        layers = ", ".join(map(str, effects.layers))
        yield f"its {len(effects.layers)} layers are these of the base: {layers}"


def _number(value: float) -> str:
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def code(label: str) -> str:
    """A label as a code span that nothing in it can end: letters, digits, and marks that mean nothing to Markdown."""
    harmless = "".join(
        character if unicodedata.category(character)[0] in "LMN" or character in " ._-/@+=:,()#%~" else "\ufffd"
        for character in label[:200]
    )
    return f"`{harmless.strip() or chr(0xFFFD)}`"
