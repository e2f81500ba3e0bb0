"""How long undo files are, against the least that is possible: the sum of log2 of how many base values merge alike.

    python scripts/undo_sizes.py [--side 2048] [--dtype bfloat16] [--ratios 0.005 0.05] [--json]

Gaussian weights (std 0.02), half and nine tenths of them pruned in further rows; a rank-16 Gaussian delta of which the
standard deviation is a given share of theirs. Each row is one merge through files. The count of preimages is that of
`Preimages.intervals`, checked by brute force over all values of the type on a sample where it has 16 bits or fewer.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import lora_cli
from lora_cli.adapters.source import ReadOptions
from lora_cli.arithmetic.ordered import bits_view
from lora_cli.arithmetic.preimages import Preimages
from lora_cli.arithmetic.product import Term, prepare
from lora_cli.arithmetic.rounding import slices_for, work_dtype
from lora_cli.surgery.placing import PlanOptions

RATIOS = (0.005, 0.015, 0.05, 0.15, 1.0, 10.0)
PRUNED = {"dense": 0.0, "half pruned": 0.5, "90 % pruned": 0.9}
RANK = 16
STD = 0.02
SLACK = 64 << 10
"""Bytes that an undo file may have besides: header, manifest, and all that does not grow with the tensor."""


def measure(ratio: float, pruned: float, side: int, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
    """Merge one matrix and return the length of the undo file, and the least that it could have, in bytes."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(side, side, generator=generator) * STD
    base[torch.rand(side, side, generator=generator) < pruned] = 0.0
    b = torch.randn(side, RANK, generator=generator)
    a = torch.randn(RANK, side, generator=generator) * (ratio * STD / RANK**0.5)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        save_file({"x.weight": base.to(dtype)}, folder / "base.safetensors")
        save_file({"x.lora_A.weight": a, "x.lora_B.weight": b}, folder / "factors.safetensors")
        options = PlanOptions(read=ReadOptions(scale=1.0), orientation="ba")
        factors = [folder / "factors.safetensors"]
        result = lora_cli.merge(folder / "base.safetensors", factors, folder / "merged.safetensors", options)
        lora_cli.unmerge(folder / "merged.safetensors", factors, folder / "again.safetensors")
        same = (folder / "again.safetensors").read_bytes() == (folder / "base.safetensors").read_bytes()
        check(same, "the base did not come back")
        merged = load_file(folder / "merged.safetensors")["x.weight"]
    size = result.undo.bytes if result.undo else 0
    work = work_dtype(dtype, dtype)
    delta = prepare([Term(b, a, 1.0)], slices=slices_for(work)).tile(slice(0, side), slice(0, side)).to(work) + 0.0
    least = least_bytes(dtype, merged, delta)
    elements = side * side
    return {
        "ratio": ratio,
        "pruned": pruned,
        "bytes": size,
        "least": least,
        "over": size / least - 1,
        "bits": 8 * size / elements,
        "share": size / (elements * dtype.itemsize),
        "within": size <= 1.05 * least + SLACK,
    }


def least_bytes(dtype: torch.dtype, merged: torch.Tensor, delta: torch.Tensor) -> float:
    """Return Σ log2(count) / 8 over all elements."""
    preimages = Preimages(dtype, dtype, 1)
    patterns, numbers = bits_view(merged.view(-1)), delta.view(-1).numpy()
    counts = preimages.intervals(patterns, numbers).spare.astype(np.float64) + 1
    if dtype.itemsize <= 2:
        check_counts(dtype, merged.view(-1), delta.view(-1), counts)
    return float(np.log2(counts).sum()) / 8


def check_counts(dtype: torch.dtype, merged: torch.Tensor, delta: torch.Tensor, counts: np.ndarray[Any, Any]) -> None:
    """Compare some counts with those of trying every value of the type."""
    width = {1: torch.uint8, 2: torch.int16}[dtype.itemsize]
    every = torch.arange(1 << 8 * dtype.itemsize).to(width).view(dtype)
    wide = every.to(delta.dtype)
    for at in np.random.default_rng(1).integers(0, merged.numel(), 500).tolist():
        sums = (wide - (0.0 - delta[at])).to(dtype)
        hits = int((sums.view(width) == merged[at].view(width)).sum())
        check(hits == int(counts[at]), f"element {at} has {hits} preimages, not {counts[at]:g}")


def check(holds: bool, words: str) -> None:
    """Stop if something does not hold."""
    if not holds:
        raise SystemExit(f"wrong: {words}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=2048)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS, help="std of the delta / std of the weights")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    dtype: torch.dtype = getattr(torch, arguments.dtype)
    rows = [
        {"weights": name, **measure(ratio, share, arguments.side, dtype)}
        for name, share in PRUNED.items()
        for ratio in arguments.ratios
    ]
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return
    print(f"{arguments.side} × {arguments.side} {arguments.dtype}, rank {RANK}; sizes of whole undo files\n")
    print("| weights | std ΔW / std W | least | undo file | over | bit/element | share of the tensor |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        sizes = f"{row['least'] / 1e3:.1f} kB | {row['bytes'] / 1e3:.1f} kB | {row['over']:+.1%}"
        print(f"| {row['weights']} | {row['ratio']:g} | {sizes} | {row['bits']:.4f} | {row['share']:.2%} |")


if __name__ == "__main__":
    main()
