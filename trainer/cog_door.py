"""What stands behind Cog's training door: inputs -> args -> a run -> one tar of what it made."""

from __future__ import annotations

import logging
import re
import shutil
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cog import Secret, current_scope

from trainer import callers, cli, cog_inputs, console, hub, kept, parcel, run, scratch
from trainer.args import TrainArgs
from trainer.args.requests import TrainingRequest
from trainer.cancel import Work
from trainer.types import Step

METRICS_EVERY_S = 1.0
AUTOCAPTION = "florence2"  # the captioner of `autocaption` where none is named
OF_THE_RUN = ("input_images", "concept_mode", "autocaption", "mask_target_prompts")  # which a resumed run has

log = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """What the caller is told, in one sentence."""


class StoppedError(BaseException):
    """The run ended between two updates because it was asked to."""


@dataclass(frozen=True)
class Made:
    weights: Path  # a tar
    hub: str | None  # where the same files were pushed, or why they were not


def train(inputs: Mapping[str, Any]) -> Made:
    """Trains as Cog's inputs say. It is called in the request's own thread, which Cog interrupts to cancel it.

    Part specs that would import code are refused: whoever calls the server is not its operator.

    Raises:
        TrainingError: one sentence that says what to do; the traceback is in the log.
    """
    given = {name: _plain(value) for name, value in inputs.items()}
    given = {name: value for name, value in given.items() if value not in (None, "")}
    with console.shown():
        try:
            work = Work(lambda work: _trained(given, work))
            scratch.sweep()
            return work.result()
        except Exception as error:
            log.exception("the training failed")
            raise TrainingError(explained(error)) from error


def _plain(value: object) -> object:
    return value.get_secret_value() if isinstance(value, Secret) else value


def explained(error: Exception) -> str:
    """An error as one sentence that says what to do."""
    said = " ".join(str(error).split())
    if isinstance(error, MemoryError) or "out of memory" in said or "can't allocate memory" in said:
        first = said.partition(". ")[0][:200] or "no more was said"
        return f"out of memory: lower batch_size or resolution, or turn gradient_checkpointing on ({first})"
    if isinstance(error, ValueError | ArithmeticError):
        return said
    return f"{type(error).__name__}: {said}; the log of this training has the traceback"


def _trained(given: Mapping[str, Any], work: Work[Made]) -> Made:
    request = _request(given)
    token = request.hf_token.get_secret_value() if request.hf_token else ""
    if (request.hf_repo_id is None) != (not token):
        raise cli.CommandError("hf_repo_id and hf_token go together: give both, or leave both out")
    if request.hf_repo_id:
        hub.prepared(request.hf_repo_id, token)
    folder, opened = _run(given)
    with kept.until_done(folder, brought=isinstance(given.get("resume_from"), Path)), opened as session:
        said = 0.0
        for step in session.steps():
            work.whole = step.step < session.run.steps
            if time.monotonic() - said > METRICS_EVERY_S or step.step == session.run.steps:
                said = time.monotonic()
                _record(step, session.run.steps)
            if work.whole and work.asked.is_set():
                session.checkpoint(step.step)
                raise StoppedError
        out = scratch.folder()
        files = parcel.laid_out(session.dir, out / "files")
        weights = parcel.packed(files, out / "trained_model.tar")
        where = _pushed(files, request.hf_repo_id, token)
        shutil.rmtree(files)
        return Made(weights, where)


def _run(given: Mapping[str, Any]) -> tuple[Path, AbstractContextManager[run.Session]]:
    """The folder of the run, and the run once it is entered."""
    if "resume_from" in given:
        own = [name for name in OF_THE_RUN if name in given]
        if own:
            raise cli.CommandError(f"a run that goes on has its own pictures and preset: leave {', '.join(own)} out")
        folder, root, saved = kept.found(given["resume_from"])
        args = callers.allowed(_changed(saved, given))
        return folder, run.resumed(root, args, code=False)
    if "input_images" not in given:
        raise cli.CommandError("input_images is missing: give a zip of 2 pictures or more, as a URL or an upload")
    folder = kept.new()
    place = {"runtime": {"out": str(folder), "name": kept.NAME}}
    return folder, run.opened(callers.allowed(cli.validate(cli.merge([tree(given), place]))), code=False)


def _changed(saved: TrainArgs, given: Mapping[str, Any]) -> TrainArgs:
    changes = [callers.json_object(given.get("args", "{}")), cog_inputs.tree(cog_inputs.chosen(given))]
    plain = saved.model_copy(update={"data": saved.data.model_copy(update={"private_urls": False})})
    return cli.validate(cli.merge([plain.model_dump(mode="json"), *changes]))


def _record(step: Step, steps: int) -> None:
    record: Any = current_scope().record_metric  # pyright: ignore[reportAttributeAccessIssue]
    record("train.step", step.step)
    record("train.of", steps)
    record("train.loss", float(step.loss))
    for component, rate in step.lr.items():
        record(f"train.lr.{re.sub('[^A-Za-z0-9_]', '_', component)}", float(rate))


def _pushed(files: Path, repo: str | None, token: str) -> str | None:
    """A push that fails loses nothing: the weights are handed back all the same, and the answer says so."""
    if repo is None:
        return None
    try:
        return hub.pushed(files, repo, token)
    except hub.HubError as error:
        log.exception("the push failed")
        return str(error)


# --- what was asked for


def _request(given: Mapping[str, Any]) -> TrainingRequest:
    """The inputs that are no options; files and `args` are looked at where they are used."""
    own = {name: given[name] for name in TrainingRequest.model_fields if name in given}
    return TrainingRequest.model_validate(own)


def tree(given: Mapping[str, Any]) -> cli.Tree:
    """The args tree of the inputs: the concept mode's preset, then `args`, then the flat inputs.

    Args:
        given: without those that were left blank.

    Raises:
        CallerError, CommandError, InputError: an input cannot be read, or two contradict one another.
    """
    flat = cog_inputs.chosen(given)
    deep = callers.json_object(given.get("args", "{}"))
    _agree(deep, flat)
    layers: list[cli.Tree] = [{"model": {"base": callers.base()}}, cli.preset(given.get("concept_mode", "object"))]
    layers += [deep, _captioned(given, flat)]
    layers += [_masked(given, cli.merge(layers)), cog_inputs.tree(flat)]
    layers.append({"data": {"source": callers.source(given["input_images"])}})
    return cli.merge(layers)


def _agree(args: cli.Tree, flat: Mapping[str, Any]) -> None:
    """An option in `args` and the flat input for it are two names for one thing, too."""
    deep = cog_inputs.leaves(args)
    for option, value in flat.items():
        if option in deep and str(deep[option]) != str(value):
            name = next(one.names[0] for one in cog_inputs.TRAINING if one.option == option)
            raise cog_inputs.InputError(
                f"{name} is {value!r}, and args has {option} {deep[option]!r}, which is the same thing; give one"
            )


def _captioned(given: Mapping[str, Any], flat: Mapping[str, Any]) -> cli.Tree:
    named = flat.get("data.captioner")
    if given.get("autocaption") is False and named:
        raise cog_inputs.InputError(f"autocaption is off, and captioner is {named!r}; leave one of them out")
    return {"data": {"captioner": AUTOCAPTION}} if given.get("autocaption") and not named else {}


def _masked(given: Mapping[str, Any], below: cli.Tree) -> cli.Tree:
    """What mask_target_prompts turns on."""
    if "mask_target_prompts" not in given:
        return {}
    sources = below.get("data", {}).get("mask", {}).get("sources") or list(cli.default_of("data.mask.sources"))
    sources = [*sources, *(["text"] if "text" not in sources else [])]
    return {"data": {"masks": True, "mask": {"text": given["mask_target_prompts"], "sources": sources}}}
