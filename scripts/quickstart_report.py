"""Print what the quickstart has shown: validation losses of both backends, one prompt before and after.

python scripts/quickstart_report.py out/quickstart smollm2-135m
"""

import json
import sys
from pathlib import Path

import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
NEW_TOKENS = 80


def validation_losses(run: Path) -> tuple[float, float]:
    """The validation loss before the first step, and the best one."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [(line["step"], line["val/loss"]) for line in lines if "val/loss" in line]
    return next(loss for step, loss in losses if step == 0), min(loss for step, loss in losses if step > 0)


def answer(model_folder: str, messages: list[dict]) -> str:
    """A greedy answer of a model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def main() -> None:
    """Print the report; exit with 1 where a run did not lower its validation loss."""
    from dsft.distributed import runtime
    from dsft.model.source import resolve_model

    runtime.silence_libraries()
    out = Path(sys.argv[1])
    worse = []
    for backend in ("fsdp", "zero3"):
        before, after = validation_losses(out / backend)
        print(f"{backend:<6} validation loss before {before:.6f}, after {after:.6f}")
        if not after < before:
            worse.append(backend)
    messages = pq.read_table(ROOT / "data/sample_val.parquet", columns=["prompt"])["prompt"][0].as_py()
    print(f"\nprompt: {messages[-1]['content']}")
    for name, folder in (("base model", resolve_model(sys.argv[2])), ("merged model", str(out / "fsdp/merged"))):
        print(f"\n{name}:\n{answer(folder, messages)}")
    if worse:
        sys.exit(f"error: the validation loss did not fall with {', '.join(worse)}")


if __name__ == "__main__":
    main()
