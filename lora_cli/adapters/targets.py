"""Which modules of a checkpoint a new adapter is for: presets and patterns, against names and shapes in headers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any, Literal

import yaml

from lora_cli.adapters.orientation import stored_transposed
from lora_cli.adapters.patterns import compile_user_pattern, matches_any
from lora_cli.adapters.resolve import nearest
from lora_cli.checkpoint.checkpoint import Checkpoint, StoredTensor
from lora_cli.checkpoint.quantised import Quantised
from lora_cli.errors import NamesError, UnsupportedError, UsageError

ALL_LINEAR = "all-linear"
"""The preset that needs no list: every matrix but embeddings, heads, routers and experts."""

FLOATING = ("BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2")
"""Storage types that can take a delta, as `surgery.placing.MERGEABLE` has them."""

Role = Literal["linear", "head", "router", "expert"]

_PACKED = (".qweight", ".weight_packed")


@dataclass(frozen=True, slots=True)
class Module:
    """A module of a checkpoint that has a weight.

    Attributes:
        name: Its name.
        weight: The weight.
        role: What it is in the model; presets take linear ones only.
        refusal: Why it cannot take an adapter, or None.
        quantised: How its numbers are quantised, or None.
    """

    name: str
    weight: StoredTensor
    role: Role
    refusal: str | None
    quantised: str | None


@dataclass(frozen=True, slots=True)
class Selected:
    """A module that gets an adapter.

    Attributes:
        module: Its name.
        key: The key of its weight.
        out: Numbers that it gives.
        inner: Numbers that it takes.
        transposed: Its weight is stored (in × out).
    """

    module: str
    key: str
    out: int
    inner: int
    transposed: bool

    @staticmethod
    def of(module: str, weight: StoredTensor, transposed: bool) -> Selected:
        """Read `out` and `inner` off the stored shape."""
        rows, columns = weight.shape
        return Selected(module, weight.key, *((columns, rows) if transposed else (rows, columns)), transposed)


@dataclass(frozen=True)
class Selection:
    """The modules that get an adapter.

    Attributes:
        modules: In the order of the checkpoint.
        notes: What was left out, for people.
    """

    modules: tuple[Selected, ...]
    notes: tuple[str, ...]


def presets() -> tuple[str, ...]:
    """Names of all presets."""
    return (ALL_LINEAR, *_table()["presets"])


def added_heads() -> tuple[str, ...]:
    """Ends of names that modules have in heads which a fine-tune may add to a backbone."""
    return tuple(_table()["added_heads"])


def select(checkpoint: Checkpoint, targets: Sequence[str], exclude: Sequence[str] = ()) -> Selection:
    """Find the modules that patterns mean.

    Args:
        checkpoint: The base.
        targets: Presets, globs on dotted names, or `re:` with a regular expression.
        exclude: The same, for modules to leave out.

    Raises:
        NamesError: A pattern matches nothing, or nothing is left.
        UnsupportedError: A pattern means embeddings only, or quantised weights.
        ShapeError: The base says two things of how a matrix is stored.
        UsageError: No pattern, or a broken one.
    """
    if not targets:
        raise UsageError("No targets given", hint=f"name modules, or one of {', '.join(presets())}")
    modules = modules_of(checkpoint)
    wanted = _hits(targets, modules, checkpoint.label)
    unwanted = {module.name for hits in _hits(exclude, modules, checkpoint.label).values() for module in hits}
    kept = {pattern: [m for m in hits if m.name not in unwanted] for pattern, hits in wanted.items()}
    _refuse(kept, checkpoint.label)
    names = {module.name for hits in kept.values() for module in hits if module.refusal is None}
    if not names:
        raise NamesError("The exclusions leave no module", file=checkpoint.label, found=", ".join(exclude))
    weights = {module.name: module.weight for module in modules if module.name in names}
    transposed = stored_transposed(checkpoint, weights)
    selected = (Selected.of(name, weight, transposed[name]) for name, weight in weights.items())
    return Selection(tuple(selected), tuple(_notes(targets, modules, names | unwanted)))


def modules_of(checkpoint: Checkpoint) -> list[Module]:
    """Every module that has a weight, in the order of the checkpoint."""
    keys = checkpoint.tensors
    parents = {".".join(parts[:at]) for parts in map(_parts, keys) for at, part in enumerate(parts) if part in _EXPERTS}
    quantised = Quantised(checkpoint)
    modules = []
    for key, tensor in keys.items():
        ending = next((ending for ending in (".weight", *_PACKED) if key.endswith(ending)), None)
        if ending is None:
            continue
        name = key.removesuffix(ending)
        reason = f"{key} is packed" if ending in _PACKED else quantised(key)
        modules.append(Module(name, tensor, _role(name, parents), _refusal(name, tensor, reason is not None), reason))
    return modules


_EXPERTS = {"experts"}


def _parts(name: str) -> list[str]:
    return name.split(".")


def _role(name: str, parents: set[str]) -> Role:
    parts, table = _parts(name), _table()
    if _EXPERTS & set(parts[:-1]):
        return "expert"
    if any(part in table["routers"] and ".".join(parts[:at]) in parents for at, part in enumerate(parts)):
        return "router"
    return "head" if _ends_in(name, table["heads"]) or name in table["top_heads"] else "linear"


def _ends_in(name: str, endings: Iterable[str]) -> bool:
    parts = _parts(name)
    return not {".".join(parts[-count:]) for count in (1, 2, 3)}.isdisjoint(endings)


def _refusal(name: str, tensor: StoredTensor, is_quantised: bool) -> str | None:
    if _ends_in(name, _table()["embeddings"]):
        return "an embedding; LoRA on lookup tables is not supported"
    if len(tensor.shape) != 2 or 0 in tensor.shape:
        return f"shape {list(tensor.shape)}; an adapter needs a matrix"
    # A quantised matrix is refused as such: the type that it is packed in says nothing to a person.
    plain = is_quantised or tensor.dtype.name in FLOATING
    return None if plain else f"storage type {tensor.dtype.name} takes no delta"


# Patterns


def _hits(patterns: Sequence[str], modules: Sequence[Module], label: str) -> dict[str, list[Module]]:
    """The modules that each pattern matches; every pattern must match something."""
    found = {}
    for pattern in patterns:
        test = _test(pattern)
        found[pattern] = [module for module in modules if test(module)]
    lost = [pattern for pattern, hits in found.items() if not hits]
    if lost:
        raise NamesError(
            f"{len(lost)} target patterns match no module",
            file=label,
            details=[_lost_words(pattern, modules) for pattern in lost],
            hint="patterns are globs on module names (* within a part, ** across dots), or regular expressions "
            "after re:",
        )
    return found


def _lost_words(pattern: str, modules: Sequence[Module]) -> str:
    if pattern in presets():
        roles = Counter(m.role for m in modules if _named(pattern)(m) and m.role != "linear" and m.refusal is None)
        found = ", ".join(f"{count} of kind {role}" for role, count in roles.items())
        return f"{pattern} (no preset takes what matches: {found})" if found else pattern
    close = nearest(pattern, [module.name for module in modules])
    return f"{pattern} (nearest: {', '.join(close)})" if close else pattern


def _test(pattern: str) -> Callable[[Module], bool]:
    """What a preset or pattern says of a module. Presets pass over what is not plainly linear."""
    named = _named(pattern)
    if pattern in presets():
        return lambda module: _is_plain(module) and named(module)
    return named


def _named(pattern: str) -> Callable[[Module], bool]:
    """What a preset or pattern says of a module's name alone."""
    if pattern == ALL_LINEAR:
        return lambda module: True
    compiled = [compile_user_pattern(text) for text in _table()["presets"].get(pattern, (pattern,))]
    # Keys are what `inspect` shows, so the name of the weight does as well.
    return lambda module: matches_any(compiled, module.name) or matches_any(compiled, f"{module.name}.weight")


def _is_plain(module: Module) -> bool:
    return module.role == "linear" and module.refusal is None


def _refuse(kept: Mapping[str, Sequence[Module]], label: str) -> None:
    """Refuse quantised modules, and patterns that mean nothing but modules that cannot take an adapter."""
    chosen = [module for hits in kept.values() for module in hits if module.refusal is None]
    packed = {module.name: module.quantised for module in chosen if module.quantised}
    if packed:
        raise UnsupportedError(
            f"{len(packed)} targets are quantised",
            file=label,
            details=[f"{name}: {reason}" for name, reason in packed.items()],
            hint="make the adapter for the 16-bit checkpoint that this one was made from",
        )
    refused = {
        module.name: module.refusal
        for hits in kept.values()
        if all(module.refusal for module in hits)
        for module in hits
    }
    if refused:
        raise UnsupportedError(
            "Some targets cannot take an adapter",
            file=label,
            details=[f"{name}: {reason}" for name, reason in refused.items()],
            hint="take these patterns out",
        )


def _notes(targets: Sequence[str], modules: Sequence[Module], settled: set[str]) -> list[str]:
    """What was passed over: presets never take heads, routers and experts, and patterns may match too much."""
    left = [module for module in modules if module.name not in settled]
    by_preset = [_named(pattern) for pattern in targets if pattern in presets()]
    by_name = [_named(pattern) for pattern in targets if pattern not in presets()]
    special = [module for module in left if module.role != "linear" and module.refusal is None]
    roles = Counter(module.role for module in special if any(named(module) for named in by_preset))
    reasons = Counter(module.refusal for module in left if module.refusal and any(named(module) for named in by_name))
    return [
        *(
            f"left out: {count} of kind {role}, which no preset takes; a pattern can name them"
            for role, count in roles.items()
        ),
        *(f"left out: {count} that a pattern matches: {why}" for why, count in reasons.items()),
    ]


@lru_cache(maxsize=1)
def _table() -> Mapping[str, Any]:
    text = (resources.files("lora_cli") / "data" / "targets.yaml").read_text("utf-8")
    table: Mapping[str, Any] = yaml.safe_load(text)
    return table
