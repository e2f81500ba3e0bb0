"""Names of tensors in a PEFT file: which of them are factors, and of what.

PEFT strips the adapter's own name when it saves, so `X.lora_A.weight` is what a live model has as
`X.lora_A.default.weight`; files that were made by hand may have kept it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from lora_cli.adapters.formats.pairs import Pair
from lora_cli.adapters.source import AdapterSource
from lora_cli.checkpoint.checkpoint import StoredTensor
from lora_cli.errors import NamesError, UnsupportedError

PREFIX = "base_model.model."

_FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.(?P<parameter>weight|bias)", re.DOTALL
)
_TABLE = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?", re.DOTALL)
_OF_TORCHTUNE = re.compile(r"(?P<module>.+)\.lora_(?P<part>gate|up|down)_(?P<side>[ab])", re.DOTALL)
_PARTS = {"gate": "w1", "up": "w3", "down": "w2"}
_MAGNITUDE = re.compile(r"(?P<module>.+)\.lora_magnitude_vector(?:\.default)?(?:\.weight)?", re.DOTALL)
_ROWS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta(?:\.(?P<adapter>[^.]+))?", re.DOTALL)
_ORIGINAL = ".original_module."
_A_COPY = "a copy of the base's own tensor"
_OUTPUT = ".base_layer.out_proj"
_OF_TRAINING = {
    "lora_monteclora_sampler": "how the factors were varied in training; what is used is plain LoRA",
    "lora_velora_embed": "how activations were kept in training",
}


@dataclass(slots=True)
class Found:
    """The tensors of a file by what they are; each by its module, as the trained model names it.

    Attributes:
        pairs: Factors.
        tables: Modules whose factors are those of an embedding.
        biases: Biases of B factors.
        magnitudes: For DoRA.
        attention: Those modules that are `torch.nn.MultiheadAttention`: their factors are of the input projection, and
            `X.out_proj` has others.
        rows: Trained rows of tables.
        parameters: Those names of pairs that are names of parameters, and not of modules.
        idle_entries: What a config names of parameters, and the file has no factors for.
        turned: Those of them whose A is (experts, in, rank) and B (experts, rank, out).
        wholes: All else, with its name without prefix: parameters that are held whole.
        skipped: What need not be applied, with the reason.
        unread: What belongs to nothing.
    """

    pairs: dict[str, Pair] = field(default_factory=dict)
    tables: set[str] = field(default_factory=set)
    biases: dict[str, StoredTensor] = field(default_factory=dict)
    magnitudes: dict[str, StoredTensor] = field(default_factory=dict)
    attention: set[str] = field(default_factory=set)
    rows: dict[str, StoredTensor] = field(default_factory=dict)
    parameters: set[str] = field(default_factory=set)
    turned: set[str] = field(default_factory=set)
    idle_entries: list[str] = field(default_factory=list)
    wholes: list[tuple[str, StoredTensor]] = field(default_factory=list)
    skipped: list[tuple[StoredTensor, str]] = field(default_factory=list)
    unread: list[StoredTensor] = field(default_factory=list)

    def attention_of(self, module: str) -> str | None:
        """The attention whose output projection this module is, if it is one."""
        outer = module.removesuffix(".out_proj")
        return outer if outer != module and outer in self.attention else None

    def in_config(self, module: str) -> str:
        """The name by which a config means a module: an output projection has the settings of its attention."""
        return self.attention_of(module) or module


def sort_keys(source: AdapterSource) -> Found:
    """Say of every tensor of a file what it is.

    Raises:
        UnsupportedError: Several adapters, or factors of a kind that is not supported.
        NamesError: Two tensors are the same factor.
    """
    sorter = _Sorter(source)
    for key, tensor in source.tensors.items():
        sorter.sort(key.removeprefix(PREFIX), tensor)
    return sorter.found


def sort_wholes(name: str, tensor: StoredTensor, found: Found) -> None:
    """Enter a tensor that no tuner has a name of its own for: rows of a table, a copy, or a parameter held whole."""
    if match := _ROWS.fullmatch(name):
        found.rows[match["module"]] = tensor
    elif _ORIGINAL in name:
        found.skipped.append((tensor, _A_COPY))
    else:
        found.wholes.append((name, tensor))


class _Sorter:
    """Looks at the names of one file, one after the other."""

    def __init__(self, source: AdapterSource) -> None:
        self.found = Found()
        self._file = source.shard.name
        self._adapters: set[str] = set()

    def sort(self, name: str, tensor: StoredTensor) -> None:
        """Enter one tensor."""
        self._refuse_unsupported(name, tensor)
        if match := _FACTOR.fullmatch(name):
            self._one_adapter(match["adapter"])
            self._factor(match, tensor)
        elif match := _TABLE.fullmatch(name):
            self._one_adapter(match["adapter"])
            self.found.pairs.setdefault(match["module"], Pair()).put(match["side"], tensor)
            self.found.tables.add(match["module"])
        elif match := _OF_TORCHTUNE.fullmatch(name):
            parameter = f"{match['module']}.{_PARTS[match['part']]}"
            self.found.pairs.setdefault(parameter, Pair()).put(match["side"].upper(), tensor)
            self.found.turned.add(parameter)
        elif match := _MAGNITUDE.fullmatch(name):
            self._once(self.found.magnitudes, match["module"], tensor)
        elif match := _ROWS.fullmatch(name):
            self._one_adapter(match["adapter"])
            self._once(self.found.rows, match["module"], tensor)
        elif reason := self._reason_to_skip(name):
            self.found.skipped.append((tensor, reason))
        else:
            self.found.wholes.append((name, tensor))

    def _factor(self, match: re.Match[str], tensor: StoredTensor) -> None:
        module, side = match["module"], match["side"]
        if match["parameter"] == "weight":
            self.found.pairs.setdefault(module, Pair()).put(side, tensor)
        elif side == "B":
            self._once(self.found.biases, module, tensor)
        else:
            self.found.unread.append(tensor)

    def _once(self, found: dict[str, StoredTensor], module: str, tensor: StoredTensor) -> None:
        if module in found:
            self.found.unread.append(tensor)
        else:
            found[module] = tensor

    def _reason_to_skip(self, name: str) -> str | None:
        if _ORIGINAL in name:
            return _A_COPY
        if ".lora_" not in name:  # of tens of thousands nearly all
            return None
        return next((_OF_TRAINING[part] for part in name.split(".") if part in _OF_TRAINING), None)

    def _one_adapter(self, name: str | None) -> None:
        self._adapters.add(name or "default")
        if len(self._adapters) > 1:
            raise UnsupportedError(
                "The file holds several adapters",
                file=self._file,
                found=", ".join(sorted(self._adapters)),
                hint="save each of them on its own",
            )

    def _refuse_unsupported(self, name: str, tensor: StoredTensor) -> None:
        if ".lora_diag" in name:
            reason = "KaSA is not supported"
            raise UnsupportedError(reason, file=self._file, tensor=tensor.key, found=f"shape {list(tensor.shape)}")


def settle_attention(found: Found, file: str) -> None:
    """Find the modules that are attention, and call their output projections as the base does.

    PEFT always gives both projections factors; those of the output are in `X.base_layer.out_proj`.

    Raises:
        NamesError: One of an attention's two pairs is missing, or there twice.
    """
    outputs = [module for module in found.pairs if module.endswith(_OUTPUT)]
    if not outputs:
        return
    found.attention = {module.removesuffix(_OUTPUT) for module in outputs}
    lost = sorted(found.attention - found.pairs.keys())
    if lost:
        raise NamesError(
            "The output projection of an attention has factors, and its input projection has none",
            file=file,
            details=lost,
            hint="the adapter file is incomplete",
        )
    doubly = [f"{outer}.out_proj" for outer in sorted(found.attention) if f"{outer}.out_proj" in found.pairs]
    if doubly:
        raise NamesError(
            "The output projection of an attention has two pairs of factors, of which PEFT uses one",
            file=file,
            details=doubly,
            hint="keep those in base_layer, and train without out_proj among the target_modules",
        )
    found.pairs = {_without_infix(module): pair for module, pair in found.pairs.items()}
    found.biases = {_without_infix(module): bias for module, bias in found.biases.items()}


def _without_infix(module: str) -> str:
    return module.removesuffix(_OUTPUT) + ".out_proj" if module.endswith(_OUTPUT) else module
