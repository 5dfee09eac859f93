"""The best of the checkpoints is exported, as a CLIP sees pictures that are drawn at each, if it is clearly the better.

A few pictures say little, and their score goes up and down: an earlier checkpoint must beat the last one in SURE of
RESAMPLES draws of the same pictures (a paired bootstrap), or the last is exported. It must do so by WORTH as well: a
CLIP can be sure of differences that mean nothing. And it must retain more, by WORTH: what going back gives up is what
was learned since, of which a CLIP that has never seen the subject is a poor judge; what it can win is the rest of the
model.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from trainer import sampler
from trainer.adapters.similarity import picture_features
from trainer.args import BestArgs
from trainer.events import CheckpointSaved
from trainer.hooks import Context, Hook, Purpose, presented
from trainer.hooks.trained import copied, replaced
from trainer.loop import Run
from trainer.registry import PartError
from trainer.rundir import atomic_write
from trainer.types import BaseModelError

log = logging.getLogger(__name__)

FIGURES = ("fidelity", "alignment", "retention")
RESAMPLES, SURE = 1000, 0.95
WORTH = 0.02  # of figures in 0..1
WITHOUT = 1e-3  # a figure below this counts as this: a harmonic mean with 0 in it would hide the others


class Best(Hook):
    """What is measured of a checkpoint: means over pictures, each in 0..1, joined by the harmonic mean.

    - fidelity: how far pictures of the trigger have come on the way from what the base drew for the same prompts to the
      training pictures themselves, in cosines to the training pictures' mean feature.
    - alignment: how near those pictures are to their prompts with the trigger left out, as a share of what the base's
      are; more counts as 1.
    - retention: how near pictures of ordinary prompts are to those that the base drew, in cosines.
    """

    Options = BestArgs
    own_errors = (BaseModelError, OSError)

    def __init__(self, context: Context, options: BestArgs) -> None:
        super().__init__(context)
        args = context.args
        if len(args.data.triggers) > 1:
            raise PartError(
                f"hooks.best compares pictures of one concept, and this run has {len(args.data.triggers)}; leave it out"
            )
        trigger = next(iter(args.data.triggers))
        self.prompts = [prompt for prompt in args.sample.prompts if trigger in prompt]
        self.ordinary = list(options.ordinary) or [prompt for prompt in args.sample.prompts if trigger not in prompt]
        if named := [prompt for prompt in options.ordinary if trigger in prompt]:
            raise PartError(f"hooks.best.ordinary {named[0]!r} names the trigger, so it is no ordinary prompt")
        if not self.prompts or not self.ordinary:
            lacking = "with the trigger" if not self.prompts else "without it (or hooks.best.ordinary)"
            raise PartError(f"hooks.best needs prompts with the trigger and without; sample.prompts has none {lacking}")
        self.plain = [" ".join(prompt.replace(trigger, " ").split()) for prompt in self.prompts]
        self.options = options
        self._reference: dict[str, Tensor] = {}
        self._best: dict[str, Tensor] = {}
        self._found: list[dict[str, float]] = []
        self._each: dict[str, Tensor] = {}  # figure -> [looks, pictures], in float64

    def on_start(self, run: Run) -> None:
        self._clip = Clip(self.options, run)
        if not self._reference:
            with ExitStack() as base:
                for adapter in run.adapters:
                    base.enter_context(adapter.disabled())
                self._reference = {
                    "drawn": self._drawn(run, self.prompts),
                    "ordinary": self._drawn(run, self.ordinary),
                    "own": self._clip.pictures([_open(name) for name in self.context.pictures]),
                }
        start = self.context.start
        if start and start not in {found["step"] for found in self._found}:
            self._look(run, start)  # its checkpoint was written before it was looked at

    def on_checkpoint(self, run: Run, event: CheckpointSaved) -> None:
        self._look(run, event.step)

    def _look(self, run: Run, step: int) -> None:
        with presented(run, "samples"):
            figures = {name: values.double() for name, values in self._figures(run).items()}
            score = round(float(joined([values.mean() for values in figures.values()])), 4)
            if not self._best or score > max(found["score"] for found in self._found):
                self._best = copied(run)
        for name, values in figures.items():
            self._each[name] = torch.cat([self._each.get(name, values[None][:0]), values[None]])
        means = {name: round(float(values.mean().clamp(0, 1)), 4) for name, values in figures.items()}
        self._found.append({"step": step, **means, "score": score})
        chosen, sure = self._choice()
        found = {"best": chosen["step"], "sure": sure, "looks": self._found}
        atomic_write(self.context.dir.choice, json.dumps(found, indent=2))
        said = ", ".join(f"{name} {means[name]:.2f}" for name in FIGURES)
        log.info("step %d: %s; step %d would be exported", step, said, chosen["step"])

    def _choice(self) -> tuple[dict[str, float], float]:
        """The look that is exported, the best or the last; and in which share of draws the best is the better."""
        scores = [found["score"] for found in self._found]
        best, last = scores.index(max(scores)), len(scores) - 1
        generator = torch.Generator().manual_seed(0)
        drawn = {len(each[0]): torch.empty(0) for each in self._each.values()}
        for count in drawn:  # both figures of the trigger's pictures are of the same ones
            drawn[count] = torch.randint(count, (RESAMPLES, count), generator=generator)
        of = [
            joined([each[look][drawn[len(each[look])]].mean(1) for each in self._each.values()])
            for look in (best, last)
        ]
        sure = float((of[0] > of[1]).double().mean())
        won = [self._found[best][name] - self._found[last][name] for name in ("score", "retention")]
        return self._found[best if sure >= SURE and min(won) >= WORTH else last], round(sure, 4)

    def _figures(self, run: Run) -> dict[str, Tensor]:
        """Of each picture, [pictures of the trigger] or [ordinary ones]; only the means are kept in 0..1."""
        centre = F.normalize(self._reference["own"].mean(0, keepdim=True), dim=-1)

        def near(features: Tensor) -> Tensor:
            return (features @ centre.T)[:, 0]

        drawn = self._drawn(run, self.prompts)
        least, most = float(near(self._reference["drawn"]).mean()), float(near(self._reference["own"]).mean())
        texts = self._clip.texts(self.plain).repeat_interleave(self.options.pictures, 0)
        before = float((self._reference["drawn"] * texts).sum(1).mean())
        return {
            "fidelity": (near(drawn) - least) / max(most - least, WITHOUT),
            "alignment": (drawn * texts).sum(1) / max(before, WITHOUT),
            "retention": (self._drawn(run, self.ordinary) * self._reference["ordinary"]).sum(1),
        }

    def _drawn(self, run: Run, prompts: Sequence[str]) -> Tensor:
        """[n, P]: unit features of the pictures of each prompt, with the seeds of the sample grid."""
        args, count = self.context.args.sample, self.options.pictures
        every = [prompt for prompt in prompts for _ in range(count)]
        return self._clip.pictures(
            sampler.generate(
                run.family,
                every,
                seeds=[args.seed + index for index in range(len(every))],
                **sampler.settings(args),
            )
        )

    def presented(self, run: Run, purpose: Purpose) -> AbstractContextManager[None]:
        return self._chosen(run) if purpose == "export" and self._found else nullcontext()

    @contextmanager
    def _chosen(self, run: Run) -> Generator[None]:
        chosen, sure = self._choice()
        steps, looks = run.steps, len(self._found)
        if chosen is self._found[-1]:
            log.info("exported is the last of %d checkpoints: none is clearly better", looks)
            yield
            return
        log.info(
            "exported is step %d of %d, the best of %d, better in %.0f %% of draws",
            chosen["step"],
            steps,
            looks,
            100 * sure,
        )
        with replaced(run, self._best):
            yield

    def state_dict(self) -> Mapping[str, Tensor]:
        if not self._reference:
            return {}
        rows = [[found[name] for name in ("step", *FIGURES, "score")] for found in self._found]
        table = {"found": torch.tensor(rows, dtype=torch.float64).reshape(len(rows), len(FIGURES) + 2)}
        kept = {f"reference.{name}": tensor for name, tensor in self._reference.items()}
        each = {f"each.{name}": values for name, values in self._each.items()}
        return {**table, **each, **kept, **{f"best.{name}": tensor for name, tensor in self._best.items()}}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        rows: list[list[float]] = state["found"].tolist()
        self._found = [
            {**dict(zip(("step", *FIGURES, "score"), row, strict=True)), "step": int(row[0])} for row in rows
        ]
        for key, tensor in state.items():
            of, _, name = key.partition(".")
            if of != "found":
                {"reference": self._reference, "best": self._best, "each": self._each}[of][name] = tensor


def joined(figures: Sequence[Tensor]) -> Tensor:
    """The harmonic mean of figures, each put into 0..1 first. Any shape, the same for all."""
    return len(figures) / torch.stack([1 / figure.clamp(WITHOUT, 1.0) for figure in figures]).sum(0)


class Clip:
    """The CLIP beside the base, or another one."""

    def __init__(self, options: BestArgs, run: Run) -> None:
        from transformers import CLIPModel, CLIPTokenizer  # only this hook needs them

        own = next(iter(run.family.clip_folders.items()), None)
        if options.base is None and own is None:
            raise BaseModelError(
                "hooks.best looks at pictures with a CLIP, and the base has none beside its text encoder; name one in "
                "hooks.best.base"
            )
        self._given: str = options.base or str(own[1] if own else "")
        try:
            self._model: Any = CLIPModel.from_pretrained(
                self._given, dtype=torch.float32, use_safetensors=True, local_files_only=True
            ).eval()
            self._tokenizer: Any = (
                run.family.tokenizers[own[0]]
                if options.base is None and own
                else CLIPTokenizer.from_pretrained(self._given, local_files_only=True)
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise BaseModelError(f"hooks.best needs a CLIPModel, and {self._given!r} is none: {error}") from error
        self._model.requires_grad_(False)

    def pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        """[n, P], unit features."""
        tensors = [_tensor(picture) for picture in pictures]
        return picture_features(self._model, Path(self._given), tensors)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """[n, P], unit features."""
        length: int = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        return F.normalize(self._model.get_text_features(input_ids=tokens.input_ids).pooler_output, dim=-1)


def _open(name: str) -> Image.Image:
    with Image.open(name) as picture:
        return picture.convert("RGB")


def _tensor(picture: Image.Image) -> Tensor:
    """[3, h, w] in -1..1."""
    data = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
    return data.reshape(picture.height, picture.width, 3).permute(2, 0, 1).float() / 127.5 - 1.0
