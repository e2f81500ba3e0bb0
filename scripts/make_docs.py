"""Generate what must not drift from the code.

docs/cli.md is made from the help texts, docs/schemas from the result classes, docs/tuners.md from the list of tuners.

Usage: python scripts/make_docs.py [--check]
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import json
import os
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

import lora_cli
from lora_cli.adapters.formula import Method
from lora_cli.adapters.tuners import REFUSED, TUNERS
from lora_cli.adapters.tuners.tuner import Tuner
from lora_cli.cli.app import run
from lora_cli.cli.output import error_fields
from lora_cli.errors import LoraCliError
from lora_cli.surgery.edit import SUMMANDS

DOCS = Path(__file__).resolve().parent.parent / "docs"
COMMANDS = ("inspect", "inject", "merge", "unmerge", "verify", "diff")
RESULTS = {
    "diff": lora_cli.DiffResult,
    "inject": lora_cli.InjectResult,
    "inspect": lora_cli.InspectResult,
    "merge": lora_cli.MergeResult,
    "unmerge": lora_cli.UnmergeResult,
    "verify": lora_cli.VerifyResult,
}


JSON_PAGE = """## JSON

With `--json` stdout holds one document. Its field `schema` is `lora-cli/COMMAND/1`, or `lora-cli/error/1` on failure;
`--dry-run` prints `lora-cli/plan/1`. Fields are only ever added. The schemas of results and errors are in
`docs/schemas`. Numbers that JSON lacks are strings (`inf`, `nan`).
"""


def main() -> int:
    """Write the files, or with --check say which are out of date."""
    wanted = {DOCS / "schemas" / f"{name}.json": text for name, text in schemas().items()}
    wanted[DOCS / "cli.md"] = cli_page()
    wanted[DOCS / "tuners.md"] = tuners_page()
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    if "--check" in sys.argv:
        for path in stale:
            print(f"out of date: {path.name}; run: python scripts/make_docs.py")
        return 1 if stale else 0
    for path in stale:
        path.parent.mkdir(exist_ok=True)
        path.write_text(wanted[path])
    return 0


def cli_page() -> str:
    """The reference of the command line: what --help prints."""
    parts = ["# The command line\n\nMade from the help texts by `python scripts/make_docs.py`.\n"]
    for command in ("", *COMMANDS):
        title = f"lora-cli {command}".strip()
        parts.append(f"## {title}\n\n```text\n{help_text(command)}\n```\n")
    parts.append(JSON_PAGE)
    return "\n".join(parts)


def help_text(command: str) -> str:
    """What `lora-cli COMMAND --help` prints, 100 columns wide and plain."""
    os.environ.update(COLUMNS="100", TERMINAL_WIDTH="100", NO_COLOR="1", TERM="dumb")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        run([*([command] if command else []), "--help"])
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()).strip("\n")


TUNERS_PAGE = """# The tuners of PEFT

Made from the list of tuners by `python scripts/make_docs.py`.

What PEFT calls a tuner is read from `adapter_config.json` (`peft_type`). All of these have the same merge, ledger,
`verify` and `unmerge`, and every merge can be undone bit for bit.

| `peft_type` | name | for | does | strength | undone by | the same bytes everywhere |
|---|---|---|---|---|---|---|
"""

KINDS_PAGE = """
Where a row says `or`, it depends on the adapter's settings: Bone and MiSS transform rows if they were trained with
`init_weights="bat"`, and the bytes of RandLoRA depend on the machine if its file lacks the projections
(`save_projection=False`).

## What can be done with them

What a tuner does to a weight decides it. DoRA, which sets the lengths of rows, is LoRA's exception: it is merged alone
and at weight 1, and no subtraction takes it out.

| does | | `--weight` other than 1 | with others on the same tensor | `unmerge --approximate` |
|---|---|---|---|---|
"""

KINDS_NOTES = """
- **Alone** means that the merge is refused where another adapter changes the same tensor. Merge one after the other.
  What multiplies or transforms works on what the first left there, so the other order gives another result; and
  that result is what the adapter does on top of the first, not what it does on the base that it was trained on.
- **`--scale` and `--alpha`** set the strength that the config would say. The column "strength" has those that a tuner
  knows; of the others nothing but the weight can be said, where the table allows it.
- **`inspect --spectrum`** and the deltas of `diff` are of LoRA alone. Of the other tuners `diff` compares the tensors
  that the change is made of.
- **VB-LoRA** takes the vectors with the largest logits. Of equal logits the first counts here; in PEFT it may be
  another one, so a merge warns where that matters.

## How a merge is undone

The last column but one says what the undo file keeps. Sizes are of the tensors that change, in bf16: how much it is
depends on how strong the change is.

| undone by | what the undo file keeps | size |
|---|---|---|
| preimages | `unmerge` computes the change again from the adapter, and the file says which of the values \
that may have been there each element was. It needs the adapter, or a file that holds it (`merge --embed-adapter`). | \
little: under 0.05 for LoRA and most others, 0.01 for (IA)³; up to 0.3 for strong changes |
| residual | The difference between base and merged weight, compressed; the adapter is not needed. This is for changes \
that cannot be computed again: they depend on what the weight was, or another machine may compute other bits. | much: \
0.2 to 0.8 for OFT, BOFT and HRA; at most about 1 |
| whole | What was replaced, as it was. | the tensors or rows that the adapter replaces |

## On which machine

The last column says whether the merged bytes are the same on every machine. Where they need not be, exponentials,
random numbers or decompositions of a library take part: then they are the same on one machine, whatever its threads
and memory.
"""

REFUSED_PAGE = """
## What cannot be merged

These are refused with the reason, and so is a type that is not in this list.

| `peft_type` | why |
|---|---|
"""

SOURCES_PAGE = """
## Sources

"""

LORA = (
    "`LORA`",
    "LoRA, with rsLoRA, DoRA, BD-LoRA, PiSSA and other inits",
    "linear layers, GPT-2's Conv1D, convolutions, embeddings, attention, experts",
    "adds",
    "`--scale`, `--alpha`",
    "preimages",
    "yes",
)

ADDS, ADDS_READ, MULTIPLIES, REMAKES, REPLACES = (
    "adds",
    "adds, by the base",
    "multiplies",
    "transforms rows",
    "replaces",
)
DOES = {
    ADDS: "a product of factors or what a formula gives, from the adapter alone",
    ADDS_READ: "what is computed from the adapter and the weight of the base",
    MULTIPLIES: "each element by a number of its own",
    REMAKES: "rotates, mixes or rescales what is there",
    REPLACES: "tensors or rows, which the adapter holds whole",
}


def tuners_page() -> str:
    """The page of tuners: what each does, what that allows, and why the others are refused."""
    rows = [LORA, *(_tuner_row(tuner) for _, tuner in sorted(TUNERS.items()))]
    merged = _table(rows)
    kinds = _table((f"**{does}**", words, *_allowed(does)) for does, words in DOES.items())
    refused = _table((f"`{kind}`", reason) for kind, reason in sorted(REFUSED.items()))
    sources = "".join(f"- {tuner.name}: {tuner.source}\n" for _, tuner in sorted(TUNERS.items()))
    return f"{TUNERS_PAGE}{merged}{KINDS_PAGE}{kinds}{KINDS_NOTES}{REFUSED_PAGE}{refused}{SOURCES_PAGE}{sources}"


def _table(rows: Iterable[tuple[str, ...]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _tuner_row(tuner: Tuner) -> tuple[str, ...]:
    does = dict.fromkeys([*map(_does, tuner.methods), *([REPLACES] if tuner.whole else [])])
    kept = ["preimages" if method.preimages else "residual" for method in tuner.methods]
    exact = {method.exact for method in tuner.methods} or {True}
    undo = " or ".join(sorted({*kept, *(["whole"] if tuner.whole else [])}))
    same = {(True,): "yes", (False,): "no", (False, True): "yes or no"}[tuple(sorted(exact))]
    return f"`{tuner.type}`", tuner.name, tuner.modules, " or ".join(does), _strength(tuner), undo, same


def _does(method: Method) -> str:
    if method.acts in SUMMANDS:
        return ADDS_READ if method.reads else ADDS
    return MULTIPLIES if method.acts == "gain" else REMAKES


def _allowed(does: str) -> tuple[str, str, str]:
    """Whether there are weights, whether others may be there, and whether it can be subtracted."""
    adds = does in (ADDS, ADDS_READ)
    rows = "only where they are the same" if does == REPLACES else "no: alone"
    taken = "no: they stay" if does == REPLACES else "yes" if does == ADDS else "no"
    return "yes" if adds else "no", "yes, their changes add up" if adds else rows, taken


def _strength(tuner: Tuner) -> str:
    """The options that a tuner's reader obeys: `scale` is called there with what divides alpha, or with None."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.getmodule(tuner.read) or tuner.read)))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    divisors = [call.args[1] for call in calls if getattr(call.func, "attr", "") == "scale" and len(call.args) == 4]
    if any(not (isinstance(by, ast.Constant) and by.value is None) for by in divisors):
        return "`--scale`, `--alpha`"
    return "`--scale`" if divisors else ""


def schemas() -> dict[str, str]:
    """One JSON schema for each command's result, and one for errors."""
    made = {name: _with_name(TypeAdapter(kind).json_schema(), name) for name, kind in RESULTS.items()}
    made["error"] = _error_schema()
    return {name: json.dumps(schema, indent=2, sort_keys=True) + "\n" for name, schema in made.items()}


def _with_name(schema: dict[str, Any], command: str) -> dict[str, Any]:
    schema = _numbers(schema)
    schema["properties"]["schema"] = {"const": f"lora-cli/{command}/1"}
    schema["required"] = sorted([*schema.get("required", []), "schema"])
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return schema


def _error_schema() -> dict[str, Any]:
    text: dict[str, Any] = {"type": ["string", "null"]}
    properties: dict[str, Any] = dict.fromkeys(error_fields(LoraCliError("")), text)
    properties["exit"] = {"type": "integer"}
    properties["details"] = {"type": "array", "items": {"type": "string"}}
    properties["code"] = properties["message"] = {"type": "string"}
    schema = {"type": "object", "title": "Error", "properties": properties, "required": sorted(properties)}
    return _with_name(schema, "error")


def _numbers(schema: Any) -> Any:
    """Allow the strings that stand for numbers JSON lacks."""
    if isinstance(schema, list):
        return [_numbers(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("type") == "number":
        return {
            **{k: v for k, v in schema.items() if k != "type"},
            "anyOf": [{"type": "number"}, {"enum": ["inf", "-inf", "nan"]}],
        }
    return {key: _numbers(value) for key, value in schema.items()}


if __name__ == "__main__":
    sys.exit(main())
