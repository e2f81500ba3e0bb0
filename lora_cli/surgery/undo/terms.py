"""Terms of a delta as an undo file records them: all that their arithmetic needs, and nothing of names in adapters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from lora_cli.adapters.adapter import Delta, Scale
from lora_cli.adapters.deltas import (
    BlocksKind,
    LowRank,
    LowRankBias,
    LowRankBlocks,
    LowRankKernel,
    LowRankStack,
    MatrixKind,
    is_block_pair,
    is_kernel_pair,
    is_matrix_pair,
    is_stack_pair,
)
from lora_cli.adapters.expert_deltas import LowRankExperts
from lora_cli.adapters.expert_layout import Packing, Side, sizes
from lora_cli.adapters.formula import Formula, Method
from lora_cli.adapters.region import Region
from lora_cli.adapters.tuners import METHODS
from lora_cli.checkpoint.checkpoint import StoredTensor
from lora_cli.checkpoint.manifest import TermRecord
from lora_cli.errors import MalformedFileError, UnsupportedError
from lora_cli.surgery.edit import MERGEABLE, Contribution, may_be_factor

Find = Callable[[int, str], StoredTensor]
"""Finds a factor by the position of its adapter and its name."""


_PARTS = 16
"""More tensors than any parameter is stored in."""


@dataclass(frozen=True, slots=True)
class Most:
    """What no parameter that lies in a checkpoint has more of; a forged manifest must not make anybody compute more.

    Attributes:
        elements: Numbers.
        side: Outputs, or inputs.
    """

    elements: int
    side: int

    @staticmethod
    def of(shapes: Iterable[tuple[int, ...]]) -> Most:
        """Say it of a checkpoint whose tensors have these shapes."""
        found = list(shapes)
        return Most(sum(map(math.prod, found)), _PARTS * max((side for shape in found for side in shape), default=0))

    def allows(self, method: Method, said: TermRecord) -> bool:
        """Whether a parameter, and the largest beside it that the settings speak of, may lie there."""
        largest = method.among({}, [(self.side, self.side)]) if method.together else {}
        beside = (said.settings.get(name) for name in largest)
        return math.prod(said.shape) <= self.elements and all(
            isinstance(size, int) and size <= self.side for size in beside
        )


def record(term: Contribution) -> TermRecord:
    """Return what an undo file keeps of a term."""
    delta = term.delta
    return TermRecord(
        kind=delta.kind,
        adapter=term.adapter,
        tensors=tuple(tensor.key for tensor in delta.tensors if tensor is not delta.magnitude),
        scale=delta.scale.times(term.weight),
        swapped=_is_swapped(delta),
        transposed=term.transposed,
        outputs=_outputs(term.region) if term.region else (),
        rows=term.region.rows if term.region else (),
        blocks=delta.blocks if isinstance(delta, LowRankBlocks) else 0,
        matrix=term.matrix,
        at=term.at,
        count=0 if term.at is None else term.count or 0,
        **_more(delta),
    )


def _outputs(region: Region) -> tuple[int, ...]:
    """Which outputs of the stored tensor a region is; the step only where there is one."""
    return (*region.outputs, region.of, *([region.step] if region.step != 1 else []))


def _is_swapped(delta: Delta) -> bool:
    if isinstance(delta, LowRankExperts):
        return delta.side == "rows"
    return isinstance(delta, LowRank | LowRankKernel) and delta.swapped


def _more(delta: Delta) -> dict[str, Any]:
    """What is kept of a stack or a formula besides."""
    if isinstance(delta, LowRankExperts):
        return {"layout": delta.packing, "shape": (delta.experts, *delta.shape)}
    if not isinstance(delta, Formula):
        return {}
    return {
        "parts": tuple(name for name in delta.method.parts if name in delta.parts),
        "settings": dict(delta.settings),
        "shape": delta.parameter,
    }


def recall(said: TermRecord, key: str, shape: tuple[int, ...], find: Find, most: Most | None = None) -> Contribution:
    """Return the term that was recorded.

    Args:
        said: What the undo file says.
        key: The tensor that it changes, for messages.
        shape: That tensor's shape.
        find: Finds its factors.
        most: What the checkpoint has; that tensor alone if missing.

    Raises:
        UnsupportedError: The kind is not known here.
        MalformedFileError: It has other factors than its kind.
    """
    tensors = [find(said.adapter, name) for name in said.tensors]
    delta = _delta(said, tensors, key, most or Most.of([shape]))
    count = _count(said, delta, key)
    region = _region(said, delta, key, shape)
    return Contribution(said.adapter, key, delta, 1.0, said.transposed, region, said.matrix, said.at, count)


def _count(said: TermRecord, delta: Delta, key: str) -> int | None:
    """How many matrices the stored tensor is a stack of. A whole stack is for one of as many."""
    one_of_delta = said.matrix is None or (delta.stack is not None and 0 <= said.matrix < delta.stack)
    one_of_stored = said.count == 0 if said.at is None else 0 <= said.at < said.count
    alike = said.at is None or said.matrix is not None or delta.stack is None
    if not (one_of_delta and one_of_stored and alike):
        raise MalformedFileError("The undo file is damaged", tensor=key, expected="a matrix of a stack")
    return said.count or (delta.stack if said.matrix is None else None)


def _region(said: TermRecord, delta: Delta, key: str, shape: tuple[int, ...]) -> Region | None:
    """The outputs that a term was for; a manifest may say anything, so nothing is counted before it is bounded."""
    if not said.outputs and not said.rows:
        return None
    outputs = delta.shape[0]
    bounded = all(abs(number) <= outputs for run in said.rows for number in run) and len(said.rows) <= outputs
    try:
        begin, end, of, *steps = said.outputs
        (step,) = steps or (1,)
        bounded = bounded and max(of, step) <= max(shape, default=0)
        region = Region((begin, end), of, said.rows, step) if bounded else None
    except ValueError:
        region = None
    runs = (range(*run) for run in said.rows)
    if region is None or not all(0 <= row < outputs for run in runs if run for row in (run[0], run[-1])):
        raise MalformedFileError(
            "The undo file is damaged", tensor=key, expected=f"a part of {outputs} outputs", found=str(said.outputs)
        )
    return region


def _delta(said: TermRecord, tensors: list[StoredTensor], key: str, most: Most) -> Delta:
    scale = Scale(said.scale, None, rslora=False, source="undo file")
    method = METHODS.get(said.kind)
    if method is None and said.kind not in _KINDS:
        raise UnsupportedError(
            "The undo file has a kind of delta that is not known here",
            tensor=key,
            found=said.kind,
            hint="update lora-cli",
        )
    delta = _recalled(method, said, tensors, scale) if method and most.allows(method, said) else None
    if method is None and all(tensor.dtype.name in MERGEABLE for tensor in tensors):
        delta = _KINDS[said.kind](said, tensors, scale)
    if delta is None:
        found = ", ".join(f"{tensor.dtype.name} {list(tensor.shape)}" for tensor in tensors)
        raise MalformedFileError(
            "The undo file is damaged", tensor=key, expected=f"factors of {said.kind}", found=found
        )
    return delta


def _recalled(method: Method, said: TermRecord, tensors: Sequence[StoredTensor], scale: Scale) -> Delta | None:
    """The formula of a method, if tensors, settings and shape are such that it is one."""
    named = len({*said.parts}) == len(said.parts) == len(tensors) and {*said.parts} <= {*method.parts}
    if not (named and said.shape and min(said.shape) > 0 and method.preimages):
        return None
    parts = dict(zip(said.parts, tensors, strict=True))
    shapes = {name: tensor.shape for name, tensor in parts.items()}
    if method.problem(shapes, said.settings, said.shape):
        return None
    formula = Formula(method, parts, scale, said.settings, said.shape, said.transposed)
    return formula if all(may_be_factor(tensor, formula) for tensor in tensors) else None


def _matrix(said: TermRecord, tensors: Sequence[StoredTensor], scale: Scale) -> Delta | None:
    if len(tensors) != 2:
        return None
    a, b = (tensor.shape[::-1] if said.swapped else tensor.shape for tensor in tensors)
    kind: MatrixKind = "lora" if said.kind == "lora" else "lora-embedding"
    return LowRank(tensors[0], tensors[1], scale, said.swapped, kind) if is_matrix_pair(a, b) else None


def _blocks(said: TermRecord, tensors: Sequence[StoredTensor], scale: Scale) -> Delta | None:
    kind: BlocksKind = "lora-blocks-a" if said.kind == "lora-blocks-a" else "lora-blocks-b"
    fits = len(tensors) == 2 and is_block_pair(tensors[0].shape, tensors[1].shape, kind, said.blocks)
    return LowRankBlocks(tensors[0], tensors[1], scale, kind, said.blocks) if fits else None


def _kernel(said: TermRecord, tensors: Sequence[StoredTensor], scale: Scale) -> Delta | None:
    if len(tensors) != 2:
        return None
    a, b = (tensor.shape for tensor in tensors)
    fits = is_kernel_pair(a, b[::-1]) and len(b) == 2 if said.swapped else is_kernel_pair(a, b)
    return LowRankKernel(tensors[0], tensors[1], scale, said.swapped) if fits else None


def _stack(said: TermRecord, tensors: Sequence[StoredTensor], scale: Scale) -> Delta | None:
    if said.layout:
        return _experts(said, tensors, scale)
    fits = len(tensors) == 2 and is_stack_pair(tensors[0].shape, tensors[1].shape)
    return LowRankStack(tensors[0], tensors[1], scale) if fits else None


def _experts(said: TermRecord, tensors: Sequence[StoredTensor], scale: Scale) -> Delta | None:
    packing = next((word for word in get_args(Packing) if word == said.layout), None)
    if packing is None or len(tensors) != 2 or len(said.shape) != 3:
        return None
    a, b = tensors
    experts, *matrix = said.shape
    if sizes(packing, a.shape, b.shape, experts) is None:
        return None
    side: Side = "rows" if said.swapped else "columns"
    delta = LowRankExperts(a, b, scale, packing, experts, side, said.transposed)
    return delta if delta.shape == (matrix[0], matrix[1]) else None


def _bias(said: TermRecord, tensors: Sequence[StoredTensor], scale: Scale) -> Delta | None:
    fits = len(tensors) == 1 and len(tensors[0].shape) == 1 and tensors[0].shape != (0,)
    return LowRankBias(tensors[0], scale) if fits else None


_KINDS: Mapping[str, Callable[[TermRecord, Sequence[StoredTensor], Scale], Delta | None]] = {
    "lora": _matrix,
    "lora-embedding": _matrix,
    "lora-blocks-a": _blocks,
    "lora-blocks-b": _blocks,
    "lora-conv": _kernel,
    "lora-stack": _stack,
    "lora-bias": _bias,
}
"""Kind → what makes a delta of that kind; None for factors that are none."""
