"""Which base key a name of an adapter means: every spelling that occurs, both ways, and nothing by guessing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml
from conversion_world import Shaped
from hypothesis import given
from hypothesis import strategies as st
from tiny import PREFIX, Array, numbers, within, write_adapter, write_base

from lora_cli.adapters.names import Subtree
from lora_cli.adapters.resolve import Resolution, nearest, parse_maps
from lora_cli.adapters.resolve import resolve as resolve_in
from lora_cli.errors import NamesError, UsageError
from lora_cli.surgery.merge import plan_merge

TABLE: Mapping[str, Any] = yaml.safe_load((resources.files("lora_cli") / "data" / "names.yaml").read_text("utf-8"))
TEXT = ("layers.0.self_attn.q_proj.weight", "layers.11.mlp.up_proj.weight", "embed_tokens.weight")


def resolve(names: Sequence[str], keys: Sequence[str], *, maps: Sequence[Subtree] = (), file: str = "") -> Resolution:
    """In a base of which nothing but the keys is known."""
    return resolve_in(names, dict.fromkeys(keys, Shaped()), maps=maps, file=file)


def prefixed(prefix: str, names: Sequence[str] = TEXT) -> list[str]:
    return [prefix + name for name in names]


LLAVA_DISK = [*prefixed("language_model.model."), "language_model.lm_head.weight", "vision_tower.blocks.0.q.weight"]
LLAVA_LIVE = [*prefixed("model.language_model."), "lm_head.weight", "model.vision_tower.blocks.0.q.weight"]
QWEN_DISK = [*prefixed("model."), "lm_head.weight", "visual.blocks.0.attn.qkv.weight"]
QWEN_LIVE = [*prefixed("model.language_model."), "lm_head.weight", "model.visual.blocks.0.attn.qkv.weight"]

SPELLINGS: dict[str, tuple[list[str], list[str]]] = {
    "identity": (QWEN_DISK, QWEN_DISK),
    "torch.compile": (prefixed("_orig_mod.model."), prefixed("model.")),
    "data parallel": (prefixed("module.model."), prefixed("model.")),
    "peft in peft": (prefixed("base_model.model.model."), prefixed("model.")),
    "compiled backbone": (prefixed("_orig_mod.transformer."), prefixed("")),
    "gpt2 with a head": (["transformer.h.0.attn.c_attn.weight"], ["h.0.attn.c_attn.weight", "wte.weight"]),
    "llava": (LLAVA_LIVE, LLAVA_DISK),
    "compiled llava": (prefixed("_orig_mod.", LLAVA_LIVE), LLAVA_DISK),
    "qwen2-vl": (QWEN_LIVE, QWEN_DISK),
    "text adapter on a multimodal model of today": (prefixed("model."), [*prefixed("model.language_model."), "v.w"]),
    "text adapter on a multimodal model of old": (
        [*prefixed("model."), "lm_head.weight"],
        [*prefixed("language_model.model."), "language_model.lm_head.weight"],
    ),
    "internvl": (prefixed("language_model.base_model.model.model."), prefixed("language_model.model.")),
}
BOTH_WAYS = [
    pytest.param(adapter, base, id=f"{name}, {way}")
    for name, pair in SPELLINGS.items()
    for way, (adapter, base) in (("there", pair), ("back", pair[::-1]))
    if len(pair[0]) == len(pair[1]) or way == "there"
]


@pytest.mark.parametrize(("adapter", "base"), BOTH_WAYS)
def test_spelling(adapter: list[str], base: list[str]) -> None:
    found = resolve(adapter, [*base, "something.else.weight"])
    assert found.keys == dict(zip(adapter, base[: len(adapter)], strict=True))
    assert found.unmapped == ()
    assert (found.rewrite == "as they are") == (adapter == base)


@pytest.mark.parametrize("prefix", [*TABLE["wrappers"], *TABLE["backbones"]])
def test_every_prefix_of_the_table_both_ways(prefix: str) -> None:
    bare = prefixed("encoder.")
    there, back = resolve(prefixed(prefix, bare), bare), resolve(bare, prefixed(prefix, bare))
    assert there.keys == dict(zip(prefixed(prefix, bare), bare, strict=True))
    assert back.keys == dict(zip(bare, prefixed(prefix, bare), strict=True))
    assert (there.rewrite, back.rewrite) == (f"{prefix}* → *", f"* → {prefix}*")


def test_a_bare_parameter_is_found_without_its_weight() -> None:
    assert resolve(["experts.w1.weight"], ["experts.w1"]).keys == {"experts.w1.weight": "experts.w1"}


def test_names_as_they_are_win_over_a_rewrite_that_fits_as_well() -> None:
    """A file may hold both spellings; what is there by its own name is meant."""
    base = [*prefixed("model."), *prefixed("model.model.")]
    assert resolve(prefixed("model."), base).keys == {name: name for name in prefixed("model.")}


def test_the_rewrite_that_fits_most_names_is_taken_for_all() -> None:
    found = resolve(["model.a.weight", "model.b.weight", "c.weight"], ["a.weight", "b.weight", "model.c.weight"])
    assert found.keys == {"model.a.weight": "a.weight", "model.b.weight": "b.weight"}
    assert [lost.name for lost in found.unmapped] == ["c.weight"]


def test_the_order_of_many_names_does_not_matter() -> None:
    """A rewrite that fits a quarter of two hundred names is found wherever these stand."""
    fit = [f"model.{number}.weight" for number in range(50)]
    base = ["model.x.weight", *(name.removeprefix("model.") for name in fit)]
    others = ["model.x.weight", *(f"other.{number}.weight" for number in range(149))]
    apart = [name for at in range(100) for name in (others[at], *([fit[at // 2]] if at % 2 else []))] + others[100:]
    found = [resolve(names, base).keys for names in (apart, sorted(apart), apart[::-1], fit + others, others + fit)]
    assert found == [dict(zip(fit, base[1:], strict=True))] * len(found)


@given(st.sets(st.sampled_from([f"{a}.{b}.weight" for a in "abc" for b in "xyz"]), min_size=1), st.data())
def test_names_never_land_on_another_module(names: set[str], data: st.DataObject) -> None:
    """Whatever the base holds: a name is mapped to a key that ends like it, each key once, or it is unmapped."""
    spelled = [data.draw(st.sampled_from(["", "model.", "transformer.", "foo."])) + name for name in sorted(names)]
    base = [data.draw(st.sampled_from(["", "model.", "bar."])) + name for name in sorted(names)[1:]]
    try:
        found = resolve(spelled, base)
    except NamesError:
        return  # it fits in two ways
    assert all(key in base and key[-10:] == name[-10:] for name, key in found.keys.items())
    assert len(set(found.keys.values())) == len(found.keys)
    assert sorted([*found.keys, *(lost.name for lost in found.unmapped)]) == sorted(spelled)


# What cannot be decided is refused


def test_two_bases_for_one_name() -> None:
    base = ["model.layers.0.q.weight", "transformer.layers.0.q.weight"]
    with pytest.raises(NamesError) as caught:
        resolve(["layers.0.q.weight"], base, file="my-adapter")
    assert caught.value.file == "my-adapter"
    assert all(any(key in line for line in caught.value.details) for key in base)
    assert "--map" in str(caught.value.hint)
    # The hint does what it promises.
    found = resolve(["layers.0.q.weight"], base, maps=parse_maps(["layers=transformer.layers"]))
    assert found.keys == {"layers.0.q.weight": "transformer.layers.0.q.weight"}


def test_one_name_for_a_matrix_and_its_weight() -> None:
    with pytest.raises(NamesError) as caught:
        resolve(["x.weight"], ["x.weight", "x"])
    assert caught.value.tensor == "x.weight"


@pytest.mark.parametrize("maps", [["b=a"], ["b=c", "a=c"]])
def test_two_names_for_one_key(maps: list[str]) -> None:
    """By the user's maps; all pairs are shown."""
    names = ["a.q.weight", "b.q.weight", "a.k.weight", "b.k.weight"]
    with pytest.raises(NamesError) as caught:
        resolve(names, ["a.q.weight", "a.k.weight", "c.q.weight", "c.k.weight"], maps=parse_maps(maps), file="mine")
    assert len(caught.value.details) == 2
    assert all("a.q" in line or "a.k" in line for line in caught.value.details)


def test_two_names_for_a_bare_matrix() -> None:
    with pytest.raises(NamesError) as caught:
        resolve(["experts.w1", "experts.w1.weight"], ["experts.w1"])
    assert list(caught.value.details) == ["experts.w1 and experts.w1.weight are both experts.w1"]


@pytest.mark.parametrize(
    "name", ["model_layers_0_q_proj.weight", "layers.0.q_proj", "model.layers.0.q_proj.bias", "model.layers.00.q_proj"]
)
def test_what_only_looks_like_a_key_is_unmapped(name: str) -> None:
    found = resolve([name], ["model.layers.0.q_proj.weight"])
    assert found.keys == {}
    assert [lost.name for lost in found.unmapped] == [name]


def test_unmapped_names_come_with_their_nearest_keys() -> None:
    base = [f"model.layers.{n}.{part}.weight" for n in range(4) for part in ("self_attn.q_proj", "mlp.up_proj")]
    found = resolve(["model.layers.2.attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"], base)
    assert list(found.keys) == ["model.layers.1.mlp.up_proj.weight"]
    (lost,) = found.unmapped
    assert lost.nearest[0] == "model.layers.2.self_attn.q_proj.weight"
    assert len(lost.nearest) <= 2
    assert set(lost.nearest) <= set(base)
    assert nearest("zzz", base) == ()
    assert nearest("anything", []) == ()


# --map


def test_a_map_that_leads_nowhere_says_where_it_led() -> None:
    found = resolve(["old.q.weight", "b.weight"], ["old.q.weight", "news.q.weight"], maps=parse_maps(["old=new"]))
    assert [(lost.name, lost.told) for lost in found.unmapped] == [("old.q.weight", "new.q.weight"), ("b.weight", None)]
    assert found.unmapped[0].nearest[0] == "news.q.weight"


@pytest.mark.parametrize("text", ["a", "a=", "=b", "=", ""])
def test_a_map_needs_two_names(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_maps(["x=y", text])
    assert caught.value.found == text


@pytest.mark.parametrize(
    ("maps", "expected"),
    [
        (["old=new"], {"old.q.weight": "new.q.weight", "old.k.weight": "new.k.weight"}),
        (["old.*=new.*"], {"old.q.weight": "new.q.weight", "old.k.weight": "new.k.weight"}),
        (["old.q=other"], {"old.q.weight": "other.weight"}),
        (["old.q.weight=other.weight"], {"old.q.weight": "other.weight"}),
        (["old.q=other", "old=new"], {"old.q.weight": "other.weight", "old.k.weight": "new.k.weight"}),
        (["old=nothing"], {}),
    ],
)
def test_a_map_decides_for_the_names_that_it_concerns(maps: list[str], expected: Mapping[str, str]) -> None:
    names = ["old.q.weight", "old.k.weight", "_orig_mod.a.weight", "older.x.weight"]
    found = resolve(names, ["new.q.weight", "new.k.weight", "other.weight", "a.weight"], maps=parse_maps(maps))
    assert found.keys == {**expected, "_orig_mod.a.weight": "a.weight"}
    assert [lost.name for lost in found.unmapped] == [name for name in names if name not in found.keys]
    assert all(str(leaf) in found.rewrite for leaf in parse_maps(maps))


# Tied tensors


@pytest.mark.parametrize("same", [True, False])
def test_a_tied_alias_is_the_tensor_that_is_stored(tmp_path: Path, same: bool) -> None:
    """An adapter may hold both names of one tensor; only where they differ does the base get the second, too."""
    held: dict[str, Array] = {"d.weight": numbers(4, 3), "cls.predictions.bias": numbers(5)}
    config = {"architectures": ["BertForMaskedLM"], "model_type": "bert"}
    base = write_base(tmp_path / "base", held, shards=1, config=config)
    tensors: dict[str, Array] = {
        f"{PREFIX}d.lora_A.weight": numbers(2, 3),
        f"{PREFIX}d.lora_B.weight": numbers(4, 2),
        f"{PREFIX}cls.predictions.bias": numbers(5, seed=3),
        f"{PREFIX}cls.predictions.decoder.bias": numbers(5, seed=3 if same else 4),
    }
    adapter = write_adapter(tmp_path / "adapter", tensors, bias="all")
    made = plan_merge(base, [adapter])
    ledger = {entry.tensor.removeprefix(PREFIX): entry.outcome for entry in made.ledger}
    assert ledger["cls.predictions.bias"] == ledger["cls.predictions.decoder.bias"] == "replaced"
    written = {edit.key for file in made.files for edit in file.edits}
    assert ("cls.predictions.decoder.bias" in written) == (not same)


# Size


EXPERTS = [
    f"layers.{n}.mlp.experts.{e}.{m}.weight" for n in range(60) for e in range(333) for m in ("up", "down", "gate")
]
FEW = EXPERTS[::6]


@pytest.mark.parametrize(
    ("there", "here", "mapped"),
    [
        pytest.param("model.", "model.", True, id="identity"),
        pytest.param("_orig_mod.model.", "model.", True, id="wrapper"),
        pytest.param("model.language_model.", "language_model.model.", True, id="multimodal"),
        # The wrong base: the answer must come as fast, with every name in it.
        pytest.param("foo.", "model.", False, id="nothing fits"),
    ],
)
def test_ten_thousand_names_in_sixty_thousand_keys(there: str, here: str, mapped: bool) -> None:
    base, names = prefixed(here, EXPERTS), prefixed(there, FEW)
    with within(2):
        found = resolve(names, base)
    assert (len(found.keys), len(found.unmapped)) == ((len(names), 0) if mapped else (0, len(names)))
