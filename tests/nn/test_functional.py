"""LoRA on plain tensors: against loralib and float64, the laws of the formula, torch's transforms, and the files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import loralib
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import lora_cli
from lora_cli.errors import NumericError, ShapeError, UsageError
from lora_cli.nn.functional import (
    init_lora_adapter,
    lora_delta,
    lora_linear,
    merge_lora_weight,
    unmerge_lora_weight,
)

IN, OUT, RANK, ALPHA = 12, 20, 3, 7.0


def numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def trained(dtype: torch.dtype = torch.float32, *, rank: int = RANK, grad: bool = False) -> dict[str, Tensor]:
    """An adapter whose B has left zero."""
    adapter = {"A": numbers(IN, rank, seed=1, dtype=dtype), "B": numbers(rank, OUT, seed=2, dtype=dtype)}
    return {name: factor.requires_grad_(grad) for name, factor in adapter.items()}


def weight(dtype: torch.dtype = torch.float32) -> Tensor:
    return numbers(IN, OUT, seed=3, dtype=dtype)


def inputs(*leading: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return numbers(*leading, IN, seed=4, dtype=dtype)


def formula(x: Tensor, frozen: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The paper's equation, in float64."""
    x, frozen, a, b = (tensor.double() for tensor in (x, frozen, a, b))
    return x @ frozen + (x @ a) @ b * ALPHA / a.shape[1]


# A fresh adapter


def test_a_fresh_adapter_adds_zero() -> None:
    adapter = init_lora_adapter(weight(), RANK)
    assert {name: tuple(factor.shape) for name, factor in adapter.items()} == {"A": (IN, RANK), "B": (RANK, OUT)}
    assert adapter["A"].count_nonzero() == IN * RANK
    assert torch.equal(lora_delta(adapter, ALPHA), torch.zeros(IN, OUT))
    assert torch.equal(lora_linear(inputs(5), weight(), adapter, ALPHA), inputs(5) @ weight())
    assert torch.equal(merge_lora_weight(weight(), adapter, ALPHA), weight())


def test_a_is_normal_with_the_deviation_asked_for() -> None:
    torch.manual_seed(0)
    a = init_lora_adapter(torch.empty(500, 4), 200, init_std=0.3)["A"]
    assert abs(float(a.mean())) < 0.005
    assert abs(float(a.std()) - 0.3) < 0.005
    # A fourth moment of three: normal, not uniform (1.8).
    assert abs(float((a / 0.3).pow(4).mean()) - 3) < 0.1
    torch.manual_seed(0)
    assert abs(float(init_lora_adapter(torch.empty(500, 4), 200)["A"].std()) - 0.01) < 0.0005


def test_numbers_come_from_torchs_generator_or_the_one_given() -> None:
    torch.manual_seed(5)
    first = init_lora_adapter(weight(), RANK)["A"]
    torch.manual_seed(5)
    assert torch.equal(init_lora_adapter(weight(), RANK)["A"], first)
    state = torch.get_rng_state()
    given = init_lora_adapter(weight(), RANK, generator=torch.Generator().manual_seed(5))["A"]
    assert torch.equal(given, first)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_types_are_the_weights_or_the_one_given(dtype: torch.dtype) -> None:
    assert {factor.dtype for factor in init_lora_adapter(weight(dtype), RANK).values()} == {dtype}
    assert {factor.dtype for factor in init_lora_adapter(weight(), RANK, dtype=dtype).values()} == {dtype}


# The formula


@pytest.mark.parametrize("leading", [(), (5,), (2, 4, 5), (0,)])
def test_linear_is_the_formula(leading: tuple[int, ...]) -> None:
    adapter = trained()
    found = lora_linear(inputs(*leading), weight(), adapter, ALPHA)
    assert found.dtype == torch.float32
    expected = formula(inputs(*leading), weight(), **small(adapter))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def small(adapter: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.lower(): factor for name, factor in adapter.items()}


def test_outputs_and_gradients_are_those_of_loralib() -> None:
    layer = loralib.Linear(IN, OUT, r=RANK, lora_alpha=ALPHA, bias=False).double()
    adapter, frozen, x = trained(torch.float64, grad=True), weight(torch.float64), inputs(5, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(frozen.T)
        layer.lora_A.copy_(adapter["A"].T)
        layer.lora_B.copy_(adapter["B"].T)
    ours, theirs = lora_linear(x, frozen, adapter, ALPHA), layer(x)
    torch.testing.assert_close(ours, theirs)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    torch.testing.assert_close(adapter["A"].grad, layer.lora_A.grad.T)
    torch.testing.assert_close(adapter["B"].grad, layer.lora_B.grad.T)


def test_delta_merge_and_linear_agree() -> None:
    adapter = trained(torch.float64)
    frozen, x = weight(torch.float64), inputs(5, dtype=torch.float64)
    merged = merge_lora_weight(frozen, adapter, ALPHA)
    torch.testing.assert_close(merged, frozen + lora_delta(adapter, ALPHA), rtol=0, atol=1e-13)
    torch.testing.assert_close(lora_linear(x, frozen, adapter, ALPHA), x @ merged, rtol=0, atol=1e-12)
    assert float(lora_delta(adapter, ALPHA).abs().max()) > 1


@pytest.mark.parametrize("alpha", [0.0, -3.0, 0.5, 16])
def test_the_delta_is_linear_in_alpha(alpha: float) -> None:
    adapter = trained(torch.float64)
    torch.testing.assert_close(lora_delta(adapter, alpha), alpha * lora_delta(adapter), rtol=1e-14, atol=0)
    torch.testing.assert_close(lora_delta(adapter), adapter["A"] @ adapter["B"] / RANK)


def test_alpha_is_one_unless_given() -> None:
    adapter, frozen, x = trained(torch.float64), weight(torch.float64), inputs(5, dtype=torch.float64)
    change = adapter["A"] @ adapter["B"] / RANK
    for found, expected in (
        (lora_delta(adapter), change),
        (lora_linear(x, frozen, adapter), x @ (frozen + change)),
        (merge_lora_weight(frozen, adapter), frozen + change),
        (unmerge_lora_weight(frozen, adapter), frozen - change),
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_the_weight_is_frozen() -> None:
    frozen, x, adapter = weight().requires_grad_(), inputs(5).requires_grad_(), trained(grad=True)
    lora_linear(x, frozen, adapter, ALPHA).sum().backward()
    assert frozen.grad is None
    effective = (weight() + lora_delta(trained(), ALPHA)).sum(1)
    torch.testing.assert_close(x.grad, effective.expand(5, IN))


class Shapes(TorchDispatchMode):
    """Notes the shape of whatever torch computes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.seen.append((func.overloadpacket.__name__, tuple(out.shape)))
        return out


def test_the_product_of_the_factors_is_never_made() -> None:
    with Shapes() as shapes:
        lora_linear(inputs(5), weight(), trained(), ALPHA)
    assert ("mm", (5, RANK)) in shapes.seen
    assert {name for name, shape in shapes.seen if shape == (IN, OUT)} <= {"randn", "_to_copy", "detach"}


def test_float32_factors_work_on_a_bfloat16_weight() -> None:
    x, frozen, adapter = inputs(5, dtype=torch.bfloat16), weight(torch.bfloat16), trained()
    out = lora_linear(x, frozen, adapter, ALPHA)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), formula(x, frozen, **small(adapter)), rtol=0.02, atol=0.2)
    merged = merge_lora_weight(frozen, adapter, ALPHA)
    assert merged.dtype == torch.bfloat16
    torch.testing.assert_close(
        merged.double(), frozen.double() + lora_delta(adapter, ALPHA).double(), rtol=5e-3, atol=0
    )


# Merging


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_merging_gives_the_bytes_of_the_command(tmp_path: Path, dtype: torch.dtype) -> None:
    adapter, frozen = trained(dtype), weight(dtype)
    save_file({"block.proj": frozen}, tmp_path / "base.safetensors")
    save_file({f"block.proj.{name}": factor for name, factor in adapter.items()}, tmp_path / "adapter.safetensors")
    lora_cli.merge(
        tmp_path / "base.safetensors",
        [tmp_path / "adapter.safetensors"],
        tmp_path / "merged.safetensors",
        lora_cli.PlanOptions(read=lora_cli.ReadOptions(alpha=0.3)),
    )
    written = load_file(tmp_path / "merged.safetensors")["block.proj"]
    merged = merge_lora_weight(frozen, adapter, 0.3)
    assert torch.equal(merged.view(torch.uint8), written.view(torch.uint8))
    assert not torch.equal(merged, frozen)


def test_autocast_and_layout_do_not_change_a_merge() -> None:
    merged = merge_lora_weight(weight(), trained(), ALPHA)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(merge_lora_weight(weight(), trained(), ALPHA), merged)
    lying = {name: factor.T.contiguous().T for name, factor in trained().items()}
    assert torch.equal(merge_lora_weight(weight().T.contiguous().T, lying, ALPHA), merged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerging_recovers_within_rounding(dtype: torch.dtype) -> None:
    adapter, frozen = trained(dtype), weight(dtype)
    merged = merge_lora_weight(frozen, adapter, ALPHA)
    back = unmerge_lora_weight(merged, adapter, ALPHA)
    # Each way rounds once, at the magnitude of the larger of sum and weight.
    step = torch.finfo(dtype).eps * torch.maximum(merged.double().abs(), frozen.double().abs())
    assert bool(((back.double() - frozen.double()).abs() <= step).all())
    assert not torch.equal(merged, frozen)


@pytest.mark.parametrize("function", [merge_lora_weight, unmerge_lora_weight])
@pytest.mark.filterwarnings("ignore:Input #:UserWarning")
def test_merging_is_differentiable(function: Callable[..., Tensor]) -> None:
    adapter, frozen = trained(torch.float64, grad=True), weight(torch.float64).requires_grad_()
    given = (frozen, adapter["A"], adapter["B"])
    assert torch.autograd.gradcheck(lambda w, a, b: function(w, {"A": a, "B": b}, ALPHA), given)


@pytest.mark.parametrize(("function", "sign"), [(merge_lora_weight, 1), (unmerge_lora_weight, -1)])
def test_gradients_are_those_of_the_plain_formula(function: Callable[..., Tensor], sign: int) -> None:
    target = numbers(IN, OUT, seed=9)

    def gradients(merged: Callable[[Tensor, dict[str, Tensor]], Tensor]) -> list[Tensor]:
        frozen, adapter = weight().requires_grad_(), trained(grad=True)
        return list(torch.autograd.grad((merged(frozen, adapter) * target).sum(), [frozen, *adapter.values()]))

    ours = gradients(lambda w, adapter: function(w, adapter, ALPHA))
    plain = gradients(lambda w, adapter: w + sign * ALPHA / RANK * adapter["A"] @ adapter["B"])
    for found, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(found, expected)


def test_gradients_of_a_merge_have_no_gradients() -> None:
    adapter = trained(torch.float64, grad=True)
    merged = merge_lora_weight(weight(torch.float64), adapter, ALPHA)
    (first,) = torch.autograd.grad(merged.square().sum(), adapter["A"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_only_what_asks_for_gradients_gets_them() -> None:
    adapter = trained(grad=True)
    adapter["A"].requires_grad_(False)
    merge_lora_weight(weight(), adapter, ALPHA).sum().backward()
    assert adapter["A"].grad is None
    assert adapter["B"].grad is not None
    assert not merge_lora_weight(weight(), trained(), ALPHA).requires_grad


# Refusals


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"rank": 0}, ShapeError, "positive.*found 0"),
        ({"rank": -2}, ShapeError, "positive.*found -2"),
        ({"rank": 2.0}, UsageError, "whole number.*2.0"),
        ({"rank": True}, UsageError, "whole number.*True"),
        ({"weight": torch.zeros(4)}, ShapeError, r"no matrix.*\(4,\)"),
        ({"weight": torch.zeros(4, 4, 3, 3)}, ShapeError, r"no matrix.*\(4, 4, 3, 3\)"),
        ({"weight": torch.zeros(4, 4, dtype=torch.int8)}, UsageError, "floating type.*int8"),
        ({"dtype": torch.int32}, UsageError, "floating type.*int32"),
        ({"init_std": -0.1}, UsageError, "zero or more.*-0.1"),
        ({"init_std": float("nan")}, UsageError, "zero or more.*nan"),
    ],
)
def test_a_fresh_adapter_is_refused(arguments: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        init_lora_adapter(**{"weight": weight(), "rank": RANK, **arguments})


@pytest.mark.parametrize(
    ("adapter", "error", "said"),
    [
        ({"A": torch.zeros(IN, 3), "B": torch.zeros(2, OUT)}, ShapeError, r"no rank.*\(12, 3\).*\(2, 20\)"),
        ({"A": torch.zeros(IN, 0), "B": torch.zeros(0, OUT)}, ShapeError, r"no rank.*\(12, 0\)"),
        ({"A": torch.zeros(IN), "B": torch.zeros(2, OUT)}, ShapeError, r"no rank.*\(12,\)"),
        ({"A": torch.zeros(OUT, 2), "B": torch.zeros(2, IN)}, ShapeError, r"does not fit.*\(20, 2\).*\(12, rank\)"),
        ({"A": torch.zeros(IN, 2)}, UsageError, r"Not an adapter.*\['A'\]"),
        ({**trained(), "C": torch.zeros(1)}, UsageError, "Not an adapter.*'C'"),
        ({"A": [1.0], "B": [2.0]}, UsageError, "Not an adapter"),
        (3, UsageError, "Not an adapter.*int"),
        ({"A": torch.zeros(IN, 2).int(), "B": torch.zeros(2, OUT).int()}, UsageError, "floating type.*int32"),
        ({"A": torch.zeros(IN, 2), "B": torch.zeros(2, OUT).half()}, UsageError, "one floating type.*float16"),
    ],
)
@pytest.mark.parametrize(
    "function",
    [lambda adapter: lora_linear(inputs(2), weight(), adapter), lambda adapter: merge_lora_weight(weight(), adapter)],
    ids=["linear", "merge"],
)
def test_adapters_are_refused(
    function: Callable[[Any], Tensor], adapter: Any, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        function(adapter)


def test_inputs_weights_and_sums_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"input does not fit.*\(2, 20\).*12"):
        lora_linear(torch.zeros(2, OUT), weight(), trained())
    with pytest.raises(ShapeError, match=r"no matrix"):
        merge_lora_weight(torch.zeros(3), trained())
    with pytest.raises(NumericError, match=r"not fit in float16.*65504"):
        merge_lora_weight(weight(torch.float16), trained(torch.float16), 1e6)
    with pytest.raises(NumericError, match="alpha is not a finite"):
        merge_lora_weight(weight(), trained(), float("inf"))


# torch's transforms


def test_it_compiles_in_one_piece_and_for_every_alpha() -> None:
    torch._dynamo.reset()
    linear = torch.compile(lora_linear, fullgraph=True, backend="aot_eager")
    delta = torch.compile(lora_delta, fullgraph=True, backend="aot_eager")
    for alpha in (1.0, 7.0, 0.3):
        adapter = trained(grad=True)
        found = linear(inputs(5), weight(), adapter, alpha)
        torch.testing.assert_close(found, lora_linear(inputs(5), weight(), adapter, alpha))
        torch.testing.assert_close(delta(adapter, alpha), lora_delta(adapter, alpha))
        ours = torch.autograd.grad(found.sum(), list(adapter.values()))
        plain = torch.autograd.grad(lora_linear(inputs(5), weight(), adapter, alpha).sum(), list(adapter.values()))
        torch.testing.assert_close(ours, plain)


def test_a_compiled_function_may_merge() -> None:
    torch._dynamo.reset()
    step = torch.compile(lambda w, adapter: merge_lora_weight(w * 2, adapter, ALPHA) + 1, backend="aot_eager")
    assert torch.equal(step(weight(), trained()), merge_lora_weight(weight() * 2, trained(), ALPHA) + 1)


def test_autocast_computes_in_its_type() -> None:
    x, adapter = inputs(5), trained(grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = lora_linear(x, weight(), adapter, ALPHA)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), formula(x, weight(), **small(adapter)), rtol=0.05, atol=0.5)
    out.float().sum().backward()
    exact = torch.autograd.grad(lora_linear(x, weight(), adapter, ALPHA).sum(), adapter["A"])[0]
    torch.testing.assert_close(adapter["A"].grad, exact, rtol=0.05, atol=0.5)


def test_vmap_runs_many_adapters_over_one_weight() -> None:
    many = [{"A": numbers(IN, RANK, seed=s), "B": numbers(RANK, OUT, seed=-s % 99)} for s in range(1, 5)]
    stacked = {name: torch.stack([adapter[name] for adapter in many]) for name in ("A", "B")}
    x, frozen = inputs(4, 6), weight()
    found = torch.func.vmap(lambda x, adapter: lora_linear(x, frozen, adapter, ALPHA))(x, stacked)
    torch.testing.assert_close(found, torch.stack([lora_linear(x[i], frozen, many[i], ALPHA) for i in range(4)]))
    deltas = torch.func.vmap(lambda adapter: lora_delta(adapter, ALPHA))(stacked)
    torch.testing.assert_close(deltas, torch.stack([lora_delta(adapter, ALPHA) for adapter in many]))


def test_functional_gradients_are_those_of_autograd() -> None:
    x, frozen = inputs(5), weight()

    def loss(adapter: dict[str, Tensor]) -> Tensor:
        return lora_linear(x, frozen, adapter, ALPHA).square().sum() + lora_delta(adapter).sum()

    found = torch.func.grad(loss)(trained())
    adapter = trained(grad=True)
    loss(adapter).backward()
    for name, factor in adapter.items():
        torch.testing.assert_close(found[name], factor.grad)
