"""The regularisation set: ordinary pictures of the concepts' kinds, which no trigger stands for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from preprocess import dedupe
from preprocess.crew import Crew
from preprocess.ingest import ingest
from preprocess.trigger import named
from preprocess.types import Item, Limits, PreprocessError, Skipped
from trainer.args import DataArgs

FOLDER = "regularisation"  # what its paths begin with, beside those of data.source
_NAMED = 5  # pictures that a message names


def regular(
    data: DataArgs, own: Sequence[Item], out: Path, limits: Limits, crew: Crew
) -> tuple[list[Item], list[Skipped], list[str]]:
    """The pictures of data.regularisation.source, what was left out of them, and notes; nothing where there is none.

    Copies among them are left out as data.dedupe says. One that is a training picture as well stays, with a note.

    Args:
        own: the pictures of the concepts.

    Raises:
        PreprocessError: the source cannot be used, or the concepts have a folder of the set's name.
    """
    source = data.regularisation.source
    if source is None:
        return [], [], []
    if taken := [item.source for item in own if item.source.startswith(f"{FOLDER}/")]:
        raise PreprocessError(
            f"data.source has a folder {FOLDER} ({taken[0]}), as the pictures of data.regularisation.source are "
            "called; give the folder another name"
        )
    found, skipped = ingest(
        source,
        out,
        prefix="regular.",
        limits=limits,
        private_urls=data.private_urls,
        caption_lines=data.caption_lines,
        embedded_captions=data.embedded_captions,
        crew=crew,
    )
    if data.dedupe != "off":
        bits = data.dedupe_bits if data.dedupe == "near" else None
        found, copies = dedupe.deduped(found, out, bits=bits, crew=crew)
        skipped += copies
    items = [replace(item, source=f"{FOLDER}/{item.source}", regular=True) for item in found]
    concepts = {item.sha256: item.source for item in own}
    notes = [
        f"{item.source}: it is the same picture as {concepts[item.sha256]}, so it is learned as the concept and as none"
        for item in items
        if item.sha256 in concepts
    ]
    return items, [replace(skip, file=f"{FOLDER}/{skip.file}") for skip in skipped], notes


def check_captions(items: Sequence[Item], data: DataArgs, triggers: Sequence[str]) -> None:
    """Raises PreprocessError when a regularisation picture has no caption, or one that names a trigger."""
    bare = [item.source for item in items if not item.caption and data.regularisation.caption is None]
    if bare:
        raise PreprocessError(
            f"{len(bare)} regularisation pictures have no caption ({_some(bare)}); give data.regularisation.caption, "
            "which names their kind (a photo of a dog), or captions beside them"
        )
    for trigger in triggers:
        naming = [item.source for item in items if any(named(c, trigger) for c in item.captions or (item.caption,))]
        if naming:
            raise PreprocessError(
                f"captions of {len(naming)} regularisation pictures name the trigger {trigger} ({_some(naming)}), "
                "which would teach it these pictures; change the captions, or move the pictures into data.source"
            )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
