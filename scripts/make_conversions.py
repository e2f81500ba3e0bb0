"""Generate lora_cli/data/conversions.json and conv1d.yaml: what transformers knows of names, as plain facts.

For every model class of the installed transformers: how names in its files become names of its modules, which parts
it has, which tensors it ties. The classes are made on the meta device, small, so this takes a minute and no weights.

Usage: python scripts/make_conversions.py [--check]
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import re
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from transformers import conversion_mapping, core_model_loading

DATA = Path(__file__).resolve().parent.parent / "lora_cli" / "data"
ORIGIN = (
    "Facts about the models of transformers (https://github.com/huggingface/transformers, Apache-2.0), taken from its"
    " conversion_mapping.py and from its model classes by scripts/make_conversions.py"
)
DEPTHS = re.compile(r"(num_|n_)?(hidden_|encoder_|decoder_)?(layers?|depth)|num_hidden_groups")
"""Names of config fields that say how many layers there are."""

Model = Any  # of transformers, which is not typed
Facts = dict[str, Any]


def main() -> int:
    """Write the files, or with --check say which are out of date."""
    logging.disable(logging.CRITICAL)
    made = list(instances(model_classes()))
    wanted = {DATA / "conversions.json": rendered(facts(made)), DATA / "conv1d.yaml": conv1d(made)}
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text("utf-8") != text]
    if "--check" in sys.argv:
        for path in stale:
            print(f"out of date: {path.name}; run: python scripts/make_conversions.py")
        return 1 if stale else 0
    for path in stale:
        path.write_text(wanted[path], "utf-8")
    return 0


def facts(made: Iterable[tuple[type, Model | None]]) -> Facts:
    """Everything that conversions.json says, about these classes."""
    listed = list(made)
    whole = [model for _, model in listed if model is not None]
    inner = {type(part).__name__: part for model in whole for _, part in models_in(model)}
    classes = {kind.__name__: of_class(kind, model or inner.get(kind.__name__)) for kind, model in listed}
    return {
        "origin": ORIGIN,
        "transformers": transformers.__version__,
        "conversions": conversions(),
        "bases": by_model_type("MODEL_MAPPING_NAMES", classes),
        "decoders": by_model_type("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", classes),
        "classes": telling(classes),
    }


# Conversions


@cache
def known_conversions() -> Mapping[str, Any]:
    """Class name or model type → its conversions, as transformers has them."""
    known: Mapping[str, Any] = conversion_mapping._build_checkpoint_conversion_mapping()
    return known


def conversions() -> Facts:
    """Class name or model type → its conversions in order; or the name of another one that has the same."""
    found: Facts = {}
    seen: dict[str, str] = {}
    for name, transforms in known_conversions().items():
        rows = [row(transform) for transform in transforms]
        text = json.dumps(rows)
        found[name] = seen.get(text, rows)
        seen.setdefault(text, name)
    return found


def row(transform: Any) -> Facts:
    """One conversion: the patterns that it looks for, what it puts there, and what it does to the tensors."""
    made: Facts = {"from": transform.source_patterns, "to": transform.target_patterns}
    if isinstance(transform, core_model_loading.GroupWeightRename):
        made["together"] = True
    if isinstance(transform, core_model_loading.Inkling2IndexOffsetWeightRename):
        made["offset"] = transform.offset
    if isinstance(transform, core_model_loading.WeightConverter):
        made["by"] = [operation(step) for step in transform.operations]
    return made


def operation(step: Any) -> list[Any]:
    """The name of an operation, and its arguments where they are not the default ones."""
    usual = vars(type(step)())
    return [type(step).__name__, {key: value for key, value in vars(step).items() if value != usual[key]}]


# Classes


def model_classes() -> list[type]:
    """Every model class of the library, by name; a few need packages that are not there."""
    for file in sorted(Path(transformers.models.__path__[0]).glob("*/modeling_*.py")):
        with contextlib.suppress(ImportError):
            importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}")
    found = {kind.__name__: kind for kind in descendants(transformers.PreTrainedModel)}
    return [found[name] for name in sorted(found) if not name.endswith("PreTrainedModel")]


def descendants(kind: type) -> Iterator[type]:
    below: type
    for below in type.__subclasses__(kind):
        if below.__module__.startswith("transformers.models."):
            yield below
        yield from descendants(below)


def instances(classes: Iterable[type]) -> Iterator[tuple[type, Model | None]]:
    """Each class with a small model of it, or None where its default config makes none."""
    with without_backends():
        for kind in classes:
            if getattr(kind, "config_class", None) is not None:
                yield kind, instance(kind)


@contextlib.contextmanager
def without_backends() -> Iterator[None]:
    """Let classes be made without packages that they compute with, so that the result does not depend on them."""
    with contextlib.ExitStack() as stack:
        for module in [module for name, module in sys.modules.items() if name.startswith("transformers.")]:
            if "requires_backends" in vars(module):
                stack.enter_context(mock.patch.object(module, "requires_backends"))
        for name, family in (("TimmWrapperModel", "timm_wrapper"), ("TimmBackbone", "timm_backbone")):
            module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
            kind = getattr(module, name)
            stack.enter_context(mock.patch.object(getattr(transformers.models, family), name, kind, create=True))
            stack.enter_context(mock.patch.object(kind, "__init__", _bare))
        yield


def _bare(model: Model, config: Any, *_: Any, **__: Any) -> None:
    transformers.PreTrainedModel.__init__(model, config)
    model.post_init = lambda: None


def instance(kind: Any) -> Model | None:
    """A model of one class on the meta device, of two layers if it can be."""
    for prepare in (small, deepcopy):
        with contextlib.suppress(Exception), warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            return kind(prepare(kind.config_class()))
    return None


def small(config: Any) -> Any:
    """The config with at most two layers everywhere."""
    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PreTrainedConfig):
            small(value)
        elif DEPTHS.fullmatch(name) and type(value) is int and value > 2:
            setattr(config, name, 2)
        elif name == "layer_types" and isinstance(value, list):
            setattr(config, name, value[:2])
    return config


def of_class(kind: Any, model: Model | None) -> Facts:
    """What is to be known of one class."""
    made: Facts = {"type": kind.config_class.model_type, "prefix": kind.base_model_prefix}
    found = parts(model) if model is not None else usual_parts(kind)
    if found:
        made["parts"] = found
    tied = ties(model) if model is not None else plain_ties(kind)
    if tied:
        made["ties"] = tied
        made["tied"] = when_tied(kind.config_class)
    if model is not None and (lying := experts(model)):
        made["experts"] = lying
    if model is not None and converted(model):
        made["tops"] = sorted({name.split(".")[0] for name in model.state_dict()})
        made |= {"stay": kept} if (kept := names_that_stay(model)) else {}
    return made


def models_in(model: Model) -> Iterator[tuple[str, Model]]:
    """Every model of transformers in a model, itself among them, with its path."""
    return ((path, m) for path, m in model.named_modules() if isinstance(m, transformers.PreTrainedModel))


def converted(model: Model) -> bool:
    """Whether anything in it has other names in files."""
    known = known_conversions()
    return any({type(part).__name__, part.config.model_type} & {*known} for _, part in models_in(model))


def parts(model: Model) -> list[list[str]]:
    """Models right inside a model: path, class, and the field of the config that is theirs, if it is not the whole."""
    found = []
    inside: list[str] = []
    for path, part in models_in(model):
        if path and not any(path.startswith(above) for above in inside):
            inside.append(f"{path}.")
            field = next((name for name, value in vars(model.config).items() if value is part.config), None)
            found.append([path, type(part).__name__, *([field] if field else [])])
    return found


def experts(model: Model) -> dict[str, list[str]]:
    """Modules with stacks of experts that lie otherwise than usual, without those of models inside it → how."""
    inner = [f"{path}." for path, _ in models_in(model) if path]
    found = {}
    for path, module in model.named_modules():
        if not path.startswith(tuple(inner)) and (lying := how_experts_lie(module)):
            found[re.sub(r"(?<![^.])\d+(?![^.])", "*", path)] = lying
    return found


def how_experts_lie(module: torch.nn.Module) -> list[str]:
    """In words, for stacks of matrices that are not (out × in), or that have gate and up in turn."""
    gate_up, down = (tuple(getattr(getattr(module, name, None), "shape", ())) for name in ("gate_up_proj", "down_proj"))
    if len(gate_up) != 3 or len(down) != 3:
        return []
    as_usual = gate_up[1:] == (2 * down[2], down[1])
    if not as_usual and gate_up[1:] != (down[2], 2 * down[1]):
        raise ValueError(f"{type(module).__name__}: neither (out x in) nor (in x out)")
    lying = {
        "is_transposed": getattr(module, "is_transposed", False),
        "inputs_first": not as_usual,
        "alternating": not getattr(module, "is_concatenated", True),
    }
    return [word for word, so in lying.items() if so]


def usual_parts(kind: Any) -> list[list[str]]:
    """The backbone of a class with a head, where it cannot be made."""
    if not re.search(r"For[A-Z]|LMHead", kind.__name__):
        return []
    with contextlib.suppress(Exception):
        base = transformers.AutoModel._model_mapping[kind.config_class].__name__
        return [[kind.base_model_prefix, base]] if base != kind.__name__ else []
    return []


def telling(classes: Mapping[str, Facts]) -> Facts:
    """The classes about which there is more to say than that files and modules have the same names."""
    known = known_conversions()
    kept = {
        name
        for name, made in classes.items()
        if {"ties", "tops", "experts"} & {*made} or {name, made["type"]} & {*known}
    }
    while True:
        above = {name for name, made in classes.items() if _mixed(made) or {p[1] for p in made.get("parts", ())} & kept}
        if above <= kept:
            break
        kept |= above
    kept |= {part[1] for name in kept for part in classes[name].get("parts", ()) if part[1] in classes}
    return {name: made for name, made in classes.items() if name in kept}


def _mixed(made: Facts) -> bool:
    return any(len(part) == 3 for part in made.get("parts", ()))


def by_model_type(mapping: str, classes: Mapping[str, Facts]) -> Facts:
    """Model type → the class that an Auto class makes of it."""
    from transformers.models.auto import modeling_auto

    pairs = ((kind, name if isinstance(name, str) else name[0]) for kind, name in vars(modeling_auto)[mapping].items())
    return {kind: name for kind, name in sorted(pairs) if name in classes}


def names_that_stay(model: Model) -> list[str]:
    """Parameters that a conversion would rename though they have their last name already; `*` is any number."""
    transforms = conversion_mapping.get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, core_model_loading.WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, core_model_loading.WeightConverter)]
    names = model.state_dict()
    settle = model.base_model_prefix, names
    renamed = {name: core_model_loading.rename_source_key(name, renamings, converters, *settle)[0] for name in names}
    return sorted({re.sub(r"(?<![^.])\d+(?![^.])", "*", old) for old, new in renamed.items() if new not in names})


# Ties


def ties(model: Model) -> dict[str, str]:
    """Parameter → the parameter that it is, where the model's config lets them be one; `*` is the same number in both.

    Parts that share parameters under other numbers, as detection heads do, are left out.
    """
    model.config.tie_word_embeddings = True
    found = {}
    with contextlib.suppress(ValueError):
        for alias, source in model.get_expanded_tied_weights_keys().items():
            numbers = re.findall(r"\d+", alias), re.findall(r"\d+", source)
            if numbers[0] == numbers[1]:
                found[re.sub(r"\d+", "*", alias)] = re.sub(r"\d+", "*", source)
    return dict(sorted(found.items()))


def plain_ties(kind: Any) -> dict[str, str]:
    """Of a class that cannot be made, those that are written out."""
    said = kind._tied_weights_keys
    return {a: s for a, s in said.items() if re.fullmatch(r"[\w.]+", a + s)} if isinstance(said, dict) else {}


def when_tied(config_class: Any) -> str:
    """Whether the config ties, one digit each: for `tie_word_embeddings` absent, false and true.

    Of a config with a text config three such answers: for its field absent, false and true.
    """
    has_text = "text_config" in config_class.sub_configs
    answers = []
    for inner, outer in product((None, False, True) if has_text else (None,), (None, False, True)):
        said: Facts = {} if outer is None else {"tie_word_embeddings": outer}
        if inner is not None:
            said["text_config"] = {"tie_word_embeddings": inner}
        try:
            answers.append("01"[bool(getattr(config_class(**said), "tie_word_embeddings", False))])
        except Exception:  # noqa: BLE001 (some configs have no default)
            answers.append("01"[bool(outer if outer is not None else inner)])
    return "".join(answers)


# Files


def rendered(content: Facts) -> str:
    """JSON with a line for each conversion and each class."""
    sections = []
    for name, value in content.items():
        if not isinstance(value, dict):
            sections.append(f"{_json(name)}: {_json(value)}")
            continue
        rows = [f" {_json(key)}: {_lines(row)}" for key, row in value.items()]
        sections.append(f"{_json(name)}: {{\n" + ",\n".join(rows) + "\n}")
    return "{\n" + ",\n".join(sections) + "\n}\n"


def _lines(value: Any) -> str:
    if isinstance(value, list):
        return "[\n" + ",\n".join(f"  {_json(item)}" for item in value) + "\n ]"
    return _json(value)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=True)


def conv1d(made: Iterable[tuple[type, Model | None]]) -> str:
    """The architectures whose linear layers are stored (in × out), as YAML."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for kind, model in made:
        if model is not None and any(isinstance(m, transformers.pytorch_utils.Conv1D) for m in model.modules()):
            _note_conv1d(found, model)
            crossed = deepcopy(model.config)
            crossed.add_cross_attention = True
            with contextlib.suppress(Exception), torch.device("meta"):
                _note_conv1d(found, kind(crossed))
    head = "# Architectures whose linear layers are stored (in × out): model_type → last part of the module's name.\n"
    head += "# Made by scripts/make_conversions.py.\n"
    return head + "".join(f"{name}: [{', '.join(sorted(modules))}]\n" for name, modules in sorted(found.items()))


def _note_conv1d(found: dict[str, set[str]], model: Model) -> None:
    owners = list(models_in(model))
    for path, module in model.named_modules():
        if isinstance(module, transformers.pytorch_utils.Conv1D):
            owner = [part for above, part in owners if not above or path.startswith(f"{above}.")][-1]
            found[owner.config.model_type].add(path.rpartition(".")[2])


if __name__ == "__main__":
    sys.exit(main())
