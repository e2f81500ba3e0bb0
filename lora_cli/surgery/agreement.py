"""What adapters say of themselves, held against what an undo file says of them, where no base is there to judge."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lora_cli.adapters.adapter import Adapter
from lora_cli.adapters.source import ReadOptions
from lora_cli.checkpoint.checkpoint import StoredTensor
from lora_cli.errors import LoraCliError
from lora_cli.progress import Progress
from lora_cli.surgery.identity import content_digest, contents
from lora_cli.surgery.results import Reference, open_adapters
from lora_cli.surgery.undo.given import replaces
from lora_cli.surgery.undo.undoing import Undoing

_JUDGE = "only --base with the options of the merge can judge that"


def doubts(undoing: Undoing, given: Sequence[Reference], progress: Progress) -> Iterator[str]:
    """Say where the undo file's word is all there is: scales that are not an adapter's own, and what was left out.

    Args:
        undoing: What was planned.
        given: The adapters.
        progress: Hears of downloads.
    """
    for record in undoing.undo.manifest.adapters:
        if record.weight == 0:
            yield f"{record.label}: the merge gave it the weight 0, so nothing of it is in the checkpoint"
    for reference in given:
        try:
            (adapter,) = open_adapters([reference], ReadOptions(), progress)
        except LoraCliError:
            continue  # it has no scale of its own
        yield from _of_adapter(undoing, adapter)


def _of_adapter(undoing: Undoing, adapter: Adapter) -> Iterator[str]:
    terms = [term for edit in undoing.plan.edits for term in edit.terms]
    used = {(tensor.shard.source, tensor.key): t.delta.scale.alpha for t in terms for tensor in t.delta.tensors}
    shards = {tensor.shard.source: tensor.shard for tensor in adapter.tensors}.values()
    every = [StoredTensor(shard, info) for shard in shards for info in shard.header.tensors]
    weights = {record.digest: record.weight for record in undoing.undo.manifest.adapters}
    weight = weights.get(content_digest(contents(every)), 1.0)
    first = [(target, target.delta.tensors[0]) for target in adapter.targets]
    places = [(target, (tensor.shard.source, tensor.key)) for target, tensor in first]
    pairs = [(target.delta.scale.times(weight), used[place]) for target, place in places if place in used]
    other = [(own, there) for own, there in pairs if own != there]
    if other:
        own, there = other[0]
        yield (
            f"{adapter.label}: the merge used scale {there:g} where its config says {own:g} "
            f"({len(other)} of {len(pairs)} modules); {_JUDGE}"
        )
    idle = [target.name for target, place in places if place not in used and not target.may_lack]
    if idle and weight and not adapter.tied and not replaces(undoing.undo.manifest):
        yield (
            f"{adapter.label}: the undo file says nothing of {len(idle)} of its {len(places)} modules, such as "
            f"{min(idle)}, so these are not in the checkpoint; {_JUDGE}"
        )
