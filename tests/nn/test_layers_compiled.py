"""LoRA layers under torch's transformations: compiled as one graph, and with 16 bits by autocast."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from layer_world import CASES, call, dressed, inputs_of, is_close


@pytest.fixture(autouse=True)
def _compiler_from_scratch() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
@pytest.mark.parametrize("kind", [kind for kind in CASES if kind != "grouped"])
def test_a_layer_is_one_graph(kind: str, dora: bool) -> None:
    """Traced with its backward, and run by torch as it is: what code is generated from a graph is torch's matter."""
    layer, inputs = dressed(CASES[kind], dora=dora), inputs_of(CASES[kind])
    expected = call(layer, inputs)
    expected.square().sum().backward()
    gradients = {key: p.grad.clone() for key, p in layer.named_parameters() if p.grad is not None}
    layer.zero_grad()
    found = call(torch.compile(layer, fullgraph=True, backend="aot_eager"), inputs)
    found.square().sum().backward()
    assert is_close(found, expected, 1e-6)
    assert gradients
    assert all(is_close(layer.get_parameter(key).grad, gradient, 1e-5) for key, gradient in gradients.items())


def test_groups_are_not_compiled_for_each_set_of_sizes() -> None:
    """Sizes are read to split the rows by, and no graph may depend on them."""
    graphs = []

    def counted(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    layer, (x, _) = dressed(CASES["grouped"]), inputs_of(CASES["grouped"])
    compiled, counts = torch.compile(layer, backend=counted), []
    for sizes in ([2, 0, 3], [1, 1, 3], [0, 5, 0], [1, 3, 1]):
        inputs = (x, torch.tensor(sizes))
        with warnings.catch_warnings():  # torch looks at the gradients of what is between two graphs
            warnings.simplefilter("ignore", UserWarning)
            assert torch.equal(call(compiled, inputs), call(layer, inputs))
        counts.append(len(graphs))
    assert counts == counts[:1] * 4


def test_a_compiled_layer_sees_which_adapters_are_used() -> None:
    layer, inputs = dressed(CASES["linear"]), inputs_of(CASES["linear"])
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for state in ({"default": 1.0}, {"default": -0.5}, {}):
        layer.activate(state)
        assert torch.equal(call(compiled, inputs), call(layer, inputs))
    layer.activate({"default": 1.0})
    with layer.disabled():
        assert torch.equal(call(compiled, inputs), call(layer.base, inputs))


@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
@pytest.mark.parametrize("kind", CASES)
def test_autocast_computes_in_16_bits_and_keeps_factors_and_gradients(kind: str, dora: bool) -> None:
    layer, inputs = dressed(CASES[kind], dora=dora), inputs_of(CASES[kind])
    expected = call(layer, inputs)
    with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("error")
        found = call(layer, inputs)
    assert found.dtype == call_type(kind)
    assert is_close(found, expected, 0.04)
    found.float().square().sum().backward()
    assert layer.lora_A.weight.grad is not None
    assert layer.lora_A.weight.grad.dtype == torch.float32
    assert bool(torch.isfinite(layer.lora_A.weight.grad).all())


def call_type(kind: str) -> torch.dtype:
    """Tables are looked up in the type that they have."""
    return torch.float32 if kind == "embedding" else torch.bfloat16
