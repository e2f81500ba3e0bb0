"""What types the fields of a PEFT `adapter_config.json` have that a merge looks at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

from lora_cli.adapters.strength import LARGEST
from lora_cli.errors import MalformedFileError


def check_types(config: Mapping[str, Any], file: str) -> None:
    """Refuse the first field whose value is of another type than PEFT writes.

    Raises:
        MalformedFileError: Which, and what it is.
    """
    for name, (words, fits) in _TYPES.items():
        if name in config and not fits(config[name]):
            raise MalformedFileError(
                "A field of the adapter's config has the wrong type",
                file=file,
                tensor=name,
                expected=words,
                found=repr(config[name])[:60],
            )


def is_set(value: object) -> bool:
    """Whether a field says anything."""
    return value not in (None, False, "", [], {})


def _is_rank(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 31


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -LARGEST < value < LARGEST


def _is_flag(value: object) -> bool:
    return value is None or isinstance(value, bool)


def _maps_to(fits: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or (isinstance(value, dict) and all(map(fits, value.values())))


def _lists(fits: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or (isinstance(value, list) and all(map(fits, value)))


def _is_place(value: object) -> bool:
    return _is_rank(value) and value >= 0


def _is_run(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_place, value)) and value[0] < value[1]


def _are_runs(value: Any) -> bool:
    return not is_set(value) or (_lists(_is_run)(value) and sum(end - first for first, end in value) <= MOST_LAYERS)


def _are_tokens(value: object) -> bool:
    return not is_set(value) or _lists(_is_place)(value) or _maps_to(_lists(_is_place))(value)


def _are_names(value: object) -> bool:
    return _lists(lambda name: isinstance(name, str))(value) and (value is None or len(value) <= MOST_NAMES)  # type: ignore[arg-type]


def _are_blocks(value: object) -> bool:
    if not is_set(value):
        return True
    if not isinstance(value, dict):
        return False
    return (
        all(_are_names(value.get(field)) for field in ("target_modules_bd_a", "target_modules_bd_b"))
        and _is_flag(value.get("match_strict"))
        and _is_rank(count := value.get("nblocks", 1))
        and count > 0
    )


MOST_NAMES = 2000
"""Names that are held against every module one after the other; models have a few for each layer."""

MOST_LAYERS = 1 << 16
"""More layers than any model has."""

_TYPES: Mapping[str, tuple[str, Callable[[object], bool]]] = {
    "r": ("a whole number", _is_rank),
    "lora_alpha": (f"a number below {LARGEST:g}", _is_number),
    "rank_pattern": ("an object of whole numbers", _maps_to(_is_rank)),
    "alpha_pattern": (f"an object of numbers below {LARGEST:g}", _maps_to(_is_number)),
    "modules_to_save": ("a list", _lists(lambda entry: True)),
    "use_dora": ("true or false", _is_flag),
    "use_rslora": ("true or false", _is_flag),
    "fan_in_fan_out": ("true or false", _is_flag),
    "ensure_weight_tying": ("true or false", _is_flag),
    "layer_replication": ("a list of layers [first, one past the last]", _are_runs),
    "trainable_token_indices": ("a list of tokens from 0 on, or one for each module", _are_tokens),
    "target_parameters": (f"a list of at most {MOST_NAMES} names", _are_names),
    "lora_B_layout": ("a word", lambda value: value is None or isinstance(value, str)),
    "use_bdlora": (f"an object with nblocks and lists of at most {MOST_NAMES} names", _are_blocks),
}
