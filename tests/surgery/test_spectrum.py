"""Singular values from factors against dense matrices in float64, PEFT's own changes, known spectra, and laws."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import kinds
import pytest
import torch
from kinds import SCALE, gaussian
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tiny import write_adapter
from torch import Tensor, nn
from worker_world import SHARED, Patch, go

from lora_cli.adapters.adapter import Adapter, Scale, Target
from lora_cli.adapters.deltas import LowRank
from lora_cli.adapters.formats import open_adapter
from lora_cli.adapters.source import ReadOptions, look_at_adapter
from lora_cli.errors import NumericError, UnsupportedError, UsageError
from lora_cli.progress import SILENT, Progress
from lora_cli.surgery import spectrum
from lora_cli.surgery.inspect import inspect
from lora_cli.surgery.placing import PlanOptions
from lora_cli.surgery.spectrum import AdapterSpectrum, ModuleSpectrum, adapter_spectrum

PREFIX = "base_model.model."


def found_in(path: Path, **options: Any) -> AdapterSpectrum:
    found = inspect(path, options=PlanOptions(read=ReadOptions(**options)), spectrum=True).spectrum
    assert found is not None
    return found


def spectra(path: Path, **options: Any) -> dict[str, ModuleSpectrum]:
    return {module.module: module for module in found_in(path, **options).modules}


def of_factors(folder: Path, b: Tensor, a: Tensor, *, alpha: float = 1.0, **config: Any) -> ModuleSpectrum:
    """The spectrum of one module; scale alpha / rank."""
    rank = a.shape[0]
    tensors = {f"{PREFIX}x.lora_A.weight": a.contiguous(), f"{PREFIX}x.lora_B.weight": b.contiguous()}
    write_adapter(folder, {}, r=rank, lora_alpha=alpha, **config)
    save_file(tensors, folder / "adapter_model.safetensors")
    (only,) = spectra(folder).values()
    return only


def is_that_of(found: ModuleSpectrum, delta: Tensor) -> bool:
    """Whether it is the spectrum of a dense change, or of each matrix of a dense stack."""
    matrices = list(delta) if found.stack else [delta.flatten(1)]
    if len(found.values) != len(matrices) or found.norm != pytest.approx(float(delta.norm()), rel=1e-13):
        return False
    for values, matrix in zip(found.values, matrices, strict=True):
        dense = torch.linalg.svdvals(matrix)
        mine = torch.tensor(values, dtype=torch.float64)
        if len(mine) != min(found.rank, *matrix.shape):
            return False
        off = torch.cat([mine - dense[: len(mine)], dense[len(mine) :]]).abs()
        if float(off.max()) > 1e-14 * float(dense[0]) or found.largest < float(mine[0]):
            return False
    return found.largest == max(values[0] for values in found.values)


# Against dense matrices


@pytest.mark.parametrize("make", kinds.CASES.values(), ids=kinds.CASES.keys())
def test_every_kind_of_factors_has_the_spectrum_of_its_dense_change(make: Any, tmp_path: Path) -> None:
    case = make()
    base, adapters = case.write(tmp_path)
    found = spectra(adapters[0] if adapters else base, scale=SCALE)
    named = {module.removeprefix("lora_model."): one for module, one in found.items()}
    assert sorted(named) == sorted(key.removesuffix(".weight") for key in case.deltas)
    for key, delta in case.deltas.items():
        assert is_that_of(named[key.removesuffix(".weight")], delta), key


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(30, 12)
        self.up = nn.Linear(12, 20)
        self.narrow = nn.Linear(20, 3)
        self.conv = nn.Conv2d(4, 9, 3)


def test_what_peft_saves_has_the_spectrum_of_what_peft_would_add(tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = LoraConfig(
        r=5,
        lora_alpha=7,
        use_rslora=True,
        target_modules=["emb", "up", "narrow", "conv"],
        rank_pattern={"up": 3},
        alpha_pattern={"conv": 2},
    )
    model: Any = get_peft_model(Net(), config)
    for parameter in model.parameters():
        nn.init.normal_(parameter.data)
    with warnings.catch_warnings():  # it may be told that it cannot look for a base on the Hub
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path, save_embedding_layers=False)
    found = spectra(tmp_path)
    assert sorted(found) == ["conv", "emb", "narrow", "up"]
    for name, one in found.items():
        layer = getattr(model.base_model.model, name)
        assert is_that_of(one, layer.double().get_delta_weight("default").detach()), name
    assert found["up"].rank == 3
    assert len(found["narrow"].values[0]) == 3 < found["narrow"].rank


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(("out", "inner", "rank"), [(17, 11, 4), (6, 40, 6), (5, 40, 9), (7, 5, 12), (9, 9, 1)])
def test_ranks_up_to_the_sides_and_above(out: int, inner: int, rank: int, dtype: torch.dtype, tmp_path: Path) -> None:
    b, a = gaussian(1, out, rank, dtype=dtype), gaussian(2, rank, inner, dtype=dtype)
    assert is_that_of(of_factors(tmp_path, b, a, alpha=3.0), 3.0 / rank * b.double() @ a.double())


def test_a_change_too_large_to_be_formed_has_a_spectrum(tmp_path: Path) -> None:
    """300 000 × 300 000 would be 720 GB."""
    b, a = torch.zeros(300_000, 2), torch.zeros(2, 300_000)
    b[0, 0] = b[299_999, 1] = a[1, 5] = 1.0
    a[0, 77] = 4.0
    assert of_factors(tmp_path, b, a, alpha=2.0).values == ((4.0, 1.0),)


# Known spectra


def hadamard(order: int) -> Tensor:
    """A matrix of ±1 with orthogonal rows: `order` is a power of two."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < order:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


def with_spectrum(values: list[float]) -> tuple[Tensor, Tensor]:
    """Factors, exact in float64 for short numbers, whose product has these singular values."""
    rank = len(values)
    h = hadamard(64)
    return h[:, :rank] * torch.tensor(values, dtype=torch.float64) / 64, h[:rank]


def test_a_known_spectrum_is_found_to_the_last_digits(tmp_path: Path) -> None:
    values = [9.0, 7.0, 7.0, 1.0, 2.0**-10, 2.0**-30]
    found = of_factors(tmp_path, *with_spectrum(values), alpha=6.0)
    assert found.values[0] == pytest.approx(values, rel=0, abs=3e-14)  # 1e-15 of the norms of both factors
    assert found.norm == pytest.approx(math.hypot(*values), rel=1e-14)
    assert found.largest == found.values[0][0]


SUMMARIES: Mapping[str, tuple[list[float], tuple[int, int, float, float]]] = {
    "one": ([3.0], (1, 1, 1.0, 1.0)),
    "flat": ([2.0] * 10, (9, 10, 10.0, 10.0)),
    "one direction of four": ([5.0, 0.0, 0.0, 0.0], (1, 1, 1.0, 1.0)),
    # Energies 81, 9, 9, 1: shares of the sum of values 9/16, 3/16, 3/16, 1/16.
    "steps": (
        [9.0, 3.0, 3.0, 1.0],
        (2, 3, 100 / 81, math.exp(-sum(p * math.log(p) for p in (9 / 16, 3 / 16, 3 / 16, 1 / 16)))),
    ),
}


@pytest.mark.parametrize(("values", "expected"), SUMMARIES.values(), ids=SUMMARIES.keys())
@pytest.mark.parametrize("size", [1.0, 1e-170, 1e150])
def test_what_a_spectrum_comes_to(
    values: list[float], expected: tuple[int, int, float, float], size: float, tmp_path: Path
) -> None:
    """However small or large: squares of these would vanish, or overflow."""
    b, a = with_spectrum(values)
    found = of_factors(tmp_path, b * size, a, alpha=len(values))
    assert (found.rank_90, found.rank_99) == expected[:2]
    assert (found.stable_rank, found.effective_rank) == pytest.approx(expected[2:], rel=1e-12)
    assert found.norm == pytest.approx(math.hypot(*values) * size, rel=1e-13)


def test_the_rank_for_a_share_of_the_energy_is_that_of_the_best_approximation(tmp_path: Path) -> None:
    b, a = gaussian(3, 40, 12, dtype=torch.float64), gaussian(4, 12, 30, dtype=torch.float64)
    b = b * torch.logspace(0, -2, 12, dtype=torch.float64)
    found = of_factors(tmp_path, b, a, alpha=12.0)
    u, s, v = torch.linalg.svd(b @ a, full_matrices=False)
    for share, rank in ((0.9, found.rank_90), (0.99, found.rank_99)):
        lost = [float((b @ a - u[:, :k] * s[:k] @ v[:k]).norm()) ** 2 / found.norm**2 for k in (rank - 1, rank)]
        assert lost[1] <= 1 - share < lost[0]


def test_factors_of_zeros_change_nothing(tmp_path: Path) -> None:
    found = of_factors(tmp_path, torch.zeros(6, 3), gaussian(1, 3, 8))
    assert found.values == ((0.0, 0.0, 0.0),)
    sums = (found.norm, found.largest, found.share, found.rank_90, found.rank_99, found.stable_rank)
    assert (*sums, found.effective_rank) == (0,) * 7


def test_factors_that_are_a_rank_short_have_nothing_but_rounding_there(tmp_path: Path) -> None:
    b, a = gaussian(1, 30, 4), gaussian(2, 4, 20)
    b[:, 3] = b[:, 0] + b[:, 1]
    found = of_factors(tmp_path, b, a, alpha=4.0)
    assert is_that_of(found, b.double() @ a.double())
    assert found.values[0][3] < 1e-6 * found.values[0][2]  # the sum of two columns was rounded to float32
    assert found.rank_99 <= 3


# Laws


def test_twice_the_alpha_is_twice_the_spectrum_bit_for_bit(tmp_path: Path) -> None:
    b, a = gaussian(1, 30, 5), gaussian(2, 5, 20)
    once, twice = of_factors(tmp_path, b, a, alpha=5.0), of_factors(tmp_path, b, a, alpha=10.0)
    assert twice.values[0] == tuple(2 * value for value in once.values[0])
    assert (twice.norm, twice.largest) == (2 * once.norm, 2 * once.largest)
    assert (twice.rank_90, twice.stable_rank, twice.effective_rank) == (
        once.rank_90,
        once.stable_rank,
        once.effective_rank,
    )


def test_changes_of_other_inputs_and_outputs_keep_their_spectra_side_by_side(tmp_path: Path) -> None:
    (b, a), (d, c) = with_spectrum([5.0, 2.0]), with_spectrum([3.0, 1.0, 0.5])
    found = of_factors(tmp_path, torch.block_diag(b, d), torch.block_diag(a, c), alpha=5.0)
    assert found.values[0] == pytest.approx((5.0, 3.0, 2.0, 1.0, 0.5), rel=1e-14)


def test_a_turned_change_and_other_factors_of_it_have_the_same_spectrum(tmp_path: Path) -> None:
    b, a = gaussian(1, 30, 5, dtype=torch.float64), gaussian(2, 5, 20, dtype=torch.float64)
    mix = torch.linalg.qr(gaussian(3, 5, 5, dtype=torch.float64)).Q
    expected = of_factors(tmp_path, b, a).values[0]
    for other in ((a.T, b.T), (b @ mix, mix.T @ a)):
        assert of_factors(tmp_path, *other).values[0] == pytest.approx(expected, rel=1e-13)


# Stacks, biases, lengths


def test_a_stack_is_summed_up_as_the_matrices_lie_along_a_diagonal(tmp_path: Path) -> None:
    case = kinds.stack()
    base, _ = case.write(tmp_path)
    (one,) = spectra(base, scale=SCALE).values()
    dense = torch.block_diag(*case.deltas["moe.up.weight"])
    assert sorted((v for matrix in one.values for v in matrix), reverse=True) == pytest.approx(
        torch.linalg.svdvals(dense)[: 5 * 3].tolist(), rel=1e-12
    )
    assert (one.stack, one.rank, one.shape) == (5, 3, (7, 12))
    mean = torch.tensor(one.values, dtype=torch.float64).square().mean(0)
    assert one.profile == pytest.approx(mean.sqrt().tolist(), rel=1e-14)
    assert one.stable_rank == pytest.approx(float(mean.sum() / mean[0]))
    kept = mean.cumsum(0) / mean.sum()
    assert (one.rank_90, one.rank_99) == (int((kept < 0.9).sum()) + 1, int((kept < 0.99).sum()) + 1)


def test_shares_of_the_energy_add_up_and_biases_have_theirs(tmp_path: Path) -> None:
    tensors = {}
    for at, name in enumerate(("x", "y")):
        tensors[f"{PREFIX}{name}.lora_A.weight"] = gaussian(at, 2, 6)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = gaussian(at + 5, 8, 2)
        tensors[f"{PREFIX}{name}.lora_B.bias"] = gaussian(at + 9, 8)
    write_adapter(tmp_path, {}, r=2, lora_alpha=3, lora_bias=True)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    whole = found_in(tmp_path)
    found = {module.module: module for module in whole.modules}
    assert sorted(found) == ["x", "x.bias", "y", "y.bias"]
    bias = tensors[f"{PREFIX}y.lora_B.bias"].double()
    assert found["y.bias"].values[0] == pytest.approx([1.5 * float(bias.norm())])
    assert whole.norm == pytest.approx(math.hypot(*(module.norm for module in found.values())))
    for module in found.values():
        assert module.share == pytest.approx(module.norm**2 / whole.norm**2)


def test_of_dora_it_is_the_spectrum_of_the_change_before_lengths_and_says_so(tmp_path: Path) -> None:
    tensors = {"x.lora_A": gaussian(1, 3, 9), "x.lora_B": gaussian(2, 7, 3), "m": gaussian(3, 7)}
    save_file(tensors, tmp_path / "a.safetensors")
    adapter = open_adapter(tmp_path / "a.safetensors", ReadOptions(scale=1.0))
    m = look_at_adapter(tmp_path / "a.safetensors").tensors["m"]
    a, b = adapter.targets[0].delta.tensors
    target = Target("x", "weight", LowRank(a, b, Scale(2.0, None, False, ""), magnitude=m))
    made = Adapter("a", tmp_path, "plain", "", (target,))
    (one,) = adapter_spectrum(made, SILENT, scaled=True).modules
    assert one.magnitude
    assert is_that_of(one, 2.0 * tensors["x.lora_B"].double() @ tensors["x.lora_A"].double())
    (plain,) = adapter_spectrum(adapter, SILENT, scaled=True).modules
    assert not plain.magnitude


# What it is asked of


def test_without_a_scale_it_is_the_spectrum_of_the_product(tmp_path: Path) -> None:
    b, a = gaussian(1, 9, 2), gaussian(2, 2, 5)
    save_file({"x.lora_A": a, "x.lora_B": b}, tmp_path / "a.safetensors")
    unknown, said = found_in(tmp_path / "a.safetensors"), found_in(tmp_path / "a.safetensors", alpha=6)
    assert (unknown.scaled, said.scaled) == (False, True)
    assert is_that_of(unknown.modules[0], b.double() @ a.double())
    assert is_that_of(said.modules[0], 3.0 * b.double() @ a.double())


def test_it_is_made_where_it_is_asked_for_alone(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    assert inspect(tmp_path).spectrum is None
    assert len(found_in(tmp_path).modules) == 4


def test_a_checkpoint_without_factors_or_without_their_scale_has_none(tmp_path: Path) -> None:
    base, _ = kinds.from_scratch().write(tmp_path / "plain")
    with pytest.raises(UsageError, match="this checkpoint holds none"):
        found_in(base)
    wrapped, _ = kinds.wrapped().write(tmp_path / "wrapped")
    with pytest.raises(UsageError, match="how strong"):
        found_in(wrapped)
    (wrapped / "lora_wrap.json").write_text(
        json.dumps({"schema": "lora-cli/wrap/1", "rank": 2, "alpha": 2 * SCALE, "scaling": "alpha/rank"})
    )
    assert found_in(wrapped) == found_in(wrapped, scale=SCALE)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
def test_a_broken_factor_is_named(broken: float, factor: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {"x.lora_A": gaussian(1, 2, 5), "x.lora_B": gaussian(2, 9, 2)}
    tensors[f"x.{factor}"][1, 1] = broken
    save_file({key: tensor.to(dtype) for key, tensor in tensors.items()}, tmp_path / "a.safetensors")
    with pytest.raises(NumericError) as caught:
        found_in(tmp_path / "a.safetensors", scale=1.0)
    assert (caught.value.file, caught.value.tensor) == ("a.safetensors", f"x.{factor}")
    assert caught.value.found == f"1 of {tensors[f'x.{factor}'].numel()} values"


def test_factors_that_are_no_floating_numbers_are_refused(tmp_path: Path) -> None:
    tensors = {"x.lora_A": gaussian(1, 2, 5), "x.lora_B": gaussian(2, 9, 2).to(torch.int8)}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UnsupportedError) as caught:
        found_in(tmp_path / "a.safetensors", scale=1.0)
    assert (caught.value.tensor, caught.value.found) == ("x.lora_B", "I8")


def test_a_product_that_overflows_is_named(tmp_path: Path) -> None:
    b, a = gaussian(1, 9, 2, dtype=torch.float64), gaussian(2, 2, 5, dtype=torch.float64)
    with pytest.raises(NumericError, match="overflows") as caught:
        of_factors(tmp_path, b * 1e200, a * 1e200)
    assert caught.value.tensor == "x.weight"


# Many modules


@pytest.mark.parametrize("way", SHARED)
def test_no_number_depends_on_how_the_work_is_shared(way: str, tmp_path: Path, monkeypatch: Patch) -> None:
    adapter = open_adapter(write_adapter(tmp_path))
    inline = adapter_spectrum(adapter, SILENT, scaled=True)
    go(monkeypatch, way)
    monkeypatch.setattr("lora_cli.surgery.workers.SHARE", 1)
    monkeypatch.setattr(spectrum, "_UNIT_BYTES", 1)
    monkeypatch.setattr(spectrum, "default_threads", lambda: 3)
    assert adapter_spectrum(adapter, SILENT, scaled=True) == inline


@pytest.mark.parametrize("unit", [1, 1 << 20])
def test_progress_adds_up(unit: int, tmp_path: Path, monkeypatch: Patch) -> None:
    adapter = open_adapter(write_adapter(tmp_path))
    monkeypatch.setattr(spectrum, "_UNIT_BYTES", unit)
    total, steps = [], []

    class Heard(Progress):
        def begin(self, label: str, total_bytes: int) -> None:
            total.append(total_bytes)

        def advance(self, done_bytes: int) -> None:
            steps.append(done_bytes)

    adapter_spectrum(adapter, Heard(), scaled=True)
    assert total == [sum(steps)] == [sum(tensor.nbytes for tensor in adapter.tensors)]
    assert len(steps) == (4 if unit == 1 else 1)
