"""What operations have in common: how inputs are opened, and how a run is measured."""

from __future__ import annotations

import re
import resource
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lora_cli.adapters.adapter import Adapter
from lora_cli.adapters.formats import open_adapter
from lora_cli.adapters.source import ReadOptions
from lora_cli.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lora_cli.checkpoint.hub import locate
from lora_cli.errors import UsageError
from lora_cli.progress import SILENT, Progress
from lora_cli.surgery.weighting import with_initial

Reference = str | Path
"""A local path or a Hub id, as users write it."""


def open_base(reference: Reference, progress: Progress = SILENT) -> Checkpoint:
    """Open a checkpoint from a path or a Hub id."""
    place = locate(str(reference), role="checkpoint", progress=progress)
    return open_checkpoint(place.path, label=place.label)


def listed(references: Iterable[Reference]) -> list[Reference]:
    """Return references as a list; one alone may be given without."""
    return [references] if isinstance(references, str | Path) else list(references)


def open_adapters(references: Iterable[Reference], options: ReadOptions, progress: Progress = SILENT) -> list[Adapter]:
    """Open adapters from paths or Hub ids; one alone may be given without a list.

    Raises:
        LoraCliError: What `with_beginnings` and reading the files raise.
    """
    adapters = [_open_adapter(reference, options, progress) for reference in listed(references)]
    return with_beginnings(adapters, options, progress)


def with_beginnings(adapters: Sequence[Adapter], options: ReadOptions, progress: Progress = SILENT) -> list[Adapter]:
    """Open what the user gave with `--initial`, and let each adapter that needs it know what it was before training.

    Raises:
        UsageError: Not one for each adapter that needs it.
        LoraCliError: What `with_initial` and reading the files raise.
    """
    before = [_open_adapter(reference, options, progress) for reference in options.initial]
    wanting = [adapter for adapter in adapters if adapter.initial]
    if before and len(before) != len(wanting):
        raise UsageError(
            "Give --initial once for each adapter whose init changed the base, in their order",
            expected=f"{len(wanting)} ({', '.join(adapter.label for adapter in wanting) or 'no adapter needs it'})",
            found=len(before),
        )
    pairs = zip(wanting, before, strict=False)
    trained = {id(adapter): with_initial(adapter, initial) for adapter, initial in pairs}
    return [trained.get(id(adapter), adapter) for adapter in adapters]


def _open_adapter(reference: Reference, options: ReadOptions, progress: Progress) -> Adapter:
    place = locate(str(reference), role="adapter", progress=progress)
    return open_adapter(place.path, options, label=place.label)


@dataclass
class Measured:
    """How long a run took, and the most memory that one process had: this one, or any that it has waited for."""

    seconds: float = 0.0
    peak_rss_bytes: int = 0


@contextmanager
def measured() -> Iterator[Measured]:
    """Measure what happens inside; the numbers are there after leaving."""
    result = Measured()
    start = time.monotonic()
    yield result
    result.seconds = round(time.monotonic() - start, 3)
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    result.peak_rss_bytes = max(_own_peak(), children if sys.platform == "darwin" else children * 1024)


def _own_peak() -> int:
    """Most memory that this process had. Linux counts the program that started it in `ru_maxrss`, if that is larger."""
    try:
        (peak,) = re.findall(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text("ascii"), re.MULTILINE)
        return int(peak) * 1024
    except (OSError, ValueError):
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return own if sys.platform == "darwin" else own * 1024
