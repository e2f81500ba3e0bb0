"""An adapter's files before anyone decided what format they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lora_cli.adapters.expert_layout import ExpertLayout
from lora_cli.checkpoint.checkpoint import (
    ADAPTER_FILE,
    CONVERT_HINT,
    PICKLES,
    Shard,
    StoredTensor,
    open_shard,
    read_config,
    refuse_pickle,
)
from lora_cli.checkpoint.links import check_link, is_there
from lora_cli.checkpoint.source import as_text, listing
from lora_cli.errors import MalformedFileError, UnsafeInputError, UsageError

CONFIG_FILE = "adapter_config.json"


@dataclass(frozen=True)
class AdapterSource:
    """One safetensors file of factors and the config beside it.

    Attributes:
        path: What the user named: the file or its folder.
        label: What messages and receipts call it.
        shard: The file of factors.
        config: The parsed `adapter_config.json`; None when there is none.
    """

    path: Path
    label: str
    shard: Shard
    config: Mapping[str, Any] | None

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """The stored tensors by their names as in the file."""
        return {info.name: StoredTensor(self.shard, info) for info in self.shard.header.tensors}


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """What the user says about how an adapter is to be read.

    Attributes:
        alpha: Overrides every alpha (`--alpha`).
        scale: Overrides the scale as a whole (`--scale`).
        ignore_fields: Config fields that are set, not understood, and may be ignored.
        initial: Adapters as they were before training, one for each whose init took its first factors off the base.
        expert_layout: How the factors of experts lie (`--expert-layout`).
    """

    alpha: float | None = None
    scale: float | None = None
    ignore_fields: tuple[str, ...] = ()
    initial: tuple[str, ...] = ()
    expert_layout: ExpertLayout = field(default_factory=ExpertLayout)


def look_at_adapter(path: Path, *, label: str | None = None) -> AdapterSource:
    """Find the factors and the config in a file or folder, reading the header and the config only.

    Raises:
        UsageError: Nothing is there, or it is no adapter.
        UnsafeInputError: The weights are pickled, or a link leads out of the folder.
        MalformedFileError: The header or the config is broken.
    """
    label = label or as_text(path.resolve().name)
    if not path.exists():
        raise UsageError("The path does not exist", file=path)
    folder = path if path.is_dir() else path.parent
    file = _weights_in(path, label) if path.is_dir() else path
    refuse_pickle(file)
    config = folder / CONFIG_FILE
    return AdapterSource(path, label, open_shard(file), read_config(config) if is_there(config) else None)


def _weights_in(folder: Path, label: str) -> Path:
    if is_there(folder / ADAPTER_FILE):
        return folder / ADAPTER_FILE
    inside = listing(folder)
    files = [path for path in inside if path.suffix == ".safetensors" and path.name[:1] != "."]
    if len(files) == 1:
        check_link(files[0])
        return files[0]
    nested = [entry.name for entry in inside if (entry / CONFIG_FILE).exists()]
    if nested:
        raise UsageError(
            "The folder holds several adapters",
            file=label,
            found=", ".join(nested),
            hint="name one of the folders",
        )
    pickles = sorted(entry.name for entry in inside if entry.name.endswith(PICKLES))
    if pickles and not files:
        raise UnsafeInputError(
            "The adapter's weights are pickled, which can run code when they are read",
            file=label,
            found=", ".join(pickles),
            hint=CONVERT_HINT,
        )
    if files:
        raise MalformedFileError(
            f"The folder holds several safetensors files, none of them {ADAPTER_FILE}",
            file=label,
            found=", ".join(file.name for file in files[:8]),
            hint="name one file",
        )
    raise UsageError("The folder holds no adapter", file=label, expected=ADAPTER_FILE)
