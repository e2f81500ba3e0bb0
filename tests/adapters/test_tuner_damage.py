"""Damaged adapters of other tuners: parts that fit nothing, numbers that are none, files that lack something."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import peft
import pytest
import torch
from models import quiet
from peft_files import llama
from tuner_formulas import ALL, LINEAR, Tuned, Tuners, whole

from lora_cli.adapters.adapter import Parameter
from lora_cli.adapters.formats import open_adapter
from lora_cli.adapters.formula import Formula, Method, ProductMethod
from lora_cli.adapters.source import ReadOptions
from lora_cli.adapters.tuners import METHODS, TUNERS
from lora_cli.adapters.tuners.draws import Uniform
from lora_cli.errors import (
    LoraCliError,
    MalformedFileError,
    NamesError,
    NumericError,
    ShapeError,
    UnsupportedError,
    UsageError,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Tuners:
    """Each adapter, made once."""
    return Tuners(tmp_path_factory.mktemp("tuned"))


MAY_BE_LARGER: Final = {"vera_A", "vera_B", "pvera_A", "pvera_B", "randlora_A", "randlora_B"} | {
    "vblora_vector_bank",
    "unilora_theta_d",
    "miss_block",
}
OF_SEVERAL_SHAPES: Final = ("vera", "pvera", "randlora", "shira", "miss")
"""What may be of a parameter of another shape, too."""


def _known(one: Tuned, layer: str) -> tuple[Method, dict[str, tuple[int, ...]], dict[str, Any], tuple[int, ...]]:
    formula = one.formula(layer)
    shapes = {name: tensor.shape for name, tensor in formula.parts.items()}
    return formula.method, shapes, dict(formula.settings), one.shape(layer)


@pytest.mark.parametrize("name", ALL)
def test_parts_of_other_shapes_are_refused(name: str, made: Tuners) -> None:
    method, shapes, settings, shape = _known(made(name), ALL[name][1][0])
    assert METHODS[method.kind] is method
    assert method.problem(shapes, settings, shape) is None
    for part, of_part in shapes.items():
        without = {other: found for other, found in shapes.items() if other != part}
        assert method.problem(without, settings, shape), part
        assert method.rank(without, settings) >= 0
        for wrong in _others(of_part):
            found = method.problem({**shapes, part: wrong}, settings, shape)
            larger = len(wrong) == len(of_part) and all(a >= b for a, b in zip(wrong, of_part, strict=True))
            assert found or (part in MAY_BE_LARGER and larger), (part, wrong)
            assert method.rank({**shapes, part: wrong}, settings) >= 0
    for wrong in _others(shape):
        kernel = wrong == (*shape, 1)  # of one point
        assert method.problem(shapes, settings, wrong) or kernel or name.startswith(OF_SEVERAL_SHAPES), wrong


def _others(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Shapes that differ: each dimension one more, none, and doubled; one dimension less, and one more."""
    changed = [(*shape[:at], new, *shape[at + 1 :]) for at, old in enumerate(shape) for new in (old + 1, 0, 2 * old)]
    return [*changed, shape[1:], (*shape, 1), (1, *shape), ()]


def test_only_a_mini_block_is_repeated_along_outputs() -> None:
    def problem(block: tuple[int, ...], **settings: bool) -> str | None:
        return METHODS["miss"].problem({"miss_block": block}, settings, (12, 8))

    assert problem((4, 12)) is None
    assert problem((4, 6), mini=True) is None
    assert problem((4, 6))
    assert problem((4, 5), mini=True)
    assert problem((4, 24))


def test_a_rank_is_cut_into_equal_pieces() -> None:
    def problem(rank: int) -> str | None:
        shapes = {"gralora_A": (2, 4, rank), "gralora_B": (2, rank, 6)}
        return METHODS["gralora"].problem(shapes, {}, (12, 8))

    assert problem(4) is None
    assert problem(5)


HOSTILE: Final = (None, -1, 0, True, "x", (1,), 1.5, 1 << 62)
FREE: Final = {"seed"}
"""Settings of which most values have a meaning."""


@pytest.mark.parametrize("name", ["vera-drawn", "pvera-drawn", "randlora-drawn", "vblora"])
def test_settings_of_other_kinds_are_refused(name: str, made: Tuners) -> None:
    method, shapes, settings, shape = _known(made(name), "up")
    assert settings
    for setting in settings:
        for value in HOSTILE:
            words = method.problem(shapes, settings | {setting: value}, shape)
            assert words or setting in FREE, (setting, value)
        rest = {other: value for other, value in settings.items() if other != setting}
        assert method.problem(shapes, rest, shape)


def test_a_module_without_ranks_is_not_changed(made: Tuners) -> None:
    one = made("adalora")
    method, _, settings, shape = _known(one, "up")
    empty = {"lora_A": torch.empty(0, 8), "lora_B": torch.empty(12, 0), "lora_E": torch.empty(0, 1)}
    assert method.problem({name: tuple(found.shape) for name, found in empty.items()}, settings, shape) is None
    given = one.given("up")
    found = whole(one.formula("up"), type(given)(empty, settings, 1.0, shape))
    assert torch.equal(found, torch.zeros(12, 8, dtype=torch.float64))


Change = Callable[[torch.Tensor], torch.Tensor]


def _with(value: float, at: int = 0) -> Change:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[at] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("name", "part", "change", "words"),
    [
        ("lokr-full", "lokr_w1", _with(torch.nan), "lokr_w1 holds NaN"),
        ("lokr", "lokr_w2_a", _with(torch.inf), "NaN or infinity"),
        ("c3a", "c3a_kernel", _with(torch.nan), "c3a_kernel holds NaN"),
        ("miss", "miss_block", _with(-torch.inf), "miss_block holds NaN"),
        ("shira", "shira_weight", _with(torch.nan), "shira_weight holds NaN"),
        ("shira", "shira_indices", _with(12), "no places"),
        ("shira", "shira_indices", _with(8, -1), "no places"),
        ("shira", "shira_indices", _with(-1), "no places"),
        ("shira", "shira_indices", lambda tensor: tensor * 0, "there twice"),
        ("shira", "shira_indices", lambda tensor: tensor.float() + 0.5, "no places"),
        ("unilora", "unilora_indices_A", _with(7), "no places"),
        ("unilora", "unilora_scales_B", _with(torch.nan), "unilora_scales_B holds NaN"),
        ("tinylora", "tinylora_P", _with(torch.nan), "tinylora_P holds NaN"),
        ("vblora", "vblora_logits_A", _with(torch.nan), "no finite number"),
        ("vblora", "vblora_logits_B", _with(torch.inf), "no finite number"),
        ("vblora", "vblora_logits_B", lambda tensor: tensor - torch.inf, "no finite number"),
        ("vblora-top", "vblora_logits_A_topk_indices", _with(9), "no places"),
        ("vblora-top", "vblora_logits_A_topk_weights", _with(torch.nan), "holds NaN"),
    ],
)
def test_numbers_that_are_none_are_refused(name: str, part: str, change: Change, words: str, made: Tuners) -> None:
    one = made(name)
    given = one.given("up")
    damaged = {other: change(tensor.clone()) if other == part else tensor for other, tensor in given.tensors.items()}
    with pytest.raises(NumericError, match=words):
        whole(one.formula("up"), type(given)(damaged, given.settings, 1.0, given.shape))


def test_places_may_be_floating_numbers(made: Tuners) -> None:
    one = made("shira")
    given = one.given("up")
    floating = {**given.tensors, "shira_indices": given.tensors["shira_indices"].float()}
    changed = type(given)(floating, given.settings, 1.0, given.shape)
    assert torch.equal(whole(one.formula("up"), changed), whole(one.formula("up"), given))


def test_of_equal_logits_the_first_counts(made: Tuners) -> None:
    one = made("vblora")
    given, formula = one.given("up"), one.formula("up")
    bank = given.tensors["vblora_vector_bank"]

    def pieces(logits: torch.Tensor) -> torch.Tensor:
        tensors = {**given.tensors, "vblora_logits_A": logits}
        assert isinstance(formula.method, ProductMethod)
        return formula.method.term(type(given)(tensors, given.settings, 1.0, given.shape)).a

    equal = pieces(torch.zeros_like(given.tensors["vblora_logits_A"]))
    torch.testing.assert_close(equal[0, :4], bank[:3].mean(0), rtol=1e-15, atol=0)


# Files


def _open(one: Tuned, folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], **config: Any) -> Tuned:
    """A copy of an adapter with other tensors and other fields."""
    from safetensors.torch import save_file

    folder.mkdir()
    tensors = one.tensors()
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    said = json.loads((one.folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(said | config))
    return Tuned(folder, one.model)


def _nothing(tensors: dict[str, torch.Tensor]) -> None:
    pass


def _without(*ends: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if key.endswith(ends)]:
            del tensors[key]

    return change


@pytest.mark.parametrize(
    ("name", "config", "error", "words"),
    [
        ("lokr", {"r": 3}, ShapeError, "another rank than the config says"),
        ("lokr-full", {"r": 0}, ShapeError, "another rank"),
        ("lokr", {"alpha": "x"}, MalformedFileError, "wrong type"),
        ("lokr", {"rank_pattern": {"up": 1.5}}, MalformedFileError, "wrong type"),
        ("adalora", {"init_r": 0}, MalformedFileError, "wrong type"),
        ("adalora", {"use_dora": True}, UnsupportedError, "use_dora"),
        ("vera-drawn", {"projection_prng_key": 1 << 64}, MalformedFileError, "wrong type"),
        ("vera-drawn", {"save_projection": True}, UnsupportedError, "vera_A and vera_B"),
        ("randlora-drawn", {"save_projection": None}, UnsupportedError, "randlora_A and randlora_B"),
        ("randlora", {"r": 0}, MalformedFileError, "wrong type"),
        ("vblora", {"topk": 0}, MalformedFileError, "wrong type"),
        ("miss", {"init_weights": "both"}, MalformedFileError, "wrong type"),
        ("c3a", {"strange": 1}, UnsupportedError, "strange"),
    ],
)
def test_configs_that_fit_no_file_are_refused(
    name: str,
    config: dict[str, Any],
    error: type[LoraCliError],
    words: str,
    made: Tuners,
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=words):
        _ = _open(made(name), tmp_path / "damaged", _nothing, **config).adapter


@pytest.mark.parametrize(
    ("name", "change", "error", "words"),
    [
        ("vera", _without("vera_A"), UnsupportedError, "lacks vera_A"),
        ("randlora", _without("randlora_B"), UnsupportedError, "lacks randlora_B"),
        ("vblora", _without("vector_bank"), UnsupportedError, "lacks vblora_vector_bank"),
        ("unilora", _without("indices_A", "indices_B"), UnsupportedError, "save_indices"),
        ("tinylora", _without("tinylora_P"), UnsupportedError, "lacks tinylora_P"),
        ("tinylora", lambda of: of.update({"base_model.tinylora_v.1": torch.ones(5)}), UnsupportedError, "2 vectors"),
        ("randlora", lambda of: of["base_model.model.up.randlora_A"].add_(1), NamesError, "randlora_A"),
    ],
)
def test_files_that_lack_what_all_modules_share_are_refused(
    name: str, change: Any, error: type[LoraCliError], words: str, made: Tuners, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        _ = _open(made(name), tmp_path / "damaged", change).adapter


OPTIONAL: Final = {"lokr_t2", "deft_R", "gralora_A_general", "supertuning_lora_A"}
"""Parts that some modules have and others not; `problem` looks at the rest of them."""


@pytest.mark.parametrize("name", ALL)
def test_a_module_that_lacks_a_part_is_named(name: str, made: Tuners, tmp_path: Path) -> None:
    one, layer = made(name), ALL[name][1][0]
    formula = one.formula(layer)
    own = {part: tensor.key for part, tensor in formula.parts.items() if f"{layer}." in tensor.key}
    assert own
    for part, key in own.items():
        lost = _open(one, tmp_path / part, _without(key))
        if len(own) == 1:  # then the module is not there at all
            assert layer not in {target.module for target in lost.adapter.targets}
        elif part not in OPTIONAL:
            with pytest.raises((NamesError, UnsupportedError)) as caught:
                _ = lost.adapter
            said = [*caught.value.details, caught.value.message]
            assert any(part in words for words in said), said


@pytest.mark.parametrize(
    ("kind", "parts", "words"),
    [
        ("LOKR", ["lokr_w2"], "lokr_w1, or lokr_w1_a and lokr_w1_b"),
        ("LOKR", ["lokr_w1_b", "lokr_w2"], "lokr_w1_a"),
        ("LOKR", ["lokr_w1", "lokr_w2_a", "lokr_w2_b", "lokr_t2"], None),
        ("GLORA", ["glora_A.Xd"], "glora_A.Xu"),
        ("GLORA", ["glora_B.X"], None),
        ("GRALORA", ["gralora_A", "gralora_B", "gralora_A_general"], "gralora_B_general"),
        ("IA3", [], "ia3_l"),
    ],
)
def test_what_a_module_needs(kind: str, parts: list[str], words: str | None) -> None:
    assert TUNERS[kind].lacks(parts) == words


def test_a_tie_at_the_end_of_the_largest_is_doubted(made: Tuners) -> None:
    formula = made("vblora").formula("up")
    count = int(str(formula.settings["topk"]))

    def doubt(*logits: float) -> str | None:
        return formula.method.doubt({"vblora_logits_A": torch.tensor([[logits]])}, {"topk": count})

    assert count == 3
    assert "save_only_topk_weights" in str(doubt(1, 5, 4, 1, 0))
    assert doubt(1, 5, 5, 0, 0) is None
    assert doubt(1, 1, 1) is None


def test_copies_of_what_is_shared_are_accounted_for(made: Tuners, tmp_path: Path) -> None:
    one = made("randlora")
    adapter = one.adapter
    assert {tensor.key for tensor, _ in adapter.skipped} == {
        f"base_model.model.{layer}.randlora_{side}" for layer in (*LINEAR, "turned") for side in "AB"
    }
    assert not adapter.unread
    alone = _open(one, tmp_path / "alone", _without("base_model.randlora_A", "base_model.randlora_B"))
    assert torch.equal(alone.delta("up"), one.delta("up"))


def test_what_has_no_alpha_takes_none(made: Tuners) -> None:
    with pytest.raises(UsageError, match="VeRA"):
        open_adapter(made("vera").folder, ReadOptions(alpha=3.0))
    (scale,) = {t.delta.scale.times() for t in open_adapter(made("vera").folder, ReadOptions(scale=3.0)).targets}
    assert scale == 3.0


def test_patterns_say_scales_of_single_modules(made: Tuners, tmp_path: Path) -> None:
    one = made("lokr-full")
    other = _open(one, tmp_path / "other", _nothing, rank_pattern={"up": 2}, alpha_pattern={"down": 48})
    torch.testing.assert_close(other.delta("up"), one.delta("up") * 8, rtol=1e-15, atol=0)
    torch.testing.assert_close(other.delta("down"), one.delta("down") * 16, rtol=1e-15, atol=0)


def test_what_is_drawn_for_all_needs_all(made: Tuners) -> None:
    (target, *_) = made("vera-drawn").adapter.targets
    assert isinstance(target.delta, Formula)
    with pytest.raises(ShapeError, match="not known"):
        target.delta.on(Parameter((12, 8), False, False, {}))


@pytest.mark.parametrize("seed", [0, 7, -3, 2**40 + 5])
def test_numbers_are_drawn_as_torch_does(seed: int) -> None:
    state, draws = torch.Generator().manual_seed(seed), Uniform(seed)
    for count, bound in ((5, 0.01), (70_000, 0.3333), ((1 << 20) + 3, 1.7)):
        drawn = torch.from_numpy(draws.between(bound, count))
        near = torch.empty(count).uniform_(-bound, bound, generator=state)
        assert float((drawn.double() - near.double()).abs().max()) <= bound * 2**-23
        assert torch.equal(drawn.sign(), near.sign())


def test_rows_of_tokens_are_those_of_the_config(tmp_path: Path) -> None:
    with quiet(3):
        config = peft.TrainableTokensConfig(token_indices=[7, 2], target_modules=["embed_tokens"])
        model = peft.get_peft_model(llama(), config)
        model.save_pretrained(tmp_path / "tokens")
    one = Tuned(tmp_path / "tokens", model)
    (rows,) = one.adapter.rows
    assert (rows.name, rows.rows) == ("model.embed_tokens.weight", (7, 2))
    malformed: list[object] = [[7, 7], [7, -2], 7]
    for tokens, error in (([7], ShapeError), *((tokens, MalformedFileError) for tokens in malformed)):
        folder = tmp_path / str(tokens)
        with pytest.raises(error, match="token"):
            _ = _open(one, folder, _nothing, token_indices=tokens).adapter
