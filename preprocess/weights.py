"""Models that look at pictures, for stages other than captions: where they lie, what keys them, how they are freed."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from preprocess.captioners import model
from preprocess.captioners.model import Place
from preprocess.types import PreprocessError
from trainer.registry import nearest


def find(option: str, base: str | None, revision: str | None) -> Place:
    """The model in a folder, or a hub id at one revision.

    Args:
        option: the section that names it ("data.mask.detect"), for messages.

    Raises:
        PreprocessError: there is none, or it has no revision where it needs one or has one where it cannot.
    """
    if base is None:
        raise PreprocessError(f"{option}.base is missing: give the folder or hub id of a model")
    if Path(base).is_dir():
        if revision is not None:
            raise PreprocessError(
                f"{option}.revision is {revision!r}, but {base!r} is a folder, which has no revisions; leave it out"
            )
        return Place(base, None)
    if revision is None:
        raise PreprocessError(
            f"{option}.base {base!r} is no folder; if it is a hub id, say which version of it: "
            f"set {option}.revision to a commit or tag"
        )
    return Place(base, revision)


def load(option: str, place: Place, what: str, kind: Callable[..., Any], **settings: Any) -> Any:
    """What `kind`, a from_pretrained of transformers, makes of the files there.

    Args:
        what: the kind of model, as a message should call it ("a CLIPSeg model").

    Raises:
        PreprocessError: they are missing or of another kind.
    """
    from huggingface_hub.errors import StrictDataclassError  # of a config whose values are of wrong types

    try:
        return kind(place.base, **({"revision": place.revision} if place.revision else {}), **settings)
    except (OSError, ValueError, KeyError, ImportError, StrictDataclassError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise PreprocessError(f"{option}.base {place.base!r} cannot be loaded as {what}: {reason}") from error


@contextmanager
def on_device(option: str, network: Any, wanted: str) -> Generator[Any]:
    """The network on the device that `option` wants, for reading only; its memory is given back afterwards.

    Raises:
        PreprocessError: this machine has no such device.
    """
    with model.on_device(network, model.device_of(wanted, option)) as placed:
        yield placed


def known_labels(option: str, model: Any, wanted: tuple[str, ...]) -> list[int]:
    """The numbers that the model gives these labels; upper and lower case are the same.

    Raises:
        PreprocessError: the model does not know one of them.
    """
    numbers: dict[str, int] = {str(name).lower(): int(number) for number, name in model.config.id2label.items()}
    for label in wanted:
        if label.lower() not in numbers:
            meant = nearest(label.lower(), numbers)
            hint = f"; did you mean {meant}?" if meant else ""
            names = sorted(numbers)
            shown = ", ".join(names[:100]) + (f" and {len(names) - 100} more" if len(names) > 100 else "")
            raise PreprocessError(f"{option}.labels names {label!r}, which the model does not know{hint} ({shown})")
    return [numbers[label.lower()] for label in wanted]
