"""Errors and warnings name the adapter and the tensor in its file that they are about."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny import MODULES, PREFIX, WIDTH, base_tensors, numbers, out_of, write_base
from tuner_worlds import PARTS, tensors_of, write_tuner

from lora_cli.adapters.source import ReadOptions
from lora_cli.errors import NumericError, ShapeError, UnsupportedError, UsageError
from lora_cli.surgery.merge import merge, plan_merge
from lora_cli.surgery.placing import PlanOptions


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("kind", PARTS)
def test_numbers_that_are_none_are_found_in_the_file(kind: str, value: float, tmp_path: Path) -> None:
    tensors = {key: tensor.copy() for key, tensor in tensors_of(kind).items()}
    key, tensor = next((key, tensor) for key, tensor in tensors.items() if MODULES[1] in key)
    tensor.flat[-1] = value
    sound, broken = write_tuner(tmp_path / "sound", "LOHA"), write_tuner(tmp_path / "broken", kind, tensors)
    adapters = [sound, broken] if kind in ("LOHA", "FOURIERFT", "ADALORA") else [broken]
    with pytest.raises(NumericError, match="holds NaN or infinity") as caught:
        merge(write_base(tmp_path / "base"), adapters, tmp_path / "merged")
    assert (caught.value.file, caught.value.tensor) == ("broken", key)
    assert str(caught.value.found).startswith(f"1 of {tensor.size} values, for {MODULES[1]}")


def test_a_base_that_holds_no_numbers_is_not_the_adapters_fault(tmp_path: Path) -> None:
    weight = f"{MODULES[1]}.weight"
    broken = np.full((out_of(MODULES[1]), WIDTH), np.nan, np.float32)
    with pytest.raises(NumericError) as caught:
        merge(
            write_base(tmp_path / "base", base_tensors() | {weight: broken}),
            [write_tuner(tmp_path / "a", "OFT")],
            tmp_path / "m",
        )
    assert caught.value.tensor == weight


def test_a_reason_stands_before_what_may_be_cut(tmp_path: Path) -> None:
    key = f"{PREFIX}{MODULES[0]}.hada_w1_b"
    tensors = tensors_of("LOHA") | {key: numbers(2, WIDTH + 1, seed=1)}
    with pytest.raises(ShapeError) as caught:
        plan_merge(write_base(tmp_path / "base"), [write_tuner(tmp_path / "a", "LOHA", tensors)])
    (said,) = caught.value.details
    assert said.startswith(f"{MODULES[0]}.weight: hada_w1_a [")
    assert said.index("; base [") < said.index(key)


def test_tuners_and_adapters_are_called_by_their_names(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    adapters = [write_tuner(tmp_path / name, "IA3") for name in ("one", "two")]
    with pytest.raises(UnsupportedError, match=r"\(IA\)³ makes something of what is there") as caught:
        plan_merge(base, adapters[1:], PlanOptions(weights=(0.5,)))
    assert caught.value.hint == "give two --weight 1, or 0 to leave it out"


@pytest.mark.parametrize("kind", ["IA3", "OFT"])
def test_of_what_has_no_scale_no_option_is_asked_for(kind: str, tmp_path: Path) -> None:
    options = PlanOptions(read=ReadOptions(alpha=3.0))
    with pytest.raises(UsageError, match="has no scale") as caught:
        plan_merge(write_base(tmp_path / "base"), [write_tuner(tmp_path / "a", kind)], options)
    assert caught.value.hint == "leave out --alpha"


def test_a_tie_of_logits_is_told_before_anything_is_written(tmp_path: Path) -> None:
    def logits(*shape: int) -> np.ndarray:
        return np.arange(np.prod(shape), dtype=np.float32).reshape(shape) / 8

    tensors = {"base_model.vblora_vector_bank": numbers(3, WIDTH // 2, seed=1)}
    for module in MODULES:
        out = out_of(module)
        tensors[f"{PREFIX}{module}.vblora_logits_A"] = logits(2, 2, 3)
        tensors[f"{PREFIX}{module}.vblora_logits_B"] = logits(2 * out // WIDTH, 2, 3)
    tied = f"{PREFIX}{MODULES[1]}.vblora_logits_B"
    base = write_base(tmp_path / "base")
    plain = merge(base, [write_tuner(tmp_path / "a", "VBLORA", tensors, topk=1)], tmp_path / "plain")
    assert not any("equal" in words for words in plain.warnings)
    tensors |= {tied: np.zeros_like(tensors[tied])}
    told = merge(base, [write_tuner(tmp_path / "a", "VBLORA", tensors, topk=1)], tmp_path / "told")
    (said,) = (words for words in told.warnings if "equal" in words)
    assert said.startswith(f"a: in {MODULES[1]} logits are equal")
    assert "save_only_topk_weights" in said
