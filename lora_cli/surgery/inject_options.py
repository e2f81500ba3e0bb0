"""What a user says about a fresh adapter, from arguments and from a config file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from lora_cli.adapters.fresh import FreshOptions, check
from lora_cli.adapters.target_files import patterns, read_mapping
from lora_cli.adapters.targets import ALL_LINEAR
from lora_cli.errors import MalformedFileError, UsageError

Layout = Literal["adapter", "wrapped"]


@dataclass(frozen=True, kw_only=True)
class InjectOptions(FreshOptions):
    """What a user says about a fresh adapter in files.

    Attributes:
        targets: Presets, patterns, and YAML files of patterns.
        exclude: Presets and patterns of modules to leave out.
        layout: A PEFT folder, or the whole checkpoint with factors beside its weights.

    Raises:
        UsageError: A value that makes no sense; names the option.
    """

    targets: tuple[str, ...] = (ALL_LINEAR,)
    exclude: tuple[str, ...] = ()
    layout: Layout = "adapter"

    def __post_init__(self) -> None:
        """Check what was said."""
        super().__post_init__()
        for name in ("targets", "exclude"):
            patterns_only = all(isinstance(item, str) for item in getattr(self, name))
            check(patterns_only, name, "patterns: the receipt of an output lists them", getattr(self, name))
        check(self.layout in get_args(Layout), "layout", " or ".join(get_args(Layout)), self.layout)
        alone = not self.principal or self.layout == "adapter"
        check(alone, "layout", f"adapter, for the init {self.init} writes the changed base apart", self.layout)

    def arguments(self) -> dict[str, Any]:
        """The options as keyword arguments of `inject`."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def settle_options(config: Path | None, given: Mapping[str, Any]) -> InjectOptions:
    """Put together what a config file and the command line say; the command line wins.

    Args:
        config: A YAML file with the fields of `InjectOptions`, or None.
        given: Fields that were given on the command line; None and empty tuples are fields that were not.

    Raises:
        UsageError: No rank, or a value that makes no sense.
        MalformedFileError: The file has an unknown field or one of the wrong type; names it.
    """
    said = read_options(config) if config is not None else {}
    said |= {name: value for name, value in given.items() if value is not None and value != ()}
    if "rank" not in said:
        raise UsageError("No rank given", hint="say how large the factors are with --rank R")
    return InjectOptions(**said)


def read_options(path: Path) -> dict[str, Any]:
    """Read a config file: the fields of `InjectOptions` that it has, with their types checked.

    Raises:
        UsageError: It does not exist.
        MalformedFileError: It has an unknown field or one of the wrong type; names it.
    """
    document = read_mapping(path, fields=[field.name for field in fields(InjectOptions)], what="config")
    said: dict[str, Any] = {}
    for name, value in document.items():
        if name in ("targets", "exclude"):
            said[name] = tuple(patterns(value, file=path.name, field=name))
            continue
        words, types = _TYPES[name]
        # True is an instance of int in Python.
        if not isinstance(value, types) or isinstance(value, bool) is not (types == (bool,)):
            raise MalformedFileError(
                "A field has the wrong type", file=path.name, tensor=name, expected=words, found=repr(value)[:60]
            )
        said[name] = value
    return said


_TYPES: Mapping[str, tuple[str, tuple[type, ...]]] = {
    "rank": ("a whole number", (int,)),
    "alpha": ("a number", (int, float)),
    "init": ("text", (str,)),
    "std": ("a number", (int, float)),
    "layout": ("text", (str,)),
    "rslora": ("true or false", (bool,)),
    "dtype": ("text", (str,)),
    "seed": ("a whole number", (int,)),
}
