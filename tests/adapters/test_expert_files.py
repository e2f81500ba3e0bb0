"""Adapters of stacked experts, read: names and nestings, packings, and ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from expert_world import BOTH, EXPERTS, IN, OUT, RANK, M, on, pair, product, products, random, read, written
from models import quiet
from safetensors.torch import load_file, save_file
from torch import nn

from lora_cli.adapters.adapter import Parameter
from lora_cli.adapters.expert_deltas import LowRankExperts, OpenExperts
from lora_cli.adapters.expert_layout import ExpertLayout
from lora_cli.adapters.formats import open_adapter
from lora_cli.adapters.source import ReadOptions
from lora_cli.errors import LoraCliError, MalformedFileError, NamesError, ShapeError, UnsupportedError, UsageError
from lora_cli.surgery.readers import open_readers

# What PEFT makes


class Experts(nn.Module):
    """Parameters in the order of gpt-oss."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        up, down = ((4, 10), (5, 4)) if transposed else ((10, 4), (4, 5))
        self.gate_up_proj = nn.Parameter(random(EXPERTS, *up))
        self.gate_up_proj_bias = nn.Parameter(random(EXPERTS, 10))
        self.down_proj = nn.Parameter(random(EXPERTS, *down))
        self.down_proj_bias = nn.Parameter(random(EXPERTS, 4))
        self.is_transposed = transposed


class Layer(nn.Module):
    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.experts = Experts(transposed)
        self.gate = nn.Linear(4, EXPERTS, bias=False)
        self.q_proj = nn.Linear(4, 6)
        self.emb = nn.Embedding(9, 4)


class Model(nn.Module):
    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.mlp = Layer(transposed).double()


EVERY: Final = [f"experts.{name}{bias}" for bias in ("_bias", "") for name in ("down_proj", "gate_up_proj")]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "parameters",
    [EVERY, BOTH, ["down_proj"], ["gate_up_proj"], EVERY[:3], ["gate.weight", "emb.weight"], ["gate.weight", *BOTH]],
    ids=len,
)
def test_all_that_peft_adds(tmp_path: Path, parameters: list[str], transposed: bool) -> None:
    with quiet():
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=RANK, lora_alpha=6, target_modules=["q_proj"], target_parameters=parameters,
            rank_pattern={r"mlp\.experts\.down_proj": 2}, use_rslora=True,
        )  # fmt: skip
        model = get_peft_model(Model(transposed), config, autocast_adapter_dtype=False)
        for seed, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_" in name:
                parameter.data = random(*parameter.shape, seed=seed)
        model.save_pretrained(tmp_path)
    expected = {}
    for name, module in model.named_modules():
        if type(module).__name__ == "ParamWrapper":
            outer = name.removeprefix("base_model.model.").replace(".base_layer", "")
            expected[f"{outer}.{module.parameter_name}"] = (
                module.get_delta_weight("default"),
                module.get_param().shape,
            )
    targets = {target.name: target for target in open_adapter(tmp_path).targets}
    assert targets.keys() == {*expected, "mlp.q_proj.weight"}
    assert len(expected) == len(parameters)
    for name, (delta, shape) in expected.items():
        settled = on(targets[name], *shape)
        assert [*settled.stored.values()] == [tuple(shape)]
        found = products(settled) if len(shape) == 3 else product(settled)
        torch.testing.assert_close(found, delta.detach(), rtol=1e-12, atol=1e-12)
        assert settled.rank == (2 if name.endswith("experts.down_proj") else RANK)


# Packings

A, B = random(EXPERTS, RANK, IN, seed=1), random(EXPERTS, OUT, RANK, seed=2)
PACKINGS: Final = {
    "packed": (A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)),
    "packed-by-expert": (A.flatten(0, 1), B.permute(1, 0, 2).flatten(1)),
    "stacked": (A, B),
    "stacked-last": (A, B.permute(1, 2, 0)),
    "stacked-turned": (A.mT, B.mT),
}


def packed(packing: str, parameter: str = "gate_up_proj") -> dict[str, torch.Tensor]:
    a, b = PACKINGS[packing]
    if packing == "stacked-turned":
        return {f"{M}.lora_gate_a": a, f"{M}.lora_gate_b": b}
    name = M if packing.startswith("packed") or packing == "stacked-last" else f"{M}.{parameter}"
    return {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}


@pytest.mark.parametrize("transposed", [False, True], ids=["as it is", "turned"])
@pytest.mark.parametrize("side", ["columns", "rows"])
@pytest.mark.parametrize("packing", PACKINGS)
def test_packings(tmp_path: Path, packing: str, side: str, transposed: bool) -> None:
    config = {"lora_B_layout": "grouped_by_expert"} if packing == "packed-by-expert" else {}
    (target,) = read(tmp_path, packed(packing), target_parameters=["experts.gate_up_proj"], **config).targets
    assert target.name == f"{M}.{'w1' if packing == 'stacked-turned' else 'gate_up_proj'}"
    assert (target.delta.stack, target.delta.rank, target.delta.shape) == (EXPERTS, RANK, (OUT, IN))
    assert target.delta.stored == {}
    matrix = (OUT, IN) if side == "columns" else (IN, OUT)
    delta = on(target, EXPERTS, *matrix, transposed=transposed)
    assert (delta.packing, delta.side, delta.shape, delta.stack) == (packing, side, matrix, EXPERTS)
    assert delta.stored == {transposed: (EXPERTS, *(matrix[::-1] if transposed else matrix))}
    expected = 2.0 * (B @ A)
    torch.testing.assert_close(products(delta), expected if side == "columns" else expected.mT)


@pytest.mark.parametrize("packing", ["packed", "packed-by-expert", "stacked-last"])
@pytest.mark.parametrize("side", ["columns", "rows"])
def test_b_may_be_put_in_order(tmp_path: Path, packing: str, side: str) -> None:
    layout = {"lora_B_layout": "grouped_by_expert"} if packing == "packed-by-expert" else {}
    (target,) = read(tmp_path, packed(packing), target_parameters=["experts.gate_up_proj"], **layout).targets
    delta = on(target, EXPERTS, *((OUT, IN) if side == "columns" else (IN, OUT)))
    strided = delta.strided
    assert strided.shape == (EXPERTS, OUT, RANK)
    assert strided.tensor.shape == (OUT, RANK * EXPERTS)
    assert strided.fastest is (packing != "packed-by-expert")
    copies = written(tmp_path / "copy", {**pair("c", (RANK, 1), (1, RANK)), "b": B})
    copy = {t.key: t for t in open_adapter(copies).tensors}["base_model.model.b"]
    ordered = delta.gathered(copy)
    assert ordered.strided is None
    torch.testing.assert_close(products(ordered), products(delta), rtol=1e-14, atol=1e-14)


def test_a_factor_of_all_experts_is_there_once(tmp_path: Path) -> None:
    for a, b in ((A[:1], B), (A, B[:1])):
        tensors = {f"{M}.w2.lora_A.weight": a, f"{M}.w2.lora_B.weight": b}
        (target,) = read(tmp_path, tensors).targets
        assert target.name == f"{M}.w2"
        torch.testing.assert_close(products(on(target, EXPERTS, OUT, IN)), 2.0 * (b @ a).expand(EXPERTS, -1, -1))


def test_two_ways_to_read_three_dimensions(tmp_path: Path) -> None:
    """As many outputs as experts as ranks: the expert may be first or last in B."""
    tensors = pair(f"{M}.gate_up_proj", (3, 3, 4), (3, 3, 3))
    (target,) = read(tmp_path, tensors).targets
    with pytest.raises(UnsupportedError, match="--expert-layout"):
        on(target, 3, 3, 4)
    with open_readers() as readers, pytest.raises(UnsupportedError, match="several ways"):
        target.delta.term(readers.load, 1.0)
    a, b = tensors.values()
    for layout, stacked in (("slowest", b), ("fastest", b.permute(2, 0, 1))):
        (target,) = read(tmp_path, tensors, layout).targets
        torch.testing.assert_close(products(on(target, 3, 3, 4)), 2.0 * (stacked @ a))
        assert product(target.delta).shape == (3, 4)


def test_plain_files(tmp_path: Path) -> None:
    for a, b in ((A, B), (A, B.permute(1, 2, 0)), (A.mT, B.mT)):
        file = tmp_path / "f.safetensors"
        save_file({f"{M}.down_proj.lora_A": a.contiguous(), f"{M}.down_proj.lora_B": b.contiguous()}, file)
        (target,) = open_adapter(file, ReadOptions(alpha=6)).targets
        assert (target.module, target.parameter, target.delta.rank) == (M, "down_proj", RANK)
        torch.testing.assert_close(products(on(target, EXPERTS, OUT, IN)), 2.0 * (B @ A))


# Which parameters


def names(folder: Path, parameters: list[str], *modules: str, **config: Any) -> list[str]:
    """Names of targets by their modules in the file; those of parameters are marked."""
    tensors: dict[str, torch.Tensor] = {}
    for module in modules:
        tensors |= pair(module, (15, 4), (7, 15)) if "experts" in module else pair(module, (3, 4), (7, 3))
    targets = read(folder, tensors, target_parameters=parameters, **config).targets
    found = {target.delta.tensors[0].key: target for target in targets}
    ordered = [found[f"base_model.model.{module}.lora_A.weight"] for module in modules]
    return [("*" if isinstance(target.delta, OpenExperts) else "") + target.name for target in ordered]


INNER = f"{M}.base_layer"


def test_names_of_nested_parameters(tmp_path: Path) -> None:
    assert names(tmp_path, BOTH[::-1], INNER, M) == [f"*{M}.gate_up_proj", f"*{M}.down_proj"]
    four = [f"{INNER}.base_layer.base_layer", f"{INNER}.base_layer", INNER, M]
    order = ["gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"]
    assert names(tmp_path, sorted(order), *four) == [f"*{M}.{parameter}" for parameter in order]
    assert names(tmp_path, ["experts.w2", "experts.v1", "experts.w1"], *four[1:]) == [
        f"*{M}.w1", f"*{M}.v1", f"*{M}.w2"
    ]  # fmt: skip


def test_bare_names_are_of_modules_that_are_no_targets_themselves(tmp_path: Path) -> None:
    bare = ["gate.weight", "gate_up_proj", "down_proj"]
    found = names(tmp_path, bare, INNER, M, "model.layers.0.mlp.gate", "m.q_proj", target_modules=["q_proj"])
    assert found == [f"*{M}.gate_up_proj", f"*{M}.down_proj", "*model.layers.0.mlp.gate.weight", "m.q_proj.weight"]
    assert names(tmp_path, ["down_proj"], M, "m.q_proj", target_modules=r".*\.q_proj")[1] == "m.q_proj.weight"
    assert names(tmp_path, bare, M, INNER, "m.q_proj", target_modules=r"(?!x).*")[2] == "m.q_proj.weight"


def test_only_some_layers(tmp_path: Path) -> None:
    parameters = ["layers.0.mlp.experts.gate_up_proj", "layers.1.mlp.experts.down_proj"]
    assert names(tmp_path, parameters, M, M.replace("0", "1")) == [
        f"*{M}.gate_up_proj", f"*{M.replace('0', '1')}.down_proj"
    ]  # fmt: skip


def test_modules_within_a_wrapped_one(tmp_path: Path) -> None:
    """Among them one that is called as attention's output projection is."""
    modules = ["mixer", "mixer.base_layer.in_proj", "mixer.base_layer.out_proj"]
    found = names(tmp_path, ["mixer.A_log"], *modules, target_modules=["in_proj", "out_proj"])
    assert found == ["*mixer.A_log", "mixer.in_proj.weight", "mixer.out_proj.weight"]


@pytest.mark.parametrize(("parameters", "modules", "error", "words"), [
    ([], [M, INNER], UnsupportedError, "Nested LoRA"),
    (["experts.down_proj"], [M, INNER], UnsupportedError, "2 pairs, and target_parameters names down_proj"),
    (BOTH, [M], UnsupportedError, "1 pair, and target_parameters names gate_up_proj, down_proj"),
    (["experts.x", "experts.y"], [M, INNER], UnsupportedError, "2 pairs, and target_parameters names x, y"),
    (["experts.down_proj"], [M, f"{M}.down_proj"], NamesError, "Two pairs"),
])  # fmt: skip
def test_parameters_that_nothing_tells(
    tmp_path: Path, parameters: list[str], modules: list[str], error: type[LoraCliError], words: str
) -> None:
    with pytest.raises(error) as caught:
        names(tmp_path, parameters, *modules)
    assert words in str(caught.value)


def test_parameters_of_which_the_file_has_nothing(tmp_path: Path) -> None:
    adapter = read(tmp_path, pair("m.q_proj", (3, 4), (7, 3)), target_parameters=["experts.down_proj"])
    (warning,) = adapter.warnings
    assert "experts.down_proj" in warning


def test_names_of_parameters_in_the_file(tmp_path: Path) -> None:
    """Packed in two dimensions they need the config's word; of three the shapes say it."""
    assert names(tmp_path, ["experts.down_proj"], f"{M}.down_proj") == [f"*{M}.down_proj"]
    (target,) = read(tmp_path, pair("mlp.up", (5, RANK, 4), (5, 7, RANK))).targets
    assert target.name == "mlp.up"
    (kernel,) = read(tmp_path, pair("conv", (RANK, 4, 2), (7, RANK, 1))).targets
    assert kernel.delta.kind == "lora-conv"


# Ranks and words of the config


@pytest.mark.parametrize(("a", "b", "words"), [
    ((14, 4), (7, 14), "A is [14, 4], B is [7, 14], r says 3"), ((15, 4), (7, 12), "B is [7, 12]"),
    ((0, 4), (7, 0), "A is [0, 4]"), ((15, 4), (7, 15, 1), "B is [7, 15, 1]"),
    ((5, 2, 4), (5, 7, 2), "A is [5, 2, 4], B is [5, 7, 2], r says 3"), ((5, 3, 4), (4, 7, 3), "B is [4, 7, 3]"),
])  # fmt: skip
def test_ranks_that_do_not_agree(tmp_path: Path, a: tuple[int, ...], b: tuple[int, ...], words: str) -> None:
    with pytest.raises(ShapeError) as caught:
        read(tmp_path, pair(M, a, b), target_parameters=["experts.down_proj"])
    (line,) = caught.value.details
    assert words in line


def test_a_packing_that_the_config_says(tmp_path: Path) -> None:
    for field, layout, warned in (
        ("rank_major", None, False), ("grouped_by_expert", None, False), ("rank_major", "slowest", True),
        ("grouped_by_expert", "fastest", True), ("grouped_by_expert", "rows-slowest", False), (None, "slowest", False),
    ):  # fmt: skip
        adapter = read(tmp_path, packed("packed"), layout, target_parameters=BOTH[:1], lora_B_layout=field)
        slow = "slowest" in layout if layout else field == "grouped_by_expert"
        (target,) = adapter.targets
        assert isinstance(target.delta, OpenExperts)
        assert target.delta.packings == (("packed-by-expert",) if slow else ("packed",))
        assert [("lora_B_layout" in words) for words in adapter.warnings] == [True] * warned
    for value, error in (("sideways", UnsupportedError), (3, MalformedFileError)):
        with pytest.raises(error, match="lora_B_layout"):
            read(tmp_path, packed("packed"), target_parameters=BOTH[:1], lora_B_layout=value)


@pytest.mark.parametrize("value", ["experts.down_proj", [3], {"experts": 1}])
def test_target_parameters_of_other_types(tmp_path: Path, value: object) -> None:
    with pytest.raises(MalformedFileError, match="target_parameters"):
        read(tmp_path, pair("m.q_proj", (3, 4), (7, 3)), target_parameters=value)


def test_words_of_the_option() -> None:
    for text, side, order in (
        ("rows", "rows", None), ("slowest", None, "slowest"), ("columns-fastest", "columns", "fastest"),
        ("slowest-rows", "rows", "slowest"),
    ):  # fmt: skip
        assert ExpertLayout.parse(text) == ExpertLayout(side, order)  # type: ignore[arg-type]
    assert str(ExpertLayout.parse("slowest-rows")) == "rows-slowest"
    for text in ("", "row", "rows-columns", "fastest-slowest", "rows-rows", "rows-x", "rows-slowest-"):
        with pytest.raises(UsageError, match="expert-layout"):
            ExpertLayout.parse(text)


def test_a_settled_stack_stays_what_it_is(tmp_path: Path) -> None:
    (target,) = read(tmp_path, packed("packed"), target_parameters=BOTH[:1]).targets
    delta = on(target, EXPERTS, OUT, IN)
    assert isinstance(delta, LowRankExperts)
    assert delta.on(Parameter((1, 2), False, False, {})) is delta
    assert delta != replace(delta, side="rows")
    assert "A meets columns (by its shape)" in delta.words
    assert np.isclose(delta.scale.times(), 2.0)
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == {tensor.key for tensor in delta.tensors}
