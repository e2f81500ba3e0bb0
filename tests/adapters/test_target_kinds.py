"""Modules that are no plain matrices, and modules of live models: what they are, and what means them."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_cli.adapters.modules import Kind, Module, describe
from lora_cli.adapters.targets import Selected, Target, choose, factor_shapes, select
from lora_cli.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lora_cli.errors import NamesError, UnsupportedError

Factors = tuple[tuple[int, ...], tuple[int, ...]]


def checkpoint(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> Checkpoint:
    save_file({key: np.zeros(shape, np.float32) for key, shape in shapes.items()}, folder / "model.safetensors")
    return open_checkpoint(folder)


@pytest.mark.parametrize(
    ("pattern", "kind", "matrix", "factors"),
    [
        ("word_embeddings", "embedding", (8, 20), ((3, 20), (8, 3))),
        ("conv1", "conv", (6, 12), ((3, 4, 3), (6, 3, 1))),
        ("projection", "conv", (8, 12), ((3, 3, 2, 2), (8, 3, 1, 1))),
        ("conv3", "conv", (5, 24), ((3, 3, 2, 2, 2), (5, 3, 1, 1, 1))),
        ("query", "linear", (8, 6), ((3, 6), (8, 3))),
    ],
)
def test_factors_follow_the_kind_of_the_module(
    tmp_path: Path, pattern: str, kind: str, matrix: tuple[int, int], factors: Factors
) -> None:
    shapes = {
        "word_embeddings.weight": (20, 8),
        "conv1.weight": (6, 4, 3),
        "patch.projection.weight": (8, 3, 2, 2),
        "conv3.weight": (5, 3, 2, 2, 2),
        "query.weight": (8, 6),
    }
    (selected,) = select(checkpoint(tmp_path, shapes), [pattern]).modules
    assert (selected.kind, (selected.out, selected.inner)) == (kind, matrix)
    assert selected.shape == shapes[selected.key]
    assert factor_shapes(selected, 3) == factors
    # A product of these factors has the shape of the weight, in the order that is stored.
    a, b = (np.ones(shape).reshape(shape[0], -1) for shape in factor_shapes(selected, 3))
    delta = (b @ a).T if kind == "embedding" else b @ a
    assert delta.size == np.prod(selected.shape)
    assert delta.shape[0] == selected.shape[0]
    assert not selected.transposed


def test_factors_have_a_form_for_these_kinds_only() -> None:
    stack = describe("experts", "experts.w", (2, 4, 4), "BF16", kind="grouped")
    with pytest.raises(UnsupportedError):
        factor_shapes(Selected.of(stack), 2)


def test_presets_leave_embeddings_and_convolutions_without_a_word(tmp_path: Path) -> None:
    shapes = {
        "vit.embeddings.projection.weight": (8, 3, 2, 2),
        "vit.embeddings.word_embeddings.weight": (20, 8),
        "vit.layer.0.attention.attention.query.weight": (8, 8),
        "classifier.weight": (3, 8),
    }
    selection = select(checkpoint(tmp_path, shapes), ["all-linear", "attention"])
    assert {module.kind for module in selection.modules} == {"linear"}
    assert [note.split(",")[0] for note in selection.notes] == ["left out: 1 of kind head (classifier)"]


# Modules of live models


def live(name: str, kind: Kind, shape: tuple[int, ...], dtype: str | None = "BF16") -> Module:
    return describe(name, f"{name}.weight", shape, dtype, kind=kind, beside_experts={"moe"})


LIVE = [
    live("shared", "linear", (4, 4)),  # no embedding, whatever it is called
    live("table", "embedding", (9, 4)),
    live("conv", "conv", (4, 2, 3)),
    live("moe.gate", "linear", (4, 4)),
    live("moe.experts", "grouped", (2, 4, 4)),
    live("packed", "linear", (4, 4), None),
    live("odd", "linear", (4, 4), "I8"),
]


def test_a_live_model_says_itself_what_is_what() -> None:
    def chosen(*targets: Target) -> list[str]:
        return [module.name for module in choose(LIVE, targets, label="model").modules]

    assert chosen("all-linear") == ["shared", "packed"]
    assert chosen("table", "conv", "moe.gate") == ["table", "conv", "moe.gate"]
    assert chosen("moe.*") == ["moe.gate", "moe.experts"]


def test_targets_may_be_compiled_or_functions() -> None:
    def chosen(targets: Sequence[Target], exclude: Sequence[Target] = ()) -> list[str]:
        return [module.name for module in choose(LIVE, targets, exclude, label="model").modules]

    assert chosen([re.compile("(?i)SHA.*|conv")]) == ["shared", "conv"]
    assert chosen([lambda module: module.shape == (4, 4)]) == ["shared", "moe.gate", "packed"]
    assert chosen(["**"], [lambda module: module.kind != "conv"]) == ["conv"]


def big(module: Module) -> bool:
    return sum(module.shape) > 1000


def test_errors_name_compiled_targets_and_functions() -> None:
    with pytest.raises(NamesError, match="2 target patterns") as caught:
        choose(LIVE, [re.compile("ared"), big, "conv"], label="model")
    assert caught.value.details == ("compiled ared", "function big")
    with pytest.raises(NamesError, match="leave no module") as caught:
        choose(LIVE, ["conv"], [lambda _: True, re.compile("c.*")], label="model")
    assert str(caught.value.found).endswith("<lambda>, compiled c.*")
