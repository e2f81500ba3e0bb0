"""What can be said of a fresh adapter: defaults, what follows from it, and what is refused by name."""

import math
import re
from typing import Any

import pytest

from lora_cli.adapters.fresh import FreshOptions
from lora_cli.adapters.modules import Module
from lora_cli.errors import UsageError
from lora_cli.surgery.inject_options import InjectOptions


def wide(module: Module) -> bool:
    return module.shape[-1] > 100


def test_what_follows_from_the_options() -> None:
    options = FreshOptions(rank=4)
    assert (options.scale.times(), options.storage.name, options.width) == (1.0, "F32", 0.01)
    assert (options.targets, options.principal, options.iterations) == (("all-linear",), False, None)
    options = FreshOptions(rank=4, alpha=6, rslora=True, dtype="bf16", init="gaussian", std=0.5)
    assert (options.scale.times(), options.storage.name, options.width) == (3.0, "BF16", 0.5)


@pytest.mark.parametrize(
    ("init", "principal", "iterations"),
    [
        ("kaiming", False, None),
        ("orthogonal", False, None),
        ("pissa", True, None),
        ("pissa_niter_0", True, 0),
        ("pissa_niter_16", True, 16),
        ("olora", True, None),
    ],
)
def test_inits(init: str, principal: bool, iterations: int | None) -> None:
    options = FreshOptions(rank=2, init=init)
    assert (options.principal, options.iterations) == (principal, iterations)


def test_one_target_alone_needs_no_tuple() -> None:
    said: list[Any] = ["q_proj", re.compile("q.*"), wide]
    for one in said:
        assert FreshOptions(rank=1, targets=one, exclude=one).targets == (one,)
        assert FreshOptions(rank=1, targets=one, exclude=one).exclude == (one,)
    assert FreshOptions(rank=1, targets=said).targets == tuple(said)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("rank", value) for value in (0, -1, 2.0, True, "4")),
        *(("alpha", value) for value in (0, -1, math.nan, math.inf, 1e40)),
        *(("std", value) for value in (0.1, -1.0)),
        *(("init", value) for value in ("eva", "pissa_niter_", "pissa_niter_x", "pissa_niter_1234", "xolora", "")),
        *(("dtype", value) for value in ("F32", "int8")),
        *(("seed", value) for value in (1.5, True)),
        *((field, value) for field in ("targets", "exclude") for value in ((1,), ("q_proj", None), [["q_proj"]])),
    ],
)
def test_values_that_make_no_sense_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"{field} makes no sense") as caught:
        FreshOptions(**{"rank": 2, field: value})
    assert caught.value.tensor == field
    assert caught.value.expected


def test_files_take_only_what_a_receipt_can_say() -> None:
    for field in ("targets", "exclude"):
        said: dict[str, Any] = {"rank": 2, field: (re.compile("q"),)}
        with pytest.raises(UsageError) as caught:
            InjectOptions(**said)
        assert caught.value.tensor == field
    with pytest.raises(UsageError) as caught:
        InjectOptions(rank=2, init="pissa", layout="wrapped")
    assert caught.value.tensor == "layout"
