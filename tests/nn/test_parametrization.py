"""The parametrization: against PEFT and loralib's formula, with all that torch does with parametrizations."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lora_cli.errors import NumericError, ShapeError, UsageError
from lora_cli.nn.parametrization import LoRA, parametrize_lora, switched

RANK, ALPHA = 3, 7.0
NOT_WHOLE: Any = 1.5


def fill(lora: LoRA, seed: int = 0) -> LoRA:
    """Give both factors numbers, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for factor in (lora.A, lora.B):
            factor.copy_(torch.randn(factor.shape, generator=generator, dtype=torch.float64))
    return lora


def numbers(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4))


def adapted(*, filled: bool = True) -> tuple[nn.Sequential, list[LoRA]]:
    model = net()
    loras = [parametrize_lora(model[at], RANK, ALPHA) for at in (0, 2)]
    return model, [fill(lora, seed) for seed, lora in enumerate(loras)] if filled else loras


def linear(model: nn.Sequential) -> nn.Linear:
    """The first layer."""
    layer = model[0]
    assert isinstance(layer, nn.Linear)
    return layer


# The module


def test_it_adds_the_scaled_product() -> None:
    lora = fill(LoRA(6, 10, RANK, ALPHA))
    weight = numbers(6, 10)
    expected = weight.double() + ALPHA / RANK * lora.B.double() @ lora.A.double()
    torch.testing.assert_close(lora(weight).double(), expected, rtol=1e-6, atol=1e-6)
    assert (lora.A.shape, lora.B.shape, lora.scale, lora.en) == ((RANK, 10), (6, RANK), ALPHA / RANK, True)
    lora.en = False
    assert lora(weight) is weight


def test_defaults_are_rank_one_and_scale_one() -> None:
    lora = LoRA(6, 10)
    assert (lora.A.shape[0], lora.scale, lora.A.dtype, lora.A.device.type) == (1, 1.0, torch.float32, "cpu")
    assert set(lora.state_dict()) == {"A", "B"}
    assert "in_f=6, out_f=10, rank=1, scale=1" in repr(lora)


def test_the_device_is_the_one_given_or_that_of_the_weight() -> None:
    assert {factor.device.type for factor in LoRA(6, 10, device="meta").parameters()} == {"meta"}
    assert {factor.device.type for factor in parametrize_lora(nn.Linear(6, 10, device="meta")).parameters()} == {"meta"}


def test_a_fresh_one_adds_zero_and_can_be_trained() -> None:
    torch.manual_seed(3)
    lora, weight = LoRA(6, 400, RANK, ALPHA), numbers(6, 400)
    assert torch.equal(lora(weight), weight)
    bound = 1 / math.sqrt(400)
    assert float(lora.A.detach().abs().max()) <= bound
    assert abs(float(lora.A.detach().std()) - bound / math.sqrt(3)) < 0.05 * bound
    lora(weight).sum().backward()
    assert lora.B.grad is not None
    assert lora.A.grad is not None
    assert int(lora.B.grad.count_nonzero()) == 6 * RANK
    assert int(lora.A.grad.count_nonzero()) == 0


def test_rank_stabilised_scale() -> None:
    assert LoRA(6, 10, 5, 3, rslora=True).scale == pytest.approx(3 / math.sqrt(5), rel=1e-15)


@pytest.mark.parametrize("shape", [(10,), (10, 3), (10, 3, 5), (10, 1, 3, 5)])
def test_kernels_are_matrices_of_their_first_size(shape: tuple[int, ...]) -> None:
    rest = math.prod(shape[1:])
    lora = fill(LoRA(shape[0], rest, RANK, ALPHA))
    added = lora(torch.zeros(shape))
    assert added.shape == shape
    torch.testing.assert_close(added, (lora.B @ lora.A * lora.scale).view(shape))


def test_gradients_are_right() -> None:
    lora = fill(LoRA(4, 6, 2, 3, dtype=torch.float64))
    weight = numbers(4, 2, 3, dtype=torch.float64).requires_grad_()

    def through(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(lora, {"A": a, "B": b}, weight)
        return result

    assert torch.autograd.gradcheck(through, (weight, lora.A, lora.B))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_factors_leave_the_type_of_the_weight(dtype: torch.dtype) -> None:
    layer = nn.Linear(6, 10).to(dtype)
    before = layer.weight.detach().clone()
    lora = fill(parametrize_lora(layer, RANK, ALPHA, dtype=torch.float32))
    assert lora.A.dtype == torch.float32
    assert layer.weight.dtype == dtype
    expected = before.double() + ALPHA / RANK * lora.B.double() @ lora.A.double()
    torch.testing.assert_close(layer.weight.double(), expected, rtol=0.01, atol=0.02)


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: LoRA(6, 10, 0), ShapeError, "rank.*found 0.*at least 1"),
        (lambda: LoRA(6, -10), ShapeError, "out_f.*found -10"),
        (lambda: LoRA(0, 10), ShapeError, "in_f.*found 0"),
        (lambda: LoRA(6, 10, NOT_WHOLE), UsageError, "whole number.*rank.*1.5"),
        (lambda: LoRA(6, 10, True), UsageError, "whole number.*rank.*True"),
        (lambda: LoRA(6, 10, dtype=torch.int8), UsageError, "floating type.*int8"),
        (lambda: LoRA(6, 10, 1, float("nan")), NumericError, "alpha is not a finite"),
        (lambda: LoRA(6, 10)(torch.zeros(6, 11)), ShapeError, r"does not fit.*\(6, 11\).*6 · 10"),
        (lambda: parametrize_lora(nn.Linear(6, 10), 0), ShapeError, "rank.*found 0"),
        (lambda: parametrize_lora(nn.Tanh()), UsageError, "no such parameter.*weight.*Tanh.*none of its own"),
        (lambda: parametrize_lora(nn.Linear(6, 10), parameter="wight"), UsageError, "no such.*wight.*weight, bias"),
        (lambda: parametrize_lora(nn.Linear(6, 10), parameter="bias"), ShapeError, r"two dimensions.*bias.*\(10,\)"),
        (lambda: parametrize_lora(net(), parameter="0.weight"), UsageError, "no such parameter"),
        (lambda: switched(net(), on=False).__enter__(), UsageError, "no LoRA.*Sequential"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Callable[[], Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        make()


def test_a_weight_of_integers_is_refused() -> None:
    layer = nn.Linear(6, 10)
    layer.weight = nn.Parameter(torch.zeros(10, 6, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UsageError, match=r"floating type.*weight.*int8"):
        parametrize_lora(layer)
    assert not parametrize.is_parametrized(layer)


# In models


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: nn.Linear(6, 10), (2, 6)),
        (lambda: nn.Conv1d(6, 10, 3), (2, 6, 9)),
        (lambda: nn.Conv2d(6, 10, (3, 2), stride=2), (2, 6, 9, 9)),
    ],
)
def test_outputs_and_gradients_are_those_of_peft(layer: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    ours = layer().double()
    theirs = nn.Sequential(copy.deepcopy(ours))
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"])
    theirs = get_peft_model(theirs, config, autocast_adapter_dtype=False).base_model.model
    lora = fill(parametrize_lora(ours, RANK, ALPHA))
    a, b = theirs[0].lora_A["default"].weight, theirs[0].lora_B["default"].weight
    with torch.no_grad():
        a.copy_(lora.A.view(a.shape))
        b.copy_(lora.B.view(b.shape))
    x = numbers(*shape, dtype=torch.float64)
    found, expected = ours(x), theirs(x)
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    assert lora.A.grad is not None
    assert lora.B.grad is not None
    torch.testing.assert_close(lora.A.grad.view(a.shape), a.grad)
    torch.testing.assert_close(lora.B.grad.view(b.shape), b.grad)


@pytest.mark.parametrize(
    ("module", "parameter", "inputs"),
    [
        (lambda: nn.Embedding(12, 6), "weight", lambda: torch.arange(12)),
        (lambda: nn.ConvTranspose2d(4, 6, 3), "weight", lambda: numbers(1, 4, 5, 5)),
        (lambda: nn.Conv2d(6, 6, 3, groups=3), "weight", lambda: numbers(1, 6, 5, 5)),
        (lambda: nn.LSTMCell(6, 5), "weight_hh", lambda: numbers(2, 6)),
        (lambda: nn.LSTM(6, 5), "weight_ih_l0", lambda: numbers(7, 6)),
        (lambda: nn.Bilinear(6, 6, 5), "weight", lambda: numbers(2, 6)),
        (lambda: nn.TransformerEncoderLayer(6, 2, 8, 0.0).self_attn, "in_proj_weight", lambda: numbers(4, 6)),
    ],
)
def test_any_module_computes_with_the_sum(
    module: Callable[[], nn.Module], parameter: str, inputs: Callable[[], Tensor]
) -> None:
    torch.manual_seed(1)
    ours = module().eval()
    plain = copy.deepcopy(ours)
    count = {nn.Bilinear: 2, nn.MultiheadAttention: 3}.get(type(ours), 1)
    state = (torch.ones(2, 5), torch.zeros(2, 5))
    x = [inputs()] * count + ([state] if isinstance(ours, nn.LSTMCell) else [])

    def run(model: nn.Module) -> Tensor:
        out = model(*x)
        first: Tensor = out[0] if isinstance(out, tuple) else out
        return first

    lora = parametrize_lora(ours, RANK, ALPHA, parameter=parameter)
    torch.testing.assert_close(run(ours), run(plain))
    before = run(ours)
    fill(lora)
    weight = getattr(plain, parameter)
    weight.data += (lora.scale * lora.B @ lora.A).detach().view(weight.shape)
    torch.testing.assert_close(run(ours), run(plain))
    assert not torch.allclose(run(ours), before)
    with torch.no_grad():
        assert not torch.allclose(run(ours), before)


def test_training_moves_the_factors_alone() -> None:
    model, loras = adapted(filled=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith((".A", ".B")))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x, y = numbers(32, 6), numbers(32, 4, seed=2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{at}.parametrizations.weight.0.{name}" for at in (0, 2) for name in "AB"}
    assert len(loras) == 2


def test_the_frozen_parameter_gets_no_gradient() -> None:
    model, loras = adapted()
    model(numbers(3, 6)).sum().backward()
    assert model.get_parameter("0.parametrizations.weight.original").grad is None
    assert model.get_parameter("0.bias").grad is not None
    assert all(factor.grad is not None for lora in loras for factor in lora.parameters())


def test_one_may_stand_on_another() -> None:
    model, (lora, _) = adapted()
    second = fill(parametrize_lora(model[0], 2, 1.0), 9)
    assert lora.A.requires_grad
    expected = linear(net()).weight + lora.scale * lora.B @ lora.A + second.scale * second.B @ second.A
    torch.testing.assert_close(linear(model).weight, expected)


# The switch


def test_a_model_is_switched_and_comes_back_as_it_was() -> None:
    model, (first, second) = adapted()
    x = numbers(3, 6)
    with_all, without = model(x), net()(x)
    with switched(model, on=False):
        assert torch.equal(model(x), without)
        with switched(model[0], on=True):
            assert (first.en, second.en) == (True, False)
        assert not first.en
    assert torch.equal(model(x), with_all)
    first.en = False
    with suppress(ZeroDivisionError), switched(model, on=True):
        assert torch.equal(model(x), with_all)
        raise ZeroDivisionError
    assert (first.en, second.en) == (False, True)


def test_sums_are_cached_where_torch_is_asked_to_and_the_switch_is_seen() -> None:
    model, (lora, _) = adapted()
    x, without = numbers(3, 6), net()(numbers(3, 6))
    with_all = model(x)
    calls = []
    lora.register_forward_hook(lambda *_: calls.append(1))
    with parametrize.cached():
        for _ in range(3):
            assert torch.equal(model(x), with_all)
        assert len(calls) == 1
        (model(x) + model(2 * x)).sum().backward()
        with switched(model, on=False):
            assert torch.equal(model(x), without)
        assert torch.equal(model(x), with_all)
    assert lora.B.grad is not None
    assert len(calls) == 3


# What torch does with models


@pytest.mark.parametrize("leave", [True, False])
def test_it_comes_off(leave: bool) -> None:
    layer, plain = linear(adapted()[0]), linear(net())
    merged = layer.weight.detach().clone()
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=leave)
    assert type(layer) is nn.Linear
    assert torch.equal(layer.weight, merged if leave else plain.weight)
    assert set(layer.state_dict()) == {"weight", "bias"}
    assert not torch.equal(merged, plain.weight)


def test_state_dicts_make_the_round_trip_strictly() -> None:
    model, _ = adapted()
    state = model.state_dict()
    assert set(state) == {
        f"{at}.{name}"
        for at in (0, 2)
        for name in (
            "bias",
            "parametrizations.weight.original",
            "parametrizations.weight.0.A",
            "parametrizations.weight.0.B",
        )
    }
    other, _ = adapted(filled=False)
    assert not torch.equal(other(numbers(3, 6)), model(numbers(3, 6)))
    other.load_state_dict(state, strict=True)
    assert torch.equal(other(numbers(3, 6)), model(numbers(3, 6)))


def test_copies_are_of_their_own() -> None:
    model, (lora, _) = adapted()
    twin = copy.deepcopy(model)
    x = numbers(3, 6)
    expected = model(x)
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        lora.B.zero_()
    assert torch.equal(twin(x), expected)
    with switched(twin, on=False):
        assert lora.en


def test_it_is_pickled_by_itself() -> None:
    lora = fill(LoRA(6, 10, RANK, ALPHA))
    lora.en = False
    back = pickle.loads(pickle.dumps(lora))  # noqa: S301 (our own bytes)
    assert not back.en
    back.en = lora.en = True
    assert torch.equal(back(numbers(6, 10)), lora(numbers(6, 10)))


def test_it_compiles_in_one_piece_and_the_switch_is_seen() -> None:
    torch._dynamo.reset()
    model, loras = adapted()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = numbers(3, 6)
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()
    found = loras[0].B.grad
    loras[0].B.grad = None
    model(x).sum().backward()
    torch.testing.assert_close(found, loras[0].B.grad)
    with switched(model, on=False):
        torch.testing.assert_close(compiled(x), net()(x))
    torch.testing.assert_close(compiled(x), model(x))


def test_autocast_computes_in_its_type() -> None:
    model, (lora, _) = adapted()
    x = numbers(3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
        assert linear(model).weight.dtype == torch.float32
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), model(x), rtol=0.05, atol=0.2)
    out.float().sum().backward()
    assert lora.B.grad is not None
    assert lora.B.grad.dtype == torch.float32
