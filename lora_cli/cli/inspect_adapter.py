"""How `lora-cli inspect` shows what an adapter holds."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lora_cli.cli.draw import grid, line
from lora_cli.cli.effects import on_base, outputs_words
from lora_cli.cli.text import alike, count, few, number, shape, spans

if TYPE_CHECKING:
    from rich.console import RenderableType

    from lora_cli.surgery.inspection import InspectResult, ModuleInfo

SCALES = 6
"""Different scales that are listed for people."""
ROWS = 12
"""Spans of trained rows that are listed for people."""
FEW = 3
"""Places of one module that are listed."""
MOVED = 4
"""Modules at other places in the base that are told of below the table."""

_KINDS = {
    "lora": ("linear layer", ""),
    "lora-bias": ("bias vector", ""),
    "lora-blocks-a": ("layer", " with a block-diagonal A"),
    "lora-blocks-b": ("layer", " with a block-diagonal B"),
    "lora-conv": ("convolution", ""),
    "lora-embedding": ("embedding", ""),
    "lora-stack": ("stack", " of matrices"),
    "other": ("parameter", ""),
}
"""What modules are called by the kind of their change."""

_DOES = {"gain": "multiplies", "map": "transforms the rows of", "product": "adds to", "sum": "adds to"}
"""What other tuners than LoRA do to parameters."""


def rows(result: InspectResult) -> Iterator[tuple[str, object]]:
    """What sets an adapter apart from plain LoRA on linear layers, and why it cannot be merged."""
    for number_, reason in enumerate(result.refused):
        yield "" if number_ else "no merge", reason
    yield "init", _init(result)
    if result.layers is not None:
        yield "layers", f"{len(result.layers):,}: the stored {few(spans(result.layers).split(', '))}"
    if result.kind == "adapter" and result.tied:
        yield "tied", "of two tied tensors both get what one gets (ensure_weight_tying)"
    yield "modules", _kinds(result.modules, result.adapter_kind)
    for layout in result.layouts:
        yield "experts", f"{count(layout.modules, 'stack')}: {layout.layout}"
    yield "undo", _undo(result.modules)
    yield "whole", _wholes(result.modules)
    for module in result.modules:
        if module.rows is not None:
            yield "rows", f"{len(module.rows):,} of {module.module}: {few(spans(module.rows).split(', '), ROWS)}"
    yield from _left_out(result)


def _init(result: InspectResult) -> str | None:
    if result.initial is None:
        return None
    if result.before is not None:
        return f"{result.initial}: {result.before} was taken off the base"
    return f"{result.initial} changed the base: a merge needs --initial, or that base"


def _kinds(modules: Sequence[ModuleInfo], tuner: str | None) -> str | None:
    """How many modules of which kinds there are, where not all are linear layers; of other tuners what they do."""
    does = Counter(_DOES[module.acts] for module in modules if module.parts and module.acts is not None)
    kinds = Counter(module.kind for module in modules if module.acts is not None and not module.parts)
    lengths = sum(module.magnitude for module in modules)
    named = ((amount, *_KINDS.get(kind, _KINDS["other"])) for kind, amount in kinds.items())
    said = [f"{tuner} {verb} {count(amount, 'parameter')}" for verb, amount in does.items()]
    said += [f"{count(amount, noun)}{more}" for amount, noun, more in named]
    if 0 < lengths < kinds.total():
        said.append(f"{lengths:,} of them with lengths (DoRA)")
    return None if len(said) == 1 and "lora" in kinds else ", ".join(said)


def _undo(modules: Sequence[ModuleInfo]) -> str | None:
    """What an undo file keeps, where that is not little."""
    residual = sum(module.undo == "residual" for module in modules)
    if not residual:
        return None
    which = "" if residual == sum(module.acts is not None for module in modules) else f" for {residual:,} of them"
    return f"the undo file keeps more{which} than it does for LoRA"


def _wholes(modules: Sequence[ModuleInfo]) -> str | None:
    """How many tensors are held whole, and why."""
    kinds = Counter(module.kind for module in modules if module.acts is None and module.rows is None)
    reasons = (f"{amount:,} ({kind.removeprefix('whole tensor (')}" for kind, amount in kinds.items())
    return few(reasons) or None


def _left_out(result: InspectResult) -> Iterator[tuple[str, object]]:
    reasons: defaultdict[str, list[str]] = defaultdict(list)
    for one in result.left_out:
        reasons[one.reason].append(one.tensor)
    for reason, tensors in reasons.items():
        yield "left out", f"{count(len(tensors), 'tensor')}: {reason}"


def strengths(result: InspectResult) -> Iterator[tuple[str, object]]:
    """How strong the modules are, and how many of them the base has."""
    scales = Counter((m.scale, m.scale_source) for m in result.modules if m.scale is not None)
    said = [
        f"{number(scale)} = {source}, {count(amount, 'module')}"
        for (scale, source), amount in scales.items()
        if scale is not None
    ]
    for words in said[:SCALES]:
        yield "scale", words
    yield "", f"and {len(said) - SCALES} more scales" if len(said) > SCALES else None
    lost = [module.module for module in result.modules if module.key is None]
    if len(lost) < len(result.modules):
        yield "base", f"{len(result.modules) - len(lost):,} of {count(len(result.modules), 'name')} found"
        yield "not found", few(lost)
    yield from on_base(result.effects)


def modules(modules: Sequence[ModuleInfo], most: int) -> Iterator[RenderableType]:
    """A line for each module, and its place in the base where that is not plain: in a column, or below for a few."""
    moved = [module for module in modules[:most] if _is_moved(module)]
    column = len(moved) > max(MOVED, len(modules[:most]) // 2)
    # Without a base the shape of a change may be open; then there are those of what it is made of.
    shapes = "tensors" if any(_is_open(module) for module in modules[:most]) else "shape"
    heads = ["module", "rank", "alpha", "scale", shapes, "type", *(["base key"] if column else [])]
    yield grid(heads, [_row(module)[: len(heads)] for module in modules[:most]], right=(1, 2, 3), named=(0, 6))
    if moved and not column:
        yield line()
        yield from (line(f"{module.module} goes to {_places(module)}") for module in moved)


def _is_moved(module: ModuleInfo) -> bool:
    if any(place.outputs for place in module.places) or len(module.places) > 1:
        return True
    return module.key not in (None, module.module, f"{module.module}.weight")


def _is_open(module: ModuleInfo) -> bool:
    return module.shape is None and bool(module.parts)


def _shape(module: ModuleInfo) -> str | None:
    """Of an open change the shapes of its tensors, and how many have each: 16×4 (2), 4×8 (2)."""
    if module.shape is not None:
        return shape(module.shape)
    sizes = Counter(map(shape, module.parts.values()))
    return few((each if amount == 1 else f"{each} ({amount})" for each, amount in sizes.items()), 3) or None


def _row(module: ModuleInfo) -> list[object]:
    whole = module.acts is None and module.rows is None
    said = "whole" if whole else None if module.rows is None else count(len(module.rows), "row")
    return [
        module.module if said is None else f"{module.module}: {said}",
        module.rank,
        None if module.alpha is None else number(module.alpha),
        None if module.scale is None else number(module.scale),
        _shape(module),
        module.dtype,
        _places(module),
    ]


def _places(module: ModuleInfo) -> str | None:
    if not _is_moved(module):
        return None  # its own name
    if len(module.places) > FEW and not any(place.outputs for place in module.places):
        return f"{count(len(module.places), 'tensor')}, {alike([place.key for place in module.places])}"
    said = [
        " ".join([place.key, *([outputs_words([place.outputs])] if place.outputs else [])]) for place in module.places
    ]
    return few(said, FEW) or module.key
