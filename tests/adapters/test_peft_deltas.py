"""What PEFT's files are read as, held against the live layers that PEFT saved them from, in float64."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from models import quiet
from peft_files import PREFIX, Saved, llama, net, saved
from torch import Tensor, nn
from torch.nn import functional

from lora_cli.adapters.adapter import Target
from lora_cli.adapters.deltas import LowRankBlocks

KERNELS = ["conv1", "conv2", "conv3"]
BLOCKS = {"target_modules_bd_a": ["down"], "target_modules_bd_b": ["up_proj"], "nblocks": 2}


def close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-12, atol=1e-12)


def blocks(**changes: Any) -> Any:
    from peft.tuners.lora.config import BdLoraConfig

    return BdLoraConfig(**(BLOCKS | changes))


def single(model: nn.Module, name: str) -> nn.Module:
    """In float32, where PEFT's init takes no float64."""
    return model.float() if name == "mica" else model


def live_delta(layer: Any) -> Tensor:
    """What PEFT itself would add to the weight."""
    variant: Any = layer.lora_variant.get("default")
    in_blocks = type(variant).__name__ == "BdLoraLinearVariant"
    found = variant._get_bdlora_delta_weight(layer, "default") if in_blocks else layer.get_delta_weight("default")
    assert isinstance(found, Tensor)
    return found


def is_live(made: Saved, targets: tuple[Target, ...]) -> bool:
    with torch.no_grad():
        return all(close(made.delta(target), live_delta(made.module(target.module))) for target in targets)


CASES: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": ["up_proj", "down_proj"]},
    "rslora": {"target_modules": ["up_proj", "down_proj"], "use_rslora": True, "rank_pattern": {"up_proj": 2}},
    "patterns": {"target_modules": ["up_proj", *KERNELS], "rank_pattern": {"conv2": 2}, "alpha_pattern": {"conv": 3}},
    "kernels": {"target_modules": KERNELS},
    "embedding": {"target_modules": ["emb"]},
    "mica": {"target_modules": ["emb", "up_proj"], "init_lora_weights": "mica"},
    "blocks": {"target_modules": ["up_proj", "down_proj"], "use_bdlora": blocks},
    "three blocks": {"target_modules": ["up_proj"], "use_bdlora": lambda: blocks(nblocks=3), "r": 6},
    "blocks of other ranks": {
        "target_modules": ["up_proj", "down_proj"], "use_bdlora": blocks, "rank_pattern": {"down_proj": 2}
    },
    "some blocks": {
        "target_modules": ["up_proj", "linear1", "linear2"], "use_bdlora": lambda: blocks(match_strict=False)
    },
    "one block": {"target_modules": ["up_proj", "down_proj"], "use_bdlora": lambda: blocks(nblocks=1)},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_change_is_that_of_the_live_layer(tmp_path: Path, name: str) -> None:
    config = {field: value() if callable(value) else value for field, value in CASES[name].items()}
    made = saved(tmp_path, single(net(), name), **config)
    adapter = made.adapter
    layers = {name.removeprefix(PREFIX) for name, layer in made.model.named_modules() if hasattr(layer, "lora_A")}
    assert {target.module for target in adapter.targets} == layers != set()
    assert adapter.stored == 2 * len(adapter.targets) + len(adapter.skipped)
    assert (adapter.unread, adapter.replacements, adapter.initial) == ((), (), None)
    assert is_live(made, adapter.targets)


def test_a_matrix_that_is_stored_the_other_way_round(tmp_path: Path) -> None:
    with quiet():
        from transformers import GPT2Config, GPT2LMHeadModel

        model = GPT2LMHeadModel(GPT2Config(vocab_size=10, n_positions=8, n_embd=8, n_layer=1, n_head=2)).double()
    made = saved(tmp_path, model, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    with torch.no_grad():
        for target in made.adapter.targets:
            assert close(made.delta(target).T, live_delta(made.module(target.module)))
    assert made.adapter.transposed_hint


def test_which_factor_has_blocks(tmp_path: Path) -> None:
    made = saved(tmp_path, net(), target_modules=["up_proj", "down_proj"], use_bdlora=blocks())
    deltas = {target.module: target.delta for target in made.adapter.targets}
    kinds = {module: (d.kind, d.shape, d.rank, d.stack, d.magnitude) for module, d in deltas.items()}
    assert kinds == {
        "up_proj": ("lora-blocks-b", (12, 8), 4, None, None),
        "down_proj": ("lora-blocks-a", (8, 12), 4, None, None),
    }
    assert all(isinstance(delta, LowRankBlocks) and delta.blocks == 2 for delta in deltas.values())
    assert deltas["up_proj"].stored == {False: (12, 8), True: (8, 12)}
    assert {tensor.shape for tensor in deltas["up_proj"].tensors} == {(4, 8), (12, 2)}


# Variants and inits of a linear layer: the base as it was, and the change

VARIANTS: dict[str, dict[str, Any]] = {
    **{init: {"init_lora_weights": init} for init in ("gaussian", "orthogonal", "eva", "mica")},
    "random": {"init_lora_weights": False},
    "velora": {"velora_config": {"num_groups": 4}},
    "monteclora": {"monteclora_config": {"num_samples": 3}},
    "blocks": {"use_bdlora": BLOCKS},
    "dropout": {"lora_dropout": 0.5},
}
SKIPPED = {"velora": {"activations were kept"}, "monteclora": {"factors were varied"}}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_base_and_the_change_do_what_the_live_layer_does(tmp_path: Path, name: str) -> None:
    made = saved(tmp_path, single(net(), name), target_modules=["up_proj"], **VARIANTS[name])
    adapter = made.adapter
    (target,) = adapter.targets
    x = torch.randn(5, 8, dtype=torch.float64)
    with torch.no_grad():
        weight = made.before["up_proj.weight"] + made.delta(target)
        assert close(functional.linear(x, weight, made.before["up_proj.bias"]), made.module("up_proj")(x))
    assert adapter.initial is None
    assert len(adapter.skipped) == adapter.stored - 2
    assert all(any(words in reason for words in SKIPPED[name]) for _, reason in adapter.skipped)
    assert bool(adapter.skipped) == (name in SKIPPED)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_what_an_init_took_off_the_base(tmp_path: Path, init: str) -> None:
    """The files hold no more than the trained factors; PEFT can convert them where it has those of the beginning."""

    def keep(model: Any) -> None:
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(tmp_path / "initial")
        model.peft_config["default"].init_lora_weights = init

    made = saved(tmp_path / "trained", net().float(), target_modules=["up_proj"], init_lora_weights=init, change=keep)
    first = Saved(tmp_path / "initial", made.model, made.before)
    assert (made.adapter.initial, first.adapter.initial) == (init, None)
    x = torch.randn(5, 8, dtype=torch.float64)
    with torch.no_grad():
        live = made.module("up_proj")(x) - made.before["up_proj.bias"]
        change = made.delta(made.adapter.targets[0])
        taken = first.delta(first.adapter.targets[0])
        assert not torch.allclose(x @ (made.before["up_proj.weight"] + change).T, live, rtol=1e-2, atol=1e-2)
        # PEFT takes it off in float32.
        assert torch.allclose(x @ (made.before["up_proj.weight"] + change - taken).T, live, rtol=1e-4, atol=1e-4)
        with quiet():
            where = str(tmp_path / "initial")
            made.model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=where)
        converted = Saved(tmp_path / "converted", made.model, made.before)
        (target,) = converted.adapter.targets
        assert (converted.adapter.initial, target.delta.rank) == (None, 8)
        assert close(converted.delta(target), change - taken)


# DoRA


@pytest.mark.parametrize("module", ["up_proj", "emb", *KERNELS, "c_attn"])
def test_lengths_of_every_kind(tmp_path: Path, module: str) -> None:
    """W' = m · (W + ΔW) / ‖W + ΔW‖, with a length for each output (Liu et al. 2024, equation 5)."""
    model, prefix = net(), ""
    if module == "c_attn":
        with quiet():
            from transformers import GPT2Config, GPT2LMHeadModel

            config = GPT2Config(vocab_size=10, n_positions=8, n_embd=8, n_layer=1, n_head=2)
            model, prefix = GPT2LMHeadModel(config).double(), "transformer.h.0.attn."
    made = saved(tmp_path, model, target_modules=[module], use_dora=True, fan_in_fan_out=module == "c_attn")
    adapter = made.adapter
    (target,) = adapter.targets
    assert adapter.kind == "DoRA"
    assert target.delta.magnitude is not None
    before = made.before[f"{prefix}{module}.weight"]
    by_rows = before.T if module in ("c_attn", "emb") else before.flatten(1)
    change = made.delta(target)
    whole = by_rows + (change.T if module == "emb" else change.flatten(1))
    length = made.tensors()[target.delta.magnitude.key].reshape(-1, 1)
    expected = length * whole / whole.norm(dim=1, keepdim=True)
    with torch.no_grad(), quiet():
        layer = made.module(target.module)
        layer.merge()
        found = layer.base_layer.weight
        found = found.T if module in ("c_attn", "emb") else found.flatten(1)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(found, by_rows, rtol=1e-2, atol=1e-2)


# Attention

ATTENTION: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"attn": 2, "out_proj": 3}, "alpha_pattern": {"attn": 5, "out_proj": 7}},
    "lora_bias": {"lora_bias": True},
    "bias": {"bias": "lora_only"},
}


@pytest.mark.parametrize("module", ["attn", "encoder.self_attn"])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_is_what_peft_computes(tmp_path: Path, name: str, module: str) -> None:
    """PEFT adds the change of the output projection twice (huggingface/peft#3774): adapters were trained that way."""
    made = saved(tmp_path, net(), target_modules=[module], **ATTENTION[name])
    adapter = made.adapter
    changes = {target.name: made.delta(target) for target in adapter.targets}
    expected = {f"{module}.in_proj_weight", f"{module}.out_proj.weight"}
    expected |= {f"{module}.out_proj.bias"} if name == "lora_bias" else set()
    assert set(changes) == expected
    attention = nn.MultiheadAttention(8, 2, batch_first=True).double().eval()
    state = {key: made.before[f"{module}.{key}"] + changes.get(f"{module}.{key}", 0) for key in attention.state_dict()}
    wholes = {whole.name: made.tensors()[whole.tensor.key] for whole in adapter.replacements}
    attention.load_state_dict(state | {key.removeprefix(f"{module}."): whole for key, whole in wholes.items()})
    assert set(wholes) == ({f"{module}.out_proj.bias"} if name == "bias" else set())
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(attention(x, x, x)[0], made.module(module)(x, x, x)[0], rtol=1e-10, atol=1e-10)
    skipped = [(tensor.key.rpartition(".")[2], reason) for tensor, reason in adapter.skipped]
    assert skipped == ([("bias", "PEFT never adds the bias of an attention's input factors")] * (name == "lora_bias"))
    (warning,) = adapter.warnings
    assert "twice the scale" in warning
    assert f"{module}.out_proj" in warning


@pytest.mark.parametrize(
    ("version", "times"),
    [("0.21.9", 2), ("0.9.0", 2), ("0.18.2.dev0@abc", 2), (None, 2), ("unknown", 2), ("0.22.0", 1), ("1.0", 1)],
)
def test_versions_that_add_attention_twice(tmp_path: Path, version: str | None, times: int) -> None:
    """Nothing is known of versions beyond ours; the formula is taken then, and said."""
    made = saved(tmp_path, net(), target_modules=["attn"])
    made.write(peft_version=version)
    adapter = made.adapter
    scales = {target.parameter: target.delta.scale for target in adapter.targets}
    assert (scales["in_proj_weight"].times(), scales["weight"].times()) == (1.5, 1.5 * times)
    (warning,) = adapter.warnings
    assert ("twice the scale is taken" if times == 2 else "once is taken") in warning
    assert (scales["weight"].source == "2 × lora_alpha / r, as PEFT adds it twice") == (times == 2)
    assert str(version or "before 0.18") in warning
    assert re.search(r"peft#3774", warning)


def test_the_strength_that_the_user_says_is_doubled_as_well(tmp_path: Path) -> None:
    from lora_cli.adapters.formats import open_adapter
    from lora_cli.adapters.source import ReadOptions

    made = saved(tmp_path, net(), target_modules=["attn"])
    scales = [t.delta.scale.times() for t in open_adapter(made.folder, ReadOptions(scale=0.25)).targets]
    assert sorted(scales) == [0.25, 0.5]


# Layers that are repeated


def test_layers_that_the_trained_model_repeats(tmp_path: Path) -> None:
    made = saved(tmp_path, llama(layers=3), target_modules=["q_proj"], layer_replication=[(0, 2), (1, 3)])
    adapter = made.adapter
    assert adapter.layers == (0, 1, 1, 2)
    assert [target.module for target in adapter.targets] == [f"model.layers.{n}.self_attn.q_proj" for n in range(4)]
    live = made.model.base_model.model.model.layers
    for number, stored in enumerate(adapter.layers):
        weight = live[number].mlp.up_proj.weight
        assert torch.equal(weight, made.before[f"model.layers.{stored}.mlp.up_proj.weight"])
    assert is_live(made, adapter.targets)
    made.write(layer_replication=None)
    assert made.adapter.layers is None
