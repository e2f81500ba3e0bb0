"""PEFT folders: `adapter_config.json` beside `adapter_model.safetensors` (huggingface/peft, `utils/save_and_load.py`).

Keys are `base_model.model.<module>.lora_A.weight` (rank × in), `.lora_B.weight` (out × rank), `.lora_B.bias` (out), and
whole tensors without infix. Of a convolution both are kernels, (rank, in, k…) and (out, rank, 1…); of an embedding they
are `.lora_embedding_A` (rank × entries) and `.lora_embedding_B` (dim × rank). DoRA has `.lora_magnitude_vector` (out)
besides. Trained rows of a table are `.token_adapter.trainable_tokens_delta` (rows × dim): the rows themselves, whatever
their name says. Of `torch.nn.MultiheadAttention` the input projection has `<module>.lora_A`, and the output projection
`<module>.base_layer.out_proj.lora_A`. Factors of parameters (`target_parameters`) have the module's name alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lora_cli.adapters.adapter import Adapter, Delta, Target
from lora_cli.adapters.deltas import LowRank, LowRankBias, LowRankBlocks, LowRankKernel
from lora_cli.adapters.formats.pairs import Pair, check_pairs
from lora_cli.adapters.formats.peft_blocks import Blocks
from lora_cli.adapters.formats.peft_experts import Experts, find_stacks
from lora_cli.adapters.formats.peft_keys import Found, settle_attention, sort_keys
from lora_cli.adapters.formats.peft_parameters import name_parameters
from lora_cli.adapters.formats.peft_scales import Scales, check_ranks, twice
from lora_cli.adapters.formats.peft_ties import changes_as_one
from lora_cli.adapters.formats.peft_tuners import read_tuner
from lora_cli.adapters.formats.peft_wholes import check_unnamed, replacements, trained_rows
from lora_cli.adapters.peft_config import check_fields, initial_of, layers_of
from lora_cli.adapters.source import CONFIG_FILE, AdapterSource, ReadOptions
from lora_cli.adapters.tuners import TUNERS
from lora_cli.checkpoint.checkpoint import StoredTensor
from lora_cli.errors import SAVE_AGAIN, ShapeError, UnsupportedError

NAME = "peft"

_ADDS_TWICE = (0, 21)
"""The last version of PEFT of which it is known that it adds the change of an attention's output projection twice."""


def detect(source: AdapterSource) -> str | None:
    """Say why this is a PEFT adapter, or None."""
    if source.config is not None and "peft_type" in source.config:
        return f"{CONFIG_FILE} has peft_type"
    return None


def read(source: AdapterSource, options: ReadOptions) -> Adapter:
    """Read the adapter; see the module for the format.

    Raises:
        UnsupportedError: Another tuner, or a variant, field or tensor that is not supported.
        NamesError: A factor without its partner, or two tensors that are one parameter.
        ShapeError: Ranks that disagree.
        MalformedFileError: The config does not fit the file.
    """
    config, file = source.config or {}, source.shard.name
    tuner = TUNERS.get(str(config.get("peft_type")))
    if tuner is not None:
        return read_tuner(source, options, tuner, detect(source) or "")
    ignored = check_fields(config, file=CONFIG_FILE, ignore=options.ignore_fields)
    found = sort_keys(source)
    check_pairs(found.pairs, file)
    name_parameters(found, config, file)
    find_stacks(found)
    settle_attention(found, file)
    reader = _Reader(config, options, found, file)
    whole, copies = replacements(found, config, file)
    rows, empty = trained_rows(found, config, file)
    targets = (*reader.weights(), *reader.biases())
    unnamed = check_unnamed(whole, {target.module for target in targets}, file)
    return Adapter(
        label=source.label,
        path=source.path,
        format=NAME,
        evidence=detect(source) or "",
        targets=targets,
        replacements=tuple(whole),
        rows=tuple(rows),
        layers=layers_of(config),
        tied=changes_as_one(config, targets, whole),
        initial=initial_of(config, ignored),
        unread=(*found.unread, *reader.alone()),
        skipped=(*found.skipped, *reader.idle(), *copies, *empty),
        config=config,
        transposed_hint=config.get("fan_in_fan_out") is True,  # as PEFT takes it where the config does not say
        orientation="ba",
        ignored_fields=ignored,
        stored=len(source.tensors),
        warnings=(*reader.warnings(), *unnamed),
    )


class _Reader:
    """Makes deltas of the factors of one file."""

    def __init__(self, config: Mapping[str, Any], options: ReadOptions, found: Found, file: str) -> None:
        self._config = config
        self._found = found
        self._scales = Scales(config, options)
        self._blocks = Blocks(config)
        self._experts = Experts(config, found, self._scales, options)
        self._experts.check()
        modules = [module for module in found.pairs if module not in found.parameters]
        _refuse_stacks({module: found.pairs[module] for module in modules}, file)
        self._blocks.check(modules)
        check_ranks(found, modules, self._scales, self._blocks)
        self._check_biases(file)

    def _check_biases(self, file: str) -> None:
        """The bias of a B factor has one number for each of its outputs, of whatever kind of layer it is."""
        pairs, biases = self._found.pairs, self._found.biases
        held = [(b, pairs[module].both[1].shape[0]) for module, b in biases.items() if module in pairs]
        wrong = [f"{b.key}: {list(b.shape)} for {out} outputs" for b, out in held if b.shape != (out,)]
        if wrong:
            raise ShapeError(
                "The bias of a factor is not one number for each output", file=file, details=wrong, hint=SAVE_AGAIN
            )

    def weights(self) -> list[Target]:
        """The changes that pairs of factors make."""
        targets = [self._weight(module, pair) for module, pair in self._found.pairs.items()]
        _check_magnitudes(targets, self._config)
        return targets

    def _weight(self, module: str, pair: Pair) -> Target:
        if module in self._found.parameters:
            return self._experts.target(module, pair)
        scale = self._scales.scale(self._found.in_config(module))
        if self._found.attention_of(module) and self._adds_twice:
            scale = twice(scale)
        parameter = "in_proj_weight" if module in self._found.attention else "weight"
        a, b = pair.both
        magnitude = self._found.magnitudes.get(module)
        delta: Delta
        if len(a.shape) > 2:
            delta = LowRankKernel(a, b, scale, magnitude=magnitude)
        elif kind := self._blocks.kind(module):
            delta = LowRankBlocks(a, b, scale, kind, self._blocks.count)
        else:
            table = module in self._found.tables
            delta = LowRank(a, b, scale, kind="lora-embedding" if table else "lora", magnitude=magnitude)
        return Target(module, parameter, delta)

    def biases(self) -> Iterator[Target]:
        """The changes that biases of B factors make."""
        for module, b in self._found.biases.items():
            if module in self._found.pairs and module not in self._found.attention:
                yield Target(module, "bias", LowRankBias(b, self._scales.scale(self._found.in_config(module))))

    def idle(self) -> Iterator[tuple[StoredTensor, str]]:
        """What PEFT stores and does not use."""
        for module in self._found.attention & self._found.biases.keys():
            yield self._found.biases[module], "PEFT never adds the bias of an attention's input factors"

    def alone(self) -> Iterator[StoredTensor]:
        """What belongs to factors that are not there."""
        for several in (self._found.biases, self._found.magnitudes):
            yield from (tensor for module, tensor in several.items() if module not in self._found.pairs)

    def warnings(self) -> Iterator[str]:
        """What a person should know."""
        names = dict.fromkeys(map(self._found.in_config, self._found.pairs))
        yield from self._scales.ambiguous(names)
        yield from self._experts.warnings()
        if not self._found.attention:
            return
        said = f"PEFT {self._config.get('peft_version') or 'before 0.18'}"
        told = f"said to be made by {said}: {min(self._found.attention)}.out_proj"
        known = "PEFT up to 0.21 adds the change of attention's output projections twice (huggingface/peft#3774)"
        if self._adds_twice:
            yield f"{known}, so twice the scale is taken for this adapter, {told}"
        else:
            yield f"{known}; once is taken for this adapter, {told}"

    @property
    def _adds_twice(self) -> bool:
        match = re.match(r"(\d+)\.(\d+)", str(self._config.get("peft_version") or "0.0"))
        return match is None or tuple(map(int, match.groups())) <= _ADDS_TWICE


def _check_magnitudes(targets: Iterable[Target], config: Mapping[str, Any]) -> None:
    """Each output has one magnitude; of a convolution they are in the shape of what it gives."""
    found = [(target, target.delta.magnitude) for target in targets]
    lost = [target.module for target, magnitude in found if magnitude is None and config.get("use_dora")]
    if lost:
        raise UnsupportedError("The config says DoRA, and the file lacks magnitudes", file=CONFIG_FILE, details=lost)
    wrong = [
        f"{target.module}: {list(magnitude.shape)} for {target.delta.shape[0]} outputs"
        for target, magnitude in found
        if magnitude is not None
        and {math.prod(magnitude.shape), max(magnitude.shape, default=0)} != {target.delta.shape[0]}
    ]
    if wrong:
        raise ShapeError("There is not one magnitude for each output", file=CONFIG_FILE, details=wrong, hint=SAVE_AGAIN)
    untold = [target.module for target, magnitude in found if magnitude is not None and not config.get("use_dora")]
    if untold:
        raise UnsupportedError(
            "The file has DoRA's magnitudes, and the config does not say use_dora",
            file=CONFIG_FILE,
            details=untold,
            hint="PEFT would leave them out: say use_dora there, or take lora_magnitude_vector out of the file",
        )


def _refuse_stacks(pairs: Mapping[str, Pair], file: str) -> None:
    """Refuse factors of more dimensions that are no kernels: a convolution's B ends in ones."""
    stacks = [
        f"{module}: A is {list(a.shape)}, B is {list(b.shape)}"
        for module, (a, b) in ((module, pair.both) for module, pair in pairs.items())
        if max(len(a.shape), len(b.shape)) > 2 and not (len(a.shape) == len(b.shape) and set(b.shape[2:]) <= {1})
    ]
    if stacks:
        raise UnsupportedError("Factors of these shapes are of no layer that is known", file=file, details=stacks)
