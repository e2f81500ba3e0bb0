"""Numbers at drawn places, what transforms make of them, and what is computed from the base: against PEFT."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from peft import FourierFTConfig, FrodConfig, PeanutConfig, SupertuningConfig, WaveFTConfig, get_peft_model
from torch import Tensor, nn

from lora_cli.adapters.formula import Given, Method, SumMethod
from lora_cli.adapters.tuners import draws, fourierft, frod, peanut, supertuning, waveft
from lora_cli.adapters.tuners.sparse import Scattered
from lora_cli.adapters.tuners.wavelets import wavelets
from lora_cli.errors import NumericError

SHAPES = [(7, 10), (24, 33), (16, 12), (1, 6), (40, 3)]


class One(nn.Module):
    """A model of one layer."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.layer = nn.Linear(shape[1], shape[0], bias=False, dtype=torch.float64)


def adapted(config: Any, shape: tuple[int, int], seed: int = 1) -> Any:
    """PEFT's layer with the adapter, all of it trained a little, in float64."""
    torch.manual_seed(seed)
    model = get_peft_model(One(shape), config, autocast_adapter_dtype=False).double()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) * 0.3
    return model.base_model.model.layer


def made(
    method: SumMethod,
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    scale: float,
    shape: tuple[int, int],
    before: Tensor | None = None,
) -> Tensor:
    """The whole change; it must be the same however it is cut, and in whatever order its rows are asked for."""
    assert method.problem({name: tuple(t.shape) for name, t in tensors.items()}, settings, shape) is None
    given = Given(tensors, settings, scale, shape, None if before is None else lambda: before)
    values = method.values(given)
    whole = values(torch.arange(shape[0]), slice(0, shape[1]))
    rows = torch.randperm(shape[0])
    cut = [slice(at, min(at + 5, shape[1])) for at in range(0, shape[1], 5)]
    fresh = method.values(given)
    parts = torch.cat([torch.cat([fresh(row.reshape(1), columns) for columns in cut], 1) for row in rows])
    assert torch.equal(parts, whole[rows])
    assert torch.equal(method.values(given)(rows, slice(0, shape[1])), whole[rows])
    return whole


# Places


@pytest.mark.parametrize("seed", [0, 777, -1, -5, 2**32 + 3, 2**63 - 1, -(2**63), 2**64 - 1])
@pytest.mark.parametrize(("of", "count"), [(1, 1), (10, 10), (1000, 50), (123456, 777)])
def test_places_are_those_of_torch(seed: int, of: int, count: int) -> None:
    expected = torch.randperm(of, generator=torch.Generator().manual_seed(seed))[:count]
    assert draws.permuted(seed, of, count).tolist() == expected.tolist()


def test_places_of_huge_matrices_are_shuffled_from_the_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch does from 2^32 / 20 places on (`randperm_cpu` in TensorFactories.cpp), by its own steps."""
    of, count = 1000, 37
    state, shuffled = np.random.RandomState(9), list(range(of))
    for at in range(of):
        high, low = (int(state.randint(0, 1 << 32, dtype=np.uint32)) for _ in range(2))
        other = (high << 32 | low) % (at + 1)
        shuffled[at] = shuffled[other]
        shuffled[other] = at
    monkeypatch.setattr(draws, "_FEW", 0)
    for step in (7, 1000, 1 << 20):
        monkeypatch.setattr(draws, "_AT_ONCE", step)
        assert draws.permuted(9, of, count).tolist() == shuffled[:count]


def test_what_is_there_twice_is_refused() -> None:
    with pytest.raises(NumericError, match="twice"):
        Scattered(torch.tensor([3, 5, 3]), torch.ones(3, dtype=torch.float64), 4)


# Sums


@pytest.mark.parametrize(
    ("method", "settings", "digest"),
    [
        (fourierft.METHOD, {"seed": 7}, "0d5bd051a2384ac0"),
        (waveft.METHOD, {"seed": 7, "wavelet": "sym5"}, "b5a0967409eaa170"),
    ],
    ids=["fourier", "wavelet"],
)
def test_bits_are_those_of_every_machine(method: SumMethod, settings: dict[str, Any], digest: str) -> None:
    numbers = torch.arange(1, 41, dtype=torch.float32).reciprocal()
    found = made(method, {method.parts[0]: numbers}, settings, 1 / 3, (36, 70))
    assert hashlib.sha256(found.numpy().tobytes()).hexdigest()[:16] == digest


@pytest.mark.parametrize("shape", SHAPES)
def test_fourier(shape: tuple[int, int]) -> None:
    count = min(50, shape[0] * shape[1])
    config = FourierFTConfig(target_modules=["layer"], n_frequency=count, scaling=30.0, random_loc_seed=5)
    layer = adapted(config, shape)
    spectrum = layer.fourierft_spectrum["default"].data
    found = made(fourierft.METHOD, {"fourierft_spectrum": spectrum}, {"seed": 5}, 30.0, shape)
    dense = torch.zeros(shape, dtype=torch.float64)
    dense[tuple(layer.indices["default"])] = spectrum
    assert (found - torch.fft.ifft2(dense).real * 30.0).abs().max() <= 1e-14
    assert (found - layer.get_delta_weight("default")).abs().max() <= 1e-6 * found.abs().max()


@pytest.mark.parametrize("name", wavelets())
@pytest.mark.parametrize("shape", SHAPES)
def test_wavelets(name: str, shape: tuple[int, int]) -> None:
    count = min(30, shape[0] * shape[1])
    config = WaveFTConfig(target_modules=["layer"], n_frequency=count, scaling=2.5, wavelet_family=name)
    layer = adapted(config, shape)
    tensors = {"waveft_spectrum": layer.waveft_spectrum["default"].data}
    found = made(waveft.METHOD, tensors, {"seed": 777, "wavelet": name}, 2.5, shape)
    assert (found - layer.get_delta_weight("default")).abs().max() <= 1e-14


def test_no_wavelet() -> None:
    layer = adapted(WaveFTConfig(target_modules=["layer"], n_frequency=9, scaling=2.5, use_idwt=False), (7, 10))
    tensors = {"waveft_spectrum": layer.waveft_spectrum["default"].data}
    found = made(waveft.METHOD, tensors, {"seed": 777, "wavelet": "none"}, 2.5, (7, 10))
    assert torch.equal(found, layer.get_delta_weight("default"))


def sparse_of(layer: Any, *, places: bool = True) -> dict[str, Tensor]:
    found = {"supertuning_values": layer.supertuning_values["default"].data}
    if places:
        found["supertuning_indices"] = layer.supertuning_indices["default"]
    if "default" in layer.supertuning_lora_A:
        found["supertuning_lora_A"] = layer.supertuning_lora_A["default"].weight.data
        found["supertuning_lora_B"] = layer.supertuning_lora_B["default"].weight.data
    return found


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("largest", [True, False])
def test_single_weights(rank: int | None, largest: bool) -> None:
    config = SupertuningConfig(target_modules=["layer"], sparsity=0.7, r=rank, select_top=largest)
    layer = adapted(config, (7, 10))
    settings = {} if rank is None else {"alpha": config.lora_alpha}
    stored = made(supertuning.METHOD, sparse_of(layer), settings, 1.0, (7, 10))
    assert (stored - layer.get_delta_weight("default")).abs().max() <= 1e-14
    before, settings = layer.get_base_layer().weight.data, settings | {"largest": largest}
    assert torch.equal(
        made(supertuning.OUTERMOST, sparse_of(layer, places=False), settings, 1.0, (7, 10), before), stored
    )


def test_weights_of_one_size_do_not_say_which_were_trained() -> None:
    before = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    before[0, 0] = -9.0
    tensors = {"supertuning_values": torch.ones(2)}
    assert int(made(supertuning.OUTERMOST, tensors, {"largest": True}, 1.0, (3, 4), before).sum()) == 2
    tensors = {"supertuning_values": torch.ones(3)}  # the third is 9 or -9
    given = Given(tensors, {"largest": True}, 1.0, (3, 4), lambda: before)
    with pytest.raises(NumericError, match="same size"):
        supertuning.OUTERMOST.values(given)


@pytest.mark.parametrize(("depth", "act"), [(0, "relu"), (2, "gelu"), (1, "silu"), (1, "tanh"), (3, "leaky_relu")])
def test_a_network_that_sees_the_base(depth: int, act: str) -> None:
    config = PeanutConfig(target_modules=["layer"], r=3, depth=depth, act_fn=act, scaling=0.7)
    layer = adapted(config, (7, 10))
    tensors = {"peanut_A": layer.peanut_A["default"].weight.data, "peanut_B": layer.peanut_B["default"].weight.data}
    for side in ("peanut_encoders", "peanut_decoders"):
        tensors |= {f"{side}.{at}": one.weight.data for at, one in enumerate(getattr(layer, side)["default"])}
    found = made(peanut.METHOD, tensors, {"act": act}, 0.7, (7, 10), layer.get_base_layer().weight.data)
    assert (found - layer.get_delta_weight("default")).abs().max() <= 1e-10


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("shape", [(7, 10), (10, 7)])
def test_a_decomposition_in_place_of_the_base(shape: tuple[int, int]) -> None:
    layer = adapted(FrodConfig(target_modules=["layer"], sparse_rate=0.2, progressbar=False), shape)
    places = layer.frod_s_indices["default"]
    places[:, 1], places[:, 2] = places[:, 0], 3  # one place twice, and one where the other numbers are
    tensors = {
        "frod_lambda_l": layer.frod_lambda_l["default"].data,
        "frod_lambda_s_values": layer.frod_lambda_s_values["default"].data,
        "frod_V": layer.frod_V["default"],
        "frod_s_indices": layer.frod_s_indices["default"],
        "frod_s_size": layer.frod_s_size["default"],
    }
    found = made(frod.METHOD, tensors, {}, 1.0, shape, layer.get_base_layer().weight.data)
    expected = layer.get_delta_weight("default")
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize(
    ("module", "role"),
    [
        ("model.layers.0.self_attn.q_proj", "self_attn_q_proj"),
        ("encoder.layer.3.attention.output.dense", "attention_output"),
        ("encoder.layer.3.output.dense", "output_dense"),
        ("blocks.4", "blocks_4"),
        ("blocks.4.proj", "proj"),
        ("head", "head"),
    ],
)
def test_roles_are_those_of_peft(module: str, role: str) -> None:
    from peft.tuners.frod.model import _category_from_key

    assert frod._role(module) == role == _category_from_key(module)


# Damage


FITS: dict[Method, tuple[dict[str, tuple[int, ...]], dict[str, Any], tuple[int, int]]] = {
    fourierft.METHOD: ({"fourierft_spectrum": (5,)}, {"seed": 7}, (4, 6)),
    waveft.METHOD: ({"waveft_spectrum": (5,)}, {"seed": 7, "wavelet": "db2"}, (4, 6)),
    supertuning.METHOD: (
        {
            "supertuning_values": (5,),
            "supertuning_indices": (5,),
            "supertuning_lora_A": (2, 6),
            "supertuning_lora_B": (4, 2),
        },
        {"alpha": 4},
        (4, 6),
    ),
    supertuning.OUTERMOST: ({"supertuning_values": (5,)}, {"largest": True}, (4, 6)),
    peanut.METHOD: (
        {"peanut_A": (2, 4), "peanut_B": (4, 2), "peanut_encoders.0": (2, 2), "peanut_decoders.0": (2, 2)},
        {"act": "relu"},
        (4, 6),
    ),
    frod.METHOD: (
        {
            "frod_lambda_l": (6,),
            "frod_lambda_s_values": (3,),
            "frod_V": (6, 6),
            "frod_s_indices": (2, 3),
            "frod_s_size": (2,),
        },
        {},
        (4, 6),
    ),
}
HOSTILE = [None, "x", True, 1e400, 2**64, -(2**64), (1, 2)]


@pytest.mark.parametrize("method", FITS, ids=lambda method: method.kind)
def test_shapes_and_settings_that_do_not_fit_have_a_problem(method: Method) -> None:
    shapes, settings, shape = FITS[method]
    assert method.problem(shapes, settings, shape) is None
    assert method.working_bytes(shapes, settings, shape) > 0
    for name, found in shapes.items():
        rest = {other: of for other, of in shapes.items() if other != name}
        wrong: list[tuple[int, ...]] = [(), (*found, 1), (0, *found[1:]), (*found[:-1], 1000)]
        for one in wrong:
            assert method.problem(rest | {name: one}, settings, shape), (name, one)
        assert method.problem(rest, settings, shape) or name.startswith("supertuning_lora"), name
    for other in ((4,), (4, 6, 1), (5, 5)):
        answer = method.problem(shapes, settings, other)
        assert answer or (other == (5, 5) and len(shapes) == 1), other
    for name, value in itertools.product(settings, HOSTILE):
        if (name, value) not in (("largest", True), ("alpha", 2**64), ("alpha", -(2**64))):
            assert method.problem(shapes, settings | {name: value}, shape), (name, value)
