"""Which side of each expert's matrix A meets.

Shapes say it; of squares the user, or who wrote the file and what the architecture of the base is.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lora_cli.adapters.conversions import architecture, conversions
from lora_cli.adapters.expert_layout import PACKED, ExpertLayout, Packing, Side, is_new, side_of_peft
from lora_cli.errors import ShapeError, UnsupportedError

SQUARE = "the experts are square, so their shape does not say which side of them A meets"
"""What is wrong where nothing decides."""
SIDES = (
    "--expert-layout rows (PEFT up to 0.18) or columns (PEFT from 0.19.1 on, except where the model stores its "
    "experts in × out)"
)
"""What to do then."""


@dataclass(frozen=True, slots=True)
class Told:
    """What an adapter and its user say of the side that A meets.

    Attributes:
        module: The module whose parameter it is, in the adapter's spelling.
        layout: `--expert-layout`.
        version: The version of PEFT that wrote the file, if it says one.
        outputs_first: Whether the parameter is a part that has outputs first, whatever the module has.
        others: What shapes say of stacks of the same adapter, of which the same side is meant, and one of these.
    """

    module: str
    layout: ExpertLayout = field(default_factory=ExpertLayout)
    version: str | None = None
    outputs_first: bool = False
    others: tuple[Side, str] | None = None

    def rule(self, packing: Packing, base_config: Mapping[str, Any]) -> Hashable:
        """What is equal for stacks of one adapter of which whoever wrote it means the same side."""
        if packing in PACKED:
            return "PEFT", _is_transposed(self, base_config)
        lying = _lying(self, base_config)
        return self.outputs_first, None if lying is None else frozenset(lying)

    @property
    def writer(self) -> str:
        """Who wrote the file, in words."""
        return f"PEFT {self.version}" if self.version else "a PEFT that does not say its version"


class Said(NamedTuple):
    """What is decided.

    Attributes:
        side: The side.
        reason: Why, in words.
        surprise: What a person should look at in that.
    """

    side: Side
    reason: str
    surprise: str | None = None


def settle_side(
    fits: Sequence[Side], packing: Packing, experts: int, told: Told, base_config: Mapping[str, Any]
) -> Said:
    """Decide which side A meets.

    Args:
        fits: The sides that shapes allow; one or both.
        packing: How the factors are packed: who packs them so meets one side or the other.
        experts: How many matrices there are.
        told: What the adapter and the user say.
        base_config: The base's `config.json`.

    Raises:
        ShapeError: The user says what cannot be.
        UnsupportedError: Nothing decides.
    """
    side = told.layout.side
    if side is not None:
        if side not in fits:
            raise ShapeError(f"--expert-layout says that A meets {side}, and it fits the {fits[0]} alone")
        return Said(side, "--expert-layout")
    if len(fits) == 1:
        return Said(fits[0], "by its shape", _surprise(fits[0], packing, told, base_config))
    if told.others is not None:
        found, name = told.others
        return Said(found, f"as of {name}, by its shape")
    expected = _expected(packing, experts, told, base_config)
    if expected is None:
        kind = architecture(base_config) or "a base of no known architecture"
        version = (
            f"PEFT {told.version} is not known to for {kind}" if told.version else "the config has no peft_version"
        )
        raise UnsupportedError(f"{SQUARE}, and {version}", hint=SIDES)
    return expected


def _surprise(found: Side, packing: Packing, told: Told, base_config: Mapping[str, Any]) -> str | None:
    """Words where shapes say another thing than the newest versions of PEFT do."""
    if packing not in PACKED or not is_new(told.version):
        return None
    side = side_of_peft(told.version, _is_transposed(told, base_config))
    if side in (None, found):
        return None
    return f"A fits the {found} of each expert's matrix, where {told.writer} would have it meet the {side}"


def _expected(packing: Packing, experts: int, told: Told, base_config: Mapping[str, Any]) -> Said | None:
    """The side that the writer had A meet, where that is known."""
    if packing in PACKED:
        if experts == 1:
            return Said("columns", "as PEFT takes a single expert")
        side = side_of_peft(told.version, _is_transposed(told, base_config))
        return None if side is None else Said(side, told.writer)
    # The others are of inputs and outputs, whatever the base calls rows.
    if told.outputs_first:
        return Said("columns", "of each part the outputs come first")
    lying = _lying(told, base_config)
    if lying is None:
        return None
    return Said("rows" if "inputs_first" in lying else "columns", f"the inputs of {architecture(base_config)}")


def _is_transposed(told: Told, base_config: Mapping[str, Any]) -> bool | None:
    lying = _lying(told, base_config)
    return None if lying is None else "is_transposed" in lying


def _lying(told: Told, base_config: Mapping[str, Any]) -> Collection[str] | None:
    """How the architecture has its experts; None where it, or the module's name in it, is not known."""
    known = conversions(base_config)
    lying = known.experts(told.module)
    return None if not lying and any(part.experts for part in known.parts) else lying
