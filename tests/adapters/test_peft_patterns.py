"""PEFT's pattern lookup and its scales, as the library itself has them, and patterns that could take forever."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from models import quiet
from tiny import PREFIX, within, write_adapter

from lora_cli.adapters.formats import open_adapter
from lora_cli.adapters.patterns import peft_lookup
from lora_cli.errors import LoraCliError, UnsupportedError

ATOMS = [
    "q_proj",
    "layers",
    r"\d+",
    "0",
    "1",
    r"\.",
    ".",
    ".*",
    "(q|k)_proj",
    "[qk]_proj",
    "a+b",
    r"layers\.0",
    "^model",
    "q",
]
patterns = st.lists(st.sampled_from(ATOMS), min_size=1, max_size=4).map("".join)
modules = st.lists(
    st.sampled_from(["model", "layers", "0", "1", "q_proj", "k_proj", "a+b", "q", "lm_head"]), min_size=1
).map(".".join)


@given(st.dictionaries(patterns, st.integers(1, 99), max_size=5), modules)
@example({"a+b": 5}, "a+b")
@example({"^q": 1, "^model.q": 2, "q": 3}, "model.q")
@example({"q": 3, "^q": 1}, "q")
@example({"^layers.0": 1, r"^layers\.0": 2, "^^q": 4}, "layers+0")
@settings(max_examples=200, deadline=None)
def test_the_lookup_is_that_of_peft(lora_patterns: dict[str, int], module: str) -> None:
    """First match in the order of the file; what matches nothing may still be a module's very name."""
    from peft.utils.other import get_pattern_key

    expected = lora_patterns.get(get_pattern_key(list(lora_patterns), module))
    try:
        found = peft_lookup(lora_patterns, module)
    except UnsupportedError:
        # Which patterns are too slow is a matter of judgement; nobody writes four repeats into one.
        assert any(key.count("*") + key.count("+") > 3 for key in lora_patterns)
        return
    assert (found[1] if found else None) == expected
    assert found is None or lora_patterns[found[0]] == found[1]


EXPLOSIVE = [
    *("(a+)+", "(a*)*", "(a|b+)*", "(a{1,5})+", "(?:a+)+", "(a+){2,}", r"(\w+\s?){2,}", "(a+?)+?", "(.*a){20}"),
    *("((a+))+", "((a|b)+)*", "((.*)a)+", "((?:a+)b?)+", "(a+[)]?)+"),
    *("(a|a)*", "(a|aa)+", "(a?){40}a{40}", ".*.*.*.*.*.*.*.*.*x", "x" * 5000),
    *("(a|a)" * 30 + "x", "(?x:(a+) +)", "(?i:a|A)" * 30 + "x"),
]
HARMLESS = [
    *("q_proj", r".*\.v_proj", "(q|v)_proj", r"layers\.\d+\.mlp\.(gate|up)_proj", r"^model\.layers\.0\..*"),
    *(r"model\.layers\.([0-9]|1[0-9])\..*", r"(.*\.)?q_proj", r"h\.\d{1,2}\.(attn|mlp)\.c_\w+", "q_proj|v_proj"),
    *(r".*\.layers\.\d+\..*_proj", r".*\.layers\.\d+\.mlp\.experts\.\d+\..*", r"(.*\.)?layers\.\d+\.(mlp\.)?.*"),
]


@pytest.mark.parametrize("pattern", EXPLOSIVE, ids=lambda pattern: pattern[:24])
def test_a_pattern_that_could_take_forever_does_not(tmp_path: Path, pattern: str) -> None:
    """Refused by name, or answered in time: never a program that hangs on a stranger's file."""
    tensors = {f"{PREFIX}{'a' * 60}!.lora_{side}.weight": np.ones((2, 2), np.float32) for side in "AB"}
    folder = write_adapter(tmp_path / "a", tensors, rank_pattern={pattern: 2})
    with within(1):
        try:
            open_adapter(folder)
        except LoraCliError as error:
            assert type(error) is UnsupportedError  # noqa: PT017 (it need not raise)


@pytest.mark.parametrize("pattern", HARMLESS)
def test_patterns_that_people_write_are_taken(pattern: str) -> None:
    """Also on the long names of real models."""
    from peft.utils.other import get_pattern_key

    for module in (
        "model.layers.0.self_attn.q_proj",
        "model.language_model.layers.47.mlp.experts.127.gate_up_proj",
        "base_model.model.vision_tower.vision_model.encoder.layers.23.self_attn.out_proj",
    ):
        expected = get_pattern_key([pattern], module)
        assert peft_lookup({pattern: 1}, module) == ((pattern, 1) if expected == pattern else None)


def test_a_broken_pattern_is_refused() -> None:
    with pytest.raises(UnsupportedError) as caught:
        peft_lookup({"ok": 1, "(": 2}, "model.q")
    assert caught.value.found == "("


# Scales

SCALED: dict[str, dict[str, Any]] = {
    "defaults": {},
    "alpha and rank": {"r": 3, "lora_alpha": 7},
    "rslora": {"r": 5, "lora_alpha": 7, "use_rslora": True},
    "rank pattern": {"r": 4, "rank_pattern": {"q_proj": 3, r"layers\.1\.": 9, "1.mlp.up_proj": 5}},
    "alpha pattern": {
        "lora_alpha": 6,
        "alpha_pattern": {r".*\.up_proj": 5, "q_proj": 0.3, r"1\.self_attn\.q_proj": 99},
    },
    "all of it": {"use_rslora": True, "rank_pattern": {"up_proj": 7}, "alpha_pattern": {"q_proj": 1.7}},
}


@pytest.mark.parametrize("options", SCALED.values(), ids=SCALED)
def test_scales_are_those_of_the_live_model(tmp_path: Path, options: dict[str, Any]) -> None:
    """Read back from the files, since PEFT sorts the patterns when it writes them."""
    with quiet():
        from peft import LoraConfig, PeftModel, get_peft_model

        get_peft_model(net(), LoraConfig(target_modules=["q_proj", "up_proj"], **options)).save_pretrained(tmp_path)
        model = PeftModel.from_pretrained(net(), tmp_path)
    live = {
        name.removeprefix(PREFIX): (layer.r["default"], layer.scaling["default"])
        for name, layer in model.named_modules()
        if hasattr(layer, "scaling")
    }
    adapter = open_adapter(tmp_path)
    mine = {target.module: (target.delta.rank, target.delta.scale.times()) for target in adapter.targets}
    rslora = options.get("use_rslora", False)
    assert mine.keys() == live.keys()
    assert len(live) == 4
    for module, (rank, scale) in live.items():
        # PEFT rounds the root and then the quotient; ours is rounded once.
        assert mine[module][0] == rank
        assert math.isclose(mine[module][1], scale, rel_tol=2**-52 if rslora else 0), module
    assert adapter.kind == ("rsLoRA" if rslora else "LoRA")


def net() -> Any:
    """Two layers with two linear modules each."""
    import torch

    def block(name: str) -> Any:
        outer = torch.nn.Module()
        outer.add_module(name, torch.nn.Linear(9, 11, bias=False))
        return outer

    layers = [torch.nn.ModuleDict({"self_attn": block("q_proj"), "mlp": block("up_proj")}) for _ in range(2)]
    return torch.nn.ModuleDict({"layers": torch.nn.ModuleList(layers)})
