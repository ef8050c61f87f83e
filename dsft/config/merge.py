"""Flags of dsft.merge."""

from dataclasses import dataclass
from typing import Literal

from dsft.config.flags import CommonFlags, flag, too_small
from dsft.errors import UserError


@dataclass(kw_only=True)
class MergeConfig(CommonFlags):
    """Merge a LoRA checkpoint into its base model, and prove that the result is right."""

    checkpoint: str = flag(required=True, section="Merge")
    """A run's folder (its best checkpoint is taken, else the latest) or one checkpoint folder."""
    output: str | None = flag(None)
    """Folder of the merged model; the run's folder plus /merged by default. Must not exist."""
    base: str | None = flag(None)
    """Base model, where it is not the one named in the adapter's config."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = flag("auto")
    """Dtype of the merged weights; auto keeps the base model's. The sum itself is done in float32."""
    max_shard_size: str = flag("5GB")
    """Largest safetensors file."""
    tolerance: float | None = flag(None)
    """Largest difference of logits, relative to their spread; by default 1e-3 (float32) or 1 (16 bit)."""
    trust_remote_code: bool = flag(False)
    """Run Python code that comes with the base model."""
    push_to_hub: str | None = flag(None, section="Publishing")
    """Upload the merged folder to this repository of the Hub, as owner/name or name; your login's token is used."""
    hub_private: bool = flag(True)
    """Make the repository private, where --push_to_hub makes it."""

    hub_name: str | None = flag(None)
    """Repository that the model's card names, where you push it later; --push_to_hub's by default."""

    def check(self) -> None:
        """Raise UserError with every problem that can be seen without reading the model."""
        problems = too_small(self, 0, "tolerance")
        for flag_name in ("push_to_hub", "hub_name"):
            name = getattr(self, flag_name)
            if name is not None:
                problems += _name_problems(flag_name, name)
        if problems:
            raise UserError("\n".join(problems))


def _name_problems(flag_name: str, name: str) -> list[str]:
    """What the Hub's own library finds wrong with a repository's name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        return [f"{flag_name} {name}: {' '.join(str(error).split()).rstrip('.')}; write owner/name, or name"]
    return []
