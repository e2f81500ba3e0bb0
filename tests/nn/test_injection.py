"""Injection into live models: what gets an adapter, what is trained, and under which names."""

import copy
import re
from typing import Any

import pytest
import torch
from net_world import (
    EVERYTHING,
    LAYERS,
    WIDTH,
    Net,
    ids,
    logits_of,
    same,
    same_bits,
    seeded,
    state,
    stirred,
)
from torch import nn

from lora_cli.errors import LoraCliError, NamesError, UnsupportedError, UsageError
from lora_cli.nn import LoRAConfig, LoRALinear, inject, wrap
from lora_cli.nn.layer import LoRALayer

__all__ = ["seeded"]


def adapted(model: nn.Module) -> list[str]:
    """Names of layers with adapters, read off the tree itself."""
    return [name for name, module in model.named_modules() if isinstance(module, LoRALayer)]


# What gets an adapter


@pytest.mark.parametrize(
    ("targets", "exclude", "expected"),
    [
        ("mlp", (), ["layers.0.down_proj", "layers.0.up_proj"]),
        (["q_proj"], (), ["layers.0.q_proj"]),
        (["layers.0.*_proj"], ["up_proj"], ["layers.0.down_proj", "layers.0.q_proj"]),
        (["re:.*(up|down)_proj"], (), ["layers.0.down_proj", "layers.0.up_proj"]),
        (re.compile(r"layers\.0\.q_\w+"), (), ["layers.0.q_proj"]),
        ((lambda module: module.shape == (12, WIDTH),), (), ["layers.0.up_proj"]),
        (["q_proj", lambda module: module.kind == "embedding"], (), ["embed_tokens", "layers.0.q_proj"]),
        (
            "all-linear",
            (lambda module: "attn" in module.name,),
            ["layers.0.q_proj", "layers.0.down_proj", "layers.0.up_proj"],
        ),
    ],
)
def test_targets_are_names_globs_expressions_and_functions(targets: Any, exclude: Any, expected: list[str]) -> None:
    model = Net()
    injection = inject(model, rank=2, targets=targets, exclude=exclude)
    found = [name for name in adapted(model) if not re.match(r"layers\.[12]", name)]
    assert sorted(found) == sorted(expected) == sorted(n for n in injection.layers if not re.match(r"layers\.[12]", n))
    assert isinstance(model.layers[0].q_proj, LoRALinear) == ("layers.0.q_proj" in expected)


def test_only_the_layers_that_were_asked_for() -> None:
    model = Net()
    assert list(inject(model, rank=2, targets="q_proj", layers=(0, 2)).layers) == ["layers.0.q_proj", "layers.2.q_proj"]
    with pytest.raises(NamesError, match="No target is in these layers"):
        inject(Net(), rank=2, targets="q_proj", layers=(7,))
    nested = nn.ModuleDict(
        {"blocks": nn.ModuleList(nn.ModuleDict({"q": nn.ModuleList([nn.Linear(2, 2)])}) for _ in "ab")}
    )
    assert list(inject(copy.deepcopy(nested), rank=1, layers=1).layers) == ["blocks.1.q.0"]
    assert list(inject(nested, rank=1, layers=0, layers_within="q").layers) == ["blocks.0.q.0", "blocks.1.q.0"]


def test_attention_takes_its_output_projection_along() -> None:
    injection = inject(Net(), rank=2, targets=["attn", "attn.out_proj"])
    assert list(injection.layers) == [f"layers.{number}.attn" for number in range(LAYERS)]


def test_a_layer_in_two_places_is_one_layer() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"one": shared, "two": shared})
    before = state(model)
    injection = inject(model, rank=2, targets="one")
    assert model["one"] is model["two"]
    assert isinstance(model["one"], LoRALinear)
    injection.load_base(before)
    assert same_bits(injection.base_state(), before)
    injection.take_out()
    assert model["one"] is model["two"] is shared


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"targets": "nothing"}, NamesError, "matches no module"),
        ({"targets": "norm"}, UnsupportedError, "cannot take an adapter"),
        ({"targets": ("q_proj",), "modules_to_save": ("nowhere",)}, NamesError, "matches no module"),
        ({"targets": ("q_proj",), "modules_to_save": ("layers.0",)}, UsageError, "trained whole and get factors"),
        ({"targets": ("attn",), "dropout": 0.1}, UnsupportedError, "no dropout"),
        ({"targets": ("experts",), "init": "orthogonal"}, UnsupportedError, "not for a stack"),
    ],
)
def test_what_does_not_fit_leaves_the_model_as_it_was(
    fields: dict[str, Any], error: type[LoraCliError], words: str
) -> None:
    model = Net()
    before, modules = state(model), [type(module) for module in model.modules()]
    with pytest.raises(error, match=words):
        inject(model, **{"rank": 2} | fields)
    assert same_bits(before, state(model))
    assert modules == [type(module) for module in model.modules()]
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_layers_of_unknown_types_are_named() -> None:
    model = nn.ModuleDict({"up": nn.ConvTranspose1d(2, 2, 3), "norm": nn.LayerNorm(2), "flat": nn.Linear(2, 2)})
    for name, kind in (("up", "ConvTranspose1d"), ("norm", "LayerNorm")):
        with pytest.raises(UnsupportedError) as caught:
            inject(model, rank=1, targets=name)
        assert caught.value.details == (f"{name}: a layer of type {kind}, which takes no adapter",)
    assert list(inject(model, rank=1).layers) == ["flat"]


def test_a_layer_that_cannot_be_wrapped_is_told_which_can() -> None:
    with pytest.raises(UnsupportedError) as caught:
        wrap(nn.LayerNorm(2), rank=1)
    named = str(caught.value.expected).split(", ")
    assert {"Linear", "transformers' Conv1D", "Embedding", "Conv2d", "GroupedLinear", "MultiheadAttention"} < set(named)
    assert len(named) == len(set(named))


def test_what_was_passed_over_and_what_is_there_can_be_read() -> None:
    model = Net()
    injection = inject(model, rank=2, alpha=3)
    assert repr(injection) == f"<Injection in Net: {4 * LAYERS} layers, adapters default>"
    assert "default: rank 2, scale 1.5" in repr(model.get_submodule("layers.0.q_proj"))
    assert any("lm_head" in note for note in injection.notes)


def test_a_model_is_injected_once() -> None:
    model = Net()
    inject(model, rank=2)
    with pytest.raises(UsageError, match="LoRA layers already"):
        inject(model, rank=2)
    with pytest.raises(UsageError, match="not both"):
        inject(Net(), LoRAConfig(), rank=2)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": 1.5}, "rank"),
        ({"alpha": -1}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": -0.1}, "dropout"),
        ({"bias": "some"}, "bias"),
        ({"layers": ("0",)}, "layers"),
        ({"layers": (True,)}, "layers"),
        ({"layers_within": "h"}, "layers_within"),
        ({"rank_pattern": {"q_proj": 0}}, "rank"),
        ({"alpha_pattern": {"q_proj": 0}}, "alpha"),
        ({"init": "pissa", "dora": True}, "dora"),
        ({"init": "nothing"}, "init"),
        ({"dtype": "int8"}, "dtype"),
        ({"targets": (3,)}, "targets"),
        ({"modules_to_save": (3,)}, "modules_to_save"),
    ],
)
def test_a_config_is_checked_when_it_is_made(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError) as caught:
        LoRAConfig(**fields)
    assert caught.value.tensor == named


def test_patterns_give_other_ranks_and_alphas() -> None:
    config = LoRAConfig(rank=2, alpha=4, rank_pattern={"layers.1.*": 3, "q_proj": 5}, alpha_pattern={"up_proj": 1})
    layers = inject(Net(), config).layers
    found = {
        name: (layer.settings["default"].rank, layer.settings["default"].scale.times())
        for name, layer in layers.items()
    }
    assert found["layers.0.q_proj"] == (5, 4 / 5)
    assert found["layers.1.q_proj"] == (3, 4 / 3)
    assert found["layers.0.up_proj"] == (2, 1 / 2)
    assert found["layers.0.down_proj"] == (2, 2.0)


# What is trained


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
@pytest.mark.parametrize("saved", [(), ("layers.2.norm",)])
def test_what_asks_for_gradients(bias: Any, saved: tuple[str, ...]) -> None:
    model = Net()
    initial = sum(parameter.numel() for parameter in model.parameters())
    injection = inject(model, rank=2, targets=("q_proj", "up_proj"), bias=bias, modules_to_save=saved)
    asking = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    factors = {
        f"layers.{n}.{m}.lora_{side}.weight" for n in range(LAYERS) for m in ("q_proj", "up_proj") for side in "AB"
    }
    wholes = {"layers.2.norm.weight", "layers.2.norm.bias"} if saved else set()
    if bias == "lora_only":
        wholes |= {f"layers.{number}.q_proj.base.bias" for number in range(LAYERS)}
    elif bias == "all":
        wholes |= {name for name, _ in model.named_parameters() if name.endswith("bias")}
    assert asking == factors | wholes
    own = dict(model.named_parameters())
    trained = sum(own[name].numel() for name in asking)
    assert {id(parameter) for parameter in injection.parameters()} == {id(own[name]) for name in asking}
    assert injection.summary() == (
        f"Initial Parameters : {initial} || LoRA Parameters : {trained} || "
        f"Trainable Proportion : {trained * 100 / initial:.2f}%"
    )
    everything = initial + sum(own[name].numel() for name in factors)
    assert injection.trainable_fraction == pytest.approx(trained / everything)
    model(ids()).square().sum().backward()
    assert {name for name, parameter in own.items() if parameter.grad is not None} == asking


def test_training_changes_what_asks_and_nothing_else() -> None:
    model = Net()
    injection = inject(model, rank=2, targets=EVERYTHING, bias="all")
    before = state(model)
    optimizer = torch.optim.SGD(injection.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(ids()).square().sum().backward()
        optimizer.step()
    after = state(model)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_going_on_later() -> None:
    first, second = Net(), Net()
    second.load_state_dict(first.state_dict())
    fields: dict[str, Any] = {"rank": 2, "targets": EVERYTHING, "bias": "lora_only"}
    one, other = stirred(inject(first, **fields)), inject(second, **fields)
    saved = {key: tensor.clone() for key, tensor in one.trainable_state().items()}
    assert not same(logits_of(first), logits_of(second))
    other.load_trainable_state(saved)
    assert same(logits_of(first), logits_of(second))
    missing = dict(list(saved.items())[1:]) | {"more": torch.zeros(1)}
    with pytest.raises(NamesError) as caught:
        other.load_trainable_state(missing)
    assert caught.value.details == (f"{next(iter(saved))} is missing", "more is not known")


# Names


def test_plain_checkpoints_load_strictly_and_fold_back() -> None:
    model, other = Net(), Net()
    plain = state(other)
    expected = logits_of(other)
    injection = inject(model, rank=2, targets=EVERYTHING)
    injection.load_base(plain)
    assert same(logits_of(model), expected)
    assert same_bits(injection.base_state(), plain)
    renamed = {injection.mapper(key) or key for key in plain}
    factors = {key for key in model.state_dict() if ".lora_" in key}
    assert renamed | factors == set(model.state_dict())
    assert {injection.mapper.inverse(key) or key for key in renamed} == set(plain)
    assert injection.mapper("layers.0.q_proj.bias") == "layers.0.q_proj.base.bias"
    assert injection.mapper("layers.0.attn.in_proj_weight") == "layers.0.attn.base.in_proj_weight"
    assert injection.mapper("layers.0.attn.out_proj.weight") == "layers.0.attn.base.out_proj.base.weight"
    assert injection.mapper("layers.0.norm.weight") is None


def test_a_checkpoint_with_other_tensors_is_refused_whole() -> None:
    model = Net()
    injection = inject(model, rank=2)
    before, wrong = state(model), state(Net())
    del wrong["conv.bias"]
    wrong["else"] = torch.zeros(1)
    with pytest.raises(NamesError) as caught:
        injection.load_base(wrong)
    assert caught.value.details == ("conv.bias is missing", "else is not known")
    assert same_bits(before, state(model))


def test_the_state_of_an_injected_model_round_trips_strictly() -> None:
    one, other = Net(), Net()
    stirred(inject(one, rank=2, targets=EVERYTHING, dora=False))
    inject(other, rank=2, targets=EVERYTHING)
    assert other.load_state_dict(one.state_dict(), strict=True)
    assert same(logits_of(one), logits_of(other))
