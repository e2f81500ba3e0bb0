"""Whether a checkpoint was made from another base than the one it is held against."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lora_cli.surgery.plan import Plan
from lora_cli.surgery.receipt import find_receipt

if TYPE_CHECKING:
    from lora_cli.checkpoint.checkpoint import Checkpoint
    from lora_cli.surgery.verify import Difference

_NEARLY_ALL = 0.9
"""Share of the matrices that no adapter changes which, if they are others, are those of another base."""

_FEWEST = 2
"""One that is another may have been trained by itself."""


def another_base(plan: Plan, candidate: Checkpoint, different: Sequence[Difference]) -> str | None:
    """Say in one sentence that the base is another one; None where the tensors do not say so.

    Only matrices count: norms and biases that were never trained are the same in all models of a kind.

    Args:
        plan: What should be there.
        candidate: What is there; its receipt may name its base.
        different: Tensors that differ.
    """
    wrong = {one.key: one.elements or 0 for one in different if one.what == "values"}
    kept = [
        edit
        for edit in plan.edits
        if edit.operation in ("keep", "rename", "cast") and len(edit.shape) > 1 and edit.key in candidate.tensors
    ]
    other = [edit for edit in kept if 2 * wrong.get(edit.key, 0) > math.prod(edit.shape)]
    if len(other) < max(_FEWEST, _NEARLY_ALL * len(kept)):
        return None
    words = f"{len(other):,} of {len(kept):,} matrices that no adapter changes are not those of {plan.base}"
    said = _said(plan, find_receipt(candidate.path) or {})
    return f"this looks like a merge into another base: {words}{said}"


def _said(plan: Plan, receipt: Mapping[str, Any]) -> str:
    """What the receipt says of the base, where that is not the one that is given."""
    base = receipt.get("base")
    label = base.get("label") if isinstance(base, dict) else None
    if receipt.get("operation") != "merge" or not isinstance(base, dict) or not isinstance(label, str):
        return ""
    digests = _digests(base)
    own = _digests(find_receipt(plan.checkpoint.path) or {})
    if any(digests[name] != own[name] for name in digests.keys() & own.keys()):
        return f"; its receipt names {label}, with other digests"
    return f"; its receipt names {label}" if label != plan.base else ""


def _digests(said: Mapping[str, Any]) -> dict[str, str]:
    digests = said.get("digests")
    return digests if isinstance(digests, dict) else {}
