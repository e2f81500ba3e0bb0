"""Merge, and unmerge with the undo file: whatever the numbers are, every byte of the base comes back."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CASES, DTYPE_NAMES, Case, Make, make_minilm, maker
from round_trips import (
    DTYPES,
    Array,
    any_patterns,
    edges,
    finite,
    from_patterns,
    gaussian,
    lora,
    patterns_of,
    round_trip,
    weights,
    write_adapter,
    write_base,
)

from lora_cli.arithmetic.rounding import cast
from lora_cli.errors import NumericError
from lora_cli.surgery.merge import merge
from lora_cli.surgery.placing import PlanOptions
from lora_cli.surgery.undo import codecs

RATIOS = (1e-4, 0.005, 0.05, 1.0, 10.0)
NARROW = [name for name, form in reference.FORMATS.items() if form.width <= 16]


def tensors_of_all_kinds(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Dense, half and nine tenths pruned, all -0.0, and numbers that are hardly there."""
    shape, kept = (60, 44), torch.rand((60, 44), generator=torch.Generator().manual_seed(9))
    dense, zeros = gaussian(1, *shape, dtype=dtype), torch.where(kept < 0.7, 0.0, -0.0).to(dtype)
    tensors = {"dense": dense, "half": torch.where(kept < 0.5, dense, zeros)}
    tensors |= {"tenth": torch.where(kept < 0.1, dense, zeros), "zeros": torch.full(shape, -0.0).to(dtype)}
    least = max(torch.finfo(dtype).smallest_normal, 1e-290)
    return tensors | {"subnormal": gaussian(2, *shape, std=least, dtype=dtype)}


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("name", DTYPES)
def test_any_strength_on_weights_of_any_kind(tmp_path: Path, name: str, ratio: float) -> None:
    tensors = tensors_of_all_kinds(DTYPES[name])
    factors: dict[str, torch.Tensor] = {}
    for seed, (key, tensor) in enumerate(tensors.items(), start=20):
        size = float(tensor.double().std()) or 1.0
        factors |= lora(seed, key, *tensor.shape, std=ratio * size, dtype=torch.float64)
    base = write_base(tmp_path / "base", {f"{key}.weight": tensor for key, tensor in tensors.items()})
    adapter = write_adapter(tmp_path / "adapter", factors)
    trip = round_trip(tmp_path, base, [adapter], threads=2)
    assert trip.there.tensors["edited"] == len(tensors)


def every_value(name: str) -> Array:
    """Patterns of all numbers of a narrow type; of a wide one those where something ends, and some others."""
    form = reference.FORMATS[name]
    if form.width <= 16:
        magnitudes = np.arange(form.largest_pattern + 1, dtype=np.uint64)
        return np.concatenate([magnitudes, magnitudes | np.uint64(form.sign)])
    some = finite(any_patterns(np.random.default_rng(1), name, 4000), name, float(torch.finfo(DTYPES[name]).max))
    return np.concatenate([edges(name), some])


@pytest.mark.parametrize("name", DTYPES)
def test_every_value_with_deltas_of_every_size(tmp_path: Path, name: str) -> None:
    form, dtype, patterns = reference.FORMATS[name], DTYPES[name], every_value(name)
    largest, spacing = float(torch.finfo(dtype).max), 2.0 ** (-form.fraction_bits)
    least = max(torch.finfo(dtype).smallest_normal * spacing, 2.0**-300)
    deltas = {"low": [0.0, least, -least / 2, 3 * least, 2**-9, 0.3, -1.0, 17.0, -spacing, spacing / 2, 1.5]}
    deltas["high"] = [largest / 16, -largest / 24, largest * spacing / 9, -largest * spacing / 2, largest * spacing]
    tensors, factors = {}, {}
    values = from_patterns(patterns, name).to(torch.float64).numpy()
    for key, added in deltas.items():
        with np.errstate(over="ignore"):
            fits = np.abs(values[:, None] + np.array(added)) <= largest
        assert fits.mean() > 0.8
        tensors[f"{key}.weight"] = from_patterns(np.where(fits, patterns[:, None], 0), name)
        factors[f"{key}.lora_A.weight"] = torch.tensor([added], dtype=torch.float64)
        factors[f"{key}.lora_B.weight"] = torch.ones(len(patterns), 1)
    base = write_base(tmp_path / "base", tensors)
    adapter = write_adapter(tmp_path / "adapter", factors, r=1, lora_alpha=1)
    round_trip(tmp_path, base, [adapter], threads=2)


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_tensors_of_any_bits(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    across = data.draw(st.lists(st.sampled_from([1.0, -0.5, 0.0, 2.0**-10]), min_size=columns, max_size=columns))
    tensors: dict[str, Any] = {}
    factors: dict[str, torch.Tensor] = {}

    def drawn(name: str, *shape: int) -> Array:
        width = reference.FORMATS[name].width // 8
        size = width * int(np.prod(shape))
        raw = data.draw(st.binary(min_size=size, max_size=size))
        return np.frombuffer(raw, f"<u{width}").astype(np.uint64).reshape(shape)

    for name, dtype in DTYPES.items():
        quarter = float(torch.finfo(dtype).max) / 4
        tensors[f"{name}.weight"] = from_patterns(finite(drawn(name, rows, columns), name, quarter), name)
        tensors[f"{name}.bits"] = from_patterns(drawn(name, rows), name)
        factors[f"{name}.lora_A.weight"] = torch.tensor([across])
        few = finite(drawn("float32", rows, 1), "float32", min(quarter, 2.0**120))
        factors[f"{name}.lora_B.weight"] = from_patterns(few, "float32")
    folder = tmp_path_factory.mktemp("any")
    adapter = write_adapter(folder / "adapter", factors, r=1, lora_alpha=1)
    embed = data.draw(st.booleans())
    base = write_base(folder / "base", tensors, data.draw(st.integers(1, 3)))
    round_trip(folder, base, [adapter], given=[] if embed else [adapter], embed=embed, changes=False)
    shutil.rmtree(folder)


# Several adapters, other types, whole tensors


@pytest.mark.parametrize("said", [(0.7, -0.3, 0.0), (-1.0, 2.0, 1e-3), (0.0, 0.0, 0.0)])
@pytest.mark.parametrize("name", DTYPES)
def test_several_adapters_with_weights(tmp_path: Path, name: str, said: tuple[float, ...]) -> None:
    tensors = {f"{key}.weight": gaussian(n, 60, 44, dtype=DTYPES[name]) for n, key in enumerate("xyz")}
    base = write_base(tmp_path / "base", tensors, 2)
    factors = [lora(1, "x", 60, 44), lora(3, "x", 60, 44) | lora(5, "y", 60, 44, std=1), lora(7, "z", 60, 44)]
    adapters = [write_adapter(tmp_path / str(number), tensors) for number, tensors in enumerate(factors)]
    options = PlanOptions(weights=said)
    trip = round_trip(tmp_path, base, adapters, options, given=adapters[::-1], changes=any(said))
    assert any(said) or weights(trip.merged) == weights(base)


CASTS = [("float32", "bf16"), ("bfloat16", "fp32"), ("float16", "bf16"), ("bfloat16", "fp16"), ("float32", "fp16")]
CASTS += [("float64", "bf16"), ("float64", "fp32"), ("float16", "fp32")]
OUTPUTS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def that_can_be_cast(name: str, out: torch.dtype, *shape: int) -> torch.Tensor:
    """Any bits but numbers that are too large for the other type: NaN and infinities of all kinds among them."""
    patterns = any_patterns(np.random.default_rng(3), name, *shape)
    wide = from_patterns(patterns, name).to(torch.float64).numpy()
    lost = np.isfinite(wide) & (np.abs(wide) > float(torch.finfo(out).max))
    return from_patterns(np.where(lost, patterns & ~np.uint64(reference.FORMATS[name].sign >> 1), patterns), name)


@pytest.mark.parametrize("ratio", [0.005, 10.0])
@pytest.mark.parametrize(("name", "output"), CASTS)
def test_a_merge_that_changes_the_type(tmp_path: Path, name: str, output: str, ratio: float) -> None:
    out = OUTPUTS[output]
    bits = any_patterns(np.random.default_rng(3), "float8_e4m3fn", 500)
    tensors: dict[str, Any] = tensors_of_all_kinds(DTYPES[name])
    factors = {key: t for n, name_ in enumerate(tensors) for key, t in lora(n, name_, 60, 44, std=ratio).items()}
    tensors = {f"{key}.weight": tensor for key, tensor in tensors.items()}
    tensors |= {"cast": that_can_be_cast(name, out, 70, 33), "one": that_can_be_cast(name, out, 1).view(())}
    tensors |= {"none": torch.empty(0, 3, dtype=DTYPES[name]), "same": gaussian(7, 9, 9, dtype=out)}
    tensors |= {"eight": from_patterns(bits, "float8_e4m3fn"), "int": ("I32", [3], b"0123456789ab")}
    base, adapter = write_base(tmp_path / "base", tensors, 2), write_adapter(tmp_path / "adapter", factors)
    trip = round_trip(tmp_path, base, [adapter], PlanOptions(dtype=output), threads=2)
    assert not torch.isfinite(tensors["cast"]).all()
    assert (trip.merged / "config.json").read_bytes() != (base / "config.json").read_bytes()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("output", ["keep", "fp32"])
def test_what_is_no_number_and_takes_a_delta_is_refused(tmp_path: Path, output: str, value: float) -> None:
    values = gaussian(1, 60, 44, dtype=torch.bfloat16)
    values[7, 9] = value
    base = write_base(tmp_path / "base", {"x.weight": values})
    adapter = write_adapter(tmp_path / "adapter", lora(1, "x", 60, 44))
    with pytest.raises(NumericError) as caught:
        merge(base, [adapter], tmp_path / "merged", PlanOptions(dtype=output))
    assert caught.value.exit_code == 22
    assert not (tmp_path / "merged").exists()


ODD_BITS = {"BOOL": 8, "F4": 4, "F6_E2M3": 6, "U8": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "I16": 16, "U32": 32, "C64": 64}


@pytest.mark.parametrize("output", ["keep", "fp32", "fp16"])
@pytest.mark.parametrize("name", DTYPES)
def test_tensors_that_are_replaced(tmp_path: Path, name: str, output: str) -> None:
    dtype, rng = DTYPES[name], np.random.default_rng(8)
    shape, whole = (40, 20), {f"whole.{kind}": (kind, [12, 4], rng.bytes(6 * bits)) for kind, bits in ODD_BITS.items()}
    other = {key: (kind, said, rng.bytes(len(data))) for key, (kind, said, data) in whole.items()}
    # What was there is gone from the output, and may have been anything.
    tensors: dict[str, Any] = {f"whole.{n}.weight": from_patterns(any_patterns(rng, name, *shape), name) for n in "abc"}
    tensors |= whole | {"x.weight": gaussian(1, 60, 44, dtype=dtype), "x.bias": gaussian(2, 60, dtype=dtype)}
    tensors |= {"ln.bias": from_patterns(any_patterns(rng, name, 7), name), "whole.one": gaussian(3, 1).view(())}
    tensors |= {"whole.none": torch.empty(3, 0, dtype=dtype)}
    factors: dict[str, Any] = lora(1, "x", 60, 44) | {"x.lora_B.bias": gaussian(3, 60), "ln.bias": gaussian(4, 7)}
    factors |= {"whole.a.weight": gaussian(5, *shape), "whole.b.weight": gaussian(6, *shape, dtype=dtype)}
    factors |= {"whole.c.weight": gaussian(7, *shape, dtype=torch.float64), "whole.one": gaussian(8, 1).view(())}
    factors |= other | {
        "whole.none": torch.empty(3, 0),
        "head.weight": gaussian(9, 3, 20),
        "head.n": other["whole.U32"],
    }
    base = write_base(tmp_path / "base", tensors, 3)
    config = {"modules_to_save": ["whole", "head"], "bias": "all", "lora_bias": True}
    trip = round_trip(
        tmp_path, base, [write_adapter(tmp_path / "adapter", factors, **config)], PlanOptions(dtype=output), threads=2
    )
    assert trip.there.ledger == {"applied": 3, "replaced": 6 + len(ODD_BITS), "added": 2, "ignored": 0}


def test_a_delta_on_a_tensor_that_another_adapter_replaces(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", {"x.weight": gaussian(1, 60, 44, dtype=torch.bfloat16)})
    whole = write_adapter(tmp_path / "whole", {"x.weight": gaussian(2, 60, 44)}, modules_to_save=["x"])
    delta = write_adapter(tmp_path / "delta", lora(3, "x", 60, 44))
    round_trip(tmp_path, base, [whole, delta], given=[delta])


# Trained adapters


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    return maker(tmp_path_factory)


ONE_TYPE_EACH = [(case, list(DTYPE_NAMES)[number % 3]) for number, case in enumerate(CASES)]


@pytest.mark.parametrize(("case", "dtype"), [pytest.param(case, dtype, id=case.name) for case, dtype in ONE_TYPE_EACH])
def test_trained_adapters(make: Make, case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    made = make(case, dtype)
    round_trip(tmp_path, made.base_dir, [made.adapter_dir], threads=2)


def test_minilm(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    real = make_minilm(tmp_path_factory)
    trip = round_trip(tmp_path, real.base_dir, [real.adapter_dir], lost=[".gitattributes"], threads=2)
    assert trip.there.undo is not None
    assert trip.there.undo.bytes < 0.01 * trip.there.bytes_written
    for folder in (trip.merged, trip.back):
        shutil.rmtree(folder)  # 90 MB each


# The codecs alone


@pytest.mark.parametrize("out", [*NARROW, "float32"])
@pytest.mark.parametrize("name", DTYPES)
def test_a_cast_block_comes_back_whatever_pattern_its_nans_have(name: str, out: str) -> None:
    base = that_can_be_cast(name, DTYPES[out], 3000)
    if out == "float8_e4m3fn":  # it has no infinity
        base = torch.where(torch.isinf(base.float()), torch.ones_like(base), base)
    merged = cast(base, torch.empty(len(base), dtype=DTYPES[out]))
    stream = codecs.Encoder("preimages").add(base, merged, codecs.Summand(), ends_block=True)
    assert stream is not None
    in_two = codecs.Encoder("preimages")
    assert in_two.add(base[:1001], merged[:1001], codecs.Summand(), ends_block=False) is None
    assert in_two.add(base[1001:], merged[1001:].clone(), codecs.Summand(), ends_block=True) == stream
    bits, form = patterns_of(merged), reference.FORMATS[out]
    # Other hardware, another pattern of the same kind.
    other = from_patterns(np.where(np.isnan(merged.float().numpy()), form.sign - 1, bits), out)
    for result in (merged, other):
        before = patterns_of(result)
        found = codecs.decode("preimages", result, codecs.Summand(), stream, torch.empty_like(base))
        assert np.array_equal(patterns_of(found), patterns_of(base))
        assert np.array_equal(patterns_of(result), before)
