"""Taking adapters out by subtraction, where there is no undo file.

What the merge rounded away is lost, but for most weights only one value can have been there, and that is proved for
each of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from lora_cli.checkpoint.checkpoint import Checkpoint
from lora_cli.checkpoint.undo_file import UNDO_FILE
from lora_cli.errors import LoraCliError, UnsupportedError, UsageError, WrongInputError
from lora_cli.progress import SILENT, Progress
from lora_cli.surgery.budget import Budget
from lora_cli.surgery.changing import kind_words
from lora_cli.surgery.effects import lasting, recalled
from lora_cli.surgery.placing import PlanOptions
from lora_cli.surgery.plan import Plan
from lora_cli.surgery.planning import KEPT, plan
from lora_cli.surgery.receipt import beside, find_receipt
from lora_cli.surgery.results import Reference, open_adapters


@dataclass(frozen=True)
class Undecided:
    """A tensor whose base is not known for every weight.

    Attributes:
        key: Its name.
        elements: Weights in it.
        exact: Weights for which only one base value merges to what is there: these are proved.
        undecided: Weights that may differ from the base by a step or so, because several base values merge to the same.
        impossible: Weights that no base value merges to: a sign of another adapter, scale or tool.
    """

    key: str
    elements: int
    exact: int
    undecided: int
    impossible: int


def plan_subtraction(
    merged: Checkpoint, adapters: Sequence[Reference], options: PlanOptions, progress: Progress
) -> Plan:
    """Plan to subtract adapters.

    Raises:
        UsageError: No adapter, or another storage type is asked for.
        WrongInputError: The receipt says that others were merged.
        UnsupportedError: The receipt says that the merge changed the storage type.
    """
    if not adapters:
        raise UsageError(
            "Name the adapter that was merged", hint="lora-cli unmerge MERGED ADAPTER -o OUT --approximate"
        )
    if options.dtype != "keep":
        raise UsageError("Taking an adapter out keeps the storage types", found=f"dtype {options.dtype}")
    receipt = find_receipt(merged.path, merged.looks) or {}
    if receipt.get("operation") != "merge":
        receipt = {}
    _refuse_other_type(merged, receipt)
    opened = open_adapters(adapters, options.read, progress)
    made = plan(merged, opened, options, operation="unmerge")
    _refuse_other_scales(merged, receipt, made)
    _refuse_lost(merged, made)
    stays = left_behind(merged)
    warning = f"the merge did more than add to weights, and the output keeps it: {'; '.join(stays)}"
    return replace(made, warnings=(*made.warnings, *([warning] if stays else [])))


class Beyond(NamedTuple):
    """What a merge does that no subtraction comes near.

    Attributes:
        words: A sentence without its period.
        where: The tensors, or the adapters.
    """

    words: str
    where: tuple[str, ...]


def beyond_subtraction(made: Plan) -> Beyond | None:
    """Say what a merge does that no subtraction comes near: lengths that are replaced, layers that are repeated."""
    alone = {edit.key: kind_words(term.delta) for edit in made.edits for term in edit.terms if term.alone or term.seen}
    if alone:
        kinds = sorted({*alone.values()})
        does = "replaced the lengths of" if kinds == ["DoRA"] else "made something else of"
        return Beyond(f"{', '.join(kinds)} {does} these weights", tuple(alone))
    repeats = tuple(adapter.label for adapter in made.opened if adapter.layers)
    return Beyond("The adapter repeated layers of the base", repeats) if repeats else None


def can_subtract(merged: Checkpoint, adapters: Sequence[Reference]) -> bool:
    """Whether subtracting may come near to the base, as far as the receipt and the adapters, if any, tell."""
    receipt = find_receipt(merged.path, merged.looks) or {}
    effects = recalled(receipt.get("effects")) if receipt.get("operation") == "merge" else None
    if effects and (effects.lengths or effects.multiplied or effects.remade or effects.layers is not None):
        return False
    try:
        if adapters:
            plan_subtraction(merged, adapters, PlanOptions(), SILENT)
    except UnsupportedError:
        return False
    except LoraCliError:
        return True  # with options that are not known here it may be planned
    return True


def _refuse_lost(merged: Checkpoint, made: Plan) -> None:
    """Refuse what no subtraction comes near."""
    beyond = beyond_subtraction(made)
    if beyond is None:
        return
    there = beside(merged.path, UNDO_FILE).is_file()
    raise UnsupportedError(
        beyond.words,
        file=merged.label,
        details=beyond.where,
        hint="leave out --approximate: the undo file is there and has what they were"
        if there
        else "only the undo file of the merge has what they were: name it with --undo, without --approximate",
    )


def kept(made: Plan) -> tuple[str, ...]:
    """Tensors that the adapter had replaced whole, and that stay as they are."""
    return tuple(entry.key for entry in made.ledger if entry.reason == KEPT and entry.key)


def left_behind(merged: Checkpoint) -> tuple[str, ...]:
    """What the merge did besides adding, as its receipt tells, and no subtraction takes back: a phrase for each."""
    receipt = find_receipt(merged.path, merged.looks) or {}
    effects = recalled(receipt.get("effects")) if receipt.get("operation") == "merge" else None
    return tuple(lasting(effects)) if effects else ()


def prove_subtraction(made: Plan, budget: Budget, progress: Progress) -> tuple[Undecided, ...]:
    """Count what is proved of each tensor; those that are proved in full are left out."""
    from lora_cli.surgery.proof import prove

    undecided = tuple(
        Undecided(key, count.elements, count.exact, count.undecided, count.impossible)
        for key, count in prove(made, budget, progress)
        if count.exact < count.elements
    )
    impossible = sum(proof.impossible for proof in undecided)
    if impossible:
        progress.warn(
            f"{impossible} weights cannot come from a lora-cli merge of this adapter at this weight: "
            "another adapter, another scale, or a tool that rounds differently"
        )
    return undecided


def _refuse_other_type(merged: Checkpoint, receipt: Mapping[str, Any]) -> None:
    """Refuse what the receipt says was stored in another type before the merge: no proof would hold."""
    options = receipt.get("options")
    dtype = options.get("dtype") if isinstance(options, dict) else None
    if dtype not in (None, "keep"):
        raise UnsupportedError(
            "The merge changed the storage type, so the base cannot be found by subtracting",
            file=merged.label,
            found=f"--dtype {dtype} in its receipt",
        )


def _refuse_other_scales(merged: Checkpoint, receipt: Mapping[str, Any], made: Plan) -> None:
    """Refuse adapters of other scales than those that the receipt says were merged: every proof would be false."""
    recorded = receipt.get("adapters")
    uses = [use for use in recorded if isinstance(use, dict)] if isinstance(recorded, list) else []
    said: Counter[float] = Counter()
    for scale, modules in (pair for use in uses for pair in _recorded_scales(use)):
        said[scale] += modules
    planned: Counter[float] = Counter()
    for used in (scale for use in made.adapters for scale in use.scales):
        planned[used.scale] += used.modules
    if uses and said != planned:
        what = ", ".join(f"{use.get('label')} at weight {use.get('weight')}" for use in uses)
        raise WrongInputError(
            "These adapters and weights are not the ones of the merge",
            file=merged.label,
            expected=f"{what}, as its receipt says",
            hint="name the same adapters with the same --weight",
        )


def _recorded_scales(use: Mapping[str, Any]) -> list[tuple[float, int]]:
    scales = use.get("scales")
    found = [item for item in scales if isinstance(item, dict)] if isinstance(scales, list) else []
    pairs = [(item.get("scale"), item.get("modules")) for item in found]
    return [(float(s), n) for s, n in pairs if isinstance(s, int | float) and isinstance(n, int)]
