"""LoRA beside torch's attention: every argument, its place in encoder layers, the fast path, and what is refused."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from layer_world import is_close, learn
from torch import Tensor, nn

from lora_cli.errors import UnsupportedError
from lora_cli.nn.wrap import wrap

E, HEADS, LENGTH, BATCH = 8, 2, 5, 3


def pair(seed: int = 0, dora: bool = False, **arguments: Any) -> tuple[Any, Any]:
    """A LoRA layer, and a plain one that has the weights which the formula gives."""
    torch.manual_seed(seed)
    base = nn.MultiheadAttention(E, HEADS, **arguments).double()
    plain = copy.deepcopy(base)
    layer: Any = wrap(base, rank=2, alpha=3.0, dora=dora)
    learn(layer)
    with torch.no_grad():
        for weight, part in ((plain.in_proj_weight, layer), (plain.out_proj.weight, layer.out_proj)):
            weight.add_(1.5 * part.lora_B.weight @ part.lora_A.weight)
            if dora:
                weight.mul_(part.lora_magnitude.weight.unsqueeze(1) / weight.norm(dim=1, keepdim=True))
    return layer, plain


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "without weights": {"need_weights": False},
    "weights of each head": {"average_attn_weights": False},
    "padding": {"key_padding_mask": torch.tensor([[False] * LENGTH, [False] * 4 + [True], [False] * 2 + [True] * 3])},
    "mask": {"attn_mask": torch.triu(torch.ones(LENGTH, LENGTH, dtype=torch.bool), 1)},
    "causal": {
        "attn_mask": nn.Transformer.generate_square_subsequent_mask(LENGTH, dtype=torch.float64),
        "is_causal": True,
        "need_weights": False,
    },
    "mask for each head": {"attn_mask": numbers(BATCH * HEADS, LENGTH, LENGTH)},
}


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
@pytest.mark.parametrize("name", CALLS)
def test_every_call_is_that_of_attention_with_the_changed_weights(name: str, dora: bool, mode: str) -> None:
    layer, plain = pair(batch_first=True, dora=dora)
    for module in (layer, plain):
        module.train(mode == "train")
    x = numbers(BATCH, LENGTH, E)
    with torch.set_grad_enabled(mode != "no_grad"):
        found, weights = layer(x, x, x, **CALLS[name])
        expected, expected_weights = plain(x, x, x, **CALLS[name])
    assert is_close(found, expected, 1e-12)
    assert (weights is None) == (expected_weights is None)
    assert weights is None or is_close(weights, expected_weights, 1e-12)


@pytest.mark.parametrize(
    "arguments", [{}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}], ids=["plain", *"bkz"]
)
def test_every_attention_of_one_width_is_taken(arguments: dict[str, Any]) -> None:
    layer, plain = pair(**arguments)
    query, other = numbers(4, BATCH, E), numbers(LENGTH, BATCH, E)
    assert is_close(layer(query, other, other)[0], plain(query, other, other)[0], 1e-12)
    alone = (query[:, 0], other[:, 0], other[:, 0])
    assert is_close(layer(*alone)[0], plain(*alone)[0], 1e-12)
    assert is_close(layer(query=query, key=other, value=other)[0], plain(query, other, other)[0], 1e-12)


def test_attention_dropout_stays_that_of_the_layer() -> None:
    layer, plain = pair(dropout=0.5)
    x = numbers(LENGTH, BATCH, E)
    results = []
    for module in (layer, plain):
        torch.manual_seed(1)
        results.append(module(x, x, x)[0])
    assert is_close(results[0], results[1], 1e-12)
    assert not is_close(results[0], layer(x, x, x)[0], 1e-3)


def encoder_layer(**arguments: Any) -> Any:
    torch.manual_seed(2)
    layer: Any = nn.TransformerEncoderLayer(E, HEADS, 16, dropout=0.0, batch_first=True, **arguments)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.4)
    return layer.double()


def never_called(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("the fast path does not call the module")


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("grad", [False, True], ids=["fast path", "slow path"])
def test_encoder_layers_take_the_changed_weights_on_both_paths(grad: bool, norm_first: bool) -> None:
    model = encoder_layer(norm_first=norm_first).eval()
    plain = copy.deepcopy(model)
    model.self_attn = wrap(model.self_attn, rank=2, alpha=3.0)
    learn(model.self_attn)
    plain.self_attn.in_proj_weight.data.copy_(model.self_attn.weight)
    plain.self_attn.out_proj.weight.data.copy_(model.self_attn.out_proj.weight)
    if not grad:
        model.self_attn.forward = never_called
    x = numbers(BATCH, LENGTH, E)
    with torch.set_grad_enabled(grad):
        assert is_close(model(x), plain(x), 1e-12)
        assert not is_close(model(x), encoder_layer(norm_first=norm_first).eval()(x), 1e-3)


def test_encoders_that_pack_padded_batches_take_the_changed_weights() -> None:
    """Without gradients torch packs what is not padding, and never calls the attention module."""
    model = nn.TransformerEncoder(encoder_layer(), 2).eval()
    for layer in model.layers:
        layer.self_attn = wrap(layer.self_attn, rank=2, alpha=3.0)
        learn(layer.self_attn)
    x, padding = numbers(BATCH, LENGTH, E), CALLS["padding"]["key_padding_mask"]
    slow = model(x, src_key_padding_mask=padding)
    for layer in model.layers:
        layer.self_attn.forward = never_called
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # nested tensors are a prototype
        fast = model(x, src_key_padding_mask=padding)
    seen = ~padding[:, : fast.shape[1]]
    assert is_close(fast[seen], slow[:, : fast.shape[1]][seen], 1e-12)
    assert not fast[~seen].any()


def test_both_projections_learn() -> None:
    layer, _ = pair()
    x = numbers(LENGTH, BATCH, E)
    layer(x, x, x)[0].square().sum().backward()
    gradients = {key: p.grad for key, p in layer.named_parameters() if p.grad is not None}
    assert set(gradients) == {key for key, _ in layer.named_parameters() if "lora_" in key}
    assert all(gradient.any() for gradient in gradients.values())


def test_what_is_not_one_product_is_refused() -> None:
    layer, _ = pair()
    x = numbers(LENGTH, BATCH, E)
    with pytest.raises(UnsupportedError, match="not a delta"):
        layer.delta(x)
    with pytest.raises(UnsupportedError, match="no dropout"):
        wrap(nn.MultiheadAttention(E, HEADS), dropout=0.1)
    with pytest.raises(UnsupportedError) as refused:
        wrap(nn.MultiheadAttention(E, HEADS, kdim=4, vdim=4))
    assert "kdim or vdim" in refused.value.details[0]
