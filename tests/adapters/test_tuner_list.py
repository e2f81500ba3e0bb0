"""The list of tuners: every type of PEFT is in it, and what it says of methods is so."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
from peft import PeftType

from lora_cli.adapters.formula import Method
from lora_cli.adapters.peft_config import check_fields
from lora_cli.adapters.tuners import METHODS, REFUSED, TUNERS
from lora_cli.adapters.tuners.tuner import Tuner
from lora_cli.errors import UnsupportedError
from lora_cli.surgery.undo import terms

FORMER = {"BONE"}
"""Types that PEFT no longer writes."""


def test_every_type_of_peft_is_merged_or_refused() -> None:
    assert {kind.value for kind in PeftType} == {"LORA", *TUNERS, *REFUSED} - FORMER
    assert not {"LORA", *TUNERS} & {*REFUSED}
    assert TUNERS.keys() >= FORMER


@pytest.mark.parametrize("kind", REFUSED)
def test_what_no_merge_can_do_is_refused_with_the_reason(kind: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        check_fields({"peft_type": kind}, file="adapter_config.json")
    assert REFUSED[kind] in caught.value.message
    assert (caught.value.found, str(caught.value).count(kind)) == (kind, 1)
    assert "docs/tuners.md" in caught.value.hint
    assert not REFUSED[kind].endswith(".")


def test_a_type_that_nobody_knows_is_refused_with_all_that_are_known() -> None:
    with pytest.raises(UnsupportedError) as caught:
        check_fields({"peft_type": "NEW"}, file="adapter_config.json")
    assert str(caught.value.expected).split(", ") == sorted({"LORA", *TUNERS})


@pytest.mark.parametrize("tuner", TUNERS.values(), ids=lambda tuner: tuner.type)
def test_an_entry_is_whole(tuner: Tuner) -> None:
    assert tuner.methods or tuner.whole
    assert tuner.name
    assert tuner.source
    assert tuner.modules
    for method in tuner.methods:
        assert METHODS[method.kind] is method
        assert {*method.indices} <= {*method.parts}
        assert len({*method.parts}) == len(method.parts) > 0
    named = [*tuner.understood, *tuner.neutral, *tuner.refused]
    assert len({*named}) == len(named)


def test_a_kind_means_one_formula() -> None:
    methods = [method for tuner in TUNERS.values() for method in tuner.methods]
    assert len({id(method) for method in methods}) == len({method.kind for method in methods}) == len(METHODS)
    assert not METHODS.keys() & terms._KINDS.keys()


# Exactness

OTHERWISE_ELSEWHERE = {
    "cos", "cumprod", "einsum", "erf", "exp", "expm1", "fft", "linalg", "log", "log1p", "matmul", "mm", "bmm", "norm",
    "normal", "normal_", "pow", "rand", "randn", "randperm", "sigmoid", "sin", "softmax", "std", "tanh", "uniform_",
    "var", "Generator", "kaiming_uniform_",
}  # fmt: skip
"""What a library may compute otherwise on another machine."""


def used(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in OTHERWISE_ELSEWHERE:
            yield node.attr
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
            yield "@"


def tree_of(method: Method) -> ast.AST:
    """What a method is made of: its whole module, but where another method there does not say that it is exact."""
    module: ModuleType = sys.modules[type(method).__module__]
    others = [other for other in METHODS.values() if type(other).__module__ == module.__name__]
    alone = not all(other.exact for other in others)
    return ast.parse(inspect.getsource(type(method)) if alone else inspect.getsource(module))


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.kind)
def test_what_is_exact_asks_no_library_for_what_differs(method: Method) -> None:
    found = sorted({*used(tree_of(method))})
    assert not (found and method.exact), found
