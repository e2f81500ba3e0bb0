"""Rows that adapters hold whole, such as those of trained tokens: they stand in place of the base's own."""

from __future__ import annotations

import torch

from lora_cli.arithmetic.rounding import cast
from lora_cli.errors import NumericError
from lora_cli.surgery.edit import Edit
from lora_cli.surgery.readers import Readers, torch_dtype


def lay_rows(edit: Edit, first: int, source: torch.Tensor, readers: Readers) -> torch.Tensor:
    """Return what deltas are added to: elements of the base from `first` on, with rows that adapters hold among them.

    An adapter was trained with its own rows, so that its deltas go on top of them. What was laid cannot be taken off
    again, and stays where deltas are subtracted.

    Args:
        edit: What becomes of the tensor.
        first: Index of the first element in it.
        source: The flat elements of the base; they stay as they are.
        readers: Read the rows.

    Raises:
        NumericError: A row holds NaN or infinity.
    """
    if not any(True for _ in edit.held(first, source.numel())) or edit.operation == "subtract":
        return source
    laid = source.clone()
    for rows in edit.rows:
        dtype = torch_dtype(rows.tensor.dtype)
        for begin, span in rows.spans(edit.matrix[1], first, source.numel()):
            values = readers.load_part(rows.tensor, dtype, begin, span.stop - span.start)
            check_finite(values)
            cast(values, laid[span])
    return laid


def check_finite(tensor: torch.Tensor) -> None:
    """Refuse what an adapter holds whole and cannot have meant."""
    wide = tensor.to(torch.float32) if tensor.itemsize == 1 else tensor
    broken = int((~torch.isfinite(wide)).sum())
    if broken:
        raise NumericError("The adapter's tensor holds NaN or infinity", found=f"{broken} values in one piece")
