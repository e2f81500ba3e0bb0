"""PEFT folders that cannot be merged: each refused with its class of error, and words that say what is wrong."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import quiet
from peft_files import FILE, PREFIX, Saved, llama, net, saved
from torch import Tensor

from lora_cli.adapters.formats import open_adapter
from lora_cli.errors import LoraCliError, MalformedFileError, NamesError, ShapeError, UnsafeInputError, UnsupportedError

Tensors = dict[str, Tensor]
Break = Callable[[Tensors], object]
BLOCKS = {"target_modules_bd_a": ["down"], "target_modules_bd_b": ["up_proj"], "nblocks": 2}
IN_BLOCKS: dict[str, Any] = {"target_modules": ["up_proj", "down_proj"], "use_bdlora": BLOCKS}
ATTENTION: dict[str, Any] = {"target_modules": ["attn"]}
OUTPUT = f"{PREFIX}attn.base_layer.out_proj"


def refused(made: Saved, error: type[LoraCliError], words: str) -> LoraCliError:
    with pytest.raises(error, match=words) as caught:
        _ = made.adapter
    assert type(caught.value) is error
    return caught.value


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def move(key: str, other: str) -> Break:
    return lambda tensors: tensors.update({other: tensors.pop(key)})


def cut(key: str, *shape: int) -> Break:
    return lambda tensors: tensors.update({key: zeros(*shape)})


# Variants that no merged weight can be

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "activated": ({"alora_invocation_tokens": [3, 4], "task_type": "CAUSAL_LM"}, "acts on some tokens only"),
    "qalora": ({"use_qalora": True}, "pools its inputs"),
    "kasa": ({"kasa_config": {}}, "took singular values off the base"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_variants_that_cannot_be_merged(tmp_path: Path, name: str) -> None:
    config, words = REFUSED[name]
    made = saved(tmp_path, llama(), target_modules=["q_proj"], **config)
    error = refused(made, UnsupportedError, "asks for what lora-cli does not do")
    (line,) = error.details
    assert words in line
    assert line.startswith(f"{next(iter(config))} = ")


def test_a_router_of_adapters(tmp_path: Path) -> None:
    expert = saved(tmp_path / "expert", llama(), target_modules=["q_proj"]).folder
    with quiet():
        from peft import create_arrow_model
        from peft.tuners.lora.config import ArrowConfig

        create_arrow_model(llama(), [str(expert)] * 2, ArrowConfig(top_k=1)).save_pretrained(tmp_path / "router")
    with pytest.raises(UnsupportedError) as caught:
        open_adapter(tmp_path / "router" / "arrow_router")
    assert "merge one of these adapters" in caught.value.details[0]
    assert len(open_adapter(tmp_path / "router" / "task_0").targets) == 1


def test_a_diagonal_is_refused_whatever_the_config_says(tmp_path: Path) -> None:
    made = saved(tmp_path, llama(), target_modules=["q_proj"], kasa_config={})
    made.write(kasa_config=None)
    assert refused(made, UnsupportedError, "KaSA").tensor == f"{PREFIX}model.layers.0.self_attn.q_proj.lora_diag"


def test_a_base_that_was_quantised_for_its_adapter(tmp_path: Path) -> None:
    made = saved(tmp_path, net(), target_modules=["up_proj"])
    made.write(init_lora_weights="loftq", loftq_config={"loftq_bits": 4, "loftq_iter": 1})
    (line,) = refused(made, UnsupportedError, "asks for what").details
    assert "merge into the base as LoftQ left it" in line


# Blocks

BROKEN_BLOCKS: dict[str, tuple[Break, dict[str, Any], type[LoraCliError], str]] = {
    "B is whole": (cut(f"{PREFIX}up_proj.lora_B.weight", 12, 4), {}, ShapeError, "B has 2 blocks, says use_bdlora"),
    "A is whole in the config": (lambda t: None, {"use_bdlora": BLOCKS | {"target_modules_bd_b": [], "match_strict":
                                                   False}}, ShapeError, "A is [4, 8], B is [12, 2]"),
    "more blocks than rank": (lambda t: None, {"use_bdlora": BLOCKS | {"nblocks": 3}}, ShapeError, "has 3 blocks"),
    "in both": (lambda t: None, {"use_bdlora": BLOCKS | {"target_modules_bd_a": ["down", "up"]}}, MalformedFileError,
                "up_proj is in both lists"),
    "in none": (lambda t: None, {"use_bdlora": BLOCKS | {"target_modules_bd_a": []}}, MalformedFileError,
                "down_proj is in no list"),
    "rank": (lambda t: None, {"r": 8}, ShapeError, "the factors have rank 4, r says 8"),
    "a vector": (cut(f"{PREFIX}up_proj.lora_B.weight", 24), {}, ShapeError, "B is [24]"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN_BLOCKS)
def test_blocks_that_do_not_fit(tmp_path: Path, name: str) -> None:
    broken, config, error, words = BROKEN_BLOCKS[name]
    made = saved(tmp_path, net(), **IN_BLOCKS)
    tensors = made.tensors()
    broken(tensors)
    made.write(tensors, **config)
    found = refused(made, error, "agree" if error is ShapeError else "block-diagonal")
    assert any(words in line for line in found.details)


# Attention

BROKEN_ATTENTION: dict[str, tuple[Break, str]] = {
    "no input": (
        lambda t: [t.pop(f"{PREFIX}attn.lora_{side}.weight") for side in "AB"], "its input projection has none"
    ),
    "half an input": (lambda t: t.pop(f"{PREFIX}attn.lora_A.weight"), "no partner"),
    "half an output": (lambda t: t.pop(f"{OUTPUT}.lora_A.weight"), "no partner"),
    "two outputs": (
        lambda t: t.update({f"{PREFIX}attn.out_proj.lora_{side}.weight": t[f"{OUTPUT}.lora_{side}.weight"]
                            for side in "AB"}), "two pairs of factors"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN_ATTENTION)
def test_attention_with_other_factors_than_two_pairs(tmp_path: Path, name: str) -> None:
    broken, words = BROKEN_ATTENTION[name]
    made = saved(tmp_path, net(), **ATTENTION)
    tensors = made.tensors()
    broken(tensors)
    made.write(tensors)
    found = refused(made, NamesError, words)
    assert any("attn" in line for line in found.details)


def test_other_factors_inside_a_layer_are_refused(tmp_path: Path) -> None:
    made = saved(tmp_path, net(), target_modules=["up_proj"])
    tensors = made.tensors()
    for side in "AB":
        move(f"{PREFIX}up_proj.lora_{side}.weight", f"{PREFIX}up_proj.base_layer.lora_{side}.weight")(tensors)
    made.write(tensors)
    refused(made, UnsupportedError, "Nested LoRA")


# Lengths

LENGTHS = {"up_proj": [(11,), (3, 4), ()], "emb": [(10,), (2, 3)], "conv2": [(6, 4), (1, 2, 3, 1), (5,)]}


@pytest.mark.parametrize(("module", "shape"), [(m, shape) for m, shapes in LENGTHS.items() for shape in shapes])
def test_lengths_that_are_not_one_for_each_output(tmp_path: Path, module: str, shape: tuple[int, ...]) -> None:
    made = saved(tmp_path, net(), target_modules=[module], use_dora=True)
    key = f"{PREFIX}{module}.lora_magnitude_vector"
    made.write(made.tensors() | {key: zeros(*shape)})
    assert refused(made, ShapeError, "one magnitude for each output").details[0].startswith(f"{module}: ")
    made.write({name: tensor for name, tensor in made.tensors().items() if name != key})
    assert refused(made, UnsupportedError, "lacks magnitudes").details == (module,)


def test_lengths_that_the_config_does_not_ask_for(tmp_path: Path) -> None:
    """PEFT would leave them out, which gives another model than the one that was trained with them."""
    made = saved(tmp_path, net(), target_modules=["up_proj"], use_dora=True)
    made.write(use_dora=False)
    assert refused(made, UnsupportedError, "does not say use_dora").details == ("up_proj",)


def test_lengths_of_one_output_have_a_dimension(tmp_path: Path) -> None:
    """PEFT stores one, and does not load another shape."""
    made = saved(tmp_path, net(), target_modules=["up_proj"], use_dora=True)
    factor, length = f"{PREFIX}up_proj.lora_B.weight", f"{PREFIX}up_proj.lora_magnitude_vector"
    made.write(made.tensors() | {factor: zeros(1, 4), length: zeros(1)})
    assert made.adapter.kind == "DoRA"
    made.write(made.tensors() | {factor: zeros(1, 4), length: zeros()})
    assert refused(made, ShapeError, "one magnitude for each output").details == ("up_proj: [] for 1 outputs",)


# Biases


@pytest.mark.parametrize("shape", [(), (12, 2), (12, 1), (1, 12), (0,), (11,)])
def test_a_bias_that_is_not_one_number_for_each_output(tmp_path: Path, shape: tuple[int, ...]) -> None:
    made = saved(tmp_path, net(), target_modules=["up_proj"], lora_bias=True)
    made.write(made.tensors() | {f"{PREFIX}up_proj.lora_B.bias": zeros(*shape)})
    found = refused(made, ShapeError, "one number for each output").details
    assert found == (f"{PREFIX}up_proj.lora_B.bias: {list(shape)} for 12 outputs",)


# Files


def test_what_belongs_to_no_factors_is_not_lost(tmp_path: Path) -> None:
    made = saved(tmp_path, net(), target_modules=["up_proj"], lora_bias=True)
    extra = {f"{PREFIX}down_proj.lora_B.bias": zeros(8), f"{PREFIX}up_proj.lora_A.bias": zeros(4)}
    extra |= {f"{PREFIX}emb.lora_magnitude_vector": zeros(6), f"{PREFIX}up_proj.lora_B.default.bias": zeros(12)}
    made.write(made.tensors() | extra)
    adapter = made.adapter
    assert {tensor.key for tensor in adapter.unread} == set(extra)
    assert adapter.stored == len(adapter.tensors) + len(extra)


def test_several_adapters_in_one_file(tmp_path: Path) -> None:
    made = saved(tmp_path, net(), target_modules=["up_proj", "emb"])
    for key in (f"{PREFIX}up_proj.lora_A", f"{PREFIX}emb.lora_embedding_A"):
        tensors = made.tensors()
        found = next(name for name in tensors if name.startswith(key))
        move(found, found.replace(key, f"{key}.style"))(tensors)
        made.write(tensors)
        assert refused(made, UnsupportedError, "several adapters").found == "default, style"


def test_a_named_adapter_is_in_a_folder_of_its_own(tmp_path: Path) -> None:
    made = saved(tmp_path / "a", net(), target_modules=["up_proj"])
    (tmp_path / "named").mkdir()
    shutil.copytree(made.folder, tmp_path / "named" / "style")
    assert len(open_adapter(tmp_path / "named" / "style").targets) == 1
    with pytest.raises(LoraCliError, match="several adapters") as caught:
        open_adapter(tmp_path / "named")
    assert caught.value.found == "style"


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    made = saved(tmp_path, net(), target_modules=["up_proj"], save={"safe_serialization": False})
    assert not (made.folder / FILE).exists()
    refused(made, UnsafeInputError, "pickled")
