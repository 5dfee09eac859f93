"""The training loop: a generator that makes one optimizer update for each Step it yields.

Words: a *step* is one optimizer update, a *micro* one forward and backward; `update` counts finished updates.
Everything random is seeded from (seed, update, micro, rank), so a run resumed at `start` goes on bit for bit. The
micros of N processes are those of one process that accumulates N times as many: the same pictures, the same draws.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainer.events import AfterUpdate, BatchMade, BeforeUpdate, Gradients, LossComputed, PicturesChosen, RatesSet
from trainer.listeners import Listeners
from trainer.optim import Rates, logged
from trainer.optim import step as step_of
from trainer.seed import derive
from trainer.types import Adapter, Batch, Cond, Draws, Hook, Keeps, ModelFamily, Objective, Samples, Step, Watch


class Micros(Protocol):
    """The dataset, as the loop sees it: micro-batch `index` is the same for ever."""

    def micro(self, index: int) -> Samples: ...


class Engine(Keeps, Protocol):
    """Where and how the arithmetic runs: device, precision, processes."""

    device: torch.device
    rank: int
    processes: int

    def autocast(self) -> AbstractContextManager[object]: ...
    def backward(self, loss: Tensor) -> None: ...
    def gathered(self, rows: Sequence[Any]) -> Sequence[Any]:
        """The rows of all processes: everybody's first, then everybody's second."""
        ...

    def average(self, parameters: Sequence[nn.Parameter]) -> None:
        """Makes the gradients of each process the mean over all."""
        ...

    def settled(self, finite: bool) -> bool:
        """Told whether all gradients are finite; whether the run can go on, without this update where they are not."""
        ...


@dataclass
class Run:
    """All that the loop needs; trainer.run puts it together."""

    family: ModelFamily
    adapters: Sequence[Adapter]
    components: Mapping[str, Sequence[tuple[str, nn.Parameter]]]  # "adapter", "rows" -> named parameters
    optimizers: Mapping[str, Optimizer]  # one for each component
    lr: Mapping[str, Rates]  # by component: progress in 0..1 -> learning rate
    dataset: Micros
    objective: Objective
    encode: Callable[[Sequence[str]], Cond]  # captions -> cond, cached or live
    hooks: Sequence[Hook]
    steps: int
    accumulate: int
    max_grad_norm: Mapping[str, float]  # by component; 0 is not clipped
    seed: int
    engine: Engine
    encode_base: Callable[[Sequence[str]], Cond] | None = None  # as the base itself reads captions, where it is asked
    watch: Callable[[Samples], Watch] | None = None  # what the denoiser looks at; None: nobody asks


class NonFiniteLoss(ArithmeticError):  # noqa: N818  it names what happened
    """The loss or a gradient is NaN or infinite. Parameters are as the update before left them."""

    def __init__(self, what: str, step: int, names: Sequence[str]) -> None:
        super().__init__(
            f"{what} is not finite at step {step} (pictures: {', '.join(names)}). The run stopped, and this step "
            "changed nothing; the newest checkpoint is good. Lower the learning rate, or widen the dtype."
        )
        self.step, self.names = step, tuple(names)


def train(run: Run, start: int = 0) -> Iterator[Step]:
    """Yield a Step after each update from `start` (updates already done) to run.steps, or to where a hook stops it."""
    tell = Listeners(run, run.hooks)
    tell.say("on_start", run)
    for update in range(start, run.steps):
        began = time.perf_counter()
        made = [_micro(run, tell, update, micro) for micro in range(run.accumulate)]
        micros = [_Told(*row) for row in run.engine.gathered(_told(run, made))]
        for micro in micros:
            if not math.isfinite(micro.loss):
                raise NonFiniteLoss("the loss", update + 1, micro.names)
        run.engine.average([parameter for named in run.components.values() for _, parameter in named])
        extra = tell(Gradients(update)).extra
        for component, optimizer in run.optimizers.items():
            run.lr[component].hold(optimizer, update / run.steps)
        clipped = [_clip(run, component) for component in run.components]
        norms = dict(zip(run.components, _numbers(run, clipped), strict=True))
        names = [name for micro in micros for name in micro.names]
        broken = [component for component, norm in norms.items() if not math.isfinite(norm)]
        if not run.engine.settled(not broken):
            raise NonFiniteLoss(f"the gradient of {broken[0]}", update + 1, names)
        if not broken:
            rates = {component: run.lr[component](update / run.steps) for component in run.optimizers}
            _update(run, tell, update, tell(RatesSet(update, rates)).lr)
        for optimizer in run.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        step = Step(
            step=update + 1,
            images=len(names),
            loss=sum(micro.loss for micro in micros) / len(micros),
            terms={key: sum(micro.terms[key] for micro in micros) / len(micros) for key in micros[0].terms},
            grad_norm=norms,
            lr={key: lr for part, optimizer in run.optimizers.items() for key, lr in logged(part, optimizer).items()},
            seconds=time.perf_counter() - began,
            extra=extra,
        )
        tell.say("on_step", run, step)
        stop = tell.stop(step)
        yield step
        if stop is not None:
            tell.stopped(step.step, stop)
            break
    tell.say("on_end", run)


class _Micro(NamedTuple):
    loss: Tensor
    terms: Mapping[str, Tensor]
    names: Sequence[str]


class _Told(NamedTuple):
    loss: float
    terms: Mapping[str, float]
    names: Sequence[str]


def _micro(run: Run, tell: Listeners, update: int, micro: int) -> _Micro:
    """One forward and backward; its gradients are added to what the parameters hold. Nothing of it is read yet."""
    engine = run.engine
    turn = micro * engine.processes + engine.rank  # among the micros of all processes for this update
    samples = run.dataset.micro(update * run.accumulate * engine.processes + turn)
    samples = tell(PicturesChosen(update, turn, samples)).samples
    seed = derive(run.seed, "micro", update, turn, 0)
    torch.manual_seed(seed)  # for layers that draw, such as an adapter's dropout
    for adapter in run.adapters:
        if isinstance(adapter, Draws):
            adapter.redraw(seed)
    sizes = None if samples.sizes is None else samples.sizes.to(engine.device)
    with engine.autocast():
        batch = Batch(
            latents=samples.latents.to(engine.device),
            cond=replace(run.encode(samples.captions), sizes=sizes),
            names=samples.names,
            generator=torch.Generator().manual_seed(seed),
            mask=None if samples.mask is None else samples.mask.to(engine.device),
            prior=replace(run.encode(samples.prior), sizes=sizes) if samples.prior else None,
            base=replace(run.encode_base(samples.prior or samples.captions), sizes=sizes) if run.encode_base else None,
            weight=None if samples.weight is None else samples.weight.to(engine.device),
            watch=run.watch(samples) if run.watch else None,
            probe=tell.probe(update, turn),
        )
        batch = tell(BatchMade(update, turn, batch, samples)).batch
        loss = tell(LossComputed(update, turn, run.objective(run.family.predict, batch), batch)).loss
        penalties = [penalty for adapter in run.adapters if (penalty := adapter.penalty()) is not None]
    total, terms = loss.total, dict(loss.terms)
    if penalties:
        terms["penalty"] = torch.stack(penalties).sum()
        total = total + terms["penalty"]
    engine.backward(total / run.accumulate)
    return _Micro(total.detach(), {key: term.detach() for key, term in terms.items()}, samples.names)


def _told(run: Run, made: Sequence[_Micro]) -> list[_Told]:
    """Losses and terms as numbers."""
    told = iter(_numbers(run, [scalar for micro in made for scalar in (micro.loss, *micro.terms.values())]))
    return [_Told(next(told), {key: next(told) for key in micro.terms}, micro.names) for micro in made]


def _numbers(run: Run, scalars: Sequence[Tensor]) -> list[float]:
    """What 0-d tensors say, for which a GPU is waited for once. One may be in RAM, such as the norm of no gradients."""
    return torch.stack([scalar.to(run.engine.device) for scalar in scalars]).tolist()


def _update(run: Run, tell: Listeners, update: int, lr: Mapping[str, float]) -> None:
    for component, optimizer in run.optimizers.items():
        run.lr[component].put(optimizer, update / run.steps, lr[component])
    tell(BeforeUpdate(update))
    for optimizer in run.optimizers.values():
        step_of(optimizer)
    tell(AfterUpdate(update))


def _clip(run: Run, component: str) -> Tensor:
    """Clip the gradients of a component to its norm; the norm that they had."""
    parameters = [parameter for _, parameter in run.components[component]]
    return torch.nn.utils.clip_grad_norm_(parameters, run.max_grad_norm[component] or math.inf)
