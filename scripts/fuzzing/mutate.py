"""How inputs are varied so that parsers get to see more than broken JSON: by its values, and with lengths that fit."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import atheris

Mutator = Callable[[bytes, int, int], bytes]

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 64, 1 << 31, 1 << 63, 1 << 64, 10**400, 0.5, -0.0, 1e300, "", "x", "../x"),
    *([], {}, [0], [[]], {"x": 1}, ["x", "x"], "\0", "\x1b[2J", "\ud800", "nul.safetensors", "a" * 300, "re:(a+)+$"),
    *("F32", "BF16", "F4", "U8", "lora", "loha", "preimages", "residual", "copy", "stored"),
)
"""What may stand anywhere in JSON."""


def in_json(data: bytes, most: int, seed: int) -> bytes:
    """Vary a JSON document: a value replaced, moved, repeated or left out; or its bytes."""
    dice = random.Random(seed)
    if dice.random() < 0.4:
        return bytes(atheris.Mutate(data, most))
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return bytes(atheris.Mutate(data, most))
    for _ in range(dice.choice((1, 1, 1, 2, 4))):
        document = _changed(document, dice)
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=dice.random() < 0.5)
    if dice.random() < 0.1:
        text = text.replace('":', '":1,"x":', 1)
    return text.encode("utf-8", "surrogatepass")[:most]


def _changed(document: Any, dice: random.Random) -> Any:
    """The document with something changed at one place."""
    if not isinstance(document, dict | list) or not document or dice.random() < 0.1:
        return copy.deepcopy(dice.choice(VALUES))
    places = list(document) if isinstance(document, dict) else list(range(len(document)))
    place = dice.choice(places)
    if dice.random() < 0.6 and isinstance(document[place], dict | list):
        document[place] = _changed(document[place], dice)
        return document
    what = dice.randrange(5)
    if what == 0:
        del document[place]
    elif what == 1:
        document[place] = copy.deepcopy(document[dice.choice(places)])
    elif what == 2 and isinstance(document, dict):
        document[str(dice.choice(VALUES))] = copy.deepcopy(document[place])
    elif what == 3 and isinstance(document, list):
        document.append(copy.deepcopy(document[place]))
    else:
        document[place] = _near(document[place], dice)
    return document


def _near(value: Any, dice: random.Random) -> Any:
    """Another value, often one like it."""
    if isinstance(value, int) and not isinstance(value, bool) and dice.random() < 0.6:
        return value + dice.choice((-8, -1, 1, 2, 8, 1 << 16))
    if isinstance(value, str) and dice.random() < 0.6:
        at = dice.randrange(len(value) + 1)
        return value[:at] + dice.choice(("", ".", "/", "weight", "0", "é", "\n", value)) + value[at + 1 :]
    return copy.deepcopy(dice.choice(VALUES))


def in_container(data: bytes, most: int, seed: int) -> bytes:
    """Vary a safetensors file: mostly its header, whose length is set right; often data of the length it speaks of."""
    dice = random.Random(seed)
    length = int.from_bytes(data[:8], "little")
    if len(data) < 10 or length > len(data) - 8 or dice.random() < 0.1:
        return bytes(atheris.Mutate(data, most))
    header, content = data[8 : 8 + length], data[8 + length :]
    if dice.random() < 0.85:
        header = in_json(header, max(2, most - 8 - len(content)), seed)
    else:
        content = bytes(atheris.Mutate(content, max(1, most - 8 - len(header))))
    if dice.random() < 0.7:
        wanted = min(_data_bytes(header), max(0, most - 8 - len(header)))
        content = content[:wanted].ljust(wanted, b"\0")
    return len(header).to_bytes(8, "little") + header + content


def _data_bytes(header: bytes) -> int:
    """How many bytes of data a header speaks of."""
    try:
        ends = [entry["data_offsets"][1] for name, entry in json.loads(header).items() if name != "__metadata__"]
        return max([0, *(end for end in ends if type(end) is int)])
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return 0


def after_first_byte(data: bytes, most: int, seed: int, inner: Mutator) -> bytes:
    """Keep the byte that says of which kind the rest is, mostly."""
    if random.Random(seed).random() < 0.05 or not data:
        return bytes(atheris.Mutate(data, most))
    return data[:1] + inner(data[1:], max(1, most - 1), seed)


MUTATORS: Mapping[str, Mutator] = {
    **dict.fromkeys(("header", "adapter-file", "wrapped-file", "undo-file"), in_container),
    **dict.fromkeys(
        ("adapter-config", "config", "index", "json", "manifest", "names", "receipt", "wrap-file"), in_json
    ),
    "streams": partial(after_first_byte, inner=lambda data, most, seed: bytes(atheris.Mutate(data, most))),
}
"""Of other targets the bytes are varied as they are."""
