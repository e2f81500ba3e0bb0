"""What transformers knows of the names in a checkpoint: tables of one release, made by scripts/make_conversions.py.

A checkpoint keeps the names that its model's modules had when it was first published; transformers renames them when it
loads it ("conversions": patterns and what takes their place, some of them with an operation on the tensors). Adapters
have the names of modules. The tables say the same without transformers.

The patterns are matched by Python's own engine, for they look ahead and behind, which RE2 cannot. That is safe: they
come with this package, none repeats what repeats itself, and names of more than `LONGEST` characters stay as they are.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib import resources
from typing import Any

LONGEST = 500
"""Characters of the longest name that is looked at."""

_LEGACY = "legacy"
"""Conversions that come after those of every class."""


@dataclass(frozen=True, slots=True)
class Part:
    """A model inside another one, or the whole.

    Attributes:
        path: Its name among the modules; empty for the whole.
        kind: Its class.
        config: The level of the config that is about it.
    """

    path: str
    kind: str
    config: Mapping[str, Any]

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the tables say about its class."""
        facts: Mapping[str, Any] = tables()["classes"].get(self.kind, {})
        return facts

    @property
    def prefix(self) -> str:
        """The name under which a class with a head keeps it, with its dot."""
        prefix = str(self.facts.get("prefix", ""))
        return f"{prefix}." if prefix else ""

    def parts(self) -> Iterator[Part]:
        """It, and all models inside it, from the outside in."""
        yield self
        for path, kind, *level in self.facts.get("parts", ()):
            inner = self.config.get(level[0]) if level else self.config
            config = inner if isinstance(inner, dict) else {}
            below = Part(f"{self.path}.{path}" if self.path else path, _kind_of(kind, config if level else {}), config)
            yield from below.parts()

    @property
    def experts(self) -> Mapping[str, Sequence[str]]:
        """Modules in it whose stacks of experts lie otherwise than usual: their names, with `*` for numbers → how."""
        experts: Mapping[str, Sequence[str]] = self.facts.get("experts", {})
        return experts

    @property
    def is_decoder(self) -> bool:
        """Whether models of its type are trained alone, to go on with a text."""
        return self.facts.get("type") in tables()["decoders"]


@dataclass(frozen=True, slots=True)
class Conversion:
    """One step from names in files to names of modules.

    Attributes:
        sources: Patterns that a name is searched for; the longest that fits decides.
        targets: What takes the place of what was found: the first, or for steps that belong together the one of the
            same position.
        operations: What is done to the tensors, by name and arguments; empty for a mere renaming.
        scope: Where in the model, for one that is not about all of it; with the prefix that may stand before it.
        together: The others count only where something fits the first.
        offset: Added to the number that is found.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    operations: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    scope: tuple[str, str] | None = None
    together: bool = False
    offset: int = 0
    pattern: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pattern", compiled(self.sources))

    def __call__(self, name: str) -> tuple[str, int] | None:
        """The new name and which of the patterns was found; None for a name that is not concerned."""
        start = self._start(name) if len(name) <= LONGEST else None
        found = self.pattern.search(name[start:]) if start is not None else None
        return None if found is None else self._renamed(name, start, found)

    def numbered(self, name: str) -> tuple[str, int, int | None] | None:
        """The same, and the number that stands for `*`, such as that of an expert; None where there is none."""
        start = self._start(name) if len(name) <= LONGEST else None
        found = self.pattern.search(name[start:]) if start is not None else None
        if found is None:
            return None
        numbers = _NUMBER.findall(found[0])
        return (*self._renamed(name, start, found), int(numbers[-1]) if numbers else None)

    def _renamed(self, name: str, start: int | None, found: re.Match[str]) -> tuple[str, int]:
        group = str(found.lastgroup)  # the outermost that has matched, and these are alternatives
        position = int(group[1:])
        new = self.targets[position if self.together else 0]
        if "\\1" in new:
            inner = found[self.pattern.groupindex[group] + 1]
            new = new.replace("\\1", str(int(inner) + self.offset) if self.offset else inner)
        return name[:start] + found.string.replace(found[0], new, 1), position

    def _start(self, name: str) -> int | None:
        """Where in a name the part begins that the patterns are for."""
        for path in self.scope or ("",):
            if name.startswith(path):
                return len(path)
        return None

    def concerns_none(self, lines: str) -> bool:
        """Whether it surely concerns none of these names, one a line; asked once before it is asked for each."""
        return self.scope is None and re.search(self.pattern.pattern, lines, re.MULTILINE) is None


@lru_cache(maxsize=1024)
def compiled(sources: tuple[str, ...]) -> re.Pattern[str]:
    """One expression for patterns as transformers writes them: the longest first, each up to the end of a word."""
    branches = []
    for position, source in sorted(enumerate(sources), key=lambda item: -len(item[1])):
        body = source.replace("*.", r".*\.")
        ends = r"(?!\w)" if re.search(r"[a-zA-Z0-9]$", body) else ""
        branches.append(f"(?P<g{position}>{body}{ends})")
    return re.compile("|".join(branches))


@dataclass(frozen=True)
class Conversions:
    """All steps for the model that a config describes.

    Attributes:
        parts: The model and the models in it; empty for one that the tables do not know.
        renamings: In order; each one that fits a name is applied.
        converters: With operations on tensors; of these the first that fits, after all renamings.
    """

    parts: tuple[Part, ...] = ()
    renamings: tuple[Conversion, ...] = ()
    converters: tuple[Conversion, ...] = ()

    @property
    def kind(self) -> str:
        """The model's class."""
        return self.parts[0].kind if self.parts else ""

    def experts(self, module: str) -> Collection[str] | None:
        """How a module with stacks of experts has them, where it is not as usual; None where its class is unknown.

        Usual are matrices (out × in), and of gate and up together first all rows of the gate. The words:
        `is_transposed` (transformers says so, and PEFT asks), `inputs_first` (they are (in × out)), and `alternating`
        (gate and up in turn).
        """
        starred = _NUMBER.sub("*", module)
        for part in self.parts:
            for pattern, lying in part.experts.items():
                if starred == pattern or starred.endswith(f".{pattern}"):
                    return lying
        unknown = {part.path.rpartition(".")[2] for part in self.parts if not part.kind}
        return () if self.parts and unknown.isdisjoint(module.split(".")) else None

    def for_files(self, names: Sequence[str]) -> Conversions:
        """The same, with the steps that belong together decided by the names of a checkpoint."""
        current, kept = list(names), []
        for step in self.renamings:
            if not step.together or any((found := step(name)) and found[1] == 0 for name in current):
                kept.append(step)
                current = renamed(current, (step,))
        return replace(self, renamings=tuple(kept))

    def newest(self, names: Iterable[str]) -> list[str]:
        """Names as modules are called now; those that are new already stay."""
        listed = list(names)
        if not self.renamings and not self.converters:
            return listed
        facts = self.parts[0].facts
        stay, new = set(facts.get("stay", ())), renamed(listed, self.renamings)
        if stay:
            new = [old if _NUMBER.sub("*", old) in stay else name for old, name in zip(listed, new, strict=True)]
        return self._settled(new, set(facts["tops"])) if "tops" in facts else new

    def _settled(self, names: Sequence[str], tops: Collection[str]) -> list[str]:
        """Names with the backbone's prefix where their class has a head, and without where it has none."""
        prefix = self.parts[0].prefix
        backbone = next((part.facts.get("tops", ()) for part in self.parts if f"{part.path}." == prefix), ())
        added, taken = {*backbone} - {*tops}, {*tops} - {*backbone}
        settled = []
        for name in names:
            top, _, rest = name.partition(".")
            if f"{top}." == prefix:
                settled.append(rest if rest.partition(".")[0] in taken else name)
            else:
                settled.append(prefix + name if top in added else name)
        return settled


_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def renamed(names: Iterable[str], renamings: Sequence[Conversion]) -> list[str]:
    """Names after every renaming that concerns them, in order."""
    current = list(names)
    lines = _lines(current)
    for step in renamings:
        if step.concerns_none(lines):
            continue
        current = [found[0] if (found := step(name)) else name for name in current]
        lines = _lines(current)
    return current


def _lines(names: Iterable[str]) -> str:
    return "\n".join(name for name in names if len(name) <= LONGEST)


def conversions(config: Mapping[str, Any]) -> Conversions:
    """The conversions of the model that `config.json` describes; none where the tables do not know it.

    Each class has its own conversions, or those of its model type, and these also hold for what is inside it; a part
    of another type has its own, for names below it alone. (transformers, `get_model_conversion_mapping`.)
    """
    kind = architecture(config)
    if kind is None:
        return Conversions()
    parts = tuple(Part("", kind, config).parts())
    steps = [*_steps(parts), *_rows(_LEGACY, None)]
    return Conversions(
        parts,
        tuple(step for step in steps if not step.operations),
        tuple(step for step in steps if step.operations),
    )


def transposed_experts(config: Mapping[str, Any], module: str) -> bool | None:
    """Whether a module with stacks of experts has `is_transposed` set, for which PEFT has its factors the other way.

    Args:
        config: The base's `config.json`.
        module: Name of the module, such as `model.layers.0.mlp.experts`, whatever stands before it.

    Returns:
        None where the tables do not know the class of the model, or that of a part of it.
    """
    lying = conversions(config).experts(module)
    return None if lying is None else "is_transposed" in lying


def architecture(config: Mapping[str, Any]) -> str | None:
    """The class of the model that `config.json` describes, if the tables know it or its model type."""
    named = config.get("architectures")
    kind = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else None
    base = tables()["bases"].get(str(config.get("model_type")))
    if kind is None or kind in tables()["classes"]:
        return kind or base
    # A class that the tables leave out has nothing to be told; of other people's nothing is known.
    return kind if base is not None and "auto_map" not in config else None


def _kind_of(kind: str, config: Mapping[str, Any]) -> str:
    """The class of a part: the usual one, or what its own config makes of it."""
    told, usual = config.get("model_type"), tables()["classes"].get(kind, {}).get("type")
    if not isinstance(told, str) or usual is None or told == usual:
        return kind
    mapping = "decoders" if tables()["decoders"].get(usual) == kind else "bases"
    return str(tables()[mapping].get(told, ""))


def _steps(parts: Sequence[Part]) -> Iterator[Conversion]:
    seen: defaultdict[str, list[str]] = defaultdict(list)
    whole = parts[0].facts.get("prefix", "")
    for part in parts:
        model_type = part.facts.get("type", "")
        by_class = part.kind in tables()["conversions"]
        name = part.kind if by_class else model_type
        claimed = [*seen[part.kind], *([] if by_class else seen[model_type])]
        if name not in tables()["conversions"] or any(_below(part.path, path) for path in claimed):
            continue
        scope = None
        if part.path:
            path = part.path.removeprefix(whole).removeprefix(".")
            inner = f"{path}." if path else ""
            scope = (f"{whole}.{inner}" if whole else inner, inner)
        yield from _rows(name, scope)
        seen[part.kind].append(part.path)
        if not by_class:
            seen[model_type].append(part.path)


def _below(path: str, above: str) -> bool:
    return not above or path.startswith(f"{above}.")


def _rows(name: str, scope: tuple[str, str] | None) -> Iterator[Conversion]:
    found = tables()["conversions"][name]
    for row in tables()["conversions"][found] if isinstance(found, str) else found:
        yield Conversion(
            tuple(row["from"]),
            tuple(row["to"]),
            tuple((operation, arguments) for operation, arguments in row.get("by", ())),
            scope,
            row.get("together", False),
            row.get("offset", 0),
        )


@lru_cache(maxsize=1)
def tables() -> Mapping[str, Any]:
    """The tables, read once."""
    content: Mapping[str, Any] = json.loads(
        (resources.files("lora_cli") / "data" / "conversions.json").read_text("utf-8")
    )
    return content
