"""Datasets on the Hugging Face Hub: hf://datasets/OWNER/NAME[/FOLDER, FILE or GLOB][@REVISION]."""

import glob
from pathlib import Path

from dsft.errors import UserError
from dsft.text import one_line

PREFIX = "hf://"


def find_on_hub(name: str, flag: str) -> Path:
    """Download a dataset's files, or those below a folder of it (often a configuration), into huggingface_hub's cache.

    Returns:
        The folder, the file, or a glob.

    Raises:
        UserError: the name is not of this form, or the Hub does not have it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    place, _, revision = name.removeprefix(PREFIX).partition("@")
    kind, *parts = place.strip("/").split("/")
    if kind != "datasets" or len(parts) < 2:
        raise UserError(
            f"--{flag} {name}: expected hf://datasets/OWNER/NAME, with /FOLDER or /FILE and @REVISION if needed"
        )
    repository, below = "/".join(parts[:2]), "/".join(parts[2:])
    patterns = [below, f"{below}/*"] if below else None
    try:
        folder = snapshot_download(repository, repo_type="dataset", revision=revision or None, allow_patterns=patterns)
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = one_line(error)[:300]
        raise UserError(
            f"--{flag} {name} cannot be downloaded: {reason}; check the name, the network, and HF_TOKEN"
        ) from error
    found = Path(folder, below)
    if not (found.exists() or glob.glob(str(found))):
        raise UserError(f"--{flag} {name}: {repository} has no {below}; name one of its folders or files")
    return found
