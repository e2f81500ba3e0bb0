"""Generate what must not drift from the code: docs/cli.md from the help texts, docs/schemas from the result classes.

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
