"""What a user says about a fresh adapter, from arguments and from a config file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from lora_cli.adapters.adapter import Scale
from lora_cli.adapters.inits import GAUSSIAN_STD, check_rule
from lora_cli.adapters.peft_config import LARGEST
from lora_cli.adapters.target_files import patterns, read_mapping
from lora_cli.adapters.targets import ALL_LINEAR
from lora_cli.checkpoint.dtypes import DTYPES, DType
from lora_cli.errors import MalformedFileError, UsageError

Layout = Literal["adapter", "wrapped"]

FACTOR_DTYPES: Mapping[str, str] = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class InjectOptions:
    """What a user says about a fresh adapter.

    Attributes:
        rank: Rows of A and columns of B.
        alpha: Numerator of the scale; the rank unless given.
        targets: Presets, patterns, and YAML files of patterns.
        exclude: Presets and patterns of modules to leave out.
        init: How A begins; B is zero.
        std: Standard deviation of the init `gaussian`.
        layout: A PEFT folder, or the whole checkpoint with factors beside its weights.
        rslora: Divide alpha by the square root of the rank.
        dtype: Storage type of the factors: a key of `FACTOR_DTYPES`.
        seed: Decides the numbers of A, together with the names of the modules.

    Raises:
        UsageError: A value that makes no sense; names the option.
    """

    rank: int
    alpha: float | None = None
    targets: tuple[str, ...] = (ALL_LINEAR,)
    exclude: tuple[str, ...] = ()
    init: str = "kaiming"
    std: float | None = None
    layout: Layout = "adapter"
    rslora: bool = False
    dtype: str = "fp32"
    seed: int = 0

    def __post_init__(self) -> None:
        check_rule(self.init)
        _check(self.rank > 0, "rank", "a whole number over 0", self.rank)
        _check(_positive(self.alpha), "alpha", "a number over 0", self.alpha)
        _check(_positive(self.std), "std", "a number over 0", self.std)
        _check(self.std is None or self.init == "gaussian", "std", "only with --init gaussian", self.std)
        _check(self.layout in get_args(Layout), "layout", " or ".join(get_args(Layout)), self.layout)
        _check(self.dtype in FACTOR_DTYPES, "dtype", ", ".join(FACTOR_DTYPES), self.dtype)

    @property
    def scale(self) -> Scale:
        """What the product of the factors is multiplied by."""
        alpha = float(self.rank if self.alpha is None else self.alpha)
        return Scale(alpha, self.rank, self.rslora, "--alpha / --rank" if self.alpha is not None else "alpha = rank")

    @property
    def storage(self) -> DType:
        """Storage type of the factors."""
        return DTYPES[FACTOR_DTYPES[self.dtype]]

    @property
    def width(self) -> float:
        """Standard deviation of the init `gaussian`."""
        return GAUSSIAN_STD if self.std is None else self.std

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


def _positive(value: float | None) -> bool:
    return value is None or 0 < value < LARGEST  # NaN is not


def _check(right: bool, option: str, expected: str, found: object) -> None:
    if not right:
        raise UsageError(f"--{option} makes no sense", tensor=option, expected=expected, found=found)
