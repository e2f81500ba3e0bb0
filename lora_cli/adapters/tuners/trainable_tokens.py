"""Trainable tokens: rows of an embedding are trained as they are, and held whole (PEFT's own).

In PEFT (`peft.tuners.trainable_tokens`) a module has `trainable_tokens_delta` (rows × dim): the rows themselves,
whatever the name says. Which they are the config says.
"""

from __future__ import annotations

from lora_cli.adapters.adapter import RowReplacement
from lora_cli.adapters.tuners.tuner import Changes, Field, Module, Tuner
from lora_cli.errors import SAVE_AGAIN, MalformedFileError, ShapeError

_ROWS, _TOKENS = "trainable_tokens_delta", "token_indices"


def _read(module: Module) -> Changes:
    tensor, tokens = module.tensors[_ROWS], tuple(module.said(_TOKENS, ()))
    if len(set(tokens)) != len(tokens):
        raise MalformedFileError("The config names a token twice", tensor=_TOKENS)
    if len(tensor.shape) != 2 or tensor.shape[0] != len(tokens):
        raise ShapeError(
            "There is not one trained row for each token",
            tensor=tensor.key,
            expected=f"{len(tokens)} rows, as {_TOKENS} says",
            found=list(tensor.shape),
            hint=SAVE_AGAIN,
        )
    yield RowReplacement(f"{module.name}.weight", tokens, tensor, _TOKENS)


def _are_tokens(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(token, int) and 0 <= token < 1 << 31 for token in value)


TUNER = Tuner(
    type="TRAINABLE_TOKENS",
    name="trainable tokens",
    source="PEFT",
    modules="rows of embeddings",
    parts=(_ROWS,),
    read=_read,
    understood={_TOKENS: Field("which rows they are", "a list of tokens from 0 on", _are_tokens)},
    neutral={"init_weights": "how the rows began"},
    whole=True,
)
