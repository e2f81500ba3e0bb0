"""WaveFT: ΔW = scale · inverse wavelet transform of a sparse matrix of trained numbers (Bilican et al. 2025).

In PEFT (`peft.tuners.waveft`) a module has `waveft_spectrum` (n). Their places are drawn as FourierFT's are. With
`use_idwt = false` the sparse matrix itself, times `scaling`, is added. Else it is laid into the middle of a matrix of
even sides, larger by the filter's length less two, whose quarters are the halves of a transform of one level. The upper
left one is coarse down and across, the upper right one fine down, the lower left one fine across, the last one both;
so PEFT has it, where others have the two between the other way round. Element i of a signal is
Σₙ filter[(i mod 2) + length - 2 - 2n]·half[i div 2 + n], summed over both halves.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lora_cli.adapters.adapter import Target
from lora_cli.adapters.formula import Formula, Given, Settings, Shape, Shapes, SumMethod, Values
from lora_cli.adapters.tuners.draws import drawn
from lora_cli.adapters.tuners.fourierft import SEED, sparse_problem
from lora_cli.adapters.tuners.parts import numbers
from lora_cli.adapters.tuners.sparse import Scattered
from lora_cli.adapters.tuners.tuner import Changes, Module, Tuner, flag, number, pattern, whole_number, word
from lora_cli.adapters.tuners.wavelets import fine, wavelets

if TYPE_CHECKING:
    from torch import Tensor

_SPARSE = "none"
"""The wavelet of an adapter that uses none."""


class Wavelet(SumMethod):
    """What a wavelet makes of numbers at places that a seed gives; or these alone."""

    kind = "waveft"
    parts = ("waveft_spectrum",)

    def problem(self, shapes: Shapes, settings: Settings, shape: Shape) -> str | None:
        """See `Method.problem`."""
        name = settings.get("wavelet")
        if name != _SPARSE and name not in wavelets():
            return f"{name} is no wavelet that is known here"
        return sparse_problem(shapes.get("waveft_spectrum", ()), settings, shape)

    def working_bytes(self, shapes: Shapes, settings: Settings, shape: Shape) -> int:
        """The numbers with their places, and the halves that a tile is made from."""
        longest = 1 << 7
        return 100 * math.prod(shapes["waveft_spectrum"]) + 8 * 8 * (
            longest * longest + (1 << 16) + (1 << 12) * longest
        )

    def values(self, given: Given) -> Values:
        """See `SumMethod.values`."""
        amounts = numbers(given, "waveft_spectrum") * given.scale
        places = drawn(given, len(amounts))
        if given.settings["wavelet"] == _SPARSE:
            return Scattered(places, amounts, given.matrix[1]).tile
        return _Synthesis(str(given.settings["wavelet"]), places, amounts, given.matrix).tile


class _Synthesis:
    """The inverse transform of one level, of the tiles that are asked for."""

    def __init__(self, wavelet: str, places: Tensor, amounts: Tensor, shape: tuple[int, int]) -> None:
        coarse = wavelets()[wavelet]
        self._filters = (coarse, fine(coarse))
        more = len(coarse) - 2
        sides = [size + more + (size + more) % 2 for size in shape]
        row, column = (
            at + (side - size) // 2
            for at, side, size in zip((places // shape[1], places % shape[1]), sides, shape, strict=True)
        )
        half, width = sides[0] // 2, sides[1] // 2
        # Which filters rows and columns take: the upper right quarter is fine down, the lower left one across.
        self._quarters = {
            (down, across): self._quarter(
                (row >= half) == bool(across),
                (column >= width) == bool(down),
                row % half,
                column % width,
                amounts,
                width,
            )
            for down in range(2)
            for across in range(2)
        }

    @staticmethod
    def _quarter(lower: Tensor, right: Tensor, row: Tensor, column: Tensor, amounts: Tensor, width: int) -> Scattered:
        chosen = lower & right
        return Scattered(row[chosen] * width + column[chosen], amounts[chosen], width)

    def tile(self, rows: Tensor, columns: slice) -> Tensor:
        """Return rows × columns."""
        import torch

        taps = len(self._filters[0]) // 2
        first = columns.start // 2
        across = slice(first, (columns.stop - 1) // 2 + taps)
        number = torch.arange(columns.start, columns.stop)
        needed = (rows.unsqueeze(1) // 2 + torch.arange(taps)).unique()
        halves = []
        for down in range(2):
            quarters = [self._quarters[down, side].tile(needed, across).T for side in range(2)]
            halves.append(self._joined(quarters, number, number // 2 - first).T)
        return self._joined(halves, rows, torch.searchsorted(needed, rows // 2))

    def _joined(self, halves: list[Tensor], places: Tensor, at: Tensor) -> Tensor:
        """Put the rows of a coarse and a fine half together; always in the same order.

        Args:
            halves: The rows that are needed of both.
            places: The rows that are made, numbered as in the whole signal.
            at: The first row of the halves that each is made from.
        """
        import torch

        taps = len(self._filters[0]) // 2
        total = torch.zeros((len(places), halves[0].shape[1]), dtype=torch.float64)
        for tap in range(taps):
            for half, values in zip(halves, self._filters, strict=True):
                filter_ = torch.tensor(values, dtype=torch.float64)
                total += half[at + tap] * filter_[places % 2 + 2 * (taps - 1 - tap)].unsqueeze(1)
        return total


def _read(module: Module) -> Changes:
    scale = module.scale(float(module.said("scaling", 25.0)), None, False, "scaling")
    wavelet = module.said("wavelet_family", "db1") if module.said("use_idwt", True) else _SPARSE
    settings = {"seed": module.said("random_loc_seed", 777), "wavelet": wavelet}
    yield Target(module.name, "weight", Formula(METHOD, module.tensors, scale, settings))


METHOD = Wavelet()

TUNER = Tuner(
    type="WAVEFT",
    name="WaveFT",
    source="Bilican et al. 2025, arXiv:2505.12532",
    modules="linear layers and GPT-2's Conv1D",
    parts=METHOD.parts,
    read=_read,
    methods=(METHOD,),
    understood={
        "scaling": number("what multiplies the change"),
        "random_loc_seed": SEED,
        "wavelet_family": word("the filters", *wavelets()),
        "use_idwt": flag("whether there is a transform"),
        "n_frequency": whole_number("how many numbers there are; the file shows it"),
        "n_frequency_pattern": pattern("the same of single modules", whole_number("")),
        "fan_in_fan_out": flag("layout of the base; shapes and architecture decide, this settles squares"),
    },
    neutral={
        "init_weights": "how the numbers began",
        "proportional_parameters": "chose how many numbers there are",
    },
)
