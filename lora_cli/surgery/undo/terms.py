"""Terms of a delta as an undo file records them: all that their arithmetic needs, and nothing of names in adapters."""

from __future__ import annotations

from collections.abc import Callable

from lora_cli.adapters.adapter import Delta, LowRank, LowRankBias, Scale
from lora_cli.checkpoint.checkpoint import StoredTensor
from lora_cli.checkpoint.manifest import TermRecord
from lora_cli.errors import MalformedFileError, UnsupportedError
from lora_cli.surgery.plan import MERGEABLE, Contribution

Find = Callable[[int, str], StoredTensor]
"""Finds a factor by the position of its adapter and its name."""


def record(term: Contribution) -> TermRecord:
    """Return what an undo file keeps of a term."""
    delta = term.delta
    return TermRecord(
        kind=delta.kind,
        adapter=term.adapter,
        tensors=tuple(tensor.key for tensor in delta.tensors),
        scale=delta.scale.times(term.weight),
        swapped=isinstance(delta, LowRank) and delta.swapped,
        transposed=term.transposed,
    )


def recall(said: TermRecord, key: str, find: Find) -> Contribution:
    """Return the term that was recorded.

    Args:
        said: What the undo file says.
        key: The tensor that it changes, for messages.
        find: Finds its factors.

    Raises:
        UnsupportedError: The kind is not known here.
        MalformedFileError: It has other factors than its kind.
    """
    tensors = [find(said.adapter, name) for name in said.tensors]
    return Contribution(said.adapter, key, _delta(said, tensors, key), 1.0, said.transposed)


def _delta(said: TermRecord, tensors: list[StoredTensor], key: str) -> Delta:
    scale = Scale(said.scale, None, rslora=False, source="undo file")
    shapes = [tensor.shape for tensor in tensors]
    numbers = all(tensor.dtype.name in MERGEABLE for tensor in tensors)
    if said.kind == "lora" and numbers and list(map(len, shapes)) == [2, 2]:
        if shapes[0][said.swapped] == shapes[1][not said.swapped]:
            return LowRank(tensors[0], tensors[1], scale, said.swapped)
    elif said.kind == "lora-bias" and numbers and list(map(len, shapes)) == [1]:
        return LowRankBias(tensors[0], scale)
    if said.kind not in ("lora", "lora-bias"):
        raise UnsupportedError(
            "The undo file has a kind of delta that is not known here",
            tensor=key,
            found=said.kind,
            hint="update lora-cli",
        )
    found = ", ".join(f"{tensor.dtype.name} {list(tensor.shape)}" for tensor in tensors)
    raise MalformedFileError("The undo file is damaged", tensor=key, expected=f"factors of {said.kind}", found=found)
