"""What PEFT's files hold whole, as PEFT saved it: heads, biases, tables, rows of trained tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import quiet
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from peft_files import PREFIX, Saved, llama, net, saved
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_cli.adapters.adapter import Adapter
from lora_cli.adapters.formats import open_adapter
from lora_cli.errors import MalformedFileError, NamesError, ShapeError, UnsupportedError

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
OWN = "the base's own, as the adapter was trained on it"
LORA: dict[str, Any] = {"target_modules": ["q_proj"]}


def wholes(made: Saved) -> dict[str, tuple[str, bool, bool]]:
    """What the file holds whole: name → reason, whether the base may lack it, whether it is the base's."""
    adapter = made.adapter
    found = {whole.name: (whole.reason, whole.may_be_new, whole.of_base) for whole in adapter.replacements}
    assert len(found) == len(adapter.replacements)
    return found


def content(made: Saved, adapter: Adapter, name: str) -> Tensor:
    whole = next(whole for whole in adapter.replacements if whole.name == name)
    return made.tensors()[whole.tensor.key]


def bert(head: str) -> Any:
    with quiet(4):
        import transformers

        config = transformers.BertConfig(
            vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, num_labels=3
        )
        return getattr(transformers, head)(config).double()


def resized(model: Any, folder: Path) -> Any:
    """A model with more tokens than the checkpoint that PEFT finds under its name."""
    model.save_pretrained(folder)
    model.resize_token_embeddings(22, mean_resizing=False)
    model.name_or_path = str(folder)
    return model


# Rows


@pytest.mark.parametrize("tied", [False, True])
def test_trained_tokens_are_rows_in_the_order_of_the_config(tmp_path: Path, tied: bool) -> None:
    made = saved(tmp_path, llama(tied=tied), trainable_token_indices=[5, 3, 17], **LORA)
    adapter = made.adapter
    (rows,) = adapter.rows
    assert (rows.name, rows.rows, rows.reason) == (EMBED, (5, 3, 17), "trainable_token_indices")
    assert EMBED in adapter.names
    assert adapter.stored == 3
    with torch.no_grad(), quiet():
        merged = made.model.merge_and_unload().get_input_embeddings().weight
    expected = made.before[EMBED].index_copy(0, torch.tensor(rows.rows), made.tensors()[rows.tensor.key])
    assert torch.equal(merged, expected)
    assert not torch.equal(merged, made.before[EMBED])


def test_tokens_of_several_tables(tmp_path: Path) -> None:
    made = saved(tmp_path, llama(), trainable_token_indices={"embed_tokens": [5, 3], "lm_head": [1, 2, 7]}, **LORA)
    assert {rows.name: rows.rows for rows in made.adapter.rows} == {EMBED: (5, 3), HEAD: (1, 2, 7)}


def test_tied_tables_with_one_list_are_stored_once(tmp_path: Path) -> None:
    lists = {"embed_tokens": [5, 3], "lm_head": [5, 3]}
    made = saved(tmp_path, llama(tied=True), trainable_token_indices=lists, **LORA)
    assert {rows.name: rows.rows for rows in made.adapter.rows} == {EMBED: (5, 3)}
    made.write(trainable_token_indices=lists | {"lm_head": [5, 4]})
    with pytest.raises(MalformedFileError, match="no rows for them") as caught:
        _ = made.adapter
    assert caught.value.details == ("lm_head",)


def test_tied_tables_with_two_lists_are_two(tmp_path: Path) -> None:
    lists = {"embed_tokens": [5, 3], "lm_head": [5, 4]}
    made = saved(tmp_path, llama(tied=True), trainable_token_indices=lists, **LORA)
    assert {rows.name: rows.rows for rows in made.adapter.rows} == {EMBED: (5, 3), HEAD: (5, 4)}


@pytest.mark.parametrize("tokens", [[21, 4], {"embed_tokens": [21, 4]}])
def test_tokens_of_a_resized_tied_table_are_stored_twice(tmp_path: Path, tokens: Any) -> None:
    """The head's copy has no list of its own."""
    model = resized(llama(tied=True), tmp_path / "base")
    made = saved(tmp_path / "a", model, trainable_token_indices=tokens, **LORA)
    adapter = made.adapter
    assert {rows.name: rows.rows for rows in adapter.rows} == {EMBED: (21, 4), HEAD: (21, 4)}
    one, other = (made.tensors()[rows.tensor.key] for rows in adapter.rows)
    assert torch.equal(one, other)
    assert wholes(made) == {EMBED: (OWN, False, True), HEAD: (OWN, False, True)}
    assert content(made, adapter, EMBED).shape == (22, 8)


def test_no_tokens_at_all(tmp_path: Path) -> None:
    adapter = saved(tmp_path, llama(), trainable_token_indices=[], **LORA).adapter
    assert adapter.rows == ()
    assert [(tensor.shape, reason) for tensor, reason in adapter.skipped] == [((0, 8), "no rows")]


Damage = Callable[[Saved], None]
ROWS = f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"


def without_rows(made: Saved) -> None:
    made.write({key: tensor for key, tensor in made.tensors().items() if key != ROWS})


def as_vector(made: Saved) -> None:
    made.write(made.tensors() | {ROWS: torch.zeros(3)})


DAMAGES: dict[str, tuple[Damage, type[Exception], str]] = {
    "too few": (lambda made: made.write(trainable_token_indices=[5, 3]), ShapeError, "one trained row for each"),
    "too many": (lambda made: made.write(trainable_token_indices=[5, 3, 1, 2]), ShapeError, "one trained row for each"),
    "a vector": (as_vector, ShapeError, "one trained row for each"),
    "twice": (lambda made: made.write(trainable_token_indices=[5, 3, 5]), MalformedFileError, "a token twice"),
    "negative": (lambda made: made.write(trainable_token_indices=[5, 3, -1]), MalformedFileError, "wrong type"),
    "not said": (lambda made: made.write(trainable_token_indices=None), MalformedFileError, "does not say which"),
    "said to be none": (lambda made: made.write(trainable_token_indices=False), MalformedFileError, "does not say"),
    "of another": (
        lambda made: made.write(trainable_token_indices={"wte": [5, 3, 1]}), MalformedFileError, "does not say which"
    ),
    "no rows": (without_rows, MalformedFileError, "no rows for them"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_rows_and_config_that_do_not_fit(tmp_path: Path, name: str) -> None:
    damage, error, words = DAMAGES[name]
    made = saved(tmp_path, llama(), trainable_token_indices=[5, 3, 17], **LORA)
    damage(made)
    with pytest.raises(error, match=words) as caught:
        _ = made.adapter
    assert "trainable_token" in str(caught.value)


# Tables


def test_tables_that_were_resized_are_the_base_s_own(tmp_path: Path) -> None:
    made = saved(tmp_path / "a", resized(llama(), tmp_path / "base"), **LORA)
    assert wholes(made) == {EMBED: (OWN, False, True), HEAD: (OWN, False, True)}


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_a_table_with_factors_is_stored_beside_them(tmp_path: Path, module: str) -> None:
    made = saved(tmp_path, llama(), target_modules=[module])
    name = EMBED if module == "embed_tokens" else HEAD
    assert wholes(made) == {name: (OWN, False, True)}
    assert torch.equal(content(made, made.adapter, name), made.before[name])
    assert [target.name for target in made.adapter.targets] == [name]


def test_a_resized_table_that_was_trained_whole_is_there_twice(tmp_path: Path) -> None:
    model = resized(llama(), tmp_path / "base")
    made = saved(tmp_path / "a", model, modules_to_save=["embed_tokens"], **LORA)
    assert wholes(made) == {EMBED: ("modules_to_save", False, False), HEAD: (OWN, False, True)}
    adapter = made.adapter
    trained = made.module("model.embed_tokens").modules_to_save["default"].weight
    assert torch.equal(content(made, adapter, EMBED), trained)
    assert sorted(reason for _, reason in adapter.skipped) == [
        "a copy of the base's own tensor",
        "a second copy of the same tensor",
    ]
    assert adapter.stored == len(adapter.skipped) + 4


# Ties

TIES: dict[str, tuple[dict[str, Any], set[str], dict[str, str]]] = {
    "factors": ({"target_modules": ["embed_tokens"]}, {EMBED, HEAD}, {EMBED: OWN, HEAD: OWN}),
    "factors of the head": ({"target_modules": ["lm_head"]}, {EMBED, HEAD}, {}),
    "whole": ({"modules_to_save": ["embed_tokens"], **LORA}, set(), {
        EMBED: "modules_to_save", HEAD: "modules_to_save and ensure_weight_tying"
    }),
    "head whole": ({"modules_to_save": ["lm_head"], **LORA}, set(), {
        EMBED: "modules_to_save", HEAD: "modules_to_save and ensure_weight_tying"
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", TIES)
def test_tied_tensors_that_are_trained_as_one_are_stored_twice(tmp_path: Path, name: str) -> None:
    config, targets, reasons = TIES[name]
    made = saved(tmp_path, llama(tied=True), ensure_weight_tying=True, **config)
    adapter = made.adapter
    assert adapter.tied
    assert {target.name for target in adapter.targets} - {"model.layers.0.self_attn.q_proj.weight"} == targets
    assert {whole: reason for whole, (reason, *_) in wholes(made).items()} == reasons
    if targets:
        embed, head = (next(t for t in adapter.targets if t.name == key) for key in (EMBED, HEAD))
        assert torch.equal(made.delta(embed), made.delta(head))
    else:
        assert torch.equal(content(made, adapter, EMBED), content(made, adapter, HEAD))


@pytest.mark.parametrize(
    "config",
    [{"target_modules": ["word_embeddings"]}, {"target_modules": ["query"], "modules_to_save": ["word_embeddings"]}],
    ids=["factors", "whole"],
)
def test_a_tie_that_peft_does_not_find(tmp_path: Path, config: dict[str, Any]) -> None:
    """It leaves the head as it is, whatever the config says."""
    made = saved(tmp_path, bert("BertForMaskedLM"), ensure_weight_tying=True, **config)
    assert not made.adapter.tied
    table = "bert.embeddings.word_embeddings.weight"
    state = made.model.state_dict()
    head = state[f"{PREFIX}cls.predictions.decoder.weight"]
    assert torch.equal(head, made.before[table])
    assert {name for name in made.adapter.names if "query" not in name} == {table}


def test_lengths_are_not_tied(tmp_path: Path) -> None:
    """Those of an embedding are of its columns, those of a head of its rows."""
    made = saved(tmp_path, llama(tied=True), ensure_weight_tying=True, target_modules=["lm_head"], use_dora=True)
    adapter = made.adapter
    assert not adapter.tied
    lengths = {target.name: target.delta.magnitude for target in adapter.targets}
    assert {name: found.shape for name, found in lengths.items() if found} == {EMBED: (8,), HEAD: (20,)}


@pytest.mark.parametrize(
    ("tied", "save", "config"),
    [
        (False, {}, {"ensure_weight_tying": True, "target_modules": ["q_proj", "embed_tokens"]}),
        (False, {"save_embedding_layers": True}, {"ensure_weight_tying": True, "target_modules": ["q_proj"]}),
        (True, {}, {"target_modules": ["embed_tokens", "lm_head"]}),
        (True, {}, {"modules_to_save": ["embed_tokens", "lm_head"], **LORA}),
    ],
    ids=["untied", "untied tables beside it", "factors apart", "wholes apart"],
)
def test_tables_that_are_not_changed_as_one(
    tmp_path: Path, tied: bool, save: dict[str, Any], config: dict[str, Any]
) -> None:
    made = saved(tmp_path, llama(tied=tied), save=save, **config)
    assert not made.adapter.tied
    assert {EMBED, HEAD} & set(made.adapter.names)


# Heads and biases


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_beside_a_head(tmp_path: Path, bias: str) -> None:
    """PEFT stores the head's bias three times where all are trained."""
    made = saved(tmp_path, bert("BertForSequenceClassification"), target_modules=["query"], bias=bias,
                 task_type="SEQ_CLS")  # fmt: skip
    found, adapter = wholes(made), made.adapter
    query = "bert.encoder.layer.0.attention.self.query.bias"
    head = {f"classifier.{parameter}": ("modules_to_save", True, False) for parameter in ("weight", "bias")}
    assert {key: found[key] for key in (*head, query)} == head | {query: (f"bias = {bias}", False, False)}
    state = made.model.state_dict()
    assert torch.equal(content(made, adapter, query), made.module(query.removesuffix(".bias")).base_layer.bias)
    trained = state[f"{PREFIX}classifier.modules_to_save.default.bias"]
    assert torch.equal(content(made, adapter, "classifier.bias"), trained)
    rest = {key for key in made.before if key.endswith(".bias") and "classifier" not in key} - {query}
    assert set(found) - {query, *head} == (rest if bias == "all" else set())
    reasons = ["a copy of the base's own tensor", "a second copy of the same tensor"]
    assert sorted(reason for _, reason in adapter.skipped) == (reasons if bias == "all" else [])


@pytest.mark.parametrize("entry", ["pooler.dense", "pooler", "ooler.dense"])
def test_modules_inside_others(tmp_path: Path, entry: str) -> None:
    """PEFT compares how names end."""
    made = saved(tmp_path, bert("BertModel"), target_modules=["query"], modules_to_save=[entry], bias="all")
    found = {f"pooler.dense.{parameter}" for parameter in ("weight", "bias")}
    reasons = {name: said for name, said in wholes(made).items() if said[0] == "modules_to_save"}
    assert reasons == dict.fromkeys(found, ("modules_to_save", True, False))
    for name in found:
        trained = made.module("pooler").state_dict() if entry == "pooler" else made.module("pooler.dense").state_dict()
        key = next(key for key in trained if "modules_to_save.default" in key and key.endswith(name.split(".")[-1]))
        assert torch.equal(content(made, made.adapter, name), trained[key])


@pytest.mark.parametrize("infix", ["modules_to_save.default", "modules_to_save.style", "modules_to_save"])
def test_infixes_that_a_person_left_in(tmp_path: Path, infix: str) -> None:
    made = saved(tmp_path, bert("BertForSequenceClassification"), target_modules=["query"], task_type="SEQ_CLS")
    tensors = made.tensors()
    for parameter in ("weight", "bias"):
        tensors[f"{PREFIX}classifier.{infix}.{parameter}"] = tensors.pop(f"{PREFIX}classifier.{parameter}")
        tensors[f"{PREFIX}classifier.original_module.{parameter}"] = made.before[f"classifier.{parameter}"]
    made.write(tensors)
    assert set(wholes(made)) == {"classifier.weight", "classifier.bias"}
    assert {reason for _, reason in made.adapter.skipped} == {"a copy of the base's own tensor"}


def test_the_infix_without_a_name_as_older_versions_saved_it(tmp_path: Path) -> None:
    made = saved(tmp_path, bert("BertModel"), target_modules=["query"], modules_to_save=["pooler"], bias="all")
    tensors = made.tensors()
    infix = f"{PREFIX}pooler.modules_to_save"
    tensors[f"{infix}.dense.bias"] = tensors.pop(f"{infix}.default.dense.bias")
    made.write(tensors)
    found = {name for name, said in wholes(made).items() if said[0] == "modules_to_save"}
    assert found == {"pooler.dense.weight", "pooler.dense.bias"}


def test_two_tensors_for_one_parameter(tmp_path: Path) -> None:
    made = saved(tmp_path, bert("BertForSequenceClassification"), target_modules=["query"], task_type="SEQ_CLS")
    tensors = made.tensors()
    key, twin = f"{PREFIX}classifier.bias", f"{PREFIX}classifier.modules_to_save.default.bias"
    made.write(tensors | {twin: tensors[key]})
    adapter = made.adapter
    assert [(tensor.key, reason) for tensor, reason in adapter.skipped] == [(twin, "a second copy of the same tensor")]
    for other in (tensors[key] + 1, tensors[key].float(), tensors[key].reshape(1, -1)):
        made.write(tensors | {twin: other})
        with pytest.raises(NamesError, match="one parameter") as caught:
            _ = made.adapter
        assert caught.value.details == (f"classifier.bias: {key} and {twin}",)
    made.write(tensors | {"classifier.bias": tensors[key] + 1})
    with pytest.raises(NamesError, match="one parameter"):
        _ = made.adapter


def test_biases_of_attention_as_older_versions_saved_them(tmp_path: Path) -> None:
    made = saved(tmp_path, net(), target_modules=["attn"], bias="all")
    bias = torch.ones(24, dtype=torch.float64)
    made.write(made.tensors() | {f"{PREFIX}attn.base_layer.in_proj_bias": bias})
    found = wholes(made)
    assert found["attn.in_proj_bias"] == found["attn.out_proj.bias"] == ("bias = all", False, False)


def test_what_the_config_names_nowhere(tmp_path: Path) -> None:
    made = saved(tmp_path, nn.ModuleDict({"up": nn.Linear(3, 4), "norm": nn.LayerNorm(3)}), target_modules=["up"])
    made.write(made.tensors() | {f"{PREFIX}norm.weight": torch.ones(3)})
    assert wholes(made) == {"norm.weight": ("in the file whole, though the config names it nowhere", False, False)}
    warning = "the file holds parameters whole that its config names nowhere; they replace the base's: norm.weight"
    assert made.adapter.warnings == (warning,)


def test_of_many_that_the_config_names_nowhere_some_are_said(tmp_path: Path) -> None:
    made = saved(tmp_path, nn.ModuleDict({"up": nn.Linear(3, 4)}), target_modules=["up"])
    made.write(made.tensors() | {f"{PREFIX}norms.{n:02}.weight": torch.ones(3) for n in range(12)})
    (warning,) = made.adapter.warnings
    assert warning.endswith(
        "norms.00.weight, " + ", ".join(f"norms.{n:02}.weight" for n in range(1, 10)) + " and 2 more"
    )


TUNERS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "LoRA": (LoraConfig, {"r": 2, "init_lora_weights": False}),
    "LoHa": (LoHaConfig, {"r": 2, "init_weights": False}),
    "IA3": (IA3Config, {"feedforward_modules": []}),
}


@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize("parameter", ["weight", "bias"])
def test_what_peft_leaves_out_beside_factors_is_refused(tuner: str, parameter: str, tmp_path: Path) -> None:
    """R091: PEFT passes over a parameter of a module that has factors, and takes one of a module that has none."""
    kind, fields = TUNERS[tuner]

    def model() -> nn.Module:
        torch.manual_seed(1)
        return nn.ModuleDict({"up": nn.Linear(3, 4), "other": nn.Linear(3, 4)})

    with quiet(4):
        get_peft_model(model(), kind(target_modules=["up"], **fields)).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    own = load_file(file)
    for module in ("up", "other"):
        there = torch.full_like(getattr(model().get_submodule(module), parameter), 7)
        save_file(own | {f"{PREFIX}{module}.{parameter}": there}, file)
        with quiet(4):
            loaded = PeftModel.from_pretrained(model(), tmp_path).base_model.model.get_submodule(module)
        taken = torch.equal(getattr(loaded.base_layer if module == "up" else loaded, parameter), there)
        assert taken == (module == "other"), "PEFT does otherwise now"
        if taken:
            assert [whole.name for whole in open_adapter(tmp_path).replacements] == [f"other.{parameter}"]
            assert "other." in " ".join(open_adapter(tmp_path).warnings)
        else:
            with pytest.raises(UnsupportedError, match="whole of modules that it has factors for") as caught:
                open_adapter(tmp_path)
            assert caught.value.details == (f"{PREFIX}up.{parameter}",)


def test_what_the_config_names_may_stand_beside_factors(tmp_path: Path) -> None:
    made = saved(tmp_path, nn.ModuleDict({"up": nn.Linear(3, 4)}), target_modules=["up"], bias="lora_only")
    assert "up.bias" in wholes(made)
    assert made.adapter.warnings == ()
