"""Laws of merging into stacked experts, bit for bit: order of experts, how they are stored, in how many files.

The stacks here are cut and put together by this file alone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
import torch
from expert_families import EXPERTS
from family_cases import FAMILIES, OPTIONS, Case, Made, base_of, make
from models import read_tensors
from safetensors.torch import save_file

from lora_cli.surgery.merge import merge

Tensors = dict[str, torch.Tensor]
ORDER: Final = [3, 0, 4, 2, 1]
"""Which expert is in each place."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


def trained(family: str, option: str, bases: Path, folder: Path) -> tuple[Path, Made]:
    """A base and an adapter; what is trained follows the family's seed, however it is written."""
    case = Case(FAMILIES[family], OPTIONS[option])
    base = base_of(case.family, bases)
    return base, make(case, base, folder / option, mergeable=False)


def merged(base: Path, adapters: list[Path], folder: Path) -> Tensors:
    merge(base, adapters, folder, undo=False)
    return read_tensors(folder)


def same(left: Tensors, right: Tensors) -> bool:
    return left.keys() == right.keys() and all(
        left[key].dtype == right[key].dtype and torch.equal(left[key], right[key]) for key in left
    )


def rewritten(source: Path, target: Path, files: list[Tensors]) -> Path:
    """The same folder with other safetensors files; an index where there are several."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    if len(files) == 1:
        name = "adapter_model.safetensors" if (source / "adapter_config.json").exists() else "model.safetensors"
        save_file(files[0], target / name, {"format": "pt"})
        return target
    names = [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    for name, tensors in zip(names, files, strict=True):
        save_file(tensors, target / name, {"format": "pt"})
    index = {"weight_map": {key: name for name, tensors in zip(names, files, strict=True) for key in tensors}}
    total = sum(tensor.nbytes for tensors in files for tensor in tensors.values())
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, **index}))
    return target


# Other forms of the same weights


def permuted(tensors: Tensors) -> Tensors:
    """A checkpoint whose experts are in another order, and the rows of its routers with them."""
    changed = {}
    for key, tensor in tensors.items():
        head, dot, tail = key.partition(".experts.")
        number, _, rest = tail.partition(".")
        if number.isdecimal():
            changed[f"{head}{dot}{ORDER.index(int(number))}.{rest}"] = tensor
        elif dot or ".router." in key or ".mlp.gate." in key:
            changed[key] = tensor[ORDER].contiguous()
        else:
            changed[key] = tensor
    return changed


def permuted_adapter(tensors: Tensors) -> Tensors:
    """An adapter of PEFT's for such a checkpoint; of a router, only B has experts."""
    changed = dict(tensors)
    for key, tensor in tensors.items():
        if ".router." in key or ".gate." in key:
            changed[key] = tensor[ORDER] if "lora_B" in key else tensor
        elif "lora_A" in key:
            changed[key] = tensor.unflatten(0, (EXPERTS, -1))[ORDER].flatten(0, 1)
        else:
            changed[key] = tensor.unflatten(1, (-1, EXPERTS))[..., ORDER].flatten(1)
    return {key: tensor.contiguous() for key, tensor in changed.items()}


def stacked(tensors: Tensors) -> Tensors:
    """Experts that are stored one by one as two tensors of all: gate over up, and down."""
    changed = {}
    for key, tensor in tensors.items():
        head, dot, tail = key.partition(".experts.")
        if not dot:
            changed[key] = tensor
        elif tail == "0.gate_proj.weight":
            every = [
                torch.cat([tensors[f"{head}.experts.{expert}.{part}_proj.weight"] for part in ("gate", "up")])
                for expert in range(EXPERTS)
            ]
            changed[f"{head}.experts.gate_up_proj"] = torch.stack(every)
            downs = [tensors[f"{head}.experts.{expert}.down_proj.weight"] for expert in range(EXPERTS)]
            changed[f"{head}.experts.down_proj"] = torch.stack(downs)
    return changed


def dealt(tensors: Tensors, count: int = 7) -> list[Tensors]:
    """Over several files, neighbours apart."""
    keys = sorted(tensors)
    return [{key: tensors[key] for key in keys[start::count]} for start in range(count)]


# Laws


@pytest.mark.parametrize("family", ["qwen3-moe", "qwen3-moe-fused", "gpt-oss", "gpt-oss-square"])
def test_the_order_of_experts_does_not_matter(family: str, bases: Path, tmp_path: Path) -> None:
    option = "experts-and-router" if family in {"qwen3-moe", "gpt-oss"} else "experts"
    base, made = trained(family, option, bases, tmp_path)
    other_base = rewritten(base, tmp_path / "base", [permuted(read_tensors(base))])
    other = rewritten(made.adapter, tmp_path / "other", [permuted_adapter(read_tensors(made.adapter))])
    found = merged(other_base, [other], tmp_path / "left")
    expected = permuted(merged(base, [made.adapter], tmp_path / "right"))
    assert same(found, expected)
    assert not same(found, permuted(read_tensors(base)))
    assert not same(merged(base, [other], tmp_path / "wrong"), merged(base, [made.adapter], tmp_path / "again"))


@pytest.mark.parametrize("option", ["experts", "experts-first", "experts-apart", "experts-tinker"])
@pytest.mark.parametrize("family", ["qwen3-moe", "qwen3-moe-bf16", "qwen3-moe-square"])
def test_how_experts_are_stored_does_not_matter(family: str, option: str, bases: Path, tmp_path: Path) -> None:
    base, made = trained(family, option, bases, tmp_path)
    fused = rewritten(base, tmp_path / "fused", [stacked(read_tensors(base))])
    found = merged(fused, [made.adapter], tmp_path / "left")
    expected = stacked(merged(base, [made.adapter], tmp_path / "right"))
    assert same(found, expected)
    assert not same(found, stacked(read_tensors(base)))


@pytest.mark.parametrize("option", ["experts", "experts-apart"])
def test_how_many_files_there_are_does_not_matter(option: str, bases: Path, tmp_path: Path) -> None:
    base, made = trained("qwen3-moe", option, bases, tmp_path)
    shards = dealt(read_tensors(base))
    assert not any(
        {f"{key}.{part}_proj.weight" for part in ("gate", "up", "down")} <= shard.keys()
        for shard in shards
        for key in ["model.layers.0.mlp.experts.0"]
    )
    spread = rewritten(base, tmp_path / "spread", shards)
    found = merged(spread, [made.adapter], tmp_path / "left")
    assert same(found, merged(base, [made.adapter], tmp_path / "right"))
    assert not same(found, read_tensors(base))


FORMS: Final = [
    "018",
    "unversioned",
    "grouped",
    "megatron",
    "vllm",
    "tinker",
    "torchtune",
    "apart",
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["qwen3-moe", "qwen3-moe-fused"])
def test_how_an_adapter_is_written_does_not_matter(family: str, form: str, bases: Path, tmp_path: Path) -> None:
    base, made = trained(family, "experts", bases, tmp_path)
    _, other = trained(family, f"experts-{form}", bases, tmp_path)
    assert read_tensors(made.adapter).keys() != read_tensors(other.adapter).keys() or not same(
        read_tensors(made.adapter), read_tensors(other.adapter)
    )
    found = merged(base, [other.adapter], tmp_path / "left")
    assert same(found, merged(base, [made.adapter], tmp_path / "right"))


@pytest.mark.parametrize("family", ["qwen3-moe", "qwen3-moe-fused", "mixtral"])
def test_experts_in_two_adapters_are_those_in_one(family: str, bases: Path, tmp_path: Path) -> None:
    base, made = trained(family, "experts-apart", bases, tmp_path)
    tensors = read_tensors(made.adapter)
    halves = [half(tensors, part) for part in (lambda expert: expert < 2, lambda expert: expert >= 2)]
    adapters = [rewritten(made.adapter, tmp_path / f"half{n}", [held]) for n, held in enumerate(halves)]
    found = merged(base, adapters, tmp_path / "left")
    assert same(found, merged(base, [made.adapter], tmp_path / "right"))
    assert not same(found, merged(base, adapters[:1], tmp_path / "first"))


def half(tensors: Tensors, part: Callable[[int], bool]) -> Tensors:
    """The factors of some experts."""
    return {key: tensor for key, tensor in tensors.items() if part(int(key.partition(".experts.")[2].split(".")[0]))}
