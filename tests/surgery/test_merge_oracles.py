"""Merges of real models: equal to PEFT's within the bound, loadable, of the adapted model's logits, and verified.

What a merge writes is compared with oracles that share no code with it; what `verify` says is tried on wrong merges.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from float_reference import SABOTAGES, one_element_off, transposed
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
    read_tensors,
)

from lora_cli.errors import UnsupportedError
from lora_cli.surgery.merge import MergeResult, merge
from lora_cli.surgery.placing import PlanOptions
from lora_cli.surgery.verify import VerifyResult, verify

BY_NAME = {case.name: case for case in CASES}


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    return maker(tmp_path_factory)


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_minilm(tmp_path_factory)


def digests(folder: Path) -> dict[str, str]:
    """What every file of a folder holds; symbolic links are followed."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def check(made: Made, merged: Path, max_ulp: int = 0) -> VerifyResult:
    return verify(merged, made.base_dir, [made.adapter_dir], max_ulp=max_ulp)


def overwrite(folder: Path, key: str, tensor: torch.Tensor) -> None:
    """Put other bytes into a tensor of a folder; header and layout stay."""
    for file in folder.glob("*.safetensors"):
        raw = bytearray(file.read_bytes())
        start = 8 + int.from_bytes(raw[:8], "little")
        entry = json.loads(raw[8:start]).get(key)
        if entry is None:
            continue
        begin, end = (start + offset for offset in entry["data_offsets"])
        data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        assert len(data) == end - begin
        raw[begin:end] = data
        file.write_bytes(raw)
        return
    raise AssertionError(f"{key} is in no file")


def only_difference(result: VerifyResult) -> tuple[str, str]:
    """The one tensor that a verification names, and what is wrong with it."""
    assert not result.verified
    assert result.tensors["different"] == len(result.different) == 1
    return result.different[0].key, result.different[0].what


def in_memory(folder: Path) -> dict[str, torch.Tensor]:
    """Tensors that stay what they are when the files are overwritten."""
    return {key: tensor.clone() for key, tensor in read_tensors(folder).items()}


def is_matrix(tensor: torch.Tensor) -> bool:
    return tensor.ndim == 2 and min(tensor.shape) > 1


# The merge


def assert_accounted(made: Made, result: MergeResult) -> None:
    """Every adapter tensor stands in the ledger once, under what became of it, with the place it went to."""
    adapter, base = made.adapter_tensors(), made.base_tensors()
    factors = {name for name in adapter if ".lora_" in name}
    assert {entry.tensor for entry in result.entries if entry.outcome == "applied"} == factors
    went = {entry.tensor: entry.key for entry in result.entries}
    assert len(went) == len(result.entries) == len(adapter)
    assert {name: went[name] for name in made.replaced} == dict(made.replaced)
    for target in made.targets:
        assert went[target.b] == target.key
    new = {key for key in made.replaced.values() if key not in base}
    edited = {target.key for target in made.targets} | (set(made.replaced.values()) - new)
    assert result.tensors == {
        "total": len(base) + len(new),
        "edited": len(edited),
        "copied": len(base) - len(edited),
        "added": len(new),
        "dropped": 0,
    }


@pytest.mark.parametrize(("case", "dtype"), EVERY)
def test_a_merge_is_pefts_within_the_bound(make: Make, case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    made, merged = make(case, dtype), tmp_path / "merged"
    inputs = digests(made.base_dir), digests(made.adapter_dir)
    result = merge(made.base_dir, [made.adapter_dir], merged, threads=2)
    assert_merged(made, read_tensors(merged))
    assert_accounted(made, result)
    assert_same_logits(made, logits(case, merged))
    verified = check(made, merged)
    assert (verified.verified, verified.different) == (True, ())
    assert verified.tensors == {"checked": result.tensors["total"], "different": 0}
    assert (digests(made.base_dir), digests(made.adapter_dir)) == inputs
    written = [path.name for path in merged.iterdir()]
    assert sorted(written) == sorted(result.files)
    assert sum(path.stat().st_size for path in merged.iterdir()) == result.bytes_written


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_one_side_of_a_tie_that_was_trained_is_untied(tmp_path: Path, module: str) -> None:
    """R099: what is tied gets a tensor of its own where one side alone was trained."""

    def lora() -> Any:
        from peft import LoraConfig

        return LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=[module])

    case, merged = replace(BY_NAME["llama-tied"], name=f"llama-{module}", lora=lora), tmp_path / "merged"
    made = make_case(case, torch.float32, tmp_path / "case")
    with suppress(UnsupportedError):  # a refusal will do
        merge(made.base_dir, [made.adapter_dir], merged)
        assert_same_logits(made, logits(case, merged))
        assert json.loads((merged / "config.json").read_text())["tie_word_embeddings"] is False  # as PEFT writes it


# The verification


@pytest.mark.parametrize(("case", "dtype"), EVERY)
def test_wrong_merges_are_not_verified(make: Make, case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    made, wrong = make(case, dtype), tmp_path / "wrong"
    merge(made.base_dir, [made.adapter_dir], wrong, threads=2)
    base, merged, every = made.base_tensors(), in_memory(wrong), list(made.terms().items())
    for number, sabotage in enumerate(SABOTAGES):
        # Another target for each fault; a transposed vector is the same vector.
        targets = [(key, terms) for key, terms in every if sabotage is not transposed or is_matrix(base[key])]
        key, terms = targets[number % len(targets)]
        overwrite(wrong, key, sabotage(base[key], terms))
        assert only_difference(check(made, wrong)) == (key, "values"), sabotage.__name__
        # PEFT is allowed one unit; the least fault of all is two units of the result, not of the larger addend.
        if sabotage is not one_element_off:
            assert not check(made, wrong, max_ulp=1).verified, sabotage.__name__
        overwrite(wrong, key, merged[key])
    assert check(made, wrong).verified


@pytest.mark.parametrize("name", ["bert-mlm", "bert-published"])  # one replaces tensors, the other adds some
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_bit_anywhere_is_a_difference(make: Make, name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    made, wrong = make(BY_NAME[name], dtype), tmp_path / "wrong"
    merge(made.base_dir, [made.adapter_dir], wrong)
    tensors, terms = in_memory(wrong), made.terms()
    replaced = next(iter(made.replaced.values()))
    untouched = next(key for key in tensors if key not in terms and key not in made.replaced.values())
    for key in (next(iter(terms)), replaced, untouched):
        for at in (0, tensors[key].nbytes - tensors[key].itemsize):
            other = tensors[key].clone()
            other.view(-1).view(torch.uint8)[at] ^= 1  # the last bit of the first or last element
            overwrite(wrong, key, other)
            result = check(made, wrong)
            assert only_difference(result) == (key, "values")
            assert (result.different[0].elements, result.different[0].max_ulp) == (1, 1)
        overwrite(wrong, key, tensors[key])
    assert check(made, wrong).verified


def test_other_inputs_are_not_verified(make: Make, tmp_path: Path) -> None:
    made, merged = make(BY_NAME["llama-tied"], torch.bfloat16), tmp_path / "merged"
    merge(made.base_dir, [made.adapter_dir], merged, PlanOptions(weights=(0.5,)))
    adapters = [made.adapter_dir]
    changed = {target.key for target in made.targets}
    assert verify(merged, made.base_dir, adapters, PlanOptions(weights=(0.5,))).verified
    # A strength that is off by 0.2 % moves no weight by more than a unit, and a few by one.
    for other, units in ((1.0, 1), (0.0, 1), (0.6, 1), (-0.5, 1), (0.501, 0)):
        result = verify(merged, made.base_dir, adapters, PlanOptions(weights=(other,)), max_ulp=units)
        assert {difference.key for difference in result.different} == changed
    assert {difference.key for difference in verify(made.base_dir, made.base_dir, adapters).different} == changed
    assert not verify(merged, merged, adapters, PlanOptions(weights=(0.5,))).verified  # twice


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama-tied", "llama-untied", "gpt2", "bert-mlm", "t5", "qwen2-moe"])
def test_what_peft_merged_is_verified_within_one_unit(make: Make, name: str, dtype: torch.dtype) -> None:
    made = make(BY_NAME[name], dtype)
    result = check(made, made.peft_dir, max_ulp=1)
    if (name, dtype) == ("t5", torch.float16):
        # Its class keeps `wo` in float32 whatever the file has; nothing else may differ.
        assert {(d.what, d.expected, d.found, d.key.endswith("wo.weight")) for d in result.different} == {
            ("dtype", "F16", "F32", True)
        }
    else:
        assert (result.verified, result.different) == (True, ())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama-tied", "llama-untied", "gpt2", "bert-mlm", "t5", "qwen2-moe"])
def test_hardly_a_weight_that_peft_merged_differs(make: Make, name: str, dtype: torch.dtype) -> None:
    """PEFT rounds the change before it adds it: fewer than one weight in a thousand is another one, by one unit."""
    made = make(BY_NAME[name], dtype)
    base, result = made.base_tensors(), check(made, made.peft_dir)
    different = [difference for difference in result.different if difference.what == "values"]
    assert sum(difference.elements or 0 for difference in different) < 1e-3 * sum(
        base[t.key].numel() for t in made.targets
    )
    for difference in different:
        assert difference.max_ulp == 1
        assert str(difference.looks_like).startswith("this merge, rounded in another way: ")
        assert difference.strength == pytest.approx(1, abs=0.1)


def test_names_types_and_shapes_are_compared(make: Make, tmp_path: Path) -> None:
    made = make(BY_NAME["gpt2-bare"], torch.float16)
    result = check(made, made.peft_dir, max_ulp=1)  # PEFT writes `transformer.` before every name
    base = set(made.base_tensors())
    assert {(d.key, d.what) for d in result.different} == {
        *((key, "missing") for key in base),
        *((key, "unexpected") for key in read_tensors(made.peft_dir)),
    }
    merge(made.base_dir, [made.adapter_dir], tmp_path / "wide", PlanOptions(dtype="fp32"))
    wide = check(made, tmp_path / "wide")
    assert {(d.key, d.what, d.expected, d.found) for d in wide.different} == {(k, "dtype", "F16", "F32") for k in base}


def test_minilm_is_merged_and_verified_in_seconds(real: Made, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    result = merge(real.base_dir, [real.adapter_dir], merged)
    verified = check(real, merged)
    assert verified.verified
    assert result.seconds + verified.seconds < 20
    tensors = read_tensors(merged)
    assert_merged(real, tensors)
    assert_same_logits(real, logits(real.case, merged))
    positions = tensors["embeddings.position_ids"]  # today's class does not know it
    assert positions.dtype == torch.int64
    assert_same_bits(positions, real.base_tensors()["embeddings.position_ids"], "embeddings.position_ids")
    other = {"model.safetensors", ".gitattributes", "README.md", *result.left_out}
    assert {pair for pair in digests(real.base_dir).items() if pair[0] not in other} <= digests(merged).items()
    shutil.rmtree(merged)  # 90 MB
