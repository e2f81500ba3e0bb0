"""The catalogue: families × options, and how a case is made: base and adapter on disk, and what they must merge to."""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import pytest
import torch
from expert_cases import EXPERT_CASES, EXPERT_REFUSED
from expert_families import EXPERT_FAMILIES
from expert_files import moved, turned
from expert_options import EXPERT_OPTIONS
from families import FAMILIES as PLAIN_FAMILIES
from families import Family, Tensors, respelled, whole
from family_models import Model
from lora_options import OPTIONS as LORA_OPTIONS
from lora_options import Option
from models import quiet, read_tensors
from safetensors.torch import save_file

from lora_cli.errors import LoraCliError, NamesError, ShapeError, UnsupportedError

FAMILIES: Final = PLAIN_FAMILIES | EXPERT_FAMILIES
OPTIONS: Final = LORA_OPTIONS | EXPERT_OPTIONS

STEPS: Final = 3
STEP: Final = 0.03
"""How far a step of training moves each number."""


@dataclass(frozen=True)
class Case:
    """An adapter of a kind, for a base of a family."""

    family: Family
    option: Option

    def __str__(self) -> str:
        return f"{self.family.name}+{self.option.name}"

    @property
    def seed(self) -> int:
        """Stable over processes, which `hash` is not."""
        return zlib.crc32(str(self).encode())

    def answer(self, model: Model) -> torch.Tensor:
        """What the model says to the case's inputs."""
        return self.family.answer(model, self.option.inputs(self.family.inputs()))

    def answer_of(self, folder: Path) -> torch.Tensor:
        """The answer of a checkpoint."""
        with quiet(self.seed), torch.no_grad():
            return self.answer(self.family.load(folder))

    def may_ignore(self, tensor: str) -> bool:
        """Whether a merge may leave this tensor of the adapter out."""
        return bool(self.option.ignored) and re.search(self.option.ignored, tensor) is not None


# The catalogue

PLAIN: Final = "all-linear dora"
"""What every family is tried with; where it has a kernel, `kernel kernel-dora` as well."""
ENDS: Final = "table head table-and-head head-saved table-saved"
AS_ONE: Final = "table-as-one head-as-one table-and-head-as-one table-saved-as-one head-saved-as-one both-saved-as-one"
RESIZED: Final = "resized resized-both resized-saved resized-tokens resized-told smaller"

MORE: Final = {
    "llama": f"""
        {ENDS} {RESIZED} resized-dora both-saved dora-head-saved table-and-linear table-dora head-dora
        table-and-head-dora norms-saved tables-with-it rslora patterns rslora-patterns rank-above-width regex exclude
        layers dropout named tokens tokens-named tokens-of-head tokens-of-both tokens-dora dora-rslora dora-patterns
        dora-negative dora-dropout blocks replicated replicated-odd replicated-dora replicated-head monteclora velora
        random gaussian orthogonal eva mica mica-table pissa-converted pissa_niter_4-converted olora-converted
        corda-converted lora_ga-converted pissa-with-initial pissa_niter_4-with-initial olora-with-initial
        corda-with-initial lora_ga-with-initial""",
    "llama-tied": f"""
        {ENDS} {AS_ONE} {RESIZED} resized-table both-saved table-dora table-and-head-dora tables-with-it tokens
        tokens-named tokens-of-both tokens-as-one tokens-and-head""",
    "llama-head-stored": "table head table-and-head-as-one tokens tokens-named tokens-of-head tokens-of-both resized",
    "llama-shards": "head both-saved replicated resized resized-tokens norms-saved",
    "llama-bf16": """
        table-as-one head-as-one table-and-head-as-one table-and-head table-dora head-saved tokens tokens-of-both
        resized-both resized-tokens replicated""",
    "llama-bare": "table replicated",
    "mistral": "head-saved replicated",
    "qwen2": f"{ENDS} bias-all lora-bias",
    "qwen3": "table head-saved",
    "gemma2": "table head head-saved",
    "gemma3-text": "table head",
    "gemma3": f"{ENDS} table-and-head-as-one resized-told tokens-named",
    "phi": "table-and-head bias-all lora-bias",
    "phi3": "table-and-head dora-rslora",
    "gpt2": f"""
        {ENDS} table-and-head-as-one bias-all bias-lora-only lora-bias layers-pattern fan-in-fan-out positions
        table-and-positions-as-one table-and-linear tokens-named tokens-and-head resized dora-bias dora-rslora
        dora-negative mica pissa-converted""",
    "opt": f"{ENDS} bias-all tokens resized",
    "gpt-neox": f"{ENDS} old-head old-head-saved",
    "bert": f"""
        {ENDS} table-and-positions-as-one head-saved-as-one bias-all bias-lora-only lora-bias dora-bias table-dora
        positions replicated""",
    "bert-bare": "table-and-linear",
    "roberta": "table table-dora head head-saved classifier-saved nested-saved",
    "t5": f"{ENDS} table-and-head-as-one",  # PEFT does not tie them
    "whisper": f"{ENDS}",
    "llava": f"{ENDS} old old-dora old-both old-head-saved between",
    "qwen2-vl": f"{ENDS} old old-both",
    "vit": "old old-dora",
    "dinov2-gated": "bias-all rslora lora-bias",
    "nomic": "rslora patterns",
    "siglip": "attention attention-rslora",
    "small": "attention kernels kernels-dora kernels-lora-bias table table-dora lora-bias",
    "llava-today": "old old-both table-and-head",
    "llava-published": "old old-both between table-and-head",
    "gemma3-published": "table-and-head tokens-named",
    "qwen2-vl-today": "old old-both",
    "vit-today": "old",
    "gpt-neox-today": "head head-saved old-head old-head-saved",
    "llava-text": "table-and-head head-saved",
    "gemma3-words": "table",
    "qwen2-vl-text": "table-and-head head-saved tokens",
}
"""What some are tried with besides: a new kind of adapter is one word here, and one line in `lora_options`."""


def _options(family: Family) -> list[str]:
    kernel = "kernel kernel-dora" if family.kernel else ""
    own = f"{PLAIN} {kernel} {MORE.get(family.name, '')}" if family.name in PLAIN_FAMILIES else ""
    return list(dict.fromkeys(f"{own} {EXPERT_CASES.get(family.name, '')}".split()))


CASES: Final = [Case(family, OPTIONS[name]) for family in FAMILIES.values() for name in _options(family)]


REFUSED: Final[dict[str, dict[str, tuple[type[LoraCliError], str]]]] = {
    "llama": {
        "alora": (UnsupportedError, "activated LoRA"),
        "arrow": (UnsupportedError, "Arrow"),
        "qalora": (UnsupportedError, "QA-LoRA"),
        "kasa": (UnsupportedError, "KaSA"),
        "loftq": (UnsupportedError, "loftq"),
        "pissa": (UnsupportedError, "pissa"),
        "pissa_niter_4": (UnsupportedError, "pissa_niter_4"),
        "olora": (UnsupportedError, "olora"),
        "corda": (UnsupportedError, "corda"),
        "lora_ga": (UnsupportedError, "lora_ga"),
        "lora-bias": (NamesError, r"q_proj\.bias"),
        "resized-table": (ShapeError, r"lm_head\.weight has 48"),  # PEFT saves one of two resized tables
    },
    "marian": {"resized": (ShapeError, r"final_logits_bias has 48")},  # a buffer, which PEFT does not save
    "llama-bare": {"head-adapted": (NamesError, r"score\.weight")},
    "bert-bare": {"head-adapted": (NamesError, r"classifier\.weight")},
}
"""What cannot be merged, with the error, and the words that name why."""
REFUSALS: Final = [
    pytest.param(Case(FAMILIES[family], OPTIONS[option]), error, words, id=f"{family}+{option}")
    for family, options in (*REFUSED.items(), *EXPERT_REFUSED.items())
    for option, (error, words) in options.items()
]


# Making one


@dataclass(frozen=True)
class Made:
    """A case on disk, with its oracles.

    Attributes:
        case: Which.
        adapter: The folder that PEFT wrote.
        adapted: What the adapted model answers.
        before: What it answers without the adapter; None where the base cannot be asked that.
        merged: PEFT's own merge in float64, under the names that a model is saved with; None where it is wrong.
    """

    case: Case
    adapter: Path
    adapted: torch.Tensor
    before: torch.Tensor | None
    merged: dict[str, torch.Tensor] | None

    @property
    def folders(self) -> list[Path]:
        """The adapter, and what it was before training, where a merge is given that."""
        return [self.adapter, *([self.adapter.parent / "initial"] if self.case.option.initial else [])]


def base_of(family: Family, root: Path) -> Path:
    """The folder of a family's base, made once."""
    folder = root / family.name
    if not folder.exists():
        with quiet(family.seed):
            family.save(folder)
    return folder


def make(case: Case, base: Path, folder: Path, *, mergeable: bool = True) -> Made:
    """Train from the files, as users do, and save with PEFT; what is not `mergeable` PEFT is not asked to merge."""
    from peft import get_peft_model

    option = case.option
    with quiet(case.seed):
        model = case.family.part(case.family.load(base))
        before = None
        if option.inputs is dict:
            with torch.no_grad():
                before = case.answer(model)
        config = option.config(case.family)
        option.prepare(model, case.family, config)
        adapted = get_peft_model(model, config, adapter_name=option.place or "default")
        option.begin(adapted, case.family, folder)
        train(adapted, case)
        option.end(adapted)
        with torch.no_grad():
            answer = case.answer(adapted.eval())
        option.save(adapted, folder / "adapter")
        adapter = folder / "adapter" / option.place
        respell(adapter, case)
        tied = case.family.tied and option.ties
        compared = mergeable and option.peft_merges and case.family.part is whole and not tied
        merged = merged_by_peft(adapted, case.family, read_tensors(base), folder / "peft") if compared else None
    if before is not None and before.shape != answer.shape:
        before = None  # other words
    return Made(case, adapter, answer, before, merged)


def train(adapted: Model, case: Case) -> None:
    """A few steps towards random answers; what plays no part in them moves at random, so that nothing stays zero."""
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=STEP)
    goal = torch.randn_like(case.answer(adapted.eval()).detach())
    adapted.train()
    for _ in range(STEPS):
        optimizer.zero_grad()
        (case.answer(adapted) - goal).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(torch.randn_like(parameter) * STEP)


def merged_by_peft(adapted: Model, family: Family, base: Tensors, folder: Path) -> Tensors:
    """PEFT's own merge, computed in float64; a backbone's file has no prefix, and its model has."""
    merged = adapted.double().merge_and_unload()
    merged.save_pretrained(folder)
    prefix = getattr(merged, "base_model_prefix", "") + "."
    tensors = {}
    for name, tensor in family.stored(merged, read_tensors(folder)).items():
        key = name if name in base else respelled(name, family.spelling)
        bare = key.removeprefix(prefix)
        tensors[bare if bare in base else key] = tensor
    return tensors


def respell(adapter: Path, case: Case) -> None:
    """Write the adapter's names in another way."""
    spelling = case.option.spelling(case.family)
    if spelling:
        prefix, tensors = "base_model.model.", read_tensors(adapter)
        names = {name: prefix + respelled(name.removeprefix(prefix), spelling) for name in tensors}
        respelt = {names[name]: tensor for name, tensor in tensors.items()}
        assert respelt.keys() != tensors.keys(), "the spelling concerns no name"
        save_file(respelt, adapter / "adapter_model.safetensors", {"format": "pt"})


# Damage


def halved(tensors: Tensors) -> Tensors:
    """Every number at half its size."""
    return {key: tensor / 2 for key, tensor in tensors.items()}


def rolled(tensors: Tensors) -> Tensors:
    """The rows of every tensor but A moved on by one."""
    return {key: tensor if "_A" in key else tensor.roll(1, 0) for key, tensor in tensors.items()}


def transposed(tensors: Tensors) -> Tensors:
    """A and B of square layers in each other's place; rows moved on where nothing is square."""
    changed = {}
    for key in tensors:
        other = key.replace("_A", "_B") if "_A" in key else key.replace("_B", "_A")
        fits = other in tensors and tensors[key].ndim == 2 and tensors[other].shape[::-1] == tensors[key].shape
        if other != key and fits:
            changed[key] = tensors[other].T.contiguous()
    return tensors | changed if changed else rolled(tensors)


DAMAGES: Final[tuple[Callable[[Tensors], Tensors], ...]] = (halved, rolled, transposed)


def damages(made: Made) -> tuple[Callable[[Tensors], Tensors], ...]:
    """One for each case, by turns; where experts are stacked, everything that can be wrong with them."""
    if made.case.option.ignored:
        return (halved,)
    if not made.case.family.experts:
        return (DAMAGES[made.case.seed % len(DAMAGES)],)
    config = json.loads((made.adapter / "adapter_config.json").read_text())
    grouped = config.get("lora_B_layout") == "grouped_by_expert"
    count = made.case.family.count
    others = (partial(moved, count=count, grouped=grouped),) if count > 1 else ()
    return (halved, partial(turned, count=count), *others)


def damaged(made: Made, folder: Path, change: Callable[[Tensors], Tensors] | None = None) -> Path:
    """The same adapter with other numbers, but the base's own; what it holds twice is the same twice."""
    shutil.copytree(made.adapter, folder)
    tensors = read_tensors(made.adapter)
    trained = {
        key: tensor for key, tensor in tensors.items() if not re.search(r"base_layer\.weight|original_module", key)
    }
    others = {key: tensor.contiguous() for key, tensor in (change or damages(made)[0])(trained).items()}
    kept = {key: tensor for key, tensor in tensors.items() if key not in trained}
    save_file(kept | others, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder
