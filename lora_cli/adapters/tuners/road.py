"""RoAd: outputs of a module turned in pairs, and stretched (Liao and Monz 2024).

In PEFT (`peft.tuners.road`) a module has `road_theta` and `road_alpha`. Outputs are in groups, and the first half of
each is paired with its second half: y = a·cos(t)·x - b·sin(t)·x' for an output x of the first half whose partner is x',
and + for one of the second. `road_1` has one t and one a = b for each pair, `road_2` for each output, `road_4` has two
of both for each output. The bias turns with the weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_cli.adapters.adapter import Target
from lora_cli.adapters.formula import Formula, Given, MapMethod, Rows, Settings, Shape, Shapes
from lora_cli.adapters.tuners.tuner import Changes, Module, Tuner, whole_number, word
from lora_cli.errors import UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

_PER_PAIR = {"road_1": 1, "road_2": 2, "road_4": 4}


class Pairs(MapMethod):
    """Pairs of outputs, each turned and stretched."""

    kind = "road"
    parts = ("road_theta", "road_alpha")
    exact = True

    def problem(self, shapes: Shapes, settings: Settings, shape: Shape) -> str | None:
        """See `Method.problem`."""
        group, variant = settings.get("group"), settings.get("variant")
        if not isinstance(group, int) or group < 2 or group % 2 or not shape or shape[0] % group:
            return f"groups of {group} of {shape[0] if shape else 0} outputs"
        if len(shape) > 2:
            return "RoAd is for linear layers"
        wanted = _PER_PAIR.get(str(variant), 0) * shape[0] // 2
        found = [shapes.get(name, ()) for name in self.parts]
        if not wanted or any(of != (wanted,) for of in found):
            return f"{list(found[0])} angles and {list(found[1])} lengths of {variant} for {shape[0]} outputs"
        return None

    def group(self, shapes: Shapes, settings: Settings, shape: Shape) -> int:
        """See `MapMethod.group`."""
        group = settings["group"]
        assert isinstance(group, int)  # noqa: S101 (`problem` has looked)
        return group

    def rows(self, given: Given) -> Rows:
        """See `MapMethod.rows`."""
        import torch

        group = self.group({}, given.settings, given.shape)
        first, second = _factors(given, group)

        def rows(indices: Tensor, values: Tensor) -> Tensor:
            _check(indices, group)
            halves = values.reshape(-1, 2, group // 2, values.shape[1])
            partners = torch.stack([-halves[:, 1], halves[:, 0]], 1).reshape(values.shape)
            return values * first[indices].unsqueeze(1) + partners * second[indices].unsqueeze(1)

        return rows


def _check(indices: Tensor, group: int) -> None:
    """Refuse groups of which a base has some outputs elsewhere."""
    whole = len(indices) % group == 0
    groups = indices.reshape(-1, group) if whole else indices
    if not whole or bool((groups[:, 0] % group).any()) or bool((groups.diff(dim=1) != 1).any()):
        raise UnsupportedError("RoAd turns outputs together that the base does not store together")


def _factors(given: Given, group: int) -> tuple[Tensor, Tensor]:
    """What each output, and what its partner, is multiplied by."""
    import torch

    from lora_cli.arithmetic.sines import cosine_and_sine

    angles, lengths = given.tensors["road_theta"], given.tensors["road_alpha"].to(torch.float64)
    cosines, sines = cosine_and_sine(angles)
    if given.settings["variant"] == "road_1":
        both = [(lengths * of).reshape(-1, group // 2).repeat_interleave(2, dim=0) for of in (cosines, sines)]
    elif given.settings["variant"] == "road_2":
        both = [lengths * cosines, lengths * sines]
    else:
        both = [(lengths * of).reshape(-1, 2, group)[:, n] for n, of in enumerate((cosines, sines))]
    return both[0].reshape(-1), both[1].reshape(-1)


def _read(module: Module) -> Changes:
    settings = {"group": module.said("group_size", 64), "variant": module.said("variant", "road_1")}
    formula = Formula(METHOD, module.tensors, module.unscaled(), settings)
    yield Target(module.name, "weight", formula)
    yield Target(module.name, "bias", formula, may_lack=True)


METHOD = Pairs()

TUNER = Tuner(
    type="ROAD",
    name="RoAd",
    source="Liao and Monz 2024, arXiv:2409.00119",
    modules="linear layers with their biases",
    parts=METHOD.parts,
    read=_read,
    methods=(METHOD,),
    understood={
        "variant": word("how many angles and lengths there are", *_PER_PAIR),
        "group_size": whole_number("which outputs are pairs"),
    },
    neutral={"init_weights": "how angles and lengths began"},
)
