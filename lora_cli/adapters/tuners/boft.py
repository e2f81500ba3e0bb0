"""BOFT: inputs of a module turned by several layers of small rotations, one after the other (Liu et al. 2024).

In PEFT (`peft.tuners.boft`) a module has `boft_R` (layers × blocks × b × b) and `boft_s`, a length for each output. Of
each matrix M the skew-symmetric Q = (M - Mᵀ)/2 gives the rotation (I - Q)(I + Q)⁻¹. In each layer inputs are put in
another order, turned block by block, and put back: as in the butterflies of the fast Fourier transform, blocks of b are
so mixed with ever more others. The rows that come out are multiplied by s; a bias is not.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from lora_cli.adapters.adapter import Target
from lora_cli.adapters.formula import Formula, Given, MapMethod, Rows, Settings, Shape, Shapes
from lora_cli.adapters.tuners.oft import turning
from lora_cli.adapters.tuners.tuner import Changes, Module, Tuner, flag

if TYPE_CHECKING:
    from torch import Tensor


class Butterfly(MapMethod):
    """Rotations of blocks in one order after another, and a length for each output."""

    kind = "boft"
    parts = ("boft_R", "boft_s")
    exact = True

    def problem(self, shapes: Shapes, settings: Settings, shape: Shape) -> str | None:
        """See `Method.problem`."""
        turns, lengths = shapes.get("boft_R", ()), shapes.get("boft_s", ())
        if len(turns) != 4 or turns[2] != turns[3] or min(turns) < 1 or len(shape) < 2:
            return f"boft_R {list(turns)} holds no layers of blocks"
        layers, blocks, side, _ = turns
        if blocks * side != prod(shape[1:]):
            return f"{blocks} blocks of {side} for {prod(shape[1:])} inputs"
        if layers > 1 and (layers > 32 or blocks % (1 << layers - 1) or side % 2):
            return f"{layers} layers for {blocks} blocks of {side}"
        if prod(lengths) != shape[0] or max(lengths, default=0) != shape[0]:
            return f"boft_s {list(lengths)} for {shape[0]} outputs"
        return None

    def working_bytes(self, shapes: Shapes, settings: Settings, shape: Shape) -> int:
        """Some matrices for each block, and the orders."""
        return 80 * prod(shapes["boft_R"]) + 32 * shapes["boft_R"][0] * prod(shape[1:])

    def rows(self, given: Given) -> Rows:
        """See `MapMethod.rows`."""
        import torch

        from lora_cli.arithmetic.cayley import cayley

        matrices = given.tensors["boft_R"].to(torch.float64)
        layers, blocks, side, _ = matrices.shape
        halves = matrices * 0.5
        matrices = cayley((halves - halves.mT).reshape(-1, side, side)).mT.reshape(layers, blocks, side, side)
        turns = [turning(layer) for layer in matrices]
        lengths = given.tensors["boft_s"].to(torch.float64).reshape(-1, 1)
        orders = [_order(number, layers, blocks, side) for number in range(layers)]

        def rows(indices: Tensor, values: Tensor) -> Tensor:
            for order, turn in zip(orders, turns, strict=True):
                there = torch.empty_like(values)
                there[:, order] = values
                values = turn(there)[:, order]
            return values * lengths[indices]

        return rows


def _order(number: int, layers: int, blocks: int, side: int) -> Tensor:
    """Where a layer puts each input: of every pair of half blocks in a run, first all even ones and then all odd."""
    import torch

    inputs = torch.arange(blocks * side)
    if layers == 1:
        return inputs
    return inputs.reshape(blocks >> number, -1, 2, side // 2).transpose(1, 2).reshape(-1)


def _read(module: Module) -> Changes:
    yield Target(module.name, "weight", Formula(METHOD, module.tensors, module.unscaled()))


METHOD = Butterfly()

TUNER = Tuner(
    type="BOFT",
    name="BOFT",
    source="Liu et al. 2024, arXiv:2311.06243",
    modules="linear layers, convolutions",
    parts=METHOD.parts,
    read=_read,
    methods=(METHOD,),
    understood={"fan_in_fan_out": flag("layout of the base, which PEFT does not look at here")},
    neutral={
        "boft_block_size": "how large blocks are; the file shows it",
        "boft_block_num": "how many blocks; the file shows it",
        "boft_n_butterfly_factor": "how many layers, which PEFT without its CUDA code takes as one; the file shows it",
        "boft_dropout": "acts in training only",
        "init_weights": "how the rotations began",
    },
)
