"""Adapters of live models as files: the bytes that `lora-cli inject` writes, what PEFT makes of them, and back."""

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import CASES, Case, Make, Model, assert_same_bits, load, maker, quiet, read_tensors
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_cli
from lora_cli.errors import LoraCliError, NamesError, OutputExistsError, ShapeError, UnsupportedError
from lora_cli.nn import GroupedLinear, Injection, LoRAConfig, inject, load_adapter, save_merged

BY_NAME = {case.name: case for case in CASES}
OWN_CLASS = {"gpt2-bare": "AutoModel", "bert-classifier": "AutoModel"}
LIVE = ("llama-tied", "llama-untied", "gpt2", "gpt2-bare", "bert-mlm", "t5")
TRAINED = ("llama-tied", "llama-untied", "gpt2", "t5", "bert-classifier")


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    return maker(tmp_path_factory)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with quiet(1):
        yield


def live(name: str, folder: Path) -> tuple[Case, Path, Model]:
    """A base on disk, and the same one in memory."""
    case = replace(BY_NAME[name], auto=OWN_CLASS.get(name, BY_NAME[name].auto), load_options=None)
    base = folder / "base"
    if not base.exists():
        case.base().save_pretrained(base)
    return case, base, load(case, base, torch.float32)


def stirred(injection: Injection) -> Injection:
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return injection


@torch.no_grad()
def logits(model: Model, case: Case) -> Tensor:
    output = model.eval()(**case.inputs())
    values: Tensor = output.logits if "logits" in output else output.last_hidden_state
    return values


def with_peft(base: nn.Module, adapter: Path) -> Model:
    from peft import PeftModel

    return PeftModel.from_pretrained(base, adapter).eval()


@pytest.mark.parametrize("name", LIVE)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"targets": ("attention",), "init": "gaussian", "std": 0.3, "seed": 5, "alpha": 3.0},
        {"init": "orthogonal", "dtype": "bf16", "rslora": True, "exclude": ("re:.*\\.(q|q_proj|query|c_attn)",)},
    ],
)
def test_files_and_live_models_get_the_same_bytes(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    _, base, model = live(name, tmp_path)
    lora_cli.inject(base, tmp_path / "files", rank=3, **fields)
    inject(model, LoRAConfig(rank=3, **fields)).save(tmp_path / "live", base_model="")
    files, saved = tmp_path / "files", tmp_path / "live"
    assert (files / "adapter_model.safetensors").read_bytes() == (saved / "adapter_model.safetensors").read_bytes()
    found, expected = (json.loads((folder / "adapter_config.json").read_text()) for folder in (saved, files))
    different = {key for key in found if found[key] != expected[key]}
    # A file does not say which head a live model has; its short names steer clear of any.
    assert different <= ({"target_modules", "task_type"} if name in ("gpt2-bare", "bert-mlm", "t5") else set())


def test_embeddings_too(tmp_path: Path) -> None:
    _, base, model = live("llama-untied", tmp_path)
    targets = ("attention", "embed_tokens")
    lora_cli.inject(base, tmp_path / "files", rank=2, targets=targets)
    inject(model, rank=2, targets=targets).save(tmp_path / "live")
    files, saved = (tmp_path / place / "adapter_model.safetensors" for place in ("files", "live"))
    assert files.read_bytes() == saved.read_bytes()
    assert "base_model.model.model.embed_tokens.lora_embedding_A" in load_file(saved)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"rslora": True, "alpha": 5.0},
        {"dora": True},
        {"rank_pattern": {"layers.1.**": 2}, "alpha_pattern": {"q_proj": 9.5}},
        {"bias": "all", "modules_to_save": ("lm_head", "model.norm")},
        {"targets": ("attention", "embed_tokens"), "dropout": 0.5},
        {"layers": (0,), "init": "gaussian"},
    ],
    ids=str,
)
def test_peft_loads_what_is_saved_and_computes_the_same(fields: dict[str, Any], tmp_path: Path) -> None:
    case, base, model = live("llama-untied", tmp_path)
    plain = logits(model, case)
    injection = stirred(inject(model, LoRAConfig(rank=4, alpha=8.0).__class__(**{"rank": 4, "alpha": 8.0} | fields)))
    injection.save(tmp_path / "adapter")
    expected = logits(model, case)
    found = logits(with_peft(load(case, base, torch.float32), tmp_path / "adapter"), case)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found, plain, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("saved", [(), ("classifier",)])
def test_peft_loads_adapters_of_classifiers(saved: tuple[str, ...], tmp_path: Path) -> None:
    from transformers import AutoConfig, BertForSequenceClassification

    config = AutoConfig.for_model(
        "bert", vocab_size=160, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    model, other = (BertForSequenceClassification(config).eval() for _ in range(2))
    other.load_state_dict(model.state_dict())
    stirred(inject(model, rank=2, modules_to_save=saved)).save(tmp_path / "adapter")
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        expected = model.eval()(ids).logits
        found = with_peft(other, tmp_path / "adapter")(ids).logits
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


class Small(nn.Module):
    """A model of convolutions and a table, which is no transformers model."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 6)
        self.narrow = nn.Conv1d(6, 4, 3, stride=2, padding=1, bias=True)
        self.wide = nn.Conv2d(1, 5, (2, 3), padding="same")
        self.deep = nn.Conv3d(1, 2, 1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.narrow(self.table(ids).mT).unsqueeze(1)
        wide: Tensor = self.deep(self.wide(x).unsqueeze(1))
        return wide


@pytest.mark.parametrize("dora", [False, True])
def test_peft_on_convolutions_and_tables(dora: bool, tmp_path: Path) -> None:
    model, other, ids = Small(), Small(), torch.arange(14).view(2, 7) % 7
    other.load_state_dict(model.state_dict())
    targets = ("table", "narrow", "wide") if dora else ("table", "narrow", "wide", "deep")
    stirred(inject(model, rank=2, alpha=3, targets=targets, dora=dora)).save(tmp_path / "adapter")
    with torch.no_grad():
        expected = model.eval()(ids)
        found = with_peft(other, tmp_path / "adapter")(ids)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("saved", [{"dora": True}, {"targets": ("attention", "embed_tokens"), "rslora": True}], ids=str)
def test_what_is_saved_loads_again(saved: dict[str, Any], tmp_path: Path) -> None:
    case, _, model = live("llama-untied", tmp_path)
    fields: dict[str, Any] = {"rank": 3, "alpha": 7.0} | saved
    injection = stirred(inject(model, LoRAConfig(**fields)))
    injection.save(tmp_path / "adapter")
    expected = logits(model, case)
    injection.take_out()
    load_adapter(model, tmp_path / "adapter")
    assert torch.equal(logits(model, case), expected)
    described = lora_cli.inspect(tmp_path / "adapter")
    assert described.adapter_kind == ("DoRA" if "dora" in saved else "rsLoRA")
    changed = tmp_path / "changed"
    shutil.copytree(tmp_path / "adapter", changed)
    tensors = read_tensors(changed)
    key = next(key for key in tensors if "magnitude" in key or "lora_B" in key)
    save_file(tensors | {key: tensors[key] * 1.5}, changed / "adapter_model.safetensors")
    assert lora_cli.diff(tmp_path / "adapter", tmp_path / "adapter").same
    assert not lora_cli.diff(tmp_path / "adapter", changed).same


@pytest.mark.parametrize("name", TRAINED)
def test_adapters_that_peft_trained_load_into_live_models(name: str, make: Make, tmp_path: Path) -> None:
    made = make(BY_NAME[name], torch.float32)
    model = load(made.case, made.base_dir, torch.float32)
    plain = logits(model, made.case)
    injection = load_adapter(model, made.adapter_dir)
    adapted = made.logits("adapted")
    assert torch.allclose(logits(model, made.case), adapted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain, adapted, rtol=1e-2, atol=1e-2)
    injection.save(tmp_path / "again")
    again, before = read_tensors(tmp_path / "again"), read_tensors(made.adapter_dir)
    assert set(again) == set(before)
    for key, tensor in before.items():
        assert_same_bits(again[key], tensor.to(again[key].dtype), key)
    injection.take_out()
    assert torch.equal(logits(model, made.case), plain)


def test_the_table_that_peft_stores_beside_its_factors(tmp_path: Path) -> None:
    """It is the model's own, and nothing to train; another one would make another model."""
    from peft import LoraConfig, get_peft_model

    case, base, model = live("llama-untied", tmp_path)
    trained = get_peft_model(
        load(case, base, torch.float32), LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"])
    )
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    trained.save_pretrained(tmp_path / "adapter")
    file, table = tmp_path / "adapter" / "adapter_model.safetensors", "model.embed_tokens.base_layer.weight"
    tensors = load_file(file)
    assert f"base_model.model.{table}" in tensors
    injection = load_adapter(model, tmp_path / "adapter")
    assert torch.allclose(logits(model, case), logits(trained, case), rtol=1e-5, atol=1e-6)
    assert not injection.wholes_of("default")
    assert all(".lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    injection.take_out()
    save_file(tensors | {f"base_model.model.{table}": tensors[f"base_model.model.{table}"] + 1}, file)
    with pytest.raises(UnsupportedError, match="the model's are others") as caught:
        load_adapter(model, tmp_path / "adapter")
    assert caught.value.details == ("model.embed_tokens.weight",)
    assert not any(".lora_" in key for key in model.state_dict())


@pytest.mark.parametrize("name", ["llama-untied", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_live_and_file_merges_are_the_same_bytes(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    case = BY_NAME[name]
    base = case.base().to(dtype)
    base.save_pretrained(tmp_path / "base")
    model = load(case, tmp_path / "base")
    injection = stirred(inject(model, rank=4, targets=("all-linear",)))
    result = save_merged(injection, tmp_path / "base", tmp_path / "merged")
    assert result.ledger["ignored"] == 0
    injection.merge()
    live_state = injection.base_state()
    for key, tensor in read_tensors(tmp_path / "merged").items():
        assert_same_bits(live_state[key], tensor, key)
    # The undo file has the factors in it: nothing else is needed.
    lora_cli.unmerge(tmp_path / "merged", [], tmp_path / "back")
    for file in (tmp_path / "base").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "back" / file.name).read_bytes()


def test_from_scratch_files_load_into_layers(tmp_path: Path) -> None:
    """A with (in × rank), B with (rank × out), under a wrapper's prefix and without a scale."""
    model = nn.ModuleDict({"up": nn.Linear(6, 9)})
    a, b = torch.randn(6, 2), torch.randn(2, 9)
    save_file({"lora_model.up.lora_A": a, "lora_model.up.lora_B": b}, tmp_path / "adapter.safetensors")
    x = torch.randn(3, 6)
    expected = model["up"](x) + (x @ a @ b) * 4 / math.sqrt(2)
    options = lora_cli.ReadOptions(scale=4 / math.sqrt(2))
    load_adapter(model, tmp_path / "adapter.safetensors", options=options)
    assert torch.allclose(model["up"](x), expected, atol=1e-5)


def test_a_second_adapter_from_files(tmp_path: Path) -> None:
    _, _, model = live("llama-untied", tmp_path)
    injection = stirred(inject(model, rank=2, targets=("q_proj",), name="style"))
    injection.save(tmp_path / "style", "style")
    before = {key: tensor.clone() for key, tensor in read_tensors(tmp_path / "style").items()}
    injection.load(tmp_path / "style", "twin", dropout=0.25)
    assert injection.configs["twin"].dropout == 0.25
    injection.save(tmp_path / "twin", "twin")
    for key, tensor in read_tensors(tmp_path / "twin").items():
        assert_same_bits(before[key], tensor, key)


def test_what_does_not_fit_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    _, _, model = live("llama-untied", tmp_path)
    injection = stirred(inject(model, rank=2, targets=("q_proj",)))
    with pytest.raises(NamesError, match="No such adapter"):
        injection.save(tmp_path / "adapter", "nobody")
    injection.save(tmp_path / "adapter")
    with pytest.raises(OutputExistsError):
        injection.save(tmp_path / "adapter")
    grouped = inject(nn.ModuleDict({"experts": GroupedLinear(2, 3, 4)}), rank=2, targets=("experts",))
    with pytest.raises(UnsupportedError, match="PEFT has no form"):
        grouped.save(tmp_path / "grouped")
    assert not (tmp_path / "grouped").exists()
    wrong = nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList([])})})
    with pytest.raises(NamesError):
        load_adapter(wrong, tmp_path / "adapter")
    narrow = nn.Module()
    for key in read_tensors(tmp_path / "adapter"):
        path = key.removeprefix("base_model.model.").rpartition(".lora_")[0].split(".")
        place = narrow
        for part in path[:-1]:
            if not hasattr(place, part):
                place.add_module(part, nn.Module())
            place = getattr(place, part)
        place.add_module(path[-1], nn.Linear(3, 3))
    with pytest.raises(ShapeError, match="another size"):
        load_adapter(narrow, tmp_path / "adapter")
    assert not any(".lora_" in key for key in narrow.state_dict())


def test_errors_of_reading_come_through(tmp_path: Path) -> None:
    with pytest.raises(LoraCliError):
        load_adapter(nn.Linear(2, 2), tmp_path / "nothing")
