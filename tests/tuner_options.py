"""Everything that PEFT can be told about adapters other than LoRA, each with the families that it is tried on.

A new option is one entry: what stands before its name makes the config, with the fields that all of a tuner's have.
"""

from __future__ import annotations

from typing import Final

import torch
from lora_options import ORIGINAL, head, kernel, old, table, written
from tuner_making import allocated, as_bone, biased, far, in_16_bits, norms, of, old_series, rounded

BERTS_OWN: Final = r"predictions\.decoder\.bias$"
"""The same tensor by another name."""
COPIES: Final = r"\.model\..+\.randlora_[AB]$"
"""What belongs to the whole model is in every module as well."""

loha, lokr = of("LOHA", r=4, alpha=6), of("LOKR", r=2, alpha=6)
adalora = of("ADALORA", init_r=6, target_r=3, lora_alpha=9, total_step=10, tinit=1, tfinal=2)
oft, boft = of("OFT", r=4, oft_block_size=0), of("BOFT", boft_block_size=4)
ia3, vera = of("IA3", feedforward_modules=[]), of("VERA", r=4)
randlora = of("RANDLORA", r=4, randlora_alpha=10, ignored=COPIES)
hra, miss, c3a = of("HRA", r=4, turns=True), of("MISS", r=4), of("C3A", block_size=8)
shira, fourier = of("SHIRA", r=2, random_seed=5), of("FOURIERFT", n_frequency=50, scaling=30.0)
vblora = of("VBLORA", r=2, num_vectors=16, vector_length=8, topk=3, init_vector_bank_bound=0.3)
ln = of("LN_TUNING", target_modules=norms)
beft, deft, delora = of("BEFT", target_modules=biased), of("DEFT", r=4), of("DELORA", r=4, delora_lambda=5)
frod = of("FROD", sparse_rate=0.05, progressbar=False, share=2**-16)
glora, gralora = of("GLORA", r=4), of("GRALORA", r=4, alpha=6)
hira, osf = of("HIRA", r=4), of("OSF", effective_rank=20, share=2**-16)
peanut, psoft, pvera = of("PEANUT", r=4), of("PSOFT", r=6, psoft_alpha=9), of("PVERA", r=4)
road, supertuning = of("ROAD", group_size=4), of("SUPERTUNING", sparsity=0.9)
tinylora, unilora = of("TINYLORA", r=3, u=5), of("UNILORA", r=4, theta_d_length=64)
tokens = of("TRAINABLE_TOKENS", token_indices=[3, 1, 40], target_modules=table)
wave = of("WAVEFT", n_frequency=50, scaling=3.0)

ALL_KINDS: Final = ("llama", "llama-bf16")

_LISTED: Final = (
    loha("", *ALL_KINDS, "llama-shards", "qwen2-vl", "dinov2-gated", "nomic"),
    loha("old", "llava", spelling=old),
    loha("patterns", rank_pattern={r"layers\.1\..*": 3, "q_proj": 2}, alpha_pattern={"down_proj": 9}),
    loha("kernels", "small", target_modules=["one", "two", "wide"]),
    loha("effective", "small", target_modules=["one", "two", "wide"], use_effective_conv2d=True),
    loha("kernel", "points", "groups", target_modules=kernel),
    loha("kernel-effective", "points", target_modules=[r"projection", "conv1"], use_effective_conv2d=True),
    loha("random", init_weights=False),
    loha("dropout", rank_dropout=0.3, module_dropout=0.2),
    loha("layers", target_modules=["q_proj", "up_proj"], layers_to_transform=[1]),
    loha("head-saved", modules_to_save=head, ignored=ORIGINAL),
    loha("16-bits", end=rounded, save=in_16_bits),
    loha("named", place="style"),
    # LoKr
    lokr("", *ALL_KINDS),
    lokr("full", r=16),
    lokr("both", r=1, decompose_both=True),
    lokr("factor", decompose_factor=2),
    lokr("factor-both", r=1, decompose_factor=4, decompose_both=True),
    lokr("odd-factor", decompose_factor=3),
    lokr("patterns", rank_pattern={"q_proj": 1, "down_proj": 9}, alpha_pattern={"layers.1.mlp.up_proj": 3}),
    lokr("kernels", "small", target_modules=["one", "two", "wide"], decompose_factor=2, r=1),
    lokr("kernels-full", "small", target_modules=["one", "two", "wide"], r=30),
    lokr("effective", "small", target_modules=["one", "two", "wide"], use_effective_conv2d=True, decompose_factor=2),
    lokr("kernel", "points", "groups", target_modules=kernel),
    lokr("kernel-effective", "points", target_modules=kernel, use_effective_conv2d=True, decompose_factor=1),
    lokr("lycoris", init_weights="lycoris"),
    lokr("dropout", rank_dropout=0.3, rank_dropout_scale=True),
    # AdaLoRA
    adalora("", *ALL_KINDS, "gpt2"),
    adalora("masked", end=allocated(5)),
    adalora("final", "llama", "gpt2", end=allocated(10)),  # some modules have no rank left
    adalora("no-alpha", lora_alpha=0),
    adalora("kernel", "points", target_modules=kernel),
    adalora("bias-all", "gpt2", bias="all"),
    adalora("head-saved", modules_to_save=head, ignored=ORIGINAL),
    # OFT
    oft("", *ALL_KINDS),
    oft("block", r=0, oft_block_size=8),
    oft("adjusted", r=0, oft_block_size=6),
    oft("adjusted-rank", r=7),
    oft("one-block", r=1),
    oft("shared", block_share=True),
    oft("coft", coft=True, eps=0.03),
    oft("coft-shared", coft=True, eps=0.03, block_share=True),
    oft("cayley", *ALL_KINDS, use_cayley_neumann=False),
    *(oft(f"terms-{terms}", num_cayley_neumann_terms=terms) for terms in (2, 3, 4, 7)),
    oft("old", begin=old_series, save=written(peft_version="0.17.1")),
    oft("random", init_weights=False),
    oft("table", "llama", "llama-tied", target_modules=table, ties=True),
    oft("kernel", "points", target_modules=["conv1"]),
    oft("bias-all", "bert", bias="all", target_modules=biased, ignored=BERTS_OWN),
    oft("bias-only", "bert", bias="oft_only", target_modules=biased),
    oft("head-saved", modules_to_save=head, ignored=ORIGINAL),
    # BOFT
    boft("", *ALL_KINDS, "bert"),
    boft("blocks", boft_block_size=0, boft_block_num=4),
    boft("butterfly", boft_n_butterfly_factor=2),
    boft("butterfly-blocks", boft_block_size=0, boft_block_num=4, boft_n_butterfly_factor=3),
    boft("random", init_weights=False),
    boft("kernel", "points", target_modules=["projection", "conv1"]),
    boft("kernel-butterfly", "points", target_modules=["conv1"], boft_block_size=2, boft_n_butterfly_factor=2),
    boft("bias-all", "bert", bias="all", target_modules=biased, ignored=BERTS_OWN),
    boft("bias-only", "bert", bias="boft_only", target_modules=biased),
    # IA3
    ia3("", *ALL_KINDS, "bert", "gpt2", "llama-shards", "dinov2-gated"),
    ia3("usual", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ia3("feed", "gpt2", target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"]),
    ia3("regex", target_modules=r".*\.[qv]_proj", feedforward_modules=r".*v_proj"),
    ia3("kernels", "small", target_modules=["two", "three", "wide"]),
    ia3("kernels-feed", "small", target_modules=["two", "three"], feedforward_modules=["two", "three"], begin=far),
    ia3("kernel", "points", "groups", target_modules=kernel, begin=far, turns=True),
    ia3("kernel-feed", "points", "groups", target_modules=kernel, feedforward_modules=kernel),
    ia3("random", init_ia3_weights=False),
    # VeRA
    vera("", *ALL_KINDS, "gpt2"),
    vera("regenerated", "llama", "gpt2", "llama-shards", save_projection=False, projection_prng_key=7),
    vera("layers", save_projection=False, target_modules=["q_proj", "up_proj"], layers_to_transform=[1]),
    vera("key", projection_prng_key=7),
    vera("initial", d_initial=0.7),
    vera("random", init_weights=False),
    vera("bias-all", "gpt2", bias="all"),
    vera("bias-only", "gpt2", bias="vera_only"),
    vera("named", place="style"),
    # RandLoRA
    randlora("", *ALL_KINDS, "gpt2"),
    randlora("odd", r=7),
    randlora("sparse", sparse=True),
    randlora("very-sparse", very_sparse=True),
    randlora("regenerated", "llama", "gpt2", save_projection=False, projection_prng_key=7),
    randlora("sparse-regenerated", sparse=True, save_projection=False),
    randlora("very-sparse-regenerated", very_sparse=True, sparse=True, save_projection=False),
    randlora("bias-all", "gpt2", bias="all"),
    # HRA
    hra("", *ALL_KINDS, "llama-shards", "dinov2-gated"),
    hra("orthogonal", apply_GS=True, init_weights=False),
    hra("odd", r=3),
    hra("one", r=1),
    hra("kernel", "points", target_modules=["projection", "conv1"]),
    hra("bias-all", "bert", bias="all", target_modules=biased, ignored=BERTS_OWN),
    hra("layers", target_modules=["q_proj", "up_proj"], layers_to_transform=[1]),
    # MiSS, and Bone, which it was
    miss("", *ALL_KINDS),
    miss("remainder", r=6),
    miss("bat", *ALL_KINDS, init_weights="bat"),
    miss("mini", init_weights="mini", mini_r=8),
    miss("mini-remainder", r=6, init_weights="mini", mini_r=4),
    miss("random", init_weights=False),
    miss("bone", save=as_bone),
    miss("bone-remainder", r=6, save=as_bone),
    miss("bone-bat", init_weights="bat", save=as_bone),
    # C3A
    c3a("", *ALL_KINDS),
    c3a("pattern", block_size_pattern={"q_proj": 4, "down_proj": 2, "up_proj": 1}),
    c3a("zero", init_weights=True),
    c3a("bias-only", "bert", bias="c3a_only", target_modules=biased),
    # SHiRA
    shira("", *ALL_KINDS),
    shira("unseeded", random_seed=None),
    # FourierFT
    fourier("", *ALL_KINDS, "gpt2"),
    fourier("seed", random_loc_seed=3),
    fourier("pattern", n_frequency_pattern={"q_proj": 9, "down_proj": 80}),
    fourier("bias-all", "gpt2", bias="all"),
    # VB-LoRA
    vblora("", *ALL_KINDS, "gpt2"),
    vblora("one", topk=1),
    vblora("top", save_only_topk_weights=True),
    vblora("many", num_vectors=300, save_only_topk_weights=True, topk=2),
    vblora("named", place="style", save_only_topk_weights=True),
    # LN tuning
    ln("", *ALL_KINDS, "bert", "gpt2"),
    ln("head-saved", modules_to_save=head, ignored=ORIGINAL, peft_merges=False),  # which leaves the head as it was
    # BEFT, DEFT, DeLoRA, FRoD
    beft("", "bert", "opt"),
    deft("", *ALL_KINDS, "gpt2"),
    deft("qr", decomposition_method="qr"),
    deft("para", para=True),
    deft("para-qr", para=True, decomposition_method="qr", turns=True),
    deft("alpha", alpha=9),
    deft("random", init_weights=False),
    delora("", *ALL_KINDS),
    delora("patterns", rank_pattern={"q_proj": 2}, lambda_pattern={"down_proj": 9}),
    delora("bias-only", "bert", bias="delora_only", target_modules=biased),
    frod("", "llama", "gpt2"),
    frod("named", place="style"),
    # GLoRA, GraLoRA, HiRA, OSF
    glora("", *ALL_KINDS, ignored=r"\.zeros$"),
    glora("biased", "opt", target_modules=biased),
    glora("vector", "opt", config_A_B="vector", config_C="vector", config_D_E="vector", target_modules=biased),
    glora(
        "constant",
        "opt",
        config_A_B="constant",
        config_C="none",
        config_D_E="none",
        target_modules=biased,
        begin=far,
        ignored=r"\.zeros$",
    ),
    glora("none", "opt", config_A_B="none", target_modules=biased, ignored=r"\.zeros$"),
    gralora("", *ALL_KINDS, "gpt2"),
    gralora("hybrid", hybrid_r=3),
    gralora("four", gralora_k=4),
    hira("", *ALL_KINDS, "gpt2", begin=far),
    hira("kernels", "small", target_modules=["one", "two", "three", "wide"]),
    hira("table", "llama", "llama-tied", target_modules=table, ties=True),
    hira("patterns", rank_pattern={"q_proj": 2}),
    osf(""),
    osf("share", effective_rank=0.75),
    # PEANuT, PVeRA, RoAd, super-tuning, TinyLoRA, tokens, Uni-LoRA
    peanut("", *ALL_KINDS),
    peanut("deep", depth=2, act_fn="gelu", scaling=0.7),
    pvera("", "llama", "gpt2"),
    pvera("regenerated", save_projection=False),
    *(road(kind.removeprefix("road_"), *ALL_KINDS, "bert", variant=kind) for kind in ("road_1", "road_2", "road_4")),
    supertuning("", *ALL_KINDS),
    supertuning("smallest", select_top=False),
    supertuning("rank", r=4),
    supertuning("regenerated", save_precomputed_indices=False),
    tinylora("tied", "llama", "gpt2", weight_tying=1.0),
    tinylora("table", target_modules=table),
    tokens("", "llama"),
    tokens("tied", "llama-tied", ties=True),
    unilora("indices", "llama", "gpt2", save_indices=True, begin=far),
    # WaveFT
    wave("", *ALL_KINDS, "gpt2"),
    wave("db3", wavelet_family="db3"),
    wave("coif", wavelet_family="coif2"),
    wave("sym", wavelet_family="sym5", random_loc_seed=3),
    wave("direct", use_idwt=False),
    wave("pattern", n_frequency_pattern={"q_proj": 9}),
    wave("proportional", proportional_parameters=True),
)
TUNERS: Final = {option.name: option for option in _LISTED}

_REFUSED: Final = (
    # What PEFT's own layers do is not what they merge: they add up where kernels overlap.
    oft("overlapping", "points", target_modules=kernel, refused=r"(?i)kernel|convolution"),
    # What no weight does: it depends on the inputs.
    of("LILY", r=4)(refused=r"(?i)lily"),
    of("POLY", r=4, task_type="CAUSAL_LM")(
        inputs=lambda given: given | {"task_ids": torch.zeros(2, dtype=torch.long)}, refused=r"(?i)poly"
    ),
    of("SHADOW", r=4, target_modules=None)(refused=r"(?i)shadow"),
    loha("as-xlora", save=written(peft_type="XLORA"), refused=r"(?i)x-?lora"),
    # What has no place: PEFT adds it to the outputs of layers that have no bias.
    beft("without", "llama", target_modules=["q_proj"], refused=r"q_proj\.bias"),
    # What neither file nor base tell: signs of singular vectors, the order of modules, clusters of rows.
    psoft(refused=r"(?i)psoft"),
    frod("regenerated", save_projection=False, refused="save_projection"),
    tinylora(refused=r"(?i)tinylora"),
    unilora(refused="save_indices"),
    loha("as-adamss", save=written(peft_type="ADAMSS"), refused=r"(?i)adamss"),
)
UNMERGED: Final = {option.name: option for option in _REFUSED}
