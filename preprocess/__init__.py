"""Pictures as people have them -> dataset.jsonl and decoded copies, by a chain of stages. The source is only read."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from preprocess import buckets, sheet, stages
from preprocess import ingest as ingestion
from preprocess.crew import Crew
from preprocess.ingest import ingest
from preprocess.survey import survey
from preprocess.types import Item, Limits, PictureError, PreprocessError, Report, Skipped
from trainer.args import DataArgs
from trainer.rundir import RunDir, atomic_write
from trainer.share import ALONE, Share

__all__ = ["Item", "Limits", "PictureError", "PreprocessError", "Report", "Skipped", "build", "ingest"]

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
        PartError: data.stages names no stage.
        OSError: the disk is full, or out_dir cannot be written.
    """
    run = RunDir(out_dir)
    chain = stages.chain(data.stages)
    if share.first:
        run.dataset.unlink(missing_ok=True)  # it is written last, so it is there whole or not at all
    sides = sorted({resolution} if isinstance(resolution, int) else set(resolution))
    allowed = [buckets.sizes(side, step) for side in sides]
    with Crew(data.workers, share, run.cache / "share") as crew:
        report = _made(source, chain, stages.Setting(out_dir, data, allowed, limits or data.limits, crew))
        if share.first:
            _write(run, report, data, crew, {"ingest": ingestion.VERSION, **{x.name: x.stage.version for x in chain}})
        share.barrier()
    return report


def _made(source: str, chain: Sequence[stages.Link], setting: stages.Setting) -> Report:
    data = setting.data
    found, skipped = ingest(
        source,
        setting.root,
        mask_sources=data.mask.sources if data.masks else (),
        limits=setting.limits,
        private_urls=data.private_urls,
        hub=data.hub,
        caption_lines=data.caption_lines,
        embedded_captions=data.embedded_captions,
        all_captioned=data.captioner == "sidecar",
        crew=setting.crew,
    )
    report = Report(tuple(found), tuple(skipped), ())
    for link in chain:
        report = link(report, setting)
    for note in report.notes:
        _log.warning("%s", note)
    return report


def _write(run: RunDir, report: Report, data: DataArgs, crew: Crew, versions: dict[str, int]) -> None:
    atomic_write(run.skipped, _lines([asdict(skip) for skip in report.skipped]))
    atomic_write(run.survey, json.dumps(survey(report).json(), indent=2, ensure_ascii=False) + "\n")
    sheet.write(run, report.items, report.skipped, report.notes, data.sheet, crew)
    atomic_write(run.dataset, _lines([item.line(versions) for item in report.items]))


def _lines(objects: list[dict[str, object]]) -> str:
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in objects)
