"""What tuners make of a matrix, against PEFT's own merge in float64: those that turn, stretch, or look at the base."""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch import Tensor, nn

from lora_cli.adapters.adapter import Parameter, Target
from lora_cli.adapters.formats import open_adapter
from lora_cli.adapters.formula import Formula, Given
from lora_cli.adapters.source import ReadOptions
from lora_cli.arithmetic.product import Term
from lora_cli.errors import LoraCliError, NumericError, ShapeError, UnsupportedError
from lora_cli.surgery.readers import open_readers

Model = Any


def linear() -> nn.Module:
    return nn.Linear(16, 12)


def point() -> nn.Module:
    return nn.Conv2d(16, 12, 1)


def kernel() -> nn.Module:
    return nn.Conv2d(4, 12, 3)


def groups() -> nn.Module:
    return nn.Conv2d(8, 12, 3, groups=2)


def table() -> nn.Module:
    return nn.Embedding(12, 16)


def conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    made: nn.Module = Conv1D(12, 16)
    return made


@dataclass(frozen=True)
class Case:
    """A tuner with some of its options, on one module."""

    type: str
    made: Callable[[], nn.Module]
    options: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        words = [f"{name}={value}" for name, value in self.options]
        return "-".join([self.type, self.made.__name__, *words])


def case(type_: str, made: Callable[[], nn.Module] = linear, **options: Any) -> Case:
    return Case(type_, made, tuple(options.items()))


BIG: Final[dict[str, Any]] = {"r": 2, "oft_block_size": 0}
CASES: Final = (
    case("OFT", r=4, oft_block_size=0),
    case("OFT", r=1, oft_block_size=0, use_cayley_neumann=False),
    case("OFT", r=0, oft_block_size=8, num_cayley_neumann_terms=2),
    case("OFT", r=0, oft_block_size=1),
    case("OFT", **BIG, block_share=True, use_cayley_neumann=False),
    case("OFT", **BIG, coft=True, eps=0.05, use_cayley_neumann=False),
    case("OFT", **BIG, coft=True, eps=1e9),
    case("OFT", point, **BIG),
    case("OFT", table, r=4, oft_block_size=0, use_cayley_neumann=False),
    case("BOFT", boft_block_size=4),
    case("BOFT", boft_block_size=2, boft_n_butterfly_factor=3),
    case("BOFT", boft_block_size=0, boft_block_num=4, boft_n_butterfly_factor=2),
    case("BOFT", kernel, boft_block_size=9),
    case("BOFT", kernel, boft_block_size=6, boft_n_butterfly_factor=2),
    case("HRA", r=4),
    case("HRA", r=3),
    case("HRA", r=4, apply_GS=True),
    case("HRA", kernel, r=5),
    case("ROAD", variant="road_1", group_size=4),
    case("ROAD", variant="road_2", group_size=12),
    case("ROAD", variant="road_4", group_size=2),
    case("HIRA", r=3),
    case("HIRA", conv1d, r=3),
    case("HIRA", kernel, r=3),
    case("HIRA", table, r=3),
    case("GLORA", r=3),
    case("GLORA", r=3, config_A_B="vector", config_C="vector", config_D_E="vector"),
    case("GLORA", r=3, config_A_B="constant", config_C="none", config_D_E="constant"),
    case("GLORA", r=3, config_A_B="none", config_C="none", config_D_E="constant"),
    case("DELORA", r=3, delora_lambda=7),
    case("DEFT", r=3),
    case("DEFT", r=3, alpha=5, decomposition_method="qr"),
    case("DEFT", r=3, para=True, decomposition_method="qr"),
    case("DEFT", conv1d, r=3, alpha=5),
    case("OSF", effective_rank=7),
    case("OSF", effective_rank=12),
    case("IA3", feedforward_modules=[]),
    case("IA3", feedforward_modules=["layer"]),
    case("IA3", kernel, feedforward_modules=[]),
    case("IA3", kernel, feedforward_modules=["layer"]),
    case("IA3", groups, feedforward_modules=["layer"]),
    case("IA3", conv1d, feedforward_modules="lay.*"),
)
IDLE: Final = ("oft_block_size=1", "effective_rank=12", "config_A_B=none")
"""What changes no weight."""


@contextmanager
def in_float64() -> Iterator[None]:
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(usual)


@dataclass(frozen=True)
class Made:
    """A trained module: what it was, what PEFT's merge makes of it, and the file."""

    before: dict[str, Tensor]
    after: dict[str, Tensor]
    targets: dict[str, Target]

    def formula(self, name: str) -> Formula:
        """The change of one parameter, settled on it."""
        delta = self.targets[name].delta
        assert isinstance(delta, Formula)
        return settled(delta, self.before[name], transposed=self.lies(name))

    def lies(self, name: str) -> bool:
        return name == "weight" and self.before["weight"].shape == (16, 12)

    def given(self, name: str) -> Given:
        with open_readers() as readers:
            return self.formula(name).given(readers.load, 1.0, lambda: straight(self, "weight"))


def settled(delta: Formula, parameter: Tensor, *, transposed: bool = False) -> Formula:
    shape = tuple(parameter.shape)[::-1] if transposed else tuple(parameter.shape)
    return delta.on(Parameter(shape, transposed, False, {}))


def straight(made: Made, name: str) -> Tensor:
    """A parameter of before, as a matrix (out × in)."""
    value = made.before[name].T if made.lies(name) else made.before[name]
    return value.reshape(len(value), -1)


@pytest.fixture(scope="session")
def making(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Made]:
    folder = tmp_path_factory.mktemp("tuned")
    found: dict[str, Made] = {}

    def made(one: Case) -> Made:
        if str(one) not in found:
            found[str(one)] = make(one, folder / str(len(found)))
        return found[str(one)]

    return made


class Butterflies:
    """What PEFT compiles for BOFT where there is a GPU: blocks on diagonals, for every layer."""

    @staticmethod
    def forward(blocks: Tensor) -> list[Tensor]:
        return [torch.stack([torch.block_diag(*layer) for layer in blocks])]


def make(one: Case, folder: Path) -> Made:
    """Wrap a layer, give the adapter some numbers, save it and let PEFT merge it."""
    from peft import get_peft_model
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    torch.manual_seed(3)
    with in_float64(), pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of options that it mends
        patch.setattr("peft.tuners.boft.layer._FBD_CUDA", Butterflies)
        layer = one.made()
        for name, parameter in layer.named_parameters():
            nn.init.normal_(parameter, std=1.0 if name == "bias" else 0.4)
        before = {name: value.detach().clone() for name, value in layer.named_parameters()}
        config = PEFT_TYPE_TO_CONFIG_MAPPING[one.type](target_modules=["layer"], **dict(one.options))
        model: Model = get_peft_model(nn.Sequential(OrderedDict(layer=layer)), config)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                shift = torch.randn(parameter.shape) * (0.2 if "oft_R" in name else 0.5)
                parameter.data = (parameter.data + shift).float().double()
        model.save_pretrained(folder)
        merged = dict(model.merge_and_unload().layer.named_parameters())
    after = {name: value.detach() for name, value in merged.items()}
    adapter = open_adapter(folder, ReadOptions())
    assert {target.module for target in adapter.targets} == {"layer"}
    return Made(before, after, {target.parameter: target for target in adapter.targets})


# What comes out


def new(made: Made, name: str, rows: list[slice], columns: list[slice]) -> Tensor:
    """A parameter as it becomes, as a matrix (out × in), computed in pieces."""
    formula, given, old = made.formula(name), made.given(name), straight(made, name)
    method: Any = formula.method
    if formula.acts == "product":
        term: Term = method.term(given)
        return old + term.scale * (term.b @ term.a)
    everything = torch.arange(len(old))
    if formula.acts == "map":
        change = method.rows(given)
        return torch.cat([change(everything[part], old[part]) for part in rows])
    values = method.values(given)
    tiles = [torch.cat([values(everything[part], across) for across in columns], 1) for part in rows]
    found = torch.cat(tiles)
    return old * found if formula.acts == "gain" else old + found


def whole(made: Made, name: str) -> Tensor:
    out, inner = straight(made, name).shape
    return new(made, name, [slice(0, out)], [slice(0, inner)])


@pytest.mark.parametrize("one", CASES, ids=str)
def test_a_merge_is_that_of_peft(one: Case, making: Callable[[Case], Made]) -> None:
    made = making(one)
    idle = any(words in str(one) for words in IDLE)
    assert torch.equal(made.after["weight"], made.before["weight"]) == idle
    for name, after in made.after.items():
        if name not in made.targets:
            assert torch.equal(after, made.before[name]), name
            continue
        found = whole(made, name)
        expected = (after.T if made.lies(name) else after).reshape(found.shape)
        # PEFT takes OSF's and DEFT's decompositions and products of the base in float32.
        share = 1e-5 if one.type in ("OSF", "DEFT") else 1e-10
        assert float((found - expected).abs().max()) <= share * float(expected.abs().max()), name


@pytest.mark.parametrize("one", CASES, ids=str)
def test_no_bit_depends_on_how_it_is_cut(one: Case, making: Callable[[Case], Made]) -> None:
    made = making(one)
    for name in made.targets:
        expected, formula = whole(made, name), made.formula(name)
        group = formula.group if formula.acts == "map" else 1
        out, inner = expected.shape
        for step, width in ((group, 1), (3 * group, 5), (out, 2)):
            rows = [slice(begin, min(begin + step, out)) for begin in range(0, out, step)]
            columns = [slice(begin, min(begin + width, inner)) for begin in range(0, inner, width)]
            assert torch.equal(new(made, name, rows, columns), expected), (name, step, width)


@pytest.mark.parametrize("one", CASES, ids=str)
def test_what_is_not_exact_is_not_computed_again(one: Case, making: Callable[[Case], Made]) -> None:
    """A change that is computed from all of the base must not be taken for one that the merged weight gives."""
    for target in making(one).targets.values():
        assert isinstance(target.delta, Formula)
        assert target.reads <= target.delta.method.reads
        if target.reads:
            assert not target.delta.preimages


# What is damaged


def spoilt(shapes: dict[str, tuple[int, ...]]) -> Iterator[dict[str, tuple[int, ...]]]:
    """The shapes of a file in which one tensor is missing, or of another shape."""
    for name, shape in shapes.items():
        rest = {other: found for other, found in shapes.items() if other != name}
        yield rest
        others = [(*shape, 1), (*shape, 2), (1, *shape), shape[1:], shape[:-1], (), (0,), tuple(0 for _ in shape)]
        for at, size in enumerate(shape):
            others += [(*shape[:at], other, *shape[at + 1 :]) for other in (0, size - 1, size + 1, 2 * size)]
        yield from (rest | {name: other} for other in others if other != shape and min(other, default=0) >= 0)


ODD: Final = (None, True, False, -1, 0, 1, 3, 10**9, 1e300, math.nan, math.inf, -0.5, "", "qr", "road_2", (1, 2))


@pytest.mark.parametrize("one", CASES, ids=str)
def test_damage_is_told_in_words_or_does_no_harm(one: Case, making: Callable[[Case], Made]) -> None:
    made = making(one)
    for name in made.targets:
        formula, told = made.formula(name), 0
        given = made.given(name)
        shapes = {part: tuple(tensor.shape) for part, tensor in given.tensors.items()}
        for wrong in spoilt(shapes):
            tensors = {part: torch.ones(shape, dtype=torch.float64) for part, shape in wrong.items()}
            told += not computes(formula, Given(tensors, given.settings, 1.0, given.shape, given.before))
        assert told
        for setting in [*given.settings, "inputs", "least", "terms", "group", "orthogonal", "by", "para"]:
            for odd in ODD:
                settings: Any = {**given.settings, setting: odd}
                computes(formula, Given(given.tensors, settings, 1.0, given.shape, given.before))
        for shape in ((), (0,), (12,), (16, 12), (12, 16, 1), (12, 17), (11, 16), (12, 4, 3, 3), (12, 8, 1, 1)):
            computes(formula, Given(given.tensors, given.settings, 1.0, shape, given.before))


def computes(formula: Formula, given: Given) -> bool:
    """Whether a change is computed; else it was refused in words. Whatever else happens fails."""
    method: Any = formula.method
    shapes = {part: tuple(tensor.shape) for part, tensor in given.tensors.items()}
    if method.problem(shapes, given.settings, given.shape) or method.unsupported(shapes, given.settings, given.shape):
        return False
    assert method.rank(shapes, given.settings) >= 0
    assert method.working_bytes(shapes, given.settings, given.shape) >= 0
    out, inner = given.matrix
    old = torch.ones(out, inner, dtype=torch.float64)
    try:
        if formula.acts == "product":
            term = method.term(given)
            found = term.b @ term.a
        elif formula.acts == "map":
            assert out % method.group(shapes, given.settings, given.shape) == 0
            found = method.rows(given)(torch.arange(out), old)
        else:
            found = method.values(given)(torch.arange(out), slice(0, inner))
    except LoraCliError:
        return False
    assert found.shape == old.shape
    return True


# Refusals of their own


def test_a_kernel_of_several_points_is_no_weight_of_oft(making: Callable[[Case], Made]) -> None:
    delta = making(case("OFT", r=1, oft_block_size=0, use_cayley_neumann=False)).targets["weight"].delta
    assert isinstance(delta, Formula)
    settled(delta, torch.zeros(12, 16, 1, 1))
    with pytest.raises(UnsupportedError, match="kernel"):
        settled(delta, torch.zeros(12, 4, 2, 2))


def test_rows_that_lie_apart_cannot_be_turned_together(making: Callable[[Case], Made]) -> None:
    made = making(case("ROAD", variant="road_1", group_size=4))
    turn = made.formula("weight").method.rows(made.given("weight"))  # type: ignore[attr-defined]
    old = straight(made, "weight")
    for order in ([0, 1, 2], [0, 2, 1, 3], [2, 3, 4, 5], [0, 1, 2, 3, 5, 4, 6, 7]):
        with pytest.raises(UnsupportedError, match="together"):
            turn(torch.tensor(order), old[order])
    swapped = [4, 5, 6, 7, 0, 1, 2, 3]
    assert torch.equal(turn(torch.tensor(swapped), old[swapped]), turn(torch.arange(8), old[:8])[swapped])


@pytest.mark.parametrize("orthogonal", [False, True])
def test_a_reflection_without_a_direction_is_refused(orthogonal: bool, making: Callable[[Case], Made]) -> None:
    made = making(case("HRA", r=4))
    normals = made.given("weight").tensors["hra_u"].clone()
    normals[:, 2] = normals[:, 1] * 3 if orthogonal else 0.0
    given = Given({"hra_u": normals}, {"orthogonal": orthogonal}, 1.0, (12, 16))
    with pytest.raises(NumericError, match="direction"):
        made.formula("weight").method.rows(given)  # type: ignore[attr-defined]


def test_a_bias_needs_the_weight_that_it_is_computed_from(making: Callable[[Case], Made]) -> None:
    made = making(case("GLORA", r=3))
    given = made.given("bias")
    wrong = Given(given.tensors, given.settings, 1.0, given.shape, lambda: torch.ones(12, 15))
    with pytest.raises(ShapeError, match="weight"):
        made.formula("bias").method.rows(wrong)  # type: ignore[attr-defined]


def test_no_norm_is_less_than_peft_takes(making: Callable[[Case], Made]) -> None:
    from peft.tuners.delora.layer import DeloraLayer

    given = making(case("DELORA", r=3, delora_lambda=7)).given("weight")
    sizes = torch.tensor([1e-6, 0.0, 1.0], dtype=torch.float64)
    a, b, far, norms = (given.tensors[f"delora_{name}"] for name in ("A", "B", "lambda", "w_norm"))
    tensors = dict(zip(given.tensors, (a * sizes.view(3, 1), b * sizes.flip(0), far, norms), strict=True))
    method: Any = making(case("DELORA", r=3, delora_lambda=7)).formula("weight").method
    term = method.term(Given(tensors, {}, 1.0, (12, 16)))
    expected = DeloraLayer._compute_delta(a * sizes.view(3, 1), b * sizes.flip(0), far, 3, norms)
    assert torch.allclose(term.b @ term.a, expected, rtol=1e-12)
    assert float(expected.abs().max()) > 0
