"""Flags of dsft.merge."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from dsft.config.flags import CommonFlags, flag
from dsft.text import one_line


@dataclass(kw_only=True)
class MergeConfig(CommonFlags):
    """Merge a LoRA checkpoint into its base model, and verify the result."""

    checkpoint: str = flag(required=True, section="Merge")
    """A run's folder (its best checkpoint, else the latest) or a checkpoint folder."""
    output: str | None = flag(None)
    """Folder of the merged model, which must not exist; by default `merged` in the run's folder."""
    base: str | None = flag(None)
    """Base model, if not the one named in the adapter's config."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = flag("auto")
    """Dtype of the merged weights; auto keeps the base model's. The merge is computed in float32."""
    max_shard_size: str = flag("5GB")
    """Maximum size of a safetensors file."""
    tolerance: float | None = flag(None, must_be="0 or more")
    """Maximum difference of logits, relative to their standard deviation; by default 1e-3 (float32) or 1 (16 bit)."""
    trust_remote_code: bool = flag(False)
    """Run Python code that comes with the base model."""
    push_to_hub: str | None = flag(None, section="Publishing")
    """Upload the merged folder to this repository of the Hub (owner/name, or name), with the token of your login."""
    hub_private: bool = flag(True)
    """Make a repository created by --push_to_hub private."""
    hub_name: str | None = flag(None)
    """Repository named in the model card, if you upload later; --push_to_hub's by default."""

    def problems(self) -> Iterator[str]:
        for flag_name, name in (("push_to_hub", self.push_to_hub), ("hub_name", self.hub_name)):
            if name is not None:
                from huggingface_hub.errors import HFValidationError
                from huggingface_hub.utils import validate_repo_id

                try:
                    validate_repo_id(name)
                except HFValidationError as error:
                    yield f"{flag_name} {name}: {one_line(error)}; write owner/name, or name"
