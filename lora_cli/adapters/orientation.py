"""Which way round the matrices of a base are stored, where no adapter's factors say it: from biases and the config."""

from __future__ import annotations

from collections.abc import Mapping

from lora_cli.adapters.layout import conv1d_modules
from lora_cli.checkpoint.checkpoint import Checkpoint, StoredTensor
from lora_cli.errors import ShapeError


def stored_transposed(checkpoint: Checkpoint, weights: Mapping[str, StoredTensor]) -> dict[str, bool]:
    """Say for each module whether its matrix is stored (in × out), as GPT-2's Conv1D does.

    A bias has as many numbers as its module gives, so it decides where the matrix is not square. Where it cannot, the
    architecture of the config decides, and without a config what the other matrices are like.

    Args:
        checkpoint: The base.
        weights: The modules in question with their matrices.

    Raises:
        ShapeError: Biases contradict the config's architecture; names every module.
    """
    said = {module: _by_bias(module, weight, checkpoint) for module, weight in weights.items()}
    model_type = checkpoint.config.get("model_type")
    if not isinstance(model_type, str):
        others = {found for found in said.values() if found is not None}
        return {module: others == {True} if found is None else found for module, found in said.items()}
    listed = conv1d_modules().get(model_type, ())
    expected = {module: module.rpartition(".")[2] in listed for module in said}
    wrong = [module for module, found in said.items() if listed and found is not None and found != expected[module]]
    if wrong:
        raise ShapeError(
            f"Biases contradict how {model_type}, the model_type of config.json, stores matrices",
            file=checkpoint.label,
            details=[
                f"{module}: {list(weights[module].shape)} with a bias of {_bias_length(module, checkpoint)}"
                for module in wrong
            ],
            hint="mend model_type in config.json: the matrices are not those of this architecture",
        )
    return {module: expected[module] if found is None else found for module, found in said.items()}


def _by_bias(module: str, weight: StoredTensor, checkpoint: Checkpoint) -> bool | None:
    rows, columns = weight.shape
    length = _bias_length(module, checkpoint)
    return None if rows == columns or length not in (rows, columns) else length == columns


def _bias_length(module: str, checkpoint: Checkpoint) -> int | None:
    bias = checkpoint.tensors.get(f"{module}.bias")
    return bias.shape[0] if bias is not None and len(bias.shape) == 1 else None
