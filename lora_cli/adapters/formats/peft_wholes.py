"""What a PEFT file holds whole: parameters, and rows of tables.

Names have no infix when PEFT saves them, but for known faults: with `bias = "all"`, and where a table is stored because
its rows may be others, there are `X.modules_to_save.bias`, `X.original_module.weight` and `X.base_layer.weight` too.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from lora_cli.adapters.adapter import Replacement, RowReplacement
from lora_cli.adapters.formats.peft_keys import Found
from lora_cli.checkpoint.checkpoint import StoredTensor
from lora_cli.checkpoint.digests import tensor_content
from lora_cli.checkpoint.tied import EMBEDDINGS, TABLES
from lora_cli.errors import SAVE_AGAIN, MalformedFileError, NamesError, ShapeError, UnsupportedError

HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Heads that PEFT saves for a task even where the config does not name them."""

_NOWHERE = "in the file whole, though the config names it nowhere"
_NAMED = 10

_INNER = re.compile(r"\.(?:token_adapter\.)?base_layer(?=\.)")
_SAVED = re.compile(r"(?P<module>.+)\.modules_to_save\.(?P<rest>.+)", re.DOTALL)

_TOKENS = "trainable_token_indices"

Skipped = list[tuple[StoredTensor, str]]


def replacements(found: Found, config: Mapping[str, Any], file: str) -> tuple[list[Replacement], Skipped]:
    """The parameters that are held whole, and second copies of them.

    Args:
        found: The file's tensors.
        config: The config.
        file: The file's name.

    Raises:
        NamesError: Two tensors are one parameter, and are not the same.
    """
    names = {name for name, _ in found.wholes}
    copies: defaultdict[str, list[tuple[str, StoredTensor]]] = defaultdict(list)
    for name, tensor in found.wholes:
        copies[_plain(name, names)].append((name, tensor))
    chosen, skipped, wrong = [], Skipped(), []
    for plain, several in copies.items():
        (name, tensor), *others = sorted(several, key=lambda one: len(one[0]))
        chosen.append(_replacement(plain, tensor, config, inner=_INNER.search(name) is not None))
        for _, other in others:
            if content_of(other) == content_of(tensor):
                skipped.append((other, "a second copy of the same tensor"))
            else:
                wrong.append(f"{plain}: {tensor.key} and {other.key}")
    if wrong:
        raise NamesError(
            "Two tensors are one parameter, and differ",
            file=file,
            details=wrong,
            hint="take out the one that is not meant",
        )
    return chosen, skipped


def _plain(name: str, names: Iterable[str]) -> str:
    """The name without what PEFT puts in."""
    name = _INNER.sub("", name)
    match = _SAVED.fullmatch(name)
    if match is None:
        return name
    module, rest = match["module"], match["rest"]
    _, _, inner = rest.partition(".")
    # After it there may be the adapter's name; or a module within, which PEFT then stores without the infix too.
    return f"{module}.{inner}" if inner and f"{module}.{rest}" not in names else f"{module}.{rest}"


def content_of(tensor: StoredTensor) -> str:
    """Digest of type, shape and bytes of a stored tensor."""
    with tensor.shard.source.open() as reader:
        return tensor_content(tensor, reader)


def _replacement(name: str, tensor: StoredTensor, config: Mapping[str, Any], *, inner: bool) -> Replacement:
    module, _, parameter = name.rpartition(".")
    leaf = module.rpartition(".")[2]
    saved = config.get("modules_to_save") or ()
    if any(_is_part(module, str(entry)) for entry in saved):
        # An embedding that the base calls otherwise is a mismatch of names; any other saved module may be a new head.
        return Replacement(name, tensor, "modules_to_save", may_be_new=leaf not in EMBEDDINGS)
    bias = str(config.get("bias"))
    if parameter.endswith("bias") and (bias == "all" or bias.endswith("_only")):  # lora_only, and so for each tuner
        return Replacement(name, tensor, f"bias = {bias}")
    if any(_is_part(module, entry) for entry in HEADS.get(str(config.get("task_type")), ())):
        return Replacement(name, tensor, f"head of task_type {config['task_type']}", may_be_new=True)
    if saved and config.get("ensure_weight_tying") and leaf in TABLES:
        return Replacement(name, tensor, "modules_to_save and ensure_weight_tying")
    if inner or leaf in TABLES:
        return Replacement(name, tensor, "the base's own, as the adapter was trained on it", of_base=True)
    return Replacement(name, tensor, _NOWHERE)


def check_unnamed(whole: Iterable[Replacement], modules: Collection[str], file: str) -> tuple[str, ...]:
    """Say which parameters the file holds whole and the config names nowhere; of modules with factors they are refused.

    PEFT loads what has a name of the model, and passes over the rest in silence. A module with factors is wrapped in
    another, so that its own parameters have other names there.

    Args:
        whole: What the file holds whole.
        modules: The modules that have factors.
        file: The file's name.

    Returns:
        A warning, if there are any.

    Raises:
        UnsupportedError: Parameters of modules that have factors: PEFT would leave them out.
    """
    unnamed = [replacement for replacement in whole if replacement.reason == _NOWHERE]
    parts = ((one, *one.name.rpartition(".")[::2]) for one in unnamed)
    beside = [one.tensor.key for one, module, last in parts if module in modules and last in ("weight", "bias")]
    if beside:
        raise UnsupportedError(
            "The file holds parameters whole of modules that it has factors for, and the config does not name them",
            file=file,
            details=beside,
            hint="PEFT would leave them out: take them out of the file, or name them in modules_to_save or bias",
        )
    if not unnamed:
        return ()
    names = ", ".join(one.name for one in unnamed[:_NAMED])
    more = f" and {len(unnamed) - _NAMED} more" if len(unnamed) > _NAMED else ""
    return (f"the file holds parameters whole that its config names nowhere; they replace the base's: {names}{more}",)


def _is_part(module: str, entry: str) -> bool:
    """Whether `module` is a saved module `entry`, or lies inside one: PEFT compares how names of modules end."""
    return f"{entry}." in f"{module}."


def trained_rows(found: Found, config: Mapping[str, Any], file: str) -> tuple[list[RowReplacement], Skipped]:
    """The trained rows of tables. Which they are only the config says: one list, or one for each module.

    Raises:
        MalformedFileError: Config and file do not agree on the tables, or a row is there twice.
        ShapeError: There are more or fewer rows than the config says.
    """
    lists = _Lists(config.get(_TOKENS), found.rows)
    lists.check(file)
    rows, skipped = [], Skipped()
    for module, tensor in found.rows.items():
        tokens = lists.of(module)
        if len(tensor.shape) != 2 or tensor.shape[0] != len(tokens):
            raise ShapeError(
                "There is not one trained row for each token",
                file=file,
                tensor=tensor.key,
                expected=f"{len(tokens)} rows, as {_TOKENS} says",
                found=list(tensor.shape),
                hint=SAVE_AGAIN,
            )
        if tokens:
            rows.append(RowReplacement(f"{module}.weight", tuple(tokens), tensor, _TOKENS))
        else:
            skipped.append((tensor, "no rows"))
    return rows, skipped


class _Lists:
    """Which tokens are trained, by module.

    PEFT trains both of two tied tables by one list, and mostly stores the rows once. Where it stores both, the second
    need not have a list of its own.
    """

    def __init__(self, said: Mapping[str, list[int]] | list[int] | None, modules: Iterable[str]) -> None:
        self._modules = list(modules)
        self._said: Mapping[str, list[int]] = {}
        if isinstance(said, Mapping):
            self._said = said
        elif isinstance(said, list):
            self._said = dict.fromkeys(self._modules or ["one table"], said)
        self._own = {module: self._own_list(module) for module in self._modules}
        self._lists = [tokens for tokens in self._own.values() if tokens is not None]

    def _own_list(self, module: str) -> list[int] | None:
        return next((tokens for entry, tokens in self._said.items() if module.endswith(entry)), None)

    def of(self, module: str) -> list[int]:
        """The tokens of a module, after `check`."""
        own = self._own[module]
        return self._lists[0] if own is None else own

    def check(self, file: str) -> None:
        """Refuse what the config says of no table of the file, tables of which it says nothing, and repetitions."""
        alike = all(tokens == self._lists[0] for tokens in self._lists)
        silent = [module for module, own in self._own.items() if own is None and not (self._lists and alike)]
        if silent:
            self._refuse("The file holds trained rows, and the config does not say which", file, silent)
        used = [entry for entry in self._said if any(module.endswith(entry) for module in self._modules)]
        # Of tied tables that have the same list PEFT stores one.
        lost = [e for e, tokens in self._said.items() if tokens and e not in used and tokens not in self._lists]
        if lost:
            self._refuse("The config names trained tokens, and the file has no rows for them", file, lost)
        twice = sorted({t for tokens in self._lists for t, count in Counter(tokens).items() if count > 1})
        if twice:
            self._refuse("The config names a token twice", file, map(str, twice))

    @staticmethod
    def _refuse(message: str, file: str, details: Iterable[str]) -> None:
        raise MalformedFileError(message, file=file, tensor=_TOKENS, details=details)
