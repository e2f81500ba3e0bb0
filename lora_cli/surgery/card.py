"""The model card of a merged checkpoint: its `README.md`, made new, or the base's with what was merged into it.

The base's own text stays as it is, byte for byte. Its metadata is edited where it lies: written anew from values, as
`ModelCard` does, it would lose its comments and quotes, and `language: no` (Norwegian) would become `false`. The Hub's
client finds the metadata, renders the fields that change, and reads the result again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_cli.adapters.adapter import Adapter
from lora_cli.checkpoint.checkpoint import Checkpoint
from lora_cli.checkpoint.sidefiles import SideFile
from lora_cli.errors import LoraCliError
from lora_cli.surgery.card_section import CHECK, HEADING, section
from lora_cli.surgery.effects import Effects
from lora_cli.surgery.plan import AdapterUse

CARD = "README.md"

_CARD_LIMIT = 1 << 20
_METADATA_LIMIT = 256 << 10  # read by a slow parser, several times; evaluation results are the longest that is met
_TAGS = ("merge", "lora", "lora-cli")
_LORA = {"LoRA", "rsLoRA", "DoRA"}
_RESULTS = "model-index"

_OPENING = re.compile(r"\s*---[ \t]*(?:[\r\n]|\Z)")
_TITLE = re.compile(r"^#{1,2} .*", re.MULTILINE)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_RESERVED = ("models", "datasets", "spaces", "kernels", "buckets")  # no owner can have these names
# A step of somebody's own training run; and quantised copies, which adapters are trained on and nothing is merged into.
_NO_BASE = re.compile(
    r".*/checkpoint-\d+|.*[-_.](?:bnb|[48]-?bit|int[48]|nf4|fp4|gptq|awq|gguf|hqq|exl[23])(?:[-_.].*)?", re.IGNORECASE
)


class _UnreadableError(Exception):
    """The base's card is not one that can be extended safely; the text says why."""


def model_card(
    base: Checkpoint,
    sides: Sequence[SideFile],
    adapters: Sequence[Adapter],
    uses: Sequence[AdapterUse],
    effects: Effects | None = None,
    *,
    undo: bool = False,
) -> tuple[bytes | None, list[str]]:
    """Return the card of `base` with `adapters` merged into it, and what a person should know about it.

    Args:
        base: What the adapters are merged into.
        sides: The base's files that are written beside the output; its card is looked for among them.
        adapters: The adapters.
        uses: How each of them is used, in the same order.
        effects: What the merge does besides adding to whole tensors.
        undo: Whether an undo file is written, with which the merge can be taken out again.

    Returns:
        The bytes of the new `README.md`: None to leave the base's as it is, or where no card belongs.
    """
    if base.folder is None:
        return None, []
    try:
        from huggingface_hub import constants  # noqa: F401 (a first look: it takes numbers from the environment)
    except ValueError:
        return None, [f"{CARD} does not tell of the merge: an HF_ variable of the environment is no number"]
    found = next((side for side in sides if side.name.lower() == CARD.lower()), None)
    if found is not None and found.name != CARD:
        # Both names would be one file on some systems.
        return None, [f"{found.name} stays as it is and does not tell of the merge: the Hub reads {CARD} only"]
    try:
        card = _Card.parse("" if found is None else _text(found))
        had_results = bool(card.metadata.get(_RESULTS))
        changes = _changes(base, adapters, uses, card)
        if found is None and "architectures" in base.config:
            changes["library_name"] = "transformers"
        words = section(
            _hub_name(base.path, base.label) or base.label,
            [(_adapter_name(adapter, use), adapter, use) for adapter, use in zip(adapters, uses, strict=True)],
            effects or Effects(),
            told=card.told,
            above=bool(card.body.strip()),
            undo=undo,
            had_results=had_results,
        )
        text = card.extended(changes, words)
    except _UnreadableError as error:
        return None, [f"{CARD} stays as it is in the base and does not tell of the merge: {error}"]
    warnings = [f"{CARD}: {_RESULTS} is left out, for those are results of the base"] if had_results else []
    return text.encode(), warnings


def _text(side: SideFile) -> str:
    if side.size > _CARD_LIMIT:
        raise _UnreadableError(f"it is longer than {_CARD_LIMIT} bytes")
    try:
        return side.read().decode()
    except UnicodeDecodeError:
        raise _UnreadableError("it is not UTF-8") from None


@dataclass(frozen=True)
class _Card:
    """A card in its parts: `head`, `block` of metadata, `foot` and `body` are its text, nothing added.

    `metadata` is what the block says, `nodes` where in the block each field and its value lie.
    """

    head: str
    block: str
    foot: str
    body: str
    newline: str
    metadata: Mapping[str, Any]
    nodes: Sequence[tuple[Any, Any]]

    @classmethod
    def parse(cls, text: str) -> _Card:
        """Take a card apart, after making sure that no parser of its metadata can be surprised.

        Raises:
            _UnreadableError: The metadata is broken, too long, or laid out so that no field can be exchanged.
        """
        from huggingface_hub.repocard import REGEX_YAML_BLOCK

        mark = "\ufeff" if text.startswith("\ufeff") else ""
        newline = "\r\n" if 2 * text.count("\r\n") > text.count("\n") else "\n"
        text = text.removeprefix(mark)
        match = REGEX_YAML_BLOCK.search(text)
        if match is None:
            if _OPENING.match(text):
                raise _UnreadableError("its metadata does not end")
            body = newline + text if text.strip() else ""
            return cls(f"{mark}---{newline}", "", f"{newline}---{newline}", body, newline, {}, ())
        block, foot = match[2], text[match.end(2) : match.end()]
        metadata, nodes = _read(block, newline)
        foot = foot if foot.endswith("\n") else foot + newline
        return cls(mark + text[: match.start(2)], block, foot, text[match.end() :], newline, metadata, nodes)

    def strings(self, name: str) -> list[str] | None:
        """The text or texts that a field holds, as they are written: `no` is one. None if it holds something else."""
        node = next((value for key, value in self.nodes if key.value == name), None)
        items = [] if node is None or node.tag.endswith(":null") else node.value
        items = items if isinstance(items, list) else [node]
        plain = all(hasattr(item, "value") and isinstance(item.value, str) for item in items)
        return [item.value for item in items] if plain else None

    def extended(self, changes: Mapping[str, object], section: str) -> str:
        """Return the whole card with fields exchanged, added, or (None) taken away, and `section` at its end.

        Raises:
            _UnreadableError: The Hub's client reads something else in it than was meant.
        """
        block = self._edited(changes)
        body = self._before_section()
        ends = body[len(body.rstrip("\r\n")) :].count("\n")
        gap = self.newline * ((2 if body.strip() else 1) - ends)
        # With one more line break, as `_read` had it: without, a text that ends the block would lose its own.
        _read_back(f"---\n{block}{self.newline}{self.foot}", {**self.metadata, **changes})
        return f"{self.head}{block}{self.foot}{body}{gap}{section.replace(chr(10), self.newline)}"

    def _edited(self, changes: Mapping[str, object]) -> str:
        block = self.block + self.newline if self.block else ""
        starts = [key.start_mark.index for key, _ in self.nodes] + [len(block)]
        pieces = [block[: starts[0]]]
        for (key, _), start, end in zip(self.nodes, starts, starts[1:], strict=False):
            piece = block[start:end]
            if key.value in changes:
                piece = self._field(key.value, changes[key.value]) + _comments_after(piece)
            pieces.append(piece)
        new = [name for name in changes if name not in self.metadata]
        return "".join([*pieces, *(self._field(name, changes[name]) for name in new)]).removesuffix(self.newline)

    def _field(self, name: str, value: object) -> str:
        if value is None:
            return ""
        from huggingface_hub import ModelCardData

        fields: dict[str, Any] = {name: value}
        return ModelCardData(**fields).to_yaml(line_break=self.newline) + self.newline

    @property
    def told(self) -> bool:
        """Whether it ends with the section of an earlier merge."""
        titles = _TITLE.findall(self.body)
        return bool(titles) and titles[-1].rstrip() == HEADING

    def _before_section(self) -> str:
        """The body; without the advice of an earlier merge at its end, which the new one takes the place of."""
        paragraphs = re.split(r"(?:\r?\n){2,}", self.body.rstrip())
        if self.told and paragraphs[-1].startswith(CHECK):
            return self.body.rstrip().removesuffix(paragraphs[-1])
        return self.body


def _read(block: str, newline: str) -> tuple[Mapping[str, Any], Sequence[tuple[Any, Any]]]:
    import yaml

    from lora_cli.checkpoint import strict_yaml

    if len(block) > _METADATA_LIMIT:
        raise _UnreadableError(f"its metadata is longer than {_METADATA_LIMIT} characters")
    try:
        document = strict_yaml.loads((block + newline).encode(), file=CARD, what="metadata")
    except LoraCliError as error:
        raise _UnreadableError(error.message) from None
    if document is None:
        return {}, ()
    if not isinstance(document, dict) or not all(isinstance(name, str) for name in document):
        raise _UnreadableError("its metadata is not a table of names and values")
    root: Any = yaml.compose(block, yaml.SafeLoader)
    if root.flow_style or any(key.start_mark.column for key, _ in root.value):
        raise _UnreadableError("its metadata does not have each field on a line of its own")
    return document, root.value


def _comments_after(piece: str) -> str:
    """The comments and empty lines that follow a field: they belong to the next one."""
    lines = piece.splitlines(keepends=True)
    last = max(at for at, line in enumerate(lines) if line.strip() and not line.lstrip().startswith("#"))
    return "".join(lines[last + 1 :])


def _read_back(text: str, meant: Mapping[str, object]) -> None:
    """Let the Hub's client read metadata; what it finds must be what was meant, to the last field."""
    from huggingface_hub import ModelCard

    try:
        found: dict[str, object] = ModelCard(text).data.to_dict()  # type: ignore[no-untyped-call]
    except Exception:  # noqa: BLE001 (fields of the file become names of arguments and attributes there)
        raise _UnreadableError("the Hub's client cannot read its metadata") from None
    wanted = {name: value for name, value in meant.items() if value is not None}
    # As text: not-a-number differs from itself, and 1 is True.
    if {name: repr(value) for name, value in found.items()} != {name: repr(value) for name, value in wanted.items()}:
        raise _UnreadableError("its metadata can be read in two ways")


# Metadata


def _changes(
    base: Checkpoint, adapters: Sequence[Adapter], uses: Sequence[AdapterUse], card: _Card
) -> dict[str, object]:
    """The fields that the merged model's card must say otherwise; None for one that it must not have."""
    tags = card.strings("tags")
    if tags is None:
        raise _UnreadableError("its tags are not a list of words")
    changes: dict[str, object] = {}
    models = _base_models(base, adapters, uses, card.strings("base_model") or [])
    if models:
        # Said, for the Hub would guess: several models are a merge to it, one is what a finetune is made from.
        changes |= {"base_model": models if len(models) > 1 else models[0], "base_model_relation": "merge"}
    kinds = {use.kind for use in uses}
    own = _TAGS if kinds & _LORA or not kinds else tuple(tag for tag in _TAGS if tag != "lora")
    changes["tags"] = list(dict.fromkeys((*tags, *own)))
    if _RESULTS in card.metadata:
        changes[_RESULTS] = None
    old = card.metadata
    return {name: value for name, value in changes.items() if name not in old or old[name] != value}


def _base_models(
    base: Checkpoint, adapters: Sequence[Adapter], uses: Sequence[AdapterUse], ancestors: Sequence[str]
) -> list[str]:
    """What the merged model was made of, as far as the Hub has it: the base, then the adapters.

    Most certain first. The base's own id is where its bytes came from. What an adapter's config claims is only what
    somebody trained it on, which need not be this folder: a claim that the base's card makes of itself names its
    parent (the base is a merge or finetune of it), and adapters that disagree, or were trained on a quantised copy,
    say nothing. Failing these, the parents that the base's card names are the merged model's as well. The name of a
    local folder comes last: it may be anything.
    """
    own = _hub_name(base.path, base.label)
    claims = {claim for adapter in adapters if (claim := _claim(adapter)) is not None}
    if own is not None:
        models = [own.split("@")[0]]
    elif len(claims) == 1 and not claims.intersection(ancestors):
        models = list(claims)
    elif ancestors:
        models = list(ancestors)
    else:
        usable = _is_repository(base.label, parts=1) and not _COMMIT.fullmatch(base.label)
        models = [base.label] if usable else []
    if models:
        # What an adapter was before its training is only taken off.
        beginnings = [adapter.before for adapter in adapters]
        used = (
            adapter
            for adapter, use in zip(adapters, uses, strict=True)
            if use.weight and not any(adapter is before for before in beginnings)
        )
        names = (_hub_name(adapter.path, adapter.label) for adapter in used)
        models += [name.split("@")[0] for name in names if name is not None]
    return list(dict.fromkeys(models))


def _hub_name(path: Path, label: str) -> str | None:
    """`owner/name@revision`, from the label or from the place in the Hub's cache that `path` is; None if not known."""
    folder = path.resolve()
    parts = folder.parent.parent.name.split("--")
    if folder.parent.name == "snapshots" and len(parts) == 3 and parts[0] == "models":
        label = f"{parts[1]}/{parts[2]}@{folder.name}"
    return label if _is_repository(label.split("@")[0], parts=2) else None


def _adapter_name(adapter: Adapter, use: AdapterUse) -> str:
    name = _hub_name(adapter.path, use.label) if use.label == adapter.path.name else None
    return name or use.label


def _claim(adapter: Adapter) -> str | None:
    claim = adapter.config.get("base_model_name_or_path")
    if not isinstance(claim, str) or not _is_repository(claim, parts=2):
        return None
    return None if _NO_BASE.fullmatch(claim) else claim


def _is_repository(text: str, *, parts: int) -> bool:
    """Whether the Hub could have a repository of this name. Its form alone: what lies on this disk must not matter."""
    from huggingface_hub.utils._validators import validate_repo_id

    owner, *names = text.split("/")
    # Older clients let other letters through, and a line break at the end.
    if len(names) != parts - 1 or owner in _RESERVED or not (text.isascii() and text.isprintable()):
        return False
    try:
        validate_repo_id(text)
    except ValueError:
        return False
    return True
