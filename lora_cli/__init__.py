"""Checkpoint surgery for low-rank adapters, on files.

    import lora_cli

    lora_cli.merge("base/", ["adapter/"], "merged/")
    lora_cli.verify("merged/", "base/", ["adapter/"]).verified  # True

Everything that the command line does is a function here. Names are loaded when they are first used, so importing this
package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_cli import errors
    from lora_cli.adapters.source import ReadOptions
    from lora_cli.progress import Progress
    from lora_cli.surgery.diff import DiffResult, diff
    from lora_cli.surgery.inject import InjectResult, inject
    from lora_cli.surgery.inspect import inspect
    from lora_cli.surgery.inspection import InspectResult
    from lora_cli.surgery.merge import MergeResult, merge, plan_merge
    from lora_cli.surgery.placing import PlanOptions
    from lora_cli.surgery.plan import Plan
    from lora_cli.surgery.unmerge import UnmergeResult, unmerge
    from lora_cli.surgery.verify import VerifyResult, verify
    from lora_cli.version import __version__

_WHERE = {
    "DiffResult": "surgery.diff",
    "InjectResult": "surgery.inject",
    "InspectResult": "surgery.inspection",
    "MergeResult": "surgery.merge",
    "Plan": "surgery.plan",
    "PlanOptions": "surgery.placing",
    "Progress": "progress",
    "ReadOptions": "adapters.source",
    "UnmergeResult": "surgery.unmerge",
    "VerifyResult": "surgery.verify",
    "__version__": "version",
    "diff": "surgery.diff",
    "inject": "surgery.inject",
    "inspect": "surgery.inspect",
    "merge": "surgery.merge",
    "plan_merge": "surgery.merge",
    "unmerge": "surgery.unmerge",
    "verify": "surgery.verify",
}

__all__ = [
    "DiffResult",
    "InjectResult",
    "InspectResult",
    "MergeResult",
    "Plan",
    "PlanOptions",
    "Progress",
    "ReadOptions",
    "UnmergeResult",
    "VerifyResult",
    "__version__",
    "diff",
    "errors",
    "inject",
    "inspect",
    "merge",
    "plan_merge",
    "unmerge",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "errors":
        return importlib.import_module("lora_cli.errors")
    if name in _WHERE:
        return getattr(importlib.import_module(f"lora_cli.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'lora_cli' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
