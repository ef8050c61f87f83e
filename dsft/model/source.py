"""Where a base model comes from: its folder or name, tokenizer, skeleton and weights."""

import contextlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from dsft.errors import UserError, did_you_mean_path
from dsft.model.embedded import NAME as EMBEDDED
from dsft.model.embedded import embedded_model

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def resolve_model(name: str) -> str:
    """What from_pretrained takes for --model: the embedded model's folder, a checked folder, or a Hub name.

    Raises:
        UserError: a folder that is no model, or without safetensors weights.
    """
    if name == EMBEDDED:
        return str(embedded_model())
    folder = Path(name).expanduser()
    if not folder.exists():
        looks_like_path = name.startswith((".", "/", "~")) or name.count("/") != 1
        if looks_like_path:
            raise UserError(f"--model {name}: no such folder{did_you_mean_path(name, [EMBEDDED])}")
        return name
    if not (folder / "config.json").is_file():
        within = [str(path) for path in sorted(folder.iterdir()) if (path / "config.json").is_file()]
        meant = f" (did you mean '{within[0]}'?)" if within else ""
        raise UserError(f"--model {name}: the folder has no config.json, so it is no model{meant}; name one that has")
    if not (folder / SINGLE).is_file() and not (folder / INDEX).is_file():
        raise UserError(
            f"--model {name}: the folder has no {SINGLE} and no {INDEX}; "
            "pickled weights (.bin, .pt) are not read, convert them to safetensors"
        )
    return str(folder.resolve())


def load_tokenizer(path: str, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of a resolved model.

    Raises:
        UserError: it cannot be loaded.
    """
    return _from_pretrained(AutoTokenizer.from_pretrained, path, "tokenizer", trust_remote_code=trust_remote_code)


class ModelSource:
    """One base model that a backend can build in its own way, without any rank holding the whole of it.

    `pretrained()` loads through transformers, under whatever context the backend has opened. `skeleton()` has
    parameters on the meta device, which `fill(module)` then gives real values, one module at a time.
    """

    def __init__(self, path: str, *, attn_implementation: str = "auto", trust_remote_code: bool = False) -> None:
        self.path = path
        self._options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        if attn_implementation != "auto":
            self._options["attn_implementation"] = attn_implementation
        self._weights: dict[str, Callable[[], torch.Tensor]] = {}
        self._names: dict[int, str] = {}  # id of a skeleton's parameter -> its name
        self._tied: dict[int, nn.Parameter | None] = {}  # id of one used in several places -> its filled form
        self.after_fill: Callable[[nn.Module], None] = lambda module: None

    def check(self) -> None:
        """Read the config and the heads of the weight files, so that a bad model fails before any collective.

        Raises:
            UserError: no such model, missing or damaged files, or weights that do not fit the config.
        """
        shapes = {name: shape for name, (_, shape) in self._open_files().items()}
        model = self.empty(None)
        if getattr(model.config, "quantization_config", None):
            return  # packed weights have shapes of their own
        for name, parameter in model.named_parameters():
            if shapes.get(name, list(parameter.shape)) != list(parameter.shape):
                raise UserError(
                    f"--model {self.path}: '{name}' has the shape {shapes[name]} in the weight files, but "
                    f"{list(parameter.shape)} by config.json; fetch the folder again"
                )

    def pretrained(self, dtype: torch.dtype | str) -> Any:
        """The whole model through transformers; dtype "auto" is that of its config."""
        return _from_pretrained(AutoModelForCausalLM.from_pretrained, self.path, "model", dtype=dtype, **self._options)

    def skeleton(self, dtype: torch.dtype) -> Any:
        """The model with its parameters on the meta device and its buffers computed.

        Raises:
            UserError: no such model, or its weights do not fit its config.
        """
        model = self.empty(dtype)
        model.tie_weights()
        model.name_or_path = self.path
        if model.can_generate():
            from transformers import GenerationConfig

            with contextlib.suppress(OSError):  # a model may come without one; it is then derived from the config
                model.generation_config = GenerationConfig.from_pretrained(self.path)
        names = dict(model.named_parameters())  # a tied weight appears once
        self._weights = self._open_weights(model, dtype)
        self._names = {id(parameter): name for name, parameter in names.items()}
        self._skeleton_parameters = list(names.values())  # their ids stay theirs while they live
        uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
        self._tied = {key: None for key, count in uses.items() if count > 1}
        return model

    def fill(self, module: nn.Module) -> None:
        """Give every parameter of `module` that is still on the meta device its value, on CPU.

        A parameter shared with a module filled earlier becomes the same object again. Parameters that did not
        come with the model (LoRA's) are left to `after_fill`, which is called with the module.
        """
        for owner in module.modules():
            for name, parameter in list(owner.named_parameters(recurse=False)):
                key = id(parameter)
                if not parameter.is_meta or key not in self._names:
                    continue
                filled = self._tied.get(key)
                if filled is None:
                    weight = self._weights[self._names[key]]().to(parameter.dtype)
                    filled = nn.Parameter(weight, requires_grad=parameter.requires_grad)
                if key in self._tied:
                    self._tied[key] = filled
                setattr(owner, name, filled)
        self.after_fill(module)

    def empty(self, dtype: torch.dtype | None) -> Any:
        """The model as its config describes it, parameters on the meta device; no weight file is opened."""
        from accelerate import init_empty_weights

        options = {"trust_remote_code": self._options["trust_remote_code"]}
        config = _from_pretrained(AutoConfig.from_pretrained, self.path, "model", **options)

        def build(_path: str, **options: Any) -> Any:
            with init_empty_weights(include_buffers=False):
                return AutoModelForCausalLM.from_config(config, dtype=dtype, **options)

        return _from_pretrained(build, self.path, "model", **self._options)

    def _open_files(self) -> dict[str, tuple[Callable[[], torch.Tensor], list[int]]]:
        """Name -> (reader, shape) of every tensor in the weight files."""
        readers = {}
        for file in self._files():
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 (no dict)
                    readers[name] = (_reader(file, name), list(handle.get_slice(name).get_shape()))
        return readers

    def _open_weights(self, model: nn.Module, dtype: torch.dtype) -> dict[str, Callable[[], torch.Tensor]]:
        """A reader for each parameter: straight from safetensors where names agree, else through transformers.

        transformers renames or fuses the weights of some architectures while it loads them; those are loaded
        whole on CPU and handed out from there.
        """
        readers = self._open_files()
        expected = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
        prefix = getattr(model, "base_model_prefix", "")
        if not set(expected) <= set(readers):
            bare = {f"{prefix}.{name}": reader for name, reader in readers.items()}  # saved without the head
            if set(expected) <= set(bare):
                readers = bare
        if all(name in readers and readers[name][1] == shape for name, shape in expected.items()):
            return {name: readers[name][0] for name in expected}
        whole = self.pretrained(dtype).state_dict()
        return {name: lambda tensor=tensor: tensor for name, tensor in whole.items()}  # type: ignore[misc]

    def _files(self) -> list[str]:
        folder = Path(self.path)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            folder = Path(
                _from_pretrained(snapshot_download, self.path, "model", allow_patterns=["*.safetensors", "*.json"])
            )
        index = folder / INDEX
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"--model {self.path}: {INDEX} is damaged ({error}); fetch the folder again") from error
        else:
            names = [SINGLE]
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise UserError(f"--model {self.path}: {missing[0]} is missing; fetch the folder again")
        for name in names:
            try:
                with safe_open(folder / name, framework="pt"):
                    pass
            except SafetensorError as error:
                raise UserError(
                    f"--model {self.path}: {name} is no readable safetensors file ({error}); fetch it again"
                ) from error
        return [str(folder / name) for name in names]


def _reader(file: str, name: str) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        with safe_open(file, framework="pt") as handle:
            return handle.get_tensor(name)

    return read


def _from_pretrained(load: Callable[..., Any], path: str, what: str, **options: Any) -> Any:
    """Call a from_pretrained and turn its failures into one line."""
    try:
        return load(path, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        meant = did_you_mean_path(path)  # a folder's name may look like one of the Hub
        raise UserError(f"--model {path}: the {what} cannot be loaded: {reason[:300]}{meant}") from error
