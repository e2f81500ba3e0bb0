"""Rows that adapters hold whole, such as those of trained tokens: they stand in place of the base's own."""

from __future__ import annotations

import torch

from lora_cli.arithmetic.rounding import cast
from lora_cli.errors import NumericError
from lora_cli.surgery.edit import Edit
from lora_cli.surgery.readers import Readers, torch_dtype


def lay_rows(
    edit: Edit,
    first: int,
    source: torch.Tensor,
    result: torch.Tensor,
    readers: Readers,
    delta: torch.Tensor | None = None,
) -> None:
    """Put rows that adapters hold in place of what was made of the base's own, each with what is added to it.

    An adapter was trained with its own rows, so that its deltas go on top of them. What was laid cannot be taken off
    again, and stays where deltas are subtracted. What changed there is not what deltas do: they are set to zero.

    Args:
        edit: What becomes of the tensor.
        first: Index of the first of these elements in it.
        source: The flat elements of the base.
        result: Those of the output, which rows go into from their own type, without the base's between.
        readers: Read the rows.
        delta: What is added, in the working type; None where nothing is.

    Raises:
        NumericError: A row holds NaN or infinity.
    """
    for rows in edit.rows:
        dtype = torch_dtype(rows.tensor.dtype)
        for begin, span in rows.spans(edit.matrix[1], first, result.numel()):
            values = source[span]
            if edit.operation != "subtract":
                values = readers.load_part(rows.tensor, dtype, begin, span.stop - span.start)
                check_finite(values)
                values = values if delta is None else values.to(delta.dtype) - (0.0 - delta[span])
            cast(values, result[span])
            if delta is not None:
                delta[span] = 0


def check_finite(tensor: torch.Tensor) -> None:
    """Refuse what an adapter holds whole and cannot have meant."""
    wide = tensor.to(torch.float32) if tensor.itemsize == 1 else tensor
    broken = int((~torch.isfinite(wide)).sum())
    if broken:
        raise NumericError("The adapter's tensor holds NaN or infinity", found=f"{broken} values in one piece")
