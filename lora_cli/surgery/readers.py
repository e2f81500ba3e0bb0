"""Reading stored tensors into memory. torch is asked for its tensors only where they are wanted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from lora_cli.checkpoint.checkpoint import StoredTensor
from lora_cli.checkpoint.dtypes import DType
from lora_cli.checkpoint.files import open_at_once
from lora_cli.checkpoint.source import Reader, SourceFile

if TYPE_CHECKING:
    import torch


def torch_dtype(dtype: DType) -> torch.dtype:
    """Torch's type for a storage type."""
    import torch

    found: torch.dtype = getattr(torch, str(dtype.torch_name))
    return found


class Readers:
    """The input files that one unit reads from. Of many those rest that were not asked for lately."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._all: dict[SourceFile, Reader] = {}
        self._awake: dict[SourceFile, Reader] = {}

    def of(self, tensor: StoredTensor) -> Reader:
        """The open file that holds a tensor."""
        source = tensor.shard.source
        if source not in self._all:
            self._all[source] = self._stack.enter_context(source.open())
        self._awake.pop(source, None)
        self._awake[source] = self._all[source]  # the last to be put to rest
        if len(self._awake) > open_at_once():
            self._awake.pop(next(iter(self._awake))).rest()
        return self._all[source]

    def load_part(self, tensor: StoredTensor, dtype: torch.dtype, first: int, count: int) -> torch.Tensor:
        """Read `count` elements of a tensor from `first` on, as `dtype`, into memory of their own."""
        import torch

        data = torch.empty(count, dtype=dtype)
        self.of(tensor).read_into(tensor.offset + first * dtype.itemsize, raw_bytes(data))
        return data

    def load(self, tensor: StoredTensor) -> torch.Tensor:
        """Read a whole tensor."""
        import torch

        data = torch.empty(tensor.nbytes, dtype=torch.uint8)
        if tensor.nbytes:
            self.of(tensor).read_into(tensor.offset, raw_bytes(data))
        return data.view(torch_dtype(tensor.dtype)).view(tensor.shape)


@contextmanager
def open_readers() -> Iterator[Readers]:
    """Open files as they are asked for; close them all at the end, checking that they are unchanged."""
    with ExitStack() as stack:
        yield Readers(stack)


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor, to read into or write from."""
    import torch

    return memoryview(tensor.view(-1).view(torch.uint8).numpy().data)
