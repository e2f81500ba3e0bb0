"""`lora_wrap.json`: what a wrapped checkpoint's own description says of its factors.

| field | |
|---|---|
| `schema` | `lora-cli/wrap/1` |
| `scaling` | `alpha/rank` or `alpha/sqrt(rank)` |
| `alpha` | a number; without it the strength must be given |
| `rank` | of all factors; they may be of several without it |
| `fan_in_fan_out` | whether the base stores matrices as (in × out) |
| `modules` | plain names of those with factors |
| `rename` | plain name of a tensor → the name that it has |

The tensors say the last two themselves, so that a file that says otherwise belongs to another checkpoint. A field that
is not listed here is refused: it may change the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from lora_cli.adapters.strength import LARGEST
from lora_cli.checkpoint.checkpoint import read_config
from lora_cli.checkpoint.links import is_there
from lora_cli.errors import MalformedFileError, NamesError, UnsupportedError

WRAP_FILE = "lora_wrap.json"
WRAP_SCHEMA = "lora-cli/wrap/1"

_LARGEST_RANK = 1 << 31


def read_wrap_file(path: Path) -> Mapping[str, Any]:
    """Read a wrap file, every field of which has its type then; empty where there is none.

    Raises:
        MalformedFileError: It is none, or a field has the wrong type.
        UnsupportedError: It has further fields.
    """
    if not is_there(path):
        return {}
    said = read_config(path)
    if said.get("schema") != WRAP_SCHEMA:
        raise MalformedFileError("Not a wrap file that this version knows", file=path.name, expected=WRAP_SCHEMA)
    if said.get("scaling") not in ("alpha/rank", "alpha/sqrt(rank)"):
        raise MalformedFileError(
            "The wrap file has no scaling that is known",
            file=path.name,
            tensor="scaling",
            expected="alpha/rank or alpha/sqrt(rank)",
            found=repr(said.get("scaling"))[:60],
        )
    unknown = sorted(said.keys() - {"schema", "scaling", *_TYPES})
    if unknown:
        raise UnsupportedError(
            "The wrap file has fields that this version does not know",
            file=path.name,
            details=[f"{name} = {str(said[name])[:60]}" for name in unknown],
            hint="update lora-cli, or take them out if you are sure that they change nothing",
        )
    for name, (is_right, expected) in _TYPES.items():
        if name in said and not is_right(said[name]):
            raise MalformedFileError(
                "A field of the wrap file has the wrong type",
                file=path.name,
                tensor=name,
                expected=expected,
                found=repr(said[name])[:60],
            )
    return said


def check_wrap(
    said: Mapping[str, Any], modules: Collection[str], plain: Mapping[str, str | None], *, file: str
) -> None:
    """Refuse a wrap file that speaks of other tensors than are there.

    Args:
        said: The file, read.
        modules: The modules that have factors.
        plain: Stored name of each tensor → its plain name; None for factors.
        file: Its name.

    Raises:
        NamesError: With everything that is different.
    """
    named = set(said.get("modules", modules))
    wrong = [f"{name} has no factors" for name in sorted(named.difference(modules))]
    wrong += [f"{name} has factors, and is not among the modules" for name in sorted(set(modules) - named)]
    for name, stored in said.get("rename", {}).items():
        if stored not in plain:
            wrong.append(f"{stored} is not there")
        elif plain[stored] != name:
            wrong.append(f"{stored} is {plain[stored] or 'a factor'}, not {name}")
    if wrong:
        raise NamesError(
            "The wrap file is that of another checkpoint",
            file=file,
            details=wrong,
            hint="get the one that was written with these tensors, or take modules and rename out of it",
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST < value < LARGEST


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < _LARGEST_RANK


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_renames(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(name, str) for name in value.values())


_TYPES: Mapping[str, tuple[Callable[[object], bool], str]] = {
    "alpha": (_is_number, f"a number below {LARGEST:g}"),
    "rank": (_is_rank, "a whole number above 0"),
    "fan_in_fan_out": (lambda value: isinstance(value, bool), "true or false"),
    "modules": (_is_names, "a list of names"),
    "rename": (_is_renames, "an object of names"),
}
