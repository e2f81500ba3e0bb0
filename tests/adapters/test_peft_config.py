"""PEFT's config: every field known and judged, each wrong type refused, and nothing that is ignored in silence."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from models import quiet
from tiny import ALPHA, MODULES, RANK, adapter_tensors, write_adapter

from lora_cli.adapters.formats import open_adapter
from lora_cli.adapters.peft_config import NEUTRAL, REFUSED, UNDERSTOOD, check_fields, initial_of
from lora_cli.adapters.source import ReadOptions
from lora_cli.errors import MalformedFileError, ShapeError, UnsupportedError

OLDER = {"enable_lora", "merge_weights", "lora_B_layout"}
"""Fields that PEFT once wrote and no longer knows, and one that Unsloth writes."""
PLAIN: dict[str, Any] = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}


@pytest.fixture(scope="session")
def lora_config() -> Any:
    with quiet():
        from peft import LoraConfig

        return LoraConfig


# The lists


def test_every_field_of_peft_is_in_exactly_one_list(lora_config: Any) -> None:
    lists = [set(UNDERSTOOD), set(NEUTRAL), set(REFUSED)]
    known = set[str]().union(*lists)
    assert len(known) == sum(map(len, lists)), "a field is in two lists"
    fields = {field.name for field in dataclasses.fields(lora_config)}
    assert fields - known == set(), "PEFT has learned something new: decide what it means to a merge"
    assert known - fields == OLDER
    assert all(
        reason and not reason.endswith(".") for part in (UNDERSTOOD, NEUTRAL, REFUSED) for reason in part.values()
    )


def test_a_fresh_config_is_accepted(lora_config: Any, tmp_path: Path) -> None:
    with quiet():
        lora_config(target_modules=["q_proj"], task_type="CAUSAL_LM").save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert set(written) >= (set(UNDERSTOOD) | set(REFUSED)) - OLDER  # those with a default, too
    assert check_fields(written, file="adapter_config.json") == ()


def test_every_init_that_peft_knows_is_judged(lora_config: Any) -> None:
    """Some take their factors off the base, which the caller has to undo; others are plain LoRA when they are saved."""
    said = str(next(field.type for field in dataclasses.fields(lora_config) if field.name == "init_lora_weights"))
    taking = {"olora", "pissa", "corda"}
    plain = {"gaussian", "eva", "orthogonal", "mica"}
    assert set(re.findall(r"'([^']+)'", said)) == taking | plain | {"pissa_niter_[number of iters]", "loftq"}
    for init in [*plain, "Gaussian", "MiCA", True, False, None]:
        config = PLAIN | {"init_lora_weights": init}
        assert check_fields(config, file="c") == ()
        assert initial_of(config, ()) is None
    for init in [*taking, "pissa_niter_4", "lora_ga", "OLoRA"]:
        config = PLAIN | {"init_lora_weights": init}
        assert check_fields(config, file="c") == ()
        assert initial_of(config, ()) == init.lower()
        ignored = check_fields(config, file="c", ignore=["init_lora_weights"])
        assert ignored == ("init_lora_weights",)
        assert initial_of(config, ignored) is None


HARMFUL: list[object] = ["loftq", "PiSSA", "pissa_niter_", "something new", 1, 0, [], {}, ""]


@pytest.mark.parametrize("init", HARMFUL, ids=repr)
def test_other_inits_are_refused(init: object) -> None:
    config = PLAIN | {"init_lora_weights": init}
    with pytest.raises(UnsupportedError) as caught:
        check_fields(config, file="c")
    (line,) = caught.value.details
    assert line.startswith("init_lora_weights = ")
    assert ("quantised the base" if init == "loftq" else "unknown init") in line
    assert check_fields(config, file="c", ignore=["init_lora_weights"]) == ("init_lora_weights",)


def test_a_plain_file_is_read_for_no_changed_base(tmp_path: Path) -> None:
    """Its format has no word for what an init took off."""
    adapter = write_adapter(tmp_path / "a", init_lora_weights="pissa")
    config = json.loads((adapter / "adapter_config.json").read_text())
    del config["peft_type"]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError) as caught:
        open_adapter(adapter)
    assert "this init changed the base" in caught.value.details[0]


@pytest.mark.parametrize("field", REFUSED)
def test_a_refused_field_is_refused_when_set(field: str) -> None:
    unset: list[object] = [None, False, "", [], {}]
    is_set: list[object] = [True, 1, "x", ["x"], {"x": 0}]
    for value in unset:
        assert check_fields(PLAIN | {field: value}, file="c") == ()
    for value in is_set:
        with pytest.raises(UnsupportedError) as caught:
            check_fields(PLAIN | {field: value}, file="adapter_config.json")
        assert caught.value.file == "adapter_config.json"
        assert len(caught.value.details) == 1
        assert REFUSED[field] in caught.value.details[0]
        assert "--ignore-field" in str(caught.value.hint)
        assert check_fields(PLAIN | {field: value}, file="c", ignore=[field, "other"]) == (field,)


def test_unknown_fields_are_refused_all_at_once() -> None:
    config = PLAIN | {"new_trick": 0.5, "zero": 0, "use_qalora": True, "harmless": None, "empty": []}
    with pytest.raises(UnsupportedError) as caught:
        check_fields(config, file="c")
    assert [line.split(" ")[0] for line in caught.value.details] == ["new_trick", "use_qalora"]
    assert "unknown" in caught.value.details[0]
    with pytest.raises(UnsupportedError) as caught:
        check_fields(config, file="c", ignore=["new_trick"])
    assert [line.split(" ")[0] for line in caught.value.details] == ["use_qalora"]
    assert check_fields(config, file="c", ignore=["use_qalora", "new_trick"]) == ("new_trick", "use_qalora")


@pytest.mark.parametrize("tuner", ["NEW", "lora", "", None, 3, ["LORA"]])
def test_other_tuners_are_refused_by_name(tuner: object) -> None:
    with pytest.raises(UnsupportedError) as caught:
        check_fields(PLAIN | {"peft_type": tuner}, file="c")
    assert caught.value.tensor == "peft_type"
    assert "LOHA, LOKR, LORA, " in str(caught.value.expected)


@pytest.mark.parametrize(
    "field", ["ensure_weight_tying", "layer_replication", "trainable_token_indices", "use_bdlora", "use_dora"]
)
@pytest.mark.parametrize("value", [None, False], ids=str)
def test_a_field_that_is_not_set_says_nothing(tmp_path: Path, field: str, value: Any) -> None:
    adapter = open_adapter(write_adapter(tmp_path / "a", **{field: value}))
    assert (adapter.tied, adapter.layers, adapter.rows, adapter.kind) == (False, None, (), "LoRA")
    assert {target.delta.kind for target in adapter.targets} == {"lora"}


HUGE = 10**400
"""A whole number that no float holds; JSON may have it."""
BAD: dict[str, Any] = {"text": "8", "flag": True, "list": [8], "huge": HUGE, "null": None}
WRONG: list[tuple[str, Any]] = [
    *((field, value) for field in ("r", "lora_alpha") for value in BAD.values() if (field, value) != ("r", HUGE)),
    *(("r", 0.5), ("r", 8.0), ("rank_pattern", ["q"]), ("alpha_pattern", "q"), ("modules_to_save", "head")),
    *(("use_rslora", "true"), ("use_rslora", 1), ("fan_in_fan_out", "yes"), ("fan_in_fan_out", 1)),
    *(
        ("ensure_weight_tying", 1),
        ("use_bdlora", True),
        ("use_bdlora", ["q_proj"]),
        ("use_bdlora", {"nblocks": 0, "match_strict": False}),
    ),
    *(("use_bdlora", {"nblocks": 2.0}), ("use_bdlora", {"nblocks": 2, "target_modules_bd_a": "q_proj"})),
    *(("use_bdlora", {"target_modules_bd_b": [3]}), ("use_bdlora", {"nblocks": 2, "match_strict": "no"})),
    *(("layer_replication", value) for value in (3, [3], [[0]], [[0, 1, 2]], [[1, 1]], [[-1, 2]], [[0, "2"]])),
    *(("layer_replication", value) for value in ([[0, 1 << 17]], [[0, 1 << 16], [0, 1]], {"0": 2})),
    *(("trainable_token_indices", value) for value in (3, [-1], ["3"], [True], [3.0], {"embed_tokens": 3})),
    *(("trainable_token_indices", value) for value in ({"embed_tokens": [-1]}, "3", [1 << 40])),
    *((f"{kind}_pattern", {"q_proj": value}) for kind in ("rank", "alpha") for value in ("x", *BAD.values())),
]


@pytest.mark.parametrize(("field", "value"), WRONG, ids=lambda value: str(value)[:30])
def test_a_field_of_the_wrong_type_is_malformed(tmp_path: Path, field: str, value: Any) -> None:
    """Never an internal error, and never a guess such as "8" for 8 or true for 1."""
    with pytest.raises((MalformedFileError, ShapeError)) as caught:
        open_adapter(write_adapter(tmp_path / "a", **{field: value}))
    if not (field in ("r", "rank_pattern") and HUGE in (value, *(value.values() if isinstance(value, dict) else ()))):
        assert type(caught.value) is MalformedFileError
        assert field in f"{caught.value.tensor} {caught.value.details}"
    assert len(str(caught.value.found)) < 200


# Where a scale came from


@pytest.mark.parametrize(
    ("read", "config", "scale", "source"),
    [
        (ReadOptions(), {}, ALPHA / RANK, "lora_alpha / r"),
        (ReadOptions(), {"alpha_pattern": {"up_proj": 3, "q_proj": 3}}, 3 / RANK, "alpha_pattern['up_proj'] / r"),
        (ReadOptions(), {"use_rslora": True}, 8**0.5, "lora_alpha / √r"),
        (ReadOptions(alpha=7), {}, 7 / RANK, "--alpha / r"),
        (ReadOptions(alpha=7), {"use_rslora": True}, 4.949747468305833, "--alpha / √r"),
        (ReadOptions(scale=0.25), {"use_rslora": True, "alpha_pattern": {"q_proj": 3}}, 0.25, "--scale"),
    ],
)
def test_where_a_scale_came_from(
    tmp_path: Path, read: ReadOptions, config: dict[str, Any], scale: float, source: str
) -> None:
    target = next(
        t for t in open_adapter(write_adapter(tmp_path / "a", **config), read).targets if "up_proj" in t.module
    )
    assert (target.delta.scale.times(), target.delta.scale.source) == (scale, source)


def test_ranks_that_disagree_are_all_named(tmp_path: Path) -> None:
    with pytest.raises(ShapeError) as caught:
        open_adapter(write_adapter(tmp_path / "a", adapter_tensors(rank=3), rank_pattern={"up_proj": 3}))
    wrong = [module for module in MODULES if "q_proj" in module]
    assert [line.split(":")[0] for line in caught.value.details] == wrong
    assert all("rank 3" in line and "r says 2" in line for line in caught.value.details)
