"""Finding the place of every adapter tensor in a base: names, shapes, layouts, and the ledger of it all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from lora_cli.adapters.adapter import Adapter, Replacement, RowReplacement, Target
from lora_cli.adapters.layout import Orientation
from lora_cli.adapters.modules import is_embedding
from lora_cli.adapters.names import Identity, Mapper
from lora_cli.adapters.region import Place, whole
from lora_cli.adapters.resolve import Resolution, parse_maps, resolve
from lora_cli.adapters.source import ReadOptions
from lora_cli.adapters.ties import ties
from lora_cli.adapters.wrapped import unwrap
from lora_cli.checkpoint.checkpoint import Checkpoint, StoredTensor
from lora_cli.checkpoint.quantised import Quantised
from lora_cli.checkpoint.repairs import Repair, untied, with_layers, with_vocabulary
from lora_cli.errors import NamesError, ShapeError, UnsupportedError
from lora_cli.surgery.accounts import Accounts
from lora_cli.surgery.changing import Change, apart_words, contents_alike, kind_words, settle_ties, twins_in
from lora_cli.surgery.edit import MERGEABLE, Contribution, Rows, is_alone, may_be_factor, rows_of_part
from lora_cli.surgery.lying import guessed_words, lie
from lora_cli.surgery.matching import check_mapped, left_out, unused_maps
from lora_cli.surgery.plan import AdapterUse, ScaleUse
from lora_cli.surgery.seeing import seen, unseen
from lora_cli.surgery.settling import matrices_in, settle
from lora_cli.surgery.views import Views, layer_warnings, views_of
from lora_cli.surgery.vocabulary import may_resize, other_sizes, vocabulary_hint
from lora_cli.surgery.weighting import with_weights


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

    @property
    def says_how(self) -> bool:
        """Whether anything is said of how to merge, and not only what adapters were before training."""
        return self != PlanOptions(read=ReadOptions(initial=self.read.initial))


@dataclass(frozen=True, slots=True)
class _Applied:
    """One adapter and its names in the base."""

    position: int
    adapter: Adapter
    weight: float
    found: Resolution
    new: frozenset[str]


class Placement:
    """What adapters do to each base key; filled when made.

    Attributes:
        adapters: The adapters, the base's own factors first where it carries some.
        weights: Their weights; negative for what is taken off again.
        mapper: Stored key → plain key, for a wrapped base.
        carried: Stored keys that hold the base's own factors.
        views: The base's tensors under every name that a change can be for.
        tensors: Those names with their tensors: wrapped names folded, carried factors gone.
        changes: Name → what is done to it.
        appended: New key → its tensor.
        apart: Names that share a tensor in the base and get one of their own.
        repairs: What config.json has to say otherwise.
        accounts: What became of every adapter tensor.
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
        self.adapters, self.weights = with_weights(
            [*([wrapped.adapter] if wrapped else []), *adapters], options.weights
        )
        self.views = self._views()
        self.tensors: Mapping[str, StoredTensor] = self.views.tensors
        self.changes: dict[str, Change] = {}
        self.appended: dict[str, Replacement] = {}
        self.repairs: list[Repair] = []
        if self.views.layers:
            self.repairs.append(with_layers(self.views.layers, self.views.stored))
        self.uses: list[AdapterUse] = []
        self.warnings = [f"{adapter.label}: {text}" for adapter in self.adapters for text in adapter.warnings]
        self.warnings += layer_warnings(self.views, base.config, file=base.label)
        self.accounts = Accounts(base.label, self.adapters)
        self._guessed: list[str] = []
        self._resized: dict[str, tuple[int, int]] = {}
        self._quantised = Quantised(base)
        applied = [self._resolved(position, adapter) for position, adapter in enumerate(self.adapters)]
        # What stands in place of a tensor decides what shape a delta finds there.
        for one in applied:
            self._place_wholes(one)
        for one in applied:
            self._place_targets(one)
        for words in other_sizes(self._resized, {key: self._shape(key) for key in self.tensors}):
            self.accounts.problem(ShapeError, words)
        self.repairs += [with_vocabulary(*sizes) for sizes in dict.fromkeys(self._resized.values())]
        self._settle_rows()
        self.accounts.settle()
        self.apart = settle_ties(self.views, self.changes)
        if self.apart:
            self.repairs.append(untied)
        else:
            self.accounts.went_to(self.views.tied)
        self.warnings += unused_maps(options.maps, self.adapters)
        self.warnings += guessed_words(self._guessed)

    def _views(self) -> Views:
        plain = {
            self.mapper(key) or key: tensor for key, tensor in self.base.tensors.items() if key not in self.carried
        }
        layers = {adapter.layers for adapter in self.adapters}
        if len(layers) > 1:
            raise UnsupportedError(
                "The adapters are for models of different layers",
                file=self.base.label,
                details=[f"{adapter.label}: layer_replication {adapter.layers}" for adapter in self.adapters],
                hint="merge the one that repeats layers first, and the others into what comes of it",
            )
        tied = ties(self.base.config, plain)
        return views_of(plain, tied, next(iter(layers), None), file=self.base.label)

    # Names

    def _resolved(self, position: int, adapter: Adapter) -> _Applied:
        """Find the names of one adapter, and enter what has none."""
        weight = self.weights[position]
        maps = parse_maps(self.options.maps)
        found = resolve(adapter.names, self.tensors, config=self.base.config, maps=maps, file=adapter.label)
        held = {*found.places, *(lost.name for lost in found.unmapped if lost.reason)}
        new = frozenset(r.name for r in adapter.replacements if r.may_be_new and r.name not in held)
        check_mapped(adapter, found, set(new), allow_unmapped=self.options.allow_unmapped)
        for tensor, reason in left_out(adapter, found, set(new)):
            self.accounts.enter(position, tensor, "ignored", None, reason)
        scales = Counter(
            (t.delta.scale.times(weight), t.delta.scale.source) for t in adapter.targets if t.delta.scale.exists
        )
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
        return _Applied(position, adapter, weight, found, new)

    def _change(self, name: str) -> Change:
        return self.changes.setdefault(name, Change())

    def _names(self, key: str, *, shared: bool) -> tuple[str, ...]:
        """The names to which a change is done: of tied ones all, if it is a change of what they share."""
        return self.views.group(key) if shared else (key,)

    # Whole tensors and rows

    def _place_wholes(self, one: _Applied) -> None:
        for replacement in one.adapter.replacements:
            places = one.found.places.get(replacement.name, ())
            if places or replacement.name in one.new:
                self._place_replacement(one, replacement, places)
        for rows in one.adapter.rows:
            for place in one.found.places.get(rows.name, ()):
                self._place_rows(one, rows, place)

    def _place_replacement(self, one: _Applied, replacement: Replacement, places: Sequence[Place]) -> None:
        tensor, key = replacement.tensor, whole(places)
        copied = one.weight not in (0, 1) and key is not None and contents_alike(self.tensors[key], tensor)
        if one.weight == 0 or copied:
            self.accounts.enter(one.position, tensor, "ignored", key, "the base's own tensor" if copied else "weight 0")
        elif one.weight != 1:
            words = (
                f"{replacement.name}: a whole tensor ({replacement.reason}) cannot be taken at weight {one.weight:g}"
            )
            self.accounts.problem(UnsupportedError, words, weighted=one.position)
        elif not places:
            self._append(one, replacement)
        elif key is None:
            for place in places:
                self._place_part(one, replacement, place)
            self.accounts.enter(one.position, tensor, "replaced", places[0].key, replacement.reason)
        else:
            self._replace(one, replacement, key)

    def _append(self, one: _Applied, replacement: Replacement) -> None:
        earlier = self.appended.setdefault(replacement.name, replacement)
        if not contents_alike(earlier.tensor, replacement.tensor):
            self.accounts.problem(NamesError, _two_words(replacement.name, one.adapter))
        self.accounts.enter(one.position, replacement.tensor, "added", replacement.name, replacement.reason)

    def _replace(self, one: _Applied, replacement: Replacement, key: str) -> None:
        tensor = replacement.tensor
        self._check_plain(key)
        for name in self._names(key, shared=replacement.of_base):
            change = self._change(name)
            change.holder = one.position if change.holder is None else change.holder
            if change.replaced and not contents_alike(change.replaced.tensor, tensor):
                self.accounts.problem(NamesError, _two_words(name, one.adapter))
                return
            change.replaced = change.replaced or replacement
        if not self._fits_whole(one.adapter, tensor, key):
            return
        self.accounts.enter(one.position, tensor, "replaced", key, replacement.reason)

    def _fits_whole(self, adapter: Adapter, tensor: StoredTensor, key: str) -> bool:
        stored = self.tensors[key]
        resized = tensor.shape != stored.shape
        rows = stored.shape[0] if stored.shape else 0, tensor.shape[0] if tensor.shape else 0
        may = tensor.shape[1:] == stored.shape[1:] and may_resize(key, *rows, self.base.config)
        if resized and not may:
            both = f"{adapter.label} has shape {list(tensor.shape)}, {self.base.label} has {list(stored.shape)}"
            words = f"{key}: {both}{vocabulary_hint(rows[1], key, stored.shape)}"
            self.accounts.problem(ShapeError, words)
            return False
        if resized:
            self._resized[key] = rows
        return self._fits_type(adapter, tensor, key)

    def _fits_type(self, adapter: Adapter, tensor: StoredTensor, key: str) -> bool:
        stored = self.tensors[key].dtype
        if tensor.dtype == stored or {tensor.dtype.name, stored.name} <= set(MERGEABLE):
            return True
        taken = f"{tensor.dtype.name} in {adapter.label} cannot become {stored.name}"
        self.accounts.problem(UnsupportedError, f"{key}: {taken}, as the base stores it")
        return False

    def _place_part(self, one: _Applied, replacement: Replacement, place: Place) -> None:
        """Replace the part of a tensor that a parameter is, or by a part of a parameter."""
        tensor, stored = replacement.tensor, self.tensors[place.key]
        rows = rows_of_part(tensor, stored.shape, place)
        if rows is None:
            words = f"{place.key}: {list(stored.shape)} in the base, and {replacement.name} is {list(tensor.shape)}"
            self.accounts.problem(ShapeError, words)
            return
        self._check_plain(place.key)
        if self._fits_type(one.adapter, tensor, place.key):
            self._lay(one, place.key, rows)

    def _place_rows(self, one: _Applied, change: RowReplacement, place: Place) -> None:
        tensor, shape = change.tensor, self._shape(place.key)
        if one.weight == 0:
            self.accounts.enter(one.position, tensor, "ignored", place.key, "weight 0")
            return
        if one.weight != 1:
            words = f"{change.name}: trained rows ({change.reason}) cannot be taken at weight {one.weight:g}"
            self.accounts.problem(UnsupportedError, words, weighted=one.position)
            return
        if place.region or place.turned or tensor.shape[1:] != shape[1:]:
            words = (
                f"{place.key}: {list(shape)} in the base, and the adapter has rows of {list(tensor.shape[1:])} "
                f"up to number {max(change.rows, default=0)}"
            )
            self.accounts.problem(ShapeError, words)
            return
        self._check_plain(place.key)
        rows = Rows(tensor, tuple(range(len(change.rows))), change.rows)
        # PEFT ties rows that are trained of the embedding alone, and leaves them apart where the head has its own.
        group = {*self.views.group(place.key)}
        trained = group & {p.key for other in one.adapter.rows for p in one.found.places.get(other.name, ())}
        alone = len(trained) == 1 and is_embedding(place.key.removesuffix(".weight"))
        if self._fits_type(one.adapter, tensor, place.key):
            for name in self._names(place.key, shared=alone):
                self._lay(one, name, rows)
        self.accounts.enter(one.position, tensor, "replaced", place.key, change.reason)

    def _lay(self, one: _Applied, name: str, rows: Rows) -> None:
        if not self._change(name).lay(rows, one.position):
            self.accounts.problem(
                NamesError, f"{name}: two adapters hold different rows, one of them {one.adapter.label}"
            )

    def _settle_rows(self) -> None:
        """Check rows against all that is done to their tensors, whatever order it came in."""
        for name, change in self.changes.items():
            if problem := change.mixed():
                self.accounts.problem(UnsupportedError, f"{name}: {problem}")
            last = max((rows.at[-1] for rows in change.rows if rows.at), default=-1)
            if change.rows and last >= self._shape(name)[0]:
                words = f"{name}: row {last} is trained, and there are {self._shape(name)[0]}"
                self.accounts.problem(ShapeError, words)

    def _shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor as deltas find it."""
        change = self.changes.get(key)
        return (change.replaced.tensor if change and change.replaced else self.tensors[key]).shape

    # Deltas

    def _place_targets(self, one: _Applied) -> None:
        shapes = {key: self._shape(key) for key in self.tensors}
        found = settle(one.adapter, one.found.places, shapes, self.base.config, self.options.orientation)
        self.accounts.problems(found.problems)
        self.uses[one.position] = replace(self.uses[one.position], layouts=found.uses)
        self.warnings += [f"{one.adapter.label}: {words}" for words in found.surprises]
        self._guessed += found.guessed
        placed = found.placed
        lying = lie(one.adapter, placed, shapes, self.base, self.options.orientation)
        for words in lying.problems:
            self.accounts.problem(ShapeError, words)
        self._guessed += lying.guessed
        twins = twins_in(placed, self.views)
        if one.adapter.tied:
            self.warnings += apart_words(one.adapter.label, placed, twins, self.views)
        entered: set[str] = set()
        for (target, place), transposed in zip(placed, lying.transposed, strict=True):
            if transposed is None:
                continue
            first, idle = twins.get(id(target), target), one.weight == 0 and is_alone(target.delta)
            twin = f"the change of {first.module}, which is tied to it" if first is not target else None
            reason = twin or ("weight 0" if idle else None)
            for tensor in target.delta.tensors:
                if tensor.key not in entered:
                    self.accounts.enter(one.position, tensor, "ignored" if reason else "applied", place.key, reason)
                    entered.add(tensor.key)
            if not reason:
                self._add(one, target, place, transposed=transposed, shared=id(target) in twins)

    def _add(self, one: _Applied, target: Target, place: Place, *, transposed: bool, shared: bool) -> None:
        key = place.key
        self._check_target(one, target, key)
        added = Contribution(
            one.position,
            target.module,
            target.delta,
            one.weight,
            transposed,
            place.region,
            place.matrix,
            place.at,
            matrices_in(self.tensors[key].shape, target.delta, place),
            seen(target, one.found.places, self.tensors, transposed=transposed),
            target.parameter,
            one.adapter.label,
        )
        for name in self._names(key, shared=shared):
            problem = self._change(name).add(added)
            if problem:
                self.accounts.problem(problem[0], f"{key}: {problem[1]}")

    def _check_target(self, one: _Applied, target: Target, key: str) -> None:
        base = self.tensors[key]
        if base.dtype.name not in MERGEABLE:
            self.accounts.problem(UnsupportedError, f"{key}: storage type {base.dtype.name} takes no delta")
        for kind, words in unseen(target, one.found.places, self.tensors, self.changes, self._quantised):
            self.accounts.problem(kind, words)
        for factor in target.delta.tensors:
            if not may_be_factor(factor, target.delta):
                words = f"{factor.key}: storage type {factor.dtype.name} of a factor"
                self.accounts.problem(UnsupportedError, words)
        if is_alone(target.delta) and one.weight != 1:
            does = "makes something of what is there" if target.delta.magnitude is None else "sets the lengths of rows"
            words = f"{key}: {kind_words(target.delta)} {does}, and has no meaning at weight {one.weight:g}"
            self.accounts.problem(UnsupportedError, words, weighted=one.position)
        self._check_plain(key)

    def _check_plain(self, key: str) -> None:
        """Refuse a tensor that holds quantised numbers."""
        reason = self._quantised(self.tensors[key].key)
        if reason:
            self.accounts.problem(UnsupportedError, f"{key}: quantised, {reason}")


def _two_words(name: str, adapter: Adapter) -> str:
    return f"{name}: two adapters hold different tensors for it, one of them {adapter.label}"
