"""Trees of adapters: each becomes its delta in its place, and what is none is named by its path."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_cli.errors import ShapeError, UsageError
from lora_cli.nn.functional import lora_delta, tree_lora_delta

ALPHA = 7.0
Pair = namedtuple("Pair", ["first", "second"])


def trained(*, rank: int = 3) -> dict[str, Tensor]:
    """An adapter whose B has left zero."""
    numbers = torch.Generator().manual_seed(rank)
    return {"A": torch.randn(12, rank, generator=numbers), "B": torch.randn(rank, 20, generator=numbers)}


def test_a_tree_of_adapters_becomes_a_tree_of_deltas() -> None:
    one, two = trained(), trained(rank=5)
    tree = {"blocks": [{"q": one, "k": None}, (two, one)], "pair": Pair(one, [two]), "empty": {}}
    found = tree_lora_delta(tree, ALPHA)
    d1, d2 = lora_delta(one, ALPHA), lora_delta(two, ALPHA)
    assert set(found) == {"blocks", "pair", "empty"}
    assert found["empty"] == {}
    assert found["blocks"][0]["k"] is None
    assert isinstance(found["blocks"][1], tuple)
    assert isinstance(found["pair"], Pair)
    places = [found["blocks"][0]["q"], *found["blocks"][1], found["pair"].first, found["pair"].second[0]]
    for place, expected in zip(places, [d1, d2, d1, d1, d2], strict=True):
        assert torch.equal(place, expected)
    assert torch.equal(tree_lora_delta(one, ALPHA), d1)


def test_modules_may_be_named_a_and_b() -> None:
    found = tree_lora_delta({"A": trained(), "B": {"A": trained(), "B": trained()}})
    assert torch.equal(found["B"]["A"], lora_delta(trained()))


def test_leaves_are_where_the_caller_says() -> None:
    seen = []

    def is_leaf(node: Any) -> bool:
        seen.append(node)
        return isinstance(node, dict) and "A" in node

    assert torch.equal(tree_lora_delta([trained()], is_leaf=is_leaf)[0], lora_delta(trained()))
    assert seen
    with pytest.raises(UsageError, match=r"\[0\]"):
        tree_lora_delta([{"A": trained()}], is_leaf=is_leaf)


@pytest.mark.parametrize(
    ("leaf", "error", "place"),
    [
        (torch.zeros(2, 2), UsageError, r"\['layers'\]\[1\]"),
        (3, UsageError, r"\['layers'\]\[1\]"),
        ({"A": torch.zeros(2, 2)}, UsageError, r"\['layers'\]\[1\]\['A'\]"),
        ({"A": torch.zeros(2, 3), "B": torch.zeros(2, 3)}, ShapeError, r"\['layers'\]\[1\].*\(2, 3\)"),
    ],
)
def test_what_is_no_adapter_is_named_by_its_path(leaf: object, error: type[Exception], place: str) -> None:
    with pytest.raises(error, match=place):
        tree_lora_delta({"layers": [trained(), leaf]})
