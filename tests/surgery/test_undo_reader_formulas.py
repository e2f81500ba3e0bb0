"""Undo files of formulas and of experts, for a second reader that was written from their page alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from formula_world import KINDS, experts, formulas
from test_undo_reader_kinds import assert_read_again

from lora_cli.adapters.tuners import METHODS

BF16, F32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize("name", KINDS)
def test_another_reader_finds_the_base(tmp_path: Path, name: str) -> None:
    """In a type, and beside numbers so small, that every bit of what was added shows."""
    assert_read_again(formulas(tmp_path, torch.float64, 1, (name,), 1e-5), "keep", tmp_path)


def test_another_reader_finds_all_of_them_at_once(tmp_path: Path) -> None:
    """In the narrower working type, and to another type."""
    kinds = assert_read_again(formulas(tmp_path, BF16, 2), "fp16", tmp_path)
    assert kinds >= {kind for kind, method in METHODS.items() if method.preimages}


@pytest.mark.parametrize(("stored", "dtype"), [("apart", BF16), ("fused", torch.float16), ("in turn", F32)])
def test_another_reader_finds_experts(tmp_path: Path, stored: str, dtype: torch.dtype) -> None:
    """Whose factors lie in every way."""
    kinds = assert_read_again(experts(tmp_path, dtype, 2, stored), "keep", tmp_path)
    assert kinds == {"lora", "lora-stack"}
