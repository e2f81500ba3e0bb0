"""DoRA on files: against its formula in float64, against live layers, and what it cannot be merged with."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from models import read_tensors
from round_trips import as_raw, gaussian, lora, weights, write_adapter, write_base, write_raw
from safetensors.torch import save_file
from special_worlds import dora, lengths, table
from test_round_trip_bounds import MIB, in_a_process
from torch import Tensor, nn

from lora_cli.errors import NumericError, UnsupportedError, UsageError
from lora_cli.nn import inject
from lora_cli.surgery.merge import merge
from lora_cli.surgery.placing import PlanOptions
from lora_cli.surgery.unmerge import unmerge

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def stretched(weight: Tensor, change: Tensor, magnitude: Tensor, outputs: int) -> Tensor:
    """m · (W + Δ) / ‖W + Δ‖ for each output, which lies along one dimension."""
    both = (weight.double() + change.view(weight.shape)).movedim(outputs, 0)
    norms = both.flatten(1).norm(dim=1).view(-1, *[1] * (both.dim() - 1))
    found: Tensor = both * (magnitude.double().view(norms.shape) / norms)
    return found.movedim(0, outputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kind_is_the_formula(tmp_path: Path, dtype: torch.dtype) -> None:
    """Rows, columns and kernels; one length is negative and one is zero."""
    world = dora(tmp_path, dtype, 1)
    merge(world.base, world.adapters, tmp_path / "merged", world.options, undo=False)
    base, found = read_tensors(world.base), read_tensors(tmp_path / "merged")
    factors = {key.removeprefix("base_model.model."): t.double() for key, t in read_tensors(world.adapters[0]).items()}
    modules = [key.removesuffix(".lora_magnitude_vector") for key in factors if key.endswith("vector")]
    assert len(modules) == 6
    for module in modules:
        names = [f"{module}.lora_{side}.weight" for side in "AB"]
        names = names if names[0] in factors else [f"{module}.lora_embedding_{side}" for side in "AB"]
        a, b = (factors[name].flatten(1) for name in names)
        across = module == "emb" or "c_attn" in module
        change = (b @ a).T if across else b @ a
        weight = base[f"{module}.weight"]
        expected = stretched(weight, change, factors[f"{module}.lora_magnitude_vector"], 1 if across else 0)
        off = (found[f"{module}.weight"].double() - expected).abs()
        assert bool((off <= 1.01 * expected.abs() * torch.finfo(dtype).eps / 2 + 1e-5 * 2**-20).all()), module


class Net(nn.Module):
    """Layers of which DoRA finds lengths of rows, of columns, and of kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.Linear(90, 33)
        self.wide = nn.Linear(700, 3)
        self.table = nn.Embedding(150, 20)
        self.kernel = nn.Conv2d(3, 8, (2, 3))


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_live_merge_has_the_bytes_of_a_merge_of_files(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    model = Net().to(dtype)
    write_base(tmp_path / "base", dict(model.state_dict()))
    injection = inject(model, rank=3, alpha=5, targets=("narrow", "wide", "table", "kernel"), dora=True)
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    injection.save(tmp_path / "adapter")
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    injection.merge()
    injection.take_out(merged=True)
    live = model.state_dict()
    found = read_tensors(tmp_path / "merged")
    assert {key for key in found if not torch.equal(found[key], read_tensors(tmp_path / "base")[key])} == {
        "narrow.weight", "wide.weight", "table.weight", "kernel.weight"
    }  # fmt: skip
    assert {key: bits(tensor) for key, tensor in found.items()} == {key: bits(live[key]) for key in found}


# What it cannot be merged with


def small(folder: Path) -> tuple[Path, Path, Path]:
    """A base, an adapter with lengths and one without, on the same layer."""
    base = write_base(folder / "base", {"x.weight": gaussian(1, 30, 20)})
    one = write_adapter(folder / "one", lora(2, "x", 30, 20) | lengths(3, "x", 30, 20**0.5), use_dora=True)
    return base, one, write_adapter(folder / "two", lora(4, "x", 30, 20))


@pytest.mark.parametrize("weight", [0.5, 2.0, -1.0])
def test_no_strength_but_one(tmp_path: Path, weight: float) -> None:
    base, one, _ = small(tmp_path)
    with pytest.raises(UnsupportedError) as caught:
        merge(base, [one], tmp_path / "merged", PlanOptions(weights=(weight,)))
    assert (caught.value.file, caught.value.hint) == ("one", "give one --weight 1, or 0 to leave it out")
    assert caught.value.details == (
        f"x.weight: DoRA sets the lengths of rows, and has no meaning at weight {weight:g}",
    )
    assert not (tmp_path / "merged").exists()


def test_what_is_wrong_with_all_is_said_once(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", {f"{name}.weight": gaussian(1, 30, 20) for name in "xy"})
    both = [lora(2, name, 30, 20) | lengths(3, name, 30, 20**0.5) for name in "xy"]
    one = write_adapter(tmp_path / "one", both[0] | both[1], use_dora=True)
    with pytest.raises(UnsupportedError, match=r"\(2\): DoRA sets the lengths of rows, and has no meaning") as caught:
        merge(base, [one], tmp_path / "merged", PlanOptions(weights=(0.5,)))
    assert caught.value.details == ("x.weight", "y.weight")


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_nothing_beside_it(tmp_path: Path, order: tuple[int, int]) -> None:
    base, *both = small(tmp_path)
    with pytest.raises(UnsupportedError, match="nothing can be added along with it") as caught:
        merge(base, [both[number] for number in order], tmp_path / "merged")
    assert caught.value.file == "base"
    assert "merge one, then the other into what comes out" in str(caught.value.hint)
    # One after the other is something else, and each comes off again.
    one, two = both
    merge(base, [two], tmp_path / "first")
    merge(tmp_path / "first", [one], tmp_path / "second")
    unmerge(tmp_path / "second", [one], tmp_path / "once")
    unmerge(tmp_path / "once", [two], tmp_path / "never")
    assert weights(tmp_path / "never") == weights(base)


def test_at_weight_0_it_stands_aside(tmp_path: Path) -> None:
    base, *both = small(tmp_path)
    result = merge(base, both, tmp_path / "merged", PlanOptions(weights=(0.0, 1.0)))
    merge(base, both[1:], tmp_path / "alone")
    assert weights(tmp_path / "merged") == weights(tmp_path / "alone")
    ignored = [entry.tensor.rpartition("lora_")[2] for entry in result.entries if entry.outcome == "ignored"]
    assert ignored == ["A.weight", "B.weight", "magnitude_vector"]


def test_without_an_undo_file_nothing_comes_near(tmp_path: Path) -> None:
    base, one, _ = small(tmp_path)
    merge(base, [one], tmp_path / "merged", undo=False)
    with pytest.raises(UnsupportedError, match="lengths") as caught:
        unmerge(tmp_path / "merged", [one], tmp_path / "back", approximate=True)
    assert caught.value.details == ("x.weight",)


def test_numbers_that_have_no_length(tmp_path: Path) -> None:
    base, one, _ = small(tmp_path)
    tensors = read_tensors(one)
    for change in (torch.nan, torch.inf):
        tensors["base_model.model.x.lora_magnitude_vector"][4] = change
        save_file(tensors, one / "adapter_model.safetensors")
        with pytest.raises(NumericError, match="holds NaN or infinity") as caught:
            merge(base, [one], tmp_path / "merged")
        assert caught.value.tensor == "base_model.model.x.lora_magnitude_vector"
    nothing = write_base(tmp_path / "zeros", {"x.weight": torch.zeros(30, 20)})
    plain = write_adapter(tmp_path / "three", lora(2, "x", 30, 20) | lengths(3, "x", 30, 1.0), use_dora=True)
    with pytest.raises(NumericError, match="no direction") as caught:
        merge(nothing, [plain], tmp_path / "merged")
    assert caught.value.found == "6 such rows, first 0"  # where B has zeros too


# How much memory it takes


def large_table(folder: Path, entries: int, dim: int) -> list[object]:
    """A job for a process: an embedding whose columns get lengths, so that all of it is read before any is written."""
    folder.mkdir()
    kind, _, data = as_raw(gaussian(1, entries // 100, dim, dtype=torch.bfloat16))
    write_raw(folder / "base.safetensors", {"emb.weight": (kind, [entries, dim], data * 100)})
    factors = table(2, "emb", entries, dim) | lengths(3, "emb", dim, entries**0.5)
    adapter = write_adapter(folder / "adapter", factors, use_dora=True)
    places = [str(folder / name) for name in ("merged.safetensors", "back.safetensors")]
    how = {"threads": 1, "memory": 24 * MIB}
    return [str(folder / "base.safetensors"), str(adapter), *places, "keep", how]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere peaks are those of the whole process")
def test_memory_is_what_was_allowed(tmp_path: Path) -> None:
    sizes = {"warm": (200, 16), "large": (30_000, 512)}
    merged, unmerged, *peaks = in_a_process([large_table(tmp_path / name, *size) for name, size in sizes.items()])
    assert peaks[0] - merged < 24 * 1024
    assert peaks[1] - unmerged < 24 * 1024
    assert (tmp_path / "large/back.safetensors").read_bytes() == (tmp_path / "large/base.safetensors").read_bytes()
    shutil.rmtree(tmp_path)


def test_the_budget_counts_what_finding_lengths_takes(tmp_path: Path) -> None:
    base, *both = small(tmp_path)
    least = []
    for adapter in both:
        with pytest.raises(UsageError, match="too small") as caught:
            merge(base, [adapter], tmp_path / "merged", memory=1, undo=False)
        least.append(int(str(caught.value.expected).split()[1].removesuffix("MiB")))
        merge(base, [adapter], tmp_path / f"{adapter.name} in little", undo=False, memory=least[-1] * MIB)
        merged = tmp_path / f"{adapter.name} merged"
        merge(base, [adapter], merged)
        with pytest.raises(UsageError, match="too small") as caught:
            unmerge(merged, [adapter], tmp_path / "back", memory=1)
        least.append(int(str(caught.value.expected).split()[1].removesuffix("MiB")))
    assert least[0] > least[2] + 6
    assert least[1] > least[3] + 6
