"""The model that a run starts from, and the model that it trains."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from dsft.backends.base import Backend
from dsft.checkpointing.models import resolve_model
from dsft.checkpointing.resuming import InitialWeights, find_initial_weights
from dsft.config import TrainConfig
from dsft.distributed import runtime
from dsft.loss import TargetHead
from dsft.model import tree_attention
from dsft.model.initial_weights import LoraInitializer
from dsft.model.lora import add_lora
from dsft.model.source import ModelSource, load_tokenizer
from dsft.planning.activations import recompute_layers
from dsft.planning.plan import RunPlan, lora_options
from dsft.training.optimizer import make_schedule


@dataclass(frozen=True)
class BaseModel:
    """What --model and --init_from name.

    path: what from_pretrained takes
    name: for adapter_config.json
    initial_adapter: LoRA weights to start from
    shapes: the model on the meta device
    """

    path: str
    name: str
    source: ModelSource
    tokenizer: PreTrainedTokenizerBase
    initial_adapter: InitialWeights | None
    shapes: Any


def find_base_model(
    config: TrainConfig, resume_from: Path | None, world: runtime.World, dtype: torch.dtype
) -> BaseModel:
    """Find the model and check that its files can be used. Called on every rank.

    Raises:
        UserError: they cannot, on the rank that says so; PeerFailedError on the others.
    """
    first = world.local_rank == 0
    path = name = runtime.on_first_local_rank(world, lambda: resolve_model(config.model, check=first))
    if path != str(Path(config.model).expanduser().resolve()):
        name = config.model
    initial = runtime.together(lambda: find_initial_weights(config, path, resume_from, check=first))
    if initial is not None and not initial.is_adapter:
        path, name, initial = str(initial.folder), str(initial.folder), None
    trust = config.trust_remote_code
    template = config.chat_template
    tokenizer = runtime.together(lambda: load_tokenizer(path, trust_remote_code=trust, chat_template=template))
    source = ModelSource(path, attn_implementation=config.attn_implementation, trust_remote_code=trust)
    runtime.together(source.check)
    return BaseModel(path, name, source, tokenizer, initial, shapes=source.empty(dtype))


def build_model(
    config: TrainConfig,
    base: BaseModel,
    plan: RunPlan,
    backend: Backend,
    make_optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
    total_steps: int,
) -> tuple[Any, TargetHead]:
    """The model with LoRA, its head and optimizer, sharded by the backend. Called on every rank.

    Returns:
        The model as PEFT or transformers has it, whose parameters the backend shards, and its head.
    """
    backend.setup()
    model: Any = backend.load_model(base.source)
    model.config.use_cache = False
    if plan.micro_batches.trees:
        model.set_attn_implementation(tree_attention.NAME)
    lora = lora_options(config)
    if lora is not None:
        bare = model
        model = runtime.together(lambda: add_lora(bare, lora, base.name))
        base.source.after_fill = LoraInitializer(model, config.seed)
        base.source.after_fill(model)
    head = TargetHead(model)
    backend.prepare(
        model,
        make_optimizer,
        lambda optimizer: make_schedule(optimizer, config, total_steps),
    )
    recompute_layers(model, plan.checkpointed_layers)
    return model, head
