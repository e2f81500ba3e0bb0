"""Merging LoRA layers in memory: the bytes, the way back bit for bit, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from layer_world import CASES, RANK, base_of, call, dressed, inputs_of, is_close, learn, parts_of
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_cli
from lora_cli.errors import NumericError, UsageError, WrongInputError
from lora_cli.nn.layer import LoRALayer
from lora_cli.nn.parameters import LoRAParameters
from lora_cli.nn.wrap import wrap

DTYPES = {torch.float32: 2e-6, torch.bfloat16: 0.03, torch.float16: 0.004}
"""How far apart a layer and its merged one may be."""


def weights_of(layer: LoRALayer) -> list[Tensor]:
    return [part.base_weight.detach().clone() for part in parts_of(layer)]


def same_bits(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(
        torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))
        for x, y in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
@pytest.mark.parametrize("kind", CASES)
def test_a_merge_is_undone_bit_for_bit_whatever_is_trained_meanwhile(kind: str, dora: bool, dtype: torch.dtype) -> None:
    layer = dressed(CASES[kind], dtype, dora=dora, dtype=torch.float32).eval()
    before, parameters = weights_of(layer), [part.base_weight for part in parts_of(layer)]
    layer.merge()
    assert layer.merged
    assert not any(torch.equal(x, y) for x, y in zip(weights_of(layer), before, strict=True))
    assert [part.base_weight for part in parts_of(layer)] == parameters  # in place: who shares a weight sees it
    learn(layer, seed=4)
    layer.unmerge()
    assert not layer.merged
    assert same_bits(weights_of(layer), before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
@pytest.mark.parametrize("kind", CASES)
def test_a_merged_layer_gives_what_it_gave(kind: str, dora: bool, dtype: torch.dtype) -> None:
    layer = dressed(CASES[kind], dtype, dora=dora, dtype=torch.float32).eval()
    inputs = inputs_of(CASES[kind], dtype)
    plain, before = call(layer.base, inputs) if kind != "attention" else None, call(layer, inputs)
    layer.merge()
    merged = call(layer, inputs)
    assert is_close(merged, before, DTYPES[dtype])
    assert plain is None or not is_close(before, plain, DTYPES[dtype])
    with layer.disabled():
        assert torch.equal(call(layer, inputs), merged)


@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
@pytest.mark.parametrize("kind", CASES)
def test_the_merged_weight_is_the_formula_rounded_once(kind: str, dora: bool) -> None:
    layer = dressed(CASES[kind], torch.bfloat16, dora=dora, dtype=torch.float32)
    wide = dressed(CASES[kind], torch.float64, dora=dora, dtype=torch.float32)
    for part, wider in zip(parts_of(layer), parts_of(wide), strict=True):
        wider.base_weight.data.copy_(part.base_weight)
        wider.load_state_dict({k: v for k, v in part.state_dict().items() if "lora_" in k}, strict=False)
        wider.double()
    exact = [part.weight.detach() for part in parts_of(wide)]
    layer.merge()
    for part, expected in zip(parts_of(layer), exact, strict=True):
        half_spacing = expected.abs() * 2.0**-8
        assert bool(((part.base_weight.double() - expected).abs() <= half_spacing * 1.001 + 1e-7).all())


@pytest.mark.parametrize("kind", CASES)
def test_several_adapters_are_merged_in_one_sum(kind: str) -> None:
    layer = dressed(CASES[kind], torch.bfloat16, dtype=torch.float32)
    layer.add_adapter("other", LoRAParameters(rank=2, dtype=torch.float32))
    learn(layer, seed=1)
    layer.activate({"default": 0.5, "other": -2.0})
    before, expected = weights_of(layer), [part.weight.detach() for part in parts_of(layer)]
    layer.merge()
    merged = weights_of(layer)
    assert all(is_close(found, weight, 0.02) for found, weight in zip(merged, expected, strict=True))
    layer.unmerge()
    layer.activate({"other": -2.0, "default": 0.5})
    assert same_bits(weights_of(layer), before)
    layer.merge()
    assert same_bits(weights_of(layer), merged)


@pytest.mark.parametrize("kind", CASES)
def test_a_weight_that_was_changed_since_is_not_unmerged(kind: str) -> None:
    layer = dressed(CASES[kind])
    layer.merge()
    last = parts_of(layer)[-1].base_weight
    last.data.view(-1)[-1] += 1
    changed = weights_of(layer)
    with pytest.raises(WrongInputError, match="was changed since the merge"):
        layer.unmerge()
    assert layer.merged
    assert same_bits(weights_of(layer), changed)


@pytest.mark.parametrize("kind", CASES)
def test_a_merge_that_is_refused_changes_nothing(kind: str) -> None:
    layer = dressed(CASES[kind])
    parts_of(layer)[-1].lora_B.weight.data.view(-1)[-1] = torch.nan
    before = weights_of(layer)
    with pytest.raises(NumericError):
        layer.merge()
    assert same_bits(weights_of(layer), before)
    assert not any(part.merged for part in parts_of(layer))


@pytest.mark.parametrize("kind", CASES)
def test_a_merged_layer_keeps_its_adapters(kind: str) -> None:
    layer = dressed(CASES[kind])
    with pytest.raises(UsageError, match="not merged"):
        layer.unmerge()
    layer.merge()
    for action in (
        layer.merge,
        lambda: layer.add_adapter("other", LoRAParameters()),
        lambda: layer.remove_adapter("default"),
        lambda: layer.activate({}),
        layer.reset_parameters,
    ):
        with pytest.raises(UsageError, match="A merged layer cannot"):
            action()
    layer.unmerge()
    layer.activate({})
    with pytest.raises(UsageError, match="nothing to merge"):
        layer.merge()


WRAPPED = [kind for kind in CASES if kind != "attention"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", WRAPPED)
def test_a_merge_writes_the_bytes_that_a_merge_of_files_writes(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    layer = dressed(CASES[kind], dtype, dtype=torch.float32)
    name = "model.embed_tokens" if kind == "embedding" else "X"
    stored, merged = tmp_path / "wrapped.safetensors", tmp_path / "merged.safetensors"
    save_file({f"{name}.{key}": tensor for key, tensor in layer.state_dict().items()}, stored)
    lora_cli.merge(stored, [], merged, lora_cli.PlanOptions(read=lora_cli.ReadOptions(alpha=4.0)))
    layer.merge()
    found = load_file(merged)
    assert set(found) == {f"{name}.{key}" for key in layer.base.state_dict()}
    assert same_bits([found[f"{name}.weight"]], [layer.base_weight.detach()])


def test_a_large_stack_is_merged_group_by_group() -> None:
    layer = dressed(CASES["grouped"], torch.bfloat16)
    parts = []
    for group in range(3):
        alone = wrap(nn.Linear(6, 5, bias=False, dtype=torch.bfloat16), rank=RANK, alpha=4.0)
        alone.base_weight.data.copy_(layer.base_weight[group].T)
        alone.lora_A.weight.data.copy_(layer.lora_A.weight[group].T)
        alone.lora_B.weight.data.copy_(layer.lora_B.weight[group].T)
        alone.merge()
        parts.append(alone.base_weight.detach().T)
    layer.merge()
    assert torch.equal(layer.base_weight, torch.stack(parts))


@pytest.mark.parametrize("kind", CASES)
def test_a_merged_layer_gives_its_own_layer_back(kind: str) -> None:
    layer, inputs = dressed(CASES[kind]).eval(), inputs_of(CASES[kind])
    plain, expected = layer.base, call(layer, inputs)
    layer.merge()
    assert layer.released() is plain
    assert not any(isinstance(module, LoRALayer) for module in plain.modules())
    assert is_close(call(plain, inputs), expected, DTYPES[torch.float32])


def test_attention_gives_its_own_output_projection_back() -> None:
    plain = base_of(CASES["attention"])
    inner = plain.out_proj
    layer = wrap(plain, rank=2)
    assert plain.out_proj is not inner
    assert layer.released() is plain
    assert plain.out_proj is inner
