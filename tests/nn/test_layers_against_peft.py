"""Every LoRA layer against PEFT's layer with the same factors: what it gives, its gradients, its merged weight."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from layer_world import CASES, RANK, base_of, call, inputs_of, is_close, learn, parts_of
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from lora_cli.nn.attention import LoRAMultiheadAttention
from lora_cli.nn.layer import LoRALayer
from lora_cli.nn.parameters import LoRAParameters
from lora_cli.nn.wrap import wrap

KINDS = [kind for kind in CASES if kind not in ("grouped", "conv in groups")]
"""PEFT has no grouped layer, and splits the ranks of a grouped convolution instead of its kernel."""

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
}
PAIRS = [(kind, variant) for kind in KINDS for variant in VARIANTS if (kind, variant) != ("attention", "dora")]
"""PEFT has no DoRA on attention."""

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}


class Model(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


def peft_layer(layer: LoRALayer, kind: str, dtype: torch.dtype) -> Any:
    """PEFT's layer with the adapters of ours."""
    model = Model(base_of(CASES[kind], dtype))
    for name, settings in layer.settings.items():
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            target_modules=["layer"],
            use_rslora=settings.rslora,
            use_dora=settings.dora,
            fan_in_fan_out=kind == "gpt2",
        )
        with warnings.catch_warnings():  # of a second adapter, which is meant
            warnings.simplefilter("ignore", UserWarning)
            inject_adapter_in_model(config, model, adapter_name=name)
    theirs: Any = model.to(dtype).layer
    for part, other in zip(parts_of(layer), _parts(theirs), strict=True):
        for name in layer.settings:
            for factor in ("lora_A", "lora_B", "lora_magnitude"):
                if name in getattr(part, factor):
                    parameter = _parameter(other, factor, name)
                    parameter.data = getattr(part, factor)[name].detach().clone().view(parameter.shape)
            other.set_scale(name, layer.active[name])
        other.set_adapter(list(layer.active))
    return theirs


def _parts(theirs: Any) -> list[Any]:
    return [theirs, theirs.base_layer.out_proj] if isinstance(theirs.base_layer, nn.MultiheadAttention) else [theirs]


def _parameter(theirs: Any, factor: str, name: str) -> Any:
    if factor == "lora_magnitude":
        return theirs.lora_magnitude_vector[name]._parameters["weight"]
    if theirs.lora_embedding_A:
        return getattr(theirs, factor.replace("lora_", "lora_embedding_"))[name]
    return getattr(theirs, factor)[name].weight


def ours(kind: str, dtype: torch.dtype, **fields: Any) -> LoRALayer:
    layer = wrap(base_of(CASES[kind], dtype), rank=RANK, alpha=4.0, dtype=dtype, **fields)
    learn(layer)
    _silence(layer)
    return layer


def _silence(layer: LoRALayer) -> None:
    """PEFT 0.21 adds attention's output adapter twice (its pull request 3774); test_layers_attention.py covers that."""
    for name in layer.settings if isinstance(layer, LoRAMultiheadAttention) else ():
        nn.init.zeros_(layer.out_proj.lora_B[name])


def gradients(layer: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
    """What a layer gives, and the gradients of its inputs for some change of that."""
    result = call(layer, inputs)
    weights = torch.linspace(-1, 2, result.numel(), dtype=result.dtype).view(result.shape)
    (result * weights).sum().backward()
    return result, [x.grad for x in inputs if x.grad is not None]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("kind", "variant"), PAIRS)
def test_output_and_gradients_are_those_of_peft(kind: str, variant: str, dtype: torch.dtype) -> None:
    layer = ours(kind, dtype, **VARIANTS[variant])
    theirs = peft_layer(layer, kind, dtype)
    mine, other = inputs_of(CASES[kind], dtype, grad=True), inputs_of(CASES[kind], dtype, grad=True)
    (found, for_inputs), (expected, for_theirs) = gradients(layer, mine), gradients(theirs, other)
    tolerance = TOLERANCE[dtype]
    assert is_close(found, expected, tolerance)
    assert len(for_inputs) == len(for_theirs)
    assert all(is_close(*pair, tolerance) for pair in zip(for_inputs, for_theirs, strict=True))
    for factor in ("lora_A", "lora_B", *(["lora_magnitude"] if variant == "dora" else [])):
        grad, their_grad = getattr(layer, factor)["default"].grad, _parameter(theirs, factor, "default").grad
        assert grad is not None
        assert is_close(grad.flatten(), their_grad.flatten(), tolerance)


@pytest.mark.parametrize(("kind", "variant"), PAIRS)
def test_the_merged_weight_is_that_of_peft(kind: str, variant: str) -> None:
    layer = ours(kind, torch.float64, **VARIANTS[variant])
    theirs = peft_layer(layer, kind, torch.float64)
    layer.merge()
    theirs.merge()
    # The exact product is that of factors on a grid, to a millionth of the change at worst.
    assert is_close(layer.base_weight, getattr(theirs.base_layer, CASES[kind].keys[0]), 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_two_adapters_with_weights_are_those_of_peft(kind: str) -> None:
    layer = ours(kind, torch.float64)
    layer.add_adapter("other", LoRAParameters(rank=2, alpha=1.0, dtype=torch.float64))
    learn(layer, seed=1)
    _silence(layer)
    layer.activate({"default": 0.25, "other": -1.5})
    theirs = peft_layer(layer, kind, torch.float64)
    inputs = inputs_of(CASES[kind], torch.float64)
    with warnings.catch_warnings():  # PEFT merges attention for each call, one adapter after the other
        warnings.simplefilter("ignore", UserWarning)
        expected = call(theirs, inputs)
    assert is_close(call(layer, inputs), expected, 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_has_the_shapes_of_peft(kind: str) -> None:
    layer = wrap(base_of(CASES[kind]), rank=RANK, dora=kind != "attention")
    theirs = peft_layer_untouched(layer, kind)
    for part, their_part in zip(parts_of(layer), _parts(theirs), strict=True):
        for factor in ("lora_A", "lora_B"):
            assert getattr(part, factor)["default"].shape == _parameter(their_part, factor, "default").shape
        if kind != "attention":
            expected = _parameter(their_part, "lora_magnitude", "default")
            assert is_close(part.lora_magnitude["default"], expected.flatten(), 1e-6)


def peft_layer_untouched(layer: LoRALayer, kind: str) -> Any:
    settings = layer.settings["default"]
    model = Model(base_of(CASES[kind]))
    config = LoraConfig(
        r=settings.rank, target_modules=["layer"], use_dora=settings.dora, fan_in_fan_out=kind == "gpt2"
    )
    inject_adapter_in_model(config, model)
    return model.layer
