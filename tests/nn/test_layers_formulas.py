"""LoRA layers against formulas: numbers done by hand, from-scratch implementations, float64, and their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from layer_world import CASES, RANK, call, dressed, inputs_of, is_close, learn, parts_of, with_weights
from torch import Tensor, nn
from torch.nn import functional

from lora_cli.nn.attention import LoRAMultiheadAttention
from lora_cli.nn.grouped import GroupedLinear
from lora_cli.nn.layer import LoRALayer
from lora_cli.nn.wrap import wrap

F64 = torch.float64


def by_hand(layer: nn.Module, weight: list[Any], a: list[Any], b: list[Any], **fields: Any) -> Any:
    """A LoRA layer of rank 1 whose scale is 2, with these numbers."""
    wrapped = wrap(layer, rank=1, alpha=2.0, **fields)
    for parameter, numbers in ((wrapped.base_weight, weight), (wrapped.lora_A.weight, a), (wrapped.lora_B.weight, b)):
        parameter.data.copy_(torch.tensor(numbers))
    return wrapped


def test_a_linear_layer_by_hand() -> None:
    layer = by_hand(nn.Linear(2, 1), [[1.0, 2.0]], [[3.0, 4.0]], [[5.0]])
    layer.base.bias.data.fill_(10.0)
    assert layer(torch.tensor([1.0, 1.0])).tolist() == [83.0]  # 1 + 2 + 10, and 2 · 5 · (3 + 4)
    assert layer.delta(torch.tensor([1.0, 1.0])).tolist() == [70.0]
    assert layer.weight.tolist() == [[31.0, 42.0]]


def test_a_table_by_hand() -> None:
    layer = by_hand(nn.Embedding(3, 2), [[1.0, 0.0], [0.0, 1.0], [7.0, 7.0]], [[1.0, 2.0, 3.0]], [[10.0], [20.0]])
    assert layer(torch.tensor([2, 0])).tolist() == [[67.0, 127.0], [21.0, 40.0]]


def test_a_convolution_by_hand() -> None:
    layer = by_hand(nn.Conv1d(1, 1, 2, bias=False), [[[1.0, 0.0]]], [[[1.0, 3.0]]], [[[0.5]]])
    assert layer(torch.tensor([[1.0, 2.0, 4.0]])).tolist() == [[8.0, 16.0]]  # 1 + (1 + 6), 2 + (2 + 12)


def test_groups_by_hand() -> None:
    layer = by_hand(GroupedLinear(2, 1, 1), [[[1.0]], [[2.0]]], [[[3.0]], [[5.0]]], [[[1.0]], [[10.0]]])
    assert layer(torch.tensor([[1.0], [1.0], [2.0]]), torch.tensor([1, 2])).tolist() == [[7.0], [102.0], [204.0]]


def test_a_magnitude_by_hand() -> None:
    layer = by_hand(nn.Linear(2, 1, bias=False), [[3.0, 0.0]], [[0.0, 2.0]], [[1.0]], dora=True)
    layer.lora_magnitude.weight.data.fill_(10.0)
    assert layer.weight.tolist() == [[6.0, 8.0]]  # (3, 4) has length 5 and gets 10
    assert layer(torch.tensor([1.0, 2.0])).tolist() == [22.0]


@pytest.mark.parametrize("rslora", [False, True])
def test_a_linear_layer_written_from_scratch(rslora: bool) -> None:
    """h = xWᵀ + b + s·x·A·B, with A (in × r) and B (r × out)."""
    layer = dressed(CASES["linear"], F64, rslora=rslora)
    (x,) = inputs_of(CASES["linear"], F64)
    scaling = 4.0 / RANK**0.5 if rslora else 4.0 / RANK
    a, b = layer.lora_A.weight.T, layer.lora_B.weight.T
    assert is_close(layer(x), functional.linear(x, layer.base.weight, layer.base.bias) + x @ (a @ b * scaling), 1e-14)


def test_a_table_written_from_scratch() -> None:
    """h = W[t] + s·A[t]·B, with A (entries × r) and B (r × dim)."""
    layer = dressed(CASES["embedding"], F64)
    (tokens,) = inputs_of(CASES["embedding"])
    a, b = layer.lora_A.weight.T, layer.lora_B.weight.T
    expected = layer.base.weight[tokens] + functional.embedding(tokens, a) @ b * (4.0 / RANK)
    assert is_close(layer(tokens), expected, 1e-14)


def test_a_convolution_written_from_scratch() -> None:
    """A convolves, channels go last, and B (r × out) is a matrix; the kernel changes by Bᵀ·flatten(A)."""
    layer = dressed(CASES["conv2d"], F64)
    (x,) = inputs_of(CASES["conv2d"], F64)
    a, b = layer.lora_A.weight, layer.lora_B.weight.flatten(1).T
    low = functional.conv2d(x, a, padding=(1, 0)).permute(0, 2, 3, 1)
    plain = functional.conv2d(x, layer.base.weight, layer.base.bias, padding=(1, 0))
    assert is_close(layer(x), plain + (low @ b * (4.0 / RANK)).permute(0, 3, 1, 2), 1e-14)
    kernel = layer.base.weight + (b.T @ a.flatten(1) * (4.0 / RANK)).reshape(5, 4, 3, 2)
    assert is_close(layer.weight, kernel, 1e-14)


def test_groups_written_from_scratch() -> None:
    """Each token has the weights of its group: W[g] + s·A[g]·B[g]."""
    layer = dressed(CASES["grouped"], F64)
    x, sizes = inputs_of(CASES["grouped"], F64)
    stack = layer.base.weight + torch.bmm(layer.lora_A.weight, layer.lora_B.weight) * (4.0 / RANK)
    group_of = [0, 0, 2, 2, 2]
    expected = torch.stack([row @ stack[group] for row, group in zip(x, group_of, strict=True)])
    assert is_close(layer(x, sizes), expected, 1e-14)


def new_weight(part: LoRALayer, kind: str, scale: float) -> Tensor:
    """W + s·B·A in the shape of W; with DoRA each output is brought to its magnitude, by a length held constant."""
    a, b, weight = part.lora_A.weight, part.lora_B.weight, part.base_weight
    if kind == "grouped":
        changed = weight + scale * torch.einsum("gir,gro->gio", a, b)
        length = changed.detach().square().sum(1, keepdim=True).sqrt()
        magnitude = part.lora_magnitude.weight.unsqueeze(1) if part.settings["default"].dora else None
    elif kind in ("embedding", "gpt2"):
        changed = weight + scale * torch.einsum("ri,or->io", a, b)
        length = changed.detach().square().sum(0).sqrt()
        magnitude = part.lora_magnitude.weight if part.settings["default"].dora else None
    else:
        changed = weight + scale * torch.einsum("ri,or->oi", a.flatten(1), b.flatten(1)).view(weight.shape)
        length = changed.detach().flatten(1).square().sum(1).sqrt().view(-1, *[1] * (weight.dim() - 1))
        magnitude = part.lora_magnitude.weight.view(length.shape) if part.settings["default"].dora else None
    return changed if magnitude is None else magnitude * changed / length


@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
@pytest.mark.parametrize("kind", CASES)
def test_output_gradients_and_weight_are_those_of_the_changed_weight(kind: str, dora: bool) -> None:
    case = CASES[kind]
    layer, twin = dressed(case, F64, dora=dora), dressed(case, F64, dora=dora)
    mine, other = inputs_of(case, F64, grad=True), inputs_of(case, F64, grad=True)
    found = call(layer, mine)
    weights = [new_weight(part, kind, 4.0 / RANK) for part in parts_of(twin)]
    expected = with_weights(case, twin, weights, other)
    assert is_close(found, expected, 1e-12)
    assert all(is_close(part.weight, weight, 1e-13) for part, weight in zip(parts_of(layer), weights, strict=True))
    slope = torch.linspace(-1, 2, found.numel(), dtype=F64).view(found.shape)
    found.backward(slope)
    expected.backward(slope)
    pairs = [(x.grad, y.grad) for x, y in zip(mine, other, strict=True) if x.is_floating_point()]
    theirs = dict(twin.named_parameters())
    pairs += [(p.grad, theirs[key].grad) for key, p in layer.named_parameters() if p.requires_grad]
    assert len(pairs) >= (3 if dora else 2)
    for gradient, reference in pairs:
        assert gradient is not None
        assert reference is not None
        assert is_close(gradient, reference, 1e-11)


@pytest.mark.parametrize("kind", CASES)
def test_gradients_are_those_of_differences(kind: str) -> None:
    case = CASES[kind]
    layer = dressed(case, F64)
    keys = [key for key, p in layer.named_parameters() if p.requires_grad]
    floats = [x for x in inputs_of(case, F64, grad=True) if x.is_floating_point()]
    whole = [x for x in inputs_of(case, F64) if not x.is_floating_point()]

    def given(*tensors: Tensor) -> Any:
        inputs, parameters = tensors[: len(floats)], tensors[len(floats) :]
        return torch.func.functional_call(layer, dict(zip(keys, parameters, strict=True)), (*inputs, *whole))

    parameters = [p.detach().clone().requires_grad_(True) for p in layer.parameters() if p.requires_grad]
    outputs: Callable[..., Tensor] = given if kind != "attention" else lambda *tensors: given(*tensors)[0]
    assert torch.autograd.gradcheck(outputs, (*floats, *parameters))


CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "same": (lambda: nn.Conv2d(4, 6, (3, 2), padding="same", dilation=(1, 2)), (2, 4, 6, 7)),
    "reflecting": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 6, 7)),
    "circular same": (lambda: nn.Conv1d(4, 6, 4, padding="same", padding_mode="circular"), (2, 4, 9)),
    "dilated": (lambda: nn.Conv3d(4, 6, 2, dilation=2, stride=(1, 2, 1)), (2, 4, 4, 5, 4)),
    "depthwise": (lambda: nn.Conv1d(4, 4, 3, groups=4, padding=2, padding_mode="replicate"), (2, 4, 9)),
    "in groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, stride=2), (2, 4, 6, 7)),
    "without batch": (lambda: nn.Conv2d(4, 6, 3), (4, 6, 7)),
}


@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_is_one_with_the_changed_kernel(name: str, dora: bool) -> None:
    make, shape = CONVOLUTIONS[name]
    layer = wrap(make().to(F64), rank=RANK, alpha=4.0, dora=dora)
    learn(layer)
    x = torch.randn(shape, dtype=F64)
    kernel = new_weight(layer, "conv", 4.0 / RANK)
    assert is_close(layer(x), torch.func.functional_call(layer.base, {"weight": kernel}, (x,)), 1e-12)


@pytest.mark.parametrize("kind", ["linear", "gpt2", "conv2d", "grouped"])
def test_dropout_is_on_what_goes_into_the_adapter(kind: str) -> None:
    """Not between A and B: there other numbers would be left out."""
    layer, (x, *rest) = dressed(CASES[kind], F64, dropout=0.5), inputs_of(CASES[kind], F64)
    torch.manual_seed(3)
    found = layer(x, *rest)
    torch.manual_seed(3)
    dropped = functional.dropout(x, 0.5)
    undropped = dressed(CASES[kind], F64)
    assert is_close(found, layer.base(x, *rest) + undropped.delta(dropped, *rest), 1e-12)
    assert not is_close(found, undropped(x, *rest), 1e-3)


def test_what_dropout_leaves_out_is_left_out_of_all_that_dora_adds() -> None:
    layer = dressed(CASES["linear"], F64, dora=True, dropout=0.5)
    (x,) = inputs_of(CASES["linear"], F64)
    torch.manual_seed(3)
    found = layer(x)
    torch.manual_seed(3)
    dropped = functional.dropout(x, 0.5)
    expected = layer.base(x) + functional.linear(dropped, layer.weight - layer.base.weight)
    assert is_close(found, expected, 1e-12)
    assert not is_close(found, layer.eval()(x), 1e-3)


@pytest.mark.parametrize("kind", [kind for kind in CASES if kind != "attention"])
@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
def test_the_delta_is_what_adapters_add(kind: str, dora: bool) -> None:
    layer = dressed(CASES[kind], F64, dora=dora)
    assert not isinstance(layer, LoRAMultiheadAttention)
    inputs = inputs_of(CASES[kind], F64)
    assert is_close(layer.delta(*inputs), layer(*inputs) - layer.base(*inputs), 1e-12)
