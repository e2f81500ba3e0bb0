"""Target patterns from a YAML file: lists of what people would type with `--target` and `--exclude`.

targets: [attention, "model.layers.*.mlp.down_proj"]
exclude: ["layers.0.**"]
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_cli.adapters.patterns import TO_THE_END, body_of
from lora_cli.checkpoint import strict_yaml
from lora_cli.checkpoint.source import read_whole
from lora_cli.errors import MalformedFileError, UnsupportedError
from lora_cli.regex import LONGEST, linear

_ENDINGS = (".yaml", ".yml")
_MOST = 10_000
"""Patterns of one field that are tried one after the other on every module."""


def expand(targets: Sequence[str], exclude: Sequence[str] = ()) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Put the patterns of each file in the place of its name; a file may exclude modules as well.

    Args:
        targets: Presets, patterns, and names of YAML files.
        exclude: Presets and patterns.

    Returns:
        Targets and exclusions, each once, in order.

    Raises:
        UsageError: A file does not exist.
        MalformedFileError: A file is not what it should be; names the field.
        UnsafeInputError: It has anchors, aliases or tags.
    """
    wanted: list[str] = []
    unwanted = list(exclude)
    for target in targets:
        if not target.endswith(_ENDINGS):
            wanted.append(target)
            continue
        document = read_mapping(Path(target), fields=("targets", "exclude"), what="target file")
        if "targets" not in document:
            raise MalformedFileError("The target file names no targets", file=target, tensor="targets")
        wanted += patterns(document["targets"], file=Path(target).name, field="targets")
        unwanted += patterns(document.get("exclude", []), file=Path(target).name, field="exclude")
    return tuple(dict.fromkeys(wanted)), tuple(dict.fromkeys(unwanted))


def read_mapping(path: Path, *, fields: Collection[str], what: str) -> Mapping[str, Any]:
    """Read a YAML file of named fields.

    Raises:
        UsageError: It does not exist.
        MalformedFileError: It is no mapping, or has a field that means nothing here; names all of them.
    """
    data = read_whole(path, limit=strict_yaml.YAML_LIMIT)
    document = strict_yaml.loads(data, file=path.name, what=what)
    if not isinstance(document, dict):
        raise MalformedFileError(f"The {what} holds no named fields", file=path.name, expected=", ".join(fields))
    unknown = [str(name) for name in document if name not in fields]
    if unknown:
        raise MalformedFileError(
            f"The {what} has a field without meaning",
            file=path.name,
            tensor=unknown[0],
            expected=", ".join(fields),
            found=", ".join(unknown),
        )
    return document


def patterns(value: object, *, file: str, field: str) -> list[str]:
    """Check a list of patterns: text, not empty, each once, no further files, and none that could take long.

    Raises:
        MalformedFileError: With the field.
        UnsupportedError: A regular expression that does not match in linear time.
    """
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise MalformedFileError(
            "A field has the wrong type", file=file, tensor=field, expected="a list of patterns", found=repr(value)[:60]
        )
    if len(value) > _MOST:
        raise MalformedFileError(
            "There are too many patterns", file=file, tensor=field, expected=f"at most {_MOST}", found=len(value)
        )
    repeated = sorted(item for item, count in Counter(value).items() if count > 1)
    if repeated:
        raise MalformedFileError("A pattern stands twice", file=file, tensor=field, found=", ".join(repeated))
    nested = [item for item in value if item.endswith(_ENDINGS)]
    if nested:
        raise MalformedFileError("A file of patterns names another one", file=file, tensor=field, found=nested[0])
    for item in value:
        _check_quick(item, file, field)
    return value


def _check_quick(pattern: str, file: str, field: str) -> None:
    """A file goes from hand to hand, so none of its patterns may take long, as one that a person types may."""
    try:
        if len(pattern) > LONGEST:
            raise ValueError(f"it has {len(pattern)} characters, more than {LONGEST}")
        for around in ("{}", TO_THE_END):  # alone first: what stands around it must not be in the words of an error
            linear(body_of(pattern), around)
    except ValueError as error:
        raise UnsupportedError(
            f"A pattern cannot be matched in linear time: {error}",
            file=file,
            tensor=field,
            found=pattern[:80],
            hint="say it without lookaround and back-references; with --target they are possible",
        ) from error
