"""R128, R129: patterns from files of strangers cannot hang the program, wherever they stand and how many there are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_world import merging
from catalogue import check_refused
from cli_world import Call, World, call_fixture, world_fixture  # noqa: F401 (fixtures)
from tiny import (
    CONFIG,
    MODULES,
    PREFIX,
    adapter_tensors,
    base_tensors,
    factors,
    numbers,
    within,
    write_adapter,
    write_base,
)

SECONDS = 5
"""Processor time that any of these may take; Python's own engine would need years for some."""

EXPLOSIVE = {
    "nested": "([a-z._0-9]+)+X",
    "alternatives": "(model|m|mo|mod|model.)*" * 6 + "X",
    "stars": ".*" * 30 + "X",
    "optional": "(.?){99}" * 9 + "X",
}
REFUSED = {
    "R128 lookaround": ("(?!x)q_proj", "matches in linear time|(?!"),
    "R128 back-reference": (r"(.)\1_proj", "matches in linear time"),
    "R128 broken": ("q_proj[", "matches in linear time|missing ]"),
    "R128 repetition of repetitions": ("a{1000}{1000}", "matches in linear time|{1000}{1000}"),
    "R128 another meaning elsewhere": ("q{,2}_proj", "does not mean the same everywhere"),
    "R128 classes of POSIX": ("[[:alpha:]]+_proj", "does not mean the same everywhere"),
    "R129 1 MB": ("(" * (1 << 20), "too long|at most 2000 characters|found 1048576"),
}
TOO_MANY = {f"(q_proj_{number}|a)+": 2 for number in range(100_000)}
FIELDS = ("rank_pattern", "alpha_pattern")
NEUTRAL = ("target_modules", "exclude_modules", "layers_pattern")


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("name", REFUSED)
def test_a_pattern_of_a_config_is_refused(name: str, field: str, call: Call, world: World, tmp_path: Path) -> None:
    pattern, words = REFUSED[name]
    line = merging(fields={field: {pattern: 2}})(world, tmp_path)
    with within(SECONDS):
        check_refused(call, line, 12, f"adapter_config.json: {field}: |{words}", folder=tmp_path)


@pytest.mark.parametrize("field", FIELDS)
def test_too_many_patterns(field: str, call: Call, world: World, tmp_path: Path) -> None:
    """R129: the work is the patterns times the modules, so the patterns are counted before any is tried."""
    line = merging(fields={field: TOO_MANY})(world, tmp_path)
    with within(SECONDS):
        words = f"adapter_config.json: {field}: There are too many patterns|at most 250|found 100000"
        check_refused(call, line, 12, words, folder=tmp_path)


def test_too_many_ways_to_lay_dots(call: Call, world: World, tmp_path: Path) -> None:
    """R129: names are looked up, but a dot stands for any character, so each layout of dots is one more look."""
    names = {"".join("." if number >> bit & 1 else "a" for bit in range(20)): 2 for number in range(1, 100_000)}
    line = merging(rank_pattern=names)(world, tmp_path)
    with within(SECONDS):
        check_refused(call, line, 12, "rank_pattern: There are too many patterns", folder=tmp_path)


def test_as_many_names_as_a_model_has_modules(call: Call, world: World, tmp_path: Path) -> None:
    """What PEFT writes when every module has its own rank is no attack."""
    names = {f"model.layers.{layer}.{name}": 2 for layer in range(10_000) for name in ("q_proj", r"mlp\.up_proj")}
    with within(SECONDS):
        assert call(*merging(rank_pattern=names)(world, tmp_path), "--dry-run").code == 0


@pytest.mark.parametrize("field", [*FIELDS, *NEUTRAL])
@pytest.mark.parametrize("pattern", EXPLOSIVE.values(), ids=EXPLOSIVE)
def test_an_explosive_pattern_ends(field: str, pattern: str, call: Call, world: World, tmp_path: Path) -> None:
    """R128: matched in linear time, or never looked at, since the file shows what it chose."""
    said: Any = {pattern: 2} if field in FIELDS else pattern
    with within(SECONDS):
        ran = call(*merging(fields={field: said})(world, tmp_path), "--dry-run")
    assert ran.code in (0, 12), ran.err


@pytest.mark.parametrize("field", NEUTRAL)
@pytest.mark.parametrize("said", [["(" * (1 << 20)], [f"(a{n}+)+" for n in range(100_000)]], ids=["1 MB", "many"])
def test_patterns_that_chose_targets_are_not_looked_at(
    said: list[str], field: str, call: Call, world: World, tmp_path: Path
) -> None:
    """R129."""
    line = merging(fields={field: said})(world, tmp_path)
    with within(SECONDS):
        assert call(*line, "--dry-run").code == 0


def test_a_tuner_looks_through_its_patterns_once(call: Call, world: World, tmp_path: Path) -> None:
    """R129: a hundred thousand names, and hundreds of modules; LoHa's reader asks for each of them."""
    modules = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(300)]
    shapes = {"hada_w1_a": (12, 2), "hada_w1_b": (2, 8), "hada_w2_a": (12, 2), "hada_w2_b": (2, 8)}
    tensors = {f"{PREFIX}{m}.{part}": numbers(*shape) for m in modules for part, shape in shapes.items()}
    adapter = write_adapter(tmp_path / "a", tensors)
    names = {f"model.layers.{number}.q_proj": 2 for number in range(100_000)}
    config = {"peft_type": "LOHA", "r": 2, "alpha": 4, "rank_pattern": names}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with within(2 * SECONDS):
        assert call("inspect", adapter).code == 0


LISTS: dict[str, tuple[dict[str, Any], int]] = {
    "targets": ({"target_modules": [f"m{n}_proj" for n in range(100_000)]}, 0),
    "wholes": ({"modules_to_save": [f"m{n}" for n in range(100_000)]}, 0),
    "parameters": ({"target_parameters": [f"x.m{n}" for n in range(100_000)]}, 10),
    "bare parameters": ({"target_parameters": [f"m{n}" for n in range(100_000)]}, 10),
    "parameters and targets": (
        {"target_parameters": ["x", "y"], "target_modules": [f"m{n}" for n in range(100_000)] + ["q_proj"]},
        0,
    ),
    "blocks": ({"use_bdlora": {"nblocks": 1, "target_modules_bd_a": [f"m{n}" for n in range(100_000)]}}, 10),
    "as many patterns as may be": ({"alpha_pattern": {f"(x{n}|a)+": 2 for n in range(250)}}, 0),
}


@pytest.fixture(scope="module", name="large")
def large_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of 1000 modules."""
    folder = tmp_path_factory.mktemp("large") / "b"
    return write_base(folder, {f"{module}.weight": np.zeros((12, 8), np.float32) for module in MANY}, config={})


MANY = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(1000)]


@pytest.mark.parametrize("name", LISTS)
def test_long_lists_and_many_modules(name: str, large: Path, call: Call, tmp_path: Path) -> None:
    """R129: names are looked up, or counted first: their number times that of the modules would be minutes."""
    fields, exit_code = LISTS[name]
    adapter = write_adapter(tmp_path / "a", factors(dict.fromkeys(MANY, (12, 8))), **fields)
    with within(2 * SECONDS):
        ran = call("merge", large, adapter, "-o", tmp_path / "out", "--dry-run", "-q")
    assert ran.code == exit_code, ran.err


# The base's own config

SETTINGS = {
    "R128 lookaround": (["re:(?!x)q_proj"], "quantization_config: A pattern is no regular expression|(?!"),
    "R129 1 MB": (["*a" * (1 << 19)], "quantization_config: A pattern is too long"),
    "R129 many": ([f"*a{number}" for number in range(100_000)], "quantization_config: There are too many patterns"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_patterns_of_the_base_config(name: str, call: Call, world: World, tmp_path: Path) -> None:
    ignore, words = SETTINGS[name]
    settings = {"quant_method": "compressed-tensors", "ignore": ignore}
    line = merging(base_config={"quantization_config": settings})(world, tmp_path)
    with within(SECONDS):
        check_refused(call, line, 12, f"config.json: {words}", folder=tmp_path)


@pytest.mark.parametrize("entry", ["re:([a-z._0-9]+)+X", "*a" * 900, "*" * 1900])
def test_explosive_patterns_of_the_base_config(entry: str, call: Call, tmp_path: Path) -> None:
    long = "a" * 5000
    tensors = base_tensors() | {f"{long}.weight": np.ones((4, 4), np.float32)}
    base = write_base(
        tmp_path / "b", tensors, config=CONFIG | {"quantization_config": {"quant_method": "gptq", "ignore": [entry]}}
    )
    factors = adapter_tensors() | {f"{PREFIX}{long}.lora_{side}.weight": np.ones((4, 4), np.float32) for side in "AB"}
    adapter = write_adapter(tmp_path / "a", factors, rank_pattern={long: 4})
    with within(SECONDS):
        assert call("merge", base, adapter, "-o", tmp_path / "out", "--dry-run").code in (0, 12)


# Files of targets, and what a person types

FILES: dict[str, tuple[str, int, str]] = {
    "R128 lookaround": ("targets: ['re:(?!x)q_proj']", 12, "targets: A pattern cannot be matched in linear time|(?!"),
    "R128 back-reference": (r"targets: ['re:(.)\1']", 12, "targets: A pattern cannot be matched in linear time"),
    "R128 broken": ("targets: ['re:[']", 12, "targets: A pattern cannot be matched|missing ]"),
    "R128 excluded": ("targets: [q_proj]\nexclude: ['re:(?=x)']", 12, "exclude: A pattern cannot be matched"),
    "R129 long": (f"targets: ['re:{'a' * 2500}']", 12, "targets: |more than 2000"),
    "R129 many": (f"targets: [{','.join(f'a{n}' for n in range(11_000))}]", 10, "too many|at most 10000|found 11000"),
    "R129 the same": (f"targets: [{'a,' * 12_000}a]", 10, "targets: There are too many patterns"),
    "R129 1 MB": (f"targets: ['{'a' * (1 << 20)}']", 10, "too large"),
}


@pytest.mark.parametrize("option", ["--target", "--config"])
@pytest.mark.parametrize("name", FILES)
def test_a_file_of_targets(name: str, option: str, call: Call, world: World, tmp_path: Path) -> None:
    text, exit_code, words = FILES[name]
    file = tmp_path / "t.yaml"
    file.write_text(text)
    line = ["inject", world.base, "-o", tmp_path / "out", "--rank", 2, option, file]
    with within(2 * SECONDS):
        check_refused(call, line, exit_code, f"t.yaml: |{words}", folder=tmp_path)


@pytest.mark.parametrize("pattern", ["re:" + EXPLOSIVE["nested"], "re:" + EXPLOSIVE["alternatives"], "**a" * 99])
@pytest.mark.parametrize("typed", [True, False])
def test_explosive_targets_match_nothing_in_time(
    typed: bool, pattern: str, call: Call, world: World, tmp_path: Path
) -> None:
    """R128: typed, or from a file: what linear time can do is done in it."""
    file = tmp_path / "t.yaml"
    file.write_text(json.dumps({"targets": [pattern]}))
    line = ["inject", world.base, "-o", tmp_path / "out", "--rank", 2, "--target", pattern if typed else file]
    with within(SECONDS):
        check_refused(call, line, 20, "matches no module", folder=tmp_path)


def test_who_types_may_look_around(call: Call, world: World, tmp_path: Path) -> None:
    """Python's own engine is for the one who waits for it."""
    line = ["inject", world.base, "-o", tmp_path / "out", "--rank", 2, "--target", r"re:(?!.*\.1\.).*q_proj", "--json"]
    document = call(*line).document
    assert [module["key"] for module in document["modules"]] == [f"{MODULES[0]}.weight"]


@pytest.mark.parametrize("pattern", ["re:" + EXPLOSIVE["nested"], "**a" * 99])
def test_only_of_diff(pattern: str, call: Call, world: World, tmp_path: Path) -> None:
    """R128."""
    with within(SECONDS):
        line = ["diff", world.base, world.merged, "--only", pattern]
        check_refused(call, line, 2, "--only finds nothing", folder=tmp_path)
