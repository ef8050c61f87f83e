#!/usr/bin/env python
"""Memory of a GPU and traffic between nodes, predicted for models and clusters that need not be at hand.

    python scripts/predict_clusters.py [--sizes 7,32,72] [--gpus 8,64,512] [--backends fsdp,zero3] [--lora_rank 64]

The models have Qwen2.5's shapes and no weights. Nodes have 8 GPUs of 80 GiB; each step has two rows of about 4,096
tokens per GPU. It prints what `python -m dsft.preview --device_memory 80` says, as a table.
"""

import argparse
import contextlib
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SHAPES = {  # hidden, intermediate, layers, heads, key-value heads
    "7": (3584, 18944, 28, 28, 4),
    "32": (5120, 27648, 64, 40, 8),
    "72": (8192, 29568, 80, 64, 8),
}
PER_NODE, DEVICE_MEMORY, ROWS_PER_GPU, WORDS = 8, 80, 2, 4000


def make_model(size: str, folder: Path) -> None:
    """A config.json, and the embedded model's tokenizer."""
    from transformers import AutoTokenizer, Qwen2Config

    from dsft.model.embedded import embedded_model

    hidden, inner, layers, heads, key_values = SHAPES[size]
    Qwen2Config(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=key_values, vocab_size=152064, architectures=["Qwen2ForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    AutoTokenizer.from_pretrained(embedded_model()).save_pretrained(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}', encoding="utf-8")  # a preview reads none


def main() -> None:
    """Predict and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="7,32,72", help="billions of parameters")
    parser.add_argument("--gpus", default="8,64,512", help="multiples of 8")
    parser.add_argument("--backends", default="fsdp,zero3")
    parser.add_argument("--lora_rank", type=int, default=64)
    words = parser.parse_args()
    from dsft.config import PreviewConfig
    from dsft.previewing.preview import make_preview

    print("| B | GPUs | backend | " + " | ".join(("full", "hybrid", "trainable")) + " |\n|" + " --- |" * 6)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        random, known = np.random.default_rng(0), np.array(["light", "water", "time", "year", "people", "day", "man"])
        for gpus in map(int, words.gpus.split(",")):
            prompts = [" ".join(random.choice(known, WORDS)) for _ in range(ROWS_PER_GPU * gpus)]
            file = folder / f"{gpus}.parquet"
            pq.write_table(pa.table({"prompt": prompts, "response": ["word " * 50] * len(prompts)}), file)
        for size in words.sizes.split(","):
            make_model(size, folder / size)
            for gpus in map(int, words.gpus.split(",")):
                for backend in words.backends.split(","):
                    config = PreviewConfig(
                        model=str(folder / size), train_files=[str(folder / f"{gpus}.parquet")], backend=backend,
                        lora_rank=words.lora_rank, max_length=8192, train_batch_size=ROWS_PER_GPU * gpus, rows=0,
                        ranks=gpus, nodes=gpus // PER_NODE, device_memory=DEVICE_MEMORY,
                    )  # fmt: skip
                    with contextlib.redirect_stdout(sys.stderr):
                        made = make_preview(config)
                    cells = {line.split(":")[0].split()[0]: cell(line) for line in made.shardings}
                    row = [size, str(gpus), backend, *(cells.get(name, "") for name in ("full", "hybrid", "trainable"))]
                    print(f"| {' | '.join(row)} |", flush=True)


def cell(line: str) -> str:
    """A line of the preview, shortened: GiB per GPU, and what a node receives; bold where it is chosen."""
    memory, received = re.search(r": (\S+ GiB)", line), re.search(r", (.*) to each node", line)
    assert memory, line
    text = memory[1] + (f", {received[1]}" if received else "")
    return f"**{text}**" if "(chosen)" in line else text


if __name__ == "__main__":
    main()
