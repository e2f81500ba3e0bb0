"""Which adapters these are, by content: for undo files and receipts, and so that none is merged twice unawares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from blake3 import blake3

from lora_cli.checkpoint.checkpoint import StoredTensor
from lora_cli.checkpoint.digests import tensor_content
from lora_cli.checkpoint.manifest import AdapterRecord, recorded
from lora_cli.errors import WrongInputError
from lora_cli.surgery.plan import Plan


def adapter_records(plan: Plan, *, embed: bool) -> tuple[AdapterRecord, ...]:
    """Return what is recorded of each adapter of a merge, reading all of them once."""
    return tuple(_adapter_record(plan, number, embed=embed) for number in range(len(plan.opened)))


def _adapter_record(plan: Plan, number: int, *, embed: bool) -> AdapterRecord:
    adapter = plan.opened[number]
    tensors = {tensor.key: tensor for tensor in adapter.tensors}
    whole = blake3()
    content = {}
    for key, tensor in sorted(tensors.items()):
        with tensor.shard.source.open() as reader:
            content[key] = tensor_content(tensor, reader)
        whole.update(f"{key}\n{content[key]}\n".encode())
    own = {shard.source for shard in plan.checkpoint.shards}
    carried = any(tensor.shard.source in own for tensor in tensors.values())
    return AdapterRecord(
        label=recorded(adapter.label),
        digest=whole.hexdigest(),
        factors={key: content[key] for key in sorted(factors_of(plan, number))},
        held="in the base" if carried else "embedded" if embed else "apart",
    )


def factors_of(plan: Plan, number: int) -> dict[str, StoredTensor]:
    """The tensors of an adapter that are factors of deltas, by their names in its file."""
    terms = (term for edit in plan.edits for term in edit.terms if term.adapter == number)
    return {tensor.key: tensor for term in terms for tensor in term.delta.tensors}


def refuse_again(plan: Plan, records: Sequence[AdapterRecord], receipt: Mapping[str, Any] | None) -> None:
    """Refuse an adapter that the base's receipt says is in it already.

    Raises:
        WrongInputError: With the adapter's label.
    """
    merged = dict(_merged_before(receipt))
    for said in records:
        if said.digest in merged:
            raise WrongInputError(
                "This adapter is merged into the base already",
                file=said.label,
                found=f"{merged[said.digest]} in the receipt of {plan.base}",
                hint="to apply it once more on purpose: --again",
            )


def _merged_before(receipt: Mapping[str, Any] | None) -> Iterator[tuple[str, str]]:
    """Digest and label of every adapter that a receipt, or an earlier one within it, says was merged.

    The receipt of an unmerge names adapters too, which are no longer there.
    """
    while isinstance(receipt, Mapping) and receipt.get("operation") == "merge":
        adapters = receipt.get("adapters")
        for said in adapters if isinstance(adapters, list) else ():
            if isinstance(said, dict) and isinstance(said.get("digest"), str):
                yield said["digest"], str(said.get("label"))
        receipt = receipt.get("earlier")
