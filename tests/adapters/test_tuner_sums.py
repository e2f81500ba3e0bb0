"""What tuners add to weights: formulas against PEFT's own in float64, and cuts of tiles."""

from __future__ import annotations

from typing import Final

import pytest
import torch
from models import quiet
from tuner_formulas import ALL, CASES, LINEAR, MISS, Tuned, Tuners, whole

from lora_cli.adapters.formula import MapMethod, SumMethod

WITHOUT_SIGNIFICANCE: Final = 2**-40
"""How far float64 may be apart, of the largest number; formulas count in exact products of 2 × 25 bits."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Tuners:
    """Each adapter, made once."""
    return Tuners(tmp_path_factory.mktemp("tuned"))


@pytest.mark.parametrize("name", CASES)
def test_a_formula_is_peft_s(name: str, made: Tuners) -> None:
    one = made(name)
    for layer in CASES[name][1]:
        with quiet():
            expected = one.layer(layer).get_delta_weight("default").detach().to_dense()
        # PEFT's transforms count in float32, and so do its standard deviations.
        near = 2**-20 if name.startswith(("c3a", "randlora-")) else WITHOUT_SIGNIFICANCE
        assert expected.abs().max() > 0
        torch.testing.assert_close(one.delta(layer), expected, rtol=0, atol=near * float(expected.abs().max()))


@pytest.mark.parametrize("name", MISS)
def test_miss_is_peft_s(name: str, made: Tuners) -> None:
    one = made(name)
    for layer in LINEAR:
        live = one.layer(layer)
        before = live.get_base_layer().weight.detach().clone()
        if name == "miss-bat":
            expected = before + live.get_delta_weight("default", before)
            found = _mapped(one, layer, before, [slice(0, len(before))])
        else:
            expected = live.get_delta_weight_miss("default", before.clone())
            found = before + one.delta(layer)
        torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-12)


def _mapped(one: Tuned, layer: str, before: torch.Tensor, cuts: list[slice]) -> torch.Tensor:
    method = one.formula(layer).method
    assert isinstance(method, MapMethod)
    rows = method.rows(one.given(layer))
    return torch.cat([rows(torch.arange(len(before))[cut], before[cut]) for cut in cuts])


def test_a_map_s_rows_do_not_depend_on_cuts(made: Tuners) -> None:
    one = made("miss-bat")
    before = one.layer("up").get_base_layer().weight.detach() * torch.logspace(-9, 9, 12).unsqueeze(1)
    at_once = _mapped(one, "up", before, [slice(0, 12)])
    assert torch.equal(at_once, _mapped(one, "up", before, [slice(row, row + 1) for row in range(12)]))
    assert torch.equal(at_once, _mapped(one, "up", before, [slice(0, 5), slice(5, 12)]))


SUMS: Final = [name for name in CASES if name.startswith(("lokr", "c3a", "shira"))] + [*MISS][:-1]


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_s_elements_do_not_depend_on_cuts(name: str, made: Tuners) -> None:
    one = made(name)
    for layer in ALL[name][1]:
        formula, given = one.formula(layer), one.given(layer)
        assert isinstance(formula.method, SumMethod)
        every, (height, width) = whole(formula, given), given.matrix
        values = formula.method.values(given)
        order = torch.randperm(height)
        assert torch.equal(values(order, slice(1, width)), every[order][:, 1:])
        for row in range(height):
            for column in range(0, width, 3):
                part = slice(column, min(column + 3, width))
                assert torch.equal(values(torch.tensor([row]), part), every[row : row + 1, part])
        twice = formula.method.values(one.given(layer, 2.0))(torch.arange(height), slice(0, width))
        assert torch.equal(twice, 2 * every)
