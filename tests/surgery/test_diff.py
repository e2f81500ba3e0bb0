"""What `diff` says of two checkpoints or adapters, against plain tensor arithmetic on whole tensors."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from float_reference import ulp
from models import CASES, Make, maker
from safetensors.torch import load_file, save_file
from tiny import write_json
from torch import Tensor

from lora_cli.adapters.source import ReadOptions
from lora_cli.arithmetic.lowrank import SAFETY
from lora_cli.arithmetic.ordered import ulp_distances
from lora_cli.checkpoint.dtypes import DTYPES
from lora_cli.checkpoint.header import render_header
from lora_cli.errors import UsageError
from lora_cli.surgery import distance
from lora_cli.surgery.changes import Changed
from lora_cli.surgery.diff import DiffResult, diff
from lora_cli.surgery.merge import merge

Tensors = Mapping[str, Tensor]

FLOATS = [
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]
ODD = (301, 523)  # 157 423 elements: two tiles and a piece, in no width a whole number of strips


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    return maker(tmp_path_factory)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """For the dense oracles: idle threads of a busy machine cost more than they help."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def compare(tmp_path: Path) -> Callable[..., DiffResult]:
    """Write two files and compare them."""

    def compare(a: Tensors, b: Tensors, **options: Any) -> DiffResult:
        for name, tensors in (("a", a), ("b", b)):
            apart = {key: tensor.contiguous().clone() for key, tensor in tensors.items()}
            save_file(apart, tmp_path / f"{name}.safetensors")
        return diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors", **options)

    return compare


def gaussian(seed: int, *shape: int, std: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * std


def only_change(result: DiffResult) -> Changed:
    (change,) = result.changed
    assert not result.same
    return change


def findings(result: DiffResult) -> DiffResult:
    """Without what no two runs have in common."""
    return replace(result, seconds=0.0, peak_rss_bytes=0)


# Checkpoints, by value


@pytest.fixture(params=["as it is", "cut small"])
def cuts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles, strips and units so small that a tensor of this test has many."""
    if request.param == "cut small":
        for name, value in (("TILE_ELEMENTS", 1 << 10), ("STRIP_BYTES", 1 << 14), ("UNIT_BYTES", 1 << 16)):
            monkeypatch.setattr(distance, name, value)


@pytest.mark.usefixtures("cuts")
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_number_is_that_of_the_whole_tensors(compare: Callable[..., DiffResult], dtype: torch.dtype) -> None:
    a = gaussian(0, *ODD).to(dtype)
    changed = gaussian(1, *ODD) > 1
    b = torch.where(changed, (a.double() * (1 + gaussian(2, *ODD, std=0.2))), a.double()).to(dtype)
    change = only_change(compare({"w": a, "rest": a}, {"w": b, "rest": a}))
    d, norm = b.double() - a.double(), float(a.double().norm())
    unequal = a.view(torch.uint8).view(*ODD, -1) != b.view(torch.uint8).view(*ODD, -1)
    assert (change.key, change.what, change.before, change.rank) == ("w", "values", None, None)
    assert change.max_abs == float(d.abs().max())
    assert change.relative_norm == pytest.approx(float(d.norm()) / norm, rel=1e-12)
    assert change.changed_fraction == int(unequal.any(-1).sum()) / a.numel()
    assert change.max_ulp == int(ulp_distances(a, b).max())


@pytest.mark.usefixtures("cuts")
@pytest.mark.parametrize("place", [0, 200_000, 999_999])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float8_e5m2])
def test_one_bit_is_found_wherever_it_is(compare: Callable[..., DiffResult], dtype: torch.dtype, place: int) -> None:
    """In a tensor of several strips, whose norm comes from a second look at those that are the same."""
    a = gaussian(3, 1_000_000).to(dtype)
    b = a.clone()
    b.view(torch.uint8)[place * dtype.itemsize] ^= 1
    change = only_change(compare({"w": a}, {"w": b}))
    size = abs(float(a[place].double() - b[place].double()))
    assert change.max_abs == size
    assert (change.max_ulp, change.changed_fraction) == (1, 1e-6)
    assert change.relative_norm == pytest.approx(size / float(a.double().norm()), rel=1e-12, abs=0)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_ends_of_the_line_are_farthest_apart(compare: Callable[..., DiffResult], dtype: torch.dtype) -> None:
    """More steps than the signed integers of the dtype's width can count."""
    largest = torch.finfo(dtype).max
    a, b = (torch.tensor([sign * largest, 1.0], dtype=torch.float64).to(dtype) for sign in (1, -1))
    change = only_change(compare({"w": a}, {"w": b}))
    assert change.max_ulp == int(ulp_distances(a, b).max())
    assert change.max_abs == (2 * largest if dtype != torch.float64 else math.inf)


def test_the_sign_of_zero_is_a_change_of_no_size(compare: Callable[..., DiffResult]) -> None:
    a, b = torch.tensor([0.0, 1.0, 0.0, 2.0]), torch.tensor([-0.0, 1.0, 0.0, 2.0])
    change = only_change(compare({"w": a}, {"w": b}))
    assert (change.max_abs, change.relative_norm, change.changed_fraction, change.max_ulp) == (0.0, 0.0, 0.25, 0)
    assert compare({"w": a}, {"w": b}, tolerance=1e-30).same


@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_is_itself_and_infinitely_far_from_numbers(compare: Callable[..., DiffResult], dtype: torch.dtype) -> None:
    a = torch.tensor([math.nan, 1.0, 2.0, 4.0], dtype=torch.float64).to(dtype)
    assert compare({"w": a}, {"w": a}).same
    b = a.clone()
    b[1] = 1.5
    change = only_change(compare({"w": a}, {"w": b}))
    assert change.max_abs == 0.5
    assert change.relative_norm == pytest.approx(0.5 / math.sqrt(21))
    assert change.max_ulp == int(ulp_distances(a[1:], b[1:]).max())
    b[2] = math.nan
    for one, other in ((a, b), (b, a)):
        change = only_change(compare({"w": one}, {"w": other}))
        assert (change.max_abs, change.relative_norm, change.changed_fraction) == (math.inf, math.inf, 0.5)
        assert change.max_ulp == int(ulp_distances(a[1:2], b[1:2]).max())
    assert not compare({"w": a}, {"w": b}, tolerance=1e300).same


def test_infinities_are_equal_to_themselves_alone(compare: Callable[..., DiffResult]) -> None:
    inf = math.inf
    a = torch.tensor([inf, -inf, 3.0, 4.0])
    change = only_change(compare({"w": a}, {"w": torch.tensor([inf, -inf, 3.0, 5.0])}))
    assert (change.max_abs, change.relative_norm) == (1.0, 0.2)
    for other in ([-inf, -inf, 3.0, 4.0], [inf, 0.0, 3.0, 4.0], [inf, -inf, 3.0, inf]):
        change = only_change(compare({"w": a}, {"w": torch.tensor(other)}))
        assert (change.max_abs, change.relative_norm, change.changed_fraction) == (inf, inf, 0.25)


def test_a_zero_tensor_that_became_something_changed_infinitely(compare: Callable[..., DiffResult]) -> None:
    change = only_change(compare({"w": torch.zeros(5)}, {"w": torch.ones(5)}))
    assert (change.max_abs, change.relative_norm) == (1.0, math.inf)


# Checkpoints, by bytes


@pytest.mark.parametrize("name", [name for name, dtype in DTYPES.items() if not dtype.floating])
def test_what_is_no_float_is_compared_by_elements(tmp_path: Path, name: str) -> None:
    """Every type of the format: raw files, since torch cannot make all of them."""
    elements, places = 400_000, (0, 7, 70_001, 399_999)
    bits = DTYPES[name].bits
    data = np.random.default_rng(0).integers(0, 256, elements * bits // 8, dtype=np.uint8)
    other = np.unpackbits(data, bitorder="little")
    for place in places:
        other[place * bits : (place + 1) * bits] ^= 1
    header = render_header([("w", DTYPES[name], (elements,))], None)
    for file, content in (("a", data), ("b", np.packbits(other, bitorder="little"))):
        length = len(header.raw).to_bytes(8, "little")
        (tmp_path / f"{file}.safetensors").write_bytes(length + header.raw + content.tobytes())
    assert diff(tmp_path / "a.safetensors", tmp_path / "a.safetensors").same
    change = only_change(diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors", tolerance=1e9, rank=True))
    expected = Changed("w", "values", changed_fraction=len(places) / elements)
    assert change == expected


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu])
def test_rarer_floats_are_compared_by_value_without_units(
    compare: Callable[..., DiffResult], dtype: torch.dtype
) -> None:
    a = torch.tensor([1.0, 2.0, 4.0, 8.0]).to(dtype)
    b = torch.tensor([1.0, 2.0, 16.0, 8.0]).to(dtype)
    change = only_change(compare({"w": a.view(2, 2)}, {"w": b.view(2, 2)}, rank=True))
    assert (change.max_abs, change.changed_fraction, change.max_ulp, change.rank) == (12.0, 0.25, None, None)
    assert change.relative_norm == pytest.approx(12 / math.sqrt(85))


# Names, types, shapes


def test_identical_checkpoints_may_be_sharded_differently(tmp_path: Path) -> None:
    tensors = {f"layers.{n}.weight": gaussian(n, 40, 30).to(dtype) for n, dtype in enumerate(FLOATS)}
    tensors |= {"ids": torch.arange(9), "mask": torch.tensor([True, False]), "none": torch.zeros(0, 4)}
    (tmp_path / "whole").mkdir()
    save_file(tensors, tmp_path / "whole" / "model.safetensors")
    (tmp_path / "shards").mkdir()
    names = sorted(tensors, reverse=True)
    where = {name: f"model-{at % 3}.safetensors" for at, name in enumerate(names)}
    for shard in set(where.values()):
        save_file({name: tensors[name] for name in names if where[name] == shard}, tmp_path / "shards" / shard)
    write_json(tmp_path / "shards" / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})
    result = diff(tmp_path / "whole", tmp_path / "shards")
    assert result.same
    assert (result.kind, result.unchanged, result.changed) == ("checkpoints", len(tensors), ())
    assert (result.a, result.b) == ("whole", "shards")


def test_other_names_types_and_shapes_are_told(compare: Callable[..., DiffResult]) -> None:
    x = gaussian(5, 6, 4).bfloat16()
    a = {"only.a": x, "shape": x, "both": x, "wider": x, "cast": x.float(), "ids": torch.arange(4), "same": x}
    b = {"only.b": x, "shape": x.T, "both": x.float().view(-1), "wider": x.float(), "cast": x, "ids": torch.ones(4)}
    b |= {"same": x}
    a["cast"] = gaussian(6, 6, 4).float()
    b["cast"] = a["cast"].bfloat16()
    result = compare(a, b, tolerance=1e9)
    assert (result.only_in_a, result.only_in_b, result.unchanged) == (("only.a",), ("only.b",), 1)
    found = {change.key: change for change in result.changed}
    assert found["shape"] == Changed("shape", "shape", before="6×4", after="4×6")
    assert found["both"] == Changed("both", "shape", before="BF16 6×4", after="F32 24")
    assert found["ids"] == Changed("ids", "dtype", before="I64", after="F32")
    assert found["wider"] == Changed("wider", "dtype", 0.0, 0.0, 0.0, before="BF16", after="F32")
    lost = (a["cast"].double() - b["cast"].double()).abs()
    assert found["cast"].max_abs == float(lost.max())
    assert found["cast"].changed_fraction == int((lost > 0).sum()) / 24
    assert (found["cast"].before, found["cast"].after, found["cast"].max_ulp) == ("F32", "BF16", None)


def test_a_name_alone_makes_a_difference(compare: Callable[..., DiffResult]) -> None:
    x = torch.ones(2)
    for a, b in (({"w": x, "v": x}, {"w": x}), ({"w": x}, {"w": x, "v": x})):
        result = compare(a, b)
        assert not result.same
        assert result.unchanged == 1


def test_changes_are_sorted_by_size(compare: Callable[..., DiffResult]) -> None:
    x = gaussian(7, 50, 20).float()
    a = {"small": x, "large": x, "alike": x, "alike too": x, "shape": x, "ids": torch.arange(10)}
    b = {"small": x * 1.001, "large": x * 2, "alike": x * 1.5, "alike too": x * 1.5, "shape": x[1:]}
    b |= {"ids": torch.arange(10) // 9 * 9 + torch.arange(10) % 9}
    b["ids"][0] = 77
    order = [change.key for change in compare(a, b).changed]
    assert order == ["shape", "large", "alike", "alike too", "ids", "small"]


def test_tolerance_is_in_absolute_size_and_inclusive(compare: Callable[..., DiffResult]) -> None:
    a, b = {"w": torch.tensor([1.0, 2.0]), "i": torch.tensor([1])}, {"w": torch.tensor([1.25, 2.0])}
    b["i"] = a["i"]
    assert compare(a, b, tolerance=0.25).same
    assert compare(a, b, tolerance=0.25).unchanged == 2
    assert not compare(a, b, tolerance=0.2499).same
    b["i"] = torch.tensor([2])
    assert only_change(compare(a, b, tolerance=5)).key == "i"
    for broken in (-1.0, math.nan, math.inf):
        with pytest.raises(UsageError):
            compare(a, b, tolerance=broken)


def test_only_looks_at_what_the_pattern_finds(compare: Callable[..., DiffResult]) -> None:
    x = torch.ones(3)
    a = {"layers.0.q_proj.weight": x, "layers.0.k_proj.weight": x, "layers.0.q_proj.bias": x, "gone": x}
    b = {"layers.0.q_proj.weight": x, "layers.0.k_proj.weight": -x, "layers.0.q_proj.bias": -x}
    assert compare(a, b, only="*.q_proj.weight").same
    for pattern, changes, gone in (
        ("q_proj", 1, 0),
        ("layers.0.*", 2, 0),
        ("re:.*proj.*", 2, 0),
        ("**", 2, 1),
        ("gone", 0, 1),
    ):
        result = compare(a, b, only=pattern)
        assert (len(result.changed), len(result.only_in_a)) == (changes, gone), pattern
    with pytest.raises(UsageError):
        compare(a, b, only="v_proj")


# Threads and memory


def test_no_number_depends_on_threads_or_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distance, "UNIT_BYTES", 1 << 20)  # many units of these small tensors
    shapes = [(300, 400), (1000, 700), (5,), (64, 64), (900, 300)]
    a = {f"{n}": gaussian(n, *shape).to(FLOATS[n % 4]) for n, shape in enumerate(shapes)}
    a["adapted"] = gaussian(9, 400, 300).float()
    b = {key: (x.double() + gaussian(20 + int(x.numel()), *x.shape, std=0.1)).to(x.dtype) for key, x in a.items()}
    b["adapted"] = a["adapted"] + (gaussian(10, 400, 3) @ gaussian(11, 3, 300)).float()
    b["1"] = a["1"].clone()
    b["1"][999, 699] += 1
    save_file(a, tmp_path / "a.safetensors")
    save_file(b, tmp_path / "b.safetensors")

    def run(threads: int, memory: int = 256 << 20) -> DiffResult:
        result = diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors", rank=True, threads=threads, memory=memory)
        return findings(result)

    first = run(1)
    assert len(first.changed) == 6
    assert {change.rank for change in first.changed if change.key == "adapted"} == {3}
    for threads, memory in ((2, 256 << 20), (5, 256 << 20), (5, 5 << 20)):
        assert run(threads, memory) == first
    with pytest.raises(UsageError):
        run(1, 1 << 20)


def test_torch_keeps_its_threads_and_is_loaded_late(compare: Callable[..., DiffResult]) -> None:
    torch.set_num_threads(3)
    compare({"w": torch.ones(3, 3)}, {"w": torch.zeros(3, 3)}, rank=True)
    assert torch.get_num_threads() == 3
    code = "import sys, lora_cli.surgery.diff; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# Rank


def edge_of(a: Tensor, b: Tensor) -> float:
    """The safe edge of rounding noise, written from its formula with another author's ULPs; or of an SVD's own."""
    units = [ulp(x.double().numpy(), x.dtype) for x in (a, b)]
    variances = (units[0] ** 2 + units[1] ** 2) / 12
    edge = SAFETY * float(np.sqrt(variances.sum(1).max()) + np.sqrt(variances.sum(0).max()))
    return max(edge, float(torch.linalg.matrix_norm(b.double() - a.double(), 2)) * max(a.shape) * 2.0**-52)


def assert_rank_like_dense(change: Changed, a: Tensor, b: Tensor) -> int:
    exact = torch.linalg.svdvals(b.double() - a.double())
    rank = int((exact > edge_of(a, b)).sum())
    assert change.rank == rank, change.key
    assert change.energy == pytest.approx(float(exact[:rank].square().sum() / exact.square().sum()), rel=0.01)
    return rank


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(300, 460), (90, 460)])
def test_planted_rank_is_found_in_rounded_weights(
    compare: Callable[..., DiffResult], dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    a = gaussian(0, *shape, std=0.02).to(dtype)
    low = gaussian(1, shape[0], 5, std=0.02) @ gaussian(2, 5, shape[1], std=0.1)
    b = (a.double() + low).to(dtype)
    change = only_change(compare({"w": a}, {"w": b}, rank=True))
    assert assert_rank_like_dense(change, a, b) == 5
    assert change.low_rank
    assert change.energy is not None
    assert change.energy > (0.95 if dtype == torch.bfloat16 else 0.999)


@pytest.mark.parametrize("shape", [(300, 460), (90, 460)])
def test_full_rank_changes_are_not_called_low(compare: Callable[..., DiffResult], shape: tuple[int, int]) -> None:
    a = gaussian(0, *shape, std=0.02)
    trained = (a + gaussian(1, *shape, std=0.002)).bfloat16()
    change = only_change(compare({"w": a.bfloat16()}, {"w": trained}, rank=True))
    assert change.rank is not None
    assert change.rank > 20
    assert change.low_rank is False


def test_rounding_alone_has_no_rank(compare: Callable[..., DiffResult]) -> None:
    """The same weights rounded in two ways, and with last bits at random."""
    exact = gaussian(0, 300, 400, std=0.02)
    nearest = exact.bfloat16()
    down = (exact.float().view(torch.int32) & ~0xFFFF).view(torch.float32).bfloat16()
    shaken = (nearest.view(torch.int16) + (gaussian(1, 300, 400) > 0)).to(torch.int16).view(torch.bfloat16)
    result = compare(
        {"down": nearest, "shaken": nearest, "half": exact.half()},
        {"down": down, "shaken": shaken, "half": nearest},
        rank=True,
    )
    assert len(result.changed) == 3
    for change in result.changed:
        assert (change.rank, change.energy, change.low_rank) == (0, 0.0, False), change.key


def test_rank_is_told_of_finite_float_matrices_alone(compare: Callable[..., DiffResult]) -> None:
    x = gaussian(0, 20, 30).float()
    nan = x.clone()
    nan[3, 4] = math.nan
    both = torch.where(torch.arange(30) == 7, math.inf, x)
    a = {"vector": x[0], "cube": x.view(2, 10, 30), "nan": x, "ids": x.int(), "zero": torch.zeros(2, 2), "inf": both}
    step = torch.outer(torch.ones(20), torch.arange(30.0))
    b = {"vector": x[1], "cube": x.view(2, 10, 30) + 1, "nan": nan, "ids": x.int() + 1, "zero": -torch.zeros(2, 2)}
    b["inf"] = both + step
    ranks = {change.key: change.rank for change in compare(a, b, rank=True).changed}
    # Columns that are infinite in both count as no change.
    assert ranks == {"vector": None, "cube": None, "nan": None, "ids": None, "zero": None, "inf": 1}
    assert all(change.rank is None for change in compare(a, b).changed)


BY_NAME = {case.name: case for case in CASES}


@pytest.mark.parametrize("name", ["llama-tied", "llama-untied"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_merge_shows_the_rank_of_its_adapter(make: Make, name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    made = make(BY_NAME[name], dtype)
    merge(made.base_dir, [made.adapter_dir], tmp_path / "merged")
    result = diff(made.base_dir, tmp_path / "merged", rank=True)
    base, terms = made.base_tensors(), made.terms()
    merged = {
        key: tensor for file in (tmp_path / "merged").glob("*.safetensors") for key, tensor in load_file(file).items()
    }
    assert {change.key for change in result.changed} == set(terms)
    assert result.unchanged == len(base) - len(terms)
    for change in result.changed:
        rank = assert_rank_like_dense(change, base[change.key], merged[change.key])
        stored = terms[change.key][0].b.shape[1]
        assert rank == min(stored, *base[change.key].shape) if dtype == torch.float32 else 0 < rank <= stored
        (term,) = terms[change.key]
        delta = term.scale * (term.b.double() @ term.a.double())
        assert change.relative_norm == pytest.approx(float(delta.norm() / base[change.key].double().norm()), rel=0.05)


# Adapters


def write_adapter(folder: Path, tensors: Tensors, rank: int = 4, **config: Any) -> Path:
    folder.mkdir()
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "bias": "none", "task_type": "CAUSAL_LM"}
    write_json(folder / "adapter_config.json", said | config)
    return folder


def factors(seed: int = 0, modules: tuple[str, ...] = ("q_proj", "up_proj"), rank: int = 4) -> dict[str, Tensor]:
    tensors = {}
    for at, module in enumerate(modules):
        tensors[f"base_model.model.layers.0.{module}.lora_A.weight"] = gaussian(seed + 2 * at, rank, 30).float()
        tensors[f"base_model.model.layers.0.{module}.lora_B.weight"] = gaussian(seed + 2 * at + 1, 40, rank).float()
    return tensors


A = "base_model.model.layers.0.q_proj.lora_A.weight"
B = "base_model.model.layers.0.q_proj.lora_B.weight"
KEY = "layers.0.q_proj.weight"


def test_an_adapter_is_the_same_as_itself(make: Make, tmp_path: Path) -> None:
    made = make(BY_NAME["llama-tied"], torch.bfloat16)
    result = diff(made.adapter_dir, made.adapter_dir)
    assert (result.same, result.kind, result.unchanged) == (True, "adapters", len(made.targets))


def test_a_delta_is_compared_with_the_dense_one(tmp_path: Path) -> None:
    one, other = factors(), factors()
    other[A] = other[A] + gaussian(9, 4, 30, std=0.1).float()
    result = diff(write_adapter(tmp_path / "a", one), write_adapter(tmp_path / "b", other))
    change = only_change(result)
    x, y = (2.0 * (side[B].double() @ side[A].double()) for side in (one, other))
    assert (change.key, change.what, result.unchanged) == (KEY, "values", 1)
    assert change.max_abs == pytest.approx(float((y - x).abs().max()), rel=1e-12)
    assert change.relative_norm == pytest.approx(float((y - x).norm() / x.norm()), rel=1e-12)
    assert (change.rank, change.low_rank, change.changed_fraction, change.max_ulp) == (4, True, None, None)
    assert change.energy == pytest.approx(1.0)


def test_only_the_product_counts_not_its_factors(tmp_path: Path) -> None:
    """B·R and R⁻¹·A are B·A up to the rounding of the factors; powers of two not even that."""
    one = factors()
    mixed, doubled = dict(one), {key: tensor * (2.0 if "lora_A" in key else 0.5) for key, tensor in one.items()}
    mix = gaussian(8, 4, 4)
    mixed[B], mixed[A] = (one[B].double() @ mix).float(), (torch.linalg.inv(mix) @ one[A].double()).float()
    a = write_adapter(tmp_path / "a", one)
    assert diff(a, write_adapter(tmp_path / "doubled", doubled)).same
    assert diff(a, write_adapter(tmp_path / "scaled", {k: v * 2 for k, v in one.items()}, lora_alpha=2)).same
    change = only_change(diff(a, write_adapter(tmp_path / "mixed", mixed)))
    assert change.relative_norm is not None
    assert 0 < change.relative_norm < 1e-5
    assert (change.rank, change.energy, change.low_rank) == (0, 0.0, False)
    assert diff(a, tmp_path / "mixed", tolerance=1e-4).same


def test_another_alpha_changes_every_delta_alike(tmp_path: Path) -> None:
    a, b = (write_adapter(tmp_path / name, factors(), lora_alpha=alpha) for name, alpha in (("a", 8), ("b", 10)))
    result = diff(a, b)
    assert [change.key for change in result.changed] == [KEY, "layers.0.up_proj.weight"]
    assert [change.relative_norm for change in result.changed] == pytest.approx([0.25, 0.25], rel=1e-12)
    assert diff(a, b, options=ReadOptions(scale=1.0)).same


def test_other_ranks_shapes_and_modules(tmp_path: Path) -> None:
    one = factors()
    padded = {
        key: torch.cat([tensor, torch.zeros_like(tensor)], dim=0 if "lora_A" in key else 1)
        for key, tensor in one.items()
    }
    a = write_adapter(tmp_path / "a", one)
    assert diff(a, write_adapter(tmp_path / "padded", padded, rank=8, lora_alpha=16)).same
    wide = factors(modules=("q_proj", "k_proj"))
    wide[A] = gaussian(0, 4, 31).float()
    result = diff(a, write_adapter(tmp_path / "wide", wide))
    assert result.changed == (Changed(KEY, "shape", before="40×30", after="40×31"),)
    assert (result.only_in_a, result.only_in_b) == (("layers.0.up_proj.weight",), ("layers.0.k_proj.weight",))
    assert diff(a, tmp_path / "wide", only="up_proj").only_in_a == ("layers.0.up_proj.weight",)


def test_whole_tensors_of_adapters_are_compared_as_tensors(tmp_path: Path) -> None:
    head = {"base_model.model.score.weight": gaussian(5, 3, 30).float()}
    a = write_adapter(tmp_path / "a", factors() | head, modules_to_save=["score"])
    moved = {key: tensor + 1 for key, tensor in head.items()}
    b = write_adapter(tmp_path / "b", factors() | moved, modules_to_save=["score"])
    change = only_change(diff(a, b))
    assert (change.key, change.changed_fraction) == ("score.weight", 1.0)
    assert change.max_abs == pytest.approx(1.0)
    c = write_adapter(tmp_path / "c", factors())
    assert diff(a, c).only_in_a == ("score.weight",)


def test_tensors_without_a_meaning_are_not_passed_over(tmp_path: Path) -> None:
    """A plain file's tensor that belongs to no pair."""
    paths = []
    for name, value in (("a", 0.0), ("b", 1.0)):
        tensors = {"q.A": torch.ones(2, 3), "q.B": torch.ones(4, 2), "extra": torch.full((2,), value)}
        save_file(tensors, tmp_path / f"{name}.safetensors", metadata={"alpha": "2"})
        paths.append(tmp_path / f"{name}.safetensors")
    assert only_change(diff(*paths)).key == "extra"


def test_a_broken_factor_is_an_infinite_change(tmp_path: Path) -> None:
    broken = factors()
    broken[A][0, 0] = math.nan
    a, b = write_adapter(tmp_path / "a", factors()), write_adapter(tmp_path / "b", broken)
    assert diff(b, b).same
    change = only_change(diff(a, b, tolerance=1e300))
    assert (change.max_abs, change.relative_norm, change.rank) == (math.inf, math.inf, None)


def test_from_nothing_to_something_is_infinite(tmp_path: Path) -> None:
    fresh = {key: torch.zeros_like(tensor) if "lora_B" in key else tensor for key, tensor in factors().items()}
    a, b = write_adapter(tmp_path / "a", fresh), write_adapter(tmp_path / "b", factors())
    assert [change.relative_norm for change in diff(a, b).changed] == [math.inf, math.inf]
    assert [change.relative_norm for change in diff(b, a).changed] == pytest.approx([1.0, 1.0])


def test_adapters_do_not_depend_on_threads_and_keep_to_memory(make: Make) -> None:
    one, other = (make(BY_NAME["llama-tied"], dtype).adapter_dir for dtype in (torch.bfloat16, torch.float16))
    first = findings(diff(one, other, threads=1))
    assert first.changed
    assert findings(diff(one, other, threads=3)) == first
    with pytest.raises(UsageError):
        diff(one, other, memory=1 << 20)


def test_an_adapter_and_a_checkpoint_are_not_compared(make: Make) -> None:
    made = make(BY_NAME["llama-tied"], torch.bfloat16)
    for a, b in ((made.base_dir, made.adapter_dir), (made.adapter_dir, made.base_dir)):
        with pytest.raises(UsageError) as caught:
            diff(a, b)
        assert "adapter" in str(caught.value.found)
    with pytest.raises(UsageError):
        diff(made.base_dir, made.base_dir / "nowhere")
