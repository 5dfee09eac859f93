"""The composition root: args -> a `Session` that trains, exports and reports. The only room that knows them all."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

import preprocess
from preprocess import maskers, stages, upscalers
from preprocess.captioners import CAPTIONERS
from trainer import (
    cache,
    checkpoint,
    concepts,
    console,
    environment,
    export,
    layouts,
    material,
    mixture,
    optim,
    places,
    registry,
    report,
    sampler,
)
from trainer.adapters import ADAPTERS
from trainer.adapters.layered import Layers
from trainer.adapters.textual_inversion import Concept, TextualInversion
from trainer.args import (
    AdapterArgs,
    CaptionModelArgs,
    DataArgs,
    TrainArgs,
    TriggerModelArgs,
)
from trainer.dataset import Item, read_manifest
from trainer.engine import Engine, EngineError
from trainer.events import Attached, ModelLoaded
from trainer.hooks import Context, Hook, compose, presented
from trainer.hooks.checkpoints import Checkpoints, digest, fixed
from trainer.hooks.samples import Samples as SampleRows
from trainer.listeners import Listeners
from trainer.loop import Run, train
from trainer.models import FAMILIES, sniff
from trainer.objectives import OBJECTIVES
from trainer.optim import moved
from trainer.ranks import Ranks, RanksError
from trainer.rundir import RunDir, atomic_write
from trainer.schedulers import SchedulerError
from trainer.seed import derive
from trainer.types import Adapter, Cond, HasScales, ModelFamily, Predict, Samples, Step, Watch

_Model = TypeVar("_Model", CaptionModelArgs, TriggerModelArgs)

log = logging.getLogger(__name__)


class RunError(ValueError):
    """Args that contradict the base, the machine or the run that they should continue. One sentence."""


@dataclass
class Session:
    """One process of a run. `steps` does the work while it is iterated."""

    args: TrainArgs  # resolved
    dir: RunDir
    run: Run
    start: int  # updates done before
    here: Ranks
    marks: Mapping[tuple[str, str], str]  # of every trained tensor, before the first update

    def steps(self) -> Iterator[Step]:
        """Yields after each update, on every process; then the first makes the sample rows, exports and report.

        Raises:
            NeverMoved: after all that, if a trained tensor is what it was before the run.
        """
        done = self.start
        for step in train(self.run, self.start):
            done = step.step
            yield step
        if self.here.first:
            self._finish(done)
        self.here.barrier()
        moved.check(self.marks, self.run.components, moved.updates(self.run.optimizers, self.run.lr, done))

    def agreed(self, wish: bool) -> bool:
        """Whether any process wishes it: asked by all of them between the same two updates."""
        return any(self.here.gathered([wish]))

    def _finish(self, done: int) -> None:
        name, run = self.args.runtime.name, self.run
        with presented(run, "export"):
            files = export.export(self.dir.export, name, run.family, run.adapters, self.args, self._made(done))
        report.write(self.dir)
        log.info("done: %s", ", ".join(str(path) for path in [*files, self.dir.report]))

    def _made(self, done: int) -> export.Made:
        """What headers of exported files may say of this run."""
        runtime, items = self.args.runtime, [item for item in read_manifest(self.dir.dataset) if not item.regular]
        captions: dict[str, list[str]] = {}
        for item in items:
            captions.setdefault(concepts.trigger_of(item, self.args.data), []).append(item.caption)
        dataset = json.dumps(sorted((item.sha256, item.caption) for item in items))
        drawn = next((hook.after(self.run) for hook in self.run.hooks if isinstance(hook, SampleRows)), {})
        return export.Made(
            steps=done,
            batch=runtime.batch_size * runtime.accumulate * self.here.processes,
            captions=captions,
            buckets=Counter(item.bucket for item in items),
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            digests={"args": digest(self.args), "dataset": hashlib.sha256(dataset.encode()).hexdigest()[:16]},
            samples=drawn,
            likeness=self._likeness(drawn, items),
        )

    def _likeness(self, drawn: Mapping[float, Sequence[Path]], items: Sequence[Item]) -> dict[float, export.Likeness]:
        """Of the sample rows, where there are several and the base has a CLIP, which knows no trigger."""
        folder = self.run.family.clip_folders.get("text_encoder")
        if folder is None or len(drawn) < 2:
            return {}
        prompts = [concepts.ordinary(prompt, self.args.data) for prompt in self.args.sample.prompts]
        tokenizer: Any = self.run.family.tokenizers["text_encoder"]
        return export.measure(folder, drawn, prompts, [Path(item.file) for item in items], tokenizer)

    def checkpoint(self, step: int) -> Path:
        """Saves where the run is, between two updates."""
        return next(hook for hook in self.run.hooks if isinstance(hook, Checkpoints)).save(self.run, step)


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
    _check_names(args, code=code)
    args = places.located(args)
    root = Path(args.runtime.out) / args.runtime.name
    if root.exists():
        RunDir.create(root)  # refuses, before a model is loaded
    parts = _parts(args, code=code)
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
    _check_names(args, code=code)
    parts = _parts(args, code=code)
    with _ready(args, parts, here) as (family, engine), _logged(run_dir, here):
        session = _session(args, run_dir, family, engine, parts)
        with _closing(session):
            yield session


def resolve(args: TrainArgs, family: ModelFamily, items: Sequence[Item]) -> TrainArgs:
    """The tree with every derived value filled in; resolving it again changes nothing."""
    data = concepts.filled(args.data, items)
    try:
        prompts = concepts.prompts(args.sample.prompts, data, items, args.sample.pictures)
    except concepts.ConceptError as error:
        raise RunError(str(error)) from error
    return args.model_copy(
        update={
            "adapter": args.adapter.model_copy(update={"alpha": _alpha(args.adapter)}),
            "data": data.model_copy(update={"resolution": args.data.resolution or (family.resolution,)}),
            "optim": optim.filled(args.optim, _trained(args)),
            "runtime": args.runtime.model_copy(update={"steps": args.runtime.updates(_counted(args.data, items))}),
            "sample": args.sample.model_copy(update={"prompts": prompts}),
        }
    )


def _trained(args: TrainArgs) -> set[str]:
    """The components."""
    layers, text = args.adapter.kind != "none", args.adapter.text.train
    parts = {"rows": args.text.tokens > 0, "adapter": layers, "text": layers and text}
    return {name for name, is_there in parts.items() if is_there}


def _alpha(adapter: AdapterArgs) -> float | None:
    return adapter.alpha or (float(adapter.rank) if adapter.scaled_by_alpha else None)


def _counted(data: DataArgs, items: Sequence[Item]) -> int:
    """Pictures of concepts, and those of the regularisation set that go with them."""
    return data.regularisation.showings(sum(not item.regular for item in items))


# --- putting a run together


@dataclass(frozen=True)
class _Parts:
    """The classes that the args name, found before anything is loaded or written."""

    family: Any
    adapter: Any  # None for adapter.kind none
    objective: Any
    hooks: tuple[compose.Chosen, ...]


def _check_names(args: TrainArgs, *, code: bool) -> None:
    """Refuses what names no part of preprocessing and no optimizer, in milliseconds, before the base is looked at."""
    registry.load(CAPTIONERS, args.data.captioner, "data.captioner", code=code)  # the stage makes it anew
    for name in args.data.mask.sources if args.data.masks else ():
        maskers.kind(name, code=code)
    upscalers.kind(args.data.upscale.by, code=code)
    optim.check(args.optim, code=code)
    stages.chain(args.data.stages, code=code)


def _parts(args: TrainArgs, *, code: bool) -> _Parts:
    adapter = args.adapter.kind
    return _Parts(
        family=registry.load(FAMILIES, args.model.family, "model.family", code=code),
        adapter=None if adapter == "none" else registry.load(ADAPTERS, adapter, "adapter.kind", code=code),
        objective=registry.load(OBJECTIVES, args.objective.kind, "objective.kind", code=code),
        hooks=compose.chosen(args.hooks, code=code),
    )


@contextmanager
def _ready(args: TrainArgs, parts: _Parts, here: Ranks) -> Generator[tuple[ModelFamily, Engine]]:
    """The machine and the base, which are checked before anything is written."""
    try:
        engine = Engine(args.runtime, args.model.dtype, here)
    except EngineError as error:
        raise RunError(str(error)) from error
    try:
        family = parts.family.load(args.model, engine.device)
        try:
            layouts.merge(family, args.model.merge)
        except layouts.LayoutError as error:
            raise RunError(f"model.merge: {error}") from error
        try:
            sampler.check(family, args.sample.steps, args.sample.width, args.sample.height, args.sample.scheduler)
        except (sampler.SampleError, SchedulerError) as error:
            raise RunError(f"sample: {error}") from error
        if args.export.layouts and parts.adapter is not None:
            _rehearse_export(args, family, parts)
        yield family, engine
    finally:
        engine.release()


def _rehearse_export(args: TrainArgs, family: ModelFamily, parts: _Parts) -> None:
    """Refuses layouts that have no words for what the adapter will learn, before pictures are prepared for hours."""
    adapters = _layered(args, parts)
    try:
        for adapter in adapters:
            adapter.attach(family)
        export.check(family, adapters, args)
    except (ValueError, export.ExportError) as error:
        raise RunError(str(error)) from error
    finally:
        for adapter in reversed(adapters):
            adapter.detach()


def _session(args: TrainArgs, run_dir: RunDir, family: ModelFamily, engine: Engine, parts: _Parts) -> Session:
    here = engine.here
    missing = not run_dir.dataset.exists()  # it is written last, so it is there whole or not at all
    here.barrier()  # all have looked
    if missing:
        sides = args.data.resolution or (family.resolution,)
        data, root = args.data, run_dir.root
        preprocess.build(data.source, root, data, sides, family.bucket_step, share=here.share)
    items = read_manifest(run_dir.dataset)
    args = resolve(places.kept(args), family, items)
    if here.first:
        atomic_write(run_dir.args, _json(args.model_dump(mode="json")))
    newest = run_dir.newest_checkpoint()
    start: int = engine.gathered([newest[0] if newest else 0])[0]
    context = Context(run_dir, args, start, tuple(str(item.file) for item in concepts.in_turn(items)))
    hooks = compose.made(parts.hooks, context, first=here.first)
    with ExitStack() as undo:
        for hook in hooks:
            undo.callback(hook.close)
        run = _run(context, family, engine, items, parts, hooks)
        if here.first:
            environment.record(run_dir.env, family, engine.device, start, here.processes)
        here.barrier()
        environment.check(run_dir.env, family)
        marks = moved.marks(run.components)
        if start:
            checkpoint.load(run_dir.checkpoint(start), run.adapters, run.optimizers, digest(args), [*hooks, engine])
        engine.equalise([parameter for named in run.components.values() for _, parameter in named])
        log.info("%s: %d pictures, step %d of %d, on %s", run_dir.root, len(items), start, run.steps, _where(engine))
        undo.pop_all()  # whoever has the session closes it
    return Session(args, run_dir, run, start, here, marks)


def _where(engine: Engine) -> str:
    return f"{engine.processes} processes, {engine.device}" if engine.processes > 1 else str(engine.device)


def _run(
    context: Context,
    family: ModelFamily,
    engine: Engine,
    items: Sequence[Item],
    parts: _Parts,
    hooks: Sequence[Hook],
) -> Run:
    args, run_dir = context.args, context.dir
    assert args.runtime.steps is not None  # resolved
    tell = Listeners(None, hooks)
    tell.say("on_model", ModelLoaded(family, engine.device))
    watch = _watching(args, family)
    adapters = _adapters(args, items, parts)
    try:
        objective = parts.objective(args.objective, family.path, _frozen(family, adapters))
    except ValueError as error:
        raise RunError(str(error)) from error
    shown = args, run_dir, family, engine.device, items, engine.here.share
    try:
        dataset = material.dataset(*shown)  # before an adapter is attached
    except (mixture.MixtureError, concepts.ConceptError, material.MaterialError) as error:
        raise RunError(str(error)) from error
    try:
        components = {adapter.component: adapter.attach(family) for adapter in adapters}
        if context.start == 0:
            _begin(args, family, adapters)
        export.check(family, adapters, args)
    except (ValueError, export.ExportError) as error:
        raise RunError(str(error)) from error
    for named in components.values():
        for _, parameter in named:
            engine.watch(parameter)
    tell.say("on_attached", Attached(family, components))
    scales = {adapter.component: _scales(adapter, components[adapter.component]) for adapter in adapters}
    try:
        optimizers, rates = optim.prepare(args.optim, args.runtime.steps, components, scales)
    except ValueError as error:
        raise RunError(str(error)) from error
    _constrain(adapters, optimizers)
    return Run(
        family=family,
        adapters=adapters,
        components=components,
        optimizers=optimizers,
        lr=rates,
        dataset=dataset,
        objective=objective,
        encode=material.encoder(*shown),
        hooks=hooks,
        steps=args.runtime.steps,
        accumulate=args.runtime.accumulate,
        max_grad_norm={name: args.optim.clip(getattr(args.optim, name)) for name in components},
        seed=args.runtime.seed,
        engine=engine,
        encode_base=_base_encoder(args, family, adapters),
        watch=watch,
    )


def _scales(adapter: Adapter, named: Sequence[tuple[str, torch.nn.Parameter]]) -> dict[str, float]:
    return {name: adapter.lr_scale(name) for name, _ in named} if isinstance(adapter, HasScales) else {}


def _frozen(family: ModelFamily, adapters: Sequence[Adapter]) -> Predict:
    """The family's prediction with the adapters off, without gradients."""

    def predict(xt: Tensor, t: Tensor, cond: Cond) -> Tensor:
        with _bare(adapters):
            return family.predict(xt, t, cond)

    return predict


@contextmanager
def _bare(adapters: Sequence[Adapter]) -> Generator[None]:
    """Inside, the family is the base, without gradients."""
    with torch.no_grad(), ExitStack() as off:
        for adapter in adapters:
            off.enter_context(adapter.disabled())
        yield


def _base_encoder(
    args: TrainArgs, family: ModelFamily, adapters: Sequence[Adapter]
) -> Callable[[Sequence[str]], Cond] | None:
    """Captions as the base itself reads them, where an objective keeps what it predicts and training changes that.

    A prior's captions hold no trigger: learned rows do not change them, trained text encoders do.
    """
    kept = args.objective
    changed = args.adapter.text.train or (args.text.tokens and not kept.prior_weight)
    if not changed or not (kept.mask_prior or kept.prior_weight):
        return None

    def encode(captions: Sequence[str]) -> Cond:
        with _bare(adapters):
            return family.encode(captions)

    return encode


def _watching(args: TrainArgs, family: ModelFamily) -> Callable[[Samples], Watch] | None:
    """Has what the denoiser looks at for each picture's trigger observed, where the objective asks.

    Raises:
        BaseModelError: the base has no cross-attention of the resolution that is asked for.
    """
    wanted = args.objective.attention
    if not wanted.weight:
        return None
    with family.attention_maps(torch.zeros(1, 1, dtype=torch.bool), wanted.cell):
        pass  # it is there

    def watch(samples: Samples) -> Watch:
        places = family.token_places(samples.captions, samples.triggers)
        return lambda: family.attention_maps(places, wanted.cell)

    return watch


def _adapters(args: TrainArgs, items: Sequence[Item], parts: _Parts) -> list[Adapter]:
    rows = TextualInversion(args.text, _learned(args, items), args.runtime.seed) if args.text.tokens else None
    return [*([rows] if rows else []), *_layered(args, parts)]


def _layered(args: TrainArgs, parts: _Parts) -> list[Adapter]:
    """The adapters on layers: the denoiser's, then the text encoders'."""
    if parts.adapter is None:
        return []
    adapters: list[Adapter] = [parts.adapter(args.adapter, args.runtime.seed)]
    if args.adapter.text.train:
        adapters.append(parts.adapter(args.adapter.for_text(), derive(args.runtime.seed, "text"), "text"))
    return adapters


def _begin(args: TrainArgs, family: ModelFamily, adapters: Sequence[Adapter]) -> None:
    """Puts what adapter.start names into the adapters, all of it."""
    if args.adapter.start is None:
        return
    try:
        updates = layouts.read(args.adapter.start, family)
    except layouts.LayoutError as error:
        raise RunError(f"adapter.start: {error}") from error
    layered = [adapter for adapter in adapters if isinstance(adapter, Layers)]
    if not args.adapter.text.train and any(component != "denoiser" for component, _ in updates):
        raise RunError(f"adapter.start {args.adapter.start} has updates of text encoders; turn adapter.text.train on")
    for adapter in layered:
        adapter.begin(updates)


def _constrain(adapters: Sequence[Adapter], optimizers: Mapping[str, Optimizer]) -> None:
    """Has limits of updates hold after each of an optimizer's steps."""
    for adapter in adapters:
        if isinstance(adapter, Layers):
            optimizers[adapter.component].register_step_post_hook(_constraining(adapter))


def _constraining(adapter: Layers) -> Callable[[Optimizer, Any, Any], None]:
    return lambda optimizer, args, kwargs: adapter.constrain()


def _learned(args: TrainArgs, items: Sequence[Item]) -> list[Concept]:
    """What gets vectors: each trigger that pictures show. The first concept of a trigger says its init_words."""
    learned: list[Concept] = []
    own = [item for item in items if not item.regular]
    for trigger in dict.fromkeys(concepts.trigger_of(item, args.data) for item in own):
        of = [item for item in own if concepts.trigger_of(item, args.data) == trigger]
        words = [c.init_words for c in args.data.concepts.values() if c.trigger == trigger and c.init_words]
        pictures = material.similar(of, args.runtime.seed) if args.text.init == "similarity" else ()
        learned.append(Concept(trigger, words[0] if words else None, pictures))
    return learned


# --- around a run


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


def _json(tree: Mapping[str, Any]) -> str:
    return json.dumps(tree, indent=2, ensure_ascii=False) + "\n"
