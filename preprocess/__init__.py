"""Pictures as people have them -> dataset.jsonl and decoded copies, in three stages. The source is only read."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path

from preprocess import buckets, captions
from preprocess import ingest as ingestion
from preprocess.ingest import ingest
from preprocess.types import Item, Limits, PictureError, PreprocessError, Report, Skipped
from trainer.args import DataArgs
from trainer.rundir import RunDir, atomic_write

__all__ = ["Item", "Limits", "PictureError", "PreprocessError", "Report", "Skipped", "build", "ingest"]

STAGES = {"ingest": ingestion.VERSION, "captions": captions.VERSION, "buckets": buckets.VERSION}

_log = logging.getLogger(__name__)


def build(
    source: str, out_dir: Path, data: DataArgs, resolution: int, step: int, limits: Limits | None = None
) -> Report:
    """Makes out_dir/dataset.jsonl, out_dir/skipped.jsonl and out_dir/cache/pictures from `source`.

    Args:
        source: folder or .zip of pictures.
        out_dir: the run directory.
        resolution: pixels; side of the square whose area every bucket keeps.
        step: pixels; sides of buckets are its multiples.

    Raises:
        PreprocessError: the source cannot be trained on; the message says why.
        OSError: the disk is full, or out_dir cannot be written.
    """
    run = RunDir(out_dir)
    allowed = buckets.sizes(resolution, step)
    found, skipped = ingest(source, out_dir, masks=data.masks, limits=limits)
    captioned = (captions.captioned(item, data.trigger, data.caption) for item in found)
    items = tuple(buckets.bucketed(item, allowed) for item in captioned)
    notes = tuple(note for item in items if (note := buckets.remark(item)))
    for note in notes:
        _log.info("%s", note)
    atomic_write(run.skipped, _lines([asdict(skip) for skip in skipped]))
    atomic_write(run.dataset, _lines([item.line(STAGES) for item in items]))
    return Report(items, tuple(skipped), notes)


def _lines(objects: list[dict[str, object]]) -> str:
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in objects)
