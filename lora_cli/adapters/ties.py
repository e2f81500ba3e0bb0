"""Which tensors of a model are one: two names, of which its checkpoint stores one."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from lora_cli.adapters.conversions import Conversion, Conversions, Part, conversions
from lora_cli.adapters.spelling import wrapper_of
from lora_cli.checkpoint.tied import EMBEDDINGS, HEADS, may_tie

_LITERAL = re.compile(r"[\w.\\]+")


def ties(config: Mapping[str, Any], keys: Collection[str]) -> dict[str, str]:
    """The names that a checkpoint does not store because its model holds another of its tensors under them.

    The class and the config decide; a pair of which both are stored is none. Of a class that is not known, an output
    head is taken for tied to the only embedding where the config says that it is.

    Args:
        config: The checkpoint's `config.json`.
        keys: Its keys.

    Returns:
        Name, in the checkpoint's own spelling → the key whose tensor it is.
    """
    known = conversions(config)
    if not known.parts:
        return _by_role(config, keys)
    groups: defaultdict[str, list[str]] = defaultdict(list)
    wrapper = wrapper_of(keys)
    bare = [key.removeprefix(wrapper) for key in keys]
    stored = dict(zip(known.for_files(bare).newest(bare), bare, strict=True))
    for alias, source in _pairs(known.parts, stored):
        groups[source].append(alias)
    found = {}
    for source, aliases in groups.items():
        # transformers ties to the first of them that the files have, if it is not the one that the class names.
        first = next((name for name in (source, *aliases) if name in stored), None)
        if first is not None:
            missing = [name for name in (source, *aliases) if name not in stored]
            # Files that have older names have them for what they do not store, too.
            spell = _older if stored[first] != first else _as_it_is
            found.update({wrapper + spell(name, known): wrapper + stored[first] for name in missing})
    return found


def _pairs(parts: Sequence[Part], names: Collection[str]) -> Iterator[tuple[str, str]]:
    """Every pair that a model of these parts ties, as the names are spelled: with the prefix of its backbone or not."""
    for part in parts:
        if not _ties(part):
            continue
        path = f"{part.path}." if part.path else ""
        for alias, source in _numbered(part.facts["ties"].items(), path, names):
            pair = path + alias, path + source
            bare = path + alias.removeprefix(part.prefix), path + source.removeprefix(part.prefix)
            yield bare if not {*pair} & {*names} and {*bare} & {*names} else pair


def _ties(part: Part) -> bool:
    """Whether a part's config says that it ties, by its own field or that of its text model, or by the usual one."""
    answers = part.facts.get("tied")
    if answers is None:
        return False
    inner = part.config.get("text_config")
    said = [level.get("tie_word_embeddings") for level in (inner if isinstance(inner, dict) else {}, part.config)]
    position = [(None, False, True).index(value if isinstance(value, bool) else None) for value in said]
    return bool(answers[position[0] * 3 + position[1] if len(answers) > 3 else position[1]] == "1")


def _numbered(pairs: Iterable[tuple[str, str]], path: str, names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """The pairs of a part, those with `*` once for each number that the names have there."""
    for alias, source in pairs:
        if "*" not in alias:
            yield alias, source
            continue
        pattern = re.compile(r"(\d+)".join(map(re.escape, source.split("*"))))
        for name in names:
            match = pattern.fullmatch(name.removeprefix(path))
            if match:
                pieces = alias.split("*")
                yield pieces[0] + "".join(map("".join, zip(match.groups(), pieces[1:], strict=True))), match[0]


def _as_it_is(name: str, _: Conversions) -> str:
    return name


def _older(name: str, known: Conversions) -> str:
    """The name in files of what the modules call `name`, where no step but plain exchanges of words lies between."""
    found = name
    for step in reversed(known.renamings):
        earlier = _before(step, found)
        if earlier is not None and known.newest([earlier]) == [name]:
            found = earlier
    return found


def _before(step: Conversion, name: str) -> str | None:
    """A name that one step turns into this one; None where the step is no plain exchange of words."""
    if len(step.sources) != 1 or step.scope is not None:
        return None
    source, target = step.sources[0].removeprefix("^"), step.targets[0]
    if not _LITERAL.fullmatch(source) or target not in name:
        return None
    return name.replace(target, source.replace("\\.", "."), 1)


def _by_role(config: Mapping[str, Any], keys: Collection[str]) -> dict[str, str]:
    roles = {key: key.split(".")[-2] for key in keys if key.endswith(".weight")}
    tables = [key for key, role in roles.items() if role in EMBEDDINGS]
    if len(tables) != 1 or {*roles.values()} & HEADS or not may_tie(config):
        return {}
    return {"lm_head.weight": tables[0]}
