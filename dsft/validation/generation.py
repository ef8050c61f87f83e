"""Generates answers to prompts, with transformers or with vLLM if it is installed."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from dsft.checkpointing.folder import ADAPTER, find_checkpoint, is_checkpoint
from dsft.checkpointing.models import resolve_model
from dsft.checkpointing.tensor_files import TensorReader
from dsft.config import ValidateConfig
from dsft.dataset.chat_format import ChatFormat
from dsft.distributed import runtime
from dsft.errors import UserError
from dsft.model.source import ModelSource, load_tokenizer
from dsft.text import one_line


class Generator(Protocol):
    """Answers prompts."""

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, prompts: Sequence[Sequence[int]]) -> list[str]:
        """An answer for each prompt of token ids, without its end-of-turn token."""
        ...


def load_generator(config: ValidateConfig, device: torch.device) -> "TransformersGenerator | VllmGenerator":
    """The generator that the flags ask for.

    Raises:
        UserError: the model or the adapter cannot be loaded, or they do not fit.
    """
    world = runtime.World.from_environment()
    path = resolve_model(config.model, check=world.local_rank == 0)
    adapter = _find_adapter(config.adapter, check=world.local_rank == 0) if config.adapter else None
    if config.engine == "vllm":
        if world.size > 1:
            raise UserError("--engine vllm runs in one process; start without a launcher, or drop --engine vllm")
        return VllmGenerator(config, path, adapter)
    return TransformersGenerator(config, path, adapter, device)


def _find_adapter(name: str, *, check: bool) -> Path:
    """The folder of the adapter of a run, a checkpoint, or a folder written by PEFT."""
    folder = Path(name).expanduser()
    if is_checkpoint(folder) or not (folder / f"{ADAPTER}.safetensors").is_file():
        folder = find_checkpoint(name, "adapter", check=check)
    if not (folder / "adapter_config.json").is_file():
        raise UserError(
            f"--adapter {name}: {folder} contains no adapter_config.json; name it with --model if it is a model"
        )
    TensorReader(folder, ADAPTER)  # without safetensors PEFT would open a pickle
    return folder


class TransformersGenerator:
    """transformers' generate: left padding, key-value cache, stop at end-of-turn."""

    def __init__(self, config: ValidateConfig, path: str, adapter: Path | None, device: torch.device) -> None:
        trust = config.trust_remote_code
        self.tokenizer = tokenizer = load_tokenizer(path, trust_remote_code=trust, chat_template=config.chat_template)
        self.device = device
        source = ModelSource(path, attn_implementation=config.attn_implementation, trust_remote_code=trust)
        source.check()
        model = source.pretrained(runtime.pick_dtype(config.dtype, device))
        if adapter is not None:
            from peft import PeftModel

            try:
                model = PeftModel.from_pretrained(model, str(adapter))
            except (OSError, ValueError, RuntimeError, KeyError) as error:
                reason = one_line(error)[:300]
                raise UserError(
                    f"--adapter {adapter} does not fit --model {config.model}: {reason}; name the model that it was "
                    "trained on"
                ) from error
        self.model: Any = model.to(device).eval()
        end = ChatFormat(tokenizer).end_of_turn
        own = self.model.generation_config.eos_token_id
        ends = {end, *([own] if isinstance(own, int) else own or [])}
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end
        self._positions = getattr(self.model.config, "max_position_embeddings", None) or math.inf
        self._options: dict[str, Any] = {
            "max_new_tokens": config.max_new_tokens,
            "eos_token_id": sorted(ends),
            "pad_token_id": self._pad,
            "do_sample": config.temperature > 0,
            "use_cache": True,
            # Instead of the model's own sampling settings.
            "temperature": config.temperature or None,
            "top_k": 0 if config.temperature else None,
            "top_p": 1.0 if config.temperature else None,
            "repetition_penalty": None,
        }

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Sequence[int]]) -> list[str]:
        longest = max(len(prompt) for prompt in prompts)
        if longest + self._options["max_new_tokens"] > self._positions:
            raise UserError(
                f"a prompt has {longest} tokens, which with --max_new_tokens {self._options['max_new_tokens']} is more "
                f"than the model's {self._positions} positions; lower it, --history_turns, --max_turns or --max_length"
            )
        rows = [torch.tensor(prompt, device=self.device) for prompt in prompts]
        ids = pad_sequence(rows, batch_first=True, padding_value=self._pad, padding_side="left")
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
        tokens = self.model.generate(input_ids=ids, attention_mask=mask, **self._options)
        return self.tokenizer.batch_decode(tokens[:, longest:], skip_special_tokens=True)


class VllmGenerator:
    """vLLM's offline engine, on one GPU."""

    def __init__(self, config: ValidateConfig, path: str, adapter: Path | None) -> None:
        from vllm import LLM, SamplingParams  # type: ignore[import-not-found]
        from vllm.lora.request import LoRARequest  # type: ignore[import-not-found]

        self.tokenizer = load_tokenizer(
            path, trust_remote_code=config.trust_remote_code, chat_template=config.chat_template
        )
        lora: dict[str, Any] = {}
        self._request = None
        if adapter is not None:
            rank = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["r"]
            lora = {"enable_lora": True, "max_lora_rank": rank}
            self._request = LoRARequest("adapter", 1, str(adapter))
        self._engine = LLM(
            model=path, dtype=config.dtype, trust_remote_code=config.trust_remote_code, seed=config.seed, **lora
        )
        self._sampling = SamplingParams(
            temperature=config.temperature,
            max_tokens=config.max_new_tokens,
            stop_token_ids=[ChatFormat(self.tokenizer).end_of_turn],
        )

    def __call__(self, prompts: Sequence[Sequence[int]]) -> list[str]:
        requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        results = self._engine.generate(requests, self._sampling, lora_request=self._request, use_tqdm=False)
        return [result.outputs[0].text for result in results]
