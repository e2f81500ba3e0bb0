"""Generate what must not drift from the code.

docs/cli.md is made from the help texts, docs/schemas from the result classes, docs/tuners.md from the list of tuners.

Usage: python scripts/make_docs.py [--check]
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

import lora_cli
from lora_cli.adapters.tuners import REFUSED, TUNERS
from lora_cli.adapters.tuners.tuner import Tuner
from lora_cli.cli.app import run
from lora_cli.cli.output import error_fields
from lora_cli.errors import LoraCliError

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
`verify` and `unmerge`, and every merge comes back bit for bit; they differ in what the undo file keeps for that.

- **preimages**: the change is computed again from the adapter, and the file says which of its preimages each element
  was. That is small, and `unmerge` needs the adapter (or a file with it, `merge --embed-adapter`).
- **residual**: the change makes something of what is there, or cannot be computed from the merged weight or on every
  machine. The file keeps what is between the two: more, at most as much as the tensors that change.
- **whole**: what was replaced.

In the last column is whether the merged bytes are the same on every machine. Where they need not be, a library's
exponentials, random numbers or decompositions take part: then they are the same on one machine, whatever its threads
and memory.

| `peft_type` | name | for | undone by | the same bytes everywhere |
|---|---|---|---|---|
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
    "preimages",
    "yes",
)


def tuners_page() -> str:
    """The page of tuners: what each does, and why the others are refused."""
    rows = [LORA, *(_tuner_row(tuner) for _, tuner in sorted(TUNERS.items()))]
    merged = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    refused = "".join(f"| `{kind}` | {reason} |\n" for kind, reason in sorted(REFUSED.items()))
    sources = "".join(f"- {tuner.name}: {tuner.source}\n" for _, tuner in sorted(TUNERS.items()))
    return f"{TUNERS_PAGE}{merged}{REFUSED_PAGE}{refused}{SOURCES_PAGE}{sources}"


def _tuner_row(tuner: Tuner) -> tuple[str, ...]:
    kept = ["preimages" if method.preimages else "residual" for method in tuner.methods]
    exact = {method.exact for method in tuner.methods} or {True}
    undo = " or ".join(sorted({*kept, *(["whole"] if tuner.whole else [])}))
    same = {(True,): "yes", (False,): "no", (False, True): "as the adapter is"}[tuple(sorted(exact))]
    return f"`{tuner.type}`", tuner.name, tuner.modules, undo, same


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
