"""--model where it may be a checkpoint of full fine-tuning."""

from pathlib import Path

from dsft.checkpointing.folder import find_checkpoint, is_checkpoint
from dsft.model import source


def resolve_model(name: str, *, check: bool = True) -> str:
    """What from_pretrained takes for --model; see `dsft.model.source.resolve_model`.

    Args:
        check: where it is a checkpoint of full fine-tuning, compare its checksums; see `find_checkpoint`.

    Raises:
        UserError: a folder that is no model, a damaged checkpoint, or no safetensors weights.
    """
    if is_checkpoint(Path(name).expanduser()):
        find_checkpoint(name, "model", check=check)
    return source.resolve_model(name)
