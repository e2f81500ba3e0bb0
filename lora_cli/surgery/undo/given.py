"""Adapters that are given, held against those that an undo file records."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from lora_cli.adapters.source import AdapterSource
from lora_cli.checkpoint.manifest import AdapterRecord, Manifest
from lora_cli.errors import WrongInputError
from lora_cli.surgery.identity import content_digest
from lora_cli.surgery.undo.advice import only_last


def check_given(
    manifest: Manifest, given: Sequence[AdapterSource], contents: Sequence[Mapping[str, str]], *, whole: bool
) -> None:
    """Refuse an adapter that was not part of the merge.

    Args:
        manifest: What the undo file says.
        given: The adapters.
        contents: What each tensor of each of them is.
        whole: Whether all tensors of an adapter must be those of the merge, and not only its factors.

    Raises:
        WrongInputError: With what is different.
    """
    said = manifest.adapters
    for source, content in zip(given, contents, strict=True):
        if not said:
            raise WrongInputError(
                "The undo file records no adapter, so this one was not merged",
                file=source.label,
                hint="get the undo file that the merge wrote, beside its output",
            )
        found = [differing(adapter, content) for adapter in said]
        if whole and not all(found) and content_digest(content) not in {adapter.digest for adapter in said}:
            found = [["its factors are the same, and other tensors of it are not"]] * len(said)
        if all(found):
            closest = min(range(len(said)), key=lambda number: len(found[number]))
            raise WrongInputError(
                "The adapter is not the one that was merged",
                file=source.label,
                expected="; ".join(f"{one.label}, content digest {one.digest}" for one in said),
                details=found[closest],
                hint=only_last(said),
            )


def differing(
    said: AdapterRecord, content: Mapping[str, str], by_part: Callable[[str], str] = lambda name: name
) -> list[str]:
    """How an adapter differs from the recorded one in what unmerging needs; one without factors must be it all."""
    if not said.factors:
        return [] if content_digest(content) == said.digest else ["it is another adapter"]
    return [
        f"{name} is {'another tensor' if by_part(name) in content else 'missing'}"
        for name, content_said in said.factors.items()
        if content.get(by_part(name)) != content_said
    ]


def check_used(manifest: Manifest, file: str) -> None:
    """Refuse an undo file by which an adapter that it records did nothing: then nothing shows that it was merged.

    Raises:
        WrongInputError: Names every such adapter.
    """
    used = {term.adapter for record in manifest.tensors for term in record.terms}
    idle = [
        said.label
        for number, said in enumerate(manifest.adapters)
        if said.weight != 0 and number not in used and not replaces(manifest)
    ]
    if idle or not manifest.adapters:
        raise WrongInputError(
            "The undo file says of no tensor that an adapter changed it",
            file=file,
            expected="what a merge wrote: it has a tensor that each adapter changed",
            details=idle,
            hint="name the base with --base, and the options of the merge: then no word of the undo file counts",
        )


def replaces(manifest: Manifest) -> bool:
    """Whether something came of an adapter that terms say nothing of: tensors that were replaced, or are new."""
    residual = any(record.how == "residual" for record in manifest.tensors)
    return residual or any(file.appended for file in manifest.files)
