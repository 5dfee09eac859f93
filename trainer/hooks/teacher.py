"""A second, frozen base whose predictions are learned beside the pictures."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from trainer import registry
from trainer.args import TeacherArgs
from trainer.events import BatchMade, LossComputed, ModelLoaded, PredictionMade
from trainer.hooks import Context, Hook
from trainer.loop import Run
from trainer.models import FAMILIES
from trainer.types import BaseModelError, Cond, Loss, ModelFamily


class Teacher(Hook):
    """Adds weight * mean (prediction - teacher's prediction)^2 to the loss, and logs the mean as term `teacher`.

    The teacher is given the same noisy pictures and timesteps, and reads the captions with its own text encoders:
    a trigger is to it the word that it is spelled like.
    """

    everywhere = True
    Options = TeacherArgs
    own_errors = (BaseModelError,)

    def __init__(self, context: Context, options: TeacherArgs) -> None:
        super().__init__(context)
        if options.base is None:
            raise registry.PartError("the teacher needs a base: hooks.teacher.base")
        self.options = options
        self._teacher: ModelFamily | None = None
        self._cond: Cond | None = None
        self._error: Tensor | None = None

    def on_model(self, event: ModelLoaded) -> None:
        """Loads the teacher.

        Raises:
            BaseModelError: it cannot be loaded as the base's family, or predicts along another noise path.
        """
        options, model = self.options, self.context.args.model
        given = {"base": options.base, "revision": options.revision, "config": options.config, "prediction": "auto"}
        family = registry.load(FAMILIES, model.family, "model.family")
        teacher: ModelFamily = family.load(model.model_copy(update=given), event.device)
        if not _alike(teacher, event.family):
            raise BaseModelError(
                f"hooks.teacher.base {options.base} predicts {teacher.path.target} on a noise path of its own, and "
                f"model.base {model.base} {event.family.path.target}: a teacher must have the path of the base"
            )
        self._teacher = teacher

    @torch.no_grad()
    def on_batch(self, run: Run, event: BatchMade) -> None:
        assert self._teacher is not None  # on_model comes first
        self._cond = replace(self._teacher.encode(event.samples.captions), sizes=event.batch.cond.sizes)
        self._error = None

    def on_prediction(self, run: Run, event: PredictionMade) -> None:
        assert self._teacher is not None
        assert self._cond is not None
        with torch.no_grad():
            said = self._teacher.predict(event.xt, event.t, self._cond)
        self._error = ((event.pred.float() - said.float()) ** 2).mean()

    def on_loss(self, run: Run, event: LossComputed) -> Loss:
        if self._error is None:
            raise ValueError("the objective told no prediction (batch.probe), so there is nothing to compare")
        total = event.loss.total + self.options.weight * self._error
        return Loss(total, {**event.loss.terms, "teacher": self._error.detach()})

    def close(self) -> None:
        self._teacher = self._cond = self._error = None


def _alike(one: ModelFamily, other: ModelFamily) -> bool:
    t = torch.arange(min(one.path.steps, other.path.steps))
    same = (one.path.target, one.path.steps) == (other.path.target, other.path.steps)
    return same and torch.equal(one.path.snr(t), other.path.snr(t))
