"""What must not go wrong with a live model: double merges, states of merged layers, weights that were changed, ties."""

from pathlib import Path
from typing import Any

import pytest
import torch
from net_world import EVERYTHING, LAYERS, Net, WithHead, ids, logits_of, same_bits, seeded, state, stirred
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_cli
from lora_cli.errors import (
    LoraCliError,
    OutputExistsError,
    UnsupportedError,
    UsageError,
    WrongInputError,
)
from lora_cli.nn import LoRAConfig, LoRALinear, inject, load_adapter

__all__ = ["seeded"]


def test_every_factor_is_trained() -> None:
    """Told by name: attention has its output projection's layer in the model before the rest is frozen."""
    model = Net()
    injection = inject(model, rank=2, targets=EVERYTHING)
    asking = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    modules = ["embed_tokens", "conv", "experts"]
    modules += [
        f"layers.{number}.{name}"
        for number in range(LAYERS)
        for name in ("q_proj", "up_proj", "down_proj", "attn", "attn.base.out_proj")
    ]
    assert asking == {f"{module}.lora_{side}.weight" for module in modules for side in "AB"}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(injection.parameters(), 0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(ids()).square().sum().backward()
        optimizer.step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(before[name], parameter)}
    assert changed == asking


def test_a_second_merge_changes_nothing() -> None:
    model = Net(tied=True)
    injection = stirred(inject(model, rank=2, targets=("embed_tokens", "q_proj")))
    before = state(model)
    injection.merge()
    merged, weights = logits_of(model), injection.base_state()
    for wrong in (injection.merge, lambda: injection.load_base(weights), lambda: injection.remove("default")):
        with pytest.raises(UsageError, match="merged"):
            wrong()
    with pytest.raises(UsageError, match="merged"):
        injection.add(LoRAConfig(rank=1, targets=("up_proj",)), "second")
    assert torch.equal(logits_of(model), merged)
    assert list(injection.configs) == ["default"]
    injection.unmerge()
    assert same_bits(state(model), before)


def test_the_state_of_a_merged_model_is_refused() -> None:
    """Read again, it would apply the adapter twice."""
    model = Net()
    injection = stirred(inject(model, rank=2, targets=("q_proj",)))
    injection.merge()
    with pytest.raises(UsageError, match="hold its adapter twice") as caught:
        model.state_dict()
    assert caught.value.tensor == "layers.0.q_proj"
    assert set(injection.base_state()) == set(Net().state_dict())
    injection.unmerge()
    assert model.state_dict()


@pytest.mark.parametrize("where", ["tied", "of another adapter"])
def test_what_has_factors_is_not_trained_whole(where: str) -> None:
    model = Net(tied=where == "tied")
    if where == "tied":
        with pytest.raises(UsageError, match="whole and get factors"):
            inject(model, rank=1, targets=("embed_tokens",), modules_to_save=("lm_head",))
        assert all(parameter.requires_grad for parameter in model.parameters())
        return
    injection = inject(model, rank=1, targets=("q_proj",))
    with pytest.raises(UsageError, match="whole and get factors"):
        injection.add(LoRAConfig(rank=1, targets=("up_proj",), modules_to_save=("q_proj",)), "second")
    assert "layers.0.up_proj" not in injection.layers


def test_buffers_of_what_is_trained_whole(tmp_path: Path) -> None:
    model, other, x = WithHead(), WithHead(), torch.randn(8, 6)
    other.load_state_dict(model.state_dict())
    before = state(model)
    injection = inject(model, rank=2, targets=("up",), modules_to_save=("head",))
    model.train()(x)  # moves the running statistics
    stirred(injection)
    expected = model.eval()(x)
    injection.save(tmp_path / "adapter")
    load_adapter(other, tmp_path / "adapter")
    assert torch.allclose(other.eval()(x), expected, atol=1e-6)
    assert not torch.equal(before["head.0.running_mean"], model.state_dict()["head.0.running_mean"])
    with injection.disabled():
        assert torch.equal(before["head.0.running_mean"], model.state_dict()["head.0.running_mean"])
    injection.take_out()
    assert same_bits(state(model), before)


def test_what_is_trained_whole_is_looked_up_when_it_is_used(tmp_path: Path) -> None:
    """Assigning a state gives a model other parameters; casting gives them another type."""
    model = Net()
    injection = inject(model, rank=1, targets=("q_proj",), modules_to_save=("lm_head",))
    new = {key: tensor + 1 if key == "lm_head.weight" else tensor for key, tensor in state(model).items()}
    model.load_state_dict(new, assign=True)
    injection.save(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert torch.equal(saved["base_model.model.lm_head.weight"], new["lm_head.weight"])
    model.to(torch.bfloat16)
    with injection.disabled():
        assert logits_of(model).dtype == torch.bfloat16


def test_layers_that_compute_in_a_way_of_their_own() -> None:
    class Tripled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (as torch calls it)
            return 3 * super().forward(input)

    model = nn.ModuleDict({"up": Tripled(4, 4)})
    with pytest.raises(UnsupportedError) as caught:
        inject(model, rank=1)
    assert caught.value.tensor == "up"
    assert "a way of its own" in caught.value.details[0]


def test_names_with_signs_of_regular_expressions(tmp_path: Path) -> None:
    names = ("q+k", "q+kk", "v")
    model = nn.ModuleDict({name: nn.Linear(5, 5) for name in names})
    fields: dict[str, Any] = {"rank_pattern": {"q+k": 3}, "alpha_pattern": {"q+kk": 9.0}}
    injection = stirred(inject(model, rank=2, alpha=4, targets=("*",), **fields))
    injection.save(tmp_path / "adapter")
    settings = {name: injection.layers[name].settings["default"] for name in names}
    injection.take_out()
    again = load_adapter(model, tmp_path / "adapter")
    for name in names:
        found, expected = again.layers[name].settings["default"], settings[name]
        assert (found.rank, found.scale.times()) == (expected.rank, expected.scale.times())


def test_a_layer_in_two_places_is_saved_for_both(tmp_path: Path) -> None:
    shared = nn.Linear(4, 6)
    model = nn.ModuleDict({"one": shared, "two": shared})
    plain = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    save_file(plain, tmp_path / "base.safetensors")
    injection = stirred(inject(model, rank=2, targets=("one", "two")))
    assert model["one"] is model["two"]
    injection.save(tmp_path / "adapter")
    lora_cli.merge(tmp_path / "base.safetensors", [tmp_path / "adapter"], tmp_path / "merged.safetensors")
    merged = load_file(tmp_path / "merged.safetensors")
    injection.merge()
    weight = injection.base_state()["one.weight"].clone()
    assert torch.equal(merged["one.weight"], weight)
    assert torch.equal(merged["two.weight"], weight)
    injection.take_out()
    x = torch.randn(3, 4)
    load_adapter(model, tmp_path / "adapter")
    assert torch.allclose(model["two"](x), nn.functional.linear(x, weight, shared.bias), atol=1e-5)


# Inits that change the base


@pytest.mark.parametrize("targets", [("q_proj",), ("attn",), ("embed_tokens", "conv")])
def test_without_its_adapter_a_changed_base_computes_as_before(targets: tuple[str, ...]) -> None:
    model = Net()
    before = logits_of(model)
    injection = stirred(inject(model, rank=2, targets=targets, init="pissa"))
    assert not torch.allclose(logits_of(model), before, atol=1e-2)
    with injection.disabled():
        assert torch.allclose(logits_of(model), before, atol=1e-5)
    for weights in ({}, {"default": 0.5}):
        with pytest.raises(UnsupportedError, match="used at weight 1"):
            injection.activate(**weights)
    with pytest.raises(UsageError, match="lack what the init"):
        injection.load_base(injection.base_state())


def test_factors_of_other_weights_are_not_subtracted(tmp_path: Path) -> None:
    """The state of one injection in another, whose init took other factors off other weights."""
    one, other = Net(), Net()
    fields: dict[str, Any] = {"rank": 2, "targets": ("q_proj",), "init": "pissa"}
    stirred(inject(one, **fields))
    injection = inject(other, **fields)
    other.load_state_dict(one.state_dict())
    with pytest.raises(WrongInputError, match="changed since"):
        injection.save(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_several_inits_come_off_in_reverse() -> None:
    model = Net()
    before = state(model)
    injection = inject(model, rank=2, targets=("q_proj", "up_proj"), init="olora")
    injection.add(LoRAConfig(rank=1, targets=("q_proj",), init="pissa"), "second")
    with pytest.raises(WrongInputError, match="changed since"):
        injection.remove("default")
    assert all("default" in layer.settings for layer in injection.layers.values())
    stirred(injection)
    injection.take_out()
    assert same_bits(state(model), before)


@pytest.mark.parametrize("targets", [("embed_tokens",), ("lm_head",), ("embed_tokens", "lm_head")])
def test_nothing_is_taken_off_a_weight_that_is_used_twice(targets: tuple[str, ...]) -> None:
    model = Net(tied=True)
    before = state(model)
    with pytest.raises(UnsupportedError, match="another layer uses too") as caught:
        inject(model, rank=1, targets=targets, init="pissa")
    assert caught.value.details == targets
    assert same_bits(state(model), before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_taking_out_what_cannot_be_taken_out_loses_nothing() -> None:
    model = Net()
    injection = stirred(inject(model, rank=1, targets=("q_proj",), init="pissa", modules_to_save=("lm_head",)))
    head = injection.wholes_of("default")["lm_head.weight"].detach().clone()
    model.get_submodule("layers.2").to(torch.bfloat16)
    with pytest.raises(WrongInputError):
        injection.take_out()
    assert torch.equal(injection.wholes_of("default")["lm_head.weight"], head)
    assert all(layer.taken_off for layer in injection.layers.values())


# Several adapters, several names


def test_a_layer_with_adapters_under_its_other_name() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, shared)
    x, expected = torch.randn(3, 4), None
    injection = stirred(inject(model, rank=1, targets=("0",)))
    expected = model(x)
    injection.add(LoRAConfig(rank=1, targets=("1",)), "second")
    assert list(injection.layers) == ["0"]
    assert model[0] is model[1]
    assert torch.equal(model(x), expected)
    injection.take_out()
    assert model[0] is model[1] is shared


def test_a_file_that_names_a_shared_layer_by_its_other_name(tmp_path: Path) -> None:
    shared = nn.Linear(4, 4)
    plain = nn.ModuleDict({"b": nn.Linear(4, 4)})
    stirred(inject(plain, rank=2)).save(tmp_path / "adapter")
    model = nn.ModuleDict({"a": shared, "b": shared})
    load_adapter(model, tmp_path / "adapter")
    layer = model["a"]
    assert isinstance(layer, LoRALinear)
    assert torch.equal(layer.lora_B["default"], plain.get_parameter("b.lora_B.weight"))


def test_biases_of_the_first_adapter_stay_trained() -> None:
    model = Net()
    injection = inject(model, rank=1, targets=("q_proj",), bias="all")
    trained = set(injection.wholes_of("default"))
    injection.add(LoRAConfig(rank=1, targets=("down_proj", "attn")), "second")
    asking = {injection.plain_name(name) for name, p in model.named_parameters() if p.requires_grad}
    assert trained <= asking


def test_what_another_adapter_trains_whole_is_not_loaded_over(tmp_path: Path) -> None:
    model = Net()
    injection = stirred(inject(model, rank=1, targets=("q_proj",), modules_to_save=("lm_head",)))
    injection.save(tmp_path / "adapter")
    stirred(injection)
    head = injection.wholes_of("default")["lm_head.weight"].detach().clone()
    with pytest.raises(UsageError, match="holds whole") as caught:
        injection.load(tmp_path / "adapter", "second")
    assert caught.value.details == ("lm_head.weight",)
    assert torch.equal(injection.wholes_of("default")["lm_head.weight"], head)
    assert list(injection.configs) == ["default"]


# Saving and loading


def test_an_adapter_is_replaced_where_that_is_asked_for(tmp_path: Path) -> None:
    model = Net()
    injection = inject(model, rank=1, targets=("q_proj",))
    injection.save(tmp_path / "adapter")
    with pytest.raises(OutputExistsError) as caught:
        injection.save(tmp_path / "adapter")
    assert "force=True" in str(caught.value)
    stirred(injection).save(tmp_path / "adapter", force=True)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert bool(saved["base_model.model.layers.0.q_proj.lora_B.weight"].any())
    (tmp_path / "adapter" / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError):
        injection.save(tmp_path / "adapter", force=True)
    assert (tmp_path / "adapter" / "notes.txt").read_text() == "mine"


def test_dropout_is_that_of_the_files(tmp_path: Path) -> None:
    model = Net()
    injection = inject(model, rank=1, targets=("q_proj",), dropout=0.25)
    injection.save(tmp_path / "adapter")
    injection.take_out()
    again = load_adapter(model, tmp_path / "adapter")
    layer = again.layers["layers.0.q_proj"]
    assert isinstance(layer, LoRALinear)
    assert layer.settings["default"].dropout == 0.25


def test_a_load_that_fails_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = Net()
    injection = inject(model, rank=1, targets=("q_proj",), modules_to_save=("lm_head",))
    injection.save(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"base_model.model.lm_head.weight": torch.zeros(2, 2)}, file)
    injection.take_out()
    before, modules = state(model), [type(module) for module in model.modules()]
    with pytest.raises(LoraCliError):
        load_adapter(model, tmp_path / "adapter")
    assert same_bits(state(model), before)
    assert modules == [type(module) for module in model.modules()]
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_untied_weights_ask_for_gradients_as_they_did() -> None:
    model = Net(tied=True)
    injection = stirred(inject(model, rank=1, targets=("lm_head",)))
    logits = logits_of(model)
    injection.take_out(merged=True)
    assert model.lm_head.weight is not model.embed_tokens.weight
    assert model.lm_head.weight.requires_grad
    assert torch.allclose(logits_of(model), logits, atol=1e-5)
