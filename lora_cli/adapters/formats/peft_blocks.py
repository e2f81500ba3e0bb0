"""Which factors are block-diagonal, as `use_bdlora` of a PEFT config says (PEFT's `BdLoraLinearVariant`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lora_cli.adapters.deltas import BlocksKind, is_block_pair
from lora_cli.adapters.source import CONFIG_FILE
from lora_cli.errors import MalformedFileError

_FIELDS: Mapping[BlocksKind, str] = {"lora-blocks-a": "target_modules_bd_a", "lora-blocks-b": "target_modules_bd_b"}


class Blocks:
    """What `use_bdlora` says.

    Args:
        config: A config that was checked.

    Attributes:
        count: How many blocks there are.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        said = config.get("use_bdlora") or {}
        self.count: int = said.get("nblocks", 1)
        self._parts: dict[BlocksKind, list[str]] = {kind: said.get(field) or [] for kind, field in _FIELDS.items()}
        self._strict = bool(said) and said.get("match_strict") is not False

    def kind(self, module: str) -> BlocksKind | None:
        """Which factor of a module has blocks: that whose list has a part of the module's name."""
        return next((kind for kind, parts in self._parts.items() if any(part in module for part in parts)), None)

    def fit(self, a: tuple[int, ...], b: tuple[int, ...], kind: BlocksKind) -> bool:
        """Whether factors of these shapes can have such blocks."""
        return is_block_pair(a, b, kind, self.count)

    def check(self, modules: Iterable[str]) -> None:
        """Refuse modules of which the config says both, or nothing though it must: PEFT refuses them too.

        Raises:
            MalformedFileError: With all of them.
        """
        if not any(self._parts.values()) and not self._strict:
            return
        matches = {module: sum(any(p in module for p in parts) for parts in self._parts.values()) for module in modules}
        wrong = [f"{module} is in both lists" for module, count in matches.items() if count > 1]
        wrong += [f"{module} is in no list" for module, count in matches.items() if self._strict and not count]
        if wrong:
            raise MalformedFileError(
                "The config does not say which of two factors is block-diagonal",
                file=CONFIG_FILE,
                tensor="use_bdlora",
                details=wrong,
            )
