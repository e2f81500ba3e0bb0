"""Finding the place of every adapter tensor in a base: names, shapes, layouts, and the ledger of it all."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from lora_cli.adapters.adapter import Adapter, Replacement, Target
from lora_cli.adapters.layout import Orientation, bears_witness, by_architecture, fits, is_table, settle_square
from lora_cli.adapters.names import Identity, Mapper
from lora_cli.adapters.resolve import Resolution, parse_maps, resolve, tied_to
from lora_cli.adapters.source import ReadOptions
from lora_cli.adapters.wrapped import Wrapped, unwrap
from lora_cli.checkpoint.checkpoint import Checkpoint, StoredTensor
from lora_cli.checkpoint.quantised import Quantised
from lora_cli.checkpoint.tied import tie_of
from lora_cli.errors import LoraCliError, NamesError, ShapeError, UnsupportedError, UsageError
from lora_cli.surgery.plan import MERGEABLE, AdapterUse, Contribution, LedgerEntry, ScaleUse


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What the user says about a merge.

    Attributes:
        weights: One number per adapter, or none at all for 1.
        dtype: The output's floating type: `keep`, `bf16`, `fp16` or `fp32`.
        maps: `OLD=NEW` names.
        allow_unmapped: Leave out what matches nothing, instead of refusing.
        tokenizer: Whose tokenizer files are written, where the adapter's differ from the base's.
        orientation: How a square base is stored, where nothing else says it.
        read: How adapters are read.
    """

    weights: tuple[float, ...] = ()
    dtype: str = "keep"
    maps: tuple[str, ...] = ()
    allow_unmapped: bool = False
    tokenizer: Literal["base", "adapter"] = "base"
    orientation: Orientation | None = None
    read: ReadOptions = field(default_factory=ReadOptions)


class Placement:
    """What adapters do to each base key; filled when made.

    Attributes:
        adapters: The adapters, the base's own factors first where it carries some.
        mapper: Stored key → plain key, for a wrapped base.
        carried: Stored keys that hold the base's own factors.
        tensors: The base as people name it: wrapped names folded, carried factors gone.
        terms: Key → deltas on it.
        replaced: Key → what takes its place.
        appended: New key → its tensor.
        ledger: What became of every adapter tensor.
        uses: How each adapter is used.
        warnings: What a person should look at.

    Raises:
        NamesError: Adapter tensors without a base tensor, or with two.
        ShapeError: Shapes that do not fit.
        UnsupportedError: Quantised targets, storage types that cannot take a delta, or factors that would be lost.
        UsageError: No adapter, or weights that do not match the adapters.
    """

    def __init__(self, base: Checkpoint, adapters: Sequence[Adapter], options: PlanOptions) -> None:
        self.base = base
        self.options = options
        wrapped = unwrap(base, options.read)
        self.mapper: Mapper = wrapped.mapper if wrapped else Identity()
        self.carried = wrapped.carried if wrapped else frozenset[str]()
        self.adapters = _all_adapters(wrapped, adapters)
        self.weights = _weights(options.weights, self.adapters)
        self.tensors = {
            self.mapper(key) or key: tensor for key, tensor in base.tensors.items() if key not in self.carried
        }
        self.terms: defaultdict[str, list[Contribution]] = defaultdict(list)
        self.replaced: dict[str, Replacement] = {}
        self.appended: dict[str, Replacement] = {}
        self.ledger: list[LedgerEntry] = []
        self.uses: list[AdapterUse] = []
        self.warnings = [f"{adapter.label}: {text}" for adapter in self.adapters for text in adapter.warnings]
        self._problems: list[tuple[type[LoraCliError], str]] = []
        self._guessed: list[str] = []
        self._quantised = Quantised(base)
        if not self.adapters:
            raise UsageError(
                "No adapter given, and the base carries none",
                hint="name an adapter: merge BASE ADAPTER, verify --adapter ADAPTER",
            )
        for position, adapter in enumerate(self.adapters):
            before = len(self.ledger)
            self._place(position, adapter)
            if not self._problems and len(self.ledger) - before != adapter.stored:
                found = f"{len(self.ledger) - before} of {adapter.stored} tensors"
                raise LoraCliError("The ledger of this adapter is not complete", file=adapter.label, found=found)
        self._raise_problems()
        self._warn_unused_maps()
        if self._guessed:
            several = f" and {len(self._guessed) - 1} more" if len(self._guessed) > 1 else ""
            self.warnings.append(
                f"{self._guessed[0]}{several}: square, and taken as stored out × in, like torch.nn.Linear; "
                "--orientation ab is for in × out, like embeddings and GPT-2"
            )

    # Names

    def _place(self, position: int, adapter: Adapter) -> None:
        """Give every tensor of one adapter its place, or its reason for having none."""
        weight = self.weights[position]
        names = [target.name for target in adapter.targets]
        names += [replacement.name for replacement in adapter.replacements]
        found = resolve(names, self.tensors, maps=parse_maps(self.options.maps), file=adapter.label)
        new = {r.name for r in adapter.replacements if r.may_be_new and r.name not in found.keys}
        aliases = {r.name for r in adapter.replacements if self._is_tied_copy(r, adapter, found)}
        self._check_mapped(adapter, found, new | aliases)
        for tensor, reason in adapter.skipped:
            self._enter(adapter, tensor, "ignored", None, reason)
        self._place_targets(position, adapter, weight, found)
        for replacement in adapter.replacements:
            if replacement.name in found.keys or replacement.name in new:
                self._place_replacement(adapter, replacement, weight, found.keys.get(replacement.name))
        scales = Counter((t.delta.scale.times(weight), t.delta.scale.source) for t in adapter.targets)
        self.uses.append(
            AdapterUse(
                adapter.label,
                adapter.format,
                adapter.kind,
                weight,
                found.rewrite,
                tuple(ScaleUse(scale, source, count) for (scale, source), count in scales.items()),
            )
        )

    def _is_tied_copy(self, replacement: Replacement, adapter: Adapter, found: Resolution) -> bool:
        """Enter a tensor that is stored once under another name, which the adapter holds as well."""
        stored = tied_to(replacement.name)
        if stored is None or replacement.name in found.keys:
            return False
        other = next((r for r in adapter.replacements if r.name == stored and r.name in found.keys), None)
        if other is None or not _same_bytes(other.tensor, replacement.tensor):
            return False
        self._enter(adapter, replacement.tensor, "ignored", found.keys[other.name], f"the same tensor as {other.name}")
        return True

    def _check_mapped(self, adapter: Adapter, found: Resolution, new: set[str]) -> None:
        lost = [name for name in found.unmapped if name.name not in new]
        if not found.keys and (lost or not adapter.targets):
            self._raise_unmapped("Nothing in this adapter matches the base", adapter, found)
        if (lost or adapter.unread) and not self.options.allow_unmapped:
            count = len(lost) + len(adapter.unread)
            self._raise_unmapped(f"Names of the adapter with no place in the base: {count}", adapter, found, new)
        names = {name.name for name in lost}
        for target in adapter.targets:
            if target.name in names:
                for tensor in target.delta.tensors:
                    self._enter(adapter, tensor, "ignored", None, "no such tensor in the base (--allow-unmapped)")
        for replacement in adapter.replacements:
            if replacement.name in names:
                self._enter(
                    adapter,
                    replacement.tensor,
                    "ignored",
                    None,
                    "no such tensor in the base (--allow-unmapped)",
                )
        for tensor in adapter.unread:
            self._enter(adapter, tensor, "ignored", None, "belongs to no pair of factors (--allow-unmapped)")

    def _raise_unmapped(self, message: str, adapter: Adapter, found: Resolution, new: Iterable[str] = ()) -> None:
        details = [
            name.name
            + (f", by --map {name.told}" if name.told else "")
            + (f" (nearest: {', '.join(name.nearest)})" if name.nearest else "")
            for name in found.unmapped
            if name.name not in new
        ]
        details += [f"{tensor.key} belongs to no pair of factors" for tensor in adapter.unread]
        raise NamesError(
            message,
            file=adapter.label,
            found=f"{len(found.keys)} names match",
            details=details,
            hint="is this the right base? Say what is called differently with --map OLD=NEW"
            + (", or leave these out with --allow-unmapped" if found.keys else ""),
        )

    def _warn_unused_maps(self) -> None:
        names = [target.name for adapter in self.adapters for target in adapter.targets]
        names += [replacement.name for adapter in self.adapters for replacement in adapter.replacements]
        for leaf in parse_maps(self.options.maps):
            if all(leaf(name) is None for name in names):
                self.warnings.append(f"--map {leaf.old}={leaf.new} concerns no name of any adapter")

    # Deltas and replacements

    def _place_targets(self, position: int, adapter: Adapter, weight: float, found: Resolution) -> None:
        placed = [(target, key) for target in adapter.targets if (key := found.keys.get(target.name)) is not None]
        choices = [fits(target.delta, self.tensors[key].shape) for target, key in placed]
        lying = [
            (key, next(iter(fit)))
            for (target, key), fit in zip(placed, choices, strict=True)
            if len(fit) == 1 and len(target.delta.stored) > 1
        ]
        others = {fit for key, fit in lying if bears_witness(adapter, key, fit, self.tensors)}
        for (target, key), fit in zip(placed, choices, strict=True):
            transposed = self._transposed(target, key, fit, adapter, others)
            if transposed is None:
                continue
            terms = self.terms[key]
            if terms and terms[0].delta.stack != target.delta.stack:
                words = f"{key}: one adapter changes a stack of matrices, another one a convolution"
                self._problems.append((ShapeError, words))
                continue
            if terms and any(term.transposed != transposed for term in terms):
                words = f"{key}: square, and two adapters read it in two ways; give --orientation ba or ab"
                self._problems.append((ShapeError, words))
                continue
            self._check_target(target, key)
            terms.append(Contribution(position, target.module, target.delta, weight, transposed))
            for tensor in target.delta.tensors:
                self._enter(adapter, tensor, "applied", key)

    def _transposed(
        self, target: Target, key: str, choices: set[bool], adapter: Adapter, others: set[bool]
    ) -> bool | None:
        base, said = self.tensors[key], self.options.orientation
        if not choices:
            self._problems.append((ShapeError, _shape_words(target, base, adapter)))
            return None
        if len(target.delta.stored) == 1:
            return next(iter(choices))
        told = by_architecture(target, key, self.base.config)
        if len(choices) == 1:
            fit = next(iter(choices))
            against = "the architecture" if told is not None and fit != told else None
            if fit and told is None and adapter.transposed_hint is False:
                against = "fan_in_fan_out"
            if against and said is None and adapter.orientation is not None:
                words = f"{_shape_words(target, base, adapter)}, which fits only against {against}; see --orientation"
                self._problems.append((ShapeError, words))
                return None
            return fit
        if is_table(adapter, key):
            return True
        settled = settle_square(adapter, told, others, said)
        if settled is None:
            words = f"{key}: square, so nothing says if it is stored out × in or in × out; give --orientation ba or ab"
            self._problems.append((ShapeError, words))
        elif adapter.transposed_hint is None and said is None and told is None and len(others) != 1:
            self._guessed.append(key)
        return settled

    def _check_target(self, target: Target, key: str) -> None:
        base = self.tensors[key]
        if base.dtype.name not in MERGEABLE:
            self._problems.append((UnsupportedError, f"{key}: storage type {base.dtype.name} takes no delta"))
        for factor in target.delta.tensors:
            if factor.dtype.name not in MERGEABLE:
                words = f"{factor.key}: storage type {factor.dtype.name} of a factor"
                self._problems.append((UnsupportedError, words))
        if target.delta.magnitude is not None:
            self._problems.append((UnsupportedError, f"{key}: DoRA, which cannot be merged into files yet"))
        self._check_plain(key)

    def _check_plain(self, key: str) -> None:
        """Refuse a tensor that holds quantised numbers, or that the model uses twice."""
        reason = self._quantised(self.tensors[key].key) if key in self.tensors else None
        if reason:
            self._problems.append((UnsupportedError, f"{key}: quantised, {reason}"))
        tie = tie_of(self.base, key, self.tensors)
        if tie:
            words = f"{key}: {tie} in this model, and the adapter changes only one of the two; ties are not supported"
            self._problems.append((UnsupportedError, words))

    def _place_replacement(self, adapter: Adapter, replacement: Replacement, weight: float, key: str | None) -> None:
        tensor = replacement.tensor
        copied = weight not in (0, 1) and key is not None and _same_bytes(self.tensors[key], tensor)
        if weight == 0 or copied:
            self._enter(adapter, tensor, "ignored", key, "the base's own tensor" if copied else "weight 0")
            return
        if weight != 1:
            words = f"{replacement.name}: a whole tensor ({replacement.reason}) cannot be taken at weight {weight:g}"
            self._problems.append((UnsupportedError, words))
            return
        name = key or replacement.name
        self._check_plain(name)
        earlier = self.replaced.get(name) or self.appended.get(name)
        if earlier and not _same_bytes(earlier.tensor, tensor):
            words = f"{name}: two adapters hold different tensors for it, one of them {adapter.label}"
            self._problems.append((NamesError, words))
            return
        if key is None:
            self.appended[name] = replacement
            self._enter(adapter, tensor, "added", name, replacement.reason)
            return
        if tensor.shape != self.tensors[key].shape:
            rows = (
                f"{adapter.label} has shape {list(tensor.shape)}, {self.base.label} has {list(self.tensors[key].shape)}"
            )
            self._problems.append((ShapeError, f"{key}: {rows}{_vocabulary_hint(tensor.shape[0], self.tensors[key])}"))
            return
        stored = self.tensors[key].dtype
        if tensor.dtype != stored and not {tensor.dtype.name, stored.name} <= set(MERGEABLE):
            words = f"{key}: {tensor.dtype.name} in {adapter.label} cannot become {stored.name}, as the base stores it"
            self._problems.append((UnsupportedError, words))
            return
        self.replaced[key] = replacement
        self._enter(adapter, tensor, "replaced", key, replacement.reason)

    def _enter(
        self,
        adapter: Adapter,
        tensor: StoredTensor,
        outcome: Literal["applied", "replaced", "added", "ignored"],
        key: str | None,
        reason: str | None = None,
    ) -> None:
        self.ledger.append(LedgerEntry(adapter.label, tensor.key, outcome, key, reason))

    def _raise_problems(self) -> None:
        """Raise one error with every problem of the gravest kind, names before shapes before the rest."""
        messages: dict[type[LoraCliError], str] = {
            NamesError: "Two adapters want different things of one tensor",
            ShapeError: "Shapes of adapter and base do not fit",
            UnsupportedError: "Some targets cannot take this adapter",
        }
        for kind, message in messages.items():
            details = [words for found, words in self._problems if found is kind]
            if details:
                raise kind(f"{message} ({len(details)})", file=self.base.label, details=details, hint=_hint(details))


def _all_adapters(wrapped: Wrapped | None, adapters: Sequence[Adapter]) -> list[Adapter]:
    return [*([wrapped.adapter] if wrapped else []), *adapters]


def _weights(weights: Sequence[float], adapters: Sequence[Adapter]) -> list[float]:
    if not weights:
        return [1.0] * len(adapters)
    if len(weights) != len(adapters):
        names = ", ".join(adapter.label for adapter in adapters)
        raise UsageError(
            "Give --weight once per adapter, in their order, or not at all",
            expected=f"{len(adapters)} ({names})",
            found=len(weights),
        )
    bad = [weight for weight in weights if not math.isfinite(weight)]
    if bad:
        raise UsageError("A weight must be a finite number", found=bad[0])
    return list(weights)


def _same_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    step = 1 << 20
    with one.shard.source.open() as left, other.shard.source.open() as right:
        for start in range(0, one.nbytes, step):
            size = min(step, one.nbytes - start)
            if left.read(one.offset + start, size) != right.read(other.offset + start, size):
                return False
    return True


def _shape_words(target: Target, base: StoredTensor, adapter: Adapter) -> str:
    shape = next(iter(target.delta.stored.values()))
    factors = ", ".join(f"{tensor.key} {list(tensor.shape)}" for tensor in target.delta.tensors)
    size = " × ".join(map(str, shape)) if len(shape) > 1 else f"{shape[0]} × 1"
    words = f"{base.key}: {list(base.shape)} in the base, the delta is ({size}) from {factors}"
    return words + _vocabulary_hint(shape[0], base)


def _vocabulary_hint(rows: int, base: StoredTensor) -> str:
    parts = base.key.split(".")
    if not {"embed_tokens", "lm_head", "wte", "word_embeddings", "shared", "embed_out"} & set(parts):
        return ""
    return (
        f"; the vocabulary differs ({rows} rows in the adapter, {base.shape[0]} in the base): take the base that the "
        "adapter was trained on"
    )


def _hint(details: Sequence[str]) -> str | None:
    if any("quantised" in words for words in details):
        return "merge into the 16-bit checkpoint that the quantised one was made from"
    if any("--orientation" in words for words in details):
        return "--orientation ba for torch.nn.Linear (out × in), ab for (in × out)"
    return None
