"""Factors of stacks of experts in a PEFT file: PEFT's own packing, and what others write by the same names.

Some writers name the parameter (`experts.gate_up_proj.lora_A`, Megatron-Bridge), or gate, up and down each by itself:
`experts.w1.lora_A`, `w3`, `w2` (Tinker), `experts.lora_gate_a` (torchtune). See `expert_layout` for the packings.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from lora_cli.adapters.adapter import Target
from lora_cli.adapters.expert_deltas import OpenExperts
from lora_cli.adapters.expert_layout import PACKED, WORDS, Packing, ranks_of
from lora_cli.adapters.expert_sides import Told
from lora_cli.adapters.formats.pairs import Pair
from lora_cli.adapters.formats.peft_keys import Found
from lora_cli.adapters.formats.peft_scales import Scales
from lora_cli.adapters.source import CONFIG_FILE, ReadOptions
from lora_cli.errors import SAVE_AGAIN, ShapeError, UnsupportedError

LAYOUT_FIELD = "lora_B_layout"

_ORDERS: Mapping[str, Packing] = {"rank_major": "packed", "grouped_by_expert": "packed-by-expert"}
_OF_EXPERTS = re.compile(r"(?:.*\.)?experts\.[^.]+", re.DOTALL)
PARTS = ("gate_proj", "up_proj", "w1", "w2", "w3")
"""Gate, up and down, each by itself: parameters with outputs first, whatever a module has that holds them together."""


def find_stacks(found: Found) -> None:
    """Find the factors of three dimensions that are no kernels: other writers' names say the parameter."""
    found.parameters |= {name for name, pair in found.pairs.items() if is_stack(name, pair)}


def is_stack(name: str, pair: Pair) -> bool:
    """Whether factors of three dimensions are of a stack of matrices; a convolution's B ends in ones."""
    a, b = (tensor.shape for tensor in pair.both)
    return len(a) == len(b) == 3 and (b[2] != 1 or _OF_EXPERTS.fullmatch(name) is not None)


class Experts:
    """Makes the targets that are parameters.

    Args:
        config: A config that was checked.
        found: The file's tensors, each pair by what it is of.
        scales: What the config says of ranks and strengths.
        options: What the user says.

    Raises:
        UnsupportedError: The config says a packing that is not known.
    """

    def __init__(self, config: Mapping[str, Any], found: Found, scales: Scales, options: ReadOptions) -> None:
        self._found = found
        self._scales = scales
        self._layout = options.expert_layout
        self._version = str(config["peft_version"]) if config.get("peft_version") else None
        said = config.get(LAYOUT_FIELD)
        if said and said not in _ORDERS:
            raise UnsupportedError(
                "The config says a packing of experts that is not known",
                file=CONFIG_FILE,
                tensor=LAYOUT_FIELD,
                expected=" or ".join(_ORDERS),
                found=said,
            )
        self._said: Packing | None = _ORDERS[said] if said else None

    def target(self, name: str, pair: Pair) -> Target:
        """The change of a parameter."""
        module, _, parameter = name.rpartition(".")
        a, b = pair.both
        told = Told(module, self._layout, self._version, parameter in PARTS)
        packings = self._packings(name, pair)
        return Target(module, parameter, OpenExperts(a, b, self._scales.scale(name), packings, self._rank(name), told))

    def check(self) -> None:
        """Refuse pairs that can be packed in no way, with the rank that the config says.

        Raises:
            ShapeError: With all of them.
        """
        wrong = []
        for name in self._found.pairs:
            pair = self._found.pairs[name]
            if name in self._found.parameters | self._found.turned and not self._packings(name, pair):
                a, b = (list(tensor.shape) for tensor in pair.both)
                rank, source = self._rank(name)
                wrong.append(f"{name}: A is {a}, B is {b}, {source} says {rank}")
        if wrong:
            raise ShapeError("Ranks do not agree", file=CONFIG_FILE, details=wrong, hint=SAVE_AGAIN)

    def warnings(self) -> Iterator[str]:
        """What a person should know."""
        if self._found.idle_entries and not self._found.parameters:
            names = ", ".join(self._found.idle_entries)
            yield f"target_parameters of the config names {names}, and the file has no factors of any parameter"
        order = self._layout.order
        if self._said and order and not self._layout.allows(self._said):
            yield f"{LAYOUT_FIELD} of the config says that {WORDS[self._said]}; --expert-layout {order} goes before it"

    def _rank(self, name: str) -> tuple[int, str]:
        return self._scales.rank(name) or (8, "PEFT's default r")

    def _packings(self, name: str, pair: Pair) -> tuple[Packing, ...]:
        """How factors may be packed; several only where they have three dimensions."""
        a, b = (tensor.shape for tensor in pair.both)
        rank, order = self._rank(name)[0], self._layout.order
        if len(a) == len(b) == 2:
            shared = a[0] == b[1] and 0 not in a + b and rank > 0 and a[0] % rank == 0
            said = next(packing for packing in PACKED if self._layout.allows(packing)) if order else self._said
            return (said or "packed",) if shared else ()
        turned = name in self._found.turned
        ways: tuple[Packing, ...] = ("stacked-turned",) if turned else ("stacked", "stacked-last")
        ranks = ranks_of(a, b)
        found = tuple(packing for packing in ways if ranks.get(packing) == rank)
        return tuple(packing for packing in found if self._layout.allows(packing)) if len(found) > 1 else found
