"""Live models merged and unmerged, taken out again, and with several adapters."""

import pytest
import torch
from net_world import EVERYTHING, LAYERS, Net, logits_of, same, same_bits, seeded, state, stirred
from torch import nn

from lora_cli.adapters.modules import Module
from lora_cli.errors import NamesError, NumericError, UsageError, WrongInputError
from lora_cli.nn import LoRAConfig, inject

__all__ = ["seeded"]


# Merging, and the way back


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dora", [False, True])
def test_merged_and_back_bit_for_bit(dtype: torch.dtype, dora: bool) -> None:
    model = Net().to(dtype)
    injection = stirred(inject(model, rank=2, targets=EVERYTHING, dora=dora))
    before, logits = state(model), logits_of(model)
    injection.merge()
    error = (logits_of(model) - logits).abs().max() / logits.abs().max()
    assert error < (1e-5 if dtype == torch.float32 else 5e-2)
    merged = injection.base_state()["layers.0.q_proj.weight"]
    assert not torch.equal(merged, before["layers.0.q_proj.base.weight"])
    with pytest.raises(UsageError, match="merged"):
        injection.merge()
    with pytest.raises(UsageError, match="hold its adapter twice"):
        model.state_dict()
    injection.unmerge()
    assert same_bits(before, state(model))
    with pytest.raises(UsageError, match="not merged"):
        injection.unmerge()


def test_a_merge_that_fails_leaves_the_model_as_it_was() -> None:
    model = Net()
    injection = stirred(inject(model, rank=2))
    with torch.no_grad():
        model.get_parameter("layers.2.down_proj.lora_B.weight")[0, 0] = torch.inf
    before = state(model)
    with pytest.raises(NumericError):
        injection.merge()
    assert same_bits(before, state(model))
    assert not any(layer.merged for layer in injection.layers.values())


def test_weights_that_were_changed_are_not_unmerged() -> None:
    model = Net()
    injection = stirred(inject(model, rank=2, targets="q_proj"))
    injection.merge()
    with torch.no_grad():
        model.get_parameter("layers.1.q_proj.base.weight")[0, 0] += 1
    with pytest.raises(WrongInputError, match="changed since the merge"):
        injection.unmerge()


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_tied_weight_is_untied_while_it_is_merged(target: str) -> None:
    model = Net(tied=True)
    injection = stirred(inject(model, rank=2, targets=target))
    weight = model.embed_tokens.weight if target == "lm_head" else model.lm_head.weight
    logits = logits_of(model)
    injection.merge()
    assert torch.allclose(logits_of(model), logits, atol=1e-5)
    injection.unmerge()
    injection.take_out()
    assert model.lm_head.weight is model.embed_tokens.weight is weight


@pytest.mark.parametrize("is_merged", [False, True])
def test_taken_out_without_a_trace(is_merged: bool) -> None:
    model = Net()
    model.get_parameter("conv.bias").requires_grad_(False)
    before, logits, modules = state(model), logits_of(model), list(model.modules())
    injection = stirred(inject(model, rank=2, targets=EVERYTHING, bias="all", modules_to_save=("norm",)))
    if is_merged:
        injection.merge()
    assert injection.take_out() is model
    assert same_bits(before, state(model))
    assert list(model.modules()) == modules
    assert same(logits_of(model), logits)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["conv.bias"]
    inject(model, rank=2)  # as if nothing had been


def test_taken_out_merged() -> None:
    model = Net()
    injection = stirred(inject(model, rank=2, targets=EVERYTHING, bias="lora_only"))
    logits = logits_of(model)
    plain = injection.take_out(merged=True)
    assert not any(".lora_" in key for key in plain.state_dict())
    assert set(plain.state_dict()) == set(Net().state_dict())
    assert torch.allclose(logits_of(plain), logits, atol=1e-4)
    assert not any(parameter.data_ptr() == 0 for parameter in plain.parameters())


def test_disabled_is_the_base() -> None:
    model = Net()
    expected = logits_of(model)
    injection = stirred(inject(model, rank=2, targets=EVERYTHING, bias="all"))
    changed = logits_of(model)
    with injection.disabled():
        assert same(logits_of(model), expected)
    assert same(logits_of(model), changed)
    assert not torch.equal(changed, expected)


# Several adapters


def test_several_adapters_and_their_weights() -> None:
    model = Net()
    base = logits_of(model)
    injection = stirred(inject(model, rank=2, targets=("q_proj", "up_proj"), name="style"))
    style = logits_of(model)
    injection.add(LoRAConfig(rank=3, targets=("up_proj", "conv")), "facts")
    assert same(logits_of(model), style)  # it begins with nothing
    stirred(injection)
    both = logits_of(model)
    keys = set(model.state_dict())
    assert {"layers.0.up_proj.lora_A.style.weight", "conv.lora_B.facts.weight"} < keys
    injection.activate(style=1.0, facts=1.0)
    assert same(logits_of(model), both)
    injection.activate("facts", style=0.0)
    only_facts = logits_of(model)
    injection.activate("facts")
    assert same(logits_of(model), only_facts)
    injection.activate()
    assert same(logits_of(model), base)
    injection.activate(style=0.5, facts=2)
    mixed = logits_of(model)
    injection.merge()
    assert torch.allclose(logits_of(model), mixed, atol=1e-5)
    with pytest.raises(UsageError, match="merged"):
        injection.activate("facts")
    injection.unmerge()
    with pytest.raises(NamesError, match="No such adapter"):
        injection.activate("nobody")
    with pytest.raises(NamesError, match="of this name already"):
        injection.add(LoRAConfig(rank=2, targets=("q_proj",)), "facts")
    injection.take_out()
    assert same(logits_of(model), base)


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_one_adapter_of_two_is_removed(init: str) -> None:
    model = Net()
    before = state(model)
    injection = stirred(inject(model, rank=2, targets=("q_proj", "attn"), init=init, name="first"))
    after_first, logits = state(model), logits_of(model)
    injection.add(
        LoRAConfig(rank=2, targets=("q_proj", "conv"), init=init, bias="all", modules_to_save=("norm",)), "second"
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ".first." not in name:
                parameter.add_(1.0)
    injection.remove("second")
    assert "conv" not in injection.layers
    assert type(model.conv) is nn.Conv1d
    assert same(logits_of(model), logits)
    assert same_bits(state(model), after_first)
    injection.remove("first")
    assert same_bits(state(model), before)
    assert not injection.layers
    with pytest.raises(NamesError, match="No such adapter"):
        injection.remove("first")


@pytest.mark.parametrize("name", ["weight", "keys", "forward", "a.b", "", "training"])
def test_names_that_adapters_cannot_have(name: str) -> None:
    model = Net()
    before, modules = state(model), [type(module) for module in model.modules()]
    with pytest.raises(UsageError, match="plain word"):
        inject(model, rank=1, name=name)
    assert same_bits(before, state(model))
    assert modules == [type(module) for module in model.modules()]


def test_what_two_adapters_train_whole() -> None:
    model = Net()
    injection = inject(model, rank=1, targets=("q_proj",), bias="lora_only", name="first")
    injection.add(LoRAConfig(rank=1, targets=("q_proj", "down_proj"), bias="lora_only"), "second")
    first, second = (
        {f"layers.{n}.{m}.bias" for n in range(LAYERS) for m in names}
        for names in (["q_proj"], ["q_proj", "down_proj"])
    )
    assert set(injection.wholes_of("first")) == first
    assert set(injection.wholes_of("second")) == second
    stirred(injection)
    injection.remove("first")
    assert set(injection.wholes_of("second")) == second
    assert all(parameter.requires_grad for parameter in injection.wholes_of("second").values())


def test_a_checkpoint_holds_a_tied_tensor_once() -> None:
    model, other = Net(tied=True), Net(tied=True)
    plain = state(other)
    del plain["lm_head.weight"]
    injection = inject(model, rank=1, targets=("q_proj", "lm_head"))
    injection.load_base(plain)
    assert same(logits_of(model), logits_of(other))
    del plain["embed_tokens.weight"]
    with pytest.raises(NamesError) as caught:
        injection.load_base(plain)
    assert caught.value.details == ("embed_tokens.weight is missing", "lm_head.base.weight is missing")


def test_predicates_see_what_a_layer_is() -> None:
    seen: list[Module] = []

    def all_but_experts(module: Module) -> bool:
        seen.append(module)
        return module.kind != "grouped"

    injection = inject(Net(), rank=1, targets=(all_but_experts,))
    assert {module.kind for module in seen} == {"linear", "embedding", "conv", "grouped", "attention"}
    assert "experts" not in injection.layers
    assert {"lm_head", "embed_tokens", "conv", "layers.0.attn"} < set(injection.layers)
