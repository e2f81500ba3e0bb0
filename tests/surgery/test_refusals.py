"""What is refused, by which error, in which words; and that a refusal leaves no trace."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import save_file

from lora_cli import errors
from lora_cli.adapters.source import ReadOptions
from lora_cli.surgery.merge import MergeResult, merge
from lora_cli.surgery.placing import PlanOptions

Tensors = dict[str, torch.Tensor]

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"  # 12 × 8 and 16 × 8
HEAD = "lm_head.weight"  # 20 × 8
ADAPTER, BASE = "adapter_model.safetensors", "model.safetensors"
FP8 = torch.ones(12, 8).to(torch.float8_e4m3fn)


def lora(module: str, out: int, inner: int, value: float = 1.0) -> Tensors:
    return {f"{module}.lora_A.weight": torch.ones(2, inner), f"{module}.lora_B.weight": torch.full((out, 2), value)}


class World:
    """A base and an adapter that fit; to be spoilt, and then written."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.base, self.adapter = folder, folder / "base", folder / "adapter"
        self.place, self.out = folder / "place", folder / "place" / "out"
        self.tensors = {name: torch.from_numpy(array) for name, array in tiny.base_tensors().items()}
        self.base_config: dict[str, Any] = dict(tiny.CONFIG)
        self.adapters, self.factors = [self.adapter], lora(Q, 12, 8) | lora(UP, 16, 8)
        self.config: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
        self.how: dict[str, Any] = {}
        self.harms: list[Spoil] = []
        self.place.mkdir()
        self.base.mkdir()

    def write(self) -> World:
        save_file(self.tensors, self.base / BASE)
        tiny.write_json(self.base / "config.json", self.base_config)
        self.write_adapter("adapter", self.factors)
        (self.folder / "link").symlink_to(self.base)
        for harm in self.harms:
            harm(self)
        return self

    def write_adapter(self, name: str, factors: Tensors) -> Path:
        tiny.write_adapter(self.folder / name, {}, **self.config)
        named = {f"base_model.model.{name}": factor for name, factor in factors.items()}
        save_file(named, self.folder / name / ADAPTER)
        return self.folder / name

    def merge(self, out: Path | None = None, **how: Any) -> MergeResult:
        return merge(self.base, self.adapters, self.out if out is None else out, **self.how, **how)


Spoil = Callable[[World], Any]


def both(*spoils: Spoil) -> Spoil:
    return lambda world: [spoil(world) for spoil in spoils]


def adds(factors: Tensors | None = None, /, **config: Any) -> Spoil:
    return lambda world: (world.factors.update(factors or {}), world.config.update(config))


def base(tensors: Tensors | None = None, /, **config: Any) -> Spoil:
    return lambda world: (world.tensors.update(tensors or {}), world.base_config.update(config))


def said(**options: Any) -> Spoil:
    return lambda world: world.how.update(options=PlanOptions(**options))


def harm(what: Spoil) -> Spoil:
    return lambda world: world.harms.append(what)


def meanwhile(what: Spoil) -> Spoil:
    return lambda world: world.how.update(on_plan=lambda _: what(world))


def second(factors: Tensors) -> Spoil:
    return harm(lambda world: world.adapters.append(world.write_adapter("second", factors)))


def plain(factors: Tensors, **metadata: str) -> Spoil:
    """A bare file of factors, for a square in a base that does not say what it is."""
    write = harm(lambda world: save_file(factors, world.folder / "plain.safetensors", metadata))
    return both(SQUARES, write, lambda world: world.adapters.__setitem__(0, world.folder / "plain.safetensors"))


def head(stored: torch.Tensor, rows: int = 20, **beside: torch.Tensor) -> Spoil:
    """An adapter that holds the head whole, in float32, for a base that stores it as it likes."""
    tensors = {HEAD: stored} | {f"lm_head.{name}": tensor for name, tensor in beside.items()}
    return both(base(tensors), adds({HEAD: torch.ones(rows, 8)}, modules_to_save=["lm_head"]))


TABLE = "model.embed_tokens.lora_embedding"


def table(entries: int, dim: int) -> dict[str, torch.Tensor]:
    """Factors for the embedding as PEFT writes them."""
    return {f"{TABLE}_A": torch.ones(2, entries), f"{TABLE}_B": torch.ones(dim, 2)}


def kernels(a: tuple[int, ...], b: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Factors of more than two dimensions in place of a matrix's."""
    return {f"{Q}.lora_A.weight": torch.ones(a), f"{Q}.lora_B.weight": torch.ones(b)}


NAN = {f"{UP}.lora_A.weight": torch.tensor([[1.0] * 7 + [torch.nan]] * 2)}
SQUARES = base({"x.weight": torch.ones(5, 5), "y.weight": torch.ones(4, 5)}, model_type=None)
TWO_WAYS = both(SQUARES, adds(lora("x", 5, 5)), second(lora("x", 5, 5) | lora("y", 5, 4)))
ROWS: list[tuple[str, str, str, Spoil]] = [
    ("transposed factors", "Shape", Q, adds(lora(Q, 8, 12))),
    ("another width, and another", "Shape", "delta is (15 × 8)", adds(lora(Q, 12, 9) | lora(UP, 15, 8))),
    ("rank of the config", "Shape", "rank 2, r says 3", adds(r=3)),
    ("rank of a pattern", "Shape", "rank_pattern['q_proj'] says 5", adds(rank_pattern={"q_proj": 5})),
    ("vocabulary of a delta", "Shape", "24 rows in the adapter, 20 in", adds(lora("lm_head", 24, 8))),
    (
        "vocabulary of a head",
        "Shape",
        "24 rows in the adapter, and model.embed_tokens.weight has 20",
        head(torch.ones(20, 8), 24),
    ),
    ("square", "Shape", "--orientation", plain(lora("x", 5, 5), alpha="1")),
    ("square in two ways", "Shape", "x.weight", TWO_WAYS),
    ("A without B", "Names", "k.lora_A.weight has no B", adds({"k.lora_A.weight": torch.ones(2, 8)})),
    ("B without A", "Names", "k.lora_B.weight has no A", adds({"k.lora_B.weight": torch.ones(8, 2)})),
    ("a bias alone", "Names", "k.lora_B.bias belongs to no", adds({"k.lora_B.bias": torch.ones(8)}, lora_bias=True)),
    ("no name", "Names", "Nothing in this adapter", both(lambda w: w.factors.clear(), adds(lora("a.b", 12, 8)))),
    ("some names", "Names", f"q_prj.weight (nearest: {Q}.weight", adds(lora(Q.replace("proj", "prj"), 12, 8))),
    ("all such names", "Names", "zz.weight", adds(lora("m.yy", 12, 8) | lora("m.zz", 12, 8))),
    ("two heads", "Names", HEAD, both(head(torch.ones(20, 8)), second({HEAD: torch.zeros(20, 8)}))),
    ("no scale", "MissingScale", "--alpha", plain(lora("x", 5, 5))),
    ("weights", "Usage", "once per adapter", said(weights=(1.0, 2.0))),
    ("weight NaN", "Usage", "finite", said(weights=(float("nan"),))),
    ("memory", "Usage", "MiB or more", lambda world: world.how.update(memory=1 << 20)),
    ("no adapter", "Usage", "No adapter", harm(lambda world: world.adapters.clear())),
    ("NaN in A", "Numeric", f"{UP}.weight", adds(NAN)),
    ("infinity in B", "Numeric", f"{UP}.lora_B.weight", adds(lora(UP, 16, 8, torch.inf))),
    ("NaN in the base", "Numeric", Q, base({f"{Q}.weight": torch.full((12, 8), torch.nan)})),
    ("factors of integers", "Unsupported", "I32 of a factor", adds({f"{Q}.lora_A.weight": torch.ones(2, 8).int()})),
    ("complex factors", "Unsupported", "C64 of a factor", adds({f"{Q}.lora_A.weight": torch.ones(2, 8) * 1j})),
    ("too large", "Numeric", "float16", both(adds(lora(UP, 16, 8, 4e4)), said(dtype="fp16"))),
    ("too large, no target", "Numeric", HEAD, both(base({HEAD: torch.full((4,), 1e6)}), said(dtype="fp16"))),
    ("weight of a head", "Unsupported", "weight 0.5", both(head(torch.zeros(20, 8)), said(weights=(0.5,)))),
    ("fp8 blocks", "Unsupported", "scale_inv", base({f"{Q}.weight": FP8, f"{Q}.weight_scale_inv": torch.ones(1)})),
    ("GPTQ", "Unsupported", "gptq", base(quantization_config={"quant_method": "gptq", "bits": 4})),
    ("bitsandbytes", "Unsupported", "SCB", base({f"{Q}.weight": FP8.view(torch.int8), f"{Q}.SCB": torch.ones(12)})),
    ("int8", "Unsupported", "I8", base({f"{Q}.weight": FP8.view(torch.int8)})),
    ("head of fp8 blocks", "Unsupported", HEAD, head(FP8, 12, weight_scale_inv=torch.ones(1, 1))),
    ("head of int8", "Unsupported", HEAD, head(FP8.view(torch.int8), 12)),
    ("DoRA", "Unsupported", "DoRA", adds({f"{Q}.lora_magnitude_vector": torch.ones(12)}, use_dora=True)),
    ("DoRA without a word", "Unsupported", "DoRA", adds({f"{Q}.lora_magnitude_vector": torch.ones(12)})),
    ("DoRA in words alone", "Unsupported", "lacks magnitudes", adds(use_dora=True)),
    ("magnitudes", "Shape", "[8] for 12 outputs", adds({f"{Q}.lora_magnitude_vector": torch.ones(8)})),
    ("half an embedding", "Names", "lora_embedding_A has no B", adds({f"{TABLE}_A": torch.ones(2, 20)})),
    ("vocabulary of an embedding", "Shape", "24 rows in the adapter, 20 in", adds(table(24, 8))),
    ("embedding the other way round", "Shape", "delta is (8 × 20)", adds(table(8, 20))),
    ("no convolution", "Shape", "delta is (12 × 8 × 3)", adds(kernels((2, 8, 3), (12, 2, 1)))),
    ("convolution in groups", "Shape", "2 groups", adds(kernels((2, 8, 3, 3), (12, 1, 1, 1)))),
    ("stack of experts", "Names", "no place in the base", adds(kernels((3, 2, 8), (3, 12, 2)))),
    ("tokens", "MalformedFile", "no rows for them", adds(trainable_token_indices=[1])),
    ("expert parameters", "Names", "no place in the base", adds(target_parameters=["q_proj.gate_up_proj"])),
    ("another tuner", "Unsupported", "PREFIX_TUNING", adds(peft_type="PREFIX_TUNING")),
    ("unknown field", "Unsupported", "use_sparkle = 0.5", adds(use_sparkle=0.5)),
    ("pissa", "Unsupported", "changed by its init", adds(init_lora_weights="pissa_niter_4")),
    ("loftq", "Unsupported", "quantised the base", adds(init_lora_weights="loftq")),
    ("kohya", "Unsupported", "kohya", plain({"lora_unet_down_0.lora_down.weight": torch.ones(2, 8)})),
    ("several adapters", "Unsupported", "several", adds({"k.lora_A.b.weight": torch.ones(2, 8)})),
    ("cut off base", "MalformedFile", "bytes are missing", harm(lambda w: os.truncate(w.base / BASE, 3000))),
    ("cut off adapter", "MalformedFile", "bytes are missing", harm(lambda w: os.truncate(w.adapter / ADAPTER, 99))),
    ("cut off meanwhile", "ChangedFile", BASE, meanwhile(lambda w: os.truncate(w.base / BASE, 3000))),
    ("touched meanwhile", "ChangedFile", "changed", meanwhile(lambda w: os.utime(w.base / BASE, (1, 1)))),
    ("a side file gone", "ChangedFile", "config.json", meanwhile(lambda w: (w.base / "config.json").unlink())),
    (
        "pickled adapter",
        "UnsafeInput",
        "weights_only",
        harm(lambda w: (w.adapter / ADAPTER).rename(w.adapter / "a.pt")),
    ),
    ("pickled base", "UnsafeInput", "weights_only", harm(lambda w: (w.base / BASE).rename(w.base / "a.bin"))),
]
EXITS = {
    "Usage": 2,
    "MissingScale": 2,
    "MalformedFile": 10,
    "ChangedFile": 10,
    "UnsafeInput": 11,
    "Unsupported": 12,
    "Names": 20,
}
EXITS |= {"Shape": 21, "Numeric": 22}


@pytest.mark.parametrize(("kind", "words", "spoil"), [pytest.param(*row[1:], id=row[0]) for row in ROWS])
def test_refused_by_name_and_without_a_trace(tmp_path: Path, kind: str, words: str, spoil: Spoil) -> None:
    world = World(tmp_path)
    spoil(world)
    before = tiny.listing(world.write().base) | tiny.listing(world.adapter)
    with pytest.raises(errors.LoraCliError) as caught:
        world.merge()
    error = caught.value
    assert (type(error).__name__, error.exit_code) == (f"{kind}Error", EXITS[kind])
    said = (error.message, error.file, error.tensor, error.expected, error.found, error.hint, *error.details)
    assert words in " ".join(str(part) for part in said if part)
    assert list(world.place.iterdir()) == []
    assert "on_plan" in world.how or tiny.listing(world.base) | tiny.listing(world.adapter) == before


ACCEPTED: dict[str, Spoil] = {
    "fields that are not set": adds(use_sparkle=None, use_dora=False, sparkles=[], layer_replication={}),
    "an ignored field": both(adds(use_sparkle=0.5), said(read=ReadOptions(ignore_fields=("use_sparkle",)))),
    "names that are allowed": both(adds(lora("m.yy", 12, 8)), said(allow_unmapped=True)),
    "a square that is said": both(plain(lora("x", 5, 5), alpha="1"), said(orientation="ab")),
    "a quantised model's own exceptions": base(quantization_config={"ignore": ["self_attn", "up_proj"]}),
    "the base's own head at any weight": both(head(torch.ones(20, 8)), said(weights=(0.5,))),
    "the same head twice": both(head(torch.ones(20, 8)), second({HEAD: torch.ones(20, 8)})),
}


@pytest.mark.parametrize("spoil", ACCEPTED.values(), ids=ACCEPTED)
def test_what_is_close_to_a_refusal_is_done(tmp_path: Path, spoil: Spoil) -> None:
    world = World(tmp_path)
    spoil(world)
    assert world.write().merge().ledger["applied"] > 0
    assert [path.name for path in world.place.iterdir()] == ["out"]


PLACES: dict[str, tuple[str, Callable[[World], object]]] = {
    "the base": ("OutputExists", lambda w: w.base),
    "in the base": ("OutputExists", lambda w: w.base / "out"),
    "in the adapter": ("OutputExists", lambda w: w.adapter / "deep.safetensors"),
    "around the inputs": ("OutputExists", lambda w: w.folder),
    "by a link into the base": ("OutputExists", lambda w: w.folder / "link" / "out"),
    "a link": ("OutputExists", lambda w: w.out.symlink_to("elsewhere")),
    "a shard": ("OutputExists", lambda w: w.base / BASE),
    "a second name of a shard": ("OutputExists", lambda w: os.link(w.base / BASE, w.out.with_suffix(".safetensors"))),
    "a file": ("OutputExists", lambda w: w.out.write_text("mine")),
    "a folder with something": ("OutputExists", lambda w: (w.out / "deep").mkdir(parents=True)),
    "no parent": ("Usage", lambda w: w.out / "deep" / "out"),
    "a file as parent": ("Usage", lambda w: w.out / str(w.out.write_text("mine"))),
    "here": ("OutputExists", lambda _: Path()),
}


@pytest.mark.parametrize(("kind", "where"), PLACES.values(), ids=PLACES)
def test_an_output_goes_to_a_place_of_its_own(tmp_path: Path, kind: str, where: Callable[[World], object]) -> None:
    world = World(tmp_path).write()
    out = where(world)
    found = out if isinstance(out, Path) else next(world.place.iterdir())
    before = tiny.listing(tmp_path)
    for force in (False, True):
        with pytest.raises(errors.LoraCliError) as caught:
            world.merge(found, force=force)
        assert type(caught.value).__name__ == f"{kind}Error"
    assert tiny.listing(tmp_path) == before


def test_force_replaces_what_lora_cli_wrote(tmp_path: Path) -> None:
    world = World(tmp_path).write()
    for out in (world.out, world.out.with_suffix(".safetensors")):
        first = world.merge(out)
        before = out.stat().st_size if out.is_file() else (out / "config.json").read_text()
        again = world.merge(out, force=True, options=PlanOptions(dtype="bf16"))
        assert again.files == first.files
        assert before != (out.stat().st_size if out.is_file() else (out / "config.json").read_text())


@pytest.mark.parametrize("put", [Path.touch, lambda path: path.symlink_to("..")], ids=["file", "link"])
def test_force_spares_what_no_receipt_lists(tmp_path: Path, put: Callable[[Path], None]) -> None:
    world = World(tmp_path).write()
    world.merge()
    put(world.out / "mine")
    before = tiny.listing(world.place)
    with pytest.raises(errors.OutputExistsError, match="exists already"):
        world.merge(force=True)
    assert tiny.listing(world.place) == before
