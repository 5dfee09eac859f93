"""Removes what one stage keeps in a run directory, which then is made again when it is needed."""

from __future__ import annotations

from collections.abc import Mapping

from trainer.rundir import RunDir, RunDirError

# Stage -> its files, relative to the cache.
STAGES: Mapping[str, tuple[str, ...]] = {
    "pictures": ("pictures/*", "kept/*"),
    "masks": ("masks/*", "pictures/*.mask.png*"),
    "upscaled": ("upscaled/*",),
    "captions": ("captions/*",),
    "latents": ("latents/*",),
    "text": ("text/*",),
}
_IN_DATASET = {"pictures", "masks", "upscaled", "captions"}  # dataset.jsonl names what they made


def clean(run: RunDir, stage: str) -> int:
    """Removes the stage's files; how many there were.

    dataset.jsonl goes with what it names, so that the next run, or a resume, makes it from the source again.

    Raises:
        RunDirError: there is no such stage, or the folder holds no cache.
    """
    if stage not in STAGES:
        raise RunDirError(f"{stage!r} is no stage that keeps files (stages: {', '.join(sorted(STAGES))})")
    if not run.cache.is_dir():
        raise RunDirError(f"{run.root} holds no {run.cache.name}, so it is no run directory")
    files = {path for pattern in STAGES[stage] for path in run.cache.glob(pattern) if path.is_file()}
    if files and stage in _IN_DATASET:
        run.dataset.unlink(missing_ok=True)
    for path in files:
        path.unlink(missing_ok=True)  # another process may clean, too
    return len(files)
