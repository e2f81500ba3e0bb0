"""Making the plan of a fresh adapter from headers: as a PEFT folder, or beside the weights of a whole checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lora_cli.adapters.formats.peft_keys import PREFIX
from lora_cli.adapters.inits import ZEROS, FreshTensor
from lora_cli.adapters.names import Wrap, colliding
from lora_cli.adapters.peft_writer import adapter_config, is_bare, peft_keys, rendered, target_names, task_type
from lora_cli.adapters.source import CONFIG_FILE
from lora_cli.adapters.targets import Selected, factor_shapes
from lora_cli.adapters.wrap_file import WRAP_SCHEMA
from lora_cli.checkpoint.checkpoint import ADAPTER_FILE, Checkpoint, Shard, StoredTensor
from lora_cli.checkpoint.header import Header, render_header
from lora_cli.checkpoint.sidefiles import SideFile, side_files
from lora_cli.errors import NamesError
from lora_cli.surgery.edit import Edit, Operation
from lora_cli.surgery.inject_options import InjectOptions
from lora_cli.surgery.plan import OutputFile, Plan
from lora_cli.surgery.principal import FRESH_KEYS, Taken, TakenTensor

_Row = tuple[str, Operation, StoredTensor | FreshTensor]


@dataclass(frozen=True, slots=True)
class Injection:
    """A fresh adapter as it will be written.

    Attributes:
        base: The checkpoint that it is for.
        modules: The modules that get factors.
        options: What the user said.
        base_id: The base's id on the Hub, with its revision; None for a local one.
        taken: Factors that are taken from the base's weights, once they are computed.
        names: Key → the name of that parameter in memory, where it is one.
    """

    base: Checkpoint
    modules: tuple[Selected, ...]
    options: InjectOptions
    base_id: str | None = None
    taken: Taken = field(default_factory=Taken)
    names: Mapping[str, str] = field(default_factory=dict)

    def plan(self) -> Plan:
        """Lay out the output.

        Raises:
            NamesError: The base has names already that the wrapped layout would give.
        """
        if self.options.layout == "adapter":
            files: tuple[OutputFile, ...] = (self._adapter_file(),)
            data = rendered(self.adapter_config())
            return self._plan(files, [SideFile(CONFIG_FILE, None, len(data), data)], [])
        wrap = Wrap(frozenset(module.module for module in self.modules))
        self._check_names(wrap)
        files = tuple(self._wrapped_file(shard, wrap) for shard in self.base.shards)
        sides, left_out = side_files(self.base)
        return self._plan(files, [*sides, *self._index(files)], left_out)

    def _plan(self, files: tuple[OutputFile, ...], sides: Sequence[SideFile], left_out: Sequence[str]) -> Plan:
        return Plan(
            operation="inject",
            checkpoint=self.base,
            files=files,
            side_files=tuple(sides),
            left_out=tuple(left_out),
            adapters=(),
            opened=(),
            ledger=(),
            dropped=(),
            inputs=tuple(self.base.paths),
            warnings=self.base.warnings,
        )

    def factors(self, module: Selected) -> tuple[FreshTensor, FreshTensor]:
        """A and B of one module. Their numbers depend on the module's name and the seed, not on the layout.

        A is drawn and B is zero for every kind of module. PEFT begins with the other one on embeddings: the product is
        zero either way, and the gradient reaches the one that is zero first.
        """
        options = self.options
        a, b = (form.format(module.module) for form in FRESH_KEYS)
        shapes = factor_shapes(module, options.rank)
        if options.principal:
            return self._taken(a, module, shapes[0]), self._taken(b, module, shapes[1])
        return (
            FreshTensor(
                a, options.storage, shapes[0], options.init, options.seed, options.width, module.kind == "embedding"
            ),
            FreshTensor(b, options.storage, shapes[1], ZEROS),
        )

    def _taken(self, key: str, module: Selected, shape: tuple[int, ...]) -> TakenTensor:
        options = self.options
        return TakenTensor(
            key,
            options.storage,
            shape,
            options.init,
            options.seed,
            matrix=(module.out, module.inner),
            options=options,
            taken=self.taken,
        )

    # A PEFT folder

    def _adapter_file(self) -> OutputFile:
        factors = [
            (f"{PREFIX}{key}", fresh)
            for module in self.modules
            for key, fresh in zip(
                peft_keys(replace(module, module=self.live_name(module))), self.factors(module), strict=True
            )
        ]
        # In the order in which the safetensors library writes tensors of one type.
        rows: list[_Row] = [(key, "append", fresh) for key, fresh in sorted(factors, key=lambda row: row[0])]
        header = _header(rows, {"format": "pt"})
        return OutputFile(ADAPTER_FILE, header, _edits(rows, header), None)

    def live_name(self, module: Selected) -> str:
        """What a module is called in memory, where PEFT looks for it; a part of one has the name in the files."""
        return self.names.get(module.key, module.key).removesuffix(".weight")

    def adapter_config(self) -> dict[str, Any]:
        """What `adapter_config.json` says."""
        config = self.base.config
        live = [self.names.get(key, key) for key in self.base.tensors]
        return adapter_config(
            target_names(list(map(self.live_name, self.modules)), live, bare=is_bare(config)),
            self.options.scale,
            task=task_type(config),
            fan_in_fan_out=self.transposed,
            init=self.options.init,
            # Who loads what this names beside the factors must not get the base that they were taken from.
            base_id=None if self.options.principal else self.base_id,
        )

    @property
    def transposed(self) -> bool:
        """Whether the base stores matrices of these linear modules as (in × out)."""
        return any(module.transposed for module in self.modules)

    # A wrapped checkpoint

    def wrap_file(self) -> bytes:
        """What `lora_wrap.json` says: the way back to plain names, and the scale."""
        wrap = Wrap(frozenset(module.module for module in self.modules))
        scale = self.options.scale
        document = {
            "schema": WRAP_SCHEMA,
            "rank": scale.rank,
            "alpha": scale.alpha,
            "scaling": "alpha/sqrt(rank)" if scale.rslora else "alpha/rank",
            "fan_in_fan_out": self.transposed,
            "modules": [module.module for module in self.modules],
            "rename": {key: new for key in self.base.tensors if (new := wrap(key)) is not None},
        }
        return (json.dumps(document, indent=2, ensure_ascii=True, allow_nan=False) + "\n").encode()

    def _check_names(self, wrap: Wrap) -> None:
        keys = self.base.tensors
        taken = [f"{one} and {other} would both be {new}" for one, other, new in colliding(wrap, keys)]
        taken += [f"{fresh.key} is there" for m in self.modules for fresh in self.factors(m) if fresh.key in keys]
        if taken:
            raise NamesError("The base has names that a wrapped checkpoint needs", file=self.base.label, details=taken)

    def _wrapped_file(self, shard: Shard, wrap: Wrap) -> OutputFile:
        targets = {module.key: module for module in self.modules}
        rows: list[_Row] = []
        for info in shard.header.tensors:
            new = wrap(info.name)
            rows.append((new or info.name, "rename" if new else "keep", StoredTensor(shard, info)))
            if info.name in targets:
                rows += [(fresh.key, "append", fresh) for fresh in self.factors(targets[info.name])]
        changed = any(operation != "keep" for _, operation, _ in rows)
        header = _header(rows, shard.header.metadata) if changed else shard.header
        return OutputFile(shard.name, header, _edits(rows, header), shard)

    def _index(self, files: Sequence[OutputFile]) -> tuple[SideFile, ...]:
        index = self.base.index
        if index is None:
            return ()
        weight_map = {edit.key: file.name for file in files for edit in file.edits}
        if list(index.weight_map) == sorted(index.weight_map):
            weight_map = dict(sorted(weight_map.items()))
        data = index.rewritten(weight_map, sum(edit.nbytes for file in files for edit in file.edits))
        return (SideFile(index.name, None, len(data), data),)


def _header(rows: Sequence[_Row], metadata: Mapping[str, str] | None) -> Header:
    return render_header([(key, origin.dtype, origin.shape) for key, _, origin in rows], metadata)


def _edits(rows: Sequence[_Row], header: Header) -> tuple[Edit, ...]:
    places = {info.name: info for info in header.tensors}
    edits = [
        Edit(key, operation, origin, origin.dtype, origin.shape, places[key].begin, places[key].end)
        for key, operation, origin in rows
    ]
    return tuple(sorted(edits, key=lambda edit: (edit.begin, edit.end)))
