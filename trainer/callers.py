"""What a caller of a server may ask for: nothing that reads the server's own files, or that its operator decides."""

from __future__ import annotations

import base64
import binascii
import json
import os
from typing import Any

from preprocess.fetch import download, is_url
from preprocess.source import named
from trainer.args import LimitsArgs, ModelArgs, TrainArgs

_ARGS_BYTES = 2**20
LIMITS = LimitsArgs.model_validate({})


class CallerError(ValueError):
    """Something that is not the caller's, or cannot be read. One sentence."""


def private_urls() -> bool:
    """Whether this server's operator lets callers' URLs lead into its own network (TEMPERA_PRIVATE_URLS=1)."""
    return os.environ.get("TEMPERA_PRIVATE_URLS") == "1"


def base() -> str:
    """The base where nobody names one (TEMPERA_BASE)."""
    return os.environ.get("TEMPERA_BASE") or str(ModelArgs.model_fields["base"].default)


def allowed(args: TrainArgs) -> TrainArgs:
    """The args as this server runs them for a caller.

    Raises:
        CallerError: they set what is the operator's.
    """
    if args.data.private_urls or args.data.limits != LIMITS:
        raise CallerError("data.private_urls and data.limits are for the operator of this server, not for its callers")
    ordinary = args.data.regularisation.source
    if ordinary is not None and not _urls(ordinary):
        raise CallerError("data.regularisation.source must be an http(s) URL here: files of the server are not yours")
    return args.model_copy(update={"data": args.data.model_copy(update={"private_urls": private_urls()})})


def source(given: object) -> str:
    """data.source of what Cog has downloaded, or of a list of URLs; never a path that the caller wrote."""
    if isinstance(given, os.PathLike):
        return str(given)
    text = str(given).strip()
    if not _urls(text):
        raise CallerError(
            "input_images must be a zip or tar (a URL or an upload), or a JSON list of URLs: files of the server are "
            "not yours"
        )
    return text


def _urls(text: str) -> bool:
    return all(is_url(one) for one in named(text, LIMITS))


def json_object(text: str) -> dict[str, Any]:
    """The JSON object that `text` is, or that is at its URL."""
    said = text
    if said.startswith("data:"):
        try:
            said = base64.b64decode(said.partition(",")[2], validate=True).decode()
        except (binascii.Error, UnicodeDecodeError) as error:
            raise CallerError(f"args is a data URL that holds no JSON: {error}") from error
    elif is_url(said):
        bounds = LIMITS.model_copy(update={"total_bytes": _ARGS_BYTES})
        with download(said, bounds, private=private_urls()).file as file:
            file.seek(0)
            said = file.read().decode(errors="replace")
    try:
        value: Any = json.loads(said)
    except json.JSONDecodeError as error:
        raise CallerError(f"args is not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(value, dict):
        raise CallerError('args must be a JSON object of sections, such as {"adapter": {"rank": 4}}')
    return value
