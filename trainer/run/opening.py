"""Runs begun and gone on with: checked before anything is written, and left as they were found."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Generator, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import preprocess
from trainer import cache, checkpoint, concepts, console, environment, export, layouts, places, sampler
from trainer.args import TrainArgs
from trainer.dataset import read_manifest
from trainer.engine import Engine, EngineError
from trainer.hooks import Context, Hook, compose
from trainer.hooks.checkpoints import digest, fixed
from trainer.models import sniff
from trainer.optim import moved
from trainer.ranks import Ranks, RanksError
from trainer.run.assembly import assembled, idle
from trainer.run.error import RunError
from trainer.run.parts import Parts, check_names, chosen, layered
from trainer.run.resolving import resolve
from trainer.run.session import Session
from trainer.rundir import RunDir, atomic_write
from trainer.schedulers import SchedulerError
from trainer.types import ModelFamily

log = logging.getLogger(__name__)


@contextmanager
def opened(args: TrainArgs, *, code: bool = True, here: Ranks | None = None) -> Generator[Session]:
    """A new run, ready to train. Its directory is made here and never overwritten.

    Args:
        code: False refuses specs that would import code that the args chose.
        here: this process among several that all open the run, and of which the first writes.

    Raises:
        RunDirError, RunError, BaseModelError, PreprocessError, PartError: bad input; nothing is left behind.
        KeyboardInterrupt, RanksError: pictures that are prepared by then stay, for `resumed`.
    """
    check_names(args, code=code)
    args = places.located(args)
    root = Path(args.runtime.out) / args.runtime.name
    if root.exists():
        RunDir.create(root)  # refuses, before a model is loaded
    parts = chosen(args, code=code)
    with _ready(args, parts, here or Ranks()) as (family, engine):
        engine.here.barrier()  # all have seen that the name is free
        run_dir = RunDir.create(root) if engine.here.first else RunDir(root)
        try:
            with _logged(run_dir, engine.here):
                if engine.here.first:
                    atomic_write(run_dir.args, _json(places.kept(args).model_dump(mode="json")))
                session = _session(args, run_dir, family, engine, parts)
                with _closing(session):
                    yield session
        except BaseException as error:
            if engine.here.first and not run_dir.env.exists():  # nothing was trained
                if isinstance(error, KeyboardInterrupt | RanksError) and run_dir.cache.exists():  # hours of work
                    log.warning("what was prepared is kept; go on with --resume %s", root)
                else:
                    shutil.rmtree(root, ignore_errors=True)  # the name is free again
            raise


@contextmanager
def resumed(
    root: Path, args: TrainArgs | None = None, *, code: bool = True, here: Ranks | None = None
) -> Generator[Session]:
    """The run in `root`, continued from its newest complete checkpoint (from the start if there is none).

    Args:
        args: what the run's own args were changed to; None changes nothing.
        here: as for `opened`.

    Raises:
        RunDirError: `root` holds no run.
        RunError: args differ in an option that a run cannot change, or the base is another one now, or it was begun
            by another number of processes.
    """
    run_dir = RunDir.open(root)
    saved = TrainArgs.model_validate_json(run_dir.args.read_text(encoding="utf-8"))
    if saved.model.family == sniff.AUTO:  # written by hand, or by --print-args
        saved = saved.model_copy(update={"model": places.found(saved.model)})
    args = places.located(args or saved)
    here = here or Ranks()
    _check_same(saved, places.kept(args), root)
    _check_processes(run_dir, here.processes)
    check_names(args, code=code)
    parts = chosen(args, code=code)
    with _ready(args, parts, here) as (family, engine), _logged(run_dir, here):
        session = _session(args, run_dir, family, engine, parts)
        with _closing(session):
            yield session


@contextmanager
def _ready(args: TrainArgs, parts: Parts, here: Ranks) -> Generator[tuple[ModelFamily, Engine]]:
    """The machine and the base, which are checked before anything is written."""
    try:
        engine = Engine(args.runtime, args.model.dtype, here)
    except EngineError as error:
        raise RunError(str(error)) from error
    try:
        family = parts.family.load(args.model, engine.device)
        engine.suit(family.denoiser)
        try:
            layouts.merge(family, args.model.merge)
        except layouts.LayoutError as error:
            raise RunError(f"model.merge: {error}") from error
        if args.model.quantise != "none":  # of what was merged, rounded once
            family.quantise()
        try:
            sampler.check(family, args.sample.steps, args.sample.width, args.sample.height, args.sample.scheduler)
        except (sampler.SampleError, SchedulerError) as error:
            raise RunError(f"sample: {error}") from error
        if args.export.layouts and parts.adapter is not None:
            _rehearse_export(args, family, parts)
        yield family, engine
    finally:
        engine.release()


def _rehearse_export(args: TrainArgs, family: ModelFamily, parts: Parts) -> None:
    """Refuses layouts that have no words for what the adapter will learn, before pictures are prepared for hours."""
    adapters = layered(args, parts)
    try:
        for adapter in adapters:
            adapter.attach(family)
        export.check(family, adapters, args)
    except (ValueError, export.ExportError) as error:
        raise RunError(str(error)) from error
    finally:
        for adapter in reversed(adapters):
            adapter.detach()


def _session(args: TrainArgs, run_dir: RunDir, family: ModelFamily, engine: Engine, parts: Parts) -> Session:
    here = engine.here
    missing = not run_dir.dataset.exists()  # it is written last, so it is there whole or not at all
    here.barrier()  # all have looked
    if missing:
        sides = args.data.resolution or (family.resolution,)
        data, root = args.data, run_dir.root
        preprocess.build(data.source, root, data, sides, family.bucket_step, share=here.share)
    items = read_manifest(run_dir.dataset)
    args = resolve(places.kept(args), family, items, getattr(parts.adapter, "pace", 1.0))
    if here.first:
        atomic_write(run_dir.args, _json(args.model_dump(mode="json")))
    newest = run_dir.newest_checkpoint()
    start: int = engine.gathered([newest[0] if newest else 0])[0]
    context = Context(run_dir, args, start, tuple(str(item.file) for item in concepts.in_turn(items)))
    hooks = compose.made(parts.hooks, context, first=here.first)
    with ExitStack() as undo:
        for hook in hooks:
            undo.callback(hook.close)
        run = assembled(context, family, engine, items, parts, hooks)
        family.rest(idle(run))  # before the denoiser's weights are read, which stay
        if here.first:
            environment.record(run_dir.env, family, engine.device, start, here.processes)
        here.barrier()
        environment.check(run_dir.env, family)
        marks = moved.marks(run.components)
        if start:
            checkpoint.load(run_dir.checkpoint(start), run.adapters, run.optimizers, digest(args), [*hooks, engine])
        engine.equalise([parameter for named in run.components.values() for _, parameter in named])
        told = (run_dir.root, len(items), start, run.steps, _rates(args, run.components), _where(engine))
        log.info("%s: %d pictures, step %d of %d, %s, on %s", *told)
        undo.pop_all()  # whoever has the session closes it
    return Session(args, run_dir, run, start, here, marks)


def _rates(args: TrainArgs, trained: Iterable[str]) -> str:
    return ", ".join(f"lr {name} {getattr(args.optim, name).peak:g}" for name in sorted(trained))


def _where(engine: Engine) -> str:
    return f"{engine.processes} processes, {engine.device}" if engine.processes > 1 else str(engine.device)


def _check_same(saved: TrainArgs, args: TrainArgs, root: Path) -> None:
    """Refuses args that would make another run of it, naming them."""
    before, now = fixed(saved), fixed(args)
    changed = [f"{name} (was {before[name]!r}, now {now[name]!r})" for name in before if before[name] != now[name]]
    if changed:
        raise RunError(f"a resumed run cannot change {', '.join(changed)}; start a new run, or resume {root} as it was")


def _check_processes(run_dir: RunDir, processes: int) -> None:
    """Their number says which pictures make a step together, so the rest of the run must have the same."""
    before = environment.processes(run_dir.env)
    if before not in (None, processes):
        raise RunError(
            f"{run_dir.root} was begun by {before} processes, whose pictures make one step together, and this was "
            f"started as {processes}; resume it with {before} (torchrun --nproc_per_node {before}), or start a new run"
        )


def _logged(run_dir: RunDir, here: Ranks) -> AbstractContextManager[None]:
    return console.logged(run_dir.log) if here.first else nullcontext()


@contextmanager
def _closing(session: Session) -> Generator[None]:
    """However the run ends, files are closed and the base is as it was."""
    try:
        yield
    finally:
        with ExitStack() as all_of_them:  # one that fails keeps none from closing
            for hook in session.run.hooks:
                if isinstance(hook, Hook):
                    all_of_them.callback(hook.close)
        if isinstance(session.run.encode, cache.TextCache):
            session.run.encode.flush()
        for adapter in reversed(session.run.adapters):
            adapter.detach()
        session.run.family.rest(())


def _json(tree: Mapping[str, Any]) -> str:
    return json.dumps(tree, indent=2, ensure_ascii=False) + "\n"
