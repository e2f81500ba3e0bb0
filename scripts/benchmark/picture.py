"""One case as a bar chart: an SVG without fonts, scripts or libraries, for light and dark pages."""

from __future__ import annotations

from html import escape

from jobs import LABELS
from report import Medians, Result, medians

WIDTH, LEFT, RIGHT, TOP, ROW, BAR, FOOT = 760, 200, 150, 62, 34, 20, 40
FAMILIES = {"cp": "copy", "peft": "peer", "mergekit": "peer"}
"""Job → class of its bar; all others are ours."""
STYLE = """
  text { font: 14px system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; fill: #1f2328; }
  .head { font-size: 16px; font-weight: 600; }
  .soft { fill: #59636e; font-size: 12px; }
  .copy { fill: #8c959f; }
  .ours { fill: #0969da; }
  .peer { fill: #bc6a00; }
  .axis { stroke: #d1d9e0; }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc; }
    .soft { fill: #9198a1; }
    .copy { fill: #6e7681; }
    .ours { fill: #4493f8; }
    .peer { fill: #d29922; }
    .axis { stroke: #3d444d; }
  }
"""


def choose(result: Result) -> Result:
    """The case to draw: the one with the most jobs, and of these the first."""
    chosen: Result = max(result["cases"], key=lambda case: len(medians(case)))
    return chosen


def draw(result: Result) -> str:
    """Draw the wall time of each job, with its peak memory beside it."""
    case = choose(result)
    found = medians(case)
    bars = {job: at for job, at in found.items() if job != "import-torch"}
    longest = max((at["wall"] for at in bars.values()), default=1.0)
    height = TOP + ROW * len(bars) + FOOT
    machine = result["machine"]
    head = f"{case['bytes'] / 1e9:.2g} GB of bf16 weights, adapter of rank {case['rank']}"
    on = f"{machine['cores']} cores, {machine['cpu']}"
    under = f"Wall time of whole runs, files synced; peak memory of their largest process; {on}"
    told = "; ".join(f"{LABELS[job]}: {words(at)}" for job, at in bars.items())
    foot = f"{alone(found)}{runs(case, bars)}"
    rows = [row(number, job, at, longest) for number, (job, at) in enumerate(bars.items())]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
            'role="img" aria-labelledby="title desc">',
            f'<title id="title">Seconds by job: {escape(head)}</title>',
            f'<desc id="desc">Horizontal bars. {escape(told)}.</desc>',
            f"<style>{STYLE}</style>",
            f'<text class="head" x="12" y="24">{escape(head)}</text>',
            f'<text class="soft" x="12" y="44">{escape(under)}</text>',
            *rows,
            f'<line class="axis" x1="{LEFT}" x2="{LEFT}" y1="{TOP - 6}" y2="{TOP + ROW * len(bars) - 2}"/>',
            f'<text class="soft" x="12" y="{height - 14}">{escape(foot)}</text>',
            "</svg>",
            "",
        ]
    )


def alone(found: Medians) -> str:
    """What torch costs before anything is done."""
    at = found.get("import-torch")
    return f"import torch alone, with which all but cp and diff begin: {words(at)}. " if at else ""


def runs(case: Result, bars: Medians) -> str:
    """How many runs the bars are medians of."""
    counts = {job: len(case["samples"][job]) for job in bars}
    most = max(counts.values(), default=0)
    fewer = [f"{LABELS[job]}: {count}" for job, count in counts.items() if count < most]
    return f"Medians of {most} run{'s' * (most != 1)}" + (f" ({', '.join(fewer)})." if fewer else ".")


def row(number: int, job: str, at: dict[str, float], longest: float) -> str:
    """One bar with its name before it and its numbers behind it."""
    y = TOP + ROW * number
    length = max(2.0, (WIDTH - LEFT - RIGHT) * at["wall"] / longest)
    middle = y + BAR / 2 + 5
    return (
        f'<text x="{LEFT - 10}" y="{middle:g}" text-anchor="end">{escape(LABELS[job])}</text>\n'
        f'<rect class="{FAMILIES.get(job, "ours")}" x="{LEFT}" y="{y}" width="{length:.1f}" height="{BAR}" rx="3"/>\n'
        f'<text x="{LEFT + length + 8:.1f}" y="{middle:g}">{escape(words(at))}</text>'
    )


def words(at: dict[str, float]) -> str:
    """Seconds and peak memory."""
    seconds = f"{at['wall']:.2f}" if at["wall"] < 10 else f"{at['wall']:.0f}"
    memory = f"{at['peak'] / 1e6:.0f} MB" if at["peak"] < 1e9 else f"{at['peak'] / 1e9:.1f} GB"
    return f"{seconds} s · {memory}"
