"""`lora-cli inspect`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_cli.cli import effects
from lora_cli.cli import inspect_adapter as adapter
from lora_cli.cli import options as opt
from lora_cli.cli import spectrum as singular_values
from lora_cli.cli.draw import facts, grid, line
from lora_cli.cli.output import Output
from lora_cli.cli.text import count, few, shape, size

if TYPE_CHECKING:
    from rich.console import RenderableType

    from lora_cli.surgery.inspection import InspectResult, TensorInfo

ROWS = 40
"""Modules or tensors that are listed for people; JSON has all of them."""


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    opt.command(app, "inspect", "lora-cli inspect adapter/ --base base/")(inspect)


def inspect(
    output: Output,
    path: Annotated[str, typer.Argument(metavar="PATH", help="An adapter or a checkpoint: file, folder or Hub id.")],
    base: Annotated[
        str | None, typer.Option("--base", metavar="BASE", help="Show the base key that each module resolves to.")
    ] = None,
    spectrum: Annotated[
        bool,
        typer.Option(
            "--spectrum",
            help="Read LoRA's factors: the singular values of every change, and how much of the rank is used.",
        ),
    ] = False,
    alpha: opt.AlphaOption = None,
    scale: opt.ScaleOption = None,
    map_: opt.MapOption = None,
    allow_unmapped: opt.UnmappedOption = False,
    orientation: opt.OrientationOption = None,
    ignore_field: opt.IgnoreFieldOption = None,
    expert_layout: opt.ExpertLayoutOption = None,
    initial: opt.InitialOption = None,
) -> None:
    """Say what a file, folder or Hub id holds, from headers only.

    For an adapter: format, kind, and rank, alpha, scale and its source per module; and why it cannot be merged, if that
    is so. With --base also what a merge would do besides: untie, resize, repeat. For a checkpoint: architecture,
    shards, types, and what is quantised, tied or wrapped; and what the merge did that made it.

    With --spectrum the factors are read. For each module: the norm of the change, its largest singular value, how many
    hold 90% and 99% of the energy (of the squared norm), and all of them as bars as high as their share of the largest;
    from 17 on a bar is the mean of neighbours. Of a stack of experts the n-th value is the root mean square of the n-th
    values of all its matrices. Other tuners than LoRA have no such factors and are refused.
    """
    from lora_cli.surgery import inspect as surgery
    from lora_cli.surgery.placing import PlanOptions

    options = PlanOptions(
        maps=tuple(map_ or ()),
        allow_unmapped=allow_unmapped,
        orientation=orientation,
        read=opt.read_options(alpha, scale, ignore_field, initial, expert_layout),
    )
    result = surgery.inspect(path, base=base, options=options, spectrum=spectrum, progress=output.progress())
    for warning in result.warnings:
        output.warn(warning)
    output.result(result, "inspect", lambda: view(result, everything=output.verbose))


def view(result: InspectResult, *, everything: bool) -> Iterator[RenderableType]:
    """What was found, for people."""
    yield line((f"{result.kind} ", "bold"), (result.label, "bold cyan"))
    yield facts([*_file_rows(result), *adapter.rows(result), *_checkpoint_rows(result)])
    listed = len(result.spectrum.modules if result.spectrum else result.modules or result.tensors)
    rows = listed if everything else ROWS
    if result.modules:
        yield facts(adapter.strengths(result))
    if result.spectrum:
        yield from singular_values.view(result.spectrum, rows)
    elif result.modules:
        yield line()
        yield from adapter.modules(result.modules, rows)
    elif result.tensors:
        yield line()
        heads = ["tensor", "type", "shape", *(["shard"] if len(result.shards) > 1 else [])]
        yield grid(heads, [_tensor_row(tensor)[: len(heads)] for tensor in result.tensors[:rows]])
    if listed > rows:
        yield line(f"… and {listed - rows:,} more (-v or --json lists all)", style="dim")


def _file_rows(result: InspectResult) -> Iterator[tuple[str, object]]:
    dtypes = ", ".join(f"{name} ({amount:,})" for name, amount in result.dtypes.items())
    yield "format", f"{result.format}: {result.evidence}"
    yield "kind", result.adapter_kind
    yield "made for", result.base
    yield "architecture", result.architecture
    yield "parameters", f"{result.parameters:,} ({size(result.bytes)})"
    yield "types", dtypes


def _checkpoint_rows(result: InspectResult) -> Iterator[tuple[str, object]]:
    yield "shards", _shards(result)
    yield "tied", _tied(result)
    yield (
        "quantised",
        f"{result.quantised}, {count(result.quantised_tensors, 'tensor')}" if result.quantised else None,
    )
    yield "wrapped", f"{count(len(result.wrapped), 'module')} with factors beside" if result.wrapped else None
    yield "receipt", _receipt(result)
    if result.kind != "adapter":
        yield from effects.rows(result.effects)
    yield "undo", _undo(result)


def _tied(result: InspectResult) -> str | None:
    """What a model has as one tensor, or that its config says so of what its files do not have as one."""
    if result.kind == "adapter":
        return None
    if result.ties:
        return few(f"{name} is {key}" for name, key in result.ties.items())
    return None if result.tied is None else "says the config; nothing in the files is" if result.tied else "no"


def _tensor_row(tensor: TensorInfo) -> list[object]:
    return [tensor.key, tensor.dtype, shape(tensor.shape), tensor.shard.removesuffix(".safetensors")]


def _shards(result: InspectResult) -> str | None:
    if not result.shards:
        return None
    return f"{len(result.shards)}: {result.shards[0]}" + (" …" if len(result.shards) > 1 else "")


def _receipt(result: InspectResult) -> str | None:
    if not result.receipt:
        return None
    adapters = result.receipt.get("adapters")
    names = (
        [str(item.get("label")) for item in adapters if isinstance(item, dict)] if isinstance(adapters, list) else []
    )
    label, operation = _label(result.receipt.get("base")), result.receipt.get("operation")
    if operation == "inject":
        return _inject_receipt(result.receipt, label)
    return f"{operation} of {label} + {', '.join(names)}"


def _inject_receipt(receipt: Mapping[str, Any], base: str | None) -> str:
    """What an injection wrote: a fresh adapter, what that left of its base, or both in one checkpoint."""
    options = receipt.get("options")
    said = options if isinstance(options, dict) else {}
    adapter, residual = _label(receipt.get("adapter")), _label(receipt.get("residual"))
    if adapter is not None:
        return f"residual of {base} ({said.get('init')}), for adapter {adapter}"
    if residual is not None:
        return f"inject ({said.get('init')}) of {base}; fits {residual} alone"
    return f"inject ({said.get('layout')}) of {base}"


def _label(said: object) -> str | None:
    return str(said["label"]) if isinstance(said, dict) and "label" in said else None


def _undo(result: InspectResult) -> str | None:
    undo = result.undo
    if undo is None:
        return "not possible: there is no undo file" if result.kind == "merged" else None
    if undo.problem:
        return f"not possible: {undo.path}: {undo.problem}"
    needs = f"with {', '.join(undo.needs)}" if undo.needs else "and nothing else"
    return f"{undo.path} ({size(undo.bytes)}) {needs} gives back {undo.base} bit for bit"
