"""The table of dtypes against the safetensors library and torch."""

from __future__ import annotations

import re
from typing import Any

import pytest
import safetensors
import torch
from header_cases import one, upstream

from lora_cli.checkpoint.dtypes import DTYPES, DType, dtype_for_torch
from lora_cli.errors import UnsupportedError


def test_exactly_what_upstream_reads() -> None:
    deserialize: Any = safetensors.deserialize  # its stub has no types
    with pytest.raises(safetensors.SafetensorError) as caught:
        deserialize(one('"U0"'))
    theirs = set(re.findall(r"`(\w+)`", str(caught.value))) - {"U0"}
    assert set(DTYPES) <= theirs
    if safetensors.__version__.startswith("0.8."):
        assert set(DTYPES) == theirs


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_width_and_torch_name(dtype: DType) -> None:
    assert DTYPES[dtype.name] is dtype
    name = f'"{dtype.name}"'
    widths = [n for n in range(1, 65) if upstream(one(name, "[8]", f"[0,{n}]", bytes(n))) is not None]
    assert widths == [dtype.bits]  # eight elements: as many bytes as one has bits
    if dtype.torch_name is None:
        assert dtype.bits < 8
        return
    theirs: torch.dtype = getattr(torch, dtype.torch_name)
    assert theirs.itemsize * 8 == dtype.bits
    assert theirs.is_floating_point == dtype.floating
    assert dtype_for_torch(str(theirs)) is dtype_for_torch(dtype.torch_name) is dtype


def test_numbers_under_eight_bits_do_not_count_as_floating() -> None:
    assert not any(DTYPES[name].floating for name in ("F4", "F6_E2M3", "F6_E3M2"))


def test_torch_types_without_a_place_in_the_format() -> None:
    with pytest.raises(UnsupportedError) as caught:
        dtype_for_torch("torch.complex128")
    assert caught.value.found == "torch.complex128"


def test_the_table_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        DTYPES["U8"] = DTYPES["I8"]  # type: ignore[index]
