"""How much each folder of pictures counts: how often its pictures are shown, how much their loss weighs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

from trainer.registry import nearest


class MixtureError(ValueError):
    """An option names a folder that holds no picture. One sentence with those that do."""


class Picture(Protocol):
    """What a mixture depends on, of a picture."""

    @property
    def name(self) -> str: ...
    @property
    def folder(self) -> str:
        """Of the file that it came from, relative to the source; . at the top."""
        ...

    @property
    def regular(self) -> bool:
        """True for one of the regularisation set."""
        ...


P = TypeVar("P", bound=Picture)


def repeated(pictures: Sequence[P], repeats: Mapping[str, int], *, balance: bool, ratio: float = 1.0) -> list[P]:
    """The pictures of one epoch, in their order; each stands there as often as it is shown.

    With regularisation pictures the concepts' come as many times over as it takes to show each of those at least once,
    `ratio` of them for each of the concepts'.

    Args:
        repeats: folder -> how often each of its pictures is shown; folders that are not named count once.
        balance: even the folders out after that: each fills as many places as the largest, and within a folder
            pictures differ by one showing at most.

    Raises:
        MixtureError: a folder has no pictures.
    """
    _check("data.repeats", repeats, pictures)
    own = _repeated([picture for picture in pictures if not picture.regular], repeats, balance=balance)
    regular = _repeated([picture for picture in pictures if picture.regular], repeats, balance=False)
    if not regular:
        return own
    times = math.ceil(len(regular) / (ratio * len(own)))
    places = max(1, round(ratio * len(own) * times))
    return own * times + [regular[place % len(regular)] for place in range(places)]


def _repeated(pictures: Sequence[P], repeats: Mapping[str, int], *, balance: bool) -> list[P]:
    if not balance:
        return [picture for picture in pictures for _ in range(repeats.get(picture.folder, 1))]
    folders: dict[str, list[P]] = {}
    for picture in pictures:
        folders.setdefault(picture.folder, []).append(picture)
    places = max((len(members) * repeats.get(folder, 1) for folder, members in folders.items()), default=0)
    return [members[place % len(members)] for members in folders.values() for place in range(places)]


def weights(pictures: Sequence[P], by_folder: Mapping[str, float], regular: float = 1.0) -> dict[str, float] | None:
    """Picture name -> factor of its loss; None when all have 1.

    Args:
        regular: factor of regularisation pictures, with that of their folder.

    Raises:
        MixtureError: a folder has no pictures.
    """
    _check("data.weights", by_folder, pictures)
    if not by_folder and regular == 1.0:
        return None
    return {p.name: by_folder.get(p.folder, 1.0) * (regular if p.regular else 1.0) for p in pictures}


def _check(option: str, named: Mapping[str, object], pictures: Sequence[P]) -> None:
    there = sorted({picture.folder for picture in pictures})
    for folder in named:
        if folder not in there:
            meant = nearest(folder, there)
            hint = f"; did you mean {meant}?" if meant else ""
            some = ", ".join(there[:10]) + (" and more" if len(there) > 10 else "")
            raise MixtureError(f"{option} names the folder {folder!r}, which has no pictures{hint} (folders: {some})")
