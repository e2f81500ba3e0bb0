"""Modes, states and copies of injected models."""

import pickle
from pathlib import Path

import pytest
import torch
from net_world import LAYERS, Net, WithHead, logits_of, same_bits, seeded, state, stirred

from lora_cli.errors import (
    NumericError,
    ShapeError,
    UsageError,
    WrongInputError,
)
from lora_cli.nn import LoRAConfig, inject, load_adapter

__all__ = ["seeded"]


# Modes and states


def test_new_layers_are_in_the_mode_of_the_model(tmp_path: Path) -> None:
    model = Net().eval()
    injection = stirred(inject(model, rank=2, targets=("q_proj",), dropout=0.5))
    injection.add(LoRAConfig(rank=1, targets=("q_proj", "down_proj"), dropout=0.5), "second")
    assert not any(module.training for module in model.modules())
    assert torch.equal(logits_of(model), logits_of(model))
    model.train()
    assert not torch.equal(logits_of(model), logits_of(model))
    injection.remove("second")
    injection.save(tmp_path / "adapter")
    injection.take_out()
    load_adapter(model.eval(), tmp_path / "adapter")
    assert torch.equal(logits_of(model), logits_of(model))


def test_an_unmerge_that_fails_leaves_all_merged() -> None:
    model = Net()
    injection = stirred(inject(model, rank=2, targets=("q_proj", "attn")))
    injection.merge()
    merged = logits_of(model)
    weight = injection.layers["layers.2.attn"].base_weight
    with torch.no_grad():
        weight[0, 0] += 1
        with pytest.raises(WrongInputError):
            injection.unmerge()
        weight[0, 0] -= 1
    assert all(layer.merged for layer in injection.layers.values())
    injection.take_out(merged=True)
    assert torch.allclose(logits_of(model), merged, atol=1e-5)


def test_states_of_another_rank_or_shape_are_refused_whole() -> None:
    one, other = inject(Net(), rank=1, targets=("q_proj",)), inject(Net(), rank=2, targets=("q_proj",))
    before = state(other.model)
    with pytest.raises(ShapeError) as caught:
        other.load_trainable_state(stirred(one).trainable_state())
    assert len(caught.value.details) == 2 * LAYERS
    base = {key: tensor + 1 for key, tensor in other.base_state().items()} | {"conv.bias": torch.zeros(3)}
    with pytest.raises(ShapeError):
        other.load_base(base)
    assert same_bits(state(other.model), before)


def test_a_new_base_is_what_is_given_back() -> None:
    model, new = Net(), state(Net())
    injection = inject(model, rank=1, targets=("q_proj",), modules_to_save=("lm_head",), bias="all")
    injection.load_base(new)
    stirred(injection).take_out()
    assert same_bits(state(model), new)


def test_an_injection_that_was_taken_out_begins_anew() -> None:
    model = Net()
    injection = stirred(inject(model, rank=1, targets=("q_proj",), modules_to_save=("lm_head",)))
    injection.take_out(merged=True)
    learned = state(model)
    injection.add(LoRAConfig(rank=1, targets=("q_proj",), modules_to_save=("lm_head",)), "default")
    stirred(injection).take_out()
    assert same_bits(state(model), learned)


def test_what_was_before_is_lent_and_not_given_away() -> None:
    model, x = WithHead().train(), torch.randn(8, 6)
    before = state(model)
    injection = inject(model, rank=1, targets=("up",), modules_to_save=("head",))
    with injection.disabled():
        model(x)
        for wrong in (injection.trainable_state, lambda: injection.save("nowhere")):
            with pytest.raises(UsageError, match="adapters are disabled"):
                wrong()
    injection.take_out()
    assert same_bits(state(model), before)


def test_disabled_in_a_merged_model_is_the_merged_one() -> None:
    model = Net()
    injection = stirred(inject(model, rank=1, targets=("q_proj",), modules_to_save=("lm_head",)))
    injection.merge()
    merged = logits_of(model)
    with injection.disabled():
        assert torch.equal(logits_of(model), merged)


def test_numbers_that_must_not_be_merged_are_named() -> None:
    model = Net()
    injection = inject(model, rank=1, targets=("q_proj",))
    with torch.no_grad():
        model.get_parameter("layers.1.q_proj.lora_A.weight")[0, 0] = torch.nan
    with pytest.raises(NumericError) as caught:
        injection.merge()
    assert caught.value.tensor == "layers.1.q_proj"


def test_injections_are_pickled(tmp_path: Path) -> None:
    model = Net()
    inject(model, rank=1, targets=("q_proj",)).save(tmp_path / "adapter")
    plain = Net()
    again = pickle.loads(pickle.dumps(load_adapter(plain, tmp_path / "adapter")))  # noqa: S301 (our own bytes)
    assert torch.equal(logits_of(again.model), logits_of(plain))


def test_nothing_is_trained_whole_without_weights() -> None:
    with torch.device("meta"):
        model = Net()
    with pytest.raises(UsageError, match="model without weights"):
        inject(model, rank=1, targets=("q_proj",), bias="lora_only")
    assert not any(".lora_" in key for key in model.state_dict())
