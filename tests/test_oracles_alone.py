"""The oracles against each other: PEFT's merge and the float64 reference agree, and reject wrong merges.

Nothing of `lora_cli` is used here. A comparison that cannot fail proves nothing: each is also shown to fail.
"""

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from float_reference import (
    SABOTAGES,
    Array,
    Term,
    assert_within_bound,
    balance,
    honest,
    one_element_off,
    product_bound,
    stacked,
    to_float64,
    transposed,
    ulp,
    working_type,
)
from models import (
    CASES,
    DTYPES,
    EVERY,
    Case,
    Made,
    Make,
    assert_merged,
    assert_same_bits,
    assert_same_logits,
    logits,
    make_case,
    make_minilm,
    maker,
    minilm,
    write_reference,
)

BY_NAME = {case.name: case for case in CASES}


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    return maker(tmp_path_factory)


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_minilm(tmp_path_factory)


def is_rejected(merged: torch.Tensor, base: torch.Tensor, terms: list[Term], *, by_peft: bool) -> bool:
    try:
        assert_within_bound(merged, base, terms, float32_product=by_peft)
    except AssertionError:
        return True
    return False


def is_matrix(tensor: torch.Tensor) -> bool:
    return tensor.ndim == 2 and min(tensor.shape) > 1


# PEFT, the reference and the bound


@pytest.mark.parametrize(("case", "dtype"), EVERY)
def test_peft_merges_within_the_bound(make: Make, case: Case, dtype: torch.dtype) -> None:
    made = make(case, dtype)
    assert made.targets
    assert_merged(made, made.peft_tensors(), by_peft=True)


@pytest.mark.parametrize(("case", "dtype"), EVERY)
def test_every_wrong_merge_of_every_target_is_rejected(make: Make, case: Case, dtype: torch.dtype) -> None:
    made = make(case, dtype)
    base = made.base_tensors()
    for key, terms in made.terms().items():
        assert_within_bound(honest(base[key], terms), base[key], terms, key=key)
        for sabotage in SABOTAGES:
            if sabotage is transposed and not is_matrix(base[key]):
                continue  # reshaping it changes nothing
            wrong = sabotage(base[key], terms)
            assert is_rejected(wrong, base[key], terms, by_peft=False), (key, sabotage.__name__)
            # What PEFT is allowed in float32 is more than two ULPs of a weight.
            if sabotage is not one_element_off:
                assert is_rejected(wrong, base[key], terms, by_peft=True), (key, sabotage.__name__)


@pytest.mark.parametrize("name", ["bert-mlm", "bert-classifier"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_that_are_not_added_to_are_compared_bit_by_bit(make: Make, name: str, dtype: torch.dtype) -> None:
    made = make(BY_NAME[name], dtype)
    right = made.peft_tensors()
    key = next(iter(made.replaced.values()))
    untouched = next(key for key in right if "position_embeddings" in key)
    last_bit = right[untouched].clone()
    last_bit.view(torch.uint8)[0, 0] ^= 1
    wrongs = {
        "a tensor lost": {other: tensor for other, tensor in right.items() if other != untouched},
        "a tensor added": right | {"new.weight": right[key]},
        "replaced by something else": right | {key: right[key] + 1},
        "untouched, yet changed": right | {untouched: last_bit},
    }
    for wrong in wrongs.values():
        with pytest.raises(AssertionError):
            assert_merged(made, wrong, by_peft=True)


# Logits


@pytest.mark.parametrize(("case", "dtype"), EVERY)
def test_logits_tell_merged_from_base(make: Make, case: Case, dtype: torch.dtype) -> None:
    made = make(case, dtype)
    assert_same_logits(made, logits(case, made.peft_dir))
    with pytest.raises(AssertionError):
        assert_same_logits(made, logits(case, made.base_dir))


@pytest.mark.parametrize(("case", "dtype"), EVERY)
def test_a_folder_with_the_names_of_the_base_loads(make: Make, case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    """Where PEFT's names are not the base's (bare backbones) transformers finds its way from both."""
    made = make(case, dtype)
    assert_same_logits(made, logits(case, write_reference(made, tmp_path / "merged")))


# The catalogue


def test_the_catalogue_covers_what_it_promises(make: Make) -> None:
    covered = Counter(feature for case in CASES for feature in case.features)
    once = {
        "rslora",
        "rank_pattern",
        "alpha_pattern",
        "lora_bias",
        "bias=all",
        "bias=lora_only",
        "modules_to_save",
    }
    once |= {
        "fan_in_fan_out",
        "init_lora_weights",
        "regex",
        "tied",
        "untied",
        "bare",
        "moe",
        "unknown tensors",
    }
    assert once <= set(covered)
    for case in CASES:
        made = make(case, torch.float32)
        files, base = list(made.base_dir.glob("*.safetensors")), made.base_tensors()
        assert sum(file.stat().st_size for file in files) < 20_000_000
        assert (len(files) > 1) == ("shards" in case.features)
        tiles = max(base[target.key].numel() for target in made.targets) / 2**16
        assert (tiles > 5 and tiles % 1 > 0) == ("big" in case.features)
        assert any(target.transposed for target in made.targets) == ("fan_in_fan_out" in case.features)
        assert any(target.a is None for target in made.targets) == ("lora_bias" in case.features)


def test_the_first_pattern_that_matches_decides(make: Make) -> None:
    made = make(BY_NAME["llama-tied"], torch.bfloat16)
    adapter = made.adapter_tensors()
    found = {
        target.key.removeprefix("model.").removesuffix(".weight"): (adapter[target.a].shape[0], target.scale)
        for target in made.targets
        if target.a
    }
    assert found["layers.0.self_attn.v_proj"] == (5, 16 / 5)  # not 9, though that pattern says more
    assert found["layers.0.self_attn.q_proj"] == (12, 6 / 12)  # not 40: "q_proj" comes first in the file
    assert found["layers.1.self_attn.q_proj"] == (3, 6 / 3)
    assert found["layers.1.mlp.gate_proj"] == (8, 4 / 8)
    assert found["layers.1.mlp.down_proj"] == (8, 16 / 8)


def test_names_are_where_the_issue_is(make: Make) -> None:
    """The cases that exist for their names have them."""
    bare = make(BY_NAME["gpt2-bare"], torch.float32)
    assert "h.1.attn.c_attn.weight" in bare.terms()
    assert "transformer.h.1.attn.c_attn.weight" in bare.names
    tied = make(BY_NAME["bert-mlm"], torch.float32)
    assert tied.replaced["base_model.model.cls.predictions.decoder.bias"] == "cls.predictions.bias"
    published = make(BY_NAME["bert-published"], torch.float32)
    assert set(published.base_tensors()) - set(published.peft_tensors()) > {"cls.predictions.bias"}
    experts = make(BY_NAME["qwen2-moe"], torch.float32)
    assert "model.layers.0.mlp.experts.2.gate_proj.weight" in experts.base_tensors()


def test_a_case_is_made_the_same_twice(make: Make, tmp_path: Path) -> None:
    for case in (BY_NAME["bert-classifier"], BY_NAME["llama-tied"]):
        first, second = make(case, torch.bfloat16), make_case(case, torch.bfloat16, tmp_path / case.name)
        for left, right in (
            (first.base_tensors(), second.base_tensors()),
            (first.adapter_tensors(), second.adapter_tensors()),
            (first.peft_tensors(), second.peft_tensors()),
        ):
            assert left.keys() == right.keys()
            for key, tensor in left.items():
                assert_same_bits(tensor, right[key], key)


# MiniLM


def test_minilm_merges_within_the_bound(real: Made) -> None:
    assert real.base_dir == minilm()
    assert json.loads((minilm() / "config.json").read_text())["architectures"] == ["BertModel"]
    assert len(real.targets) == 6 * 5  # query, value and three dense layers of each of six blocks
    assert_merged(real, real.peft_tensors(), by_peft=True)
    # A buffer of integers that today's class no longer has; a merge must keep it all the same.
    assert set(real.base_tensors()) - set(real.peft_tensors()) == {"embeddings.position_ids"}


def test_minilm_logits_tell_merged_from_base(real: Made) -> None:
    assert_same_logits(real, logits(real.case, real.peft_dir))
    with pytest.raises(AssertionError):
        assert_same_logits(real, logits(real.case, real.base_dir))


# The bound itself


def every_value(dtype: torch.dtype) -> torch.Tensor:
    """All finite, non-negative values of a 16-bit type, in order."""
    values = torch.arange(2**15, dtype=torch.int16).view(dtype)
    return values[values.isfinite()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ulp_is_the_distance_to_the_next_value(dtype: torch.dtype) -> None:
    values = to_float64(every_value(dtype))
    distances = np.diff(values)
    assert np.array_equal(ulp(values[:-1], dtype), distances)
    assert np.array_equal(ulp(-values[:-1], dtype), distances)


@pytest.mark.parametrize(("dtype", "name"), [(torch.float32, np.float32), (torch.float64, np.float64)])
def test_ulp_is_numpys_spacing(dtype: torch.dtype, name: type[np.floating[np.typing.NBitBase]]) -> None:
    powers = np.ldexp(1.0, np.arange(-140, 120))
    values = np.concatenate([powers, 1.5 * powers, np.zeros(1)]).astype(name)
    assert np.array_equal(ulp(values.astype(np.float64), dtype), np.spacing(values).astype(np.float64))


def rounded_rows(values: Array, bits: int) -> Array:
    """Each row on its own grid of `bits` bits: the exact product's way of making a float64 GEMM exact."""
    _, exponent = np.frexp(np.abs(values).max(axis=1, keepdims=True))
    return np.asarray(np.ldexp(np.rint(np.ldexp(values, bits - exponent)), exponent - bits))


def sliced_product(left: Array, right: Array, slices: int) -> Array:
    """The product of factors rounded to one or two slices, in the plainest words."""
    bits = (53 - math.ceil(math.log2(left.shape[1]))) // 2
    left, right = balance(left, right)
    high_left, high_right = rounded_rows(left, bits), rounded_rows(right.T, bits).T
    if slices == 1:
        return np.asarray(high_left @ high_right)
    low_left, low_right = rounded_rows(left - high_left, bits), rounded_rows((right - high_right).T, bits).T
    return np.asarray(high_left @ high_right + high_left @ low_right + low_left @ high_right)


def random_case(rank: int, spread: float, dtype: torch.dtype) -> tuple[torch.Tensor, list[Term]]:
    """A base and two adapters, one with the sizes of its factors the other way round."""
    generator = torch.Generator().manual_seed(rank)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    terms = [
        Term(b=normal(83, rank) * spread, a=normal(rank, 61), scale=0.7),
        Term(b=normal(61, rank), a=normal(rank, 83) * spread, scale=-1 / 3, transposed=True),
    ]
    return (normal(83, 61) * spread).to(dtype), terms


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [1.0, 1e-6])
@pytest.mark.parametrize("rank", [1, 2, 7, 16, 64, 300])
def test_the_prescribed_arithmetic_is_within_the_bound(rank: int, spread: float, dtype: torch.dtype) -> None:
    base, terms = random_case(rank, spread, dtype)
    work = working_type(dtype)
    product = sliced_product(*stacked(terms), slices=1 if work is torch.float32 else 2)
    merged = (base.to(work) + torch.from_numpy(product).to(work)).to(dtype)
    assert 0.5 < assert_within_bound(merged, base, terms) <= 1.0  # neither broken nor far from what it can be


@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("rank", [1, 2, 7, 16, 64, 300])
def test_the_product_stays_within_its_own_bound(rank: int, slices: int) -> None:
    left, right = stacked(random_case(rank, 1e-3, torch.float32)[1])
    exact = left.astype(np.longdouble) @ right.astype(np.longdouble)
    error = np.abs(sliced_product(left, right, slices) - exact).astype(np.float64)
    assert (error <= product_bound(left, right, slices)).all()


def test_the_bound_knows_nan_and_shape() -> None:
    base, terms = random_case(4, 1.0, torch.float32)
    merged = honest(base, terms)
    merged[5, 7] = math.nan
    with pytest.raises(AssertionError, match="row 5, column 7"):
        assert_within_bound(merged, base, terms)
    with pytest.raises(AssertionError, match="shape"):
        assert_within_bound(merged[1:], base, terms)
