"""LoRA layers as modules: adapters come and go, are used or not; states, copies, dropout, gradients, beginnings."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layer_world import CASES, RANK, base_of, call, dressed, inputs_of, is_close, learn, parts_of, with_weights
from torch import nn

from lora_cli.errors import NamesError, NumericError, UnsupportedError, UsageError
from lora_cli.nn.linear import LoRALinear
from lora_cli.nn.parameters import LoRAParameters
from lora_cli.nn.starts import Start
from lora_cli.nn.wrap import wrap


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
@pytest.mark.parametrize("kind", CASES)
def test_a_fresh_adapter_changes_no_bit(kind: str, dora: bool, dtype: torch.dtype) -> None:
    inputs = inputs_of(CASES[kind], dtype)
    expected = call(base_of(CASES[kind], dtype), inputs)
    assert torch.equal(call(wrap(base_of(CASES[kind], dtype), rank=RANK, dora=dora), inputs), expected)


@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
@pytest.mark.parametrize("kind", CASES)
def test_only_the_adapter_is_trained(kind: str, dora: bool) -> None:
    layer = dressed(CASES[kind], dora=dora)
    before = {key: p.detach().clone() for key, p in layer.named_parameters()}
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    call(layer, inputs_of(CASES[kind])).square().sum().backward()
    optimizer.step()
    changed = {key for key, p in layer.named_parameters() if not torch.equal(p, before[key])}
    assert changed == {key for key in before if "lora_" in key}
    assert all(p.grad is None for key, p in layer.named_parameters() if "lora_" not in key)


@pytest.mark.parametrize("kind", CASES)
def test_the_weight_is_what_the_layer_computes_with_in_every_state(kind: str) -> None:
    case = CASES[kind]
    layer = dressed(case, torch.float64)
    layer.add_adapter("other", LoRAParameters(rank=2))
    learn(layer, seed=3)
    inputs = inputs_of(case, torch.float64)
    seen: list[torch.Tensor] = []

    def check() -> None:
        found = call(layer, inputs)
        assert is_close(found, with_weights(case, layer, [p.weight for p in parts_of(layer)], inputs), 1e-12)
        assert not any(is_close(found, other, 1e-4) for other in seen)
        seen.append(found.detach())

    check()
    layer.activate({"default": -0.5, "other": 2.0})
    check()
    layer.activate({"other": 1.0})
    check()
    with layer.disabled():
        check()
        assert torch.equal(seen[-1], call(base_of(case, torch.float64).requires_grad_(False), inputs))
    layer.remove_adapter("other")
    assert torch.equal(call(layer, inputs), seen[-1])
    layer.activate({"default": 0.25})
    layer.merge()
    check()


@pytest.mark.parametrize("kind", CASES)
def test_weights_of_adapters_are_factors_of_what_they_add(kind: str) -> None:
    layer = dressed(CASES[kind], torch.float64)
    changes = []
    for weight in (1.0, -0.5, 0.0):
        layer.activate({"default": weight})
        changes.append([part.weight - part.base_weight for part in parts_of(layer)])
    for once, half, none in zip(*changes, strict=True):
        assert is_close(half, -0.5 * once, 1e-13)
        assert not none.any()


@pytest.mark.parametrize("kind", CASES)
def test_names_are_checked(kind: str) -> None:
    layer = dressed(CASES[kind])
    with pytest.raises(NamesError, match="already"):
        layer.add_adapter("default", LoRAParameters())
    with pytest.raises(UsageError, match="plain word"):
        layer.add_adapter("two words", LoRAParameters())
    actions: list[Callable[[], None]] = [
        lambda: layer.activate({"nobody": 1.0}),
        lambda: layer.remove_adapter("nobody"),
        lambda: layer.reset_parameters("nobody"),
    ]
    for action in actions:
        with pytest.raises(NamesError, match="No such adapter"):
            action()
    assert all(list(part.settings) == ["default"] == list(part.active) for part in parts_of(layer))


@pytest.mark.parametrize("kind", CASES)
def test_an_adapter_with_dora_is_used_alone(kind: str) -> None:
    layer = dressed(CASES[kind], dora=True)
    actions: list[Callable[[], None]] = [
        lambda: layer.activate({"default": 0.5}),
        lambda: layer.add_adapter("other", LoRAParameters()),
        lambda: layer.add_adapter("other", LoRAParameters(dora=True)),
    ]
    for action in actions:
        with pytest.raises(UnsupportedError, match="used alone and at weight 1"):
            action()
    layer.activate({})
    layer.add_adapter("other", LoRAParameters())
    with pytest.raises(UnsupportedError, match="used alone"):
        layer.activate({"default": 1.0, "other": 1.0})
    layer.activate({"default": 1.0})
    layer.remove_adapter("default")
    assert all(list(part.lora_magnitude) == [] for part in parts_of(layer))


@pytest.mark.parametrize("kind", CASES)
def test_dora_needs_outputs_that_have_a_direction(kind: str) -> None:
    layer = base_of(CASES[kind])
    weight = layer.get_parameter(CASES[kind].keys[-1])
    weight.data.zero_()
    with pytest.raises(NumericError, match="other than zero"):
        wrap(layer, dora=True)
    wrapped = wrap(base_of(CASES[kind]))
    parts_of(wrapped)[-1].base_weight.data.zero_()
    with pytest.raises(NumericError):
        wrapped.add_adapter("default", LoRAParameters(dora=True))
    assert not any(part.settings or part.active or list(part.lora_A) for part in parts_of(wrapped))


@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
@pytest.mark.parametrize("kind", CASES)
def test_states_and_copies_keep_everything(kind: str, dora: bool) -> None:
    layer = dressed(CASES[kind], dora=dora, dropout=0.0)
    if not dora:
        layer.add_adapter("other", LoRAParameters(rank=1))
        learn(layer, seed=8)
        layer.activate({"default": 0.5, "other": 2.0})
    inputs = inputs_of(CASES[kind])
    expected = call(layer, inputs)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):  # noqa: S301 # what was pickled here
        assert type(twin) is type(layer)
        assert torch.equal(call(twin, inputs), expected)
        twin.lora_A.weight.data.zero_()
        assert torch.equal(call(layer, inputs), expected)
    stored = io.BytesIO()
    torch.save(layer.state_dict(), stored)
    stored.seek(0)
    fresh = wrap(base_of(CASES[kind]), rank=RANK, alpha=4.0, dora=dora)
    if not dora:
        fresh.add_adapter("other", LoRAParameters(rank=1))
        fresh.activate({"default": 0.5, "other": 2.0})
    fresh.load_state_dict(torch.load(stored, weights_only=True), strict=True)
    assert torch.equal(call(fresh, inputs), expected)


def test_keys_are_those_of_wrapped_checkpoints() -> None:
    layer = wrap(nn.Linear(4, 4), dora=True)
    assert set(layer.state_dict()) == {
        *("base.weight", "base.bias"),
        *("lora_A.weight", "lora_B.weight", "lora_magnitude.weight"),
    }
    layer.activate({})
    layer.add_adapter("other", LoRAParameters())
    assert {"lora_A.other.weight", "lora_B.other.weight"} <= set(layer.state_dict())
    attention = wrap(nn.MultiheadAttention(4, 2), rank=1)
    assert set(attention.state_dict()) == {
        *("base.in_proj_weight", "base.in_proj_bias", "lora_A.weight", "lora_B.weight"),
        *("base.out_proj.base.weight", "base.out_proj.base.bias"),
        *("base.out_proj.lora_A.weight", "base.out_proj.lora_B.weight"),
    }


@pytest.mark.parametrize("kind", [kind for kind in CASES if kind not in ("embedding", "attention")])
def test_dropout_acts_in_training_and_on_the_adapter_alone(kind: str) -> None:
    layer = dressed(CASES[kind], torch.float64, dropout=0.5)
    inputs = inputs_of(CASES[kind], torch.float64)
    layer.train()
    first, second = call(layer, inputs), call(layer, inputs)
    assert not torch.equal(first, second)
    layer.lora_B.weight.data.zero_()
    assert torch.equal(call(layer, inputs), call(layer.base, inputs))
    learn(layer)
    undropped = dressed(CASES[kind], torch.float64)
    layer.eval()
    assert torch.equal(call(layer, inputs), call(undropped, inputs))


def test_without_dropout_no_random_number_is_drawn() -> None:
    layer, inputs = dressed(CASES["linear"]).train(), inputs_of(CASES["linear"])
    before = torch.get_rng_state()
    call(layer, inputs)
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_leaves_on_average_what_it_was() -> None:
    layer = dressed(CASES["linear"], torch.float64, dropout=0.25)
    (x,) = inputs_of(CASES["linear"], torch.float64)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mean = layer(x.expand(20_000, *x.shape)).mean(0)
    assert is_close(mean, layer.eval()(x), 0.02)


def test_tokens_are_never_dropped() -> None:
    layer = dressed(CASES["embedding"], dropout=0.9)
    inputs = inputs_of(CASES["embedding"])
    assert torch.equal(call(layer, inputs), call(dressed(CASES["embedding"]), inputs))


@pytest.mark.parametrize("rule", ["kaiming", "gaussian"])
@pytest.mark.parametrize("kind", CASES)
def test_an_adapter_begins_anew(kind: str, rule: str) -> None:
    start = Start(rule, "model.X", seed=3)
    layer = wrap(base_of(CASES[kind]))
    layer.add_adapter("default", LoRAParameters(rank=RANK, dora=True), start=start)
    fresh = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    parameters = dict(layer.named_parameters())
    learn(layer)
    layer.reset_parameters(start=start)
    assert all(torch.equal(tensor, fresh[key]) for key, tensor in layer.state_dict().items())
    assert dict(layer.named_parameters()) == parameters  # in place: an optimizer still has them
    layer.reset_parameters()
    assert not torch.equal(layer.lora_A.weight, fresh["lora_A.weight"])
    assert not layer.lora_B.weight.any()


@pytest.mark.parametrize("rule", ["pissa", "olora"])
@pytest.mark.parametrize("kind", [kind for kind in CASES if kind != "grouped"])
def test_factors_taken_from_the_weight_are_taken_off_it_and_given_back(kind: str, rule: str) -> None:
    layer, inputs = wrap(base_of(CASES[kind])), inputs_of(CASES[kind])
    before, expected = [part.base_weight.clone() for part in parts_of(layer)], call(layer, inputs)
    layer.add_adapter("default", LoRAParameters(rank=2), start=Start(rule, "X"))
    assert is_close(call(layer, inputs), expected, 1e-6)
    assert all(part.lora_B.weight.any() for part in parts_of(layer))
    assert not any(torch.equal(part.base_weight, weight) for part, weight in zip(parts_of(layer), before, strict=True))
    layer.remove_adapter("default")
    layer.restore_base()
    assert all(torch.equal(part.base_weight, weight) for part, weight in zip(parts_of(layer), before, strict=True))


def test_an_init_that_one_projection_refuses_changes_neither() -> None:
    layer = wrap(base_of(CASES["attention"]))
    inputs, output = parts_of(layer)
    output.base_weight.data[0, 0] = torch.nan
    before = inputs.base_weight.clone()
    with pytest.raises(NumericError):
        layer.add_adapter("default", LoRAParameters(rank=2), start=Start("pissa", "X"))
    assert torch.equal(inputs.base_weight, before)
    assert not inputs.settings


def test_parts_of_attention_begin_as_modules_of_their_own() -> None:
    layer = wrap(base_of(CASES["attention"]))
    layer.add_adapter("default", LoRAParameters(rank=RANK), start=Start(module="block.attn", seed=1))
    inputs, output = parts_of(layer)
    alone = wrap(nn.Linear(6, 6))
    alone.add_adapter("default", LoRAParameters(rank=RANK), start=Start(module="block.attn.out_proj", seed=1))
    assert torch.equal(output.lora_A.weight, alone.lora_A.weight)
    assert not torch.equal(inputs.lora_A.weight, output.lora_A.weight)


def test_each_group_begins_with_numbers_of_its_own_and_by_its_own_width() -> None:
    layer = wrap(base_of(CASES["grouped"]))
    layer.add_adapter("default", LoRAParameters(rank=200), start=Start(module="X", seed=1))
    a = layer.lora_A.weight
    assert a.shape == (3, 6, 200)
    assert 0.99 < a.abs().max().item() * 6**0.5 <= 1.0
    assert is_close(a.var(), torch.tensor(1 / 18), 0.1)
    rows = Start(module="X", seed=1).first_factor((600, 6), torch.float32)
    assert len(rows.unique(dim=0)) == 600
    assert torch.equal(a[1], rows[200:400].T)
    with pytest.raises(UnsupportedError, match="stack of matrices"):
        layer.reset_parameters(start=Start("orthogonal"))


@pytest.mark.parametrize(("dtype", "base_dtype"), [(None, torch.bfloat16), (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("kind", CASES)
def test_the_output_has_the_type_of_the_frozen_layer(kind: str, dtype: Any, base_dtype: torch.dtype) -> None:
    layer = dressed(CASES[kind], base_dtype, dtype=dtype, dora=True)
    assert layer.lora_A.weight.dtype == (dtype or base_dtype)
    found = call(layer, inputs_of(CASES[kind], base_dtype))
    assert found.dtype == base_dtype
    wide = dressed(CASES[kind], torch.float64, dora=True)
    for part, wider in zip(parts_of(layer), parts_of(wide), strict=True):
        wider.load_state_dict(part.state_dict())
    wide.eval()
    assert is_close(found, call(wide, inputs_of(CASES[kind], torch.float64)), 0.05)


def test_how_the_frozen_layer_is_copied_is_not_how_a_lora_layer_is() -> None:
    class Guarded(nn.Linear):
        def __deepcopy__(self, memo: dict[int, Any]) -> Guarded:
            twin = Guarded(self.in_features, self.out_features)
            twin.load_state_dict(self.state_dict())
            return twin

    layer = wrap(Guarded(4, 3), rank=2)
    twin = copy.deepcopy(layer)
    assert type(twin) is LoRALinear
    assert twin.base is not layer.base
    assert torch.equal(twin.base_weight, layer.base_weight)


def test_a_property_that_fails_is_not_looked_for_in_the_frozen_layer() -> None:
    class Broken(LoRALinear):
        def product(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            raise AttributeError("a bug")

    with pytest.raises(AttributeError):
        Broken(nn.Linear(4, 3), LoRAParameters()).weight  # noqa: B018


def test_what_the_frozen_layer_has_is_found() -> None:
    assert wrap(nn.Linear(4, 3)).in_features == 4
    assert wrap(nn.MultiheadAttention(4, 2)).num_heads == 2
    assert wrap(nn.Conv2d(4, 3, 2)).kernel_size == (2, 2)
    with pytest.raises(AttributeError, match="nothing"):
        wrap(nn.Linear(4, 3)).nothing  # noqa: B018
    sizes = {kind: wrap(base_of(case)).output_size for kind, case in CASES.items()}
    expected = dict.fromkeys(CASES, 5) | {"conv3d": 4, "conv in groups": 6, "attention": 6}
    assert sizes == expected
