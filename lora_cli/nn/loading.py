"""Reading an adapter from files into a live model: every format that `lora-cli merge` reads."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lora_cli.adapters.adapter import Adapter, Replacement, Target
from lora_cli.adapters.formats import open_adapter
from lora_cli.adapters.modules import Module
from lora_cli.adapters.patterns import compile_user_pattern
from lora_cli.adapters.resolve import resolve
from lora_cli.adapters.source import ReadOptions
from lora_cli.checkpoint.digests import bytes_digest, rows_per_cut
from lora_cli.checkpoint.dtypes import dtype_for_torch
from lora_cli.checkpoint.tied import TABLES
from lora_cli.errors import NamesError, ShapeError, UnsupportedError
from lora_cli.nn.config import LoRAConfig
from lora_cli.nn.layer import LoRALayer
from lora_cli.surgery.fitting import mark_of
from lora_cli.surgery.readers import Readers, open_readers, raw_bytes


@dataclass(frozen=True)
class Found:
    """An adapter in files, with the places in a model that it is for.

    Attributes:
        adapter: What the files say.
        targets: Module of the model → its change.
        wholes: Parameter of the model by its plain name → what takes its place.
    """

    adapter: Adapter
    targets: Mapping[str, Target]
    wholes: Mapping[str, Replacement]

    def config(self, *, dropout: float | None = None) -> LoRAConfig:
        """The config that gives these modules factors of these ranks and strengths.

        Args:
            dropout: In training from now on; what the files say unless given.
        """
        said = self.adapter.config
        scales = {name: target.delta.scale for name, target in self.targets.items()}
        numbers = {
            name: (target.delta.rank, scales[name].alpha * (1 if scales[name].rank else target.delta.rank))
            for name, target in self.targets.items()
        }
        common = Counter(numbers.values()).most_common(1)[0][0]
        saved = [str(entry) for entry in said.get("modules_to_save") or ()]
        return LoRAConfig(
            rank=common[0],
            alpha=common[1],
            targets=(Among(frozenset(self.targets)),),
            dora=any(target.delta.magnitude is not None for target in self.targets.values()),
            rslora=any(scale.rslora for scale in scales.values()),
            dropout=float(said.get("lora_dropout") or 0.0) if dropout is None else dropout,
            rank_pattern={_exactly(name): rank for name, (rank, _) in numbers.items() if rank != common[0]},
            alpha_pattern={_exactly(name): alpha for name, (_, alpha) in numbers.items() if alpha != common[1]},
            bias=said.get("bias") or "none",
            modules_to_save=tuple(entry for entry in saved if self._has_whole(entry)),
        )

    def without_copies(self, frozen: Collection[str], tensors: Mapping[str, Tensor]) -> Found:
        """The same without the base's own weights, which PEFT stores beside factors of tables, and resized tables.

        Args:
            frozen: Modules that have factors already.
            tensors: Parameters and buffers of the model, by plain name.

        Raises:
            UnsupportedError: The model's own weight there is another.
        """
        layers = {*frozen, *self.targets}
        copies = {
            key: whole for key, whole in self.wholes.items() if whole.of_base or key.removesuffix(".weight") in layers
        }
        with open_readers() as readers:
            others = [key for key, whole in copies.items() if not _equal(readers.load(whole.tensor), tensors[key])]
        if others:
            raise UnsupportedError(
                "The adapter holds weights of its base, and the model's are others",
                file=self.adapter.label,
                details=others,
                hint="load these weights into the model first",
            )
        return replace(self, wholes={key: whole for key, whole in self.wholes.items() if key not in copies})

    def _has_whole(self, entry: str) -> bool:
        # PEFT lists the heads that a task may have, whether the model has them or not.
        matches = compile_user_pattern(entry)
        return any(matches(name.rpartition(".")[0]) for name in self.wholes)

    def _check_base(self, layers: Mapping[str, LoRALayer]) -> None:
        """Refuse a model whose weights still have what the adapter's first factors took, where its receipt tells."""
        mark = mark_of(self.adapter.path)
        if mark is None:
            return
        module = next((module for module, target in self.targets.items() if target.module == mark.module), None)
        if module is None or layers[module].base_weight.is_meta:
            return
        weight = layers[module].base_weight
        stored = dtype_for_torch(str(weight.dtype))
        rows = rows_per_cut(weight.shape, stored)
        warning = mark.compare(
            stored.name,
            weight.shape,
            lambda: bytes_digest(raw_bytes(weight.detach()[:rows].cpu().contiguous())),
            adapter=self.adapter.label,
            base="the model",
        )
        if warning:
            warnings.warn(warning, stacklevel=5)  # to who called `Injection.load`

    @torch.no_grad()
    def fill(self, layers: Mapping[str, LoRALayer], tensors: Mapping[str, Tensor], name: str) -> None:
        """Copy what the files hold into the layers and the rest of the model.

        Args:
            layers: The layers that have an adapter of this name, by every name of their modules.
            tensors: Parameters and buffers of the model, by plain name.
            name: The adapter's.

        Raises:
            ShapeError: Something has another shape in the model.
            WrongInputError: The adapter fits what is left of another base alone; see `surgery.fitting`.
        """
        self._check_base(layers)
        with open_readers() as readers:
            for module, target in self.targets.items():
                _fill(layers[module], target, readers, name)
            for key, replacement in self.wholes.items():
                _copy(tensors[key], readers.load(replacement.tensor), key)


@dataclass(frozen=True)
class Among:
    """A target that is any module of these names."""

    names: frozenset[str]

    def __call__(self, module: Module) -> bool:
        """Whether it is one of them."""
        return module.name in self.names


def find(folder: str | Path, tensors: Mapping[str, Tensor], options: ReadOptions) -> Found:
    """Open an adapter and find the places that it is for.

    Args:
        folder: A PEFT folder, or a file that `lora-cli merge` takes.
        tensors: Parameters and buffers of the model, by plain name.
        options: How it is read: `--alpha`, `--scale` and fields to ignore.

    Raises:
        NamesError: Tensors that have no place in the model.
        UnsupportedError: Changes that no layer here makes.
        LoraCliError: What reading the files raises.
    """
    adapter = open_adapter(Path(folder), options)
    _refuse_what_no_layer_does(adapter)
    replacements = {replacement.name: replacement for replacement in adapter.replacements}
    names = [*(target.name for target in adapter.targets), *replacements]
    found = resolve(names, tensors, file=adapter.label)
    lost = [name.name for name in found.unmapped] + [tensor.key for tensor in adapter.unread]
    if lost:
        raise NamesError("The adapter has tensors with no place in the model", file=adapter.label, details=lost)
    return Found(
        adapter,
        {found.keys[target.name].removesuffix(".weight"): target for target in adapter.targets},
        {found.keys[name]: replacement for name, replacement in replacements.items()},
    )


def _refuse_what_no_layer_does(adapter: Adapter) -> None:
    """Refuse an adapter of which layers beside frozen weights could do only a part."""
    for reason, names in _beyond_layers(adapter):
        if names:
            hint = "merge it into the base's files (lora-cli merge), and load those"
            raise UnsupportedError(reason, file=adapter.label, details=names, hint=hint)


def _beyond_layers(adapter: Adapter) -> Iterator[tuple[str, list[str]]]:
    """What no layer does, and what of it the adapter asks for."""
    yield "LoRA layers have no bias of their own", [t.name for t in adapter.targets if t.parameter == "bias"]
    attention = [target.name for target in adapter.targets if target.parameter == "in_proj_weight"]
    yield "PEFT and layers here mean two things by an adapter of attention", attention
    yield "No layer trains single rows of a table", [rows.name for rows in adapter.rows]
    layers = adapter.layers or ()
    repeated = [] if layers == tuple(range(len(layers))) else [f"layer_replication makes layers {layers}"]
    yield "The adapter is for a model in which layers are repeated", repeated
    tables = [name for name in adapter.names if not TABLES.isdisjoint(name.split(".")[-2:-1])]
    yield "The adapter changes tied tensors as one (ensure_weight_tying)", tables if adapter.tied else []
    initial = [] if adapter.initial is None else [f"init_lora_weights is {adapter.initial}"]
    yield "The init of the adapter changed its base, and the files do not say how", initial


def _fill(layer: LoRALayer, target: Target, readers: Readers, name: str) -> None:
    if target.delta.stack is not None:
        raise UnsupportedError("Stacks are read into layers by their own state", tensor=target.module)
    selected = layer.selected(target.module)
    if target.delta.shape != (selected.out, selected.inner):
        raise ShapeError(
            "The adapter is for a layer of another size",
            tensor=target.module,
            expected=f"{selected.out} × {selected.inner}",
            found=f"{target.delta.shape[0]} × {target.delta.shape[1]}",
        )
    term = target.delta.term(readers.load, 1.0)
    for factor, found in ((layer.lora_A[name], term.a), (layer.lora_B[name], term.b)):
        _copy(factor, found.reshape(factor.shape), target.module)
    if target.delta.magnitude is not None:
        _copy(layer.lora_magnitude[name], readers.load(target.delta.magnitude).reshape(-1), target.module)


def _equal(found: Tensor, own: Tensor) -> bool:
    """Whether a stored tensor is the model's, which may hold it in another type."""
    return found.shape == own.shape and torch.equal(found.to(own.device, own.dtype), own)


def _copy(parameter: Tensor, found: Tensor, name: str) -> None:
    if found.shape != parameter.shape:
        raise ShapeError("A tensor has another shape", tensor=name, expected=parameter.shape, found=found.shape)
    parameter.copy_(found)


def _exactly(name: str) -> str:
    return "re:" + re.escape(name)
