"""Numbers of adapters that are none: looked for where a computation failed, since what came out does not name them."""

from __future__ import annotations

import math

import torch

from lora_cli.checkpoint.checkpoint import StoredTensor
from lora_cli.errors import NumericError
from lora_cli.surgery.edit import Edit
from lora_cli.surgery.readers import Readers


def broken_tensor(edit: Edit, readers: Readers) -> NumericError | None:
    """The error that names the first tensor of an adapter with NaN or infinity in it; None where all are finite.

    Args:
        edit: What becomes of a tensor, which could not be computed.
        readers: Read the adapters' tensors.
    """
    for term in edit.terms:
        for tensor in term.delta.tensors:
            broken = _count(tensor, readers)
            if broken:
                return NumericError(
                    "A tensor of the adapter holds NaN or infinity",
                    file=term.label or tensor.shard.name,
                    tensor=tensor.key,
                    found=f"{broken} of {math.prod(tensor.shape)} values, for {edit.key}",
                )
    return None


def _count(tensor: StoredTensor, readers: Readers) -> int:
    found = readers.load(tensor)
    return int((~torch.isfinite(found.to(torch.float32) if found.itemsize == 1 else found)).sum())
