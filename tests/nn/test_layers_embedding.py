"""LoRA beside tables of embeddings: padding, frequencies, sparse gradients, and tables that do more than look up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layer_world import is_close, learn
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers.models.bart.modeling_bart import BartLearnedPositionalEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from lora_cli.errors import UnsupportedError
from lora_cli.nn.wrap import wrap

TOKENS = torch.tensor([[0, 3, 3, 3], [5, 0, 3, 1]])


def taught(base: nn.Module) -> Any:
    layer = wrap(base.double(), rank=2, alpha=3.0)
    learn(layer)
    return layer


def slope(layer: Any) -> Tensor:
    """The gradient of A, by tokens, for one and the same change of what the layer gives."""
    layer(TOKENS).square().sum().backward()
    gradient = layer.lora_A.weight.grad
    assert isinstance(gradient, Tensor)
    return gradient.T


def test_padding_gets_no_gradient() -> None:
    gradient = slope(taught(nn.Embedding(6, 4, padding_idx=0)))
    assert not gradient[0].any()
    assert gradient[3].any()
    assert slope(taught(nn.Embedding(6, 4)))[0].any()


def test_gradients_are_divided_by_frequency() -> None:
    torch.manual_seed(0)
    base = nn.Embedding(6, 4)
    plain = slope(taught(base))
    often = nn.Embedding(6, 4, scale_grad_by_freq=True)
    often.load_state_dict(base.state_dict())
    assert is_close(slope(taught(often)), plain / torch.tensor([2, 1, 1, 4, 1, 1]).unsqueeze(1), 1e-12)


def test_gradients_are_dense_beside_a_table_with_sparse_ones() -> None:
    base = nn.Embedding(6, 4, sparse=True)
    twin = nn.Embedding(6, 4)
    twin.load_state_dict(base.state_dict())
    assert torch.equal(slope(taught(base)), slope(taught(twin)))


def test_a_scale_of_embeddings_is_one_of_the_adapter_too() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table = Gemma3TextScaledWordEmbedding(6, 4, 0, embed_scale=7.5)

    layer = taught(Model().table)
    theirs: Any = Model()
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=3, target_modules=["table"]), theirs)
    theirs.double().table.lora_embedding_A["default"].data.copy_(layer.lora_A.weight)
    theirs.table.lora_embedding_B["default"].data.copy_(layer.lora_B.weight)
    expected = theirs.table(TOKENS)
    assert is_close(layer(TOKENS), expected, 1e-13)
    layer.merge()
    assert is_close(layer(TOKENS), expected, 1e-6)


def test_a_table_that_looks_up_something_else_does_so_for_the_adapter() -> None:
    """Positions: the input is only asked for its shape, and there is an offset."""
    layer = taught(BartLearnedPositionalEmbedding(8, 4))
    before = layer(TOKENS)
    assert is_close(before, layer.weight[2:6].expand(2, 4, 4), 1e-13)
    layer.merge()
    assert is_close(layer(TOKENS), before, 1e-6)


def test_a_table_that_rewrites_itself_is_refused() -> None:
    base = nn.Embedding(6, 4, max_norm=1.0)
    with pytest.raises(UnsupportedError, match="cannot be put beside") as refused:
        wrap(base)
    assert "max_norm" in refused.value.details[0]
    assert base.weight.requires_grad
