"""Inject: make a fresh adapter for a checkpoint, as files, from headers alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_cli.adapters.spelling import spelling
from lora_cli.adapters.target_files import expand
from lora_cli.adapters.targets import ALL_LINEAR, Selected, select
from lora_cli.adapters.ties import ties
from lora_cli.adapters.wrapped import refuse_other_factors
from lora_cli.checkpoint.checkpoint import Checkpoint
from lora_cli.checkpoint.hub import local_path
from lora_cli.errors import UnsupportedError, UsageError
from lora_cli.progress import SILENT, Progress
from lora_cli.surgery.inject_options import InjectOptions, Layout
from lora_cli.surgery.injecting import Writing, wrap_name
from lora_cli.surgery.injection import Injection
from lora_cli.surgery.merge import check_output, output_path
from lora_cli.surgery.plan import Plan
from lora_cli.surgery.principal import check_sides
from lora_cli.surgery.residual import Residual, ResidualBase
from lora_cli.surgery.results import Reference, measured, open_base
from lora_cli.surgery.workers import default_threads


@dataclass(frozen=True)
class InjectedModule:
    """A module that got an adapter.

    Attributes:
        key: The base key of its weight.
        rank: Rank of its factors.
        shape: (out, in) of the matrix that they multiply to; see `adapters.targets.Selected`.
    """

    key: str
    rank: int
    shape: tuple[int, int]


@dataclass(frozen=True)
class InjectResult:
    """What an injection wrote.

    Attributes:
        out: The output.
        layout: `adapter` for a PEFT folder, `wrapped` for a whole checkpoint.
        rank: Rank of all factors.
        alpha: Numerator of the scale.
        modules: The modules that got factors, in the order of the base.
        parameters: Elements of all factors.
        trainable_fraction: Their share of the elements of base and factors together.
        files: Names of the files written.
        left_out: Files of the base's folder that were not taken along.
        warnings: What a person should look at.
        bytes_written: Bytes of all output files.
        seconds: Wall time.
        peak_rss_bytes: Most memory that one process had: this one, or any that it has waited for.
        residual: The changed base that belongs to the adapter; None for inits that leave the base as it is.
    """

    out: str
    layout: str
    rank: int
    alpha: float
    modules: tuple[InjectedModule, ...]
    parameters: int
    trainable_fraction: float
    files: tuple[str, ...]
    left_out: tuple[str, ...]
    warnings: tuple[str, ...]
    bytes_written: int
    seconds: float
    peak_rss_bytes: int
    residual: Residual | None = None


def inject(
    base: Reference,
    out: Reference,
    *,
    rank: int,
    base_out: Reference = "",
    alpha: float | None = None,
    targets: Sequence[str] = (ALL_LINEAR,),
    exclude: Sequence[str] = (),
    init: str = "kaiming",
    std: float | None = None,
    layout: Layout = "adapter",
    rslora: bool = False,
    dtype: str = "fp32",
    seed: int = 0,
    force: bool = False,
    resume: bool = False,
    threads: int | None = None,
    memory: int | None = None,
    progress: Progress = SILENT,
    on_plan: Callable[[Plan], None] | None = None,
) -> InjectResult:
    """Write a fresh adapter for `base` to `out`; merging it gives back the base byte for byte, but for some inits.

    The bytes are the same on every machine, whatever `threads` and `memory` are.

    The inits `pissa`, `pissa_niter_N` and `olora` take the factors from the base's weights (see
    `arithmetic.principal`), one weight in float64 at a time in each worker. What is left of the base goes to
    `base_out`: the adapter fits that alone, so train and merge it with that. Merging it at once gives the base again to
    within one unit in the last place of the larger of a weight and what is left of it. These factors may differ between
    machines, the rest follows from them exactly. The receipt beside the adapter has the digest of a weight of
    `base_out`, and what opens the adapter refuses other bases; an adapter that was saved without it cannot be told.

    Args:
        base: A `.safetensors` file, a folder, or a Hub id.
        out: A folder that is absent or empty; for the layout `wrapped` and a base of one file also a `.safetensors`
            file.
        rank: Rows of A and columns of B.
        base_out: Where what is left of the base is written; needed for inits that change it, and for them alone.
        alpha: Numerator of the scale; the rank unless given.
        targets: Presets (`all-linear`, `attention`, `mlp`), globs on dotted names, `re:` with a regular expression, or
            YAML files of these.
        exclude: Presets and patterns of modules to leave out.
        init: `kaiming`, `gaussian` or `orthogonal`, for A, with B zero; or `pissa`, `pissa_niter_N` or `olora`.
        std: Standard deviation of `gaussian`.
        layout: `adapter` for a PEFT folder, `wrapped` for the whole checkpoint with factors beside its weights.
        rslora: Divide alpha by the square root of the rank instead of the rank.
        dtype: `fp32`, `bf16` or `fp16`, for the factors.
        seed: Decides the numbers of A, together with the names of the modules.
        force: Replace outputs where a receipt says that lora-cli wrote all of them.
        resume: Go on with a run of the same request that was cut off, and leave finished files to another if this one
            is; see `surgery.resuming`.
        threads: Units of work at once; all cores by default.
        memory: Bytes that buffers and factors may take; 256 MiB, or what one tensor needs, unless given.
        progress: Hears of every step.
        on_plan: Is given the plan before anything is written.

    Raises:
        UsageError: Options that make no sense.
        NamesError: Patterns that match nothing.
        UnsupportedError: A quantised base, tied weights as targets, or a base that has factors already.
        LoraCliError: Anything else that does not fit; see the error classes.
    """
    options = InjectOptions(
        rank=rank,
        alpha=alpha,
        targets=tuple(targets),
        exclude=tuple(exclude),
        init=init,
        std=std,
        layout=layout,
        rslora=rslora,
        dtype=dtype,
        seed=seed,
    )
    with measured() as run:
        injection = prepare(base, options, progress=progress)
        target = output_path(out)
        made = injection.plan().for_output(target)
        left = residual_base(injection, target, base_out)
        check_injection_output(made, target, left, options, force=force)
        if on_plan:
            on_plan(made)
        how = Writing(injection, made, target, left, force, resume, threads or default_threads(), memory, progress)
        written, residual = how.write()
    parameters = sum(math.prod(fresh.shape) for m in injection.modules for fresh in injection.factors(m))
    base_parameters = sum(math.prod(tensor.shape) for tensor in injection.base.tensors.values())
    return InjectResult(
        out=str(out),
        layout=options.layout,
        rank=rank,
        alpha=options.scale.alpha,
        modules=tuple(InjectedModule(m.key, rank, (m.out, m.inner)) for m in injection.modules),
        parameters=parameters,
        trainable_fraction=parameters / (parameters + base_parameters),
        files=how.names,
        left_out=made.left_out,
        warnings=made.warnings,
        bytes_written=written,
        seconds=run.seconds,
        peak_rss_bytes=run.peak_rss_bytes,
        residual=residual,
    )


def residual_base(injection: Injection, target: Path, base_out: Reference) -> ResidualBase | None:
    """What is left of the base of an injection, where its init changes it.

    Raises:
        UsageError: No place for it, or a place that nothing will be written to.
    """
    init, principal = injection.options.init, injection.options.principal
    if principal and not str(base_out):
        raise UsageError(
            f"The init {init} changes the base, and nothing says where the changed one goes",
            hint="say where with --base-out RESIDUAL",
        )
    if str(base_out) and not principal:
        raise UsageError(
            f"The init {init} leaves the base as it is", found=f"--base-out {base_out}", hint="leave out --base-out"
        )
    return ResidualBase(injection, target, output_path(base_out)) if principal else None


def prepare(base: Reference, options: InjectOptions, *, progress: Progress = SILENT) -> Injection:
    """Open a base and choose its targets; `Injection.plan` then says what would be written.

    Raises:
        LoraCliError: As for `inject`.
    """
    wanted, unwanted = expand(options.targets, options.exclude)
    checkpoint = open_base(base, progress)
    refuse_other_factors(checkpoint, ())
    selection = select(checkpoint, wanted, unwanted)
    tied = _ties(checkpoint, selection.modules)
    for note in selection.notes:
        progress.note(note)
    for name, alias in tied.items():
        progress.note(f"{name} is one tensor with {alias}; the adapter is for {name} alone, and merging stores both")
    if options.principal:
        _refuse_ties(checkpoint, tied)
        check_sides(selection.modules, options.rank, checkpoint.label)
    names = spelling(checkpoint.config, checkpoint.tensors).names
    for warning in _warnings(selection.modules, options, names):
        progress.warn(warning)
    # A local path wins when it exists; what was opened otherwise came from the Hub.
    from_hub = local_path(str(base)) is None
    settled = dataclasses.replace(options, targets=wanted, exclude=unwanted)
    return Injection(checkpoint, selection.modules, settled, checkpoint.label if from_hub else None, names=names)


def _ties(checkpoint: Checkpoint, modules: Sequence[Selected]) -> dict[str, str]:
    """Modules whose weight the model also has under another name, with that name."""
    tied = {key: alias for alias, key in ties(checkpoint.config, checkpoint.tensors).items()}
    return {module.module: tied[module.key] for module in modules if module.key in tied}


def _refuse_ties(checkpoint: Checkpoint, tied: Mapping[str, str]) -> None:
    """Refuse what would change a weight for all of its uses: factors that are taken off it."""
    if tied:
        raise UnsupportedError(
            "The init would take factors off a weight that the model uses twice",
            file=checkpoint.label,
            details=[f"{name} is one tensor with {alias}" for name, alias in tied.items()],
            hint="leave them out with --exclude, or use an init that leaves the base as it is",
        )


def check_injection_output(
    made: Plan, target: Path, left: ResidualBase | None, options: InjectOptions, *, force: bool
) -> None:
    """Refuse an output that cannot be written, before any work.

    Raises:
        UsageError: No output given, or a file where a folder is needed.
        OutputExistsError: Something is there, or it is an input.
    """
    if options.layout == "adapter" and target.suffix == ".safetensors":
        raise UsageError("A PEFT adapter is a folder", file=target, hint="name a folder with -o")
    check_output(made, target, force=force, beside=[wrap_name(target)])
    if left is not None:
        left.check(made, force=force)


def _warnings(modules: Sequence[Selected], options: InjectOptions, names: Collection[str]) -> list[str]:
    warnings = []
    small = [module for module in modules if min(module.out, module.inner) < options.rank]
    if small:
        first = small[0]
        warnings.append(
            f"rank {options.rank} is more than {len(small)} of {len(modules)} modules can use: "
            f"{first.module} is ({first.out} × {first.inner})"
        )
    if options.layout != "adapter":
        return warnings
    experts = [module.module for module in modules if "experts" in module.module.split(".")]
    if experts:
        warnings.append(
            f"{len(experts)} targets are single experts, which transformers 5 holds fused: PEFT may not find them there"
        )
    others = [m.module for m in modules if m.key not in names and m.module not in experts]
    if others:
        warnings.append(
            f"{len(others)} targets, such as {others[0]}, are other modules in transformers 5, which splits or joins "
            "them: PEFT will not find them there"
        )
    return warnings
