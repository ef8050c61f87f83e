"""Uploads a merged model's folder to the Hub."""

import shlex
import sys
from pathlib import Path

from dsft.errors import UserError
from dsft.text import one_line

STALE = ["model*.safetensors", "model.safetensors.index.json"]
"""Weights of an earlier merge: next to several new files, a single old one would be loaded instead."""


def push(folder: Path, name: str, *, private: bool) -> str:
    """Upload a merged model with the token that huggingface_hub finds, and return the repository's URL.

    The repository is created if needed, `private` or not; an existing one keeps its visibility.

    Raises:
        UserError: whatever went wrong, and the command to retry.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import LocalTokenNotFoundError
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    token = get_token()
    try:
        if token is None:
            raise LocalTokenNotFoundError
        api = HfApi()
        repository = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository.repo_id, folder_path=folder, commit_message="Merged by dsft", delete_patterns=STALE
        )
        return str(repository)
    except Exception as error:  # any: the user must know that the merged model is safe on disk
        stale = [word for pattern in STALE for word in ("--delete", pattern)]
        later = shlex.join(["hf", "upload", name, str(folder), ".", *(["--private"] if private else []), *stale])
        message = UserError(
            f"--push_to_hub {name}: {_reason(error, token)}; the merged model is complete in {folder}; "
            f"to push it: {later}"
        )
        has_leaked = token is not None and token in str(error)  # then not even --debug may show it
        raise message from (None if has_leaked else error)


def _reason(error: Exception, token: str | None) -> str:
    """The reason, in one line without the token."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if token is None:
        return "there is no token; log in with hf auth login, or set HF_TOKEN"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    text = one_line(error)[:300] or type(error).__name__
    if token in text or isinstance(error, UnicodeError):
        return "the token cannot be sent as it is; log in again with hf auth login, or set HF_TOKEN"
    if status == 401:
        return "the Hub refuses the token (401); log in again with hf auth login, or set HF_TOKEN"
    if status == 403:
        reply = getattr(error, "server_message", None) or text
        return f"the token may not write there (403: {reply}); take one with write access, or another name"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it"
    if isinstance(error, OSError) or "Connect" in type(error).__name__ or "Timeout" in type(error).__name__:
        return f"{constants.ENDPOINT} cannot be reached ({text})" if status is None else text
    return text
