"""Plans of the largest checkpoints: a terabyte in 200 shards within bounded memory, and work that grows as names do."""

from __future__ import annotations

import cProfile
import json
import pstats
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lora_cli
from lora_cli.cli.document import rendered

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "plan_sizes.py"
SIZES: dict[str, Any] = runpy.run_path(str(SCRIPT))
MOST_MEMORY = 700 << 20

# In a process of its own: on Linux, what a process had before it became another program counts as that one's peak.
MEASURE = "import json, sys, plan_sizes; print(json.dumps(plan_sizes.measure(*sys.argv[1:])))"


@pytest.fixture(scope="module")
def terabyte(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Llama-405B's shapes and further layers, with an adapter for the first 126, as headers and holes."""
    base, adapter = SIZES["make"](tmp_path_factory.mktemp("terabyte"), "dense")
    first = next(base.glob("*.safetensors")).stat()
    if first.st_blocks * 512 > first.st_size // 2:
        pytest.skip("this file system keeps no holes")
    return base, adapter


def test_a_terabyte_is_planned(terabyte: tuple[Path, Path]) -> None:
    base, adapter = terabyte
    plan = lora_cli.plan_merge(base, [adapter])
    assert len(plan.files) == 200
    assert plan.counts() == {"total": 156 * 9 + 3, "edited": 126 * 7, "copied": 156 * 2 + 30 * 7 + 3} | NOTHING_ELSE
    assert plan.ledger_counts() == {"applied": 2 * 126 * 7, "replaced": 0, "added": 0, "ignored": 0}
    (use,) = plan.adapters
    assert [(scaled.scale, scaled.modules) for scaled in use.scales] == [(2.0, 126 * 7)]
    assert 0.95e12 < sum(file.size for file in plan.files) < 1.05e12
    assert plan.bytes_to_read > 1e12 - 1e11
    assert json.loads(rendered(plan.as_dict())) == plan.as_dict()


NOTHING_ELSE = {"added": 0, "dropped": 0}


@pytest.mark.parametrize("further", [("--json",), ("--json", "--no-undo"), ()], ids=" ".join)
def test_a_plan_of_a_terabyte_takes_little_memory(
    terabyte: tuple[Path, Path], tmp_path: Path, further: tuple[str, ...]
) -> None:
    """Also with the estimate of the undo file, which reads and merges a sample."""
    base, adapter = terabyte
    program = ["merge", base, adapter, "-o", tmp_path / "out", "--dry-run", *further]
    line = [sys.executable, "-c", MEASURE, *map(str, program)]
    done = subprocess.run(
        line, cwd=ROOT, env=SIZES["environment"]("scripts"), capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert 0 < said["peak_rss_bytes"] <= MOST_MEMORY
    assert said["stdout_bytes"] > (10**6 if "--json" in further else 1000)
    assert not (tmp_path / "out").exists()


# Work

EXPERTS = 24


def calls_of(folder: Path, layers: int) -> tuple[int, int]:
    """Function calls that planning and printing takes for so many layers of experts, and the number of pairs."""
    shapes, modules = SIZES["expert_shapes"](layers, EXPERTS)
    base, adapter = folder / f"base-{layers}", folder / f"adapter-{layers}"
    SIZES["write_base"](base, shapes, shards=layers)
    SIZES["write_adapter"](adapter, shapes, modules)
    # A name for each module, in whatever spelling configs have them.
    ignored = [*modules, *(f"{module}.x" for module in modules), "re:.*norm", "lm_head*"]
    add(base / "config.json", quantization_config={"quant_method": "fp8", "ignore": ignored})
    ranks = {f"^{module}" if at % 2 else module.replace(".", "\\."): SIZES["RANK"] for at, module in enumerate(modules)}
    add(adapter / "adapter_config.json", rank_pattern=ranks, alpha_pattern=dict.fromkeys(modules, 8))
    profile = cProfile.Profile()
    profile.enable()
    plan = lora_cli.plan_merge(base, [adapter])
    text = rendered(plan.as_dict())
    found = rendered(lora_cli.inspect(base)), rendered(lora_cli.inspect(adapter, base=base))
    profile.disable()
    assert plan.ledger_counts()["applied"] == 2 * len(modules)
    assert len(json.loads(text)["entries"]) == 2 * len(modules)
    assert all(len(text) > len(modules) for text in found)
    calls: int = pstats.Stats(profile).total_calls  # type: ignore[attr-defined]
    return calls, len(modules)


def add(config: Path, **fields: object) -> None:
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))


def test_work_grows_as_the_number_of_pairs(tmp_path: Path) -> None:
    calls_of(tmp_path / "warm", 1)
    few, fewer = calls_of(tmp_path, 3)
    many, more = calls_of(tmp_path, 12)
    assert more == 4 * fewer
    assert 3.5 < many / few < 4.2
