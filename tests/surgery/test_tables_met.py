"""Changes that meet on a table: rows of two adapters, rows and deltas, ties of one name that is stored, other sizes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from adapter_worlds import (
    FUSED,
    HEAD,
    LLAMA,
    TABLE,
    TIED,
    VOCABULARY,
    lengths,
    table_factors,
    tokens,
    untied_base,
)
from tiny import MODULES, PREFIX, WIDTH, Array, base_tensors, factors, numbers, read_tensors, write_adapter, write_base

from lora_cli.errors import LoraCliError, NamesError, ShapeError, UnsupportedError
from lora_cli.surgery.merge import MergeResult, merge
from lora_cli.surgery.placing import PlanOptions

EMBEDDING = "model.embed_tokens"
ROWS = f"{PREFIX}{EMBEDDING}.token_adapter.trainable_tokens_delta"
AFTER = r"merge one after the other"


def elsewhere(value: float = 0.0) -> dict[str, Array]:
    """Factors on one linear layer, so that no adapter is of rows alone, and no two are the same."""
    return {key: tensor + np.float32(value) for key, tensor in factors({MODULES[0]: (12, WIDTH)}).items()}


def rows_at(folder: Path, *at: int, value: float = 7, other: float = 0) -> Path:
    """An adapter of trained tokens: all of their numbers are `value` and the token's number."""
    held = np.stack([np.full(WIDTH, value + token, np.float32) for token in at])
    return write_adapter(folder, elsewhere(value + other) | {ROWS: held}, trainable_token_indices=list(at))


def delta(folder: Path) -> Path:
    return write_adapter(folder, elsewhere() | table_factors())


def whole(folder: Path, entries: int = VOCABULARY) -> Path:
    """An adapter that holds both tables whole, with so many entries."""
    tables = {f"{PREFIX}{key}": numbers(entries, WIDTH, seed=at) for at, key in enumerate((TABLE, HEAD), 90)}
    return write_adapter(folder, elsewhere() | tables)


def merged(base: Path, *adapters: Path, weights: tuple[float, ...] = ()) -> tuple[MergeResult, dict[str, Array]]:
    folder = base.parent / "merged"
    return merge(base, adapters, folder, PlanOptions(weights=weights)), read_tensors(folder)


def refused(error: type[LoraCliError], base: Path, *adapters: Path) -> str:
    """The words of the refusal."""
    with pytest.raises(error) as raised:
        merge(base, adapters, base.parent / "merged")
    assert type(raised.value) is error
    assert not (base.parent / "merged").exists()
    return str(raised.value) + "\n" + "\n".join(raised.value.details)


# Rows of two adapters


def test_rows_of_two_adapters_that_do_not_meet_are_both_laid(tmp_path: Path) -> None:
    base = untied_base(tmp_path)
    result, tensors = merged(base, rows_at(tmp_path / "one", 3, 1), rows_at(tmp_path / "two", 19, value=50))
    expected = base_tensors()[TABLE]
    expected[[1, 3, 19]] = np.array([[8], [10], [69]], np.float32)
    assert np.array_equal(tensors[TABLE], expected)
    assert result.effects.rows == {TABLE: 3}


def test_rows_that_two_adapters_hold_alike_are_laid_once(tmp_path: Path) -> None:
    adapters = [rows_at(tmp_path / name, 3, 1, other=at) for at, name in enumerate(("one", "two"))]
    result, tensors = merged(untied_base(tmp_path), *adapters)
    expected = base_tensors()[TABLE]
    expected[[1, 3]] = np.array([[8], [10]], np.float32)
    assert np.array_equal(tensors[TABLE], expected)
    assert result.effects.rows == {TABLE: 2}


@pytest.mark.parametrize("order", [1, -1])
def test_different_rows_of_one_token_are_refused(order: int, tmp_path: Path) -> None:
    adapters = [rows_at(tmp_path / "one", 3, 1), rows_at(tmp_path / "two", 3, 5, value=50)]
    words = refused(NamesError, untied_base(tmp_path), *adapters[::order])
    assert f"{TABLE}: two adapters hold different rows" in words


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("other", [delta, whole])
def test_rows_of_one_adapter_and_another_change_of_the_table_are_refused(
    other: Callable[[Path], Path], order: int, tmp_path: Path
) -> None:
    adapters = [rows_at(tmp_path / "rows", 3), other(tmp_path / "other")]
    words = refused(UnsupportedError, untied_base(tmp_path), *adapters[::order])
    assert TABLE in words
    assert AFTER in words


def test_rows_lie_under_a_delta_of_their_own_adapter(tmp_path: Path) -> None:
    both = elsewhere() | table_factors() | tokens(2)
    _, tensors = merged(untied_base(tmp_path), write_adapter(tmp_path / "both", both, trainable_token_indices=[3, 1]))
    a, b = (tensor.astype(np.float64) for tensor in table_factors().values())
    expected = base_tensors()[TABLE].astype(np.float64)
    expected[[3, 1]] = tokens(2)[ROWS]
    assert np.allclose(tensors[TABLE], expected + 2 * (b @ a).T, rtol=1e-6, atol=1e-6)


def test_rows_of_one_adapter_and_a_delta_of_another_that_has_rows_too_are_refused(tmp_path: Path) -> None:
    both = elsewhere() | table_factors() | tokens(1)
    adapters = write_adapter(tmp_path / "both", both, trainable_token_indices=[3]), rows_at(tmp_path / "rows", 5)
    assert AFTER in refused(UnsupportedError, untied_base(tmp_path), *adapters)


def test_rows_meet_a_delta_of_weight_zero(tmp_path: Path) -> None:
    adapters = rows_at(tmp_path / "rows", 3), delta(tmp_path / "delta")
    _, tensors = merged(untied_base(tmp_path), *adapters, weights=(1.0, 0.0))
    assert (tensors[TABLE][3] == 10).all()
    assert np.array_equal(tensors[TABLE][4:], base_tensors()[TABLE][4:])


def test_rows_and_lengths_of_one_table_are_refused(tmp_path: Path) -> None:
    long = {f"{PREFIX}{EMBEDDING}.lora_magnitude_vector": np.abs(numbers(WIDTH, seed=5)) + 1}
    made = elsewhere() | lengths(elsewhere()) | table_factors() | long | tokens(2)
    adapter = write_adapter(tmp_path / "both", made, trainable_token_indices=[3, 1], use_dora=True)
    assert "DoRA" in refused(UnsupportedError, untied_base(tmp_path), adapter)


@pytest.mark.parametrize("order", [1, -1])
def test_rows_beyond_a_table_that_another_adapter_makes_shorter_are_refused(order: int, tmp_path: Path) -> None:
    adapters = [rows_at(tmp_path / "rows", 1, VOCABULARY - 1), whole(tmp_path / "short", VOCABULARY - 8)]
    words = refused(ShapeError, untied_base(tmp_path), *adapters[::order])
    assert f"row {VOCABULARY - 1} is trained, and there are {VOCABULARY - 8}" in words


def test_rows_of_a_type_that_the_table_cannot_hold_are_refused(tmp_path: Path) -> None:
    held = elsewhere() | {ROWS: np.ones((1, WIDTH), np.int32)}
    adapter = write_adapter(tmp_path / "rows", held, trainable_token_indices=[3])
    assert "I32 in" in refused(UnsupportedError, untied_base(tmp_path), adapter)


# Two names of one tensor, of which the file has the head's


@pytest.fixture
def head_stored(tmp_path: Path) -> Path:
    tensors = base_tensors()
    del tensors[TABLE]
    return write_base(tmp_path / "base", tensors, config=TIED)


def test_tokens_of_an_embedding_that_is_stored_as_the_head_stay_tied(head_stored: Path) -> None:
    result, tensors = merged(head_stored, rows_at(head_stored.parent / "rows", 3))
    expected = base_tensors()[HEAD]
    expected[3] = 10
    assert TABLE not in tensors
    assert np.array_equal(tensors[HEAD], expected)
    assert not result.effects.untied


def test_tokens_of_the_head_alone_leave_the_embedding_as_it_was(head_stored: Path) -> None:
    made = elsewhere() | tokens(1, "lm_head")
    adapter = write_adapter(head_stored.parent / "rows", made, trainable_token_indices={"lm_head": [3]})
    result, tensors = merged(head_stored, adapter)
    expected = base_tensors()[HEAD]
    expected[3] = tokens(1, "lm_head")[f"{PREFIX}lm_head.token_adapter.trainable_tokens_delta"][0]
    assert np.array_equal(tensors[HEAD], expected)
    assert np.array_equal(tensors[TABLE], base_tensors()[HEAD])
    assert result.effects.untied == {TABLE: HEAD}


# Parts of one tensor


def test_equal_factors_of_two_parts_of_one_tensor_are_both_applied(tmp_path: Path) -> None:
    key, layer = "model.layers.1.mlp.gate_up_proj.weight", "model.layers.1.mlp"
    base = write_base(tmp_path / "base", {key: numbers(24, WIDTH), TABLE: numbers(VOCABULARY, WIDTH)}, config=FUSED)
    gate = factors({f"{layer}.gate_proj": (12, WIDTH)})
    both = gate | {name.replace("gate_proj", "up_proj"): tensor for name, tensor in gate.items()}
    adapter = write_adapter(tmp_path / "adapter", both, ensure_weight_tying=True)
    result, tensors = merged(base, adapter)
    a, b = (tensor.astype(np.float64) for tensor in gate.values())
    assert np.allclose(tensors[key], numbers(24, WIDTH) + np.tile(2 * b @ a, (2, 1)), rtol=1e-6, atol=1e-6)
    assert {entry.outcome for entry in result.entries} == {"applied"}


# Tables of other sizes

POSITIONS = "model.decoder.embed_positions.weight"
OPT = {"architectures": ["OPTForCausalLM"], "model_type": "opt", "vocab_size": 20, "max_position_embeddings": 14}


@pytest.mark.parametrize("config", [OPT, OPT | {"vocab_size": 16}, {}], ids=["opt", "as many words", "no config"])
def test_another_number_of_positions_is_no_other_vocabulary(config: dict[str, object], tmp_path: Path) -> None:
    tensors = base_tensors() | {POSITIONS: numbers(16, WIDTH, seed=33)}
    adapter = write_adapter(tmp_path / "a", elsewhere() | {f"{PREFIX}{POSITIONS}": numbers(24, WIDTH)})
    words = refused(ShapeError, write_base(tmp_path / "base", tensors, config=config), adapter)
    assert f"{POSITIONS}: " in words
    assert "[24, 8]" in words
    assert "vocabulary" not in words


def test_positions_of_as_many_as_the_words_do_not_hinder_another_vocabulary(tmp_path: Path) -> None:
    tensors = base_tensors() | {POSITIONS: numbers(VOCABULARY, WIDTH, seed=33)}
    base = write_base(tmp_path / "base", tensors, config=LLAMA)
    result, _ = merged(base, whole(tmp_path / "more", VOCABULARY + 3))
    assert result.effects.resized == dict.fromkeys((TABLE, HEAD), (VOCABULARY, VOCABULARY + 3))


MARIAN = {
    "architectures": ["MarianMTModel"],
    "model_type": "marian",
    "vocab_size": VOCABULARY,
    "decoder_vocab_size": VOCABULARY,
    "share_encoder_decoder_embeddings": True,
}
SHARED, BIAS = "model.shared.weight", "final_logits_bias"


def translator(folder: Path, *, bias: bool = True) -> Path:
    tensors = {
        SHARED: numbers(VOCABULARY, WIDTH),
        "model.encoder.layers.0.fc1.weight": numbers(16, WIDTH, seed=4),
    }
    more = {BIAS: numbers(1, VOCABULARY, seed=3)} if bias else {}
    return write_base(folder / "base", tensors | more, shards=1, config=MARIAN)


def more_words(folder: Path, *keys: str) -> Path:
    shapes = {SHARED: (VOCABULARY + 3, WIDTH), "lm_head.weight": (VOCABULARY + 3, WIDTH), BIAS: (1, VOCABULARY + 3)}
    made = factors({"model.encoder.layers.0.fc1": (16, WIDTH)})
    return write_adapter(folder, made | {f"{PREFIX}{key}": numbers(*shapes[key], seed=8) for key in keys})


def test_a_vocabulary_of_two_sizes_is_refused(tmp_path: Path) -> None:
    adapter = more_words(tmp_path / "adapter", SHARED, "lm_head.weight")
    words = refused(ShapeError, translator(tmp_path), adapter)
    assert f"{BIAS} has {VOCABULARY}" in words
    assert "of two sizes" in words


def test_every_field_of_a_config_that_counts_the_words_says_their_new_number(tmp_path: Path) -> None:
    adapter = more_words(tmp_path / "adapter", SHARED, "lm_head.weight")
    merged(translator(tmp_path, bias=False), adapter)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert (config["vocab_size"], config["decoder_vocab_size"]) == (VOCABULARY + 3, VOCABULARY + 3)
