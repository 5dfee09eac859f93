"""The files of whatever a person names: folders, pictures, archives, URLs of them, or several at once.

What a file is, its content decides, never its suffix. The sources are only read.
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from preprocess.archive import tar_files, zip_files
from preprocess.fetch import download, is_url, shown
from preprocess.hub import dataset_id, hub_files
from preprocess.picture import looks_like_picture
from preprocess.types import Limits, PictureError, PreprocessError, SourceFile
from preprocess.unpack import Kind, has_zip, kind, unpacked
from trainer.args import HubArgs

__all__ = ["LEFT_OUT", "SourceFile", "in_memory", "kept", "named", "opened", "shown_all"]

LEFT_OUT = "?***"  # behind a URL that was kept without its query
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://.*?(?=\"\s*[,\]]|\s*\||\s*$)", re.DOTALL)
_JUNK = {"thumbs.db", "desktop.ini"}
_SIDECARS = (".txt", ".caption", ".json", ".mask.png")
_RANGE = re.compile(r"\{(\d{1,9})\.\.(\d{1,9})\}")  # shards, as in set-{000..010}.tar
_KNOWN = "give a folder, a picture, a .zip, a .tar (also .gz, .bz2, .xz, .zst), or an http(s) URL of one"
_WHY_NOT: dict[Kind, str] = {
    "7z": "is a 7z archive, which is not read here; pack it as .zip",
    "rar": "is a rar archive, which is not read here; pack it as .zip",
    "html": "is a web page, not pictures; give the address of the file itself",
}


@dataclass(frozen=True)
class _Opening:
    limits: Limits
    private: bool
    scratch: Path | None
    stack: ExitStack
    hub: HubArgs


@contextmanager
def opened(
    source: str,
    limits: Limits,
    *,
    private_urls: bool = False,
    scratch: Path | None = None,
    hub: HubArgs | None = None,
) -> Generator[list[SourceFile]]:
    """The files of a source in the order of their paths; hidden and system files are left out.

    Of several sources, the paths of each begin with a folder of its own.

    Args:
        source: folder, picture, archive, URL or data set of the hub; or several, as `a|b` or a JSON list.
        private_urls: URLs may lead into private networks.
        scratch: folder for temporary files [default: the system's].
        hub: which part of a data set is read.

    Raises:
        PreprocessError: nothing is there, it is of no known kind, or it is hostile; or `hub` is for none of it.
    """
    sources = named(source, limits)
    _check_hub(source, sources, hub)
    with ExitStack() as stack:
        opening = _Opening(limits, private_urls, scratch, stack, hub or HubArgs.model_validate({}))
        if len(sources) == 1:
            yield _visible(_files(sources[0], opening))
            return
        files: list[SourceFile] = []
        for folder, one in zip(_folders(sources), sources, strict=True):
            files += [replace(file, path=f"{folder}/{file.path}") for file in _visible(_files(one, opening))]
            if len(files) > limits.entries:
                raise PreprocessError(
                    f"the {len(sources)} sources hold more than {limits.entries} files together (data.limits.entries)"
                )
        yield sorted(files, key=lambda file: file.path)


def named(source: str, limits: Limits) -> list[str]:
    """The single sources that `source` names.

    Raises:
        PreprocessError: it names none, or too many.
    """
    found = _parts(source)
    if not found or not all(found):
        raise PreprocessError(f"data.source {shown_all(source)!r} names nothing, or has an empty part; {_KNOWN}")
    found = [one for source in found for one in _spread(source, limits)]
    if len(found) > limits.sources:
        raise PreprocessError(
            f"data.source names {len(found)} sources, and {limits.sources} are allowed (data.limits.sources)"
        )
    return found


def each(source: str, changed: Callable[[str], str]) -> str:
    """`source` with each of what it names changed; a text that names one thing stays plain text."""
    parts = [changed(one) for one in _parts(source)]
    return parts[0] if len(parts) == 1 else json.dumps(parts, ensure_ascii=False)


def _parts(source: str) -> list[str]:
    """What is between the bars, or in the JSON list; `source` itself where there is such a file or folder."""
    text = source.strip()
    if text and _exists(source):  # an empty path would be the current folder
        return [source]
    if text.startswith("["):
        try:
            listed: Any = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise PreprocessError(f"data.source starts like a JSON list, but is none: {error}") from error
        if not all(isinstance(one, str) for one in listed):
            raise PreprocessError("data.source is a JSON list, but not one of strings: each is a folder, file or URL")
        return [one.strip() for one in cast("list[str]", listed)]
    return [one.strip() for one in source.split("|")] if "|" in source else [source]


def _spread(source: str, limits: Limits) -> list[str]:
    """set-{000..010}.tar is eleven sources."""
    found = _RANGE.search(source)
    if not found or _exists(source):
        return [source]
    first, last = int(found[1]), int(found[2])
    if not first <= last < first + limits.sources:
        raise PreprocessError(
            f"data.source has {found[0]}, which must rise, by no more than {limits.sources} (data.limits.sources)"
        )
    before, after = source[: found.start()], source[found.end() :]
    return [f"{before}{n:0{len(found[1])}d}{after}" for n in range(first, last + 1)]


def in_memory(file: SourceFile) -> tuple[SourceFile, int]:
    """The file as another process can read it, and the bytes that it holds for that: what this one alone can read."""
    if file.anywhere:
        return file, 0
    try:
        content = file.read()
    except PictureError as error:
        return SourceFile(file.path, partial(_refused, str(error)), anywhere=True), 0
    return SourceFile(file.path, partial(bytes, content), anywhere=True), len(content)


def _refused(why: str) -> bytes:
    raise PictureError(why)


def shown_all(source: str) -> str:
    """`source` as it may be shown and logged: without passwords and queries of URLs, which may be keys."""
    return _URL.sub(lambda url: shown(url[0]), source)


def kept(source: str) -> str:
    """`source` as it may be kept in files: where a URL had a password or a query there is a mark, so that nobody takes
    the rest for the whole. `opened` knows it."""
    return _URL.sub(lambda url: url[0] if shown(url[0]) == url[0] else shown(url[0]) + LEFT_OUT, source)


def _exists(source: str) -> bool:
    try:
        return Path(source).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long for a path, a zero byte, a ~user that is nobody
        return False


def _folders(sources: list[str]) -> list[str]:
    """A name for each source, unique even where case does not count."""
    names: list[str] = []
    for source in sources:
        stem = PurePosixPath(shown(source).replace("\\", "/").rstrip("/")).name.partition(".")[0]
        name, n = stem or "source", 2
        while name.lower() in (taken.lower() for taken in names):
            name, n = f"{stem or 'source'}-{n}", n + 1
        names.append(name)
    return names


def _on_hub(source: str) -> str | None:
    return None if _exists(source) else dataset_id(source)


def _check_hub(source: str, sources: list[str], hub: HubArgs | None) -> None:
    given = hub.model_dump(exclude_defaults=True) if hub else {}
    if given and not any(map(_on_hub, sources)):
        options = ", ".join(f"data.hub.{name}" for name in given)
        raise PreprocessError(
            f"{options} would do nothing: data.source {shown_all(source)!r} is no data set of the Hugging Face hub; "
            "leave it out, or give a source like owner/name that is none on this machine"
        )


def _files(source: str, opening: _Opening) -> list[SourceFile]:
    dataset = _on_hub(source)
    if dataset:
        return hub_files(dataset, opening.hub, opening.limits, opening.scratch, opening.stack)
    if is_url(source):
        if source.endswith(LEFT_OUT):
            raise PreprocessError(
                f"data.source {shown(source)} was kept without its query, which may be a key: give the whole address "
                "again as --data.source"
            )
        got = download(source, opening.limits, private=opening.private, scratch=opening.scratch)
        file = opening.stack.enter_context(got.file)
        files = _contents(file, shown(source), opening)
        return [_downloaded(file, got.name, shown(source), opening.limits)] if files is None else files
    if not _exists(source):
        raise PreprocessError(f"data.source {source!r} does not exist; {_KNOWN}")
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path, opening.limits)
    if not path.is_file():
        raise PreprocessError(f"data.source {source!r} is a pipe or a device; {_KNOWN}")
    try:
        file = opening.stack.enter_context(path.open("rb"))
    except OSError as error:
        raise PreprocessError(f"data.source {source!r} cannot be read: {error.strerror}") from error
    files = _contents(file, source, opening)
    return _beside(path, opening.limits) if files is None else files


def _contents(file: IO[bytes], source: str, opening: _Opening) -> list[SourceFile] | None:
    """The files of an archive, or None of a single picture."""
    limits, what = opening.limits, kind(file)
    if what in ("gz", "bz2", "xz", "zst"):
        if opening.scratch:
            opening.scratch.mkdir(parents=True, exist_ok=True)
        inner = opening.stack.enter_context(unpacked(file, what, source, limits, opening.scratch))
        if kind(inner) != "tar":
            raise PreprocessError(f"data.source {source!r} is compressed ({what}), but holds no tar; {_KNOWN}")
        return tar_files(inner, source, limits)
    if what == "tar":
        return tar_files(file, source, limits)
    if what in _WHY_NOT:
        raise PreprocessError(f"data.source {source!r} {_WHY_NOT[what]}")
    if what == "other" and looks_like_picture(file):
        return None
    if what == "zip" or has_zip(file):
        return zip_files(file, source, limits)
    raise PreprocessError(f"data.source {source!r} is neither a folder nor a picture, zip or tar archive; {_KNOWN}")


def _visible(files: list[SourceFile]) -> list[SourceFile]:
    return [file for file in files if not _hidden(PurePosixPath(file.path))]


def _hidden(path: PurePosixPath) -> bool:
    return path.name.lower() in _JUNK or any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def _downloaded(file: IO[bytes], name: str, source: str, limits: Limits) -> SourceFile:
    if file.seek(0, 2) > limits.file_bytes:
        raise PreprocessError(
            f"{source!r} is refused: it has more than {limits.file_bytes} bytes (data.limits.file_bytes)"
        )

    def read() -> bytes:
        file.seek(0)
        return file.read()

    return SourceFile(name.lstrip(".") or "picture", read)


def _beside(path: Path, limits: Limits) -> list[SourceFile]:
    """A picture with what stands beside it and belongs to it."""
    sidecars = [path.with_name(path.stem + ending) for ending in _SIDECARS]
    return [
        SourceFile(_printable(one.name.lstrip(".")), lambda one=one: _read_file(one, limits))
        for one in (path, *sidecars)
        if one.exists()
    ]


def _folder(root: Path, limits: Limits) -> list[SourceFile]:
    files: list[SourceFile] = []
    for folder, folders, names in os.walk(root):  # links to folders are not followed: they may form circles
        folders.sort()
        for name in names:
            path = Path(folder, name)
            relative = PurePosixPath(path.relative_to(root).as_posix())
            if not _hidden(relative):
                files.append(SourceFile(_printable(str(relative)), partial(_read_file, path, limits), anywhere=True))
        if len(files) > limits.entries:
            raise PreprocessError(
                f"{str(root)!r} holds more than {limits.entries} files "
                "(data.limits.entries); give the folder of the pictures"
            )
    return sorted(files, key=lambda file: file.path)


def _printable(path: str) -> str:
    r"""The name of a file as it may be shown: control characters, and bytes that are no text, become \n or \udcff."""
    if path.isprintable():
        return path
    harmful = ("Cc", "Cs", "Zl", "Zp")
    return "".join(
        letter.encode("unicode_escape").decode() if unicodedata.category(letter) in harmful else letter
        for letter in path
    )


def _read_file(path: Path, limits: Limits) -> bytes:
    try:
        if not path.is_file():  # a pipe or a device would be read for ever
            raise PictureError("it is no regular file")
        if path.stat().st_size > limits.file_bytes:
            raise PictureError(f"it has more than {limits.file_bytes} bytes (data.limits.file_bytes)")
        return path.read_bytes()
    except OSError as error:
        raise PictureError(f"it cannot be read: {error.strerror}") from error
