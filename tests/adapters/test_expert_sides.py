"""Which side of each expert's matrix A meets: by shapes, versions of PEFT, architectures, and what the user says."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import pytest
import torch
from expert_world import RANK, M, on, pair, product, read

from lora_cli.adapters.expert_layout import side_of_peft
from lora_cli.errors import ShapeError, UnsupportedError


@pytest.mark.parametrize(("version", "plain", "transposed"), [
    ("0.17.1", "rows", "rows"), ("0.18.0", "rows", "rows"), ("0.18.1", "rows", "rows"), ("0.18", "rows", "rows"),
    ("0.18.0.dev0", "rows", "rows"), ("0.18.2.dev0@1f3a", "rows", None), ("0.19.0rc1", "rows", None),
    ("0.19.0", "rows", "columns"), ("0.19.1.dev0", None, None), ("0.19.1", "columns", "rows"),
    ("0.20.0.dev0", "columns", "rows"), ("0.21.2", "columns", "rows"), ("1.0.0", "columns", "rows"),
    (None, None, "rows"), ("sideways", None, None),
])  # fmt: skip
def test_sides_by_version(version: str | None, plain: str | None, transposed: str | None) -> None:
    assert (side_of_peft(version, False), side_of_peft(version, True)) == (plain, transposed)
    assert side_of_peft(version, None) == (plain if plain == transposed else None)


QWEN: Final[dict[str, Any]] = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
GPT_OSS: Final[dict[str, Any]] = {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss"}
LLAMA4: Final[dict[str, Any]] = {"architectures": ["Llama4ForCausalLM"], "model_type": "llama4_text"}


@pytest.mark.parametrize(("version", "base", "side", "words"), [
    ("0.21.2", QWEN, "columns", "PEFT 0.21.2"), ("0.18.0", QWEN, "rows", "PEFT 0.18.0"),
    ("0.21.2", GPT_OSS, "rows", "PEFT 0.21.2"), ("0.19.0", GPT_OSS, "columns", "PEFT 0.19.0"),
    (None, GPT_OSS, "rows", "a PEFT that does not say its version"), ("0.21.2", LLAMA4, "columns", "PEFT 0.21.2"),
    (None, QWEN, None, ""), ("0.21.2", {}, None, ""), ("0.18.0", {}, "rows", "PEFT 0.18.0"),
    ("0.21.2", {"architectures": ["Mine"], "model_type": "mine"}, None, ""),
])  # fmt: skip
def test_squares(tmp_path: Path, version: str | None, base: dict[str, Any], side: str | None, words: str) -> None:
    tensors = pair(M, (10, 6), (6, 10))
    config: dict[str, Any] = {"target_parameters": ["experts.down_proj"], "peft_version": version, "r": 2}
    module = M.replace("mlp", "feed_forward") if base is LLAMA4 else M
    tensors = {key.replace(M, module): value for key, value in tensors.items()}
    (target,) = read(tmp_path, tensors, **config).targets
    if side is None:
        with pytest.raises(UnsupportedError, match="the experts are square") as caught:
            on(target, 5, 6, 6, **base)
        assert (caught.value.hint or "").startswith("--expert-layout rows (PEFT up to 0.18) or columns")
    else:
        delta = on(target, 5, 6, 6, **base)
        assert (delta.side, delta.reason, delta.surprise) == (side, words, None)
    for said in ("rows", "columns"):
        (target,) = read(tmp_path, tensors, said, **config).targets
        delta = on(target, 5, 6, 6, **base)
        assert (delta.side, delta.reason) == (said, "--expert-layout")
        a, b = (tensor.double() for tensor in tensors.values())
        first = 3.0 * b[:, ::5] @ a[:2]
        torch.testing.assert_close(product(delta), first if said == "columns" else first.T)


@pytest.mark.parametrize(("base", "parameter", "side"), [
    (QWEN, "down_proj", "columns"), (GPT_OSS, "down_proj", "rows"), (LLAMA4, "down_proj", "rows"),
    ({}, "down_proj", None), (GPT_OSS, "w2", "columns"), ({}, "gate_proj", "columns"),
])  # fmt: skip
def test_squares_of_writers_who_mean_inputs(tmp_path: Path, base: Any, parameter: str, side: str | None) -> None:
    module = M.replace("mlp", "feed_forward") if base is LLAMA4 else M
    (target,) = read(tmp_path, pair(f"{module}.{parameter}", (5, RANK, 6), (5, 6, RANK))).targets
    if side is None:
        with pytest.raises(UnsupportedError, match="expert-layout"):
            on(target, 5, 6, 6, **base)
    else:
        assert on(target, 5, 6, 6, **base).side == side


def test_a_module_that_the_architecture_does_not_know_decides_nothing(tmp_path: Path) -> None:
    (target,) = read(tmp_path, pair("style.experts", (15, 6), (6, 15)), target_parameters=["experts.down_proj"]).targets
    with pytest.raises(UnsupportedError, match="expert-layout"):
        on(target, 5, 6, 6, **GPT_OSS)


def test_a_single_square_expert_is_added_as_it_is(tmp_path: Path) -> None:
    (target,) = read(tmp_path, pair(M, (3, 6), (6, 3)), target_parameters=["experts.down_proj"]).targets
    assert on(target, 1, 6, 6, **GPT_OSS).side == "columns"


def test_shapes_go_before_versions(tmp_path: Path) -> None:
    """With a word where a new version would have done otherwise."""
    tensors = pair(M, (15, 4), (7, 15))
    for version, surprised in (("0.18.0", False), ("0.21.2", True), (None, False)):
        (target,) = read(tmp_path, tensors, target_parameters=["experts.down_proj"], peft_version=version).targets
        delta = on(target, 5, 4, 7, **QWEN)
        assert (delta.side, delta.reason, delta.surprise is not None) == ("rows", "by its shape", surprised)
    (target,) = read(tmp_path, tensors, target_parameters=["experts.down_proj"], peft_version="0.18.0").targets
    assert on(target, 5, 7, 4, **QWEN).surprise is None  # of old files shapes have always been the witness
    with pytest.raises(ShapeError, match="--expert-layout says that A meets columns"):
        on(read(tmp_path, tensors, "columns", target_parameters=["experts.down_proj"]).targets[0], 5, 4, 7)


@pytest.mark.parametrize(("shape", "words"), [
    ((4, 7, 4), "those of 5 matrices, and there are 4"),
    ((3, 7, 4), "those of 5 matrices, and there are 3"), ((5, 7, 5), "7 × 4 or the transpose"),
    ((4, 7), "none for a parameter of this shape"), ((7,), "a matrix or a stack of matrices"),
])  # fmt: skip
def test_parameters_that_do_not_fit(tmp_path: Path, shape: tuple[int, ...], words: str) -> None:
    (target,) = read(tmp_path, pair(M, (15, 4), (7, 15)), target_parameters=["experts.down_proj"]).targets
    with pytest.raises(ShapeError, match=words):
        on(target, *shape)


def test_a_matrix_of_another_rank(tmp_path: Path) -> None:
    """A stack of five would have rank 3; as a matrix it has 15."""
    (target,) = read(tmp_path, pair(M, (15, 4), (7, 15)), target_parameters=["experts.down_proj"]).targets
    with pytest.raises(ShapeError, match="the factors have rank 15, r says 3"):
        on(target, 7, 4)
