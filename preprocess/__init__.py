"""Pictures as people have them -> dataset.jsonl and decoded copies, in three stages. The source is only read."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from preprocess import buckets, captions, dedupe, masks, regular, rewrite, sheet, trigger, upscale
from preprocess import ingest as ingestion
from preprocess.crew import Crew
from preprocess.ingest import FEWEST, ingest
from preprocess.survey import survey
from preprocess.types import Item, Limits, PictureError, PreprocessError, Report, Skipped
from trainer.args import DataArgs
from trainer.rundir import RunDir, atomic_write
from trainer.share import ALONE, Share

__all__ = ["Item", "Limits", "PictureError", "PreprocessError", "Report", "Skipped", "build", "ingest"]

STAGES = {
    "ingest": ingestion.VERSION,
    "dedupe": dedupe.VERSION,
    "captions": captions.VERSION,
    "trigger": trigger.VERSION,
    "masks": masks.VERSION,
    "upscale": upscale.VERSION,
    "buckets": buckets.VERSION,
}

_log = logging.getLogger(__name__)


def build(
    source: str,
    out_dir: Path,
    data: DataArgs,
    resolution: int | Sequence[int],
    step: int,
    limits: Limits | None = None,
    *,
    share: Share = ALONE,
) -> Report:
    """Makes dataset.jsonl, skipped.jsonl, survey.json, the sheet and cache/pictures in out_dir from `source`.

    Done again after an interruption, or with other options, it makes only what is missing or has changed.

    Args:
        source: what `preprocess.source` opens: a folder, picture, archive or URL, or several.
        out_dir: the run directory.
        resolution: pixels; side of the square whose area every bucket keeps, or several to choose from.
        step: pixels; sides of buckets are its multiples.
        share: of several processes that all call this with one out_dir and get the same report. Each decodes its
            part of the pictures, the first writes the dataset, and none returns before it is there.

    Raises:
        PreprocessError: the source cannot be trained on; the message says why.
        OSError: the disk is full, or out_dir cannot be written.
    """
    run = RunDir(out_dir)
    if share.first:
        run.dataset.unlink(missing_ok=True)  # it is written last, so it is there whole or not at all
    sides = sorted({resolution} if isinstance(resolution, int) else set(resolution))
    allowed = [buckets.sizes(side, step) for side in sides]
    with Crew(data.workers, share, run.cache / "share") as crew:
        report = _made(source, out_dir, data, allowed, limits or data.limits, crew)
        if share.first:
            _write(run, report, data, crew)
        share.barrier()
    return report


def _made(
    source: str, out_dir: Path, data: DataArgs, allowed: Sequence[Sequence[buckets.Size]], limits: Limits, crew: Crew
) -> Report:
    found, skipped = ingest(
        source,
        out_dir,
        mask_sources=data.mask.sources if data.masks else (),
        limits=limits,
        private_urls=data.private_urls,
        hub=data.hub,
        caption_lines=data.caption_lines,
        embedded_captions=data.embedded_captions,
        all_captioned=data.captioner == "sidecar",
        crew=crew,
    )
    if data.dedupe != "off":
        bits = data.dedupe_bits if data.dedupe == "near" else None
        found, copies = dedupe.deduped(found, out_dir, bits=bits, crew=crew)
        _refuse_copies(found, copies)
        skipped += copies
    ordinary, left_out, same = regular.regular(data, found, out_dir, limits, crew)
    skipped += left_out
    if not crew.share.first:
        crew.share.barrier()  # models run on the first process alone; the others find in the cache what it found
    told = captions.captioned([*trigger.assigned(found, data), *ordinary], out_dir, data)
    told, ordinary = told[: len(found)], told[len(found) :]
    regular.check_captions(ordinary, data, sorted({item.trigger for item in told}))
    untriggered = [item.source for item in told if not trigger.named(item.caption, item.trigger)]
    rewrites, asked = rewrite.rewritten(told, out_dir, data) if data.rewrite == "model" else ({}, [])
    captioned = trigger.triggered(told, data, rewrites)
    masked, notes = masks.masked(captioned, out_dir, data.mask) if data.masks else (captioned, [])
    masked, enlarged = upscale.upscaled([*masked, *ordinary], out_dir, data, allowed)
    notes += [*same, *enlarged]
    if crew.share.first:
        crew.share.barrier()
    notes = [*asked, *notes]
    items = tuple(buckets.bucketed(item, *allowed) for item in masked)
    if data.crop == "mask":
        items = buckets.focused(items, out_dir, crew)
    for item in items:
        notes += buckets.remarks(item, data.upscale_limit)
    for note in notes:
        _log.warning("%s", note)
    return Report(items, tuple(skipped), tuple(notes), tuple(untriggered))


def _write(run: RunDir, report: Report, data: DataArgs, crew: Crew) -> None:
    atomic_write(run.skipped, _lines([asdict(skip) for skip in report.skipped]))
    atomic_write(run.survey, json.dumps(survey(report).json(), indent=2, ensure_ascii=False) + "\n")
    sheet.write(run, report.items, report.skipped, report.notes, data.sheet, crew)
    atomic_write(run.dataset, _lines([item.line(STAGES) for item in report.items]))


def _refuse_copies(left: Sequence[Item], copies: Sequence[Skipped]) -> None:
    if len(left) < FEWEST:
        raise PreprocessError(
            f"all pictures are copies of {left[0].source}, and at least {FEWEST} different ones are needed "
            f"({copies[0].file}: {copies[0].reason}); add others, or set data.dedupe to off"
        )


def _lines(objects: list[dict[str, object]]) -> str:
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in objects)
