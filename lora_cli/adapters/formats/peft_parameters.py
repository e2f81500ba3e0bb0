"""Which factors of a PEFT file are of parameters, as `target_parameters` of the config says, and of which.

PEFT's names say the module alone. Where several parameters of a module have factors, their wrappers are nested: the one
that the module declares first is innermost, so that of two the first has `X.base_layer.lora_A`, the second `X.lora_A`.
Modules within a wrapped one have the infix in their names too.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any

from lora_cli.adapters.formats.pairs import Pair
from lora_cli.adapters.formats.peft_keys import Found
from lora_cli.adapters.patterns import endings
from lora_cli.adapters.source import CONFIG_FILE
from lora_cli.errors import NamesError, UnsupportedError
from lora_cli.regex import untrusted

DECLARED = (
    ("gate_proj", "up_proj", "gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"),
    ("w1", "v1", "w2"),
)
"""Parameters that modules of transformers have several of, in the order in which these declare them."""

_INFIX = ".base_layer"
_WITHIN = re.compile(r"(?P<outer>.+?)(?:\.base_layer)+\.(?P<inner>.+)", re.DOTALL)


def name_parameters(found: Found, config: Mapping[str, Any], file: str) -> None:
    """Call pairs of factors by the parameters that they are of; note entries of the config that name none.

    Args:
        found: The file's tensors; pairs and `parameters` are changed.
        config: A config that was checked.
        file: The file's name.

    Raises:
        UnsupportedError: Nested factors of which nothing says what they are of.
        NamesError: Two pairs are of one parameter.
    """
    entries = _Entries(config)
    if entries:
        _Namer(found, entries, file).name()
    left = [*found.pairs, *found.biases, *found.magnitudes]
    nested = [name for name in left if name.endswith(_INFIX)]
    if nested:
        raise UnsupportedError(
            "Nested LoRA, and target_parameters of the config does not say which parameters it is of",
            file=file,
            details=nested,
        )


class _Entries:
    """What `target_parameters` says."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._all = list(dict.fromkeys(config.get("target_parameters") or ()))
        self._modules = config.get("target_modules")
        self._listed = frozenset[str]() if isinstance(self._modules, str) else frozenset(map(str, self._modules or ()))
        self._bare = [entry for entry in self._all if "." not in entry]
        self._by_leaf: defaultdict[str, list[tuple[str, str]]] = defaultdict(list)
        for module, _, parameter in (entry.rpartition(".") for entry in self._all):
            if module:
                self._by_leaf[module.rpartition(".")[2]].append((module, parameter))

    def __bool__(self) -> bool:
        return bool(self._all)

    def name(self, parameter: str) -> bool:
        """Whether one of them is this parameter's name or its end."""
        return any(_ends(parameter, entry) for entry in self._all)

    def naming_none_of(self, parameters: Collection[str]) -> list[str]:
        """Those that none of some parameters are meant by."""
        return [entry for entry in self._all if not any(_ends(parameter, entry) for parameter in parameters)]

    def of(self, module: str, count: int) -> list[str]:
        """The parameters of a module that `count` pairs may be of; none where the module itself was a target."""
        leaf = module.rpartition(".")[2]
        named = [parameter for ending, parameter in self._by_leaf[leaf] if _ends(module, ending)]
        if len(named) < count and not (count == 1 and self._is_target(module)):
            named += self._bare
        return list(dict.fromkeys(named))

    def _is_target(self, module: str) -> bool:
        """Whether `target_modules` means a module, as PEFT matches it."""
        if not isinstance(self._modules, str):
            return not self._listed.isdisjoint(endings(module))
        try:
            return untrusted(self._modules, "({})$")(module)
        except UnsupportedError:
            return len(self._bare) > 1  # a module has one pair, and each of these would be another


class _Namer:
    """Finds the parameters of the pairs of one file. Used once."""

    def __init__(self, found: Found, entries: _Entries, file: str) -> None:
        self._found = found
        self._entries = entries
        self._file = file
        self._names: dict[str, str] = {}
        self._parameters: set[str] = set()
        self._lost: list[str] = []

    def name(self) -> None:
        levels: defaultdict[str, list[str]] = defaultdict(list)
        for name in sorted(self._found.pairs, key=len):
            outer = name
            while outer.endswith(_INFIX):
                outer = outer.removesuffix(_INFIX)
            levels[self._within(outer)].append(name)
        for module, names in levels.items():
            self._assign(module, names)
        if self._lost:
            raise UnsupportedError(
                "The config does not say which parameters these factors are of",
                file=CONFIG_FILE,
                tensor="target_parameters",
                details=self._lost,
            )
        pairs: dict[str, Pair] = {}
        for name, pair in self._found.pairs.items():
            new = self._names.get(name, name)
            if new in pairs:
                raise NamesError("Two pairs of factors are of one parameter", file=self._file, tensor=new)
            pairs[new] = pair
        self._found.pairs = pairs
        self._found.parameters |= self._parameters
        self._found.idle_entries = self._entries.naming_none_of(self._parameters)

    def _within(self, name: str) -> str:
        """The name of a module within a wrapped one, without the infix."""
        match = _WITHIN.fullmatch(name)
        if match is None or not self._entries.of(match["outer"], 1):
            return name
        return self._within(f"{match['outer']}.{match['inner']}")

    def _assign(self, module: str, names: list[str]) -> None:
        """Give the pairs of one module, from the outermost in, their parameters."""
        if names == [module] and self._entries.name(module):
            self._parameters.add(module)  # other writers name the parameter
            return
        parameters = self._entries.of(module, len(names))
        if not parameters:
            self._names.update({name: module for name in names if not name.endswith(_INFIX)})
            return
        inwards = _inwards(parameters)
        if inwards is None or len(inwards) != len(names):
            several = f"{len(names)} pairs" if len(names) > 1 else "1 pair"
            self._lost.append(f"{module}: {several}, and target_parameters names {', '.join(parameters)}")
            return
        for name, parameter in zip(names, inwards, strict=True):
            self._names[name] = f"{module}.{parameter}"
            self._parameters.add(self._names[name])


def _inwards(parameters: list[str]) -> list[str] | None:
    """Parameters of one module in the order of their wrappers, from the outermost in; None where it is not known."""
    if len(parameters) == 1:
        return parameters
    for declared in DECLARED:
        if {*parameters} <= {*declared}:
            return sorted(parameters, key=declared.index, reverse=True)
    return None


def _ends(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")
