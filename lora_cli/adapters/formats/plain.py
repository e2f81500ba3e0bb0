"""Plain safetensors files of factors: pairs `X.lora_A[.weight]`/`X.lora_B[.weight]`, or `X.A`/`X.B`.

Both layouts occur in the wild: A (rank × in) with B (out × rank), and A (in × rank) with B (rank × out). The shapes of
the factors say which one it is, and those of the base how the matrix is stored. Of a convolution A is a kernel of
`rank` outputs, and B a kernel of size 1 or a matrix. Of a stack of matrices, such as those of experts, both have three
dimensions (see `expert_layout`), and the parameter is what stands before `.lora_A`.

Tensors that are no factors are parameters that were trained whole, as LoRA libraries save them beside the factors: the
base's own names decide what they are. The scale comes from a config beside the file, from header metadata, or from the
user; it is never assumed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from lora_cli.adapters.adapter import Adapter, Delta, Replacement, Scale, Target
from lora_cli.adapters.deltas import LowRank, LowRankKernel, is_kernel_pair
from lora_cli.adapters.expert_deltas import OpenExperts
from lora_cli.adapters.expert_layout import ranks_of
from lora_cli.adapters.expert_sides import Told
from lora_cli.adapters.formats.pairs import Pair, check_pairs
from lora_cli.adapters.formats.peft_experts import PARTS, is_stack
from lora_cli.adapters.peft_config import refuse_set_fields
from lora_cli.adapters.source import CONFIG_FILE, AdapterSource, ReadOptions
from lora_cli.adapters.strength import LARGEST, check_alpha
from lora_cli.errors import SAVE_AGAIN, MalformedFileError, MissingScaleError, ShapeError

NAME = "plain"

_FACTOR = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<table>embedding_)?)?(?P<side>[AB])(?:\.(?:default|weight|default\.weight))?",
    re.DOTALL,
)
_PREFIX = "base_model.model."
_ALPHA_NAMES = ("lora_alpha", "alpha")
_SCALE_NAMES = ("scale", "scaling")
_RANK_NAMES = ("r", "rank")
_KNOWN_FIELDS = {*_ALPHA_NAMES, *_SCALE_NAMES, *_RANK_NAMES, "use_rslora", "peft_type", "task_type", "bias"}


def detect(source: AdapterSource) -> str | None:
    """Say why this is a plain file of factors, or None."""
    count = sum(1 for key in source.tensors if _FACTOR.fullmatch(key))
    return f"{count} tensors are named as factors (X.lora_A/X.lora_B or X.A/X.B)" if count else None


def read(source: AdapterSource, options: ReadOptions) -> Adapter:
    """Read the adapter; see the module for the format.

    Raises:
        NamesError: A factor without its partner.
        ShapeError: Factors that share no rank.
        UsageError: Nothing says what the scale is.
    """
    ignored = refuse_set_fields(source.config or {}, _KNOWN_FIELDS, file=CONFIG_FILE, ignore=options.ignore_fields)
    pairs: dict[str, Pair] = {}
    tables: set[str] = set()
    replacements = []
    for key, tensor in source.tensors.items():
        match = _FACTOR.fullmatch(key)
        if match is None:
            replacements.append(Replacement(key.removeprefix(_PREFIX), tensor, "in the file whole"))
            continue
        module = match["module"].removeprefix(_PREFIX)
        pairs.setdefault(module, Pair()).put(match["side"], tensor)
        if match["table"]:
            tables.add(module)
    check_pairs(pairs, source.shard.name)
    targets = []
    wrong = []
    kernels_swapped = not any(_is_straight_kernel(pair) for pair in pairs.values())
    for module, pair in pairs.items():
        stack = _stack(module, pair, source, options)
        delta = stack or _delta(pair, source, options, kernels_swapped, table=module in tables)
        if delta is None:
            a, b = pair.both
            wrong.append(f"{module}: A is {list(a.shape)}, B is {list(b.shape)}")
            continue
        owner, _, parameter = module.rpartition(".")
        targets.append(Target(owner, parameter, delta) if stack else Target(module, "weight", delta))
    if wrong:
        raise ShapeError("Factors share no rank", file=source.shard.name, details=wrong, hint=SAVE_AGAIN)
    return Adapter(
        label=source.label,
        path=source.path,
        format=NAME,
        evidence=detect(source) or "",
        targets=tuple(targets),
        replacements=tuple(replacements),
        config=source.config or {},
        ignored_fields=ignored,
        stored=len(source.tensors),
    )


def _stack(name: str, pair: Pair, source: AdapterSource, options: ReadOptions) -> OpenExperts | None:
    """The change that a pair makes of a stack of matrices; None for other pairs.

    Where factors could have several ranks the smallest is taken, as it is for matrices.
    """
    a, b = (tensor.shape for tensor in pair.both)
    ranks = ranks_of(a, b) if is_stack(name, pair) else {}
    said = {packing: rank for packing, rank in ranks.items() if options.expert_layout.allows(packing)}
    ranks = said if len(ranks) > 1 else ranks
    if not ranks:
        return None
    rank = min(ranks.values())
    module, _, parameter = name.rpartition(".")
    told = Told(module, options.expert_layout, outputs_first=parameter in PARTS)
    packings = tuple(packing for packing, found in ranks.items() if found == rank)
    return OpenExperts(*pair.both, _scale(rank, source, options), packings, None, told)


def _delta(
    pair: Pair, source: AdapterSource, options: ReadOptions, kernels_swapped: bool, *, table: bool
) -> Delta | None:
    """The change that a pair makes; None where the factors share no rank."""
    a, b = pair.both
    if len(a.shape) > 2:
        # Where both sides of a matrix B are as long as the rank, the other kernels of the file say which is which.
        # Where they do not, it is (rank × out): no library is known to write (out × rank) beside a kernel A.
        square = len(b.shape) == 2 and b.shape[0] == b.shape[1]
        swapped = kernels_swapped if square else len(b.shape) == 2 and b.shape[0] == a.shape[0]
        if not is_kernel_pair(a.shape, b.shape[::-1] if swapped else b.shape):
            return None
        return LowRankKernel(a, b, _scale(a.shape[0], source, options), swapped)
    turned = _swapped(pair)
    if turned is None:
        return None
    scale = _scale(a.shape[1 if turned else 0], source, options)
    return LowRank(a, b, scale, turned, "lora-embedding" if table else "lora")


def _is_straight_kernel(pair: Pair) -> bool:
    """Whether a kernel's B is a matrix (out × rank) that cannot be read the other way round."""
    a, b = pair.both
    return len(a.shape) > 2 and len(b.shape) == 2 and b.shape[1] == a.shape[0] != b.shape[0]


def _swapped(pair: Pair) -> bool | None:
    """Whether A is (in × rank): None when the factors share no rank, False when both readings would do.

    With both dimensions shared (A is n × m and B is m × n) the smaller one is the rank.
    """
    a, b = pair.both
    if len(a.shape) != 2 or len(b.shape) != 2 or 0 in a.shape + b.shape:
        return None
    straight, swapped = a.shape[0] == b.shape[1], a.shape[1] == b.shape[0]
    if straight and swapped:
        return a.shape[1] < a.shape[0]
    return swapped if straight or swapped else None


def _scale(rank: int, source: AdapterSource, options: ReadOptions) -> Scale:
    if options.scale is not None:
        return Scale(options.scale, None, False, "--scale")
    said = {CONFIG_FILE: source.config or {}, "header metadata": source.shard.header.metadata or {}}
    rslora = any(words.get("use_rslora") in (True, "true", "True") for words in said.values())
    root = "√" if rslora else ""
    if options.alpha is not None:
        return Scale(options.alpha, rank, rslora, f"--alpha / {root}rank of the factors")
    alphas = [found for where, words in said.items() for found in _numbers(words, _ALPHA_NAMES, where)]
    scales = [found for where, words in said.items() for found in _numbers(words, _SCALE_NAMES, where)]
    if len({one.value for one in alphas}) + len({one.value for one in scales}) > 1:
        raise MalformedFileError(
            "Two fields say how strong this adapter is",
            file=source.shard.name,
            found=" and ".join(f"{one.field} = {one.value:g} of {one.where}" for one in (*alphas, *scales)),
            hint="say which with --alpha A or --scale S",
        )
    for one in (*alphas, *scales)[:1]:
        check_alpha(one.value, file=one.where, field=one.field)
        if not alphas:
            return Scale(one.value, None, False, f"{one.field} of {one.where}")
        for where, words in said.items():
            _check_rank(rank, words, where)
        return Scale(one.value, rank, rslora, f"{one.field} of {one.where} / {root}rank of the factors")
    # A folder is PEFT's, and with its config it would say so.
    lost = source.config is None and source.path.is_dir()
    raise MissingScaleError(
        "Nothing says how strong this adapter is" + (f", for the folder has no {CONFIG_FILE}" if lost else ""),
        file=source.shard.name,
        hint=(f"get its {CONFIG_FILE}, or " if lost else "") + "give --alpha A (scale is alpha / rank) or --scale S",
    )


class _Said(NamedTuple):
    """A number that a file says of an adapter, and where."""

    value: float
    field: str
    where: str


def _numbers(said: Mapping[str, Any], names: tuple[str, ...], where: str) -> list[_Said]:
    found = []
    for name in names:
        if said.get(name) is None:
            continue
        try:
            # Header metadata holds text only.
            value = math.nan if isinstance(said[name], bool) else float(said[name])
        except (TypeError, ValueError, OverflowError):
            value = math.nan
        if not -LARGEST < value < LARGEST:
            raise MalformedFileError(
                "A scale is not a number",
                file=where,
                tensor=name,
                expected=f"a number below {LARGEST:g}",
                found=repr(said[name])[:60],
            )
        found.append(_Said(value, name, where))
    return found


def _check_rank(rank: int, said: Mapping[str, Any], where: str) -> None:
    for found in _numbers(said, _RANK_NAMES, where):
        if found.value != rank:
            raise ShapeError(
                "Ranks do not agree",
                file=where,
                tensor=found.field,
                expected=f"{rank}, the rank of the factors",
                found=f"{found.value:g}",
                hint=SAVE_AGAIN,
            )
