"""The card of a merged checkpoint: the Hub's client reads it, the base's words are kept, and no name gets out of it."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from huggingface_hub import ModelCard, metadata_load
from markdown_it import MarkdownIt

from lora_cli.adapters.formats import open_adapter
from lora_cli.checkpoint.checkpoint import open_checkpoint
from lora_cli.checkpoint.sidefiles import side_files
from lora_cli.surgery.card import model_card
from lora_cli.surgery.placing import Placement, PlanOptions
from lora_cli.surgery.plan import AdapterUse, ScaleUse

COMMIT = "0123456789abcdef0123456789abcdef01234567"

CARD = """\
---
# our model
license: other
license_name: 'ours' # the lawyers' words
license_link: https://example.org/terms
language:
  - no
  - en
version: 1.10
library_name: sentence-transformers
tags: [chat, no]

# where it comes from
base_model: "org/parent" # pretrained
datasets:
- org/data
model-index:
- name: ours
  results:
  - task: {type: text-generation}
    dataset: {name: x, type: x}
    metrics: [{type: accuracy, value: 0.5}]
# the threshold
note: |
  as written
threshold: .nan
---
# Our model

Text with trailing blanks  \nand no line break at the end"""

EXTENDED = """\
---
# our model
license: other
license_name: 'ours' # the lawyers' words
license_link: https://example.org/terms
language:
  - no
  - en
version: 1.10
library_name: sentence-transformers
tags:
- chat
- 'no'
- merge
- lora
- lora-cli

# where it comes from
base_model: org/model
datasets:
- org/data
# the threshold
note: |
  as written
threshold: .nan
base_model_relation: merge
---
# Our model

Text with trailing blanks  \nand no line break at the end

## Merged with lora-cli

Everything above is the card of `org/model@0123456789abcdef0123456789abcdef01234567`. These weights are that \
model with this adapter merged in:

- `style`: LoRA, weight 1, scale 2

The evaluation results in the metadata were left out: they are results of the base.

To check this, run `lora-cli verify . --base BASE --adapter ADAPTER` with the same weights. `lora_merge.json` has the \
details.
"""

NEW = """\
---
base_model: org/model
base_model_relation: merge
tags:
- merge
- lora
- lora-cli
library_name: transformers
---

## Merged with lora-cli

These weights are `org/model@0123456789abcdef0123456789abcdef01234567` with these adapters merged in:

- `style`: LoRA, weight 0.7, scale 1.4
- `facts`: rsLoRA, weight -0.123456789, scale -0.349189

To check this, run `lora-cli verify . --adapter ADAPTER --roundtrip`; to take it out \
again, `lora-cli unmerge . ADAPTER -o BASE`. \
`lora_merge.json` has the details.
"""


class Job:
    """A base folder and adapters, and the card of their merge."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.base = tiny.write_base(place / "base", shards=1)
        self.label = f"org/model@{COMMIT}"
        self.adapters: list[tuple[Path, str, float]] = []

    def readme(self, content: str | bytes) -> Path:
        path = self.base / "README.md"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def adapter(self, label: str = "style", weight: float = 1, **config: Any) -> None:
        path = tiny.write_adapter(self.place / f"adapter{len(self.adapters)}", **config)
        self.adapters.append((path, label, weight))

    def card(self, *, undo: bool = False) -> tuple[bytes | None, list[str]]:
        base = open_checkpoint(self.base, label=self.label)
        read = [open_adapter(path, label=label) for path, label, _ in self.adapters]
        placed = Placement(base, read, PlanOptions(weights=tuple(weight for _, _, weight in self.adapters)))
        return model_card(base, side_files(base)[0], placed.adapters, placed.uses, undo=undo)

    def text(self, *, undo: bool = False, warned: Sequence[str] = ()) -> str:
        data, warnings = self.card(undo=undo)
        assert data is not None
        assert warnings == list(warned)
        assert self.card(undo=undo)[0] == data
        return data.decode()

    def metadata(self) -> dict[str, Any]:
        """What the Hub's client reads from the new card as a file."""
        path = self.place / "new.md"
        path.write_bytes(self.card()[0] or b"")
        return metadata_load(path) or {}


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    def refuse(*_: object) -> None:
        raise AssertionError("a card needs no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    return Job(tmp_path)


RESULTS_WARNING = "README.md: model-index is left out, for those are results of the base"


def test_a_base_without_a_card_gets_one(job: Job) -> None:
    job.adapter(weight=0.7)
    job.adapter("facts", weight=-0.123456789, use_rslora=True)
    assert job.text(undo=True) == NEW
    assert ModelCard(NEW).content == NEW
    assert job.metadata()["library_name"] == "transformers"


def test_a_card_says_no_library_that_the_config_does_not_say(job: Job) -> None:
    job.adapter()
    tiny.write_json(job.base / "config.json", {"model_type": "own"})
    assert "library_name" not in job.metadata()


def test_a_bare_file_has_no_card(job: Job) -> None:
    job.readme(CARD)
    job.adapter()
    job.base /= "model.safetensors"
    assert job.card() == (None, [])


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_card_is_extended_and_every_other_byte_kept(job: Job, newline: str, mark: str) -> None:
    job.readme(mark + CARD.replace("\n", newline))
    job.adapter()
    assert job.text(warned=[RESULTS_WARNING]) == mark + EXTENDED.replace("\n", newline)
    before, after = metadata_load(job.base / "README.md") or {}, job.metadata()
    assert after.pop("tags") == ["chat", "no", "merge", "lora", "lora-cli"]
    assert (after.pop("base_model"), after.pop("base_model_relation")) == ("org/model", "merge")
    for name in ("tags", "base_model", "model-index"):
        del before[name]
    assert repr(after) == repr(before)


def test_nothing_is_invented_for_a_card_that_lacks_it(job: Job) -> None:
    job.readme("---\nlanguage: en\n---\n# Model\n")
    job.adapter()
    (job.adapters[0][0] / "README.md").write_text("---\nlicense: mit\nlibrary_name: peft\n---\n")
    assert job.metadata() == {
        "language": "en",
        "base_model": "org/model",
        "base_model_relation": "merge",
        "tags": ["merge", "lora", "lora-cli"],
    }


@pytest.mark.parametrize(("newline", "gap"), [("\n", "\n"), ("\r\n", "\r\n")])
def test_a_card_without_metadata_keeps_its_text(job: Job, newline: str, gap: str) -> None:
    old = f"# Model{newline}{newline}Words.{newline}"
    job.readme(old)
    job.adapter()
    head, kept, section = job.text().partition(old)
    assert kept
    assert head.startswith(f"---{newline}base_model: org/model{newline}")
    assert head.endswith(f"- lora-cli{newline}---{newline}{newline}")
    assert section.startswith(f"{gap}## Merged with lora-cli{newline}")
    assert "library_name" not in job.metadata()
    assert not re.search(r"(?<!\r)\n", head + section) or newline == "\n"


@pytest.mark.parametrize("empty", ["", "\n", "---\n\n---\n", "---\n# later\n---", "---\r\n\r\n---"])
def test_an_empty_card_is_filled(job: Job, empty: str) -> None:
    job.readme(empty)
    job.adapter()
    text = job.text()
    assert job.metadata()["tags"] == ["merge", "lora", "lora-cli"]
    assert re.search(r"---\r?\n\r?\n## Merged with lora-cli\r?\n\r?\nThese weights", text)
    assert ("# later" in text) == ("# later" in empty)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("tags: chat", ["chat", "merge", "lora", "lora-cli"]),
        ("tags:", ["merge", "lora", "lora-cli"]),
        ("tags: [lora, x, merge]", ["lora", "x", "merge", "lora-cli"]),
        ("'tags':\n    - x\n    - 2024\n    - \"a: b # c\"", ["x", "2024", "a: b # c", "merge", "lora", "lora-cli"]),
        ("tags: [lora-cli, lora, merge]", ["lora-cli", "lora", "merge"]),
    ],
)
def test_tags_stay_in_their_order(job: Job, tags: str, expected: list[str]) -> None:
    job.readme(f"---\n{tags}\nlicense: mit\n---\n# Model\n")
    job.adapter()
    assert (job.metadata()["tags"], job.metadata()["license"]) == (expected, "mit")


def test_a_text_that_ends_the_metadata_is_no_reason_to_refuse(job: Job) -> None:
    job.label = "not a repository"
    job.readme("---\ntags: [merge, lora, lora-cli]\nmodel-index: []\nnote: |\n  last words\n---\n# Model\n")
    job.adapter()
    assert job.text().startswith("---\ntags: [merge, lora, lora-cli]\nnote: |\n  last words\n---\n# Model\n\n## Merged")


# What it was made of

OWN = f"org/model@{COMMIT}"
LINEAGE: dict[str, tuple[str, str, list[tuple[str, str | None]], Any]] = {
    "the Hub's id, before all else": (OWN, "org/parent", [("style", "org/other")], "org/model"),
    "a branch": ("org/model@refs/pr/3", "", [("style", None)], "org/model"),
    "a claim": ("base", "", [("style", "org/model")], "org/model"),
    "a claim that is newer than the card's": ("base", "org/parent", [("style", "org/model")], "org/model"),
    "claims that agree": ("base", "", [("a", "org/model"), ("b", "org/model")], "org/model"),
    "claims that differ": ("base", "", [("a", "org/model"), ("b", "org/other")], "base"),
    "a claim that is the card's": ("base", "[org/parent, org/more]", [("a", "org/parent")], ["org/parent", "org/more"]),
    "no claim, but a parent": ("base", "org/parent", [("style", None)], "org/parent"),
    "a local path": ("base", "", [("style", "/home/me/model")], "base"),
    "a relative path": ("base", "", [("style", "./model")], "base"),
    "a folder of models": ("base", "", [("style", "models/mine")], "base"),
    "a step of a run": ("base", "", [("style", "out/checkpoint-500")], "base"),
    "a quantised copy": ("base", "", [("style", "unsloth/model-bnb-4bit")], "base"),
    "a claim with a line break": ("base", "", [("style", "org/model\n")], "base"),
    "a claim in other letters": ("base", "", [("style", "örg/modèl")], "base"),
    "no name of a repository": ("my base", "", [("style", None)], None),
    "a commit": (COMMIT, "", [("style", None)], None),
    "an adapter from the Hub": (OWN, "", [(f"me/style@{COMMIT}", None)], ["org/model", "me/style"]),
    "an adapter onto a merge": (
        "merged",
        "[org/model, me/style]",
        [(f"me/facts@{COMMIT}", "org/model")],
        ["org/model", "me/style", "me/facts"],
    ),
}


@pytest.mark.parametrize("name", LINEAGE)
def test_what_it_was_made_of(job: Job, name: str) -> None:
    job.label, parents, adapters, expected = LINEAGE[name]
    if parents:
        job.readme(f"---\nbase_model: {parents}\nbase_model_relation: finetune\n---\n# Model\n")
    for label, claim in adapters:
        job.adapter(label, base_model_name_or_path=claim)
    found = job.metadata()
    assert found.get("base_model") == expected
    assert found.get("base_model_relation") == ("merge" if expected else None)


@pytest.mark.parametrize("claim", ["org/model\n", "örg/modèl", "org/mo\x00del", "a/b/c"])
def test_an_older_client_lets_no_stranger_names_through(job: Job, monkeypatch: pytest.MonkeyPatch, claim: str) -> None:
    monkeypatch.setattr("huggingface_hub.utils._validators.validate_repo_id", lambda text: None)
    job.label = "base"
    job.adapter(base_model_name_or_path=claim)
    assert job.metadata()["base_model"] == "base"


def test_an_adapter_of_weight_0_is_no_part_of_it(job: Job) -> None:
    job.adapter("me/style", weight=0)
    job.adapter("me/facts")
    assert job.metadata()["base_model"] == ["org/model", "me/facts"]


def test_a_snapshot_in_the_cache_is_known_by_its_place(job: Job) -> None:
    repo = job.place / "hub" / "models--org--model"
    repo.joinpath("blobs").mkdir(parents=True)
    job.readme("---\nlicense: mit\n---\n# Model\n").rename(repo / "blobs" / "card")
    snapshot = repo / "snapshots" / COMMIT
    snapshot.parent.mkdir()
    job.base = job.base.rename(snapshot)
    (snapshot / "README.md").symlink_to("../../blobs/card")
    job.label = COMMIT
    job.adapter()
    assert job.text().startswith("---\nlicense: mit\nbase_model: org/model\n")
    assert f"`org/model@{COMMIT}`" in job.text()


# Cards that are left alone

UNREADABLE: dict[str, tuple[str | bytes, str]] = {
    "broken": ("---\nlicense: [mit\n---\n", "not valid YAML"),
    "twice": ("---\nlicense: mit\nlicense: gpl\n---\n", "stands twice"),
    "no table": ("---\n- license\n---\n", "not a table"),
    "numbers as names": ("---\n1: x\n---\n", "not a table"),
    "in braces": ("---\n{license: mit, tags: [x]}\n---\n", "line of its own"),
    "in braces, by lines": ("---\n{\nlicense: mit\n}\n---\n", "line of its own"),
    "indented": ("---\n  license: mit\n---\n", "line of its own"),
    "no end": ("---\nlicense: mit\n# Model\n", "does not end"),
    "two documents": ("---\nlicense: mit\n...\n---\n", "read"),
    "an alias": ("---\na: &a [x]\nb: *a\n---\n", "aliases"),
    "aliases": (
        "---\na: &a [x]\n"
        + "".join(f"{n}: &{n} [{f'*{m},' * 9}]\n" for m, n in zip("abcdefgh", "bcdefghi", strict=True))
        + "---\n",
        "aliases",
    ),
    "a tag": ("---\na: !!python/object/apply:os.system [id]\n---\n", "tags"),
    "deep": (f"---\na: {'[' * 5000}{']' * 5000}\n---\n", "deep"),
    "a number to base 60": (f"---\na: 1{':59' * 60000}\n---\n", "a hundred digits"),
    "a fraction to base 60": (f"---\na: 1{':59' * 300}.5\n---\n", "a hundred digits"),
    "long metadata": ("---\n" + "# x\n" * 70000 + "license: mit\n---\n", "longer than 262144"),
    "a long file": ("---\nlicense: mit\n---\n" + "x" * (1 << 20), "longer than 1048576"),
    "Latin-1": ("---\nauthor: José\n---\n".encode("latin-1"), "UTF-8"),
    "a control character": ("---\nlicense: \x00mit\n---\n", "not valid YAML"),
    "tags that are none": ("---\ntags: {a: b}\n---\n", "tags"),
    "tags in tags": ("---\ntags: [[a], b]\n---\n", "tags"),
    "an argument of the client's": ("---\nignore_metadata_errors: true\n---\n", "cannot read"),
    "a method of the client's": ("---\nto_dict: x\n---\n", "cannot read"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_card_that_is_not_understood_stays_as_it_is(job: Job, name: str) -> None:
    content, why = UNREADABLE[name]
    job.readme(content)
    job.adapter()
    with tiny.within(5):
        data, (warning,) = job.card()
    assert data is None
    assert warning.startswith("README.md stays as it is in the base and does not tell of the merge: ")
    assert why in warning


def test_a_card_of_another_case_is_not_joined_by_a_second(job: Job) -> None:
    job.readme("# Model\n").rename(job.base / "Readme.md")
    job.adapter()
    data, (warning,) = job.card()
    assert data is None
    assert warning.startswith("Readme.md stays as it is")


def test_a_card_that_leads_out_of_the_base_is_not_read(job: Job) -> None:
    outside = job.place / "secret.md"
    outside.write_text("secret\n")
    (job.base / "README.md").symlink_to(outside)
    job.adapter()
    assert "secret" not in job.text()


# Merge upon merge


def test_a_further_merge_is_told_below_the_first(job: Job) -> None:
    job.readme("---\r\nlicense: mit\r\n---\r\n# Model\r\n")
    job.adapter(f"me/style@{COMMIT}")
    job.readme(job.text(undo=True))
    job.adapters.clear()
    job.label = "merged"
    job.adapter("facts", weight=0.5)
    job.adapter("tone")
    job.readme(job.text())
    told = job.text(undo=True)  # the same once more
    body = told.replace("\r\n", "\n").partition("\n---\n")[2]
    assert "\r\n" in told
    assert told.count("\n") == told.count("\r\n")
    again = """\
Afterwards these adapters went into the result (`merged`):

- `facts`: LoRA, weight 0.5, scale 1
- `tone`: LoRA, weight 1, scale 2

"""
    assert (
        body
        == f"""\
# Model

## Merged with lora-cli

Everything above is the card of `org/model@{COMMIT}`. These weights are that model with this adapter merged in:

- `me/style@{COMMIT}`: LoRA, weight 1, scale 2

{again}{again}\
To check this, run `lora-cli verify . --adapter ADAPTER --roundtrip`; to take it out \
again, `lora-cli unmerge . ADAPTER -o BASE`. \
`lora_merge.json` has the details.
"""
    )
    metadata = job.metadata()
    assert metadata["base_model"] == ["org/model", "me/style"]
    assert metadata["tags"] == ["merge", "lora", "lora-cli"]


def test_what_somebody_wrote_below_stays_above(job: Job) -> None:
    job.adapter()
    first = job.text() + "\n# Thanks\n\nTo all.\n"
    job.readme(first)
    second = job.text()
    body = first.partition("\n---\n")[2]
    assert body in second
    assert second.count("\n## Merged with lora-cli\n") == 2


# Names

HOSTILE = {
    "code span": "a`b``c",
    "line breaks": "a\n\n# b\r\n---\n- c",
    "HTML": "<script>alert(1)</script><!--",
    "link": "[x](javascript:alert(1))![y](//z)",
    "metadata": "x\n---\nlicense: mit\n---",
    "direction": "a\u202eb\u2066c",
    "terminal": "a\x1b[31mb\x07",
    "table and maths": "a|b $$c$$ \\(d\\) &lt; *e*",
    "surrogate": "a\udcffb",
    "nothing": " ",
    "long": "x" * 5000,
}
SHOWN = {"code span": "a\ufffdb\ufffd\ufffdc", "nothing": "\ufffd", "long": "x" * 200}


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_gets_out_of_its_place(job: Job, name: str) -> None:
    """R138: HTML, links, images, line breaks: whatever a name holds is text in a code span, and no metadata."""
    hostile = HOSTILE[name]
    job.label = hostile
    job.adapter(hostile, base_model_name_or_path=None if name == "surrogate" else hostile)
    text = job.text()
    card = ModelCard(text)
    assert set(card.data.to_dict()) <= {"tags", "library_name", "base_model", "base_model_relation"}  # type: ignore[no-untyped-call]
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(card.text)
    kinds = {token.type for token in tokens} | {child.type for token in tokens for child in token.children or ()}
    assert kinds == {
        *("heading_open", "heading_close", "paragraph_open", "paragraph_close", "inline", "text", "code_inline"),
        *("bullet_list_open", "bullet_list_close", "list_item_open", "list_item_close"),
    }
    spans = [child.content for token in tokens for child in token.children or () if child.type == "code_inline"]
    assert len(spans) == 4
    assert spans[0] == spans[1] == SHOWN.get(name, spans[0])
    assert all(character.isprintable() or character == "\n" for character in text)
    assert not set("<>|*$\\&[]") & set(spans[0])


def test_letters_of_all_scripts_are_names(job: Job) -> None:
    job.adapter("größe-標準-हिन्दी (v2.1)")
    assert "- `größe-標準-हिन्दी (v2.1)`: LoRA" in job.text()


def test_many_scales_are_told_in_short(job: Job) -> None:
    job.adapter(alpha_pattern=dict(zip(tiny.MODULES, (2, 6), strict=False)))
    assert "LoRA, weight 1, scale 1 and 2 and 3\n" in job.text()
    base, adapter = open_checkpoint(job.base), open_adapter(job.adapters[0][0])
    scales = tuple(ScaleUse(number / 3, "alpha", 1) for number in range(5, 0, -1))
    use = AdapterUse("a", "peft", "LoRA", 1, "", scales)
    assert b": LoRA, weight 1, 5 scales from 0.333333 to 1.66667\n" in (
        model_card(base, (), [adapter], [use])[0] or b""
    )


# Surroundings


def test_the_card_knows_nothing_of_this_machine(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.readme(CARD)
    job.label = "base"
    job.adapter(base_model_name_or_path="org/model")
    text = job.text(warned=[RESULTS_WARNING])
    assert str(job.place) not in text
    here = job.place / "elsewhere"
    (here / "org" / "model").mkdir(parents=True)  # a claim is not looked up on this disk
    monkeypatch.chdir(here)
    assert job.text(warned=[RESULTS_WARNING]) == text


PROBE = """
import sys
from pathlib import Path
from lora_cli.checkpoint.checkpoint import open_checkpoint
from lora_cli.surgery.card import model_card
assert not {"huggingface_hub", "yaml", "torch"} & set(sys.modules)
print(model_card(open_checkpoint(Path(sys.argv[1])), (), (), ()))
"""


def test_nothing_heavy_is_loaded_for_it_and_no_setting_stops_it(job: Job) -> None:
    line = [sys.executable, "-c", PROBE, str(job.base)]
    env = os.environ | {"HF_HUB_ETAG_TIMEOUT": "soon"}
    ran = subprocess.run(line, env=env, capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout.startswith("(None, ['README.md does not tell of the merge: ")


def test_labels_of_the_base_do_not_change(job: Job) -> None:
    """The label of a checkpoint is taken as it is, whatever its folder is called."""
    job.adapter()
    base = open_checkpoint(job.base, label="one")
    assert b"`one`" in (model_card(base, (), (), ())[0] or b"")
    assert b"`two`" in (model_card(replace(base, label="two"), (), (), ())[0] or b"")
