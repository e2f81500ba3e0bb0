"""The adapter formats: one module each, listed here and nowhere else.

A format has a `NAME`, `detect` (from header, config and names, never from data) and `read`. The first one in this order
that recognises a source reads it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from lora_cli.adapters.adapter import Adapter
from lora_cli.adapters.formats import peft, plain
from lora_cli.adapters.source import AdapterSource, ReadOptions, look_at_adapter
from lora_cli.errors import UnsupportedError


class Format(Protocol):
    """What a format module offers."""

    NAME: str

    def detect(self, source: AdapterSource, /) -> str | None:
        """Say why the source has this format, or None."""
        ...

    def read(self, source: AdapterSource, options: ReadOptions, /) -> Adapter:
        """Read the source."""
        ...


FORMATS: tuple[Format, ...] = (peft, plain)

_FOREIGN = (
    ("lora_unet_", "a kohya adapter for a diffusion model"),
    ("lora_te", "a kohya adapter for a text encoder"),
    (".lora_down.", "a kohya adapter"),
    (".hada_w", "a LyCORIS LoHa adapter"),
    (".lokr_w", "a LyCORIS LoKr adapter"),
    (".lora_a", "an adapter in the layout of MLX, torchtune or GGUF"),
)


def open_adapter(path: Path, options: ReadOptions | None = None, *, label: str | None = None) -> Adapter:
    """Read an adapter from a file or folder: header and config only.

    Raises:
        UnsupportedError: No format recognises it.
        LoraCliError: What the reader of its format raises.
    """
    return read_adapter(look_at_adapter(path, label=label), options or ReadOptions())


def read_adapter(source: AdapterSource, options: ReadOptions) -> Adapter:
    """Read an adapter from files that were looked at.

    Raises:
        UnsupportedError: No format recognises it.
        LoraCliError: What the reader of its format raises.
    """
    for form in FORMATS:
        if form.detect(source):
            return form.read(source, options)
    names = list(source.tensors)
    foreign = next((what for sign, what in _FOREIGN if any(sign in name for name in names)), None)
    raise UnsupportedError(
        f"This looks like {foreign}, which is not supported" if foreign else "No known adapter format",
        file=source.shard.name,
        found=", ".join(names[:4]) or "no tensors",
        expected="a PEFT folder, or pairs X.lora_A/X.lora_B or X.A/X.B",
    )
