"""The parts, put together to what the loop runs."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from trainer import cache, concepts, export, material, mixture, optim
from trainer.args import TrainArgs
from trainer.dataset import Item
from trainer.engine import Engine
from trainer.events import Attached, ModelLoaded
from trainer.hooks import Context, Hook
from trainer.listeners import Listeners
from trainer.loop import Run
from trainer.run.error import RunError
from trainer.run.parts import Parts, all_adapters, begin, constrain
from trainer.types import Adapter, Cond, HasScales, ModelFamily, Predict, Samples, Watch


def assembled(
    context: Context,
    family: ModelFamily,
    engine: Engine,
    items: Sequence[Item],
    parts: Parts,
    hooks: Sequence[Hook],
) -> Run:
    """What the loop runs, with the adapters attached to `family` and each hook told of both.

    Raises:
        RunError: args that contradict the base or the pictures.
    """
    args, run_dir = context.args, context.dir
    assert args.runtime.steps is not None  # resolved
    tell = Listeners(None, hooks)
    tell.say("on_model", ModelLoaded(family, engine.device))
    watch = _watching(args, family)
    adapters = all_adapters(args, items, parts)
    try:
        objective = parts.objective(args.objective, family.path, frozen(family, adapters))
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
            begin(args, family, adapters)
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
    constrain(adapters, optimizers)
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


def idle(run: Run) -> list[str]:
    """The parts of the base that no update needs: captions that were encoded before are not encoded in one."""
    cached = isinstance(run.encode, cache.TextCache) and run.encode.whole and run.encode_base is None
    return ["vae", *(run.family.text_encoders if cached else ())]


def _scales(adapter: Adapter, named: Sequence[tuple[str, torch.nn.Parameter]]) -> dict[str, float]:
    return {name: adapter.lr_scale(name) for name, _ in named} if isinstance(adapter, HasScales) else {}


def frozen(family: ModelFamily, adapters: Sequence[Adapter]) -> Predict:
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
