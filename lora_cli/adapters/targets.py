"""Which modules an adapter is for: presets, patterns and tests, against the modules of a file or of a live model."""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lora_cli.adapters.modules import Kind, Module, describe, parents_of_experts, table
from lora_cli.adapters.orientation import stored_transposed
from lora_cli.adapters.patterns import compile_user_pattern, matches_any
from lora_cli.adapters.resolve import nearest
from lora_cli.checkpoint.checkpoint import Checkpoint
from lora_cli.checkpoint.quantised import Quantised
from lora_cli.errors import NamesError, UnsupportedError, UsageError

ALL_LINEAR = "all-linear"
"""The preset that needs no list: every matrix but embeddings, heads, routers and experts."""

Target = str | re.Pattern[str] | Callable[[Module], bool]
"""A preset, a glob on dotted names, `re:` with a regular expression; a compiled expression that is to match the whole
name of a module; or a function that says of a module whether it is meant."""

_Test = Callable[[Module], bool]
_PACKED = (".qweight", ".weight_packed")
_ENDS = 12
"""Ends of names in a message."""
_FEW = 3
"""Names in a note."""
_COMMA = "one pattern each: repeat --target or --exclude, or give a list"
_PATTERNS = "patterns are globs on module names (* within a part, ** across dots), or regular expressions after re:"


@dataclass(frozen=True)
class Chosen:
    """The modules that targets mean.

    Attributes:
        modules: In the order in which they were given.
        notes: What was left out, for people.
    """

    modules: tuple[Module, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Selected:
    """A module that gets an adapter.

    Attributes:
        module: Its name.
        key: The key of its weight.
        kind: What it computes.
        shape: The shape of the weight as it is stored.
        out: Rows of the matrix that the factors multiply to: numbers that the module gives.
        inner: Columns of that matrix: numbers that a linear module takes, entries of an embedding, and for a
            convolution in / groups times the size of its kernel.
        transposed: A linear module's weight is stored (in × out).
    """

    module: str
    key: str
    kind: Kind
    shape: tuple[int, ...]
    out: int
    inner: int
    transposed: bool

    @staticmethod
    def of(module: Module, transposed: bool = False) -> Selected:
        """Read `out` and `inner` off the stored shape."""
        first, rest = module.shape[0], math.prod(module.shape[1:])
        turned = is_turned(module.kind, transposed)
        out, inner = (rest, first) if turned else (first, rest)
        return Selected(module.name, module.key, module.kind, module.shape, out, inner, transposed)


@dataclass(frozen=True)
class Selection:
    """The modules of a checkpoint that get an adapter.

    Attributes:
        modules: In the order of the checkpoint.
        notes: What was left out, for people.
    """

    modules: tuple[Selected, ...]
    notes: tuple[str, ...]


def is_turned(kind: Kind, transposed: bool) -> bool:
    """Whether a weight is stored (in × out): a linear one that is transposed, and every embedding."""
    return transposed or kind == "embedding"


def factor_shapes(selected: Selected, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of A and B as PEFT stores them.

        linear      (rank, in)                       (out, rank)
        embedding   (rank, entries)                  (dim, rank)
        conv        (rank, in / groups, kernel…)     (out, rank, 1…)

    Raises:
        UnsupportedError: A module of another kind.
    """
    if selected.kind in ("linear", "embedding"):
        return (rank, selected.inner), (selected.out, rank)
    if selected.kind == "conv":
        return (rank, *selected.shape[1:]), (selected.out, rank, *(1 for _ in selected.shape[2:]))
    raise UnsupportedError("One pair of factors is not for a module of this kind", tensor=selected.module)


def presets() -> tuple[str, ...]:
    """Names of all presets."""
    return (ALL_LINEAR, *table()["presets"])


def added_heads() -> tuple[str, ...]:
    """Ends of names that modules have in heads which a fine-tune may add to a backbone."""
    return tuple(table()["added_heads"])


def select(checkpoint: Checkpoint, targets: Sequence[Target], exclude: Sequence[Target] = ()) -> Selection:
    """Find the modules of a checkpoint that targets mean; see `choose`.

    Raises:
        ShapeError: The base says two things of how a matrix is stored.
        LoraCliError: As `choose`.
    """
    chosen = choose(modules_of(checkpoint), targets, exclude, label=checkpoint.label)
    matrices = {m.name: checkpoint.tensors[m.key] for m in chosen.modules if m.kind == "linear"}
    transposed = stored_transposed(checkpoint, matrices)
    return Selection(tuple(Selected.of(m, transposed.get(m.name, False)) for m in chosen.modules), chosen.notes)


def modules_of(checkpoint: Checkpoint) -> list[Module]:
    """Every module that has a weight, in the order of the checkpoint.

    A weight of three to five dimensions is a convolution's, unless its name says that it is a stack of experts.
    """
    keys = checkpoint.tensors
    beside_experts = parents_of_experts(keys)
    quantised = Quantised(checkpoint)
    modules = []
    for key, tensor in keys.items():
        ending = next((ending for ending in (".weight", *_PACKED) if key.endswith(ending)), None)
        if ending is None:
            continue
        reason = f"{key} is packed" if ending in _PACKED else quantised(key)
        name = key.removesuffix(ending)
        modules.append(
            describe(name, key, tensor.shape, tensor.dtype.name, quantised=reason, beside_experts=beside_experts)
        )
    return modules


def choose(
    modules: Sequence[Module], targets: Sequence[Target], exclude: Sequence[Target] = (), *, label: str
) -> Chosen:
    """Find the modules that targets mean.

    Args:
        modules: All modules, as `describe` makes them.
        targets: What to take. Presets take linear modules that are no heads, routers or experts; a pattern takes what
            it names, whichever kind and role that has.
        exclude: The same, for modules to leave out.
        label: What the model is called, for messages.

    Raises:
        NamesError: A target matches nothing, or nothing is left.
        UnsupportedError: A target means nothing but modules that cannot take an adapter, or quantised weights.
        UsageError: No target, or a broken pattern.
    """
    if not targets:
        raise UsageError("No targets given", hint=f"name modules, or one of {', '.join(presets())}")
    wanted = _hits(targets, modules, label, "target pattern")
    unwanted = {module.name for hits in _hits(exclude, modules, label, "exclusion") for module in hits}
    kept = [[module for module in hits if module.name not in unwanted] for hits in wanted]
    _refuse(kept, label)
    names = {module.name for hits in kept for module in hits if module.refusal is None}
    if not names:
        raise NamesError("The exclusions leave no module", file=label, found=", ".join(map(target_words, exclude)))
    taken = tuple(module for module in modules if module.name in names)
    return Chosen(taken, tuple(_notes(targets, modules, names | unwanted)))


def target_words(target: Target) -> str:
    """A target as a person would name it."""
    if isinstance(target, str):
        return target
    if isinstance(target, re.Pattern):
        return f"compiled {target.pattern}"
    return f"function {getattr(target, '__qualname__', type(target).__qualname__)}"


def _hits(targets: Sequence[Target], modules: Sequence[Module], label: str, what: str) -> list[list[Module]]:
    """The modules that each target matches; every one must match something."""
    tests = [_test(target) for target in targets]
    found = [[module for module in modules if test(module)] for test in tests]
    lost = [target for target, hits in zip(targets, found, strict=True) if not hits]
    if lost:
        raise NamesError(
            f"1 {what} matches no module" if len(lost) == 1 else f"{len(lost)} {what}s match no module",
            file=label,
            expected=_ends_words(modules),
            details=[_lost_words(target, modules) for target in lost],
            hint=_COMMA if any(isinstance(target, str) and "," in target for target in lost) else _PATTERNS,
        )
    return found


def _ends(modules: Sequence[Module]) -> list[str]:
    """Last parts of the names of modules that can take an adapter."""
    return list(dict.fromkeys(module.name.rpartition(".")[2] for module in modules if module.refusal is None))


def _ends_words(modules: Sequence[Module]) -> str | None:
    ends = _ends(modules)
    more = f" and {len(ends) - _ENDS} more" if len(ends) > _ENDS else ""
    return f"names that end in {', '.join(ends[:_ENDS])}{more}" if ends else None


def _lost_words(target: Target, modules: Sequence[Module]) -> str:
    words = target_words(target)
    if _is_preset(target):
        roles = Counter(m.role for m in modules if _named(target)(m) and _is_special(m))
        found = ", ".join(f"{count} of kind {role}" for role, count in roles.items())
        return f"{words} (no preset takes what matches: {found})" if found else words
    close = _near(target, modules) if isinstance(target, str) else ()
    return f"{words} (nearest: {', '.join(close)})" if close else words


def _near(target: str, modules: Sequence[Module]) -> Sequence[str]:
    """What a person may have meant: the end of a name or a preset by another spelling, or a whole name."""
    close = difflib.get_close_matches(target, [*_ends(modules), *presets()], n=2)
    return close or nearest(target, [module.name for module in modules])


def _is_preset(target: Target) -> bool:
    return isinstance(target, str) and target in presets()


def _test(target: Target) -> _Test:
    """What a target says of a module. Presets pass over what is not plainly linear."""
    named = _named(target)
    return (lambda module: module.ordinary and named(module)) if _is_preset(target) else named


def _named(target: Target) -> _Test:
    """What a target says of a module, whatever the module is in the model."""
    if isinstance(target, re.Pattern):
        return lambda module: target.fullmatch(module.name) is not None
    if not isinstance(target, str):
        return target
    if target == ALL_LINEAR:
        return lambda module: True
    compiled = [compile_user_pattern(text) for text in table()["presets"].get(target, (target,))]
    # Keys are what `inspect` shows, so the name of the weight does as well.
    return lambda module: matches_any(compiled, module.name) or matches_any(compiled, f"{module.name}.weight")


def _is_special(module: Module) -> bool:
    """Whether it is a matrix that could take an adapter, and that presets leave for what it is in the model."""
    return module.kind == "linear" and module.role != "plain" and module.refusal is None


def _refuse(kept: Sequence[Sequence[Module]], label: str) -> None:
    """Refuse quantised modules, and targets that mean nothing but modules that cannot take an adapter."""
    chosen = [module for hits in kept for module in hits if module.refusal is None]
    packed = {module.name: module.quantised for module in chosen if module.quantised}
    if packed:
        raise UnsupportedError(
            f"{len(packed)} targets are quantised",
            file=label,
            details=[f"{name}: {reason}" for name, reason in packed.items()],
            hint="make the adapter for the 16-bit checkpoint that this one was made from",
        )
    refused = {
        module.name: module.refusal for hits in kept if all(module.refusal for module in hits) for module in hits
    }
    if refused:
        raise UnsupportedError(
            "Some targets cannot take an adapter",
            file=label,
            details=[f"{name}: {reason}" for name, reason in refused.items()],
            hint="take these patterns out",
        )


def _notes(targets: Sequence[Target], modules: Sequence[Module], settled: set[str]) -> list[str]:
    """What was passed over: presets never take heads, routers and experts, and patterns may match too much."""
    left = [module for module in modules if module.name not in settled]
    by_preset = [_named(target) for target in targets if _is_preset(target)]
    by_name = [_named(target) for target in targets if not _is_preset(target)]
    special: dict[str, list[str]] = {}
    for module in left:
        if _is_special(module) and any(named(module) for named in by_preset):
            special.setdefault(module.role, []).append(module.name)
    reasons = Counter(module.refusal for module in left if module.refusal and any(named(module) for named in by_name))
    return [
        *(
            f"left out: {len(names)} of kind {role} ({', '.join(names[:_FEW])}{', …' if len(names) > _FEW else ''}), "
            f"which no preset takes; a pattern can name {'it' if len(names) == 1 else 'them'}"
            for role, names in special.items()
        ),
        *(f"left out: {count} that a pattern matches: {why}" for why, count in reasons.items()),
    ]
