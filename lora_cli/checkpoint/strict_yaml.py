"""YAML that people write for us: settings and patterns, nothing that a parser could be surprised by.

Only plain values are built (the safe loader). Two equal keys, of which a parser keeps the last; anchors and aliases,
with which a small file becomes a large one; and tags are refused: no settings need them, and a reader of the file may
take them for something else.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from lora_cli.errors import MalformedFileError, UnsafeInputError

YAML_LIMIT = 256 << 10
"""Longest file; the loader takes seconds for it, and nobody writes more by hand."""

_DEPTH_LIMIT = 20

_LONG_NUMBER = re.compile(r"[0-9_:]{100}")
"""1:59:59 is a number to base 60 in YAML, and the time to read one grows with the square of its length."""


def loads(data: bytes, *, file: object, what: str) -> Any:
    """Parse one YAML document.

    Args:
        data: The document in UTF-8.
        file: The file it comes from, for messages.
        what: What messages call the document, such as "config".

    Raises:
        MalformedFileError: It is too long, no YAML, or it repeats a key.
        UnsafeInputError: It has anchors, aliases or tags.
    """
    if len(data) > YAML_LIMIT:
        raise MalformedFileError(
            f"The {what} is too long", file=file, expected=f"at most {YAML_LIMIT} bytes", found=f"{len(data)} bytes"
        )
    try:
        text = data.decode("utf-8-sig")
        if _LONG_NUMBER.search(text):
            raise ValueError("a number of a hundred digits")
        _check_events(text, file)
        return yaml.load(text, _StrictLoader)  # noqa: S506 (a safe loader, and a stricter one)
    except UnicodeDecodeError as error:
        raise MalformedFileError(f"The {what} is not UTF-8", file=file, found=f"byte {error.start}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date or number that cannot be
        words = " ".join(str(error).replace('in "<unicode string>", ', "at ").split())[:300]
        raise MalformedFileError(f"The {what} is not valid YAML: {words}", file=file) from None


def _check_events(text: str, file: object) -> None:
    """Refuse what is never needed, before anything is built."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        # An alias has the name of its anchor.
        if getattr(event, "tag", None) is not None or getattr(event, "anchor", None) is not None:
            line = event.start_mark.line + 1 if event.start_mark else None
            raise UnsafeInputError(
                "Anchors, aliases and tags are not read",
                file=file,
                found=f"line {line}",
                hint="write values out; put text that begins with * or ! in quotes",
            )
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEPTH_LIMIT:
            raise MalformedFileError(f"The file is nested more than {_DEPTH_LIMIT} deep", file=file)


class _StrictLoader(yaml.SafeLoader):
    """The safe loader without its leniency towards repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build one mapping from nodes whose keys are all different."""
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, "a key that is no plain text", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)
