"""The exponential function that has the same bits everywhere, against one with fifty digits."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import torch

from lora_cli.arithmetic.exponential import exponential


def test_it_is_near_the_true_one() -> None:
    torch.manual_seed(0)
    values = torch.cat([-torch.rand(300, dtype=torch.float64) * 30, -torch.rand(100, dtype=torch.float64) * 690])
    values = torch.cat([values, torch.tensor([0.0, 1.0, 40.0, 699.0, -math.log(2) / 2, -1e-300], dtype=torch.float64)])
    with localcontext() as context:
        context.prec = 50
        for value, found in zip(values.tolist(), exponential(values).tolist(), strict=True):
            true = Decimal(value).exp()
            assert abs(Decimal(found) / true - 1) < Decimal(2) ** -51, value


def test_what_is_far_below_is_nothing() -> None:
    found = exponential(torch.tensor([-math.inf, -1e30, -700.1]))
    assert torch.equal(found, torch.zeros(3, dtype=torch.float64))


def test_its_bits_are_these() -> None:
    found = exponential(torch.tensor([0.0, -1.0, -10.3, -333.25], dtype=torch.float64))
    assert [value.hex() for value in found.tolist()] == [
        "0x1.0000000000000p+0",
        "0x1.78b56362cef38p-2",
        "0x1.1a22859e0dc35p-15",
        "0x1.2a8f63851e867p-481",
    ]
