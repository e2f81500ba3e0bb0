"""Which adapters these are, by content: for undo files and receipts, and so that none is merged twice unawares."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from blake3 import blake3

from lora_cli.checkpoint.checkpoint import StoredTensor
from lora_cli.checkpoint.digests import tensor_content
from lora_cli.checkpoint.manifest import AdapterRecord, recorded
from lora_cli.errors import WrongInputError
from lora_cli.surgery.plan import Plan
from lora_cli.surgery.readers import open_readers

BEGINNING = "beginning"
"""What the receipt calls an adapter as it was before training; the others have no role."""


def adapter_records(plan: Plan, *, embed: bool) -> tuple[AdapterRecord, ...]:
    """Return what is recorded of each adapter of a merge, reading all of them once."""
    return tuple(_adapter_record(plan, number, embed=embed) for number in range(len(plan.opened)))


def _adapter_record(plan: Plan, number: int, *, embed: bool) -> AdapterRecord:
    adapter = plan.opened[number]
    own = {shard.source for shard in plan.checkpoint.shards}
    carried = any(tensor.shard.source in own for tensor in adapter.tensors)
    shards = {tensor.shard.source: tensor.shard for tensor in adapter.tensors}.values()
    every = [StoredTensor(shard, info) for shard in shards for info in shard.header.tensors]
    content = contents(adapter.tensors if carried else every)
    return AdapterRecord(
        label=recorded(adapter.label),
        digest=content_digest(content),
        factors={key: content[key] for key in sorted(factors_of(plan, number))},
        weight=plan.adapters[number].weight,
        held="in the base" if carried else "embedded" if embed else "apart",
    )


def contents(tensors: Iterable[StoredTensor]) -> dict[str, str]:
    """What each tensor is (see `digests.tensor_content`), by its name, reading each of them once."""
    with open_readers() as readers:
        return {tensor.key: tensor_content(tensor, readers.of(tensor)) for tensor in tensors}


def content_digest(content: Mapping[str, str]) -> str:
    """Return the digest of an adapter: of the names of all tensors in its file, and of what they are."""
    whole = blake3()
    for key, said in sorted(content.items()):
        whole.update(f"{key}\n{said}\n".encode())
    return whole.hexdigest()


def factors_of(plan: Plan, number: int) -> dict[str, StoredTensor]:
    """The tensors of an adapter that are factors of deltas, by their names in its file."""
    terms = (term for edit in plan.edits for term in edit.terms if term.adapter == number)
    return {tensor.key: tensor for term in terms for tensor in term.delta.tensors}


def refuse_again(plan: Plan, records: Sequence[AdapterRecord], receipt: Mapping[str, Any] | None) -> None:
    """Refuse an adapter that the base's receipt says is in it already, or that is given twice.

    Raises:
        WrongInputError: With the adapter's label.
    """
    hint = "to apply it once more on purpose: --again"
    there = {said["digest"]: f"{said['label']} in the receipt of {plan.base}" for said in merged_before(receipt)}
    given: dict[str, str] = {}
    for said, use, adapter in zip(records, plan.adapters, plan.opened, strict=True):
        if use.weight == 0 or adapter.beginning:
            continue
        if said.digest in there:
            found = there[said.digest]
            raise WrongInputError(
                "This adapter is merged into the base already", file=said.label, found=found, hint=hint
            )
        if said.digest in given:
            found = f"the same tensors as {given[said.digest]}"
            raise WrongInputError("This adapter is given twice", file=said.label, found=found, hint=hint)
        given[said.digest] = said.label


def merged_before(receipt: Mapping[str, Any] | None) -> list[dict[str, str]]:
    """Label and digest of every adapter that a receipt says is in a checkpoint, those of earlier merges first.

    The receipt of an exact unmerge names adapters too, which are no longer there. What adapters were before training
    is taken off with each of them, and others may have begun from the same.
    """
    if receipt is None:
        return []
    found = _listed(receipt.get("earlier"))
    if receipt.get("operation") == "merge":
        found += _listed(receipt.get("adapters"))
    return found


def _listed(adapters: object) -> list[dict[str, str]]:
    said = [one for one in adapters if isinstance(one, dict)] if isinstance(adapters, list) else []
    merged = [one for one in said if one.get("weight") != 0 and one.get("role") != BEGINNING]
    there = [one for one in merged if isinstance(one.get("digest"), str)]
    return [{"label": str(one.get("label")), "digest": one["digest"]} for one in there]
