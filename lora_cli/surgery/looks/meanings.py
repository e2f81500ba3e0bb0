"""Whether parts of adapters mean another thing to the tuner that made them: where its choice is not in the file."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from lora_cli.adapters.formula import Formula
from lora_cli.surgery.plan import Plan
from lora_cli.surgery.readers import Readers, open_readers

_NAMED = 3
"""Modules that are named of all that are in doubt."""


def meanings_doubted(plan: Plan) -> Iterator[str]:
    """Say for each adapter of which modules a method doubts what the file means, and what to do."""
    found: defaultdict[tuple[int, str], dict[str, None]] = defaultdict(dict)
    with open_readers() as readers:
        for term in (term for edit in plan.edits for term in edit.terms):
            if isinstance(term.delta, Formula) and (words := _doubt(term.delta, readers)):
                found[term.adapter, words][term.name] = None
    for (position, words), modules in found.items():
        named = ", ".join(list(modules)[:_NAMED])
        more = f" and {len(modules) - _NAMED} more" if len(modules) > _NAMED else ""
        yield f"{plan.opened[position].label}: in {named}{more} {words}"


def _doubt(formula: Formula, readers: Readers) -> str | None:
    asked = {name: readers.load(formula.parts[name]) for name in formula.method.doubted if name in formula.parts}
    return formula.method.doubt(asked, formula.settings) if asked else None
