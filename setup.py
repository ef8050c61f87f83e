"""What is installed. The exact versions that the two set-up commands use stand in requirements*.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "dsft/__init__.py").read_text(encoding="utf-8")).group(1)
COMMANDS = ("train", "preview", "merge", "checkpoint", "report", "generate", "validate", "pipeline")

setup(
    name="dsft",
    version=VERSION,
    description="Supervised fine-tuning with one Trainer on FSDP2 or DeepSpeed ZeRO-3",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["dsft", "dsft.*"]), "dsft.ds_configs"],
    package_dir={"dsft.ds_configs": "ds_configs"},
    package_data={"dsft.ds_configs": ["*.json"]},
    install_requires=[
        "torch>=2.13",
        "transformers>=5.23",
        "peft>=0.21",
        "accelerate>=1.15",
        "deepspeed>=0.19.8,<0.20",  # dsft/backends/deepspeed_internals.py was read in 0.19.8
        "safetensors>=0.8",
        "pandas>=3",
        "pyarrow>=26",
        "numpy>=2",
        "wandb>=0.31",
        "fire>=0.7.1",
        "huggingface_hub>=2.4",
        "matplotlib>=3.11",
        "PyYAML>=6",
        "filelock>=4.2",
        "tqdm>=4.70",
        "rich>=15",
        "markdown-it-py>=4",
        "psutil>=7",
        "gguf>=0.19",
        "gymnasium>=1.4",
    ],
    extras_require={"tensorboard": ["tensorboard>=2.21"], "vllm": ["vllm"]},
    entry_points={"console_scripts": [f"dsft-{name} = dsft.{name}:main" for name in COMMANDS]},
)
