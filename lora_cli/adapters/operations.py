"""What transformers does to the tensors of a checkpoint when it loads them, followed by rows instead of numbers.

Each operation is done to descriptions: which outputs of which stored tensors lie where. So a parameter that a model
cuts out of a stored tensor, or puts together from some, is a list of places. It may be a stack of matrices, one for
each expert of a layer: then outputs are those of each matrix. (transformers, `core_model_loading.py`.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

from lora_cli.adapters.region import Place, Region, Run

SPLITTING = "ErnieFuseAndSplitTextVisionExperts"
"""The operation that puts the first experts of a list into one tensor, and the rest into another one."""

STACKING = {"MergeModulelist", SPLITTING}
"""Operations that put the experts of a layer, stored one by one, into one tensor."""


class NoPlaceError(Exception):
    """An operation after which a parameter is not some outputs of stored tensors; the text says what it is."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Outputs of one stored tensor, one after the other, and where they are in a tensor that is being made.

    Attributes:
        key: The stored tensor.
        shape: Its shape, or that of each of its matrices.
        begin: The first of the outputs.
        rows: Where each lies in what is being made, or in each of its matrices.
        step: From one of the outputs to the next.
        turned: Whether rows and columns have changed places.
        matrix: Which matrix of what is being made it belongs to; None for all, or where that is no stack.
        stack: Whether the stored tensor is a stack of matrices.
    """

    key: str
    shape: tuple[int, ...]
    begin: int
    rows: tuple[Run, ...]
    step: int = 1
    turned: bool = False
    matrix: int | None = None
    stack: bool = False

    @property
    def of(self) -> int:
        """How many outputs the stored tensor has."""
        if not self.shape:
            return 0
        return self.shape[-1] if self.turned else self.shape[0]

    @property
    def count(self) -> int:
        """How many outputs."""
        return sum(len(range(*run)) for run in self.rows)

    @property
    def whole(self) -> bool:
        """Whether it is the stored tensor as it is, maybe turned."""
        return (self.begin, self.rows, self.step) == (0, ((0, self.of, 1),), 1)

    @property
    def stacked(self) -> bool:
        """Whether what is being made is a stack."""
        return self.stack or self.matrix is not None


Pieces = tuple[Piece, ...]
Operation = tuple[str, Mapping[str, Any]]
"""A name and its arguments."""
Tensors = dict[str, tuple[Pieces, ...]]


def stored(key: str, shape: tuple[int, ...]) -> Pieces:
    """A tensor as it is stored."""
    return (Piece(key, shape, 0, ((0, shape[0] if shape else 0, 1),)),)


def placed(pieces: Pieces) -> tuple[Place, ...]:
    """Where a tensor that is made of these lies."""
    alone = len({piece.matrix for piece in pieces}) == len(pieces)
    return tuple(
        Place(piece.key, None if alone and piece.whole else _region(piece), piece.turned, piece.matrix)
        for piece in pieces
    )


def _region(piece: Piece) -> Region:
    last = piece.begin + (piece.count - 1) * piece.step
    return _known_region((piece.begin, last + 1), piece.of, piece.rows, piece.step)


@lru_cache(maxsize=1024)
def _known_region(outputs: tuple[int, int], of: int, rows: tuple[Run, ...], step: int) -> Region:
    # Those of thousands of experts are a few.
    return Region(outputs, of, rows, step)


def followed(
    operations: Sequence[Operation],
    tensors: Mapping[str, Sequence[Pieces]],
    targets: Sequence[str],
    config: Mapping[str, Any],
) -> dict[str, Pieces]:
    """Do some operations to what is stored.

    Args:
        operations: Names and arguments, in order.
        tensors: Pattern → the stored tensors that it found; of experts, in their order and none left out.
        targets: Patterns of what comes out.
        config: The model's.

    Returns:
        Target → what it is made of.

    Raises:
        NoPlaceError: A target is not made of outputs.
    """
    current: Tensors = {pattern: tuple(found) for pattern, found in tensors.items()}
    for name, arguments in operations:
        if name not in _DONE:
            raise NoPlaceError(f"the base stores it in another form ({name})")
        current = _DONE[name](current, targets, arguments, config)
    if len(current) == 1 and len(targets) == 1:
        current = {targets[0]: next(iter(current.values()))}
    return {target: _only({target: current[target]}) for target in targets}


def _only(tensors: Mapping[str, Sequence[Pieces]]) -> Pieces:
    found = [pieces for several in tensors.values() for pieces in several]
    if len(found) != 1:
        raise NoPlaceError("the base stores several tensors for it")
    return found[0]


def _along(pieces: Pieces, arguments: Mapping[str, Any], name: str) -> Pieces:
    """The same, where an operation goes along the outputs: the first dimension, or the second one of a stack."""
    dimension = arguments.get("dim", 0)
    if dimension == 1:
        pieces = _as_stack(pieces)
    if dimension != int(all(piece.stacked for piece in pieces)):
        raise NoPlaceError(f"the base stores it in another form ({name})")
    return pieces


def _as_stack(pieces: Pieces) -> Pieces:
    """A stored tensor of three dimensions as a stack of matrices."""
    if len(pieces) != 1 or pieces[0].stacked or len(pieces[0].shape) != 3:
        return pieces
    piece, shape = pieces[0], pieces[0].shape[1:]
    return (replace(piece, shape=shape, rows=((0, shape[0], 1),), stack=True),)


# Operations: from what there is, patterns of what comes out, arguments and config


def _concatenate(current: Tensors, targets: Sequence[str], arguments: Mapping[str, Any], config: Any) -> Tensors:
    found = [_along(pieces, arguments, "Concatenate") for several in current.values() for pieces in several]
    return {targets[0]: (_joined(found),)}


def _chunk(current: Tensors, targets: Sequence[str], arguments: Mapping[str, Any], config: Any) -> Tensors:
    cuts = _cut(_along(_only(current), arguments, "Chunk"), len(targets))
    return {target: (cut,) for target, cut in zip(targets, cuts, strict=True)}


def _permute(current: Tensors, targets: Sequence[str], arguments: Mapping[str, Any], config: Any) -> Tensors:
    wanted = arguments.get("permute_layer_names")
    return {
        key: (_rotary(found, arguments, config),) if not wanted or any(w in key for w in wanted) else found
        for key, found in current.items()
    }


def _interleave(current: Tensors, targets: Sequence[str], arguments: Mapping[str, Any], config: Any) -> Tensors:
    inverse = arguments.get("inverse", False)
    lying = {key: _along(_only({key: found}), arguments, "Interleave") for key, found in current.items()}
    return {key: (_dealt(_plain(pieces), 1, inverse=inverse),) for key, pieces in lying.items()}


def _transpose(current: Tensors, targets: Sequence[str], arguments: Mapping[str, Any], config: Any) -> Tensors:
    sides = {arguments.get("dim0", 0), arguments.get("dim1", 1)}
    pieces = _only(current)
    pieces = _as_stack(pieces) if sides == {1, 2} else pieces
    fits = all(piece.whole and len(piece.shape) == 2 for piece in pieces)
    if not fits or sides != ({1, 2} if all(piece.stacked for piece in pieces) else {0, 1}):
        raise NoPlaceError("the base stores its columns")
    turned = (replace(piece, turned=not piece.turned) for piece in pieces)
    return {targets[0]: (tuple(replace(piece, rows=((0, piece.of, 1),)) for piece in turned),)}


def _merge(current: Tensors, targets: Sequence[str], arguments: Mapping[str, Any], config: Any) -> Tensors:
    if arguments.get("dim", 0) != 0:
        raise NoPlaceError("the base stores the experts of this layer one by one")
    return {pattern: (_stack(found),) for pattern, found in current.items()}


def _split_and_merge(current: Tensors, targets: Sequence[str], arguments: Mapping[str, Any], config: Any) -> Tensors:
    """The experts of each list in equal parts, one for each target; in each the lists one below the other."""
    made: Tensors = {}
    for number, target in enumerate(targets):
        parts = []
        for found in current.values():
            size = -(-len(found) // len(targets))
            parts.append(_stack(found[number * size : (number + 1) * size]))
        made[target] = (_joined(parts),)
    return made


_DONE: Mapping[str, Callable[[Tensors, Sequence[str], Mapping[str, Any], Mapping[str, Any]], Tensors]] = {
    "Chunk": _chunk,
    "Concatenate": _concatenate,
    "Interleave": _interleave,
    "MergeModulelist": _merge,
    "PermuteForRope": _permute,
    "Transpose": _transpose,
    SPLITTING: _split_and_merge,
}


def _stack(found: Sequence[Pieces]) -> Pieces:
    """Tensors as the matrices of a stack, in their order."""
    if not found or not all(len(pieces) == 1 and not pieces[0].stacked and pieces[0].shape for pieces in found):
        raise NoPlaceError("the base stores the experts of this layer in another form")
    if len({pieces[0].shape for pieces in found}) > 1:
        raise NoPlaceError("the base stores experts of several sizes in this layer")
    # Not with `replace`, which takes several times as long: a model may have tens of thousands of experts.
    return tuple(Piece(p.key, p.shape, p.begin, p.rows, p.step, p.turned, n) for n, (p,) in enumerate(found))


def _joined(tensors: Iterable[Pieces]) -> Pieces:
    """One below the other; of stacks matrix by matrix."""
    made: list[Piece] = []
    rows = 0
    matrices: set[frozenset[int | None]] = set()
    for pieces in tensors:
        made += [
            Piece(p.key, p.shape, p.begin, _moved(p.rows, rows), p.step, p.turned, p.matrix, p.stack) for p in pieces
        ]
        first = pieces[0].matrix
        rows += sum(piece.count for piece in pieces if piece.matrix == first)
        matrices.add(frozenset(piece.matrix for piece in pieces))
    if len(matrices) > 1:
        raise NoPlaceError("the base stores different numbers of experts in this layer")
    return tuple(made)


@lru_cache(maxsize=1024)
def _moved(rows: tuple[Run, ...], by: int) -> tuple[Run, ...]:
    return tuple((begin + by, end + by, step) for begin, end, step in rows)


def _plain(pieces: Pieces) -> Piece:
    """The only piece, where it is one run of outputs."""
    if len(pieces) != 1 or len(pieces[0].rows) != 1 or pieces[0].rows[0][2] != 1 or not pieces[0].shape:
        raise NoPlaceError("the base stores its rows in turn with those of another one")
    return pieces[0]


def _cut(pieces: Pieces, number: int) -> list[Pieces]:
    """Equal parts, the last of them maybe smaller, as `torch.chunk` gives them."""
    if len(pieces) != 1 or not pieces[0].shape:
        raise NoPlaceError("the base stores its rows in turn with those of another one")
    piece = pieces[0]
    size = -(-piece.count // number)
    cuts = [min(size * position, piece.count) for position in range(number + 1)]
    if cuts[-2] == cuts[-1]:
        raise NoPlaceError(f"the base stores {piece.count} rows for {number} of its kind")
    return [(_part(piece, range(a, b)),) for a, b in pairwise(cuts)]


def _part(piece: Piece, wanted: range) -> Piece:
    try:
        region = _region(piece).cut(wanted)
    except ValueError as error:
        raise NoPlaceError("the base stores its rows in turn with those of another one") from error
    assert region is not None  # noqa: S101 (a piece has all of its rows)
    return replace(piece, begin=region.outputs[0], rows=region.rows, step=region.step)


def _rotary(tensors: Sequence[Pieces], arguments: Mapping[str, Any], config: Mapping[str, Any]) -> Pieces:
    """Rows of each head in the order of rotary embeddings by halves, from that by pairs."""
    inner = config.get(arguments.get("subconfig_key") or "", config)
    heads = inner.get("num_attention_heads") if isinstance(inner, dict) else None
    piece = _plain(_only({"": tensors}))
    if type(heads) is not int or heads < 1 or piece.count % (2 * heads):
        raise NoPlaceError("the base's config does not say how many heads its rows are of")
    return _dealt(piece, heads, inverse=arguments.get("inverse", False))


def _dealt(piece: Piece, groups: int, *, inverse: bool) -> Pieces:
    """Rows that lie in pairs, the first ones of all pairs before the second ones, within each group; or back."""
    size, left = divmod(piece.count, groups)
    if size % 2 or left:
        raise NoPlaceError(f"the base stores {piece.count} rows for pairs")
    half = size // 2
    runs: list[Run] = []
    for start in range(0, piece.count, size):
        if inverse:
            runs += [(start, start + size, 2), (start + 1, start + size, 2)]
        else:
            runs += [(start + i, start + size, half) for i in range(half)]
    return (replace(piece, rows=tuple(runs)),)
