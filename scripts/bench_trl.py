#!/usr/bin/env python
"""TRL's side of the benchmarks: train one case with SFTTrainer and write what each step took.

bench_throughput.py and bench_gpu.py start it under torchrun, in TRL's own virtual environment. It imports nothing of
dsft: what it trains on stands in case.json, and the rows come as token ids and labels in a parquet file.

    torchrun --standalone --nproc_per_node 2 scripts/bench_trl.py case.json

It appends a line for each optimizer step to the file that the case names, and at its end one with the peak GPU memory.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch


def shard_on_cpu(backend: str, arguments) -> None:
    """Let accelerate shard on CPU as it does on accelerators.

    Left alone, it prepares FSDP2 for accelerators only (ranks on CPU would silently train whole models with DDP),
    and starts no ranks for DeepSpeed. Nothing below these two decisions needs an accelerator: the device stays the CPU.
    """
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    assert arguments.device.type == "cpu"
    if backend == "fsdp":
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    elif backend == "zero3":
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)


def prepare_deepspeed() -> None:
    """No compiling at start-up: the collective that DeepSpeed builds on CPU serves inference only."""
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def make_arguments(case: dict):
    """SFTConfig for the case: dsft's optimizer and schedule, and the settings with which TRL is fastest."""
    from trl import SFTConfig

    on_gpu = torch.cuda.is_available()
    options: dict = {}
    if case["backend"] == "fsdp":
        options = {"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": True}}
    elif case["backend"] == "zero3":
        options = {"deepspeed": case["ds_config"]}
    rows_at_once = int(os.environ.get("WORLD_SIZE", 1)) * case["micro_batch_size"]
    return SFTConfig(
        output_dir=case["output_dir"], use_cpu=not on_gpu, seed=case["seed"], num_train_epochs=case["epochs"],
        per_device_train_batch_size=case["micro_batch_size"],
        gradient_accumulation_steps=case["train_batch_size"] // rows_at_once,
        learning_rate=case["lr"], adam_beta1=case["betas"][0], adam_beta2=case["betas"][1],
        weight_decay=case["weight_decay"], max_grad_norm=case["clip_grad"],
        lr_scheduler_type="cosine", warmup_steps=case["warmup_steps"],
        bf16=case["dtype"] == "bfloat16",  # over a bfloat16 model and float32 LoRA: faster than all in bfloat16
        activation_checkpointing=case["gradient_checkpointing"],
        max_length=None,  # the rows are cut already
        dataset_kwargs={"skip_prepare_dataset": True},  # they come with labels
        train_sampling_strategy=case["trl_sampling"], dataloader_num_workers=0, dataloader_pin_memory=on_gpu,
        model_init_kwargs={"dtype": case["dtype"], "attn_implementation": "sdpa", "device_map": None},
        logging_steps=1, save_strategy="no", eval_strategy="no", report_to="none", disable_tqdm=True,
        **options,
    )  # fmt: skip


def make_trainer(case: dict):
    """SFTTrainer with a callback that writes a line for each optimizer step."""
    import pyarrow.parquet as pq
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTTrainer

    class CountingTrainer(SFTTrainer):
        """Counts the tokens that the model computes, padding among them."""

        computed = 0

        def compute_loss(self, model, inputs, *args, **kwargs):
            CountingTrainer.computed += inputs["input_ids"].numel()
            return super().compute_loss(model, inputs, *args, **kwargs)

    class Recorder(TrainerCallback):
        """Seconds from a step's first forward to the end of its update, then its loss and norm from the log."""

        def on_step_begin(self, args, state, control, **kwargs):
            CountingTrainer.computed = 0
            self.started = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds = time.perf_counter() - self.started
            computed = torch.tensor(CountingTrainer.computed, device=args.device)
            if torch.distributed.is_initialized():
                torch.distributed.all_reduce(computed)
            self.computed = int(computed)

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs and state.is_world_process_zero:
                line = {"step": state.global_step, "seconds": self.seconds, "computed_tokens": self.computed}
                append(case["steps_file"], line | {name: logs[name] for name in ("loss", "grad_norm")})

    arguments = make_arguments(case)  # first: with DeepSpeed it decides how from_pretrained loads
    if not torch.cuda.is_available():
        shard_on_cpu(case["backend"], arguments)
    rows = Dataset.from_dict(pq.read_table(case["rows_file"]).to_pydict())
    lora = {"r": case["lora_rank"], "lora_alpha": case["lora_alpha"], "lora_dropout": 0.0}
    return CountingTrainer(
        model=case["model"],
        args=arguments,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(case["model"]),
        peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **lora),
        callbacks=[Recorder()],
    )


def score_targets_only() -> None:
    """TRL's output head on the target positions only, on CPU too; by default, TRL does so only where Triton runs."""
    import trl.trainer.utils

    trl.trainer.utils._use_triton = lambda device: True


def append(file: str, line: dict) -> None:
    """One line of JSON, whole at once."""
    with open(file, "a", encoding="utf-8") as handle:
        handle.write(json.dumps(line) + "\n")


def main() -> None:
    """Train and write."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(__doc__)
        sys.exit(0 if sys.argv[1:] in (["-h"], ["--help"]) else 2)
    case = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(case["threads"])
    if case["backend"] == "zero3":
        prepare_deepspeed()
    if case["targets_only"]:
        score_targets_only()
    trainer = make_trainer(case)
    trainer.train()
    check_sharded(case["backend"], trainer.model)
    if trainer.is_world_process_zero():
        dtypes = sorted({f"{'trained' if p.requires_grad else 'frozen'} {p.dtype}" for p in trainer.model.parameters()})
        gpu = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
        append(case["steps_file"], {"end": True, "gpu_peak_gib": gpu, "dtypes": dtypes})
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    os._exit(0)  # gloo ranks can abort in the interpreter's clean-up, which a launcher reports as a failed run


def check_sharded(backend: str, model) -> None:
    """Refuse a run whose parameters were whole on every rank: it would have measured something else."""
    from torch.distributed.tensor import DTensor

    is_sharded = {"fsdp": lambda p: isinstance(p, DTensor), "zero3": lambda p: hasattr(p, "ds_id")}
    if backend != "plain" and not all(map(is_sharded[backend], model.parameters())):
        sys.exit(f"error: TRL has not sharded the model under {backend}")


if __name__ == "__main__":
    main()
