"""A folder on the Hugging Face Hub, through its own client."""

from __future__ import annotations

from pathlib import Path

import httpx2
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

_TROUBLE = (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, httpx2.HTTPError)


class HubError(ValueError):
    """The Hub does not take it. One sentence."""


def prepared(repo: str, token: str) -> None:
    """Makes the repository, private where it is new: whoever may not write to it hears so before a run, not after.

    Raises:
        HubError: no such account, no right to write, or no hub.
    """
    try:
        HfApi(token=token).create_repo(repo, private=True, exist_ok=True)
    except _TROUBLE as error:
        raise HubError(
            f"hf_repo_id {repo} cannot be written to: {_first(error)}; give a token that may write to it, or leave "
            "hf_repo_id out"
        ) from error


def pushed(folder: Path, repo: str, token: str) -> str:
    """Uploads all of the folder as one commit; its address.

    Raises:
        HubError: it is not there; what was there before still is.
    """
    try:
        api = HfApi(token=token)
        return api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Trained weights").commit_url
    except _TROUBLE as error:
        raise HubError(f"the files were not pushed to {repo}: {_first(error)}") from error


def _first(error: Exception) -> str:
    """The first line of what the client says, which names no token."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
