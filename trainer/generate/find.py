"""Where finished weights are: a run directory, files of other programs (docs/imports.md), or the URL of one.

No pickle is run.
"""

from __future__ import annotations

import re
import shutil
import tarfile
import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from preprocess.fetch import download, is_url
from preprocess.types import PreprocessError
from trainer import environment, layouts
from trainer.args import LimitsArgs, ModelArgs, TrainArgs
from trainer.export import embedding_name
from trainer.export.facts import START_WORDS
from trainer.export.names import DIFFUSERS
from trainer.parcel import LORA
from trainer.rundir import RunDir

COG_EMBEDDINGS = "embeddings.pti"  # beside lora.safetensors, of cog-sdxl
PICKLES = (".pth", ".ckpt", ".pkl", ".pickle")
CLIENTS_KEYS = ("emb_params", "clip_l", "clip_g")  # of vectors; any other key is the trigger that diffusers wrote
TEMPORARY = "tempera-"  # how the names of temporary folders begin


class GenerateError(ValueError):
    """Weights that cannot be used, or that do not fit the base. One sentence."""


@dataclass(frozen=True)
class Embedding:
    """Where the vectors of a trigger are."""

    file: Path
    start_words: str = ""  # that they were trained from; empty where nobody says it


@dataclass(frozen=True)
class Weights:
    """What to put on a base, and where it lies now."""

    name: str  # of the run or the file
    lora: Path | None  # a file, or a folder of PEFT with several parts
    embeddings: Mapping[str, Embedding]  # by trigger
    model: ModelArgs | None  # the base that it was trained on, where that is known


@contextmanager
def opened(given: str, *, private: bool = False, limits: LimitsArgs | None = None) -> Generator[Path]:
    """A path that `find` takes, for a path or an http(s) URL, of weights or of a .tar that a training gave.

    What is downloaded or unpacked lies in a temporary folder, which is gone afterwards.

    Args:
        private: also from addresses inside private networks.

    Raises:
        GenerateError: it cannot be had, or not within the limits, or an archive leads out of its folder.
    """
    limits = limits or LimitsArgs.model_validate({})
    with ExitStack() as stack:
        path = stack.enter_context(_fetched(given, limits, private)) if is_url(given) else Path(given)
        if path.is_file() and tarfile.is_tarfile(path):
            path = stack.enter_context(_unpacked(path, limits))
        yield path


@contextmanager
def _fetched(url: str, limits: LimitsArgs, private: bool) -> Generator[Path]:
    try:
        got = download(url, limits, private=private)
    except PreprocessError as error:
        said = re.sub(r" \(data\.limits\.\w+\)", "", str(error)).replace("data.private_urls", "--private-urls")
        raise GenerateError(said) from error
    with got.file, tempfile.TemporaryDirectory(prefix=TEMPORARY, ignore_cleanup_errors=True) as folder:
        path = Path(folder) / got.name
        got.file.seek(0)
        with path.open("wb") as file:
            shutil.copyfileobj(got.file, file)
        yield path


@contextmanager
def _unpacked(archive: Path, limits: LimitsArgs) -> Generator[Path]:
    """A tar of training as a folder that opens as a run directory."""
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, ignore_cleanup_errors=True) as folder:
        inside = Path(folder) / archive.stem  # which names the weights where no run does
        total = count = 0
        try:
            with tarfile.open(archive) as tar:
                for member in tar:
                    total, count = total + member.size, count + 1
                    if total > limits.total_bytes or count > limits.entries:
                        raise GenerateError(
                            f"{archive.name} is refused: it holds more than {limits.entries} files or "
                            f"{limits.total_bytes} bytes"
                        )
                    tar.extract(member, inside, filter="data")  # refuses links and paths that lead out
        except (tarfile.TarError, OSError, EOFError) as error:
            raise GenerateError(f"{archive.name} cannot be unpacked: {error}") from error
        yield inside


def find(path: Path, trigger: str | None = None) -> Weights:
    """The weights at `path`: a run directory, a folder of PEFT, diffusers or cog-sdxl, or a file.

    A LoRA file brings the embeddings of its name beside it, and one of cog-sdxl its embeddings.pti.

    Args:
        trigger: overrides the trigger that the only embedding names.

    Raises:
        GenerateError, RunDirError: there are none that can be read.
    """
    if path.suffix.lower() in PICKLES:
        raise GenerateError(f"{path} is a pickle, which could run code when it is read; convert it to .safetensors")
    try:
        if path.is_dir() and (path / "args.json").is_file():
            return _of_run(RunDir.open(path), trigger)
        files = layouts.files_of(path)
        alone = path.is_file() and layouts.is_embedding(path)
        lora = files[0][0] if len(files) == 1 else path
        embeddings = _by_trigger([path] if alone else _beside(lora), trigger)
    except layouts.LayoutError as error:
        raise GenerateError(str(error)) from error
    return Weights(path.stem, None if alone else lora, embeddings, None)


def _of_run(run: RunDir, trigger: str | None) -> Weights:
    """Of a run directory, or of what a training through Cog hands back, whose files have names of their own."""
    args = TrainArgs.model_validate_json(run.args.read_text(encoding="utf-8"))
    name = args.runtime.name
    layers = (run.export / f"{name}.safetensors", run.root / LORA, run.export / DIFFUSERS)
    lora = next((path for path in layers if path.is_file()), None)
    embeddings = _of_name(run.export, name) or sorted(run.root.glob("embeddings*.safetensors"))
    if not lora and not embeddings:
        raise GenerateError(f"{run.root} has exported nothing yet; finish it with: python train.py --resume {run.root}")
    return Weights(name, lora, _by_trigger(embeddings, trigger), args.model)


def base_of(found: Sequence[Weights], base: str | None = None, dtype: str | None = None) -> ModelArgs:
    """The base that all of the weights were trained on, a local one found from here or beside the project.

    Args:
        base, dtype: override what runs say; where none says it, the args' defaults.

    Raises:
        GenerateError: they were trained on different ones.
    """
    known = [(weights.name, weights.model) for weights in found if weights.model is not None]
    first = known[0][1] if known else ModelArgs.model_validate({})
    for name, model in known[1:]:
        for option in ("base", "revision", "config", "prediction", "merge"):
            one, other = getattr(first, option), getattr(model, option)
            if one != other and not (option == "base" and base):
                raise GenerateError(
                    f"{known[0][0]} and {name} were trained on bases that differ (model.{option}: {one} and {other})"
                    + ("; choose one with --base" if option == "base" else ", so they cannot be drawn with at once")
                )
    chosen = {"base": environment.located(base or first.base), **({"dtype": dtype} if dtype else {})}
    whole = {"quantise": "none"}  # weights are put on the base as clients have it
    return ModelArgs.model_validate({**first.model_dump(), **whole, **chosen})


def _beside(lora: Path) -> list[Path]:
    """The embeddings that belong to a LoRA file: of its own name, or of the one run whose files its folder holds."""
    if lora.name == "lora.safetensors" and (lora.parent / COG_EMBEDDINGS).is_file():
        return [lora.parent / COG_EMBEDDINGS]
    if lora.name != "pytorch_lora_weights.safetensors":
        return _of_name(lora.parent, lora.stem)
    every = sorted(lora.parent.glob("*_embedding.safetensors"))
    if len(every) == 1:
        return every
    of_runs = [_of_name(lora.parent, other.stem) for other in lora.parent.glob("*.safetensors") if other not in every]
    return next((found for found in of_runs if found == every), [])


def _of_name(folder: Path, name: str) -> list[Path]:
    """The embeddings that a run of this name exported."""
    one = folder / f"{embedding_name(name)}.safetensors"
    own = one.name.removesuffix("_embedding.safetensors")
    several = sorted(folder.glob(f"{own}_*_embedding.safetensors"))  # also of runs whose names begin like this one's
    return [one] if one.is_file() else [path for path in several if _facts(path).get("modelspec.title") == name]


def _facts(path: Path) -> dict[str, str]:
    """The metadata; none of a pickle."""
    return layouts.Opened(path).metadata if path.suffix.lower() == ".safetensors" else {}


def _by_trigger(paths: Sequence[Path], trigger: str | None) -> dict[str, Embedding]:
    """The embeddings by the trigger that each file names, or that was chosen for the only one."""
    if trigger is not None and len(paths) != 1:
        raise GenerateError(
            f"a trigger was chosen ({trigger!r}), and there are {len(paths)} embeddings "
            f"({', '.join(path.name for path in paths) or 'none'}); give one of the files alone, or no trigger"
        )
    if len(paths) == 1 and (several := layouts.triggers_of(paths[0])):
        if trigger is not None and len(several) > 1:
            raise GenerateError(f"{paths[0]} has the triggers {', '.join(several)}; give no other")
        return dict.fromkeys([trigger] if trigger else several, Embedding(paths[0]))
    found: dict[str, Embedding] = {}
    for path in paths:
        facts = _facts(path)
        own = trigger or facts.get("modelspec.trigger_phrase") or _named_in(path)
        if own in found:
            raise GenerateError(f"{found[own].file.name} and {path.name} both stand for {own!r}; give one of them")
        found[own] = Embedding(path, facts.get(START_WORDS, ""))
    return found


def _named_in(path: Path) -> str:
    """diffusers writes the trigger as the key; A1111 and ComfyUI take the file's name for it."""
    keys = list(layouts.Opened(path)) if path.suffix.lower() == ".safetensors" else []
    return keys[0] if len(keys) == 1 and keys[0] not in CLIENTS_KEYS else path.stem
