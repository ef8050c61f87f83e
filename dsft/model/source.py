"""Where a base model comes from: its folder or name, tokenizer, skeleton and weights."""

import contextlib
import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

from dsft.errors import UserError, did_you_mean_path
from dsft.model.embedded import NAME as EMBEDDED
from dsft.model.embedded import embedded_model
from dsft.text import one_line

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
Weight = Callable[[], torch.Tensor]
"""Reads a tensor when it is needed."""


def resolve_model(name: str) -> str:
    """What from_pretrained takes for --model: the embedded model's folder, a checked folder, or a Hub name.

    Raises:
        UserError: a folder that is not a model, or without safetensors weights.
    """
    if name == EMBEDDED:
        return str(embedded_model())
    folder = Path(name).expanduser()
    if not folder.exists():
        if name.startswith((".", "/", "~")) or name.count("/") != 1:
            raise UserError(f"--model {name}: no such folder{did_you_mean_path(name, [EMBEDDED])}")
        return name
    if not (folder / "config.json").is_file():
        within = [str(path) for path in sorted(folder.iterdir()) if (path / "config.json").is_file()]
        meant = f" (did you mean '{within[0]}'?)" if within else ""
        raise UserError(f"--model {name}: the folder has no config.json, so it is not a model{meant}; name one that is")
    if not (folder / SINGLE).is_file() and not (folder / INDEX).is_file():
        raise UserError(
            f"--model {name}: the folder has no {SINGLE} and no {INDEX}; "
            "pickled weights (.bin, .pt) are not read, convert them to safetensors"
        )
    return str(folder.resolve())


def load_tokenizer(path: str, *, trust_remote_code: bool, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a resolved model, with the chat template of a file if one is given.

    Raises:
        UserError: one of them cannot be loaded.
    """
    tokenizer = _load(AutoTokenizer.from_pretrained, path, "tokenizer", trust_remote_code=trust_remote_code)
    if chat_template is not None:
        try:
            tokenizer.chat_template = Path(chat_template).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            meant = did_you_mean_path(chat_template)
            raise UserError(f"--chat_template {chat_template} cannot be read: {one_line(error)}{meant}") from error
    return tokenizer


class ModelSource:
    """One base model that a backend can build in its own way, without any rank holding the whole of it.

    `pretrained()` loads through transformers, in whatever context the backend has opened. `skeleton()` has its
    parameters on the meta device, and `fill(module)` gives them their values, one module at a time.
    """

    def __init__(self, path: str, *, attn_implementation: str = "auto", trust_remote_code: bool = False) -> None:
        self.path = path
        self.loads_whole = False
        """Whether `skeleton` has loaded all weights, because transformers converts them while loading."""
        self._trust = {"trust_remote_code": trust_remote_code}
        attention = {} if attn_implementation == "auto" else {"attn_implementation": attn_implementation}
        self._options: dict[str, Any] = self._trust | attention
        self._weights: dict[nn.Parameter, Weight] = {}  # of a skeleton's parameters
        self._tied: dict[nn.Parameter, nn.Parameter | None] = {}  # those used in several places -> its filled form
        self.after_fill: Callable[[nn.Module], None] = lambda module: None

    def check(self) -> None:
        """Read the config and the headers of the weight files, so that a bad model fails before any collective.

        Raises:
            UserError: no such model, missing or damaged files, or weights that do not match the config.
        """
        stored, model = self._stored_weights(), self.empty(None)
        if getattr(model.config, "quantization_config", None):
            return  # packed weights have shapes of their own
        for name, parameter in model.named_parameters():
            shape = list(parameter.shape)
            if name in stored and stored[name][1] != shape:
                raise UserError(
                    f"--model {self.path}: '{name}' has the shape {stored[name][1]} in the weight files, but {shape} "
                    "by config.json; download the folder again"
                )

    def pretrained(self, dtype: torch.dtype | str) -> Any:
        """The whole model through transformers; dtype "auto" is that of its config."""
        return _load(AutoModelForCausalLM.from_pretrained, self.path, "model", dtype=dtype, **self._options)

    def skeleton(self, dtype: torch.dtype) -> Any:
        """The model with its parameters on the meta device and its buffers computed.

        Raises:
            UserError: no such model, or its weights do not match its config.
        """
        model = self.empty(dtype)
        model.tie_weights()
        model.name_or_path = self.path
        if model.can_generate():
            with contextlib.suppress(OSError):  # without one, it is derived from the config
                model.generation_config = GenerationConfig.from_pretrained(self.path)
        weights = self._find_weights(model, dtype)
        self._weights = {parameter: weights[name] for name, parameter in model.named_parameters()}  # tied ones once
        uses = Counter(parameter for _, parameter in model.named_parameters(remove_duplicate=False))
        self._tied = {parameter: None for parameter, count in uses.items() if count > 1}
        return model

    def fill(self, module: nn.Module) -> None:
        """Give every parameter of `module` that is still on the meta device its value, on CPU.

        A parameter shared with a module filled earlier becomes the same object again. Parameters that did not come
        with the model (LoRA's) are left to `after_fill`, which is called with the module.
        """
        for owner in module.modules():
            for name, parameter in list(owner.named_parameters(recurse=False)):
                if not parameter.is_meta or parameter not in self._weights:
                    continue
                filled = self._tied.get(parameter)
                if filled is None:
                    weight = self._weights[parameter]().to(parameter.dtype, copy=True)  # else the file stays mapped
                    filled = nn.Parameter(weight, requires_grad=parameter.requires_grad)
                if parameter in self._tied:
                    self._tied[parameter] = filled
                setattr(owner, name, filled)
        self.after_fill(module)

    def empty(self, dtype: torch.dtype | None) -> Any:
        """The model described by its config, with parameters on the meta device; no weight file is opened."""
        config = _load(AutoConfig.from_pretrained, self.path, "model", **self._trust)

        def build(_path: str, **options: Any) -> Any:
            with init_empty_weights(include_buffers=False):
                return AutoModelForCausalLM.from_config(config, dtype=dtype, **options)

        return _load(build, self.path, "model", **self._options)

    def _find_weights(self, model: nn.Module, dtype: torch.dtype) -> dict[str, Weight]:
        """Of each parameter: straight from safetensors if the names agree, else through transformers.

        transformers renames or fuses the weights of some architectures while loading; those are loaded whole on CPU.
        """
        stored = self._stored_weights()
        expected = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
        prefix = getattr(model, "base_model_prefix", "")
        for found in (
            stored,
            {f"{prefix}.{name}": weight for name, weight in stored.items()},
        ):  # saved without the head
            if all(name in found and found[name][1] == shape for name, shape in expected.items()):
                return {name: found[name][0] for name in expected}
        self.loads_whole = True
        whole = self.pretrained(dtype).state_dict()
        return {name: partial(whole.__getitem__, name) for name in whole}

    def _stored_weights(self) -> dict[str, tuple[Weight, list[int]]]:
        """Name -> (weight, shape) of every tensor in the weight files."""
        folder = Path(self.path)
        if not folder.is_dir():
            patterns = ["*.safetensors", "*.json"]
            folder = Path(_load(snapshot_download, self.path, "model", allow_patterns=patterns))
        names = [SINGLE]
        if (folder / INDEX).is_file():
            try:
                names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(
                    f"--model {self.path}: {INDEX} is damaged ({error}); download the folder again"
                ) from error
        stored: dict[str, tuple[Weight, list[int]]] = {}
        for file in names:
            path = str(folder / file)
            if not Path(path).is_file():
                raise UserError(f"--model {self.path}: {file} is missing; download the folder again")
            try:
                with safe_open(path, framework="pt") as handle:
                    for name in handle.keys():  # noqa: SIM118 (not a dict)
                        stored[name] = partial(_read, path, name), list(handle.get_slice(name).get_shape())
            except SafetensorError as error:
                raise UserError(
                    f"--model {self.path}: {file} is not a valid safetensors file ({error}); download it again"
                ) from error
        return stored


def _read(file: str, name: str) -> torch.Tensor:
    with safe_open(file, framework="pt") as handle:
        return handle.get_tensor(name)


def _load(load: Callable[..., Any], path: str, what: str, **options: Any) -> Any:
    """Call from_pretrained, or the like, and turn its failures into one line."""
    try:
        return load(path, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        meant = did_you_mean_path(path)  # a folder's name may look like one of the Hub
        raise UserError(f"--model {path}: the {what} cannot be loaded: {one_line(error)[:300]}{meant}") from error
