"""What the measurements say: medians, ratios to `cp`, and what each further gigabyte costs."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

from jobs import LABELS
from rich import box
from rich.console import Console
from rich.table import Table

WIDTH = 200
NONE = "–"

Result = dict[str, Any]
Medians = dict[str, dict[str, float]]


def medians(case: Result) -> Medians:
    """Job name → median wall time, CPU time and peak memory."""
    samples: dict[str, list[dict[str, float]]] = case["samples"]
    return {
        job: {what: median(sample[what] for sample in samples[job]) for what in ("wall", "cpu", "peak")}
        for job in LABELS
        if samples.get(job)
    }


def ratio(part: float, whole: float | None) -> float | None:
    """A ratio, where there is something to compare with."""
    return part / whole if whole and whole > 0 else None


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Rise per unit of the straight line that fits best; through two points, the line between them."""
    x, y = fmean(at for at, _ in points), fmean(value for _, value in points)
    return sum((at - x) * (value - y) for at, value in points) / sum((at - x) ** 2 for at, _ in points)


def slopes(cases: Sequence[Result]) -> Medians:
    """Job name → seconds, seconds of CPU and bytes of memory that each further byte of checkpoint costs.

    What a process costs before it does anything, such as loading torch, is not in them.
    """
    found: Medians = {}
    for job in LABELS:
        points = [(case["bytes"], medians(case)[job]) for case in cases if job in medians(case)]
        if len({size for size, _ in points}) > 1:
            found[job] = {what: slope([(size, at[what]) for size, at in points]) for what in ("wall", "cpu", "peak")}
    return found


def print_report(result: Result) -> None:
    """Print all tables, as Markdown."""
    console = Console(width=WIDTH, highlight=False)
    machine = result["machine"]
    console.print(
        f"{machine['cores']} cores ({machine['cpu']}), {machine['memory'] / 1e9:.0f} GB of memory", soft_wrap=True
    )
    console.print(", ".join(f"{name} {version}" for name, version in result["versions"].items()), soft_wrap=True)
    for case in result["cases"]:
        console.print(f"\n{title(case)}; medians of whole runs; memory is that of the largest process", soft_wrap=True)
        console.print(case_table(case))
    for rank in sorted({case["rank"] for case in result["cases"]}):
        cases = [case for case in result["cases"] if case["rank"] == rank]
        found = slopes(cases)
        if found:
            console.print(f"\nrank {rank}: each further gigabyte")
            console.print(slope_table(found))
            console.print(f"\nrank {rank}: by size, time as a multiple of cp and peak memory of the largest process")
            console.print(growth_table(cases))
    for words in result["notes"]:
        console.print(f"note: {words}", soft_wrap=True)


def title(case: Result) -> str:
    """What a case is, in a line."""
    undo = f", undo file {case['undo_bytes'] / 1e6:.1f} MB" if case["undo_bytes"] else ""
    tensors = "one tensor" if case["tensors"] == 1 else f"{case['tensors']} tensors"
    return f"{case['bytes'] / 1e9:.3g} GB bf16 in {tensors}, adapter of rank {case['rank']}{undo}"


def table(*columns: str) -> Table:
    """An empty table of which all columns but the first hold numbers."""
    made = Table(box=box.MARKDOWN)
    for number, column in enumerate(columns):
        made.add_column(column, justify="right" if number else "left")
    return made


def shown(value: float | None, form: str) -> str:
    """A number, or a sign that there is none."""
    return NONE if value is None else format(value, form)


def case_table(case: Result) -> Table:
    """The medians of one case."""
    made = table("job", "seconds", "× cp", "CPU seconds", "peak MB", "above import torch", "runs")
    found = medians(case)
    copy, torch = found.get("cp", {}).get("wall"), found.get("import-torch", {}).get("peak")
    for job, at in found.items():
        above = at["peak"] - torch if torch and job not in ("cp", "import-torch") else None
        above_megabytes = None if above is None else above / 1e6
        times = shown(ratio(at["wall"], copy), ".2f") if job != "import-torch" else NONE
        numbers = (f"{at['wall']:.2f}", times, f"{at['cpu']:.2f}", f"{at['peak'] / 1e6:.0f}")
        made.add_row(LABELS[job], *numbers, shown(above_megabytes, ".0f"), str(len(case["samples"][job])))
    return made


def slope_table(found: Medians) -> Table:
    """What a further gigabyte costs."""
    made = table("job", "seconds", "× cp", "CPU seconds", "peak MB")
    copy = found.get("cp", {}).get("wall")
    for job, at in found.items():
        if job != "import-torch":
            times = shown(ratio(at["wall"], copy), ".2f")
            made.add_row(
                LABELS[job], f"{at['wall'] * 1e9:.2f}", times, f"{at['cpu'] * 1e9:.2f}", f"{at['peak'] * 1e3:.1f}"
            )
    return made


def growth_table(cases: Sequence[Result]) -> Table:
    """How time and memory grow with size."""
    made = table("job", *(f"{case['bytes'] / 1e9:.3g} GB" for case in cases))
    every = [medians(case) for case in cases]
    for job, label in LABELS.items():
        if job != "import-torch" and any(job in found for found in every):
            made.add_row(label, *(growth(found, job) for found in every))
    return made


def growth(found: Medians, job: str) -> str:
    """One cell of that table."""
    if job not in found:
        return NONE
    times = ratio(found[job]["wall"], found["cp"]["wall"]) if "cp" in found else None
    return f"{shown(times, '.2f')} · {found[job]['peak'] / 1e6:.0f} MB"
