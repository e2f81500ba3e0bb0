"""FourierFT: ΔW = scale · Re(inverse DFT of a sparse matrix), of which the numbers are trained (Gao et al. 2024).

In PEFT (`peft.tuners.fourierft`) a module has `fourierft_spectrum` (n). Their places are the first n of a permutation
of all, which `random_loc_seed` gives: place // in and place % in are row and column. The scale is `scaling`, and PEFT's
inverse DFT divides by out·in. So ΔW[i, j] = scale / (out·in) · Σₖ s[k]·cos(2π·(row[k]·i/out + column[k]·j/in)).

Rows are computed by the definition as far as outputs go, and by a fast transform over inputs; none depends on others
but its neighbour, and all has the same bits everywhere.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import TYPE_CHECKING

from lora_cli.adapters.adapter import Target
from lora_cli.adapters.formula import Formula, Given, Settings, Shape, Shapes, SumMethod, Values
from lora_cli.adapters.tuners.draws import drawn, is_seed
from lora_cli.adapters.tuners.parts import numbers
from lora_cli.adapters.tuners.tuner import Changes, Field, Module, Tuner, flag, number, pattern, whole_number

if TYPE_CHECKING:
    from torch import Tensor

_ROWS = 16
"""Rows that are computed at once."""
_KEPT = 1 << 19
"""Elements that are kept: two blocks, since tiles cut rows."""


class Spectrum(SumMethod):
    """The real part of an inverse discrete Fourier transform."""

    kind = "fourierft"
    parts = ("fourierft_spectrum",)

    def problem(self, shapes: Shapes, settings: Settings, shape: Shape) -> str | None:
        """See `Method.problem`."""
        return sparse_problem(shapes.get("fourierft_spectrum", ()), settings, shape)

    def working_bytes(self, shapes: Shapes, settings: Settings, shape: Shape) -> int:
        """The sines of some rows at once, what is kept of rows, and as much as some of them take in the transform."""
        count = math.prod(shapes["fourierft_spectrum"])
        return 16 * (_KEPT + 16 * _ROWS * count) + 8 * 8 * _ROWS * shape[1] + 100 * (count + sum(shape))

    def values(self, given: Given) -> Values:
        """See `SumMethod.values`."""
        return _Rows(given).tile


class _Rows:
    """Rows of the change; those of the last tiles are kept.

    Two rows are transformed as the real and the imaginary part of one: both are real, if their spectra are made so.
    """

    def __init__(self, given: Given) -> None:
        import torch

        from lora_cli.arithmetic.fourier import Inverse, circle

        out, width = given.matrix
        amounts = numbers(given, "fourierft_spectrum") * given.scale / (out * width) / 2
        places = drawn(given, len(amounts))
        row, column = places // width, places % width
        # Each with its mirror image, whose number is the conjugate one.
        self._turns = torch.cat([row, (out - row) % out])
        self._layers = _layers(torch.cat([column, (width - column) % width]), amounts.repeat(2))
        self._out, self._width = out, width
        self._circle, self._transform = circle(out), Inverse(width)
        self._kept: OrderedDict[int, Tensor] = OrderedDict()

    def tile(self, rows: Tensor, columns: slice) -> Tensor:
        """Return rows × columns."""
        import torch

        made = torch.empty((len(rows), columns.stop - columns.start), dtype=torch.float64)
        groups = rows // _ROWS
        for group in groups.unique().tolist():
            chosen = groups == group
            made[chosen] = self._group(group)[rows[chosen] - group * _ROWS, columns]
        return made

    def _group(self, group: int) -> Tensor:
        """The rows from a multiple of `_ROWS` on, maybe with some that are not there."""
        import torch

        if group in self._kept:
            self._kept.move_to_end(group)
            return self._kept[group]
        rows = torch.arange(group * _ROWS, (group + 1) * _ROWS)
        real = torch.zeros((_ROWS, self._width), dtype=torch.float64)
        imaginary = torch.zeros_like(real)
        for which, columns, amounts in self._layers:
            angle = self._turns[which] * rows.unsqueeze(1) % self._out
            real[:, columns] += self._circle[0][angle] * amounts
            imaginary[:, columns] += self._circle[1][angle] * amounts
        found = self._transform.of(real[::2] - imaginary[1::2], imaginary[::2] + real[1::2])
        self._kept[group] = torch.stack(found, dim=1).reshape(_ROWS, self._width)
        while len(self._kept) > max(2, _KEPT // (_ROWS * self._width)):
            self._kept.popitem(last=False)
        return self._kept[group]


def _layers(columns: Tensor, amounts: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Cut into layers with each column once, so that a column's numbers are always added in the same order.

    Returns:
        Of each layer: which of the numbers they are, their columns, and they.
    """
    import torch

    sorted_, order = torch.sort(columns, stable=True)
    begins = torch.searchsorted(sorted_, sorted_)
    depth = torch.arange(len(order)) - begins
    layers = [order[depth == level] for level in range(int(depth.max()) + 1)]
    return [(which, columns[which], amounts[which]) for which in layers]


def sparse_problem(found: Shape, settings: Settings, shape: Shape) -> str | None:
    """Say why no numbers at places that a seed gives are for a matrix of this shape; also another tuner's."""
    if len(shape) != 2:
        return f"numbers at places of a matrix are none for {list(shape)}"
    if len(found) != 1 or not 0 < found[0] <= shape[0] * shape[1]:
        return f"{list(found)} are no numbers at different places of {list(shape)}"
    return None if is_seed(settings.get("seed")) else "the seed of their places is no seed"


def _read(module: Module) -> Changes:
    scale = module.scale(float(module.said("scaling", 150.0)), None, False, "scaling")
    settings = {"seed": module.said("random_loc_seed", 777)}
    yield Target(module.name, "weight", Formula(METHOD, module.tensors, scale, settings))


SEED = Field("the places of the numbers", "a whole number of at most 64 bits", is_seed)

METHOD = Spectrum()

TUNER = Tuner(
    type="FOURIERFT",
    name="FourierFT",
    source="Gao et al. 2024, arXiv:2405.03003",
    modules="linear layers and GPT-2's Conv1D",
    parts=METHOD.parts,
    read=_read,
    methods=(METHOD,),
    understood={
        "scaling": number("what multiplies the change"),
        "random_loc_seed": SEED,
        "n_frequency": whole_number("how many numbers there are; the file shows it"),
        "n_frequency_pattern": pattern("the same of single modules", whole_number("")),
        "fan_in_fan_out": flag("layout of the base; shapes and architecture decide, this settles squares"),
    },
    neutral={"init_weights": "how the numbers began"},
)
