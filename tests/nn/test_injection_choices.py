"""What an injection leaves as it is: the model's class, the layers' settings, what was left out; and what it counts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lora_cli.errors import NamesError
from lora_cli.nn import Injection, LoRAConfig, inject
from lora_cli.nn.layer import LoRALayer


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


class Net(nn.Module):
    """Two encoders, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(6, 6) for name in ("q_proj", "up_proj")}) for _ in range(2)
        )
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor, *, shift: float = 0.0) -> Tensor:
        for encoder in self.encoders:
            for layer in encoder.children():
                x = layer(x).tanh()
        result: Tensor = self.head(x) + shift
        return result


def stirred(injection: Injection) -> Injection:
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return injection


def test_defaults() -> None:
    config = LoRAConfig()
    assert (config.rank, config.alpha, config.dropout, config.bias) == (8, None, 0.0, "none")
    assert (config.rslora, config.dora, config.init, config.seed, config.dtype) == (False, False, "kaiming", 0, "fp32")
    assert (config.targets, config.exclude, config.modules_to_save, config.layers) == (("all-linear",), (), (), None)
    assert config.scale.times() == 1.0


def test_the_model_keeps_its_class_and_its_arguments() -> None:
    model, x = Net(), torch.randn(4, 6)
    expected = model(x, shift=2.0)
    injection = inject(model, rank=2)
    assert injection.model is model
    assert type(model) is Net
    assert torch.allclose(model(x, shift=2.0), expected, atol=1e-6)
    assert not any(key.startswith("model.") for key in model.state_dict())


def test_names_are_whole_and_globs_find_parts_of_them() -> None:
    for substring in ("proj", "q", "encoders"):
        with pytest.raises(NamesError, match="1 target pattern matches no module"):
            inject(Net(), rank=2, targets=substring)
    assert list(inject(Net(), rank=2, targets="*proj").layers) == [
        f"encoders.{n}.{name}" for n in range(2) for name in ("q_proj", "up_proj")
    ]
    assert list(inject(Net(), rank=2, targets="**0**").layers) == ["encoders.0.q_proj", "encoders.0.up_proj"]


def test_a_whole_branch_is_left_out_by_a_glob() -> None:
    injection = inject(Net(), rank=2, targets="*proj", exclude="encoders.0.**")
    assert list(injection.layers) == ["encoders.1.q_proj", "encoders.1.up_proj"]
    with pytest.raises(NamesError, match="1 exclusion matches no module"):
        inject(Net(), rank=2, targets="*proj", exclude="encoders.0")


def test_what_is_left_out_is_frozen_unless_it_is_saved_whole() -> None:
    def asking(**fields: Any) -> set[str]:
        model = Net()
        inject(model, rank=2, targets="*proj", exclude="up_proj", bias="all", **fields)
        return {name for name, p in model.named_parameters() if p.requires_grad and name.endswith("up_proj.weight")}

    assert asking() == set()
    assert asking(modules_to_save="up_proj") == {f"encoders.{n}.up_proj.weight" for n in range(2)}


def test_the_summary_counts_what_asked_before() -> None:
    model = Net()
    model.encoders.requires_grad_(False)
    injection = inject(model, rank=2, targets="q_proj")
    said = "Initial Parameters : 21 || LoRA Parameters : 48 || Trainable Proportion : 228.57%"
    assert injection.summary() == said
    injection.take_out()
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]
    model.requires_grad_(False)
    assert inject(model, rank=2, targets="q_proj").summary().endswith("Trainable Proportion : all")


def test_layers_taken_out_merged_are_the_ones_that_were_there() -> None:
    model = nn.ModuleDict(
        {
            "table": nn.Embedding(7, 4, padding_idx=2, scale_grad_by_freq=True),
            "conv": nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2, padding_mode="reflect"),
            "down": nn.Linear(6, 5, bias=False),
        }
    ).to(torch.bfloat16)
    layers, before = dict(model.items()), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    described = repr(model)
    injection = stirred(inject(model, rank=2, targets=tuple(layers)))
    assert all(isinstance(layer, LoRALayer) for layer in model.values())
    plain = injection.take_out(merged=True)
    assert plain is model
    assert dict(model.items()) == layers
    assert repr(model) == described
    after = model.state_dict()
    assert list(after) == list(before)
    assert {key for key in after if not torch.equal(after[key], before[key])} == {f"{name}.weight" for name in layers}
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    """Everything before the first adapter is frozen, which reentrant checkpointing would take for no need to learn."""
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    model, tokens = LlamaForCausalLM(config), torch.arange(12).view(2, 6)
    injection = stirred(inject(model, rank=2, targets=["attention"]))
    calls: list[str] = []
    next(iter(injection.layers.values())).register_forward_hook(lambda *_: calls.append("forward"))

    def gradients() -> list[Tensor]:
        model.train().zero_grad()
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        return [parameter.grad.clone() for parameter in injection.parameters() if parameter.grad is not None]

    plain = gradients()
    assert (len(plain), len(calls)) == (2 * len(injection.layers), 1)
    model.gradient_checkpointing_enable()
    found = gradients()
    assert len(calls) == 3  # once more for the gradients
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other)
