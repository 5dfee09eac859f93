"""What stands behind Cog's drawing door: a base that stays loaded, and the weights that requests put on it."""

from __future__ import annotations

import base64
import binascii
import hashlib
import logging
import os
import random
import re
import shutil
import tempfile
import time
import zipfile
from collections import OrderedDict
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from cog import current_scope
from PIL import Image
from pydantic import ValidationError

from preprocess.fetch import is_url
from trainer import callers, cli, console, environment, generate, layouts, scratch
from trainer.args import ModelArgs
from trainer.args.requests import DrawingRequest
from trainer.models import sniff

MOST_PIXELS = 16 * 2**20  # of all pictures of a request
MOST_WEIGHTS = 4  # that are kept in memory, beside those that are on the base
QUALITY = 90
_NAMES = ("lora.safetensors", "embeddings.safetensors", "pytorch_lora_weights.safetensors", "adapter_model.safetensors")

log = logging.getLogger(__name__)
log.setLevel(logging.INFO)  # callers read the seed there


class DrawingError(RuntimeError):
    """What the caller is told, in one sentence."""


@dataclass(frozen=True)
class _Read:
    learned: generate.Learned
    triggers: tuple[str, ...]


class Loaded:
    """The server's memory. Only what was loaded whole is in it, so a request that is cancelled leaves nothing half."""

    def __init__(self, default: str | None) -> None:
        """Loads the base, with the weights at `default` (a file or a URL of the operator's) read for it."""
        self._base = ModelArgs.model_validate({"base": callers.base()})
        self._painter: generate.Painter | None = None
        self._read: OrderedDict[str, _Read] = OrderedDict()  # by the sha256 of the file, the last used last
        self._own: str | None = None  # the key of `default`, which stays
        with console.shown():
            if default is None:
                self._painted(None)
            else:
                with generate.opened(default, private=True) as path, _weights(path) as (key, weights):
                    self._learned(key, weights)
                    self._own = key

    def healthy(self) -> bool:
        """Whether the device computes; a GPU that has failed once does not any more."""
        try:
            return bool(torch.ones(1, device=generate.device("auto")).add(1).item() == 2)
        except RuntimeError:
            return False

    def draw(self, inputs: Mapping[str, Any]) -> list[Path]:
        """Files in a temporary folder, which are there until the next request.

        Raises:
            DrawingError: one sentence that says what to do; the traceback is in the log.
        """
        began = time.monotonic()
        with console.shown():
            try:
                scratch.sweep()
                request = _request(inputs)
                weighted = self._weighted(request)
                files = self._drawn(request, weighted)
            except Exception as error:
                log.exception("the drawing failed")
                raise DrawingError(_explained(error)) from error
            log.info("%d pictures after %.1f s", len(files), time.monotonic() - began)
        return files

    def _weighted(self, request: DrawingRequest) -> list[tuple[_Read, float]]:
        """What the request wants on the base, each with its strength."""
        found: list[tuple[_Read, float]] = []
        if request.replicate_weights is not None:
            with _weights(request.replicate_weights) as (key, weights):
                found.append((self._learned(key, weights), request.lora_scale))
        elif self._own is not None:
            found.append((self._read[self._own], request.lora_scale))
        elif request.lora_scale != 1.0:
            raise ValueError("lora_scale does nothing without weights: give replicate_weights, or leave it out")
        for url, scale in request.extras():
            with _fetched(url) as path, _weights(path) as (key, weights):
                if found and weights.model is not None and not self._fits(weights.model):
                    raise ValueError(f"extra_lora {weights.name} was trained on another base than the other weights")
                found.append((self._learned(key, weights), scale))
        record: Any = current_scope().record_metric  # pyright: ignore[reportAttributeAccessIssue]
        record("weights", len(found))
        return found

    def _learned(self, key: str, weights: generate.Weights) -> _Read:
        """The weights in memory, for the base that they need, which is loaded if another one is."""
        painter = self._painted(weights.model)
        if key not in self._read:
            learned = painter.read(weights)
            self._read[key] = _Read(replace(learned, name=f"{learned.name}-{key[:6]}"), _triggers(weights))
        self._read.move_to_end(key)
        spare = [one for one in self._read if one != self._own]
        for old in spare[:-MOST_WEIGHTS]:
            del self._read[old]
        return self._read[key]

    def _fits(self, model: ModelArgs) -> bool:
        return self._painter is not None and _served(model) == self._painter.model

    def _painted(self, model: ModelArgs | None) -> generate.Painter:
        """The base that `model` says, or the one that is there."""
        if self._painter is not None and (model is None or self._fits(model)):
            return self._painter
        self._painter, own = None, self._read.get(self._own or "")  # the old base leaves before the new one comes
        self._read.clear()
        wanted = _served(model or self._base)
        began = time.monotonic()
        painter = generate.Painter(wanted, generate.device("auto"), code=False)
        log.info("the base %s was loaded in %.1f s", Path(wanted.base).name, time.monotonic() - began)
        if own is not None:
            log.warning("the weights that the server was started with are for another base, and left")
            self._own = None
        self._painter = painter
        return painter

    def _drawn(self, request: DrawingRequest, weighted: list[tuple[_Read, float]]) -> list[Path]:
        painter = self._painted(None)
        look, begun = _look(request)
        _check_size(request, look, painter)
        for read, _ in weighted:
            if read.triggers and not any(_names(request.prompt, word) for word in read.triggers):
                log.warning("the prompt does not name %s, so it may not show the concept", " or ".join(read.triggers))
        seed = random.SystemRandom().randrange(2**31) if request.seed is None else request.seed
        log.info("seed %d", seed)
        order = generate.Order([request.prompt], [seed + n for n in range(request.num_outputs)], look, begun=begun)
        on_it = [generate.Weighted(read.learned, generate.Strength(scale)) for read, scale in weighted]
        self._painter = None  # while weights are exchanged, a cancel would leave neither the old nor the new on it
        try:
            painter.use(on_it)
        except generate.GenerateError:  # it was refused, and nothing was exchanged
            self._painter = painter
            raise
        self._painter = painter
        files = list(generate.carry_out(painter, on_it, order, scratch.folder()))
        return [_saved(file, request) for file in files]


# --- what was asked for


def _request(inputs: Mapping[str, Any]) -> DrawingRequest:
    given = {name: value for name, value in inputs.items() if value is not None}
    for name in ("replicate_weights", "image", "mask"):
        if name in given and not isinstance(given[name], os.PathLike):
            raise ValueError(f"{name} must be a URL or an upload: files of the server are not yours")
    try:
        return DrawingRequest.model_validate(given)
    except ValidationError as error:
        raise cli.CommandError("; ".join(_sentence(dict(one)) for one in error.errors(include_url=False))) from error


def _sentence(error: Mapping[str, Any]) -> str:
    where = ".".join(str(part) for part in error["loc"])
    said = str(error.get("ctx", {}).get("error", error["msg"]))
    return f"{where}: {said}" if where else said


def _look(request: DrawingRequest) -> tuple[generate.Look, Mapping[str, str]]:
    start, begun = None, {}
    if request.image is not None:
        usual = 1.0 if request.mask else 0.8
        start, begun = generate.start(request.image, request.prompt_strength or usual, request.mask)
    look = generate.Look(
        steps=request.num_inference_steps,
        guidance=request.guidance_scale,
        negative=request.negative_prompt,
        width=request.width,
        height=request.height,
        scheduler=request.scheduler,
        start=start,
    )
    return look, begun


def _check_size(request: DrawingRequest, look: generate.Look, painter: generate.Painter) -> None:
    """The sizes that were given have bounds of their own; a picture may have any."""
    usual = look.start.picture.size if look.start else (painter.family.resolution,) * 2
    width, height = request.width or usual[0], request.height or usual[1]
    if max(width, height) > 2048 or width * height * request.num_outputs > MOST_PIXELS:
        raise ValueError(
            f"{request.num_outputs} pictures of {width}x{height} are too much for one request: {MOST_PIXELS >> 20} "
            "million pixels in all, and sides of 2048, are allowed; give a smaller width and height, or num_outputs"
        )


def _names(prompt: str, trigger: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", prompt) is not None


def _explained(error: Exception) -> str:
    """An error as one sentence, without paths of this server and options of the command line."""
    said = re.sub(rf"{re.escape(tempfile.gettempdir())}/(?:\S*/)?", "", " ".join(str(error).split()))
    said = said.partition("; give one of them another: --weights")[0]
    if isinstance(error, MemoryError) or "out of memory" in said or "can't allocate memory" in said:
        return "out of memory: ask for fewer or smaller pictures"
    return said if isinstance(error, ValueError) else f"{type(error).__name__}: {said}; the log has the traceback"


def _saved(file: Path, request: DrawingRequest) -> Path:
    """The PNG, or what the caller wants in its place."""
    if request.output_format == "png":
        return file
    made = file.with_suffix(f".{request.output_format}")
    with Image.open(file) as picture:
        kind = "JPEG" if request.output_format == "jpg" else "WEBP"
        picture.convert("RGB").save(made, kind, quality=request.output_quality or QUALITY)
    file.unlink()
    return made


# --- weights, told by content


@contextmanager
def _fetched(url: str) -> Generator[Path]:
    if url.startswith("data:"):
        folder = scratch.folder()
        try:
            (folder / "weights").write_bytes(base64.b64decode(url.partition(",")[2], validate=True))
        except binascii.Error as error:
            raise ValueError(f"extra_lora is a data URL that cannot be read: {error}") from error
        yield folder / "weights"
        shutil.rmtree(folder, ignore_errors=True)
    elif is_url(url):
        with generate.opened(url, private=callers.private_urls()) as path:
            yield path
    else:
        raise ValueError(f"extra_lora {url!r} must be a URL: files of the server are not yours")


@contextmanager
def _weights(path: Path) -> Generator[tuple[str, generate.Weights]]:
    """(key, where its files are) of a file or a folder, for the time that they are read."""
    key = _key(path)
    folder = scratch.folder()
    try:
        if path.is_file() and zipfile.is_zipfile(path):
            _unzip(path, folder)
            yield key, generate.find(_inside(folder))
        elif path.is_file() and _is_safetensors(path):
            (folder / "weights.safetensors").symlink_to(path.resolve())  # whatever it was called
            yield key, generate.find(folder / "weights.safetensors")
        else:
            with generate.opened(str(path)) as opened:
                if opened.is_file():
                    raise generate.GenerateError("the weights are neither a .safetensors file nor a tar or zip of one")
                yield key, generate.find(_inside(opened))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _key(path: Path) -> str:
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file()):
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(9)
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().st_size


def _unzip(path: Path, folder: Path) -> None:
    """Plain files only; names that lead out are refused."""
    limits = callers.LIMITS
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
            if len(entries) > limits.entries or sum(entry.file_size for entry in entries) > limits.total_bytes:
                raise generate.GenerateError("the weights are a zip of too many or too large files; give one LoRA")
            for entry in entries:
                name = PurePosixPath(entry.filename.replace("\\", "/"))
                if name.is_absolute() or ".." in name.parts:
                    raise generate.GenerateError(f"the weights are a zip that leads out of itself ({entry.filename})")
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                with archive.open(entry) as file, (folder / name).open("wb") as out:
                    shutil.copyfileobj(file, out)
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
        raise generate.GenerateError(f"the weights are a zip that cannot be read: {error}") from error


def _inside(folder: Path) -> Path:
    """The folder with the weights, or the only file of weights: trainers put them at different depths."""
    files = sorted(folder.rglob("*.safetensors"), key=lambda file: len(file.parts))
    runs = sorted(file.parent for file in folder.rglob("args.json"))
    if runs:
        return runs[0]
    named = [file.parent for file in files if file.name in _NAMES]
    if named:
        return named[0]
    if len(files) == 1:
        return files[0]
    found = ", ".join(file.name for file in files) or "none"
    raise generate.GenerateError(f"the archive holds no single file of weights ({found}); give one of them alone")


def _triggers(weights: generate.Weights) -> tuple[str, ...]:
    """The words that the weights are asked for by, as their files say."""
    if weights.embeddings or weights.lora is None or not weights.lora.is_file():
        return tuple(weights.embeddings)
    said = layouts.Opened(weights.lora).metadata.get("modelspec.trigger_phrase", "")
    return tuple(word.strip() for word in said.split(",") if word.strip())


def _served(model: ModelArgs) -> ModelArgs:
    """The base as this server loads it. A folder of another machine is known by its name alone.

    Raises:
        ValueError: there is no folder of that name here.
    """
    own, said = callers.base(), Path(environment.located(model.base))
    if not said.exists() and len(said.parts) == 1:
        if Path(own).name != said.name:
            raise ValueError(
                f"the weights were trained on a base called {said.name!r}, which this server does not have; its "
                "operator says where it is as TEMPERA_BASE"
            )
        model = model.model_copy(update={"base": own})
    plain = {"base": environment.located(model.base), "gradient_checkpointing": False, "attention": "auto"}
    return sniff.named(model.model_copy(update=plain))
